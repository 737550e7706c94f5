"""Checks of what large networks need on a device: half precision, an optimizer on the CPU, more than one process."""

from __future__ import annotations

import os
import socket
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from accelerator_agreement import SGD, Agreement, Place, case, check
from torch import Tensor

import modeconn
from modeconn import Recipe, fit_curve

ADAM = partial(torch.optim.Adam, lr=1e-3)


def points(at: Place, dtype: torch.dtype, **settings: Any) -> Tensor:
    """Fit a curve between two perceptrons in a precision; return its control points."""
    recipe = Recipe(epochs=2, **{"optimizer": SGD, **settings})
    found = fit_curve(*at.networks("mlp", dtype=dtype), at.batches("mlp", dtype), align=False, recipe=recipe)
    return found.control_points


@check("fit_curve: control points in half precision", seconds=10)
def _(agreement: Agreement) -> None:
    """A half-precision run is held against single precision by how far it goes from where it starts."""
    whole = agreement.once(lambda at: points(at, torch.float32)).double()
    for dtype in (torch.bfloat16, torch.float16):
        half = agreement.once(lambda at, dtype=dtype: points(at, dtype)).double()
        moved = (whole[1] - (whole[0] + whole[2]) / 2).norm()
        apart = float((half[1] - whole[1]).norm() / moved)
        agreement.notes[f"{dtype}: distance from single precision over the way"] = apart
        agreement.require(apart < 0.25, f"{dtype} ends {apart:.2g} of the way from single precision")


@check("Recipe(offload=True): the same control points", seconds=10)
def _(agreement: Agreement) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for optimizer in (SGD, ADAM):
            kept = agreement.once(lambda at, d=dtype, o=optimizer: points(at, d, optimizer=o))
            moved = agreement.once(lambda at, d=dtype, o=optimizer: points(at, d, optimizer=o, offload=True))
            tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-5
            agreement.difference(f"{dtype}, {optimizer.func.__name__}", kept, moved, tolerance)


def _member(rank: int, size: int, backend: str, port: int, device: str, folder: str) -> None:
    """Fit and measure as one of several processes, all of them on one device."""
    case("conv")  # trained before there is a group, in each process by itself
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    try:
        at = Place(torch.device(device), Path(folder))
        recipe = Recipe(epochs=1, optimizer=SGD)
        found = fit_curve(*at.networks("conv"), at.loader("conv"), align=False, recipe=recipe)
        profile = found.evaluate(at.test("conv"), num_points=5, recalibrate=at.loader("conv"))
        torch.save((found.control_points.cpu(), profile.loss), f"{folder}/{backend}{size}-{rank}.pt")
    finally:
        dist.destroy_process_group()


def _shared(backend: str, size: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    with socket.socket() as one, tempfile.TemporaryDirectory() as folder:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
        one.close()
        args = (size, backend, port, str(device), folder)
        multiprocessing.spawn(_member, args=args, nprocs=size, join=True)
        return [torch.load(Path(folder) / f"{backend}{size}-{rank}.pt") for rank in range(size)]


@check("several processes: gloo with 2 on one device, NCCL with 1", seconds=60)
def _(agreement: Agreement) -> None:
    agreement.need_second_device()
    case("conv")
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    one, other = _shared("gloo", 2, agreement.device)
    agreement.require(torch.equal(one[0], other[0]), "two processes on one device end at other control points")
    agreement.compare(one[1], other[1])
    expected = _shared("gloo", 2, torch.device("cpu"))[0]
    agreement.difference("control points beside two processes on the CPU", expected[0], one[0])
    agreement.difference("profile beside two processes on the CPU", expected[1], one[1])
    alone = _shared("nccl", 1, agreement.device)[0]
    expected = agreement.once(
        lambda at: (
            fit_curve(
                *at.networks("conv"), at.loader("conv"), align=False, recipe=Recipe(epochs=1, optimizer=SGD)
            ).control_points
        )
    )
    agreement.difference("control points of NCCL's one process", expected, alone[0])


@check("tensor_files: networks from a device, files back to it", seconds=10)
def _(agreement: Agreement) -> None:
    """Files are read on the CPU; networks of a device are saved into them, and what comes back fits on the device."""

    def through_files(at: Place) -> Tensor:
        names = ("a", "b")
        for name, network in zip(names, at.networks("mlp", dtype=torch.float32), strict=True):
            modeconn.models.save(network, at.folder / f"{name}.safetensors")
        paths = [at.folder / f"{name}.safetensors" for name in names]
        example = at.batches("mlp", torch.float32)[0][0].to(at.device)
        out = at.folder / "out.safetensors"
        modeconn.tensor_files.align(*paths, out, model=lambda: modeconn.models.mlp(64, (24, 24), 10))
        (_, b) = at.networks("mlp", dtype=torch.float32)
        with torch.no_grad():
            found = modeconn.models.load(out, modeconn.models.mlp(64, (24, 24), 10).to(at.device))
            agreement.difference("function", b(example), found(example), 1e-5)
            return found(example)

    agreement.both(through_files)
