"""Draw the pictures of gallery.md anew, with the lines that stand in it, light and dark.

    python docs/draw_gallery.py [--out DIR] [--no-pages]

Pages are photographed by Chromium, which has to be installed for that.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot, style
from PIL import Image
from typer.testing import CliRunner

from modeconn.cli.app import app

HERE = Path(__file__).parent
PAGE = HERE / "gallery.md"
THEMES = {"light": [], "dark": ["dark_background"]}
PAGES = ("page", "surface")
COLOURS = 160  # of a picture, so that files are small


def blocks() -> list[tuple[str, str]]:
    """Return the language and the text of every block of code of the gallery, in order."""
    return re.findall(r"^```(sh|python)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def run_command(line: str, theme: str) -> None:
    """Do what a line for a shell says; figures have the theme.

    Raises:
        RuntimeError: If it fails.
    """
    program, *words = shlex.split(line)
    assert program == "modeconn", line
    if words[0] == "plot":
        words += ["--dark"] * (theme == "dark")
    result = CliRunner().invoke(app, words)
    if result.exit_code:
        raise RuntimeError(f"{line}\n{result.output}")


def draw(theme: str) -> None:
    """Run all blocks in the current folder; of commands a second theme repeats those that draw."""
    namespace: dict[str, Any] = {}
    with matplotlib.rc_context({"backend": "agg", "savefig.dpi": 150}), style.context(THEMES[theme]):
        for number, (language, text) in enumerate(blocks()):
            if language == "python":
                exec(compile(text, f"{PAGE.name}, block {number}", "exec"), namespace)
                pyplot.close("all")
                continue
            for line in text.splitlines():
                if theme == "light" or line.startswith("modeconn plot"):
                    run_command(line, theme)


def photograph(page: Path, theme: str) -> None:
    """Write a picture of a page beside it."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader"]
    command += ["--use-gl=swiftshader", "--window-size=900,620", "--virtual-time-budget=15000"]
    command += ["--force-dark-mode"] if theme == "dark" else []
    command += [f"--screenshot={page.with_suffix('.png')}", page.absolute().as_uri()]
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run([*command, f"--user-data-dir={profile}"], check=True, capture_output=True, timeout=120)


def main() -> None:
    """Draw everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "gallery", help="folder of the pictures")
    parser.add_argument("--no-pages", action="store_true", help="no pictures of pages, which need Chromium")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for theme in THEMES:
            draw(theme)
            for page in () if options.no_pages else PAGES:
                photograph(Path(f"{page}.html"), theme)
            shown = re.findall(rf"gallery/([\w-]+)-{theme}\.png", PAGE.read_text(encoding="utf-8"))
            for path in map(Path, (f"{name}.png" for name in shown)):
                if options.no_pages and path.stem in PAGES:
                    continue
                Image.open(path).convert("RGB").quantize(COLOURS).save(out / f"{path.stem}-{theme}.png", optimize=True)


if __name__ == "__main__":
    main()
