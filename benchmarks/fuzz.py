"""Damage files of every kind, thousands of them, and count what ends in anything but one clear sentence.

    python -m benchmarks.fuzz [--inputs 20000] [--seed 0] [--only NAME] [--processes 2] [--show] [--out FILE]
        [--note TEXT]

Each input is a good file with damage: cut off, bytes flipped, swapped, repeated or put in; or, of files of modeconn, a
description or a shape replaced by a hostile value, with a new digest, as somebody could write who means harm. It is
read, shown and used. Good endings are a ValueError or OSError in one sentence that names the file, and what was in the
good file. Bad ones are any other exception ("raw"), no end within the time ("hang"), a process that died ("crash"), and
other content than the good file's from mere damage ("different"). Data sets have no digest, so theirs may differ.

The exit status is 1 if there is a bad one. Everything happens in a temporary folder, in processes of limited memory.
"""

from __future__ import annotations

import collections
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fuzz_damage import damaged, hostile
from benchmarks.fuzz_files import TARGETS, Target
from benchmarks.timing import add_run, entry, options_of

SECONDS = 20
MEMORY = 6 * 2**30
BATCH = 50
RSS_LIMIT = 2 * 2**30


@dataclass(frozen=True)
class Ending:
    """How the reading of one damaged file ended."""

    target: str
    seed: int
    how: str
    detail: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether it is what must not happen."""
        return self.how in ("raw", "hang", "crash", "different", "memory")


class _TooLongError(BaseException):
    pass


def one(target: Target, folder: Path, good: bytes, expected: Any, seed: int) -> Ending:
    """Damage a file, read it, and return how that ended."""
    rng = random.Random(f"{target.name} {seed}")
    is_hostile = target.is_ours and rng.random() < 0.4
    content = hostile(good, rng) if is_hostile else damaged(good, rng)
    path = folder / target.file
    path.write_bytes(content)

    def interrupt(*_: Any) -> None:
        raise _TooLongError

    signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(SECONDS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = target.read(path)
    except (ValueError, OSError) as error:
        return _judged(target, seed, error, path)
    except _TooLongError:
        return Ending(target.name, seed, "hang", f"after {SECONDS} s")
    except Exception as error:
        return Ending(target.name, seed, "raw", _where(error))
    finally:
        signal.alarm(0)
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > RSS_LIMIT:
        return Ending(target.name, seed, "memory", f"more than {RSS_LIMIT >> 30} GiB")
    if found == expected:
        return Ending(target.name, seed, "same")
    if is_hostile or not target.is_ours or target.may_differ:
        return Ending(target.name, seed, "accepted")
    if any(path.name in str(warning.message) for warning in told):
        return Ending(target.name, seed, "accepted", str(told[0].message))
    return Ending(target.name, seed, "different", f"{found} instead of {expected}"[:300])


def _judged(target: Target, seed: int, error: Exception, path: Path) -> Ending:
    text = str(error)
    if type(error) not in (ValueError, FileNotFoundError) and not isinstance(error, OSError):
        return Ending(target.name, seed, "raw", _where(error))
    if path.name not in text or len(text) > 1500 or "Traceback" in text:
        return Ending(target.name, seed, "raw", f"does not name the file: {_where(error)}")
    return Ending(target.name, seed, "refused", text)


def _where(error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "modeconn" in f.filename]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}: {str(error)[:300]}"


def batch(target: Target, seeds: range) -> Iterator[Ending]:
    """Read many damaged files of a kind in a process of its own, which may die."""
    parent, child = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_work, args=(target, seeds, child), daemon=True)
    process.start()
    child.close()
    done = 0
    try:
        while done < len(seeds):
            if not parent.poll(3 * SECONDS):
                yield Ending(target.name, seeds[done], "hang", "in code that cannot be interrupted")
                break
            yield parent.recv()
            done += 1
    except EOFError:
        yield Ending(target.name, seeds[done], "crash", f"exit code {_exit_code(process)}")
    process.kill()
    process.join()
    rest = seeds[done + 1 :] if done < len(seeds) else range(0)
    if len(rest):
        yield from batch(target, rest)


def _exit_code(process: Any) -> int | None:
    process.join(5)
    return process.exitcode


def _work(target: Target, seeds: range, results: Any) -> None:
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stderr = open(os.devnull, "w")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target.make(folder)
        good = (folder / target.file).read_bytes()
        expected = target.read(folder / target.file)
        for seed in seeds:
            results.send(one(target, folder, good, expected, seed))
    results.close()


def run(targets: list[Target], inputs: int, seed: int, processes: int, tell: Callable[[Ending], None]) -> None:
    """Read so many damaged files, about as many of each kind, and tell of every ending."""
    from concurrent.futures import ThreadPoolExecutor, as_completed

    each = -(-inputs // len(targets))
    jobs = [
        (target, range(begin, min(begin + BATCH, seed + each)))
        for begin in range(seed, seed + each, BATCH)
        for target in targets
    ]
    with ThreadPoolExecutor(processes) as pool:
        for finished in as_completed([pool.submit(lambda job: list(batch(*job)), job) for job in jobs]):
            for ending in finished.result():
                tell(ending)


def main() -> int:
    """Read damaged files and print how they ended."""
    parser = options_of(__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first input of each kind")
    parser.add_argument("--only", help="kinds whose names hold this")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="print an example of every refusal")
    given = parser.parse_args()
    targets = [target for target in TARGETS if given.only is None or given.only in target.name]
    if not targets:
        names = ", ".join(target.name for target in TARGETS)
        parser.error(f"--only: no kind's name holds {given.only!r}; there are {names}.")
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    examples: dict[tuple[str, str], str] = {}

    def tell(ending: Ending) -> None:
        counts[ending.target][ending.how] += 1
        if ending.is_bad:
            print(f"{ending.how}: {ending.target}, seed {ending.seed}: {ending.detail}", flush=True)
        elif ending.detail:
            examples.setdefault((ending.target, ending.detail[-40:]), ending.detail)

    begin = time.perf_counter()
    run(targets, given.inputs, given.seed, given.processes, tell)
    if given.show:
        print("\n".join(f"{name}: {text}" for (name, _), text in sorted(examples.items())))
    hows = ["refused", "same", "accepted", "different", "raw", "hang", "crash", "memory"]
    print("".join(["kind".ljust(30), *(how.rjust(10) for how in hows)]))
    for name, found in counts.items():
        print("".join([name.ljust(30), *(str(found[how]).rjust(10) for how in hows)]))
    total = sum(counts.values(), collections.Counter())
    print("".join(["all".ljust(30), *(str(total[how]).rjust(10) for how in hows)]))
    minutes = (time.perf_counter() - begin) / 60
    print(f"{sum(total.values())} inputs in {minutes:.1f} minutes, {sum(total.values()) / minutes:.0f} a minute")
    if given.out is not None:
        endings = {name: {how: found[how] for how in hows} for name, found in counts.items()}
        add_run({**entry(given), "threads": 1, "minutes": minutes, "endings": endings}, given.out)
    return int(any(total[how] for how in hows[3:]))


if __name__ == "__main__":
    sys.exit(main())
