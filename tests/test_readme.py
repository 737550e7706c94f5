"""What the README says, done."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import matplotlib
import pytest
from typer.testing import CliRunner

from modeconn.cli.app import app

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
PAGES = sorted(page for page in (README.parent / "docs").rglob("*.md") if "notebooks" not in page.parts)
INSTALL = "pip install -c constraints.txt "


def test_every_python_block_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    with matplotlib.rc_context({"backend": "agg"}):
        for number, (_, source) in enumerate(block for block in BLOCKS if block[0] == "python"):
            exec(compile(source, f"README.md, python block {number}", "exec"), namespace)
        matplotlib.pyplot.close("all")
    assert namespace["profile"].barrier < 0.1 * namespace["naive"].barrier
    printed = capsys.readouterr().out
    assert str(namespace["spec"]) in printed and str(namespace["spec"]) in README.read_text(encoding="utf-8")
    assert (tmp_path / "profiles.png").exists() and (tmp_path / "a-b.safetensors").exists()


def test_two_lines_install_and_do_everything():
    lines = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith(INSTALL)]
    assert lines == [f"{INSTALL}. && modeconn demo", f'{INSTALL}".[test]" && pytest -n 2']


def test_every_command_of_the_tour_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tour,) = (source for kind, source in BLOCKS if kind == "sh" and not source.startswith(INSTALL))
    *commands, on_images = [shlex.split(line)[1:] for line in tour.splitlines()]
    for command in commands:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "curve.png").exists() and "relabelled" in result.stdout
    result = CliRunner().invoke(app, on_images)
    assert result.exit_code == 1 and "fashion_mnist needs the file" in result.stderr  # DIR stands for the reader's own


def links(page: Path) -> list[tuple[Path, str]]:
    return [(page, target) for target in re.findall(r"\]\(([^):]+)\)", page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("page", "target"), [*links(README), *(link for page in PAGES for link in links(page))], ids=str
)
def test_links_to_files_lead_somewhere(page, target):
    assert (page.parent / target).exists()


def page_of_processes(rank, folder, port):
    import os

    import torch.distributed as dist

    size = dist.get_world_size()
    dist.destroy_process_group()  # the page makes its own
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = os.getcwd()
    os.chdir(folder)
    try:
        text = (README.parent / "docs" / "processes.md").read_text(encoding="utf-8")
        namespace = {}
        for source in re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
            exec(compile(source, "docs/processes.md", "exec"), namespace)
    finally:
        os.chdir(before)
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    return namespace["profile"].loss.tolist()


def test_the_page_of_processes_runs(pool, tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = pool.run(2, page_of_processes, str(tmp_path), port)
    assert first == second and (tmp_path / "curve.safetensors").exists()
