"""The pages of docs: what they say is done, every public object has its place, every refusal says what it says."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
from matplotlib import pyplot, rc_context
from torch import nn
from typer.testing import CliRunner

import modeconn
from modeconn import attacks, callbacks, data, metrics, models, plot, tensor_files

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
OTHERS = {"processes.md", "gallery.md", "large.md"}  # run by several processes in test_readme.py; and by tests below
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


def test_the_gallery_draws_all_of_its_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(DOCS))
    gallery = importlib.import_module("draw_gallery")
    gallery.draw("light")
    shown = re.findall(r"gallery/([\w-]+)-light\.png", gallery.PAGE.read_text(encoding="utf-8"))
    assert {name for name in shown if not (tmp_path / f"{name}.png").exists()} <= set(gallery.PAGES)  # photographs
    assert all((tmp_path / f"{name}.html").exists() for name in gallery.PAGES)


class Normed(nn.Module):
    """A small network with the parts that the page of large models relabels: a residual stream and a norm."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norms = nn.ModuleList([nn.RMSNorm(8), nn.RMSNorm(8)])
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x)
        x = x + self.outer(torch.relu(self.inner(self.norms[0](x))))
        return self.head(self.norms[1](x))

    def example_input(self):
        return torch.ones(2, 6)


def written(folder, seed):
    """A folder of one shard and a configuration, as Hugging Face has them."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    safetensors.torch.save_file(Normed().state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "normed"}')


def test_the_page_of_large_models_does_what_it_says(tmp_path, monkeypatch):
    from modeconn.cli.app import app

    monkeypatch.chdir(tmp_path)
    mine = types.ModuleType("mine")  # the page's factory asks transformers for a Llama, which is not needed here
    mine.llama = lambda folder="llama-a": Normed()
    monkeypatch.setitem(sys.modules, "mine", mine)
    for seed, name in enumerate(
        ["llama-a", "llama-b", "llama-c", "tuned", *(f"run/step-{n}" for n in (100, 900, 1000))]
    ):
        written(tmp_path / name, seed)
    namespace = {"llama": mine.llama}
    page = (DOCS / "large.md").read_text(encoding="utf-8")
    for kind, source in re.findall(r"^```(sh|python|toml)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
        if kind == "toml":
            (tmp_path / "recipe.toml").write_text(source)
        elif kind == "sh":
            for line in source.splitlines():
                result = CliRunner().invoke(app, shlex.split(line)[1:])
                assert result.exit_code == 0, (line, result.output)
        elif "transformers" not in source:
            exec(compile(source, "large.md", "exec"), namespace)
    names = {
        "shuffled",
        "b-aligned",
        "a-folded",
        "middle",
        "merged",
        "averaged",
        "llama-b-tuned",
        "from-recipe",
        "aligned",
    }
    assert names <= {path.name for path in tmp_path.iterdir()}
    x = torch.rand(3, 6)
    outputs = []
    for name in ("llama-a", "shuffled", "a-folded"):
        network = Normed()
        network.load_state_dict(safetensors.torch.load_file(tmp_path / name / "model.safetensors"))
        outputs.append(network(x))
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[2], outputs[0])
