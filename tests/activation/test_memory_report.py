"""memory_report against the storages that are really there, and that it leaves no trace."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantize
from quantize import ActivationConfig, QModule

FIXED = ActivationConfig(bits=2, max_bits=2)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def live_bytes(model, *inputs):
    """Storages that the graph of one forward holds, found by weak references to what autograd was given: parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held = []

    class Holder:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        holder = Holder(tensor)
        held.append(weakref.ref(holder))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        output = model(*inputs)
    gc.collect()
    storages = {}
    for reference in held:
        if reference() is not None:
            storage = reference().tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
    del output
    return sum(storages.values())


CONFIGS = [FIXED, ActivationConfig(bits=2), ActivationConfig(bits=8, max_bits=8, group_size="sample"), {"*": FIXED, "4": None}, {}]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_saved_bytes_are_the_live_storages(config):
    plain = network()
    ours = QModule(copy.deepcopy(plain), config)
    for x in (torch.randn(8, 3, 32, 32), torch.randn(4, 3, 33, 31).to(memory_format=torch.channels_last)):
        report = quantize.memory_report(ours, x)
        assert report.saved_bytes == live_bytes(ours, x)
        assert report.baseline_bytes == live_bytes(plain, x)
        assert sum(row.bytes for row in report.layers) == report.saved_bytes
        assert report.ratio == report.baseline_bytes / report.saved_bytes


def test_of_a_plain_model():
    plain, x = network(), torch.randn(4, 3, 32, 32)
    report = quantize.memory_report(plain, x)
    assert report.saved_bytes == report.baseline_bytes == live_bytes(plain, x)
    assert all(row.bits == 32 or row.bits == 64 for row in report.layers if row.bytes > 4096)


def test_two_bits_are_worth_what_they_should():
    model = QModule(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, padding=1)), FIXED)
    report = quantize.memory_report(model, torch.randn(8, 16, 32, 32))
    elements = 8 * 16 * 32 * 32
    groups = elements // 256
    assert report.saved_bytes == 2 * (elements // 4 + groups * 4) + elements // 8 + 2 * 16  # codes, ranges; the mask; two seeds
    assert report.baseline_bytes == 2 * elements * 4


def test_a_tensor_that_two_layers_keep_counts_once():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.a(x) + self.b(x)

    report = quantize.memory_report(QModule(Fork(), FIXED), torch.randn(8, 3, 16, 16))
    elements = 8 * 3 * 16 * 16
    assert report.saved_bytes == elements // 4 + 8 * 3 * 4 + 16
    assert report.baseline_bytes == elements * 4


@pytest.mark.parametrize("config", [FIXED, ActivationConfig(bits=2)], ids=["fixed", "adaptive"])
def test_nothing_changes(config):
    model, x = QModule(network(), config), torch.randn(8, 3, 32, 32)
    for _ in range(3):
        model(x).sum().backward()
    handles = []
    before = copy.deepcopy(model.state_dict())
    learned = copy.deepcopy(model.activation_state())
    bits, generator = model.layer_bits(), torch.get_rng_state()
    grads = [p.grad.clone() for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for _ in range(2):
        quantize.memory_report(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.layer_bits() == bits
    assert str(model.activation_state()) == str(learned)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.training
    assert not handles


PREPARED = [quantize.Uniform(8, activation_bits=8), quantize.DiffQ(activation_bits="learned"), quantize.DoReFa(4, 4), quantize.XNOR()]


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("config", PREPARED, ids=str)
def test_quantizers_start_after_the_report(config, compress):
    # A report's input, which may be random, must not decide where the first layer's grid starts.
    model, x = quantize.prepare(nn.Sequential(nn.Linear(64, 32)), config), torch.randn(16, 64)
    untouched = copy.deepcopy(model)
    if compress:
        QModule(model, FIXED)
    attributes = {k: v for k, v in vars(model[0].activation_quantizer).items() if not k.startswith("_")}
    quantize.memory_report(model, 100 * x)
    quantize.variance_report(model, [(100 * x, x)], lambda y, _: y.sum(), draws=1)
    assert {k: v for k, v in vars(model[0].activation_quantizer).items() if not k.startswith("_")} == attributes
    assert all(torch.equal(v, untouched.state_dict()[k]) for k, v in model.state_dict().items())
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    assert torch.equal(y, untouched(x))
    assert all(torch.equal(v, untouched.state_dict()[k]) for k, v in model.state_dict().items())


def test_under_no_grad_and_in_evaluation():
    model, x = QModule(network(), FIXED), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert quantize.memory_report(model, x).saved_bytes == quantize.memory_report(model, x).saved_bytes > 0
        assert not torch.is_grad_enabled()
    model.eval()
    assert quantize.memory_report(model, x).saved_bytes < quantize.memory_report(model.train(), x).saved_bytes


def test_inference_mode_is_refused_by_name():
    model = QModule(network(), FIXED)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"memory_report: model must not be run in torch.inference_mode\(\)"):
        quantize.memory_report(model, torch.randn(4, 3, 32, 32))


def test_rows_name_layer_op_bits_and_reason():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
            self.kept, self.pool, self.drop, self.fc = nn.Conv2d(16, 16, 3), nn.MaxPool2d(2), nn.Dropout(0.5), nn.Linear(16 * 225, 8)

        def forward(self, x):
            x = F.relu(self.norm(self.stem(x)))
            x = torch.sin(self.pool(self.kept(x)))
            return self.fc(self.drop(x).flatten(1)).exp()

    model = QModule(Mixed(), {"*": FIXED, "kept": None})
    report = quantize.memory_report(model, torch.randn(8, 3, 32, 32))
    rows = {(row.name, row.op): row for row in report.layers}
    by_name = {row.name: row for row in report.layers}
    assert report.layers == sorted(report.layers, key=lambda row: -row.bytes)
    assert by_name["stem"].bits == by_name["fc"].bits == 2
    assert by_name["stem"].reason == ""
    assert by_name["pool"].bits == 8
    assert by_name["drop"].bits == 1
    assert by_name["norm"].bits == 2
    assert by_name["norm"].reason == ""
    assert by_name["kept"].bits == 32
    assert by_name["kept"].reason == "disabled by its config"
    assert any(row.bits == 1 and "relu" in row.op for row in report.layers)
    assert any("sin" in row.op and "no compressed version of sin" in row.reason for row in report.layers), rows
    assert quantize.memory_report(model.double(), torch.randn(8, 3, 32, 32).double()).layers[0].reason == "float64 is kept as it is"


@pytest.mark.parametrize("convert", [QModule, nn.Sequential])
def test_workspaces_of_recurrent_layers_are_not_taken_for_compressed(convert):
    for layer in (nn.LSTM(32, 64), nn.GRU(32, 64)):
        report = quantize.memory_report(convert(nn.Sequential(layer)), torch.randn(40, 16, 32))
        assert report.saved_bytes == report.baseline_bytes
        assert all(row.reason for row in report.layers if row.bytes > 4096)
        for row in report.layers:
            assert row.bits == 32 or row.reason == "workspace of PyTorch's lstm, kept as it is"


def test_the_table_prints():
    report = quantize.memory_report(QModule(network(), FIXED), torch.randn(8, 3, 32, 32))
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "op", "bits", "KiB", "in", "full", "precision", "because"]
    assert set(lines[1]) == set(lines[-2]) == {"-"}
    assert lines[-1] == (
        f"saved for backward: {report.saved_bytes / 2**20:.2f} MiB; the plain model: {report.baseline_bytes / 2**20:.2f} MiB "
        f"({report.ratio:.1f} times as much)"
    )
    assert len(lines) == len(report.layers) + 4
    assert max(map(len, lines)) <= 140
    assert repr(report).startswith("MemoryReport(saved_bytes=")


def test_keyword_like_inputs_and_several():
    model = QModule(nn.Bilinear(6, 5, 4), FIXED)
    report = quantize.memory_report(model, torch.randn(8, 6), torch.randn(8, 5))
    assert report.baseline_bytes == report.saved_bytes == 4 * 8 * 11


def test_after_an_exception_nothing_is_left():
    model = QModule(network(), FIXED)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="input must be .N, 3, H, W."):
        quantize.memory_report(model, torch.randn(2, 4, 32, 32))
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert quantize.memory_report(model, torch.randn(2, 3, 32, 32)).ratio > 5


@pytest.mark.parametrize("bad", [None, "model", torch.ones(3), lambda x: x])
def test_only_modules(bad):
    with pytest.raises(TypeError, match="memory_report: model must be an nn.Module"):
        quantize.memory_report(bad, torch.randn(3))


@pytest.mark.parametrize("compress", [True, False])
def test_nothing_stays_alive(compress):
    # Sigmoid saves its output: a report that kept it would keep the graph, and the graph itself.
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sigmoid(), nn.ReLU(), nn.Conv2d(8, 8, 3))
    if compress:
        model = quantize.QModule(model)
    alive = weakref.ref(model[0].weight)
    quantize.memory_report(model, torch.randn(2, 3, 16, 16))
    del model
    gc.collect()
    assert alive() is None


class Functional(nn.Module):
    """A model whose calls are its own: what is known of them is not in any layer."""

    def __init__(self):
        super().__init__()
        self.fc, self.kept = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        x = F.silu(self.fc(x))
        return F.softplus(self.kept(x)).square().sum(1)


@pytest.fixture
def parallel(process_group):
    """DistributedDataParallel, of one process."""
    return nn.parallel.DistributedDataParallel


@pytest.mark.parametrize("kind", ["inside another", "DistributedDataParallel"])
def test_the_qmodule_may_be_inside(kind, parallel):
    config = {"*": ActivationConfig(bits=2, use_gradient=True), "kept": None}
    alone = QModule(Functional(), config)
    inner = copy.deepcopy(alone)
    outer, root = (nn.Sequential(nn.Identity(), inner), "1") if kind == "inside another" else (parallel(inner), "module")
    x, indices = torch.randn(32, 64), torch.arange(32)
    for model in (alone, inner):
        model.set_sample_indices(indices)
    torch.manual_seed(1)
    want = quantize.memory_report(alone, x)
    torch.manual_seed(1)
    got = quantize.memory_report(outer, x)
    assert (got.saved_bytes, got.baseline_bytes) == (want.saved_bytes, want.baseline_bytes)
    assert got.layers == [row._replace(name=f"{root}.{row.name}".rstrip(".")) for row in want.layers]
    assert {row.reason for row in got.layers} >= {"", "disabled by its config", "no compressed version of softplus"}
    assert inner.activation_state().keys() == {"fc"} and inner._control.indices is not None  # as before the report
