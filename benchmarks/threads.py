"""Attack a small network of the digits while other programs keep every core busy: one thread, several, patient ones.

    python benchmarks/threads.py

Each count of threads and way to wait is a process of its own, since OpenMP reads its environment once.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import time

from timing import Report, options_of

import modeconn
from modeconn import attacks, data, models

SPIN = "while True: pass"
SETTINGS = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "a thread for each core": {},
    "the same, OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}


def attack(queries: int) -> dict[str, float]:
    train, test = data.load("digits")
    model = models.mlp(64, (32, 32, 32), 10, mean=train.mean(), std=train.std() + 0.1, seed=1).eval()
    square = attacks.build(f"torchattacks:Square(n_queries={queries})", eps=0.1)
    begin, cpu = time.perf_counter(), time.process_time()
    modeconn.robustness(model, test, {"pgd20": attacks.build("pgd20", eps=0.1), "square": square}, num_examples=100)
    return {"": time.perf_counter() - begin, ", processor time": time.process_time() - cpu}


def main() -> None:
    parser = options_of(__doc__, rounds=3)
    parser.add_argument("--queries", type=int, default=1000, help="of Square")
    parser.add_argument("--measure", action="store_true", help="attack once, in this process, among what else runs")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(attack(options.queries)))
        return
    report, seconds = Report(options), collections.defaultdict(list)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    busy = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(os.cpu_count() or 1)]
    try:
        for name, changes in list(SETTINGS.items()) * options.rounds:
            command = [sys.executable, __file__, "--measure", "--queries", str(options.queries)]
            done = subprocess.run(command, env={**inherited, **changes}, capture_output=True, text=True, check=True)
            for kind, number in json.loads(done.stdout).items():
                seconds[name + kind].append(number)
    finally:
        for process in busy:
            process.kill()
    one, *others = SETTINGS
    about = f"PGD-20 and Square, {options.queries} queries, 100 digits"
    report.add(about, seconds, [(name, one) for name in others])
    report.write()


if __name__ == "__main__":
    main()
