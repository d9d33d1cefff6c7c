"""remove_hooks: ours go, with all that is noted of them, and everybody else's stay."""

import copy

import torch
from torch import nn

from quantize.hooks import remove_hooks


class Ours:
    def __call__(self, *args):
        return None


TABLES = [f"_forward{kind}" for kind in ("_pre_hooks", "_pre_hooks_with_kwargs", "_hooks", "_hooks_with_kwargs", "_hooks_always_called")]


def test_ours_go_and_others_stay():
    module, seen = nn.Linear(2, 2), []
    module.register_forward_pre_hook(lambda m, a, k: seen.append("before"), with_kwargs=True)
    module.register_forward_hook(lambda m, a, k, o: seen.append("after"), with_kwargs=True, always_call=True)
    before = {name: dict(getattr(module, name)) for name in TABLES}
    tables = {name: getattr(module, name) for name in TABLES}
    for _ in range(2):
        module.register_forward_pre_hook(Ours(), with_kwargs=True, prepend=True)
        module.register_forward_hook(Ours(), with_kwargs=True, always_call=True, prepend=True)
    copied = copy.deepcopy(module)
    remove_hooks(module, lambda hook: isinstance(hook, Ours))
    assert all(getattr(module, name) is tables[name] for name in TABLES)  # packed layers watch these very objects
    assert {name: dict(getattr(module, name)) for name in TABLES} == before
    module(torch.ones(2))
    assert seen == ["before", "after"]
    remove_hooks(copied, lambda hook: isinstance(hook, Ours))
    assert [len(getattr(copied, name)) for name in TABLES] == [len(before[name]) for name in TABLES]
