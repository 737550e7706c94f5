"""Discover the symmetries of published models, small ones, and judge what is found by an oracle of its own.

    python -m benchmarks.published [--only TEXT] [--processes 2] [--seconds 240] [--rows results.jsonl]
        [--out results.json] [--note TEXT]

The models are those of whatever of torchvision, timm (a small one of each family) and transformers (small
configurations) is installed; no weights are downloaded. Under ``torchrun`` the processes share the models, each with a
file of its own beside ``--rows`` until all are done. Of each:

- ``right``: relabelled networks with redrawn weights return what they did, all groups at once and some alone
  (benchmarks/published_oracle.py, which uses nothing but state dicts); ``proved`` if `verify` says so too;
- ``wrong``: they do not, or `verify` finds a difference;
- ``refused``: modeconn says that it cannot; ``crash``: any error that is no sentence;
- ``not judged``: the trial cannot build or run the model, or it took longer than ``--seconds``, or is random.

``ratio`` is the time of discovery over that of the two plain exports (`torch.export` in eval and train mode, with a
free batch where the model allows one). ``first only`` is log10 of the group if only the first output counts. A file
of rows that exists is gone on with.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import json
import multiprocessing
import os
import random
import resource
import statistics
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from typing import Any

import torch
from torch.utils import _pytree as pytree

import modeconn
from benchmarks.published_models import NotBuiltError, Subject, call, subjects
from benchmarks.published_oracle import TOLERANCE, CannotJudgeError, worst_change
from benchmarks.timing import CPU, add_run, entry, environment, options_of, writable_path
from modeconn.tools import processes

MEMORY = 9 * 2**30


def trial(subject: Subject) -> dict[str, Any]:
    """Return all that the trial says of one model."""
    found: dict[str, Any] = {"model": str(subject)}
    try:
        model, inputs = subject.build()
    except NotBuiltError as error:
        return found | {"how": "not judged", "why": str(error)}
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            spec = modeconn.discover(model, inputs)
        except ValueError as error:
            return found | {"how": "refused", "why": str(error)[:400], "seconds": time.perf_counter() - begin}
        except Exception as error:
            return found | {"how": "crash", "why": f"{type(error).__name__}: {error}"[:400]}
    found["seconds"] = round(time.perf_counter() - begin, 2)
    found |= {"groups": len(spec.groups), "log10": round(spec.log10_size, 1), "one_path": spec.one_path}
    found["unknown"] = [unknown.operator for unknown in spec.unknown]
    found["told"] = [str(warning.message)[:200] for warning in told if "modeconn" in warning.filename]
    if spec.costs_of_outputs:
        found["first only"] = round(_of_first_output(model, inputs), 1)
    baseline = _two_exports(model, inputs)
    if baseline is not None:
        found |= {"exports": round(baseline, 2), "ratio": round(found["seconds"] / baseline, 2)}
    return found | _judged(model, spec, inputs)


def _judged(model: Any, spec: Any, inputs: Any) -> dict[str, Any]:
    said: dict[str, Any] = {}
    try:
        change = worst_change(model, spec, inputs, call)
        said = {"change": change, "how": "right" if change < TOLERANCE else "wrong"}
    except CannotJudgeError as error:
        said = {"how": "not judged", "why": str(error)}
    except AssertionError as error:
        return {"how": "wrong", "why": str(error)}
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            said["proof"] = spec.verify(model, inputs)
            said["how"] = "proved" if said["how"] == "right" else said["how"]
        except ValueError as error:
            said |= {"proof": None, "why": f"verify: {error}"[:300]}
            if "changes the function" in str(error):
                said["how"] = "wrong"
    return said | {"verify seconds": round(time.perf_counter() - begin, 2)}


def _of_first_output(model: Any, inputs: Any) -> float:
    returned = call(model.eval(), inputs)
    names = list(returned) if isinstance(returned, dict) else [0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return modeconn.discover(model, inputs, outputs=names[0]).log10_size


def _two_exports(model: Any, inputs: Any) -> float | None:
    """Return the seconds of plain exports in both modes, None if the model cannot be exported."""
    total = 0.0
    was_training = model.training
    args, kwargs = (
        ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    for training in (False, True):
        shapes = _free_first_dims(model, args, kwargs)
        for free in (shapes, None):
            begin = time.perf_counter()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    torch.export.export(model.train(training), args, kwargs, dynamic_shapes=free, strict=False)
            except Exception:
                continue
            total += time.perf_counter() - begin
            break
        else:
            model.train(was_training)
            return None
    model.train(was_training)
    return total


def _free_first_dims(model: Any, args: Any, kwargs: Any) -> Any:
    def free(leaf: Any) -> Any:
        has_batch = isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == 2
        return {0: torch.export.Dim.AUTO} if has_batch else None

    return pytree.tree_map(free, dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments))


# ---------------------------------------------------------------- many of them


def _work(subject: Subject, result: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")
    try:
        found = trial(subject)
    except MemoryError:
        found = {"model": str(subject), "how": "not judged", "why": "memory"}
    except Exception as error:
        is_memory = "allocate" in str(error)
        how, why = ("not judged", "memory") if is_memory else ("crash", f"{type(error).__name__}: {error}"[:400])
        found = {"model": str(subject), "how": how, "why": why}
    result.send(json.dumps(found))
    result.close()


def one(subject: Subject, seconds: float) -> dict[str, Any]:
    """Try one model in a process of its own, of limited time and memory."""
    parent, child = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_work, args=(subject, child), daemon=True)
    process.start()
    child.close()
    try:
        if parent.poll(seconds):
            return json.loads(parent.recv())
        return {"model": str(subject), "how": "not judged", "why": f"longer than {seconds:.0f} s"}
    except EOFError:
        return {"model": str(subject), "how": "not judged", "why": "the process died (memory)"}
    finally:
        process.kill()
        process.join()


def summary(rows: list[dict[str, Any]]) -> str:
    """Return what a run found, as text."""
    lines = []
    for library in dict.fromkeys(row["model"].partition("/")[0] for row in rows):
        mine = [row for row in rows if row["model"].startswith(f"{library}/")]
        counts = collections.Counter(row["how"] for row in mine)
        lines.append(f"{library}: {len(mine)} models, " + ", ".join(f"{n} {how}" for how, n in counts.most_common()))
    judged = [row for row in rows if row["how"] != "not judged"]
    refused = [row for row in judged if row["how"] in ("refused", "crash")]
    ratios = sorted(row["ratio"] for row in judged if "ratio" in row)
    recorded = [row for row in judged if row.get("one_path")]
    lines.append(f"of {len(judged)} judged: {len(refused)} refused ({len(refused) / max(len(judged), 1):.1%})")
    lines.append(f"{len(recorded)} of one path (recorded on a run)")
    if ratios:
        median, last = statistics.median(ratios), ratios[int(0.95 * (len(ratios) - 1))]
        lines.append(f"discovery over two plain exports: median {median:.2f}, 95% below {last:.2f}, n={len(ratios)}")
    if judged:
        slow = max(judged, key=lambda row: row.get("seconds", 0))
        lines.append(f"slowest discovery: {slow['model']}, {slow.get('seconds', 0):.1f} s")
    for row in judged:
        if row["how"] in ("wrong", "refused", "crash"):
            lines.append(f"{row['how']}: {row['model']}: {row.get('why', row.get('change'))}")
    unknown = collections.Counter(name for row in judged for name in set(row.get("unknown", ())))
    lines.append("operators without a rule: " + (", ".join(f"{n} ({k})" for n, k in unknown.most_common()) or "none"))
    costly = sorted((row for row in judged if "first only" in row), key=lambda row: row["log10"] - row["first only"])
    for row in costly[:20]:
        lines.append(f"log10 {row['log10']} of all outputs, {row['first only']} of the first alone: {row['model']}")
    return "\n".join(lines)


def record(rows: list[dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """Return what is kept of a run: how many models ended how, by library, and what was found of those judged."""
    about = entry(given)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in rows:
        counts[row["model"].partition("/")[0]][row["how"]] += 1
    about["versions"] |= {library: metadata.version(library) for library in counts}
    judged = [row for row in rows if row["how"] != "not judged"]
    return {
        **about,
        "libraries": counts,
        "of one path": sum(bool(row.get("one_path")) for row in judged),
        "models": judged,
    }


def main() -> int:
    """Try models and print what was found."""
    parser = options_of(__doc__)
    parser.add_argument("--only", help="models whose library/name holds this; several by commas")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=240, help="at most, for one model")
    parser.add_argument(
        "--rows", type=writable_path, help="a file with a line of JSON for each model; what it holds is kept"
    )
    given = parser.parse_args()
    with processes.launched(), processes.together() as them:
        rows = tried(given, them)
        if them.is_first:
            rows = sorted(rows, key=lambda row: row["model"])
            print(environment(CPU))
            print(summary(rows))
            if given.out:
                add_run(record(rows, given), given.out)
    return int(any(row["how"] in ("wrong", "crash") for row in rows))


def tried(given: argparse.Namespace, them: processes.Processes) -> list[dict[str, Any]]:
    """Try the models that are left, under ``torchrun`` those of this process; return what was found of all."""
    own = given.rows
    if own and them.size > 1:
        own = given.rows.with_name(f"{given.rows.stem}.process-{them.rank}{given.rows.suffix}")
    known = [path for path in (given.rows, *([own] if own != given.rows else [])) if path and path.exists()]
    rows = [json.loads(line) for path in known for line in path.read_text().splitlines()]
    done = {row["model"] for part in them.each(lambda: rows) for row in part}
    wanted = given.only.split(",") if given.only else [""]
    chosen = [s for s in subjects() if str(s) not in done and any(text in str(s) for text in wanted)]
    random.Random(0).shuffle(chosen)  # what is done of a run that is cut short stands for the whole
    chosen = them.mine(chosen)
    torch.set_num_threads(1)
    modeconn.discover(torch.nn.Linear(2, 2), torch.zeros(2, 2))  # imports and first uses, which forks then share
    with ThreadPoolExecutor(given.processes) as pool:
        for finished in as_completed([pool.submit(one, subject, given.seconds) for subject in chosen]):
            row = finished.result()
            rows.append(row)
            print(f"{row['how']:>10}  {row['model']}  {row.get('why', '')}", flush=True)
            if own:
                with own.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    found = {row["model"]: row for part in them.each(lambda: rows) for row in part}
    if given.rows and them.size > 1 and them.is_first:
        given.rows.write_text("".join(json.dumps(row) + "\n" for row in found.values()))
    return list(found.values())


if __name__ == "__main__":
    sys.exit(main())
