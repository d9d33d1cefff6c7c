"""A tensor that several layers read is packed once."""

import pytest
import torch
from torch import nn

from quantize import ActivationConfig, QModule


class Fork(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.a(x).sum() + self.b(x).sum()


def codes_of(model, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = model(x)
    return [t for t in saved if t.dtype == torch.uint8 and t.numel() > 64], loss


@pytest.mark.parametrize("config", [ActivationConfig(bits=2, max_bits=2), ActivationConfig(bits=2)], ids=["fixed", "adaptive"])
def test_consumers_of_one_tensor_share_its_packing(config):
    model, x = QModule(Fork(), config), torch.randn(8, 3, 16, 16)
    codes, loss = codes_of(model, x)
    assert len(codes) == 2
    assert codes[0].data_ptr() == codes[1].data_ptr()
    loss.backward()
    later, _ = codes_of(model, x)
    assert later[0].data_ptr() != codes[0].data_ptr()
    assert not torch.equal(later[0], codes[0])  # fresh noise for the same tensor


@pytest.mark.parametrize(
    "config", [{"a": ActivationConfig(bits=2), "b": ActivationConfig(bits=4)}, {"a": ActivationConfig(bits=2)}], ids=str
)
def test_different_configs_do_not_share(config):
    codes, loss = codes_of(QModule(Fork(), config), torch.randn(8, 3, 16, 16))
    assert len({t.data_ptr() for t in codes}) == len(config)
    loss.backward()


def test_a_tensor_changed_in_between_is_packed_again():
    class Changed(Fork):
        def forward(self, x):
            x = x * 1
            y = self.a(x).sum()
            x.mul_(2.0)
            return y + self.b(x).sum()

    codes, loss = codes_of(QModule(Changed(), ActivationConfig(bits=2, max_bits=2)), torch.randn(8, 3, 16, 16))
    assert codes[0].data_ptr() != codes[1].data_ptr()
    loss.backward()


def test_shared_packings_are_learned_from_once():
    class Apart(Fork):
        def forward(self, x):
            return self.a(x).sum() + self.b(x * 1).sum()

    plain, x, learned = Fork(), torch.randn(8, 3, 16, 16), []
    for kind in (Fork, Apart):
        model = kind()
        model.load_state_dict(plain.state_dict())
        QModule(model, ActivationConfig(bits=2))
        for _ in range(5):
            model(x).backward()
        assert model.layer_bits() == {"a": 2.0, "b": 2.0}
        learned.append(model.activation_state())
    shared, apart = learned
    assert shared["a"]["updates"] == 5 and shared["b"] == {**apart["b"], "curve": None, "updates": 0, "elements": 0}
    both = [a + b for a, b in zip(apart["a"]["curve"], apart["b"]["curve"], strict=True)]
    assert shared["a"]["curve"] == pytest.approx(both, rel=1e-5)  # the noise of one packing reaches both


# ---------------------------------------------------------------------------------------------------------------- life goes on
