"""Deep-Align fitted by several processes."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from modeconn import DeepAlign, models
from modeconn.data import TensorLoader


def fitted(rank, path=None, num_steps=6, connectivity=1.0, own_data=False):
    torch.manual_seed(0)
    loader = TensorLoader(torch.rand(64, 6), torch.arange(64) % 3, batch_size=8, shuffle=True)
    if own_data:
        mine = slice(rank, None, torch.distributed.get_world_size())
        examples = TensorDataset(loader.inputs[mine], loader.targets[mine])
        loader = DataLoader(examples, batch_size=8, shuffle=True)
    networks = [models.mlp(6, (8,), 3, seed=seed) for seed in range(6)]
    aligner = DeepAlign(
        features=4, edge_features=4, depth=1, num_steps=num_steps, validate_every=2, batch_size=2,
        connectivity=connectivity,
    )  # fmt: skip
    made = aligner.fit(networks, loader if connectivity else None, checkpoint=path, sharded=own_data)
    state = {name: tensor.clone() for name, tensor in made.fitted.encoder.state_dict().items()}
    return state, made.fitted.history, made.fitted.validation


def test_all_processes_end_with_one_encoder(pool):
    (state, losses, validations), (other, *rest) = pool.run(2, fitted)
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    assert rest == [losses, validations]
    (alone,) = pool.run(1, fitted)
    assert alone[1] != losses  # of twice as many pairs
    assert alone[2][0] == validations[0]


def test_all_processes_end_with_one_encoder_on_data_of_their_own(pool):
    (state, *rest), (other, *others) = pool.run(2, fitted, None, 6, 1.0, True)
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items()) and rest == others


@pytest.mark.parametrize("connectivity", [0.0, 1.0])
def test_an_interrupted_fit_ends_with_the_same_bits(pool, tmp_path, connectivity):
    path = str(tmp_path / "run.safetensors")
    whole = pool.run(2, fitted, None, 6, connectivity)
    assert pool.run(2, stopped, path, connectivity) == ["KeyboardInterrupt"] * 2
    found = pool.run(2, fitted, path, 6, connectivity)
    for (state, losses, _), (expected, expected_losses, _) in zip(found, whole, strict=True):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
        assert losses == expected_losses


def stopped(rank, path, connectivity):
    from modeconn.deep_align.training import EncoderTraining

    whole = EncoderTraining._step

    def step(self, optimizer, number):
        if number == 5:
            raise KeyboardInterrupt
        whole(self, optimizer, number)

    EncoderTraining._step = step
    try:
        fitted(rank, path, 6, connectivity)
    except BaseException as error:
        return type(error).__name__
    finally:
        EncoderTraining._step = whole
