"""Benchmarks say what they take, and those of speed report n, median and quartiles with hardware and versions."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import modeconn
from benchmarks.__main__ import HERE, benchmarks, run
from benchmarks.timing import Report, interleaved, options_of

RESULTS = HERE / "results"


def report(*words: str) -> Report:
    return Report(options_of("text", rounds=3).parse_args(words))


@pytest.fixture
def no_traces():
    """Forget what scripts that run as programs leave behind: a place to import from, and what came from there."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(HERE) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.usefixtures("no_traces")
@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")
def test_every_benchmark_says_what_it_is_for_and_what_it_takes(capsys):
    for name, first_line in benchmarks().items():
        with pytest.raises(SystemExit) as ended:
            run(name, ["--help"])
        told = capsys.readouterr().out
        assert ended.value.code == 0 and first_line and first_line in " ".join(told.split()), name
        source = (HERE / f"{name}.py").read_text(encoding="utf-8")
        if "options_of(" in source:
            rounds = {"--rounds"} if "options_of(__doc__, rounds=" in source else set()
            assert {"--out", "--note", *rounds} <= set(told.split()), name


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_statistics_of_a_report_are_those_of_numpy(n, tmp_path):
    ours, theirs = np.random.default_rng(n).uniform(1, 2, (2, n)).tolist()
    out = tmp_path / "x.json"
    written = report("--out", str(out))
    written.add("one thing", {"ours": ours, "theirs": theirs}, [("ours", "theirs")])
    written.write()
    ((what, found),) = json.loads(out.read_text())[0]["measured"].items()
    assert what == "one thing"
    divided = np.divide(ours, theirs)
    for row, values in (
        (found["seconds"]["ours"], ours),
        (found["seconds"]["theirs"], theirs),
        (found["ratios"]["ours / theirs"], divided),
    ):
        assert row["n"] == n
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        assert [*row["quartiles"], row["median"]] == pytest.approx([low, high, middle], rel=1e-12)
    assert found["seconds"]["ours"]["best"] == min(ours)
    assert found["ratios"]["ours / theirs"]["of best times"] == pytest.approx(min(ours) / min(theirs))


def test_a_report_names_hardware_versions_arguments_and_what_else_is_known(tmp_path, capsys):
    out = tmp_path / "x.json"
    written = report("--rounds", "2", "--out", str(out), "--note", "the machine was busy")
    written.add("a thing", {"ours": [0.5, 1.5]}, bytes=3)
    written.write(weights=7)
    (found,) = json.loads(out.read_text())
    assert found["hardware"] and found["cores"] >= 1 and found["threads"] == torch.get_num_threads()
    versions = {"torch": torch.__version__, "numpy": np.__version__, "modeconn": modeconn.__version__}
    assert found["versions"] == {**versions, "Python": sys.version.split()[0]}
    assert len(found["date"]) == len("2026-01-31")
    assert found["arguments"] == {"rounds": 2} and found["note"] == "the machine was busy"
    assert found["weights"] == 7 and found["measured"]["a thing"]["bytes"] == 3
    printed = capsys.readouterr().out
    assert found["hardware"] in printed and "1.00 s" in printed and "0.75 to 1.25 s" in printed


def test_a_run_is_added_to_those_that_a_file_holds(tmp_path):
    out = str(tmp_path / "x.json")
    for note in ("first", "second"):
        written = report("--out", out, "--note", note)
        written.add("a thing", {"ours": [1.0]})
        written.write()
    assert [run["note"] for run in json.loads(Path(out).read_text())] == ["first", "second"]


def test_two_measurements_of_one_name_are_refused():
    written = report()
    written.add("a thing", {"ours": [1.0]})
    with pytest.raises(ValueError, match="'a thing' was measured already"):
        written.add("a thing", {"ours": [2.0]})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "x.txt"), "'x.txt' does not end in .json"),
        (("--out", "nowhere/x.json"), "cannot write 'nowhere/x.json' .*No such file"),
        (("--out", "cut.json"), "'cut.json' cannot be added to: Expecting"),
        (("--out", "other.json"), "'other.json' holds no runs of a benchmark; name another"),
        (("--out", "theirs.json"), "'theirs.json' holds runs of another, not of "),
        (("--rounds", "0"), "'0' is no number of rounds; give 1 or more"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_timed(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("cut.json").write_text('[{"measured": ')
    Path("other.json").write_text('{"rows": []}')
    Path("theirs.json").write_text('[{"benchmark": "another", "measured": {}}]')
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit):
        report(*words)
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_rivals_take_turns_and_two_rounds_of_warm_up_are_not_counted():
    calls = []
    seconds = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert calls == ["a", "b"] * 5
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_kept_results_of_speed_name_their_machine_and_versions():
    runs = [one for path in RESULTS.glob("*.json") for one in _runs(path)]
    assert len({one["benchmark"] for one in runs}) >= 10
    for found in runs:
        assert found["hardware"] and {"torch", "Python"} <= found["versions"].keys(), found["benchmark"]
        assert "date" in found or found["note"], found["benchmark"]  # what an older run does not say, its note does
        for one in found["measured"].values():
            for row in (*one["seconds"].values(), *one["ratios"].values()):
                assert "date" not in found or {"n", "median", "quartiles"} <= row.keys(), found["benchmark"]
                kept = [row[key] for key in ("median", "best", "of best times") if key in row]
                assert kept and min(kept) > 0


def test_the_newest_run_is_the_last_of_its_file():
    for path in RESULTS.glob("*.json"):
        dates = [run.get("date", "") for run in _runs(path)]
        assert dates == sorted(dates), path.name


def _runs(path: Path) -> list[dict]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return [one for one in content if "measured" in one] if isinstance(content, list) else []
