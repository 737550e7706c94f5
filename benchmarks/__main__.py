"""List the benchmarks, and run them.

    python -m benchmarks                       every benchmark in a line
    python -m benchmarks NAME [ARGUMENTS]      run one; NAME --help says what it takes
    python -m benchmarks --quick               run three of speed at a small size: whether they work, not how fast

Those that measure speed take rivals in turn within one run, print n, median and quartiles of their seconds and ratios,
and add the same with hardware and versions to the .json file of --out. What is kept lies in benchmarks/results.
"""

from __future__ import annotations

import ast
import runpy
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent

QUICK = {
    "curve_step": ["--model", "tinyten", "--batch", "8", "--rounds", "2"],
    "evaluate": ["--points", "3", "--train", "8", "--test", "8", "--batch", "8", "--rounds", "2"],
    "plane": ["--points", "3", "--examples", "64", "64", "--rounds", "1"],
}
"""What makes a benchmark of speed end in seconds."""


def benchmarks() -> dict[str, str]:
    """Return the first line of what each benchmark says of itself, by name."""
    found = {}
    for path in sorted(HERE.glob("[a-z]*.py")):
        text = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' in text:
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def run(name: str, arguments: list[str]) -> None:
    """Run one as a program of its own would run."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))  # some import what lies beside them
    before, sys.argv = sys.argv, [str(HERE / f"{name}.py"), *arguments]
    try:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before


def main() -> None:
    """Do what the command line says."""
    known, words = benchmarks(), sys.argv[1:]
    if not words:
        width = max(map(len, known))
        print("\n".join(f"{name:{width}}  {text}" for name, text in known.items()))
    elif words[0] in ("-h", "--help"):
        print(__doc__)
    elif words == ["--quick"]:
        for name, arguments in QUICK.items():
            print(f"\n{name} {' '.join(arguments)}", flush=True)
            start = time.perf_counter()
            run(name, arguments)
            print(f"({time.perf_counter() - start:.0f} s)")
    elif words[0] in known:
        run(words[0], words[1:])
    else:
        sys.exit(f"there is no benchmark {words[0]!r}; python -m benchmarks lists them.")


if __name__ == "__main__":
    main()
