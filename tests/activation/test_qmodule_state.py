"""What a QModule keeps beside its layers: in copies of models that choose what is copied, in checkpoints, and what it refuses."""

import copy
import threading
import warnings

import pytest
import torch
from copies import through_pickle, through_torch_save
from torch import nn

import quantize
from quantize import ActivationConfig, QModule

FIXED = ActivationConfig(bits=2, max_bits=2)
WIDE = ActivationConfig(bits=8, max_bits=8)


# -------------------------------------------------------------------------------------------------------------------- copies


class Locked(nn.Module):
    """A model that leaves out of its copies what cannot be copied."""

    def __init__(self):
        super().__init__()
        self.layer, self.lock = nn.Linear(64, 8), threading.Lock()

    def forward(self, x):
        with self.lock:
            return self.layer(x).relu()

    def __getstate__(self):
        return {"everything": {key: value for key, value in self.__dict__.items() if key not in ("lock", "_control")}}

    def __setstate__(self, state):
        super().__setstate__(state["everything"])
        self.lock = threading.Lock()


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, through_pickle, through_torch_save])
@pytest.mark.parametrize("config", [FIXED, ActivationConfig(bits=2)], ids=["fixed", "adaptive"])
def test_models_with_a_state_of_their_own(way, config):
    model, x = QModule(Locked(), config), torch.randn(8, 64)
    model(x).sum().backward()
    twin = way(model)
    assert type(twin) is type(model) and twin.config == model.config and twin.lock is not model.lock
    assert torch.equal(twin(x), model(x))
    if way is not copy.copy:
        assert {id(s) for s in twin._control.layers} == {id(twin.layer._state)} != {id(model.layer._state)}
    assert twin.layer_bits().keys() == model.layer_bits().keys()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        twin(x)
    assert torch.uint8 in saved


# ------------------------------------------------------------------------------------------------------------ several QModules


def test_bits_of_a_layer_that_another_qmodule_converted():
    inner = QModule(nn.Sequential(nn.Linear(64, 8), nn.ReLU()), WIDE)
    assert inner.layer_bits() == {"0": 8.0}
    outer = QModule(nn.Sequential(inner, nn.Linear(8, 3)), FIXED)
    outer(torch.randn(4, 64)).sum().backward()
    assert inner.layer_bits() == {"0": 2.0}
    shared = nn.Linear(64, 8)
    first, second = QModule(nn.Sequential(shared), WIDE), QModule(nn.Sequential(shared), FIXED)
    assert first.layer_bits() == second.layer_bits() == {"0": 2.0}


def test_patterns_that_match_nothing_are_named():
    with pytest.warns(UserWarning, match=r"QModule: config's pattern 'layer7\*' matches no module of the model") as caught:
        QModule(nn.Sequential(nn.Linear(64, 16)), {"layer7*": FIXED, "0": None})
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QModule(nn.Sequential(nn.Linear(64, 16)), {"*": FIXED, "0": None, "": None})


# ------------------------------------------------------------------------------------------------------- indices, checkpoints


def by_gradient():
    return QModule(nn.Sequential(nn.Linear(64, 16)), ActivationConfig(bits=2, use_gradient=True))


def test_indices_are_one_a_sample():
    model, x = by_gradient(), torch.randn(8, 64)
    model.set_sample_indices(torch.arange(5))
    with pytest.raises(ValueError, match="set_sample_indices: indices must be one for each of the 8 samples; got 5"):
        model(x)
    model(x).sum().backward()  # the wrong ones are forgotten
    for _ in range(2):
        model.set_sample_indices(torch.arange(8))
        model(x).sum().backward()
    assert model.activation_state()["0"]["sample_weight"].isfinite().all()


class Anything(nn.Linear):
    """Takes inputs of any form and looks at none."""

    def forward(self, *inputs, **more):
        return super().forward(torch.ones(8, 64))


IMAGES = torch.ones(8, 3, 32, 32)
FORMS = {
    "images": ([IMAGES], {}, [8], [3, 32]),
    "a list of images": ([[torch.ones(3, 30, 20), torch.ones(3, 20, 30)], [{"boxes": torch.ones(5, 4)}, {}]], {}, [2], [4, 8, 64]),
    "several": ([torch.ones(8, 64)], {"mask": torch.ones(8, 5)}, [8], [5, 64]),
    "vectors, sequence first": ([torch.ones(5, 8, 64)], {}, [8], [64]),
    "tokens, sequence first": ([torch.ones(5, 8, dtype=torch.int64)], {}, [8], [3]),
    "a tuple": ([(torch.ones(8, 64), torch.ones(()))], {}, [8], [2, 64]),
    "no tensors": ([3], {}, [1, 8, 100], []),
}


@pytest.mark.parametrize("form", FORMS)
def test_how_many_samples_an_input_has(form):
    args, kwargs, right, wrong = FORMS[form]
    model = QModule(nn.Sequential(Anything(64, 16)), ActivationConfig(use_gradient=True))
    model.forward = lambda *args, **kwargs: model[0](*args, **kwargs)
    for count in right:
        model.set_sample_indices(torch.arange(count))
        model(*args, **kwargs)
    for count in wrong:
        model.set_sample_indices(torch.arange(count))
        with pytest.raises(ValueError, match=rf"indices must be one for each of the .*\b{right[0]}\b.* samples; got {count}$"):
            model(*args, **kwargs)


class SequenceFirst(nn.Linear):
    def forward(self, x):
        return super().forward(x.data if isinstance(x, nn.utils.rnn.PackedSequence) else x.transpose(0, 1))


@pytest.mark.parametrize("packed", [False, True])
def test_indices_of_samples_that_do_not_come_first(packed):
    model = quantize.QModule(SequenceFirst(8, 2), quantize.ActivationConfig(bits=2, use_gradient=True))
    model.set_sample_indices(torch.tensor([3, 0, 1, 2]))
    x = torch.randn(7, 4, 8)
    y = model(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 5, 5, 2])) if packed else x)
    (y.sum() if packed else (y.sum((1, 2)) * torch.arange(1, 5)).sum()).backward()
    learned = model.activation_state()[""]["sample_weight"]
    if packed:  # rows are of steps, whose samples it does not know
        assert learned is None and y.shape == (19, 2) and model.weight.grad.any()
    else:  # two features of each sample, with its factor's square
        torch.testing.assert_close(learned, torch.tensor([2.0 * 4, 2 * 9, 2 * 16, 2 * 1]))


def test_reports_between_indices_and_their_batch():
    model, x = by_gradient(), torch.randn(8, 64)
    model.set_sample_indices(torch.arange(8))
    quantize.memory_report(model, x[:2])
    model(x).sum().backward()
    assert model.activation_state()["0"]["sample_weight"].isfinite().all()


def test_a_loaded_budget_may_be_an_integer():
    model = quantize.QModule(nn.Sequential(nn.Linear(512, 8)), quantize.ActivationConfig(bits=2, max_bits=8))
    model(torch.randn(4, 512)).sum().backward()
    state = model.activation_state()
    state["0"]["budget"] = 3
    model.load_activation_state(state)
    assert model.activation_state()["0"]["budget"] == 3
    model(torch.randn(4, 512)).sum().backward()
    assert model.layer_bits() == {"0": 3.0}


def convolutions():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 3))


def learned_state(config, model=None):
    torch.manual_seed(0)
    model = QModule(model or convolutions(), config)
    for _ in range(3):
        model.set_sample_indices(torch.arange(8))
        model(torch.randn(8, 3, 16, 16)).square().sum().backward()
    return model.activation_state()


@pytest.mark.parametrize("bits, max_bits", [(1, 8), (2, 8), (4, 4)])
@pytest.mark.parametrize("per_layer", [False, True])
def test_bits_are_the_configurations_whatever_was_loaded(bits, max_bits, per_layer):
    state = learned_state(ActivationConfig(bits=3, per_layer=per_layer, use_gradient=True))
    config, x = ActivationConfig(bits=bits, max_bits=max_bits, per_layer=False), torch.randn(8, 3, 16, 16)
    fresh, model = QModule(convolutions(), config), QModule(convolutions(), config)
    model.load_activation_state(state)
    assert quantize.memory_report(model, x).saved_bytes == quantize.memory_report(fresh, x).saved_bytes
    model(x).sum().backward()
    assert model.layer_bits() == dict.fromkeys("012", bits)
    kept = model.activation_state()
    for name, values in state.items():  # what is learned stays
        assert (kept[name]["curve"], kept[name]["updates"]) == (values["curve"], values["updates"])
        assert torch.equal(kept[name]["sample_weight"].nan_to_num(), values["sample_weight"].nan_to_num())


class Calls(nn.Module):
    """A layer, a parameter of its own and a gate."""

    def __init__(self):
        super().__init__()
        self.norm, self.weight = nn.BatchNorm2d(3), nn.Parameter(torch.randn(16, 3, 3, 3))

    def forward(self, x):
        y = nn.functional.conv2d(self.norm(x), self.weight)
        return y * y.mean((2, 3), keepdim=True).sigmoid()


LEARNING = ActivationConfig()


@pytest.mark.parametrize(
    "make, config, kept",
    [
        (convolutions, {"*": None, "0": LEARNING}, ["0"]),
        (convolutions, {"*": LEARNING, "1": None}, ["0", "2"]),
        (convolutions, {"*": LEARNING, "2": ActivationConfig(enabled=False)}, ["0", "1"]),
        (Calls, {"*": LEARNING, "": None}, ["norm"]),
        (Calls, {"*": LEARNING, "": ActivationConfig(enabled=False)}, ["norm"]),
        (Calls, {"*": LEARNING, "norm": None}, ["", "mul#1"]),
    ],
)
def test_loaded_states_of_layers_that_are_not_compressed_are_left_out(make, config, kept):
    state = learned_state(LEARNING, make())
    assert len(state) == 3
    model, same = QModule(make(), config), {name: state[name] for name in kept}
    model.load_activation_state(state)
    assert model.layer_bits().keys() == set(kept) and str(model.activation_state()) == str(same)
    model(torch.randn(8, 3, 16, 16)).sum().backward()
    assert model.layer_bits().keys() == set(kept)


def test_a_loaded_state_is_a_copy():
    model, x = by_gradient(), torch.randn(8, 64)
    model.set_sample_indices(torch.arange(8))
    model(x).sum().backward()
    state = copy.deepcopy(model.activation_state())
    before = copy.deepcopy(state)
    model.load_activation_state(state)
    for _ in range(2):
        model.set_sample_indices(torch.arange(8))
        model(2 * x).square().sum().backward()
    assert not torch.equal(model.activation_state()["0"]["sample_weight"], before["0"]["sample_weight"])
    assert torch.equal(state["0"]["sample_weight"], before["0"]["sample_weight"])


def test_figures_on_their_way_are_taken_in_order_and_wait_for_none():
    # What a GPU's copies and events do, by hand.
    class Event:
        def __init__(self, there):
            self.there = there

        def query(self):
            return self.there

        def synchronize(self):
            self.there = True

    control, taken = QModule(nn.Linear(64, 8))._control, []
    control.arriving = [(taken.append, number, Event(there)) for number, there in enumerate((True, False, True))]
    control.receive()
    assert taken == [0]  # the third must not overtake the second
    assert copy.deepcopy(control).arriving == []
    control.receive(wait=True)
    assert taken == [0, 1, 2] and not control.arriving
