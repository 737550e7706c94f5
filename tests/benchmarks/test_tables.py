"""Tables of the page of results show the newest run of each thing, of however many runs, with a note or without."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest

from benchmarks.__main__ import HERE

SPEED = ("curve_step", "evaluate", "plane", "align", "adversarial", "pam_step", "turn_step", "population")
TABLES = {
    **dict.fromkeys(SPEED, "speed"),
    "discover": "discovery",
    "match": "matching",
    "threads": "threads",
    "tensor_files": "files",
    "large_groups": "large_groups",
    "large_curve": "large_curves",
    "processes": "processes",
    "fuzz": "damage",
    "published": "published",
}
"""What shows the runs of a file, by its name."""


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """Return a function from a file's name and the runs that it shall hold to the table that shows them."""
    monkeypatch.syspath_prepend(str(HERE.parent / "docs"))
    tables, results = importlib.import_module("tables"), tmp_path / "results"
    shutil.copytree(HERE / "results", results, ignore=shutil.ignore_patterns("*.png", "*.md"))
    monkeypatch.setattr(tables, "RESULTS", results)

    def show(name, runs):
        (results / f"{name}.json").write_text(json.dumps(runs))
        return getattr(tables, TABLES[name])()

    return show


def kept(name):
    return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))


def fresh(runs):
    """A run without a note of all that some runs found, with other numbers."""
    found = {key: value for key, value in runs[-1].items() if key != "note"}
    if "measured" in found:
        found["measured"] = {what: one for run in runs for what, one in run["measured"].items()}
    same = ("arguments", "threads", "cores")
    return {key: value if key in same else doubled(value) for key, value in found.items()}


def doubled(found):
    if isinstance(found, dict):
        return {key: doubled(value) for key, value in found.items()}
    if isinstance(found, list):
        return [doubled(value) for value in found]
    return 2 * found if isinstance(found, int | float) and not isinstance(found, bool) else found


@pytest.mark.parametrize("name", TABLES)
def test_a_new_run_without_a_note_takes_the_place_of_those_before_it(name, shown):
    runs = kept(name)
    before, alone, after = (shown(name, these) for these in (runs, [fresh(runs)], [*runs, fresh(runs)]))
    assert after == alone and after.rows != before.rows and len(after.rows) == len(before.rows)
    assert "None" not in after.note and ".." not in after.note and not after.note.startswith((".", " "))


@pytest.mark.parametrize("name", TABLES)
def test_what_a_run_says_of_itself_stands_below_its_table(name, shown):
    run = fresh(kept(name))
    assert "The moon was full" in shown(name, [{**run, "note": "the moon was full"}]).note
    assert "moon" not in shown(name, [run]).note


@pytest.mark.parametrize("name", sorted(TABLES.keys() - {"threads"}))  # which measures one thing
def test_a_run_of_a_part_leaves_the_rest_as_it_was(name, shown):
    runs = kept(name)
    part = fresh(runs)
    if "measured" in part:
        part["measured"] = dict(list(part["measured"].items())[:1])
    else:
        part["arguments"] = {**part["arguments"], "only": "a kind"}
    before, after = (shown(name, these).rows for these in (runs, [*runs, part]))
    changed = [row for row in before if row not in after]
    assert len(after) == len(before) and len(changed) < len(before)
    assert bool(changed) == ("measured" in part)


def test_machines_have_a_column_where_they_differ_and_stand_below_where_not(shown):
    (*_, run) = kept("processes")
    one, two = ({**run, "measured": {what: row}} for what, row in list(run["measured"].items())[:2])
    same, other = shown("processes", [one, two]), shown("processes", [one, {**two, "hardware": "Abacus"}])
    assert "on" not in same.header and run["hardware"] in same.note
    assert other.header[-1] == "on" and "Abacus" in other.rows[1][-1] and run["hardware"] in other.rows[0][-1]
    assert all(len(row) == len(table.header) for table in (same, other) for row in table.rows)
