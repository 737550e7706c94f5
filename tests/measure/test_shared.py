"""What several processes measure together is what one measures."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import modeconn
from modeconn import PGD, WeightMatching
from modeconn.data import TensorLoader


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3)).eval()


def data(count=60, size=16, **settings):
    torch.manual_seed(0)
    return TensorLoader(torch.rand(count, 6), torch.arange(count) % 3, batch_size=size, **settings)


def connection():
    training = modeconn.TrainingData(data(shuffle=True))
    return modeconn.Connection.straight_between(network(1), network(2), training=training)


def values_of(found):
    own = {f"own {name}": value for name, value in found.own.items()}
    return {name: value for name, value in {**found.values, **own}.items()}


def profile(rank, num_points=7):
    metrics = {"disagreement": modeconn.metrics.disagreement("a")}
    return connection().evaluate(data(), num_points=num_points, metrics=metrics)


class Noisy(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x + torch.randn_like(x))


def noisy_profile(rank):
    return modeconn.Connection.straight_between(Noisy(1), Noisy(2)).evaluate(data(), num_points=5)


def robust(rank, num_points=3, transfer=False, path=None):
    attacks = {"pgd": PGD(0.1, 0.03, 3), "weak": PGD(0.01, 0.01, 1)}
    return connection().robustness(
        data(), attacks, num_points=num_points, transfer=transfer, checkpoint=path, recalibration_examples=32
    )


def one_network(rank):
    return modeconn.robustness(network(1), data(), PGD(0.1, 0.03, 3))


def evaluated(rank):
    metrics = {"top 2": modeconn.metrics.top_k(2)}
    return modeconn.evaluate(network(1), data(), recalibrate=data(shuffle=True), metrics=metrics)


def curvature(rank):
    return connection().curvature(data(), num_points=3, num_steps=20)


def comparison(rank, path=None):
    pairs = [(network(1), network(2)), (network(3), network(4))]
    recipe = modeconn.Recipe(1)
    table = modeconn.compare(
        pairs, {"weights": WeightMatching()}, data(), data(20), num_points=3, recipe=recipe, references=True,
        checkpoint=path,
    )  # fmt: skip
    timed = ("seconds", "curve seconds", "peak bytes")
    # As texts, in which NaN equals NaN.
    return {row: {n: repr(v) for n, v in columns.items() if n not in timed} for row, columns in table.values.items()}


@pytest.mark.parametrize("measure", [profile, noisy_profile, robust, one_network, evaluated, curvature])
@pytest.mark.parametrize("size", [2, 4])
def test_the_same_as_in_one_process(pool, size, measure):
    (expected,) = pool.run(1, measure)
    for found in pool.run(size, measure):
        assert torch.equal(found.t, expected.t) and found.num_examples == expected.num_examples
        assert values_of(found).keys() == values_of(expected).keys()
        for name, values in values_of(expected).items():
            assert torch.equal(values_of(found)[name], values), name


def test_seconds_are_those_of_the_measuring(pool):
    assert 0 < pool.run(1, robust)[0].seconds < 100


def test_transfer_is_the_same_as_in_one_process(pool):
    (expected,) = pool.run(1, robust, 3, True)
    for found in pool.run(2, robust, 3, True):
        for name, matrix in expected.transfer.items():
            assert torch.equal(found.transfer[name], matrix)


@pytest.mark.parametrize("num_points", [2, 9])
def test_more_or_fewer_points_than_processes(pool, num_points):
    (expected,) = pool.run(1, profile, num_points)
    assert all(torch.equal(found.loss, expected.loss) for found in pool.run(4, profile, num_points))
    (expected,) = pool.run(1, robust, num_points)
    for found in pool.run(4, robust, num_points):
        assert torch.equal(found.losses["pgd"], expected.losses["pgd"])


def test_a_comparison_is_that_of_one_process(pool):
    (expected,) = pool.run(1, comparison)
    assert pool.run(2, comparison) == [expected] * 2


def test_measurements_are_written_by_the_first_and_known_to_all(pool, tmp_path):
    path = str(tmp_path / "measured.jsonl")
    pool.run(2, robust, 3, False, path)
    written = (tmp_path / "measured.jsonl").read_text()
    assert len(written.strip().splitlines()) == 3 * 3 * 4
    pool.run(4, robust, 3, False, path)
    assert (tmp_path / "measured.jsonl").read_text() == written
    compared = str(tmp_path / "compared.jsonl")
    before = pool.run(2, comparison, compared)
    written = (tmp_path / "compared.jsonl").read_text()
    assert pool.run(1, comparison, compared) == before[:1]
    assert (tmp_path / "compared.jsonl").read_text() == written


def refused(rank, what):
    loader, settings, made = data(), {}, connection()
    if what == "points":
        settings["num_points"] = 3 + rank
    elif what == "data":
        loader = data(count=60 + rank)
    elif what == "network" and rank == 1:
        made = modeconn.Connection.straight_between(network(2), network(1), training=made.training)
    elif what in ("sampler", "recalibrate"):
        examples = TensorDataset(loader.inputs, loader.targets)
        sharded = DataLoader(examples, batch_size=8, sampler=DistributedSampler(examples))
        if what == "recalibrate":
            settings["recalibrate"] = sharded
        else:
            loader = sharded
    elif what == "later data" and rank == 1:
        targets = loader.targets.clone()
        targets[-1] = 0
        loader = list(TensorLoader(loader.inputs, targets, batch_size=16))
    elif what == "later data":
        loader = list(loader)
    elif what == "loss_fn" and rank == 1:
        settings["loss_fn"] = nn.CrossEntropyLoss(label_smoothing=0.1)
    elif what == "metrics":
        settings["metrics"] = {"m": modeconn.metrics.disagreement("ab"[rank])}
    elif what == "attacks":
        return made.robustness(loader, PGD(0.1 * (1 + rank), 0.03, 3), num_points=3)
    elif what == "wrt":
        return made.curvature(loader, wrt=("weights", "inputs")[rank], num_points=3, num_steps=5)
    elif what == "recalibrate of one":
        examples = TensorDataset(loader.inputs, loader.targets)
        return modeconn.evaluate(
            network(1), loader, recalibrate=DataLoader(examples, sampler=DistributedSampler(examples))
        )
    elif what == "another network":
        return modeconn.evaluate(network(rank), loader)
    elif what == "verbs":
        return made.curvature(loader, num_points=3) if rank else made.evaluate(loader, num_points=3)
    elif what == "metric":
        settings["metrics"] = {"failing": failing}
    return made.evaluate(loader, **settings)


def failing(outputs, targets):
    if torch.distributed.get_rank() == 1:
        raise ArithmeticError("in one process")
    return 1.0, 1.0


REFUSED = {
    "points": "processes differ: t is list(0.0, 0.5, 1.0) in process 0 and list(0.0, 0.333",
    "network": "processes differ: the digest of the control points is",
    "sampler": "loader yields other examples in each of 2 processes, and here all of them need",
    "recalibrate": "recalibrate yields other examples in each of 2 processes",
    "later data": "processes differ: the digest of loader is",
    "loss_fn": "processes differ: loss_fn is",
    "metrics": "processes differ: metrics is",
    "attacks": "processes differ: attacks is",
    "wrt": "processes differ: wrt is",
    "recalibrate of one": "recalibrate yields other examples in each of 2 processes",
    "another network": "processes differ: the digest of model is",
    "verbs": "the processes are at different places of their work. Call it in every process",
    "metric": "process 1 of 2 failed: ValueError: metric 'failing' cannot compare",
}


@pytest.mark.parametrize("what", REFUSED)
def test_processes_that_do_not_fit_together_are_refused(pool, what):
    found = pool.outcomes(2, refused, what)
    assert str(found[0]).startswith(REFUSED[what]), found
    assert isinstance(found[1], Exception)


def test_data_that_differ_in_length_are_refused(pool):
    found = pool.outcomes(2, refused, "data")
    assert str(found[0]).startswith("processes differ: the digest of loader is")
