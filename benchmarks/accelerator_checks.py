"""Every public verb of the package on another device, against the CPU: one small function for each, in their order."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerator_agreement import CPU, SGD, Agreement, Place, case, check, spec_of
from accelerator_report import LeftOut
from torch import Tensor, nn

import modeconn
from modeconn import (
    PAM,
    PGD,
    TRADES,
    ActivationMatching,
    AdversarialExamples,
    AdversarialTraining,
    Bezier,
    Checkpoint,
    Connection,
    DeepAlign,
    Ensemble,
    FreeAdversarialTraining,
    Line,
    Permutation,
    PermutationSpec,
    PolyChain,
    ProximalLinear,
    Recipe,
    RelaxedStep,
    Sinkhorn,
    SinkhornStep,
    StraightThrough,
    TransportMatching,
    WeightMatching,
    align,
    attacks,
    data,
    fit_curve,
    models,
    plot,
)
from modeconn.matching.statistics import collect

RECIPE = Recipe(epochs=2, optimizer=SGD)
SHORT = Recipe(epochs=1, optimizer=SGD)
ATTACK = PGD(0.1, 0.04, 3, random_start=False)  # a random start is another one on another device


def fitted(at: Place, name: str = "mlp", **settings: Any) -> Connection:
    """Fit a curve on the batches of a case, without alignment unless the settings say so."""
    settings = {"align": False, "recipe": RECIPE, **settings}
    return fit_curve(*at.networks(name), at.batches(name), **settings)


def shuffled(name: str) -> Permutation:
    """Return a relabelling of a case, always the same."""
    return spec_of(name).random(torch.Generator().manual_seed(5))


# -- symmetries


@check("discover and verify", seconds=20)
def _(agreement: Agreement) -> None:
    names = ("mlp", "conv", "attending") if agreement.quick else ("mlp", "conv", "attending", "recurrent")
    for name in names:

        def found(at: Place, name: str = name) -> Tensor:
            (network,) = at.networks(name, 1)
            example = at.batches(name)[0][0]
            spec = modeconn.discover(network, example)
            agreement.require(spec == spec_of(name), f"{name}: other groups than on the CPU")
            return torch.tensor(spec.verify(network, example))

        agreement.once(found)


@check("a spec of the CPU proves a network elsewhere", seconds=10)
def _(agreement: Agreement) -> None:
    for name in ("conv", "attending"):
        agreement.both(lambda at, name=name: spec_of(name).verify(*at.networks(name, 1), at.batches(name)[0][0]))


def aligned_by_file(at: Place, loader: Any) -> Any:
    """Align with the symmetries that another network on the device has left in a file."""
    a, b, c = at.networks("mlp", 3)
    modeconn.discover(c).save(at.folder / "spec.safetensors")
    return align(a, b, loader, spec=PermutationSpec.load(at.folder / "spec.safetensors"))


@check("a spec found elsewhere, saved and loaded, aligns by weights")
def _(agreement: Agreement) -> None:
    agreement.both(lambda at: aligned_by_file(at, None))


@check("a spec found elsewhere, saved and loaded, aligns by activations")
def _(agreement: Agreement) -> None:
    agreement.both(lambda at: aligned_by_file(at, at.batches("mlp")))


@check("Permutation: apply, inverse, save, load")
def _(agreement: Agreement) -> None:
    for name in ("mlp", "conv", "attending", "recurrent"):

        def relabelled(at: Place, name: str = name) -> list[nn.Module]:
            (network,) = at.networks(name, 1)
            shuffled(name).save(at.folder / "p.safetensors")
            permutation = Permutation.load(at.folder / "p.safetensors")
            moved = permutation.apply(network)
            back = permutation.inverse().apply(moved)
            x = at.batches(name)[0][0].to(at.device)
            agreement.compare(network(x), moved(x))
            agreement.require(
                all(torch.equal(p, q) for p, q in zip(back.parameters(), network.parameters(), strict=True)),
                f"{name}: the inverse does not undo a relabelling on {at.device}",
            )
            return [moved, back]

        agreement.both(relabelled)


@check("every model of the zoo, forward", seconds=25)
def _(agreement: Agreement) -> None:
    for name in models.names():
        arguments = {"num_inputs": 64, "hidden": (32,), "num_outputs": 10} if name == "mlp" else {}
        network = models.mlp(64, (32,), 10) if arguments else models.build(name, seed=1)
        network.eval()

        with torch.no_grad():
            left, right = (network.to(d)(network.example_input()) for d in (CPU, agreement.device))
        agreement.difference(name, left, right)


# -- alignment


@check("align: the default, and data on the device", seconds=10)
def _(agreement: Agreement) -> None:
    agreement.both(lambda at: align(*at.networks("mlp"), at.batches("mlp")))
    agreement.both(lambda at: align(*at.networks("mlp"), at.loader("mlp"), spec=spec_of("mlp")))
    agreement.both(lambda at: align(*at.networks("mlp"), spec=spec_of("mlp")))


def matched(agreement: Agreement, method: Any, *names: str) -> None:
    """Align by a method, on the CPU and on the device."""

    def aligned(at: Place, name: str) -> Any:
        return align(*at.networks(name), at.batches(name), method=method, spec=spec_of(name))

    for name in names:
        agreement.both(partial(aligned, name=name))


@check("align: ActivationMatching")
def _(agreement: Agreement) -> None:
    matched(agreement, ActivationMatching(), "mlp", "conv", "attending", "recurrent")
    matched(agreement, ActivationMatching(pre_activation=True), "mlp", "conv")
    for statistic in ("cosine", "inner_product"):
        for before in (False, True):
            method = ActivationMatching(statistic=statistic, pre_activation=before)
            for name in ("mlp", "conv"):
                agreement.both(partial(by_its_own_objective, method=method, name=name))


def by_its_own_objective(at: Place, method: ActivationMatching, name: str) -> Any:
    """Return the relabelling, and the sums that it maximises: correlation does not tell how good it is."""
    found = align(*at.networks(name), at.batches(name), method=method, spec=spec_of(name)).permutation
    moments = collect(
        spec_of(name),
        *case(name).networks[:2],
        case(name).train,
        num_examples_at_most=None,
        before_activation=method.pre_activation,
    )
    sums = [
        getattr(m, method.statistic)().gather(1, found.sources(group)[:, None]).mean() for group, m in moments.items()
    ]
    return {"": found, "history": torch.stack(sums)}


@check("align: ActivationMatching under attack")
def _(agreement: Agreement) -> None:
    matched(agreement, ActivationMatching(adversary=ATTACK), "mlp", "conv")


@check("align: WeightMatching")
def _(agreement: Agreement) -> None:
    matched(agreement, WeightMatching(), "mlp", "conv", "attending", "recurrent")
    matched(agreement, WeightMatching(num_starts=3, seed=1), "mlp")
    matched(agreement, WeightMatching(start=ActivationMatching(), num_sweeps=2), "conv")
    matched(agreement, WeightMatching(start=shuffled("mlp")), "mlp")


@check("align: TransportMatching")
def _(agreement: Agreement) -> None:
    for cost in ("activations", "weights"):
        matched(agreement, TransportMatching(cost=cost), "mlp", "conv")


@check("TransportMatching.transport, soft")
def _(agreement: Agreement) -> None:
    for cost in ("activations", "weights"):
        for name in ("mlp", "attending") if cost == "activations" else ("mlp", "conv"):
            method = TransportMatching(cost=cost, regularization=0.1)

            def carried(at: Place, name: str = name, method: Any = method) -> Any:
                a, b = at.networks(name)
                loader = [(x.to(at.device), y) for x, y in at.batches(name)]
                plan = method.transport(spec_of(name), a, b, loader)
                return dict(plan.matrices), plan.apply(b)

            agreement.both(carried)


@check("align: Sinkhorn", seconds=15)
def _(agreement: Agreement) -> None:
    for objective in ("midpoint", "line", "weights", Bezier(2)):
        method = Sinkhorn(start=ActivationMatching(), objective=objective, num_steps=6, num_rounds=3, num_examples=128)
        matched(agreement, method, "mlp")
    matched(agreement, Sinkhorn(num_steps=4, num_rounds=2, num_examples=128), "conv", "attending")


@check("align: StraightThrough", seconds=10)
def _(agreement: Agreement) -> None:
    for objective in ("line", "midpoint", Bezier(2)):
        method = StraightThrough(objective=objective, num_steps=4, num_rounds=2, learning_rate=1e-3, num_examples=128)
        matched(agreement, method, "mlp")
    matched(agreement, StraightThrough(num_steps=3, num_rounds=2, learning_rate=1e-3, num_examples=128), "conv")


# -- Deep-Align

_ENCODER = DeepAlign(features=8, depth=1, num_steps=4, batch_size=4, num_validation_pairs=4, validate_every=2)


@cache
def aligner() -> DeepAlign:
    """Fit an aligner on the CPU."""
    return _ENCODER.fit(case("small").networks[:6], case("small").train, spec=spec_of("small"))


@check("DeepAlign: fitted on the CPU, saved, loaded on the device", seconds=10)
def _(agreement: Agreement) -> None:
    aligner()

    def loaded(at: Place) -> Any:
        aligner().save(at.folder / "aligner.safetensors")
        with torch.random.fork_rng(devices=[]):  # whether it leaves the random state is a check of its own
            found = DeepAlign.load(at.folder / "aligner.safetensors", device=at.device)
        a, b = at.networks("small", 8)[6:]
        return found.similarities(a, b), align(a, b, at.batches("small"), method=found, spec=spec_of("small"))

    agreement.both(loaded)


@check("DeepAlign.load and the random state")
def _(agreement: Agreement) -> None:
    def load(at: Place) -> None:
        aligner().save(at.folder / "aligner.safetensors")
        DeepAlign.load(at.folder / "aligner.safetensors", device=at.device)

    aligner()
    agreement.once(load)


@check("DeepAlign: fitted on the device", seconds=10)
def _(agreement: Agreement) -> None:
    """Its random numbers are others on another device, so the losses are compared at the first look alone."""

    def fit(at: Place) -> DeepAlign:
        return _ENCODER.fit(at.networks("small", 6), at.batches("small"), spec=spec_of("small"))

    found = agreement.once(fit)
    agreement.difference(
        "validation before the first step",
        *(torch.tensor(one.fitted.validation[0][1]) for one in (aligner(), found)),
    )
    values = [value for losses in found.fitted.history.values() for value in losses]
    agreement.require(bool(torch.tensor(values).isfinite().all()), "a loss of the fit is not finite")


# -- endpoints


@check("models.train")
def _(agreement: Agreement) -> None:
    for name in ("mlp", "conv"):
        agreement.both(lambda at, name=name: models.train(*at.networks(name, 1), at.batches(name), recipe=RECIPE))
    agreement.both(lambda at: models.train(*at.networks("mlp", 1), at.loader("mlp"), recipe=SHORT))
    agreement.both(lambda at: models.train(*at.networks("conv", 1), at.batches("conv"), recipe=SHORT, adversary=ATTACK))


@check("models.train: callbacks; evaluate(model)")
def _(agreement: Agreement) -> None:
    def watched(at: Place) -> Any:
        validation = modeconn.callbacks.Validation(at.test("conv"))
        kept = modeconn.callbacks.KeepEpochs(at.folder / "epochs")
        (network,), how = at.networks("conv", 1), {"recipe": SHORT, "callbacks": [validation, kept]}
        made = models.train(network, at.batches("conv"), **how)
        values = {f"{one['epoch']} {name}": value for one in validation.values for name, value in one.items()}
        profile = modeconn.evaluate(made, at.test("conv"), recalibrate=at.loader("conv"))
        return made, profile, {name: torch.tensor(value) for name, value in values.items()}

    agreement.both(watched)


@check("models.train: a loader that shuffles, on the device")
def _(agreement: Agreement) -> None:
    agreement.both(
        lambda at: models.train(*at.networks("mlp", 1), at.loader("mlp").with_(shuffle=True), recipe=SHORT, seed=3)
    )


@check("models.train_population", seconds=10)
def _(agreement: Agreement) -> None:
    for name in ("mlp", "conv"):
        agreement.both(lambda at, name=name: models.train_population(at.networks(name), at.batches(name), recipe=SHORT))
    agreement.both(lambda at: models.train_population(at.networks("mlp"), at.loader("mlp"), recipe=SHORT))


@check("models.save, models.load")
def _(agreement: Agreement) -> None:
    def reread(at: Place) -> list[nn.Module]:
        (mlp,), (conv,) = at.networks("mlp", 1), at.networks("conv", 1)
        for number, network in enumerate((mlp, conv)):
            models.save(network, at.folder / f"{number}.safetensors")
        agreement.require(
            next(models.load(at.folder / "0.safetensors", mlp.cpu()).parameters()).device == CPU,
            "load is not on the CPU",
        )
        mlp.to(at.device)
        return [models.load(at.folder / f"{number}.safetensors", like) for number, like in enumerate((mlp, conv))]

    agreement.both(reread)


@check("data: digits on the device, moments, augmentation")
def _(agreement: Agreement) -> None:
    def seen(at: Place) -> Any:
        train, test = data.load("digits", device=at.device)
        augment = (data.Rotate(15), data.Flip(), data.Crop(2))
        images = train.with_(inputs=train.inputs.view(-1, 1, 8, 8), augment=augment)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would move the device's generator, too
            first = next(iter(train)), next(iter(images))
        agreement.require(train.inputs.device.type == at.device.type, "data is not on the device")
        return first, next(iter(test)), train.mean(), train.std()

    agreement.both(seen)


# -- curves


@check("fit_curve: every kind of curve", seconds=10)
def _(agreement: Agreement) -> None:
    for curve in (Bezier(2), Bezier(3, free_ends=True), PolyChain(3), Line()):
        agreement.both(lambda at, curve=curve: fitted(at, curve=curve))
    agreement.both(lambda at: fitted(at, "conv"))
    agreement.both(lambda at: fitted(at, "attending", recipe=SHORT))


@check("fit_curve: aligned, with data on the device", seconds=10)
def _(agreement: Agreement) -> None:
    agreement.both(lambda at: fitted(at, align=True, spec=spec_of("mlp")))
    agreement.both(lambda at: fit_curve(*at.networks("conv"), at.loader("conv"), recipe=SHORT, spec=spec_of("conv")))
    agreement.both(lambda at: fitted(at, align=shuffled("mlp"), recipe=SHORT))
    adam = Recipe(epochs=1, optimizer=partial(torch.optim.Adam, lr=1e-3))
    agreement.both(lambda at: fitted(at, recipe=adam))


@check("fit_curve: the recipe's own optimizer, fused")
def _(agreement: Agreement) -> None:
    fused = Recipe(epochs=1, optimizer=partial(SGD, fused=True))
    agreement.both(lambda at: fitted(at, recipe=fused))
    agreement.both(lambda at: fitted(at, recipe=fused, curve=PolyChain(3)))


@check("fit_curve: forward=")
def _(agreement: Agreement) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"])

    def fit(at: Place) -> Any:
        batches = [{"x": x, "y": y} for x, y in at.batches("mlp")]
        found = fit_curve(*at.networks("mlp"), batches, forward=loss, align=False, recipe=SHORT)
        return found, found.evaluate(batches, num_points=3)

    agreement.both(fit)


@check("fit_curve: adversary=", seconds=10)
def _(agreement: Agreement) -> None:
    near = PGD(1e-3, 5e-4, 2)  # TRADES has to start at random, here so near that it does not matter
    opponents = (ATTACK, AdversarialTraining(ATTACK, 0.5), TRADES(near), FreeAdversarialTraining(0.1, num_replays=2))
    for opponent in opponents:
        agreement.both(lambda at, opponent=opponent: fitted(at, adversary=opponent, recipe=SHORT))
    agreement.both(lambda at: fitted(at, "conv", adversary=ATTACK, recipe=SHORT))


@check("fit_curve: refine=PAM", seconds=20)
def _(agreement: Agreement) -> None:
    steps = {
        "ProximalLinear": ProximalLinear(num_tries=12, num_rounds=2),
        "SinkhornStep": SinkhornStep(num_steps=4, num_rounds=2),
        "RelaxedStep": RelaxedStep(num_steps=4, num_samples=4),
    }
    for step in steps.values():
        refine = PAM(iterations=2, step=step, num_batches=4)
        agreement.both(lambda at, refine=refine: fitted(at, refine=refine, spec=spec_of("mlp")))
    exact = PAM(iterations=2, step=steps["ProximalLinear"], exact=True, num_points=3)
    agreement.both(lambda at: fitted(at, refine=exact, spec=spec_of("mlp")))
    on_line = PAM(iterations=1, step=steps["ProximalLinear"])
    agreement.both(lambda at: fitted(at, "conv", refine=on_line, curve=Line(), recipe=SHORT, spec=spec_of("conv")))


@check("best_swap")
def _(agreement: Agreement) -> None:
    def swap(at: Place) -> Any:
        connection = fitted(at, align=shuffled("mlp"), recipe=SHORT)
        found = modeconn.best_swap(connection, num_batches=2, num_tries=10)
        return found.decrease, found.loss, list(found.places or ())

    agreement.both(swap)


class Breaking:
    """Batches of a list, until so many were read altogether."""

    def __init__(self, batches: list[Any], limit: int) -> None:
        self._batches, self._left = batches, limit

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            if not self._left:
                raise InterruptedError("the data ends here")
            self._left -= 1
            yield batch


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Ask torch for deterministic algorithms, as far as there are any."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@check("fit_curve: interrupted and resumed", seconds=15)
def _(agreement: Agreement) -> None:
    refine = PAM(iterations=2, step=ProximalLinear(num_tries=6, num_rounds=1), num_batches=2)
    free = FreeAdversarialTraining(0.1, num_replays=2)
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "plain": ("mlp", {}),
        "batch norm, Adam": ("conv", {"recipe": Recipe(epochs=2, optimizer=partial(torch.optim.Adam, lr=1e-3))}),
        "free ends, fused": ("mlp", {"curve": Bezier(3, True), "recipe": Recipe(2, partial(SGD, fused=True))}),
        "PAM": ("mlp", {"refine": refine, "spec": spec_of("mlp")}),
        "free adversarial training": ("mlp", {"adversary": free}),
    }
    for kind, (name, settings) in kinds.items():
        with reproducible():
            whole = agreement.once(lambda at, name=name, settings=settings: fitted(at, name, **settings))
            resumed = agreement.once(lambda at, name=name, settings=settings: _in_two(agreement, at, name, settings))
        agreement.compare(whole, resumed)
        agreement.notes[f"{kind}: same bits"] = torch.equal(whole.control_points, resumed.control_points)


def _in_two(agreement: Agreement, at: Place, name: str, settings: dict[str, Any]) -> Connection:
    """Break a fit off, and go on from its checkpoint."""
    settings = {"align": False, "recipe": RECIPE, **settings}
    settings["checkpoint"] = Checkpoint(at.folder / "run.checkpoint", every_batches=2)
    batches = at.batches(name)
    with contextlib.suppress(InterruptedError):
        fit_curve(*at.networks(name), Breaking(batches, len(batches) + 4), **settings)
        agreement.problems.append("the first run was not interrupted")
    agreement.require((at.folder / "run.checkpoint").exists(), "the interrupted run left no checkpoint")
    return fit_curve(*at.networks(name), batches, **settings)


@check("fit_curve and train: autocast", seconds=10)
def _(agreement: Agreement) -> None:
    """Low precision is only to be finite and near; how near is noted."""
    _low_precision(agreement, {"bfloat16": torch.bfloat16, "float16": torch.float16}, compiled=False)


def _low_precision(agreement: Agreement, precisions: dict[str, torch.dtype | None], *, compiled: bool) -> None:
    def losses(at: Place, name: str, **how: Any) -> Tensor:
        recipe = Recipe(epochs=2, optimizer=SGD, **how)
        networks, batches = at.networks(name, dtype=torch.float32), at.batches(name, torch.float32)
        found = fit_curve(*networks, batches, align=False, recipe=recipe)
        trained = Connection.straight_between(models.train(networks[0], batches, recipe=recipe), networks[1])
        test = [(x.float(), y) for x, y in at.test(name)]
        ends = [one.evaluate(test, num_points=2, recalibrate=batches).loss for one in (found, trained)]
        return torch.cat([torch.tensor(found.history.loss), *ends])

    for name in ("mlp", "conv"):
        plain = agreement.once(partial(losses, name=name), CPU)
        for text, dtype in precisions.items():
            found = agreement.once(partial(losses, name=name, autocast=dtype, compile=compiled))
            apart = float((found - plain).abs().max() / plain.abs().max().clamp(min=1))
            agreement.notes[f"{name}, {text}: largest difference of a loss"] = apart
            agreement.require(apart < 0.1, f"{name} in {text} is {apart:.3g} away from float32")


# -- what a connection measures


@check("Connection: model_at, evaluate, length, straight")
def _(agreement: Agreement) -> None:
    for name in ("mlp", "conv"):

        def measured(at: Place, name: str = name) -> Any:
            connection = fitted(at, name, recipe=SHORT)
            profiles = [c.evaluate(at.test(name), num_points=5) for c in (connection, connection.straight())]
            places = [connection.model_at(t) for t in (0, 0.3, 1)]
            return profiles, places, connection.length(), connection.weights_at(0.5)

        agreement.both(measured)


@check("Connection: data on the device, recalibrate=, repair=True")
def _(agreement: Agreement) -> None:
    def repaired(at: Place) -> Any:
        line = Connection.straight_between(*at.networks("mlp"))
        batches = at.batches("mlp")
        profile = line.evaluate(at.loader("mlp"), num_points=3, recalibrate=batches, repair=True)
        return profile, line.model_at(0.5, recalibrate=batches, repair=True)

    def recalibrated(at: Place) -> Any:
        line = Connection.straight_between(*at.networks("conv"))
        seen = AdversarialExamples(at.batches("conv"), ATTACK)
        found = [line.evaluate(at.test("conv"), num_points=3, recalibrate=r) for r in (at.loader("conv"), seen)]
        return found, line.model_at(0.5, recalibrate=seen)

    agreement.both(repaired)
    agreement.both(recalibrated)


@check("Connection: save, load with device= and template=")
def _(agreement: Agreement) -> None:
    def reread(at: Place) -> Any:
        mlp, conv = fitted(at, align=shuffled("mlp"), recipe=SHORT), fitted(at, "conv", recipe=SHORT)
        for name, one in (("mlp", mlp), ("conv", conv)):
            one.save(at.folder / name)
        (template,) = at.networks("conv", 1)
        found = [
            Connection.load(at.folder / "mlp", device=at.device),
            Connection.load(at.folder / "conv", template),
            Connection.load(at.folder / "conv", copy.deepcopy(template).cpu(), device=at.device),
        ]
        agreement.require(Connection.load(at.folder / "mlp").device == CPU, "without device= it is not on the CPU")
        for one, again in zip((mlp, conv, conv), found, strict=True):
            agreement.require(torch.equal(one.control_points, again.control_points), "weights changed in a file")
        return found

    agreement.both(reread)


@check("Connection.robustness, robustness(model), Ensemble", seconds=10)
def _(agreement: Agreement) -> None:
    def attacked(at: Place) -> Any:
        connection = fitted(at, "conv", recipe=SHORT)
        attack = {"pgd": ATTACK, "l2": PGD(0.5, 0.2, 2, norm="l2", random_start=False)}
        settings = {"num_points": 3, "transfer": True, "checkpoint": at.folder / "records"}
        first, again = (connection.robustness(at.test("conv"), attack, **settings) for _ in range(2))
        agreement.compare(first, again)
        both = Ensemble([connection.model_at(t) for t in (0, 1)])
        return first, modeconn.robustness(both, at.test("conv"), [ATTACK], num_examples=100), both

    agreement.both(attacked)


@check("Connection.robustness: random starts, restarts")
def _(agreement: Agreement) -> None:
    def attacked(at: Place) -> Any:
        line = Connection.straight_between(*at.networks("mlp"))
        test, attack = at.test("mlp"), PGD(0.1, 0.04, 2, num_restarts=2, seed=1)
        return line.robustness(test, [attack], t=[0, 0.5, 1])

    left, right = (agreement.once(attacked, device) for device in (CPU, agreement.device))
    agreement.compare(left, agreement.once(attacked, CPU))
    apart = float((left.loss["worst"] - right.loss["worst"]).abs().max())
    agreement.notes["random starts differ between devices; difference of the worst loss"] = apart
    agreement.require(apart < 0.1 * float(left.loss["worst"].max()), f"the worst losses are {apart:.3g} apart")


@check("Connection.robustness: torchattacks", seconds=15)
def _(agreement: Agreement) -> None:
    if importlib.util.find_spec("torchattacks") is None:
        raise LeftOut("torchattacks is not installed")
    chosen = {
        "apgd": attacks.build("torchattacks:APGD(eps=0.1, steps=5)", seed=0),
        "square": attacks.build("torchattacks:Square(eps=0.1, n_queries=20)", seed=0),
    }

    def attacked(at: Place) -> Any:
        line = Connection.straight_between(*at.networks("conv"))
        return line.robustness(at.test("conv"), chosen, t=[0, 1], num_examples=50, recalibrate=at.test("conv"))

    left, right = (agreement.once(attacked, device) for device in (CPU, agreement.device))
    for row in left.accuracy:
        apart = float((left.accuracy[row] - right.accuracy[row]).abs().max())
        agreement.notes[f"{row}: difference in accuracy"] = apart
        agreement.require(apart <= (0.02 if row == "clean" else 0.2), f"{row} is {apart:.2f} apart in accuracy")


@check("Connection.curvature")
def _(agreement: Agreement) -> None:
    settings: dict[str, Any] = {"t": [0, 1], "tolerance": 1e-6, "num_steps": 150}
    for name, wrt in (("mlp", "weights"), ("mlp", "inputs"), ("mlp", "both"), ("conv", "weights")):

        def sharpness(at: Place, name: str = name, wrt: Any = wrt) -> Any:
            line = Connection.straight_between(*at.networks(name))
            data = [(x[:40], y[:40]) for x, y in at.test(name)[:1]]
            return line.curvature(data, wrt=wrt, recalibrate=at.test(name), **settings).eigenvalue

        agreement.both(sharpness)


# -- several networks


@check("interpolate, merge_many, repair", seconds=10)
def _(agreement: Agreement) -> None:
    def merged(at: Place, name: str) -> Any:
        networks, batches = at.networks(name, 3), at.batches(name)
        between = modeconn.interpolate(*networks[:2], 0.4, recalibrate=batches, repair=name == "mlp")
        both = modeconn.merge_many(networks, batches, start=ActivationMatching(), repair=True, spec=spec_of(name))
        return between, both, modeconn.repair(between, networks[:2], at.loader(name))

    for name in ("mlp", "conv"):
        agreement.both(partial(merged, name=name))
    agreement.both(lambda at: modeconn.merge_many(at.networks("mlp", 3), method=WeightMatching(), num_rounds=3))


@check("compare", seconds=10)
def _(agreement: Agreement) -> None:
    methods = {"weights": WeightMatching(), "activations": ActivationMatching()}

    def table(at: Place) -> Any:
        settings = {"num_points": 5, "spec": spec_of("mlp"), "recipe": SHORT, "checkpoint": at.folder / "records"}
        found = modeconn.compare([at.networks("mlp")], methods, at.batches("mlp"), at.test("mlp"), **settings)
        columns = [column for column in found.columns if column not in ("seconds", "curve seconds", "peak bytes")]
        return {f"{r} {c}": torch.tensor(v[c]) for r, v in found.values.items() for c in columns}

    agreement.both(table)


@check("plot", seconds=10)
def _(agreement: Agreement) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def drawn(at: Place) -> None:
        networks, batches, test = at.networks("mlp"), at.batches("mlp"), at.test("mlp")
        aligned = align(*networks, batches, spec=spec_of("mlp"))
        curve = fit_curve(*networks, batches, align=aligned, recipe=SHORT)
        compared = modeconn.compare(
            [networks], [WeightMatching()], batches, test, num_points=3, spec=spec_of("mlp"), repair=False
        )
        axes = [
            plot.profile(curve.evaluate(test, num_points=3), quantity="accuracy"),
            plot.robust_profile(curve.robustness(test, [ATTACK], num_points=3)),
            plot.correlation(aligned),
            plot.history(curve),
            plot.comparison(compared),
        ]
        for one in axes:
            one.figure.canvas.draw()
        pyplot.close("all")

    agreement.once(drawn)


# -- what a device may break


@check("float32: real networks, aligned and evaluated", seconds=15)
def _(agreement: Agreement) -> None:
    """Full precision as users have it, and a layout that convolutions like on a GPU."""
    name, size, count = ("tinyten", 12, 32) if agreement.quick else ("resnet20", 32, 256)
    networks = [models.build(name, image_size=size, seed=seed).eval() for seed in (1, 2)]
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(count, 3, size, size, generator=generator), torch.randint(10, (count,), generator=generator)
    batches = list(zip(x.split(count // 2), y.split(count // 2), strict=True))
    spec = modeconn.discover(networks[0])

    permutation = align(*networks, spec=spec).permutation  # one for both: untrained networks have many near ties

    def measured(at: Place) -> Any:
        a, b = (at.give(network.to(memory_format=torch.channels_last)) for network in networks)
        line = Connection.straight_between(a, permutation.apply(b))
        profile = line.evaluate(batches, num_points=3, recalibrate=batches)
        return align(a, b, batches, spec=spec), align(a, b, spec=spec), profile

    agreement.both(measured)


@check("recurrent networks: curve, attack, refinement, soft alignment", seconds=10)
def _(agreement: Agreement) -> None:
    """On CUDA their backward pass exists in train mode alone, and their weights lie in one block of memory."""
    works: dict[str, Callable[[Place], Any]] = {
        "models.train": lambda at: models.train(*at.networks("recurrent", 1), at.batches("recurrent"), recipe=SHORT),
        "fit_curve": lambda at: fitted(at, "recurrent", recipe=SHORT),
        "robustness": lambda at: modeconn.robustness(*at.networks("recurrent", 1), at.test("recurrent"), [ATTACK]),
        "adversary=": lambda at: fitted(at, "recurrent", recipe=SHORT, adversary=ATTACK),
        "refine=PAM": lambda at: fitted(
            at,
            "recurrent",
            recipe=SHORT,
            refine=PAM(iterations=1, step=ProximalLinear(num_tries=4, num_rounds=1), num_batches=2),
            spec=spec_of("recurrent"),
        ),
        "Sinkhorn": lambda at: align(
            *at.networks("recurrent"),
            at.batches("recurrent"),
            method=Sinkhorn(num_steps=2, num_rounds=1, num_examples=64),
            spec=spec_of("recurrent"),
        ),
    }
    for name, work in works.items():
        each(agreement, name, lambda work=work: agreement.both(work))


def each(agreement: Agreement, name: str, work: Callable[[], Any]) -> None:
    """Do one of several things; an exception is a problem of that one alone."""
    try:
        work()
    except Exception as error:
        agreement.problems.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")


@check("attention: attack, refinement, curvature", seconds=10)
def _(agreement: Agreement) -> None:
    refine = PAM(iterations=1, step=ProximalLinear(num_tries=4, num_rounds=1), num_batches=2)
    name = "attending"
    works: dict[str, Callable[[Place], Any]] = {
        "robustness": lambda at: modeconn.robustness(*at.networks(name, 1), at.test(name), [ATTACK]),
        "refine=PAM": lambda at: fitted(at, name, recipe=SHORT, refine=refine, spec=spec_of(name)),
        "recalibrate": lambda at: Connection.straight_between(*at.networks(name)).evaluate(at.test(name), num_points=3),
    }
    for kind, work in works.items():
        each(agreement, kind, lambda work=work: agreement.both(work))


@check("one network on the CPU, one on the device")
def _(agreement: Agreement) -> None:
    """Each verb has to say so in a ValueError, or do it right."""
    agreement.need_second_device()
    spec, loader = spec_of("mlp"), case("mlp").train[:1]
    a, b = case("mlp").networks[0], agreement.once(lambda at: at.networks("mlp"))[1]
    networks = [(case("conv").networks[0], agreement.once(lambda at: at.networks("conv"))[1])]
    verbs: dict[str, Callable[[], Any]] = {
        "fit_curve": lambda: fit_curve(a, b, loader, recipe=SHORT),
        "align": lambda: align(a, b, loader, spec=spec),
        "align by weights": lambda: align(a, b, spec=spec),
        "interpolate": lambda: modeconn.interpolate(a, b),
        "interpolate, batch norm": lambda: modeconn.interpolate(*networks[0], recalibrate=case("conv").train),
        "Connection.straight_between": lambda: Connection.straight_between(a, b),
        "merge_many": lambda: modeconn.merge_many([a, b], loader, spec=spec),
        "repair": lambda: modeconn.repair(a, [a, b], loader),
        "compare": lambda: modeconn.compare([(a, b)], [WeightMatching()], loader, loader, spec=spec),
        "train_population": lambda: models.train_population([a, b], loader, recipe=SHORT),
    }
    for name, verb in verbs.items():
        try:
            verb()
            agreement.notes[name] = "gives a result"
        except ValueError as error:
            agreement.notes[name] = f"ValueError: {str(error)[:200]}"
        except Exception as error:
            agreement.problems.append(f"{name}: no ValueError but {type(error).__name__}: {str(error)[:200]}")


def _keep_busy(device: torch.device) -> None:
    """Give the device so much to do that what is asked of it next happens later."""
    x = torch.ones(4096, 4096, device=device)
    for _ in range(100):
        x = (x @ x) * 1e-4


@check("networks on the CPU, data on the device", seconds=10)
def _(agreement: Agreement) -> None:
    """A copy to the CPU that does not wait for the device is read before it is there."""
    agreement.need_second_device()
    loader = agreement.once(lambda at: at.loader("mlp"))
    a, b = case("mlp").networks[:2]
    works: dict[str, Callable[[Any], Any]] = {
        "evaluate": lambda batches: Connection.straight_between(a, b).evaluate(batches, num_points=3),
        "align": lambda batches: align(a, b, batches, spec=spec_of("mlp")),
        "train": lambda batches: models.train(a, batches, recipe=SHORT),
        "fit_curve": lambda batches: fit_curve(a, b, batches, align=False, recipe=SHORT),
    }
    for work in works.values():
        expected = work(case("mlp").train)
        for _ in range(3):
            _keep_busy(agreement.device)
            agreement.compare(expected, work(loader))


class Tokens(nn.Module):
    """Reads whole numbers, each of which has a row in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.table(tokens).mean(1))


@check("verify on a device that is busy", seconds=10)
def _(agreement: Agreement) -> None:
    """The proof is made on the CPU: the example has to be there before it is read."""
    agreement.need_second_device()
    network = Tokens().to(agreement.device)
    tokens = torch.arange(10, device=agreement.device).view(2, 5) + 1
    spec = modeconn.discover(network, tokens)
    for _ in range(3):
        _keep_busy(agreement.device)
        again = tokens * 1
        agreement.difference("what is left", torch.zeros(()), torch.tensor(spec.verify(network, again)), 1e-6)


@check("fit_curve and train: compile=True", seconds=90)
def _(agreement: Agreement) -> None:
    if agreement.quick:
        raise LeftOut("the compiler takes too long for --quick")
    _low_precision(agreement, {"float32": None, "bfloat16": torch.bfloat16}, compiled=True)
