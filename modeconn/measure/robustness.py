"""Attacks on one network, or on networks along a curve: measured batch by batch, checked, and resumable."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.measure.meter import is_mean, warn_of_no_mean
from modeconn.measure.robust_profile import (
    CLEAN,
    WORST,
    RobustProfile,
    pack_bits,
    pack_floats,
    unpack_bits,
    unpack_floats,
)
from modeconn.network.attack import Attack, check_examples, is_attack, under_attack
from modeconn.network.batches import batches, check_loader, described, inputs_and_targets, is_dense, run
from modeconn.network.copies import copy_of
from modeconn.network.loss import LossFn, check_classes, cross_entropy, main_output, one_number, per_example
from modeconn.network.scores import (
    IGNORED,
    classes_of,
    is_sum,
    knows_its_axis,
    setting_of,
    smooths_weightless,
    weighted,
)
from modeconn.network.weights import check_eval_mode, device_of
from modeconn.tools.door import checked, is_iterable
from modeconn.tools.fingerprint import digest, identify
from modeconn.tools.measurements import Records
from modeconn.tools.measurements import key as record_key
from modeconn.tools.processes import joined, shared
from modeconn.tools.progress import progress_bar
from modeconn.tools.rng import seeded

Attacks = Attack | Sequence[Attack] | Mapping[str, Attack]

_TOLERANCE = 1e-6  # tolerated distance outside of the ball and of the pixel range
_ORDERS = {"linf": math.inf, "l2": 2.0, "l1": 1.0}


@shared
@checked
def robustness(
    model: nn.Module,
    loader: Iterable[Any],
    attacks: Attacks,
    *,
    num_examples: int | None = None,
    loss_fn: LossFn = cross_entropy,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> RobustProfile:
    """Attack one network, such as an `Ensemble` of several points of a curve: loss and accuracy, clean and attacked.

    Every adversarial example is checked: it must be finite, in its ball and in the pixel range.

    Args:
        model: A network in eval mode, its normalisation inside.
        loader: Data to attack, ``(inputs, targets)`` batches, inputs in [0, 1].
        attacks: One or several attacks ``attack(model, x, y) -> x_adv``, such as `PGD` or those of
            `modeconn.attacks.build`; a dict gives them names.
        num_examples: Attack only so many examples, the first. None for all.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over examples.
        checkpoint: A file of finished measurements, a line for each attack and batch. What is in it is not measured
            again, also if attacks have been added meanwhile.
        seed: Of the attacks.
        progress: Whether to show a progress bar.

    Returns:
        A profile of one point, at t = 0.

    Raises:
        ValueError: If the model is in train mode, inputs are outside [0, 1], or an attack leaves its ball or the pixel
            range.
        FloatingPointError: If an attack returns NaN.

    Example:
        >>> from modeconn import PGD, data, models
        >>> train, test = data.load("digits")
        >>> network = models.mlp(64, (8,), 10, mean=train.mean()).eval()
        >>> profile = robustness(network, test, [PGD(0.1, 0.025, 5)], num_examples=100)
        >>> bool(profile.accuracy["worst"] <= profile.accuracy["clean"])
        True
    """
    return robustness_along(
        lambda t: model,
        [0.0],
        loader,
        attacks,
        num_examples=num_examples,
        loss_fn=loss_fn,
        checkpoint=checkpoint,
        seed=seed,
        progress=progress,
    )


def robustness_along(
    model_at: Callable[[float], nn.Module],
    t: Sequence[float],
    loader: Iterable[Any],
    attacks: Attacks,
    *,
    num_examples: int | None = None,
    transfer: bool = False,
    loss_fn: LossFn = cross_entropy,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    statistics: Callable[[], str] = str,
    progress: bool = False,
) -> RobustProfile:
    """Attack the network at every t; `Connection.robustness` says what the arguments are.

    ``model_at`` may return one module that it moves; ``statistics`` is asked at the end, and says
    which those of norm layers were.
    """
    start, named = time.perf_counter(), _named(attacks)
    if smooths_weightless(loss_fn):
        raise ValueError(
            "loss_fn= smooths labels and has classes of weight 0, so that their examples have no loss of their own. "
            "Pass one without label_smoothing, or with positive weights."
        )
    them = joined()
    # As many places at a time as there are processes; of more processes than places, several share its batches.
    teams = min(len(t), them.size)
    members = them.size // teams
    with Records(checkpoint) as known:
        networks = [copy_of(model_at(position)) for position in t] if transfer else []
        first = networks[0] if transfer else model_at(t[0])
        data = _read(loader, device_of(first), num_examples, setting_of(loss_fn, "ignore_index", IGNORED), loss_fn)
        trial = _Attacking(data, loss_fn, seed, known, networks)
        # Read before an attack changes its own settings.
        names = {row: identify(attack) for row, attack in [(CLEAN, None), *named.items()]}
        if them.size > 1:
            them.agree({"attacks": names, "seed": seed, "loss_fn and networks": trial.about, "data": trial.data_digest})
        rows: dict[str, list[_Measured]] = {row: [] for row in (CLEAN, *named)}
        bar = progress_bar(total=len(t) * len(rows) * len(data), show=progress, desc="robustness", unit="batch")
        arrived: dict[int, nn.Module] = {}

        def arrive(place: int) -> dict[str, str]:
            """Move the network to a place, if it is one; return what tells its measurements from others, by row."""
            arrived.clear()
            if place >= len(t):
                return {}
            model = networks[place] if transfer else first if place == 0 else model_at(t[place])
            check_eval_mode(model)
            arrived[place], network = model, digest(model)
            return {row: record_key("robustness", name, network, trial.about) for row, name in names.items()}

        team, part = divmod(them.rank, members)
        for round_begin in range(0, len(t), teams):
            place = round_begin + team if team < teams else len(t)
            about_places = them.each(functools.partial(arrive, place))
            here, model = about_places[them.rank], arrived.get(place)
            for row, attack in {CLEAN: None, **named}.items():
                label = f"{row} at t={t[place]:g}" if here else ""
                trial.run(model, attack, here.get(row, ""), label, slice(part, None, members))
                found = [trial.found(about[row]) for about in about_places[::members] if about]
                rows[row] += found
                bar.update(len(found) * len(data))
    return RobustProfile(
        torch.tensor(t, dtype=torch.float64),
        {row: torch.stack([one.correct for one in points]) for row, points in rows.items()},
        {row: torch.stack([one.losses for one in points]) for row, points in rows.items()},
        {row: _facts(attack) for row, attack in named.items()},
        trial.data_digest,
        {row: torch.stack([one.elsewhere for one in rows[row]]) for row in named} if transfer else None,
        time.perf_counter() - start,
        statistics(),
        trial.weights,
    )


@dataclass(frozen=True)
class _Measured:
    """Results of one network under one attack.

    Args:
        correct: Whether each example is answered right, bool ``(M,)``.
        losses: The loss of each example, float32 ``(M,)``.
        elsewhere: Accuracy of the networks at all positions on the same adversarial examples, float64 ``(N,)``.
    """

    correct: Tensor
    losses: Tensor
    elsewhere: Tensor


class _Attacking:
    """What is done with every network and attack, on the same batches."""

    def __init__(
        self, data: list[tuple[Tensor, Tensor]], loss_fn: LossFn, seed: int, known: Records, networks: list[nn.Module]
    ) -> None:
        self._data, self._loss_fn, self._seed, self._known, self._networks = data, loss_fn, seed, known, networks
        self._digests = [digest(batch) for batch in data]
        self._was_tried = False
        self.about = record_key(loss_fn, *map(digest, networks))

    @property
    def data_digest(self) -> str:
        """A hash of the examples one by one, in whatever batches."""
        inputs, targets = zip(*self._data, strict=True)
        return digest([one for part in (*inputs, *targets) for one in part.cpu()])

    @property
    def weights(self) -> Tensor | None:
        """How much each example counts in the mean loss, float32 ``(M,)``; None for all alike."""
        is_weighted = knows_its_axis(self._loss_fn) and not is_sum(self._loss_fn)
        by_class = setting_of(self._loss_fn, "weight", None) if is_weighted else None
        return None if by_class is None else by_class.cpu().float()[torch.cat([y.cpu() for _, y in self._data])]

    def run(self, model: nn.Module | None, attack: Attack | None, about: str, label: str, part: slice) -> None:
        """Measure one network under one attack on a part of the batches; keep what is new, as soon as it is there.

        Processes come here together, those without a network to keep what the others find.
        """
        numbers = range(len(self._data))[part]

        def measured(turn: int) -> dict[str, dict[str, Any]]:
            if model is None or turn >= len(numbers):
                return {}
            number = numbers[turn]
            (x, y), key = self._data[number], self._key(about, number)
            if key in self._known:
                return {}
            return {key: {"label": label, **self._measure(model, attack, x, y, self._seed + number, label)}}

        for turn in range(-(-len(self._data) // part.step)):
            for found in joined().each(functools.partial(measured, turn)):
                for key, record in found.items():
                    self._known.add(key, record)

    def _key(self, about: str, number: int) -> str:
        return record_key(about, self._digests[number], self._seed + number)

    def found(self, about: str) -> _Measured:
        """Return what was measured of one network under one attack."""
        parts = [
            self._known.get(self._key(about, number), functools.partial(self._read, len(y)))
            for number, (_, y) in enumerate(self._data)
        ]
        correct, losses, elsewhere = zip(*parts, strict=True)
        return _Measured(torch.cat(correct), torch.cat(losses), torch.stack(elsewhere).sum(0) / sum(map(len, correct)))

    def _read(self, size: int, record: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return right answers and losses of ``size`` examples, and how many the other networks answer right."""
        elsewhere = torch.tensor(record["elsewhere"], dtype=torch.float64)
        if elsewhere.shape != (len(self._networks),):
            raise ValueError(f"there are {len(self._networks)} networks, not {len(elsewhere)}")
        return unpack_bits(record["correct"], (size,)), unpack_floats(record["losses"], (size,)), elsewhere

    def _measure(
        self, model: nn.Module, attack: Attack | None, x: Tensor, y: Tensor, seed: int, label: str
    ) -> dict[str, Any]:
        x_adv = x if attack is None else attacked(attack, model, x, y, seed, label)
        correct, losses = self._answers(model, x_adv, y, label)
        elsewhere = [int(self._answers(network, x_adv, y, label)[0].sum()) for network in self._networks]
        return {"correct": pack_bits(correct), "losses": pack_floats(losses.float()), "elsewhere": elsewhere}

    @torch.no_grad()
    def _answers(self, model: nn.Module, x: Tensor, y: Tensor, label: str) -> tuple[Tensor, Tensor]:
        outputs = run(model, x)
        if main_output(outputs).isnan().any():
            raise FloatingPointError(f"{label}: the network answers NaN. Look for NaN in its weights.")
        classes = classes_of(outputs, y, self._loss_fn)
        if classes is None or y.ndim != 1:
            raise ValueError(
                f"attacks are measured on examples of one class each, but targets are {y.dtype} of shape "
                f"{tuple(y.shape)}, and the model's scores have the shape {tuple(main_output(outputs).shape)}."
            )
        check_classes(classes)
        losses = per_example(self._loss_fn, outputs, y)
        if not self._was_tried:
            self._was_tried = True
            self._try_mean(outputs, y, losses)
        return classes.correct, losses

    def _try_mean(self, outputs: Any, y: Tensor, losses: Tensor) -> None:
        """Warn if the loss of a batch is not the mean of those of its examples, where it is not known to be one."""
        loss, again = (one_number(self._loss_fn, outputs, y) for _ in range(2))
        found = weighted(self._loss_fn, loss, outputs, y, len(y))
        if found.is_exact or len(y) < 2 or loss != again:  # of one that draws random numbers nothing can be said
            return
        whole, mean = float(found.total) / len(y), float(losses.double().mean())
        if math.isfinite(whole) and not is_mean(whole, mean, torch.finfo(losses.dtype).eps):
            warn_of_no_mean(f"{whole:.6g} of {len(y)} examples, and {mean:.6g} of one on average")


def attacked(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, seed: int, label: str) -> Tensor:
    """Return adversarial examples that were looked at; an error says which attack it was, and at which t."""
    try:
        with seeded(seed, x.device), under_attack(model):
            x_adv = attack(model, x.clone(), y.clone())  # cloned, because some attacks change their inputs in place
    except (ValueError, FloatingPointError) as error:
        raise type(error)(f"{label}: {error}") from error
    except Exception as error:
        error.add_note(f"This was {label}.")
        raise
    check_examples(x_adv, x, label)
    x_adv = x_adv.detach()
    if not x_adv.isfinite().all():
        raise FloatingPointError(f"{label} returned NaN or infinite values.")
    lowest, highest = (value.item() for value in x_adv.aminmax())
    if lowest < -_TOLERANCE or highest > 1 + _TOLERANCE:
        raise ValueError(f"{label} left the pixel range [0, 1]: its examples go from {lowest:g} to {highest:g}.")
    _check_ball(attack, x_adv, x, label)
    return x_adv


def _check_ball(attack: Attack, x_adv: Tensor, x: Tensor, label: str) -> None:
    """Raise unless examples are as near as ``attack.eps`` and ``attack.norm`` say, if they say it."""
    eps, norm = getattr(attack, "eps", None), getattr(attack, "norm", None)
    if eps is None or norm is None:
        return
    moved = (x_adv.double() - x.double()).flatten(1)
    length = torch.linalg.vector_norm(moved, ord=_ORDERS[norm], dim=1).max().item()
    # Rounding of x + delta, where pixels are at most 1.
    rounding = torch.finfo(x.dtype).eps / 2 * moved.shape[1] ** (1 / _ORDERS[norm])
    if length > (eps + max(_TOLERANCE, rounding) if eps else 0):
        raise ValueError(f"{label} left its ball: an example moved by {length:g} in the norm {norm}, eps is {eps:g}.")


def _read(
    loader: Iterable[Any], device: torch.device, limit: int | None, ignored: int, loss_fn: LossFn
) -> list[tuple[Tensor, Tensor]]:
    """Return the first examples whose target counts in batches, once, after a look at their range."""
    if limit is not None and limit < 1:
        raise ValueError(f"num_examples must be at least 1, got num_examples={limit}.")
    kept: list[tuple[Tensor, Tensor]] = []
    room = math.inf if limit is None else limit
    with seeded(0, device):
        check_loader(loader)
        for x, y in map(inputs_and_targets, batches(loader, device)):
            if not (is_dense(x) and is_dense(y) and x.ndim and len(x) and y.ndim):
                raise ValueError(
                    f"loader must yield inputs and targets as dense tensors of one example or more, got "
                    f"{described((x, y))}."
                )
            if y.ndim == 1 and len(y) == len(x):
                if is_sum(loss_fn) and bool((y == ignored).any()):
                    raise ValueError(
                        f"targets of {ignored} count as examples for a loss that sums, and are not attacked: pass "
                        f"loss_fn= with reduction='mean', or leave these examples out of loader."
                    )
                x, y = x[y != ignored], y[y != ignored]
            if not len(x):
                continue
            kept.append((x[: min(room, len(x))], y[: min(room, len(x))]))
            _check_range(kept[-1][0])
            room -= len(x)
            if room <= 0:
                break
    if not kept:
        raise ValueError(f"loader holds no example whose target counts: all are {ignored}.")
    return kept


def _check_range(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(
            f"inputs of loader must be floating point in [0, 1], got {x.dtype}: divide pixels by 255. Attacks "
            f"move inputs by small steps, so that others of whole numbers, such as tokens, cannot be attacked."
        )
    lowest, highest = (value.item() for value in x.aminmax())
    if math.isnan(lowest):
        raise ValueError("inputs of loader must lie in [0, 1], but some are NaN. Look at the data.")
    if -_TOLERANCE <= lowest and highest <= 1 + _TOLERANCE:
        return
    looks_like = (
        "images in [0, 255]: divide by 255"
        if lowest >= 0 and highest > 2
        else ("normalised data: put the normalisation inside the model")
    )
    raise ValueError(
        f"inputs of loader must lie in [0, 1], since eps is in units of that range, got values from {lowest:g} to "
        f"{highest:g}. They look like {looks_like}."
    )


def _named(attacks: Attacks) -> dict[str, Attack]:
    if callable(attacks):
        attacks = [attacks]
    if not is_iterable(attacks):
        raise ValueError(f"attacks must be an attack, or a list or dict of attacks, got attacks={attacks!r}.")
    named = list(attacks.items()) if isinstance(attacks, Mapping) else [(_text(attack), attack) for attack in attacks]
    names = [CLEAN, WORST, *(name for name, _ in named)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two rows have the name {name!r}; pass attacks as a dict with names of your own.")
    for name, attack in named:
        if not is_attack(attack):
            raise ValueError(
                f"attack {name} cannot be called as attack(model, x, y); modeconn.attacks.build makes attacks from "
                f"their names."
            )
        if getattr(attack, "norm", None) not in (None, *_ORDERS):
            raise ValueError(
                f"attack {name} must have one of the norms {', '.join(_ORDERS)}, got norm={attack.norm!r}."
            )
        if getattr(attack, "targeted", False):
            raise ValueError(
                f"attack {name} is targeted: led to the right classes, it would make the network better. "
                f"Measure with targeted=False."
            )
    return dict(named)


def _text(attack: Attack | None) -> str:
    """Tell one attack from another, in whatever process."""
    if inspect.isroutine(attack) or isinstance(attack, functools.partial):
        return identify(attack)
    return repr(attack)


def _facts(attack: Attack) -> dict[str, Any]:
    """Return what tells whether an attack is as strong as it should be, in plain values."""
    settings = getattr(attack, "settings", None)
    if settings is None and dataclasses.is_dataclass(attack):
        settings = {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack)}
    return {
        "settings": {name: _plain(value) for name, value in (settings or {}).items()},
        "kind": f"{type(attack).__name__} {getattr(attack, 'name', '')}".strip(),
        "eps": getattr(attack, "eps", None),
        "norm": getattr(attack, "norm", None),
        "black_box": getattr(attack, "black_box", False),
    }


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return identify(value) if inspect.isroutine(value) else repr(value)
