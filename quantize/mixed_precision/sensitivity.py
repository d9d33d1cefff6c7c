"""Sensitivity: what few bits cost in accuracy, layer by layer and between layers, and what they save."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from ..packed.modules import PackedLayer
from ..packed.plain import refuse_wrappers
from ..table import aligned
from ..weight.config import Uniform
from ..weight.prepare import tensor_names
from .choices import Choice, check_choices, choice_text, config_of
from .fields import WHO, check_finite, configs_of, count_of, members_of, names_of, numbers_of, shapes_of, text_of
from .projection import nearest_positive


def _expm1(value: float) -> float:
    return math.expm1(value) if value < 709 else math.inf


LINKS = {"identity": float, "log1p": _expm1}  # how the growth follows from the quadratic form


class Sensitivity:
    """How much the loss grows with each layer's choice of bits, and what each choice costs.

    For an assignment x, one-hot in each layer, ``x @ matrix @ x`` predicts the growth, or its ``log(1 + growth)`` (:meth:`predict`).
    :func:`quantize.measure_sensitivity` measures one, :func:`quantize.allocate` finds the best assignment within a budget.

    Args:
        layers: L different names: modules', or groups' of modules that have the same bits.
        choices: K different pairs (weight_bits, activation_bits); None: not quantized.
        matrix: [L*K, L*K], entry (l*K + k, m*K + j) of layer l at choice k with layer m at choice j. Made symmetric.
        bytes, bit_ops: [L, K], of the stored layer and of a sample's forward pass through it.
        configs: K weight configurations or None, one for each choice; if not given :class:`quantize.Uniform`'s.
        members: the modules that a layer stands for, by its name; if not given the module of that name.
        shapes: of the modules' weights, ``{module: {tensor: shape}}``; if given, models are compared with them.
        link: ``"identity"``, or ``"log1p"`` if the matrix is of log(1 + growth).
        method, metric, samples: how it was measured.
        other_bytes: of the converted model's file beside these layers.

    Attributes:
        layers, choices, configs, members, shapes, link, method, metric, samples, other_bytes: the arguments, as tuples and dicts.
        matrix, bytes, bit_ops: the arguments, as tensors on the CPU; the matrix is float64.
        parameters: int64 [L], weights of each layer, None without shapes.
        values: float64 [L, K], what each choice costs by itself.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> matrix = torch.diag(torch.tensor([0.4, 0.1, 0.0, 0.9, 0.2, 0.0]))
        >>> sizes = torch.tensor([[20, 40, 80], [10, 20, 40]])
        >>> sensitivity = quantize.Sensitivity(["conv", "fc"], [(2, None), (4, None), (8, None)], matrix, sizes, 100 * sizes)
        >>> round(sensitivity.predict({"conv": (4, None), "fc": (8, None)}), 6)
        0.1
    """

    def __init__(
        self,
        layers: Sequence[str],
        choices: Sequence[Choice],
        matrix: Tensor,
        bytes: Tensor,
        bit_ops: Tensor,
        *,
        configs: Sequence | None = None,
        members: Mapping[str, Sequence[str]] | None = None,
        shapes: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
        link: str = "identity",
        method: str = "",
        metric: str = "",
        samples: int = 0,
        other_bytes: int = 0,
    ):
        self.layers, self.choices = names_of(layers), check_choices(choices, WHO)
        made = configs if configs is not None else [config_of(Uniform, choice, WHO) for choice in self.choices]
        self.configs = configs_of(made, len(self.choices))
        count, each = len(self.layers), len(self.choices)
        self.matrix = self._checked("matrix", matrix, (count * each, count * each)).double()
        self.matrix = self.matrix / 2 + self.matrix.T / 2  # their sum may be beyond all floats
        self.bytes = self._checked("bytes", bytes, (count, each), least=0)
        self.bit_ops = self._checked("bit_ops", bit_ops, (count, each), least=0)
        self.members = members_of(members, self.layers)
        self.shapes = shapes_of(shapes, self.members)
        if not isinstance(link, str) or link not in LINKS:
            raise ValueError(f"{WHO}: link must be one of {', '.join(map(repr, LINKS))}; got {link!r}")
        self.link = link
        self.method, self.metric = text_of("method", method), text_of("metric", metric)
        self.samples, self.other_bytes = count_of("samples", samples), count_of("other_bytes", other_bytes)

    def _checked(self, name: str, table, shape: tuple[int, int], least: float | None = None) -> Tensor:
        table = numbers_of(name, table)
        if table.shape != shape:
            raise ValueError(
                f"Sensitivity: {name} must be {list(shape)} for {len(self.layers)} layers and {len(self.choices)} choices; "
                f"got {list(table.shape)}"
            )
        check_finite(name, table, self.layers, self.choices, least)
        return table

    @property
    def parameters(self) -> Tensor | None:
        """int64 [L]: weights of each layer."""
        if not self.shapes:
            return None
        counts = {module: sum(torch.Size(shape).numel() for shape in own.values()) for module, own in self.shapes.items()}
        return torch.tensor([sum(counts[module] for module in self.members[name]) for name in self.layers])

    @property
    def values(self) -> Tensor:
        """float64 [L, K]: the matrix' diagonal, what each choice costs by itself."""
        return self.matrix.diagonal().view(len(self.layers), len(self.choices))

    def one_hot(self, choice: Mapping[str, Choice]) -> Tensor:
        """The assignment as a vector.

        Args:
            choice: one of the choices for each layer, by name.

        Returns:
            float64 [L*K]: 1 at each layer's choice, else 0.

        Raises:
            TypeError: `choice` is no mapping.
            ValueError: it lacks a layer or names one, or a choice, that is none.
        """
        if not isinstance(choice, Mapping):
            raise TypeError(f"Sensitivity: choice must be a mapping from layers to choices; got {choice!r}")
        unknown = set(choice) - set(self.layers)
        if unknown:
            raise ValueError(f"Sensitivity: choice must be of its layers; got {sorted(map(str, unknown))[0]!r}, which is none of them")
        x = torch.zeros(len(self.layers), len(self.choices), dtype=torch.float64)
        for row, name in zip(x, self.layers, strict=True):
            if name not in choice:
                raise ValueError(f"Sensitivity: choice must have all layers; {name!r} is missing")
            own = tuple(choice[name]) if isinstance(choice[name], Sequence) else choice[name]
            if own not in self.choices:
                raise ValueError(f"Sensitivity: choice must be one of {self.choices}; got {choice[name]!r} for {name!r}")
            row[self.choices.index(own)] = 1
        return x.flatten()

    def predict(self, choice: Mapping[str, Choice]) -> float:
        """The growth for an assignment: ``x @ matrix @ x``, with the link undone.

        Args:
            choice: one of the choices for each layer, by name.

        Returns:
            The growth, in the metric's unit.

        Raises:
            TypeError, ValueError: as :meth:`one_hot`.
        """
        x = self.one_hot(choice)
        return LINKS[self.link](float(x @ self.matrix @ x))

    def without_cross_terms(self) -> Sensitivity:
        """The same with the matrix' diagonal alone: with KL, what ZeroQ has."""
        return self._with(torch.diag(self.matrix.diagonal()))

    def saturated(self) -> Sensitivity:
        """The same for log(1 + growth), in nats: each pair's, and each choice's own.

        A quadratic form adds up what layers do. But two layers that each destroy the signal do hardly more together than one of them: pairs
        measured so have large negative cross terms, of which a sum over many layers is far too low. Their logarithms add up better, and
        what is small stays as it is. :meth:`predict` undoes the logarithm. ValueError if the loss of a pair falls by a nat or more.
        """
        if self.link == "log1p":
            return self
        single = self.matrix.diagonal()
        growth = 2 * self.matrix + single + single[:, None]
        least = min(float(single.min()), float(growth.min()))
        if least <= -1:
            raise ValueError(f"saturated: matrix must be of growths above -1, as KL's are; got {least:.3g}")
        matrix = (growth.log1p() - single.log1p() - single[:, None].log1p()) / 2
        matrix.diagonal().copy_(single.log1p())
        return self._with(matrix, link="log1p")

    def projected(self) -> Sensitivity:
        """The same with the nearest positive semidefinite matrix that has this diagonal (Higham's alternating projections).

        Two choices of one layer are never in force together: their entries may become anything.

        Pairs measured one by one have noise that can make the matrix indefinite. :func:`quantize.allocate` takes that as it is; other
        solvers may want this. Clipping eigenvalues, as CLADO does, would change the diagonal, where the small values of many bits
        drown. Source: Higham, IMA Journal of Numerical Analysis 22 (2002), algorithm 3.3. ValueError if the diagonal has negative entries:
        then there is no such matrix.
        """
        layer = torch.arange(len(self.matrix)) // len(self.choices)
        free = (layer == layer[:, None]) & ~torch.eye(len(layer), dtype=torch.bool)
        return self._with(nearest_positive(self.matrix, free))

    def _with(self, matrix: Tensor, **changed) -> Sensitivity:
        names = ("configs", "members", "shapes", "link", "method", "metric", "samples", "other_bytes")
        rest = {name: getattr(self, name) for name in names} | changed
        return Sensitivity(self.layers, self.choices, matrix, self.bytes, self.bit_ops, **rest)

    def check_model(self, model: nn.Module) -> None:
        """Compares the layers that this one was measured on with a model's.

        Args:
            model: a float or prepared model.

        Raises:
            TypeError: `model` is no nn.Module or a wrapper around it.
            ValueError: naming the first layer that it lacks, that is converted or not initialized, or whose weights have other shapes.
        """
        refuse_wrappers(model, WHO)
        modules = dict(model.named_modules())
        for name in self.layers:
            for member in self.members[name]:
                if member not in modules:
                    raise ValueError(f"Sensitivity: model must have layer {member!r}; it has not, so this is of another model")
                if isinstance(modules[member], PackedLayer):
                    raise ValueError(f"Sensitivity: model must be a float or prepared one; layer {member!r} is converted")
                weights = {tensor: getattr(modules[member], tensor) for tensor in tensor_names(modules[member])}
                if any(isinstance(weight, UninitializedTensorMixin) for weight in weights.values()):
                    raise ValueError(
                        f"Sensitivity: model must be initialized; layer {member!r} is not: run a batch through the lazy layer first"
                    )
                found = {tensor: tuple(weight.shape) for tensor, weight in weights.items()}
                expected = self.shapes.get(member, found)
                if not found or found != expected:
                    shapes = f"weights {_shapes_text(expected)}" if expected else "weights"
                    raise ValueError(
                        f"Sensitivity: model must have {shapes} in layer {member!r}; got {_shapes_text(found)}, so this is of another model"
                    )

    def save(self, path) -> None:
        """Writes it to one safetensors file, no pickle. The file takes the place of an older one only when it is complete.

        Args:
            path: str or PathLike, of a file.

        Raises:
            TypeError: `path` is no path.
            OSError: the file cannot be written.
        """
        from .file import save

        save(self, path)

    @staticmethod
    def load(path) -> Sensitivity:
        """The inverse of :meth:`save`.

        Args:
            path: str or PathLike, of a file that :meth:`save` wrote.

        Returns:
            Sensitivity: equal to the one that was saved.

        Raises:
            TypeError: `path` is no path.
            FileNotFoundError: there is no such file.
            ValueError: naming what is wrong with the file.
        """
        from .file import load

        return load(path)

    def __str__(self):
        header = ("layer", *(f"{choice_text(choice)}" for choice in self.choices))
        rows = [(name, *(f"{value:.3g}" for value in row)) for name, row in zip(self.layers, self.values.tolist(), strict=True)]
        return aligned(header, rows, "<" + ">" * len(self.choices)) + f"\n{self._title()}"

    def _title(self) -> str:
        words = [f"{len(self.layers)} layers, {len(self.choices)} choices", self.method, self.metric, f"{self.samples} samples"]
        return "; ".join(word for word in words if word and word != "0 samples")

    def __repr__(self):
        return f"Sensitivity({self._title()})"


def _shapes_text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{tensor} {list(shape)}" for tensor, shape in shapes.items()) or "none"
