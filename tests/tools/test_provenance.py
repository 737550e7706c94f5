"""Every artefact says which call or command made it, of which data, with which versions, also from its file."""

import copy
import dataclasses
import json
import pickle
import threading

import pytest
import torch

import modeconn
from modeconn import (
    Comparison,
    Connection,
    DeepAlign,
    PermutationSpec,
    Recipe,
    Relabelling,
    WeightMatching,
    data,
    models,
)
from modeconn.measure.profile import Profile
from modeconn.network.batches import checksum, described, in_order
from modeconn.tools import provenance
from modeconn.tools.door import checked
from modeconn.tools.fingerprint import identify
from modeconn.tools.rng import seeded

ONE = Recipe(epochs=1)


@pytest.fixture(scope="module")
def made():
    train, test = data.load("digits")
    a, b = (models.train(models.mlp(64, (8,), 10, seed=seed), train, recipe=ONE, seed=seed) for seed in (1, 2))
    connection = modeconn.fit_curve(a, b, train, recipe=ONE, align=WeightMatching(), seed=7)
    return {
        "network": a,
        "spec": modeconn.discover(a),
        "alignment": modeconn.align(a, b, train),
        "connection": connection,
        "profile": connection.evaluate(test, num_points=3),
    }


def test_a_result_tells_call_data_and_versions(made):
    train, test = data.load("digits")
    found = made["connection"].made_by
    assert found["call"].startswith("fit_curve(") and "seed=7" in found["call"] and "epochs=1" in found["call"]
    assert "WeightMatching()" in found["call"] and "<MLP" in found["call"]
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["modeconn"] == modeconn.__version__
    with seeded(0):  # as the loader, which shuffles, is looked at
        batch = next(iter(in_order(train)))
    assert found["data"] == {"loader": f"first batch {described(batch)}, CRC-32 {checksum(batch):08x}"}
    assert made["profile"].made_by["call"].startswith("Connection.evaluate(")
    assert f"{checksum(next(iter(test))):08x}" in made["profile"].made_by["data"]["loader"]


def test_the_outermost_call_describes_all_that_it_returns(made):
    alignment = made["alignment"]
    assert alignment.made_by["call"].startswith("align(")
    assert alignment.permutation.made_by == alignment.model_b.made_by == alignment.made_by
    assert made["connection"].permutation.made_by == made["connection"].made_by


def test_files_keep_it(made, tmp_path):
    path = tmp_path / "file"
    read = {
        "network": (models.save, models.load),
        "spec": (PermutationSpec.save, PermutationSpec.load),
        "connection": (Connection.save, Connection.load),
    }
    for name, (write, load) in read.items():
        write(made[name], path)
        assert load(path).made_by == made[name].made_by
    made["alignment"].permutation.save(path)
    assert Relabelling.load(path).made_by == made["alignment"].made_by
    assert Profile.from_json(made["profile"].to_json()).made_by == made["profile"].made_by


def test_copies_keep_it(made):
    for name in ("network", "spec", "alignment", "connection", "profile"):
        for travelled in (copy.deepcopy(made[name]), pickle.loads(pickle.dumps(made[name]))):
            assert travelled.made_by == made[name].made_by


def test_it_is_no_part_of_what_a_result_is(made):
    spec = modeconn.discover(made["network"], None)
    provenance.keep(spec, {"call": "another"})
    assert spec == made["spec"] and identify(spec) == identify(made["spec"])
    other = copy.deepcopy(made["network"])
    provenance.keep(other, {"call": "another"})
    assert identify(other) == identify(made["network"])
    assert provenance.ATTRIBUTE not in {field.name for field in dataclasses.fields(made["profile"])}


def test_calls_side_by_side_do_not_mix():
    @checked
    def discovered(width: int) -> object:
        return modeconn.discover(models.mlp(4, (width,), 2))

    found = {}
    threads = [
        threading.Thread(target=lambda width=width: found.update({width: discovered(width)})) for width in range(2, 8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[width].made_by["call"] == f"discovered(width={width})" for width in range(2, 8))


def test_a_command_comes_first():
    with provenance.command("modeconn something"):
        spec = modeconn.discover(models.mlp(4, (3,), 2))
    assert list(spec.made_by)[:2] == ["command", "call"] and spec.made_by["command"] == "modeconn something"
    assert "command" not in modeconn.discover(models.mlp(4, (3,), 2)).made_by


@pytest.mark.parametrize("kind", [Comparison, DeepAlign, Relabelling, PermutationSpec, Connection])
def test_without_a_call_nobody_knows(kind):
    assert kind.made_by is None and provenance.entry(kind) == {}


def test_json_holds_it_readably(made):
    record = json.loads(made["profile"].to_json())
    assert record["made_by"] == made["profile"].made_by
