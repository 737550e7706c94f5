"""Flags of a network that are changed for a while and given back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modeconn.network.modes import backward_in_eval_mode, flags_kept, use_batch_statistics
from tests.cases import CASES


def flags(model: nn.Module) -> list[bool]:
    return [*(module.training for module in model.modules()), *(p.requires_grad for p in model.parameters())]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_all_flags_are_as_before_also_after_an_exception(case, fails):
    model = case.make(0)
    model.get_submodule(next(name for name, _ in model.named_children())).train()  # a mixture, as users have it
    before = flags(model)
    try:
        with flags_kept(model):
            model.train().requires_grad_(False)
            assert flags(model) != before
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert flags(model) == before


def test_nothing_of_train_mode_is_left_but_batch_statistics():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.InstanceNorm1d(4)).train()
    use_batch_statistics(model)
    assert [module.training for module in model] == [False, True, False, True]
    use_batch_statistics(model, nn.BatchNorm1d)
    assert [module.training for module in model] == [False, True, False, False]


def test_cudnn_stays_on_for_models_it_can_differentiate():
    with backward_in_eval_mode(nn.Linear(2, 2)), backward_in_eval_mode(nn.LSTM(2, 2)):  # on the CPU it plays no part
        assert torch.backends.cudnn.enabled
