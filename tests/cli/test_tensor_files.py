"""The commands on files that are read tensor by tensor."""

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from benchmarks.llama import small
from modeconn import Relabelling, discover, models, tensor_files
from modeconn.cli.app import app
from tests.tensor_files.test_networks import kept, made
from tests.tensor_files.test_tensor_files import in_memory, same

LLAMA = ("--model", "benchmarks.llama:small")


def run(*arguments, status=0):
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == status, done.output
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("networks")
    for seed, name in enumerate("abc"):
        kept(made(small, seed), place / name)
    return place


def test_what_was_shuffled_is_aligned_and_shown_to_be_one_function(folder, tmp_path):
    a, how = folder / "a", (*LLAMA, "--symmetries", "orthogonal")
    shuffled, planted = tmp_path / "shuffled", tmp_path / "planted.safetensors"
    run("shuffle", a, *how, "--seed", 3, "--out", shuffled, "--out-shard-size", "5KB", "--permutation", planted)
    assert len(list(shuffled.glob("*.safetensors"))) > 3
    drawn = tensor_files.shuffle(a, tmp_path / "again", seed=3, model=small, symmetries="orthogonal").permutation
    assert Relabelling.load(planted) == drawn
    assert "one function" in run("verify", a, shuffled, *how, "--out", tmp_path / "verdict.json")
    assert "not shown" in run("verify", a, folder / "b", *how, status=1)
    out, folded, found = (tmp_path / name for name in ("out", "folded", "found.safetensors"))
    told = run("align", a, shuffled, *how, "--out", out, "--out-a", folded, "--permutation", found)
    assert f"Wrote {out}, {folded}, {found}" in told
    assert max(tensor_files.difference(folded, out).relative.values()) < 1e-5
    assert (out / "config.json").exists()
    told = run("align", a, shuffled, *how, "--out", tmp_path / "alone")
    assert "agrees with a whose gains are folded" in told


def test_single_files_are_streamed_where_asked(folder, tmp_path):
    a, b = (folder / name / "model.safetensors" for name in "ab")
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    run("align", a, b, *LLAMA, "--method", "weight", "--out", one)
    run("align", a, b, *LLAMA, "--stream", "--out", other)
    held = in_memory(other)
    assert same(held, {name: x for name, x in models.load(one, small()).state_dict().items() if name in held})


def test_networks_are_merged_with_weights_and_windows(folder, tmp_path):
    paths = [folder / name for name in "abc"]
    run("merge", *paths, *LLAMA, "--weights", "1,2,1/2", "--out", tmp_path / "merged")
    tensor_files.merge(paths, tmp_path / "expected", weights=[1, 2, 0.5], model=small)
    assert same(in_memory(tmp_path / "merged"), in_memory(tmp_path / "expected"))
    told = run("merge", *paths, "--method", "none", "--last", 2, "--decay", 0.5, "--out", tmp_path / "mean")
    assert f"{paths[1]} 0.5, {paths[2]} 1" in told.replace("\n", "")
    tensor_files.average(paths[1:], tmp_path / "expected", weights=[0.5, 1], overwrite=True)
    assert same(in_memory(tmp_path / "mean"), in_memory(tmp_path / "expected"))


def test_a_task_is_added(folder, tmp_path):
    a, b, c = (folder / name for name in "abc")
    run("add-task", a, b, c, *LLAMA, "--scale", 0.5, "--dtype", "bfloat16", "--out", tmp_path / "out")
    tensor_files.add_task(a, b, c, tmp_path / "expected", scale=0.5, dtype=torch.bfloat16, model=small)
    assert same(in_memory(tmp_path / "out"), in_memory(tmp_path / "expected"))


def test_a_dry_run_writes_nothing_and_names_all(folder, tmp_path):
    a, b = folder / "a", folder / "b"
    for command in (("align", a, b), ("merge", a, b), ("verify", a, b), ("shuffle", a), ("add-task", a, b, a)):
        assert "holds the model" in run(*command, *LLAMA, "--dry-run")
    deeper = ("--model", "benchmarks.llama:Llama")
    told = run("align", a, b, *deeper, "--dry-run", status=1)
    missing = next(line for line in told.splitlines() if "153 missing: model.layers.2.self_attn.q_proj.weight" in line)
    assert "more" not in missing and missing.count(", ") >= 152
    assert not list(tmp_path.iterdir())


def test_outputs_on_inputs_are_told(folder, tmp_path):
    inputs = tmp_path / "inputs.safetensors"
    safetensors.torch.save_file({"tokens": torch.arange(12).view(2, 6)}, inputs)
    told = run("verify", folder / "a", folder / "b", *LLAMA, "--inputs", inputs, status=1)
    assert re.search(r"outputs differ by at most \d", told)


# -- recipes


def test_a_recipe_is_its_flags(folder, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"command = 'merge'\nnetworks = ['{folder / 'a'}', '{folder / 'b'}']\nmodel = 'benchmarks.llama:small'\n"
        f"weights = [1, 3]\nout_shard_size = '6KB'\nseed = 1\n"
    )
    flags = (*LLAMA, "--weights", "1,3", "--out-shard-size", "6KB", "--seed", 1)
    run("merge", folder / "a", folder / "b", *flags, "--out", tmp_path / "flags")
    run("merge", "--recipe", recipe, "--out", tmp_path / "told")
    assert same(in_memory(tmp_path / "flags"), in_memory(tmp_path / "told"))
    assert len(list((tmp_path / "told").iterdir())) == len(list((tmp_path / "flags").iterdir()))
    run("merge", "--recipe", recipe, "--weights", "1,1", "--out", tmp_path / "other")  # flags win
    assert not same(in_memory(tmp_path / "flags"), in_memory(tmp_path / "other"))


def test_a_result_holds_the_recipe_that_makes_it_again(folder, tmp_path):
    out = tmp_path / "out"
    run("merge", folder / "a", folder / "b", *LLAMA, "--weights", "1,3", "--seed", 2, "--out", out)
    told = run("info", out)
    recipe = tensor_files.made_by(out / "model.safetensors")["recipe"]
    assert all(line in told for line in recipe.splitlines()) and 'weights = "1,3"' in recipe
    assert "lambda" not in told and "<locals>" not in told
    (tmp_path / "again.toml").write_text(recipe)
    again = tmp_path / "again"
    run("merge", "--recipe", tmp_path / "again.toml", "--out", again)
    assert same(in_memory(out), in_memory(again))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("command = 'align'", "is for another command than modeconn merge"),
        ("wieghts = [1]", "modeconn merge has no option 'wieghts'"),
        ("networks = 'a'", "networks is a list in a recipe"),
        ("weights = {a = 1}", "a recipe holds texts, numbers, truth values and lists"),
        ("weights = ", "is no TOML file"),
    ],
)
def test_recipes_that_say_something_else_are_refused(tmp_path, text, said):
    (tmp_path / "recipe.toml").write_text(text)
    told = run("merge", "--recipe", tmp_path / "recipe.toml", "--out", tmp_path / "out", status=2)
    words = re.sub(r"[\s│]+", " ", told)
    assert said in words and not (tmp_path / "out").exists()


def test_files_that_say_their_architecture_need_no_model(tmp_path):
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "out"))
    models.save(models.mlp(4, (8,), 3, seed=1), a)
    for told in (run("shuffle", a, "--out", b), run("verify", b, a), run("verify", a, b)):
        assert "(1 group, 8 units)" in told or "of 8 units moved" in told
    run("align", b, a, "--stream", "--out", out)
    assert same(in_memory(out), in_memory(b))
    for written in (b, out):  # say it too
        found = models.load(written)
        assert models.describe(found) == models.describe(models.load(a)) and same(
            found.state_dict(), in_memory(written)
        )
    run("align", b, out, "--stream", "--out", tmp_path / "again.safetensors")
    run("interpolate", a, b, "--out", tmp_path / "middle.safetensors")
    assert models.describe(models.load(tmp_path / "middle.safetensors")) == models.describe(models.load(a))
    Relabelling.save(discover(models.load(a)).identity(), tmp_path / "identity.safetensors")
    refused = run("shuffle", a, "--model-arg", "hidden=4", "--out", tmp_path / "x.safetensors", status=1)
    assert "--model-arg is for the factory of --model, which is missing" in refused
    (tmp_path / "half.safetensors").write_bytes(a.read_bytes()[:500])
    assert "truncated" in run("verify", tmp_path / "half.safetensors", tmp_path / "half.safetensors", status=1)
    assert "is a relabelling, not a network" in run("verify", a, tmp_path / "identity.safetensors", status=1)


# -- what is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("align", "a", "b", "--out", "x"), "networks that are read tensor by tensor need --model"),
        (("align", "a", "b", *LLAMA), "--out is missing, the file or folder to write"),
        (("align", "a", "b", *LLAMA, "--out", "x", "--data", "digits"), "by their weights, without data: leave out"),
        (("align", "a", "b", *LLAMA, "--out", "x", "--method", "activation"), "are aligned by --method weight, got"),
        (("align", "a", "b", *LLAMA, "--out", "x", "--dtype", "int8"), "--dtype must be one of float64"),
        (("align", "a", "b", *LLAMA, "--out", "x", "--out-shard-size", "many"), "--out-shard-size must be a size"),
        (("merge", "a", "b", *LLAMA, "--out", "x", "--weights", "1,x"), "--weights are numbers with commas"),
        (("merge", "a", "b", *LLAMA, "--out", "x", "--weights", "1"), "--weights must be 2 finite numbers"),
        (("merge", "a", "b", *LLAMA, "--out", "x", "--weights", "1,1", "--last", "1"), "give one or the other"),
        (("merge", "a", "b", *LLAMA, "--out", "x", "--last", "3"), "--last must lie in 1..2"),
        (("merge", "a", "b", *LLAMA, "--out", "x", "--method", "none"), "for which --model is not needed"),
        (("shuffle", "a", "--model", "benchmarks.llama:Config", "--out", "x"), "must return a torch.nn.Module"),
        (("align", "a/model.safetensors", "b/model.safetensors", "--dry-run"), "--dry-run is for networks that are"),
        (("merge", "a/model.safetensors", "b/model.safetensors", "--weights", "1,1"), "are for networks that are read"),
    ],
)
def test_settings_that_make_no_sense_are_refused(folder, monkeypatch, arguments, said):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    told = run(*arguments, status=1)
    assert told.startswith("modeconn: error: ") and said in told and told.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


# -- the page


PAGE = (Path(__file__).parents[2] / "docs" / "large.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_what_the_page_says_is_done(tmp_path, monkeypatch):
    """All commands and the last block of Python, with a small model of one's own in place of that of transformers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("mine.py").write_text("from benchmarks.llama import small as llama\n")
    for seed, name in enumerate(["llama-a", "llama-b", "llama-c", "tuned", "step-100", "step-900", "step-1000"]):
        Path("run").mkdir(exist_ok=True)
        kept(made(small, seed), Path("run" if name.startswith("step") else ".") / name)
    (recipe,) = (source for kind, source in BLOCKS if kind == "toml")
    Path("recipe.toml").write_text(recipe)
    commands = [line for kind, source in BLOCKS if kind == "sh" for line in source.splitlines()]
    assert len(commands) == 11
    for command in commands:
        program, *arguments = command.split()
        assert program == "modeconn"
        told = run(*arguments)
        assert ("one function" in told) == (arguments[0] == "verify")
    assert recipe.splitlines()[1] in told
    python = [source for kind, source in BLOCKS if kind == "python"]
    exec(compile(python[-1], "docs/large.md", "exec"), {"llama": small})
    assert Path("relabelling.safetensors").exists()
