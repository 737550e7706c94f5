"""Run the tests with versions of Python and torch, each in an environment of its own, and keep what came of it.

    python -m benchmarks.versions --python python3.11 python3.13 --torch 2.6.0 newest [--tests tests/curves ...]

Environments are made in a temporary folder, with the newest versions of all else that go together with these. What was
found is added to benchmarks/results/versions.json and written as a table to benchmarks/results/versions.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
SOME = (
    "tests/symmetry/test_discover.py", "tests/symmetry/test_spec.py", "tests/symmetry/test_rotations.py",
    "tests/matching", "tests/curves", "tests/test_fit.py", "tests/test_merging.py", "tests/models/test_files.py",
    "tests/tools/test_files.py", "tests/tensor_files", "tests/test_digits.py",
)  # fmt: skip
_SHOWN = ("torch", "numpy", "scipy", "safetensors")


def tried(python: str, torch: str, tests: list[str]) -> dict[str, Any]:
    """Return how tests end with versions of Python and torch."""
    row: dict[str, Any] = {"asked": {"python": python, "torch": torch}, "tests": tests}
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "bin" / "python"
        steps = (
            ("no such Python", [python, "-m", "venv", folder]),
            ("they do not go together", [own, "-m", "pip", "install", "-q", _wanted(torch), "-e", ".[test]"]),
        )
        for failure, command in steps:
            done = _run(command)
            if done is None or done.returncode:
                return row | {"end": failure, "why": "" if done is None else done.stderr.strip().splitlines()[-1][:300]}
        row["versions"] = json.loads(_run([own, "-c", _VERSIONS]).stdout)
        row["asked"]["python"] = row["versions"]["python"]  # wherever that program was
        begin = time.perf_counter()
        done = _run([own, "-m", "pytest", "-q", "-n", "2", *tests])
        lines = done.stdout.strip().splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return row | {"end": lines[-1], "failed": failed[:30], "seconds": time.perf_counter() - begin}


_VERSIONS = f"""
import importlib.metadata as m, json, platform
print(json.dumps({{"python": platform.python_version(), **{{n: m.version(n) for n in {_SHOWN!r}}}}}))
"""


def _wanted(torch: str) -> str:
    return "torch" if torch == "newest" else f"torch=={torch}"


def _run(command: list[Any]) -> subprocess.CompletedProcess[str] | None:
    """Run a command; None if there is no such program."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        return subprocess.run(
            [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None


def table(rows: list[dict[str, Any]]) -> str:
    """Return what was found as a table."""
    lines = [f"| Python | {' | '.join(_SHOWN)} | tests |", f"| {'--- | ' * (len(_SHOWN) + 2)}".strip()]
    for row in rows:
        found = row.get("versions", row["asked"])
        cells = [found["python"], *(found.get(name, "") for name in _SHOWN), row["end"].strip("= ")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try all that was asked for; what was tried before with the same versions is replaced."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", required=True)
    parser.add_argument("--torch", nargs="+", required=True, help="versions, or newest")
    parser.add_argument("--tests", nargs="+", default=list(SOME))
    options = parser.parse_args()
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for python in options.python:
        for torch in options.torch:
            row = tried(python, torch, options.tests)
            rows = sorted((one for one in rows if one["asked"] != row["asked"]), key=lambda one: str(one["asked"]))
            rows.append(row)
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
            RESULTS.with_suffix(".md").write_text(table(rows))
            print(table([row]).splitlines()[-1], *row.get("failed", []), sep="\n", flush=True)


if __name__ == "__main__":
    main()
