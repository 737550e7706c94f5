"""A small share of benchmarks/fuzz.py: no damaged file ends in anything but one sentence that names it."""

import json
import os

import pytest

import modeconn
from benchmarks import fuzz
from benchmarks.fuzz_files import TARGETS
from modeconn.tools import files

EACH = 10


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_damaged_files_are_refused_in_one_sentence(target, tmp_path):
    target.make(tmp_path)
    good, expected = (tmp_path / target.file).read_bytes(), target.read(tmp_path / target.file)
    endings = [fuzz.one(target, tmp_path, good, expected, seed) for seed in range(EACH)]
    assert [ending for ending in endings if ending.is_bad] == []
    assert any(ending.how == "refused" for ending in endings)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="damaged files are read in processes that may die")
def test_the_count_sees_what_must_not_happen(tmp_path):
    def read(path):
        content = path.read_bytes()
        kind = content[:1]
        if kind == b"r":
            raise KeyError("raw")
        if kind == b"s":
            raise ValueError("something is wrong")  # of which file?
        if kind == b"k":
            os._exit(3)
        return content

    path = tmp_path / "file"
    for kind, how in {b"r": "raw", b"s": "raw", b"d": "different", b"k": "crash"}.items():
        target = fuzz.Target(how, "file", lambda folder: (folder / "file").write_bytes(b"good"), read)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fuzz, "damaged", lambda good, rng, kind=kind: kind * 9)
            patch.setattr(fuzz, "hostile", lambda good, rng, kind=kind: kind * 9)
            endings = list(fuzz.batch(target, range(4)))
        assert {ending.how for ending in endings} <= {how, "accepted"} and any(one.how == how for one in endings)
    assert not path.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="damaged files are read in processes that may die")
def test_a_run_of_some_kinds_is_added_as_one_of_some_kinds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["--only", "spec"], ["--only", "spec", "--note", "nothing else ran"]):
        words = [*words, "--inputs", "2", "--processes", "1", "--out", "x.json"]
        monkeypatch.setattr("sys.argv", ["fuzz.py", *words])
        assert fuzz.main() == 0
    runs = json.loads((tmp_path / "x.json").read_text())
    assert [run.get("note") for run in runs] == [None, "nothing else ran"]
    for run in runs:
        assert run["benchmark"] == "fuzz" and run["arguments"]["only"] == "spec" and run["versions"]
        assert run["endings"].keys() == {target.name for target in TARGETS if "spec" in target.name}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "nowhere/x.json"], "cannot write 'nowhere/x.json'"),
        (["--only", "nonsense"], "no kind's name holds 'nonsense'; there are network, "),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_read(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fuzz.py", *words])
    monkeypatch.setattr(fuzz, "run", lambda *_: pytest.fail("files were read"))
    with pytest.raises(SystemExit):
        fuzz.main()
    assert message in capsys.readouterr().err


def changed(target, folder, change):
    """Write a good file, let its description be changed, and give it a digest as whoever means harm would."""
    target.make(folder)
    path = folder / target.file
    tensors, about = files.read(path)
    change(about)
    files.write(path, about.pop("kind"), tensors, about)
    return path


def set_at(*way):
    *outer, last, value = way

    def change(about):
        for key in outer:
            about = about[key]
        about[last] = value

    return change


SPEC_OF_ANOTHER = modeconn.discover(modeconn.models.mlp(5, (6,), 3)).to_json()
FOUND = {
    "an encoder that never ends": ("aligner", set_at("settings", "depth", 10**12), "does not hold the encoder"),
    "a size that is text": ("aligner", set_at("layout", "layers.0.bias", 1, ["a" * 3000]), "is damaged"),
    "a relabelling of another network": (
        "checkpoint of refine",
        set_at("relabelling", "spec", SPEC_OF_ANOTHER),
        "this spec is of another model",
    ),
    "no relabelling": ("relabelling", set_at("relabelling", None), "says that there is no relabelling in it"),
    "a relabelling of 3,000 letters": (
        "relabelling",
        set_at("relabelling", "kind", "a" * 3000),
        "of the kind 'a+, which was",
    ),
    "2 ** 40 inputs": ("network", set_at("model", 1, "num_inputs", 2**40), "is damaged.*1099511627776"),
    "a kind of 3,000 letters": ("relabelling", set_at("kind", "a" * 3000), "is a a{60}, not a relabelling"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_refused(name, tmp_path):
    kind, change, message = FOUND[name]
    target = next(target for target in TARGETS if target.name == kind)
    path = changed(target, tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        target.read(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("kind", ["[[1]]", '"' + "a" * 3000 + '"', "3"])
def test_results_of_a_kind_that_is_none_are_refused(kind):
    with pytest.raises(ValueError, match="one whose class nobody imported") as caught:
        modeconn.Curvature.from_json(f'{{"kind": {kind}, "t": [0]}}')
    assert len(str(caught.value)) < 200
