"""The house: stages in one order, imports down it alone, no circles; the order is that of CONTRIBUTING.md."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import modeconn

ROOT = Path(__file__).parents[1]
OUTSIDE = ("modeconn.__init__", "modeconn.__main__", "modeconn._version")  # they gather, start and number the package


def module_of(path: Path) -> str:
    """The dotted name of a file; a package's own file keeps its ``__init__``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {module_of(path): path for path in sorted((ROOT / "modeconn").rglob("*.py"))}


def stages() -> list[set[str]]:
    """The rows of CONTRIBUTING.md's table, from the first stage to the last."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("| stage | what it holds |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [set(re.findall(r"`(\w+)`", row)) for row in rows]


def stage_of(module: str, order: list[set[str]]) -> int:
    (found,) = (number for number, names in enumerate(order) if module.split(".")[1] in names)
    return found


def imported(source: str, module: str) -> set[str]:
    """The files that a source imports anywhere: at the top, in functions, under ``TYPE_CHECKING``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative
                base = ".".join([*module.split(".")[: -node.level], *base.split(".")]).rstrip(".")
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name.startswith("modeconn"):
                target = name if name in FILES else f"{name}.__init__"
                if target in FILES:
                    found.add(target)
                    break
                name = name.rpartition(".")[0]
    return found - {module}


ARROWS = {module: imported(path.read_text(encoding="utf-8"), module) for module, path in FILES.items()}


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Files that lead back to themselves, each with the way there, found by walking from every file."""
    found = []

    def walk(module: str, way: list[str], done: set[str]) -> None:
        for target in sorted(arrows[module]):
            if target == way[0]:
                found.append(way)
            elif target not in done:
                done.add(target)
                walk(target, [*way, target], done)

    for module in arrows:
        walk(module, [module], {module})
    return found


def test_every_file_belongs_to_one_stage():
    order = stages()
    for module in FILES:
        if module not in OUTSIDE:
            stage_of(module, order)
    assert {name for names in order for name in names} == {m.split(".")[1] for m in FILES if m not in OUTSIDE}


@pytest.mark.parametrize("module", [module for module in FILES if module not in OUTSIDE])
def test_imports_point_to_the_same_stage_or_one_above(module):
    order = stages()
    below = [t for t in ARROWS[module] if t not in OUTSIDE and stage_of(t, order) > stage_of(module, order)]
    assert not below
    gathers = "modeconn.__init__" in ARROWS[module]
    assert not gathers or module.split(".")[1] == "cli"  # the package itself comes after all stages but the last


def test_there_is_no_circle():
    assert circles(ARROWS) == []


def test_a_planted_circle_and_a_planted_arrow_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
    ]
    hidden = "def f():\n    from modeconn.fit import fit_curve\nif TYPE_CHECKING:\n    import modeconn.comparison\n"
    assert imported(hidden, "modeconn.tools.rng") == {"modeconn.fit", "modeconn.comparison"}
    assert imported("from . import table\nfrom ..plot import profile", "modeconn.tools.rng") == {
        "modeconn.tools.table",
        "modeconn.plot.__init__",
    }
    order = stages()
    assert stage_of("modeconn.fit", order) > stage_of("modeconn.tools.rng", order)


def test_few_modules_stand_loose_and_none_has_the_name_of_a_verb():
    loose = {path.stem for path in (ROOT / "modeconn").glob("*.py")} - {"__init__", "__main__", "_version"}
    assert len(loose) <= 7
    verbs = {name for name in modeconn.__all__ if inspect.isfunction(getattr(modeconn, name))}
    assert "fit_curve" in verbs and not loose & verbs


def test_tests_mirror_the_package():
    stages_tested = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    folders = {path.name for path in (ROOT / "modeconn").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - stages_tested == set() and stages_tested - folders <= {"benchmarks", "extensions"}
