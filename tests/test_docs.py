"""The pages of docs: what they say is done, every public object has its place, every refusal says what it says."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
from matplotlib import pyplot, rc_context

import modeconn
from modeconn import attacks, callbacks, data, metrics, models, plot, tensor_files

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
OTHERS = {"processes.md", "gallery.md", "large.md"}  # of several processes, of pictures, and of transformers
PAGES = sorted(
    path
    for path in DOCS.rglob("*.md")
    if path.name not in OTHERS and "notebooks" not in path.parts and BLOCK.search(path.read_text(encoding="utf-8"))
)
COMMANDS = re.findall(r"^modeconn .*", (DOCS / "start.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
MODULES = {"plot": plot, "models": models, "data": data, "attacks": attacks, "tensor_files": tensor_files}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
@pytest.mark.filterwarnings("default")
def test_every_python_block_of_a_page_runs_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    with rc_context({"backend": "agg"}):
        for number, source in enumerate(BLOCK.findall(page.read_text(encoding="utf-8"))):
            exec(compile(source, f"{page.name}, python block {number}", "exec"), namespace)
        pyplot.close("all")


def test_every_public_object_has_a_place_in_the_reference():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    described = set(re.findall(r"^\.\. auto(?:class|function|exception):: modeconn\.(\w+)", text, flags=re.MULTILINE))
    modules = set(re.findall(r"^\.\. automodule:: (modeconn[\w.]*)", text, flags=re.MULTILINE))
    of_modules = {module.__name__ for module in (*MODULES.values(), callbacks, metrics)}
    assert modules == of_modules
    objects = {name for name in modeconn.__all__ if not inspect.ismodule(getattr(modeconn, name))}
    assert described == objects - {"__version__", "RULES"}  # rules of operators: `Add what is missing` says how


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_first_page_exist(line):
    from typer.main import get_command

    from modeconn.cli.app import app

    words = shlex.split(line)
    command = get_command(app).commands[words[1]]
    known = {name for option in command.params for name in option.opts}
    assert {word for word in words[2:] if word.startswith("--")} <= known


def test_pictures_of_the_gallery_are_those_that_its_lines_draw():
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\(gallery/([\w-]+)\.png\)", text))
    assert shown == {path.stem for path in (DOCS / "gallery").glob("*.png")}
    drawn = {
        *re.findall(r"--out ([\w-]+)\.png", text),
        *re.findall(r'savefig\(\s*"([\w-]+)\.png"\s*\)', text),
        "page",
        "surface",
    }
    assert shown == {f"{name}-{theme}" for name in drawn for theme in ("light", "dark")}
