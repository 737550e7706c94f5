"""Checks of rotations, of invertible maps, of balanced units and of rotations learned with a curve, on a device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from accelerator_agreement import CPU, SGD, Agreement, Place, case, check
from torch import Tensor

import modeconn
from modeconn import PAM, ActivationMatching, Recipe, RotationStep, Sinkhorn, WeightMatching, align, fit_curve

BATCH = 200


@cache
def turning() -> modeconn.PermutationSpec:
    """Return the symmetries of the residual transformer of the checks, rotations among them, found on the CPU."""
    return modeconn.discover(case("turning").networks[0], case("turning").train[0][0], symmetries="orthogonal")


def distance(one: torch.nn.Module, other: torch.nn.Module) -> Tensor:
    """Return how far the parameters of two networks are apart."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return torch.stack([(p - q).square().sum() for p, q in pairs]).sum().sqrt()


@torch.no_grad()
def aligned(at: Place, method: Any, agreement: Agreement) -> dict[str, Tensor]:
    """Align two networks; return what the result is judged by, and require that no function changed."""
    a, b = at.networks("turning")
    with torch.enable_grad():
        found = align(a, b, at.batches("turning"), method=method, spec=turning())
    x = at.batches("turning")[0][0].to(at.device)
    for before, after in ((a, found.model_a), (b, found.model_b)):
        apart = float((before.eval()(x) - after.eval()(x)).abs().max())
        agreement.require(apart < 1e-8, f"a relabelled network differs by {apart:.2e} on {at.device}")
    return {"distance": distance(found.model_a, found.model_b), "output": found.model_b(x)}


@check("symmetries='orthogonal': discover and verify", seconds=10)
def _(agreement: Agreement) -> None:
    def found(at: Place) -> Tensor:
        (network,) = at.networks("turning", 1)
        x = at.batches("turning")[0][0]
        spec = modeconn.discover(network, x, symmetries="orthogonal")
        agreement.require(spec == turning(), "other groups than on the CPU")
        return torch.tensor(spec.verify(network, x))

    agreement.both(found)


@check("align: rotations by weights and by activations", seconds=10)
def _(agreement: Agreement) -> None:
    """Border pixels of digits hardly change, so rounding decides about some rotations that activations find."""
    agreement.both(lambda at: aligned(at, WeightMatching(), agreement))
    for method in (ActivationMatching(), WeightMatching(start=ActivationMatching())):
        left, right = (
            agreement.once(lambda at, m=method: aligned(at, m, agreement), on) for on in (CPU, agreement.device)
        )
        agreement.difference("distance", left["distance"], right["distance"], 2e-2)
        agreement.difference("output", left["output"], right["output"])


@check("align: rotations in float32", seconds=10)
def _(agreement: Agreement) -> None:
    """Rounding is another one on the device, so both are held against double precision by their distance."""

    def apart(at: Place, dtype: torch.dtype) -> Tensor:
        a, b = at.networks("turning", dtype=dtype)
        with torch.no_grad():
            found = align(a, b, method=WeightMatching(), spec=turning())
            return distance(found.model_a, found.model_b)

    exact = agreement.once(lambda at: apart(at, torch.float64), CPU)
    for device in (CPU, agreement.device):
        found = agreement.once(lambda at: apart(at, torch.float32), device)
        agreement.difference(f"distance on {device.type}", exact, found, 1e-3)


@check("align: learned rotations, invertible maps", seconds=20)
def _(agreement: Agreement) -> None:
    for settings in ({"objective": "middle"}, {"objective": "middle", "invertible": True}):
        method = Sinkhorn(start=WeightMatching(), num_steps=4, num_rounds=2, num_examples=BATCH, **settings)
        agreement.both(lambda at, method=method: aligned(at, method, agreement))


@check("fit_curve: refine=PAM(step=RotationStep())", seconds=20)
def _(agreement: Agreement) -> None:
    refine = PAM(iterations=1, step=RotationStep(num_steps=3, num_rounds=1), num_batches=4)

    def learned(at: Place) -> dict[str, Tensor]:
        recipe = Recipe(epochs=1, optimizer=SGD)
        settings = {"align": WeightMatching(), "spec": turning(), "refine": refine, "recipe": recipe}
        found = fit_curve(*at.networks("turning"), at.batches("turning"), **settings)
        with torch.no_grad():
            return {"loss": found.evaluate(at.test("turning"), num_points=5).loss, "points": found.control_points}

    agreement.both(learned)


@check("balance and fold_gains")
def _(agreement: Agreement) -> None:
    verbs: dict[str, Callable[[Place], Any]] = {
        "mlp": lambda at: modeconn.balance(*at.networks("mlp", 1), at.batches("mlp")[0][0].to(at.device)),
        "turning": lambda at: modeconn.fold_gains(*at.networks("turning", 1), spec=turning()),
    }
    for name, verb in verbs.items():

        @torch.no_grad()
        def same(at: Place, name: str = name, verb: Callable[[Place], Any] = verb) -> Tensor:
            x, (before,) = at.batches(name)[0][0].to(at.device), at.networks(name, 1)
            after = verb(at)
            agreement.compare(before.eval()(x), after.eval()(x))
            return after

        agreement.both(same)
