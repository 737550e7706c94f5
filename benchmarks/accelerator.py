"""Prove and measure the package on an accelerator, in one command of less than seven minutes.

    python benchmarks/accelerator.py --device cuda --data DIR --work DIR
    python benchmarks/accelerator.py --device cpu --quick

Four parts, by importance: what the machine is; every public verb on the device against the CPU; what the package costs
there beside plain torch; and, in the time that is left, endpoints and curves of TinyTen on CIFAR-10, which go on in the
next call with the same ``--work``. The JSON file is whole after every step. A check that fails does not stop the run;
the exit status is then 1. With ``--quick`` everything is tiny, and the CPU may be compared with itself.
"""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by CUDA when it starts: products of the same bits

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerator_checks  # noqa: F401 (the imports register the checks)
import accelerator_large  # noqa: F401
import accelerator_rotations  # noqa: F401
import torch
from accelerator_agreement import run_checks
from accelerator_report import Clock, Report
from accelerator_speed import run_speed
from accelerator_training import PAIRS, Plan, run_training
from timing import environment

from modeconn import PAM, ProximalLinear

PARTS = ("environment", "agreement", "speed", "training")
_KEPT_FOR_SPEED, _KEPT_FOR_TRAINING = 0.5, 0.25  # of the budget, while the part before runs


def described(device: torch.device) -> dict[str, Any]:
    """Return hardware, versions and the flags that decide about precision."""
    on_gpu = device.type == "cuda"
    return {
        "line": environment(device),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "memory bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        "capability": torch.cuda.get_device_capability(device) if on_gpu else None,
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "Python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "TF32 by default": {
            "products": torch.backends.cuda.matmul.allow_tf32,
            "convolutions": torch.backends.cudnn.allow_tf32,
        },
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs at all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "accelerator.json")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds of the whole run")
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part; may be given several times")
    parser.add_argument("--name", default="", help="only checks and measurements whose names hold this text")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; without it there is no training")
    parser.add_argument("--work", type=Path, help="folder for endpoints and curves, for the next call; default: none")
    parser.add_argument("--epochs", type=int, default=30, help="of an endpoint")
    parser.add_argument("--curve-epochs", type=int, default=20, help="of a curve")
    parser.add_argument("--batch-size", type=int, default=512, help="of training")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, and return how many checks failed, 1 at most."""
    options = arguments(argv)
    clock, device = Clock(options.budget), torch.device(options.device)
    chosen = options.only or PARTS
    about = {"command": sys.argv, "started": time.strftime("%Y-%m-%d %H:%M:%S"), "quick": options.quick}
    report = Report(options.out, {**about, "budget": options.budget, "device": str(device)})
    for part in PARTS:
        if part in chosen:
            print(f"\n{part}, after {clock.spent:.0f} s", flush=True)
            start = clock.spent
            run_part(part, report, device, clock, options)
            report.note_seconds(part, clock.spent - start)
    report.finish(clock.spent)
    print(f"\n{clock.spent:.0f} s; {len(report.failed)} failed; {options.out}")
    for name in report.failed:
        print(f"  failed: {name}")
    return 1 if report.failed else 0


def run_part(part: str, report: Report, device: torch.device, clock: Clock, options: argparse.Namespace) -> None:
    """Run one of the parts."""
    settings = {"quick": options.quick, "only": options.name}
    if part == "environment":
        found = described(device)
        print(f"  {found['line']}")
        report.put(part, "machine", found)
    elif part == "agreement":
        kept = _KEPT_FOR_SPEED if options.only is None else 0.0
        run_checks(report, device, clock, reserve=kept * options.budget, **settings)
    elif part == "speed":
        kept = _KEPT_FOR_TRAINING if options.only is None and options.data else 0.0
        run_speed(report, device, clock, reserve=kept * options.budget, **settings)
    else:
        train(report, device, clock, options)


def train(report: Report, device: torch.device, clock: Clock, options: argparse.Namespace) -> None:
    """Train in the folder that is given, or in one that is thrown away."""
    epochs = (1, 2) if options.quick else (options.epochs, options.curve_epochs)
    points, pairs = (3, PAIRS[:1]) if options.quick else (25, PAIRS)
    tries, rounds = (2, 1) if options.quick else (32, 5)
    refinement = PAM(iterations=2, step=ProximalLinear(num_tries=tries, num_rounds=rounds))
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        plan = Plan(device, work, *epochs, points, pairs, clock, refinement, limited=not options.quick)
        run_training(report, plan, options.data, options.batch_size, quick=options.quick)


if __name__ == "__main__":
    sys.exit(main())
