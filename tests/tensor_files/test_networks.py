"""Networks in files: what is done with one tensor of each in memory is what is done in memory, or proves itself."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

import modeconn
from benchmarks.llama import SMALL, Config, Llama, small
from modeconn import models, tensor_files
from modeconn.network.sketch import sketch
from modeconn.tensor_files import TensorFiles, reading
from tests.tensor_files.test_tensor_files import Alive, in_memory

SYMMETRIES = ("permutation", "orthogonal")


class Normed(nn.Module):
    """Layer norms with biases, packed attention, positions in a buffer that is not saved, counts that are."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.out = nn.Linear(16, 5)
        self.register_buffer("scale", torch.linspace(0.5, 2.0, 6)[:, None], persistent=False)
        self.register_buffer("steps", torch.tensor(7))

    def example_input(self):
        return torch.arange(12).view(2, 6) % 11

    def forward(self, x):
        x = self.embed(x) * self.scale
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.out(x + self.mlp(x))


class Counted(nn.Module):
    """A network that reads channels by positions in a buffer that is saved."""

    def __init__(self, kept=(0, 2, 3, 5, 7, 8)):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 12), nn.Linear(len(kept), 9), nn.Linear(9, 3)
        self.register_buffer("kept", torch.tensor(kept))

    def example_input(self):
        return torch.randn(2, 4)

    def forward(self, x):
        return self.third(self.second(self.first(x).relu()[:, self.kept]).relu())


def perceptron():
    return models.mlp(12, (9, 7), 3)


def tied():
    return Llama(Config(layers=1, width=16, hidden=20, heads=2, key_heads=1, vocabulary=30, tied=True))


NETWORKS = {"perceptron": perceptron, "llama": small, "normed": Normed, "tied": tied, "counted": Counted}


def made(factory, seed, dtype=torch.float32):
    torch.manual_seed(seed)
    network = factory().to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1]))
    return network


def kept(network, path):
    """Write a network as Hugging Face does: tied weights once."""
    seen, state = set(), {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach().clone()
    path.mkdir()
    safetensors.torch.save_file(state, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text('{"tie_word_embeddings": true, "inner": {"tie_word_embeddings": true}}')
    return path


def read(factory, path, dtype=torch.float32):
    network = factory().to(dtype).eval()
    held = in_memory(path)
    with torch.no_grad():
        for name, tensor in network.state_dict(keep_vars=True).items():
            if name in held:
                tensor.copy_(held[name])
    return network


def apart(one, other, x):
    with torch.no_grad():
        return float((one(x) - other(x)).abs().max())


@pytest.fixture
def pair(tmp_path):
    def make(factory, dtype=torch.float32):
        networks = [made(factory, seed, dtype) for seed in (1, 2)]
        return networks, [kept(network, tmp_path / name) for network, name in zip(networks, "ab", strict=True)]

    return make


# -- models without memory


def test_buffers_of_a_sketch_keep_their_values():
    drawn = sketch(Counted)
    assert torch.equal(drawn.kept, torch.tensor([0, 2, 3, 5, 7, 8])) and drawn.first.weight.is_meta
    head = sketch(tied)
    assert head.lm_head.weight is head.model.embed_tokens.weight
    assert not nn.Linear(2, 2).weight.is_meta  # of others, nothing is changed


# -- alignment


@pytest.mark.parametrize("name", NETWORKS)
def test_alignment_by_tensors_is_that_in_memory(pair, tmp_path, name):
    factory = NETWORKS[name]
    (a, b), paths = pair(factory)
    x = factory().example_input()
    found = tensor_files.align(*paths, tmp_path / "out", model=factory, example_input=x)
    expected = modeconn.align(a, b, method=modeconn.WeightMatching(), example_input=x)
    assert found.permutation == expected.permutation and found.history == pytest.approx(expected.history, rel=1e-6)
    assert not found.permutation.is_identity
    own = expected.model_b.state_dict()
    held = in_memory(tmp_path / "out")
    assert held.keys() == in_memory(paths[1]).keys() and all(torch.equal(held[n], own[n]) for n in held)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("name", ["llama", "normed", "tied"])
@pytest.mark.parametrize("untie", [False, True])
def test_rotated_networks_are_the_same_functions(pair, tmp_path, name, untie):
    factory = NETWORKS[name]
    (a, b), paths = pair(factory, torch.float64)
    x = factory().example_input()
    how = {"symmetries": "orthogonal", "untie": untie, "example_input": x}
    found = tensor_files.align(*paths, tmp_path / "out", out_a=tmp_path / "folded", model=factory, **how)
    assert found.permutation.spec.untied is untie
    assert json.loads((tmp_path / "out" / "config.json").read_text())["inner"]["tie_word_embeddings"] is not untie

    def loose():
        network = factory()
        if untie and name == "tied":
            network.lm_head.weight = nn.Parameter(network.lm_head.weight.detach().clone())
        return network

    assert apart(read(loose, tmp_path / "out", torch.float64), b, x) < 1e-10
    assert apart(read(loose, tmp_path / "folded", torch.float64), a, x) < 1e-10
    expected = modeconn.align(a, b, method=modeconn.WeightMatching(), verify=False, **how)
    assert found.history[-1] == pytest.approx(expected.history[-1], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetries", SYMMETRIES)
def test_what_was_shuffled_is_found_back(tmp_path, symmetries, dtype):
    a = kept(made(small, 1, dtype), tmp_path / "a")
    how = {"model": small, "symmetries": symmetries}
    shuffled = tensor_files.shuffle(a, tmp_path / "shuffled", seed=3, shard_bytes=5_000, **how)
    assert len(list((tmp_path / "shuffled").glob("*.safetensors"))) > 3
    assert not shuffled.permutation.is_identity
    assert tensor_files.difference(a, shuffled.path).largest["model.layers.0.mlp.up_proj.weight"] > 0.1
    back = tensor_files.align(a, shuffled.path, tmp_path / "back", out_a=tmp_path / "folded", **how)
    found = tensor_files.difference(tmp_path / "folded", back.path)
    # Rounded when it was shuffled, when it is found back, and a when it is folded.
    assert max(found.relative.values()) <= (torch.finfo(dtype).eps if symmetries == "orthogonal" else 0.0) * (
        1 if dtype is torch.bfloat16 else 20
    )
    verdict = tensor_files.verify(a, shuffled.path, **how)
    assert verdict.is_one_function and "one function" in repr(verdict)
    assert verdict.to_json() and json.loads(verdict.to_json())["is_one_function"]


def test_one_seed_is_one_relabelling(tmp_path):
    a = kept(made(small, 1), tmp_path / "a")
    drawn = [tensor_files.shuffle(a, tmp_path / f"{n}", seed=n // 2, model=small).permutation for n in range(3)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_relabelling_to_begin_at_and_a_spec_are_taken(pair, tmp_path):
    (a, b), paths = pair(small)
    spec = modeconn.discover(a)
    begin = spec.random(torch.Generator().manual_seed(5))
    method = modeconn.WeightMatching(start=begin, num_starts=2)
    found = tensor_files.align(*paths, tmp_path / "out", model=small, spec=spec, method=method)
    assert found.permutation == modeconn.align(a, b, method=method, spec=spec).permutation
    with pytest.raises(ValueError, match=r"symmetries= is for discovery, and spec= was discovered"):
        tensor_files.align(*paths, tmp_path / "two", model=small, spec=spec, symmetries="orthogonal")
    with pytest.raises(ValueError, match=r"start= is a method, which needs networks in memory"):
        method = modeconn.WeightMatching(start=modeconn.WeightMatching())
        tensor_files.align(*paths, tmp_path / "two", model=small, method=method)
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("symmetries", SYMMETRIES)
def test_one_tensor_of_each_network_is_in_memory(pair, tmp_path, monkeypatch, symmetries):
    _, paths = pair(small)
    alive = Alive(reading._values)
    monkeypatch.setattr(reading, "_values", alive)
    how = {"model": small, "symmetries": symmetries}
    tensor_files.align(*paths, tmp_path / "out", out_a=tmp_path / "folded", **how)
    tensor_files.verify(*paths, **how)
    tensor_files.merge(paths, tmp_path / "mean", **how)
    largest = max(entry.num_bytes for entry in TensorFiles(paths[0]).entries.values())
    assert alive.most <= 2 * largest and alive.now == 0


def test_a_plan_reads_no_weight_and_tells_all(pair, tmp_path, monkeypatch):
    _, paths = pair(small)
    alive = Alive(reading._values)
    monkeypatch.setattr(reading, "_values", alive)
    found = tensor_files.plan(paths, model=small)
    assert found.is_ready and alive.most == 0 and found.num_bytes == sum(TensorFiles(p).num_bytes for p in paths)
    assert found.spec == modeconn.discover(small()) and "holds the model" in repr(found)
    deeper = Config(**{**vars(SMALL), "layers": 4, "vocabulary": 60})
    found = tensor_files.plan(paths, model=lambda: Llama(deeper))
    assert not found.is_ready and repr(found).count("18 missing: model.layers.2") == 2
    assert all(f"model.layers.3.{name}" in repr(found) for name in ("mlp.up_proj.weight", "input_layernorm.weight"))
    assert "lm_head.weight is (50, 24) there and (60, 24) in the model" in repr(found)
    with pytest.raises(ValueError, match=r"does not hold the model that is asked for: 18 missing: .* and 8 more; 2 of"):
        tensor_files.align(*paths, tmp_path / "out", model=lambda: Llama(deeper))
    shallow = Config(**{**vars(SMALL), "layers": 1})
    with pytest.raises(ValueError, match=r"9 unexpected: model.layers.1.input_layernorm.weight"):
        tensor_files.shuffle(paths[0], tmp_path / "out", model=lambda: Llama(shallow))
    assert not (tmp_path / "out").exists()


# -- what is not one function


def test_other_networks_are_not_shown_to_be_one_function(pair):
    _, paths = pair(small)
    verdict = tensor_files.verify(*paths, model=small)
    assert not verdict.is_one_function and len(verdict.differing) > 10 and "not shown" in repr(verdict)


@pytest.mark.parametrize("symmetries", SYMMETRIES)
def test_a_small_change_is_no_rounding(tmp_path, symmetries):
    a = kept(made(small, 1), tmp_path / "a")
    how = {"model": small, "symmetries": symmetries}
    changed = made(small, 1)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    shuffled = tensor_files.shuffle(kept(changed, tmp_path / "b"), tmp_path / "shuffled", **how)
    verdict = tensor_files.verify(a, shuffled.path, **how)
    assert not verdict.is_one_function
    assert max(verdict.relative, key=verdict.relative.get) == "model.layers.1.mlp.up_proj.weight"
    if symmetries == "permutation":
        assert verdict.differing == ("model.layers.1.mlp.up_proj.weight",)


def test_outputs_are_compared_where_asked(pair, tmp_path):
    (a, b), paths = pair(small)
    x = torch.randint(50, (3, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = float((a(x).double() - b(x).double()).abs().max() / a(x).double().std(correction=0))
    assert tensor_files.verify(*paths, model=small, inputs=x).outputs == pytest.approx(expected, rel=1e-4)
    shuffled = tensor_files.shuffle(paths[0], tmp_path / "shuffled", model=small)
    assert tensor_files.verify(paths[0], shuffled.path, model=small, inputs=x).outputs < 1e-5


# -- several networks


@pytest.mark.parametrize("name", ["perceptron", "llama"])
def test_merging_by_tensors_is_merging_in_memory(tmp_path, name):
    factory = NETWORKS[name]
    networks = [made(factory, seed, torch.float64) for seed in range(3)]
    paths = [kept(network, tmp_path / f"{number}") for number, network in enumerate(networks)]
    found = tensor_files.merge(paths, tmp_path / "out", model=factory)
    expected = modeconn.merge_many(networks)
    assert all(x == y for x, y in zip(found.permutations, expected.permutations, strict=True))
    assert found.history == pytest.approx(expected.history) and len(found.history) > 2
    held, own = in_memory(tmp_path / "out"), expected.model.state_dict()
    assert all(torch.allclose(held[n], own[n], rtol=0, atol=1e-12) for n in held)


def test_rotated_networks_merge_to_the_network_that_they_are(tmp_path):
    a = kept(made(small, 1), tmp_path / "a")
    how = {"model": small, "symmetries": "orthogonal"}
    paths = [a, *(tensor_files.shuffle(a, tmp_path / f"{seed}", seed=seed, **how).path for seed in (1, 2))]
    merged = tensor_files.merge(paths, tmp_path / "out", weights=[2, 1, 1], **how)
    assert merged.history[-1] < 1e-8 * merged.history[0]
    assert tensor_files.verify(a, merged.path, **how).is_one_function


def test_averages_are_those_of_the_tensors(tmp_path):
    paths = [kept(made(small, seed), tmp_path / f"{seed}") for seed in range(3)]
    tensor_files.average(paths, tmp_path / "out", weights=[1, 2, -1], dtype=torch.float64)
    states = [in_memory(path) for path in paths]
    for name, tensor in in_memory(tmp_path / "out").items():
        expected = sum(w * state[name].double() for w, state in zip((0.5, 1, -0.5), states, strict=True))
        assert tensor.dtype is torch.float64 and torch.allclose(tensor, expected, atol=1e-6)
    for weights in ([1, 2], [1, -1, 0], [math.inf, 1, 1]):
        with pytest.raises(ValueError, match=r"weights= must be 3 finite numbers that do not sum to zero"):
            tensor_files.average(paths, tmp_path / "more", weights=weights)
    assert not (tmp_path / "more").exists()


def test_windows_are_of_the_last_checkpoints():
    names = ["run/step-1000", "run/step-200", "run/step-90", "run/step-900"]
    found, weights = tensor_files.window(names, last=3, decay=0.5)
    assert [path.name for path in found] == ["step-200", "step-900", "step-1000"] and weights == [0.25, 0.5, 1.0]
    for settings, said in (({"last": 5}, "last= must lie in 1..4"), ({"decay": 0.0}, r"decay= must lie in \(0, 1\]")):
        with pytest.raises(ValueError, match=said):
            tensor_files.window(names, **settings)


def test_batch_norm_is_merged_with_data(tmp_path):
    def factory():
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))

    paths = [kept(made(factory, seed), tmp_path / f"{seed}") for seed in range(2)]
    with pytest.raises(ValueError, match=r"needs statistics of training data for batch norm"):
        tensor_files.merge(paths, tmp_path / "out", model=factory, example_input=torch.randn(2, 4))
    found = tensor_files.align(*paths, tmp_path / "out", model=factory, example_input=torch.randn(2, 4))
    assert apart(read(factory, found.path), read(factory, paths[1]), torch.randn(5, 4)) < 1e-5


@pytest.mark.parametrize("symmetries", SYMMETRIES)
def test_a_task_is_moved_under_the_names_of_the_base(tmp_path, symmetries):
    old = made(small, 1, torch.float64)
    tuned = made(small, 1, torch.float64)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9))
    how = {"model": small, "symmetries": symmetries}
    paths = [kept(network, tmp_path / name) for network, name in ((old, "old"), (tuned, "tuned"))]
    base = tensor_files.shuffle(paths[0], tmp_path / "base", seed=4, **how)
    found = tensor_files.add_task(base.path, paths[1], paths[0], tmp_path / "out", **how)
    x = old.example_input()
    assert apart(read(small, found.path, torch.float64), tuned, x) < 1e-9 < apart(old, tuned, x)


# -- what is refused


def test_a_tie_that_files_break_is_told(tmp_path):
    loose = Llama(Config(layers=1, width=16, hidden=20, heads=2, key_heads=1, vocabulary=30))
    path = kept(loose, tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds two tensors, 'model.embed_tokens.weight' and 'lm_head.weight', that"):
        tensor_files.shuffle(path, tmp_path / "out", model=tied)
    found = tensor_files.shuffle(path, tmp_path / "out", model=tied, untie=True)
    assert apart(read(lambda: Llama(Config(layers=1, width=16, hidden=20, heads=2, key_heads=1, vocabulary=30)),
                      found.path), loose, tied().example_input()) < 1e-5  # fmt: skip


def test_positions_are_those_of_the_files(tmp_path):
    """What the factory's buffer holds does not count; what the files' buffers hold has to be the same in both."""
    a, b = (kept(made(lambda: Counted((1, 4, 5, 6, 9, 11)), seed), tmp_path / f"{seed}") for seed in (1, 2))
    found = tensor_files.align(a, b, tmp_path / "out", model=Counted)
    assert found.permutation.spec.positions == {"kept": (1, 4, 5, 6, 9, 11)}
    assert apart(read(Counted, found.path), read(Counted, b), torch.randn(5, 4)) < 1e-5
    c = kept(made(lambda: Counted((0, 4, 5, 6, 9, 11)), 3), tmp_path / "c")
    with pytest.raises(ValueError, match=r"'kept', by which units are read, holds other positions"):
        tensor_files.align(a, c, tmp_path / "more", model=Counted)


def test_weights_that_are_no_numbers_are_told(pair, tmp_path):
    (_, b), paths = pair(small)
    with torch.no_grad():
        b.model.norm.weight[3] = math.nan
        b.lm_head.weight[3, 3] = math.nan
    shutil.rmtree(paths[1])
    kept(b, paths[1])
    with pytest.raises(ValueError, match=r"the weight 'model.norm.weight' of a or b holds NaN or infinite entries"):
        tensor_files.align(*paths, tmp_path / "out", model=small)
    with pytest.raises(ValueError, match=r"the gain 'model.norm.weight' holds NaN"):
        tensor_files.align(*paths, tmp_path / "out", model=small, symmetries="orthogonal")
    assert not (tmp_path / "out").exists()


def test_what_stands_where_it_would_be_written_stays(pair, tmp_path):
    _, paths = pair(small)
    (tmp_path / "out").mkdir()
    for act in (
        lambda: tensor_files.align(*paths, tmp_path / "new", out_a=tmp_path / "out", model=small),
        lambda: tensor_files.shuffle(paths[0], tmp_path / "out", model=small),
        lambda: tensor_files.merge(paths, tmp_path / "out", model=small),
        lambda: tensor_files.average(paths, tmp_path / "out"),
    ):
        with pytest.raises(FileExistsError, match=r"exists. Choose another name, or pass overwrite=True"):
            act()
    assert not list((tmp_path / "out").iterdir()) and not (tmp_path / "new").exists()
    tensor_files.shuffle(paths[0], tmp_path / "out", model=small, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_model_that_needs_values_is_told(tmp_path):
    class Steered(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            y = self.first(x)
            return self.second(y if y.sum() > 0 else -y)

    path = kept(made(Steered, 1), tmp_path / "a")
    with pytest.raises(ValueError, match=r"Such networks are aligned in memory, with modeconn.align"):
        tensor_files.shuffle(path, tmp_path / "out", model=Steered, example_input=torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"model must be a function that returns a torch.nn.Module"):
        tensor_files.shuffle(path, tmp_path / "out", model=lambda: 3)


# -- what goes wrong while it is written


VERBS = {
    "align": lambda a, b, out: tensor_files.align(a, b, out, model=small, shard_bytes=5_000),
    "shuffle": lambda a, b, out: tensor_files.shuffle(a, out, model=small, shard_bytes=5_000),
    "merge": lambda a, b, out: tensor_files.merge([a, b], out, model=small, shard_bytes=5_000),
    "add_task": lambda a, b, out: tensor_files.add_task(a, b, a, out, model=small, shard_bytes=5_000),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_fills_at_the_third_shard_leaves_nothing(pair, tmp_path, monkeypatch, verb):
    _, paths = pair(small)
    synced, before = [], sorted(tmp_path.rglob("*"))

    def sync(file):
        synced.append(file)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match=r"cannot write .*out' \(No space left on device\)"):
        VERBS[verb](*paths, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", ["align", "merge"])
def test_a_run_that_is_killed_leaves_no_folder_that_looks_whole(pair, tmp_path, verb):
    _, (a, b) = pair(small)
    script = f"""
import os
from tests.tensor_files.test_networks import VERBS
synced = []
def sync(file):
    synced.append(file)
    if len(synced) == 3:
        os._exit(9)  # nothing is cleaned up, as if it was killed
os.fsync = sync
VERBS[{verb!r}]({str(a)!r}, {str(b)!r}, {str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == 9
    assert not (tmp_path / "out").exists()
    left = [path for path in tmp_path.iterdir() if path not in (a, b)]
    assert all(path.name.startswith(".out.") and path.name.endswith((".tmp", ".lock")) for path in left)
    assert not any(path.name.endswith(".index.json") for one in left if one.is_dir() for path in one.iterdir())
    VERBS[verb](a, b, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted([a, b, tmp_path / "out"])  # what was left is gone
    assert TensorFiles(tmp_path / "out").entries.keys() == TensorFiles(a).entries.keys()


@pytest.mark.parametrize("symmetries", SYMMETRIES)
def test_groups_of_the_large_llama_are_those_that_are_proved_in_the_small_one(symmetries):
    assert modeconn.discover(small(), symmetries=symmetries).verify(small()) < 1e-9
    drawn = {}
    for name, config in (("small", SMALL), ("large", Config(layers=2))):
        spec = modeconn.discover(sketch(lambda config=config: Llama(config)), symmetries=symmetries)
        drawn[name] = [(g.name, g.kind, [parent for parent, _ in g.parents], g.places) for g in spec.groups]
    assert drawn["small"] == drawn["large"]


# -- what a second engineer found


class TiedByHand(nn.Module):
    """Layers that share a parameter which the factory holds in a variable."""

    def __init__(self):
        super().__init__()
        shared = nn.Parameter(torch.randn(6, 6))
        self.first, self.a, self.b, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.a.weight, self.b.weight = shared, shared

    def example_input(self):
        return torch.randn(2, 6)

    def forward(self, x):
        return self.last(self.b(self.a(self.first(x).relu()).relu()).relu())


def test_parameters_that_are_tied_by_hand_stay_tied(tmp_path):
    drawn = sketch(TiedByHand)
    assert drawn.a.weight is drawn.b.weight and drawn.a.weight is not drawn.first.weight
    a = made(TiedByHand, 1)
    torch.save(a.state_dict(), tmp_path / "a.pt")  # which holds both names
    found = tensor_files.shuffle(tmp_path / "a.pt", tmp_path / "out", model=TiedByHand)
    assert found.permutation.spec == modeconn.discover(TiedByHand())
    assert apart(read(TiedByHand, found.path), a, torch.randn(5, 6)) < 1e-5


def test_rotated_weights_are_rounded_once(tmp_path):
    """Written in single precision, they are those of the network in half precision, rotated in double."""
    a = kept(made(small, 1, torch.bfloat16), tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text('{"dtype": "bfloat16", "inner": {"torch_dtype": "bfloat16"}}')
    how = {"model": small, "symmetries": "orthogonal"}
    found = tensor_files.shuffle(a, tmp_path / "out", dtype=torch.float32, **how)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told == {"dtype": "float32", "inner": {"torch_dtype": "float32"}}
    x = torch.randint(50, (3, 6), generator=torch.Generator().manual_seed(0))
    assert apart(read(small, found.path), read(small, a), x) < 1e-4  # rounded to bfloat16 it would be 1e-2
    assert all(tensor.dtype is torch.float32 for tensor in in_memory(found.path).values())


def test_a_row_that_differs_is_not_lost_in_a_large_tensor(tmp_path):
    def factory():
        return Llama(Config(layers=1, width=8, hidden=12, heads=2, key_heads=1, vocabulary=20_000))

    network = made(factory, 1, torch.bfloat16)
    a = kept(network, tmp_path / "a")
    how = {"model": factory, "symmetries": "orthogonal"}
    with torch.no_grad():
        network.model.embed_tokens.weight[77] *= -1
    changed = kept(network, tmp_path / "changed")
    assert tensor_files.difference(a, changed).relative["model.embed_tokens.weight"] < 0.03
    verdict = tensor_files.verify(a, tensor_files.shuffle(changed, tmp_path / "b", **how).path, **how)
    assert verdict.differing == ("model.embed_tokens.weight",)


def test_whole_numbers_have_to_be_equal(tmp_path):
    for number, name in enumerate("ab"):
        network = made(Normed, 1)
        network.steps += 10**9 + number
        kept(network, tmp_path / name)
    how = {"model": Normed, "symmetries": "orthogonal"}
    assert tensor_files.verify(tmp_path / "a", tmp_path / "b", **how).differing == ("steps",)


@pytest.mark.parametrize("in_files", [False, True])
def test_a_network_agrees_with_itself_where_its_ends_tell_little(tmp_path, in_files):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last_norm = nn.Linear(6, 64), nn.LayerNorm(64), nn.LayerNorm(64)
            self.up, self.down, self.last = nn.Linear(64, 80), nn.Linear(80, 64), nn.Linear(64, 3)

        def example_input(self):
            return torch.randn(2, 6)

        def forward(self, x):
            x = self.first(x)
            return self.last(self.last_norm(x + self.down(self.up(self.norm(x)).relu())))

    torch.manual_seed(0)
    network = Wide()
    if in_files:
        a = kept(network, tmp_path / "a")
        assert tensor_files.verify(a, a, model=Wide, symmetries="orthogonal").is_one_function
        return
    found = modeconn.align(network, network, method=modeconn.WeightMatching(), symmetries="orthogonal")
    assert found.permutation.is_identity


def test_places_that_are_one_are_refused(pair, tmp_path):
    _, (a, b) = pair(small)
    how = {"model": small, "overwrite": True, "symmetries": "orthogonal"}
    for out, out_a in (("out", "out"), ("out", "b"), ("a", "out")):
        with pytest.raises(ValueError, match=r"are one place"):
            tensor_files.align(a, b, tmp_path / out, out_a=tmp_path / out_a, **how)
    with pytest.raises(ValueError, match=r"is no name for a folder or such a file"):
        tensor_files.shuffle(a, tmp_path / "out.pt", model=small)


def test_factories_that_read_values_are_told(tmp_path):
    def scaled():
        network = small()
        network.scale = float(network.lm_head.weight.std())
        return network

    a = kept(made(small, 1), tmp_path / "a")
    with pytest.raises(ValueError, match=r"reads or replaces values of its parameters, which have none here"):
        tensor_files.shuffle(a, tmp_path / "out", model=scaled)


def test_sums_that_are_no_numbers_are_not_written(pair, tmp_path):
    (_, b), (a, other) = pair(small)
    with torch.no_grad():
        b.lm_head.weight[0, 0] = math.nan
    shutil.rmtree(other)
    kept(b, other)
    with pytest.raises(ValueError, match=r"'lm_head.weight' became NaN or infinite"):
        tensor_files.add_task(a, other, a, tmp_path / "out", model=small)
    assert not (tmp_path / "out").exists()
