"""Deep-Align: settings, the call that fits, the method that aligns, the file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from math import inf, isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modeconn.deep_align.augmentation import WeightAugmentation
from modeconn.deep_align.encoder import Encoder
from modeconn.deep_align.settings import Settings
from modeconn.deep_align.training import EncoderTraining, PopulationNetwork
from modeconn.deep_align.unit_graph import Entry, UnitGraph, difference, layout_of, spec_difference
from modeconn.learning.checkpoint import ALIGNER, Checkpoint, run_file
from modeconn.matching import Match, match_groups
from modeconn.matching.alignment import Symmetry, find_spec
from modeconn.matching.method import check_permutes
from modeconn.network.batches import first_batch, inputs_of
from modeconn.network.loss import LossFn, cross_entropy
from modeconn.network.shares import facts_of
from modeconn.network.weights import WeightSpace
from modeconn.symmetry.outputs import Selection
from modeconn.symmetry.spec import PermutationSpec
from modeconn.tools import files, provenance
from modeconn.tools.door import checked, shortened
from modeconn.tools.fingerprint import digest, identify
from modeconn.tools.processes import joined, shared
from modeconn.tools.rng import preserved, seeded
from modeconn.tools.warn import warn

_FORMAT = 3
_KIND = "deep align"
_ENOUGH = 20  # from this many networks on, a tenth is held out for validation


@dataclass(frozen=True, eq=False)
class Fitted:
    """What a fit leaves.

    Args:
        encoder: The network that reads networks.
        history: By loss, its value at every step; 0 where its weight is 0.
        validation: ``(step, value)``: the loss in the middle between relabelled validation networks, infinite where it
            is not finite; without ``connectivity`` the squared distance of their parameters, as a share of that before.
    """

    encoder: Encoder
    history: dict[str, list[float]]
    validation: list[tuple[int, float]]

    def __repr__(self) -> str:
        """Two that align differently are written differently: the text stands for all that they compute with."""
        count = sum(p.numel() for p in self.encoder.parameters())
        return f"Fitted({count:,} weights, {digest(self.encoder)})"


@dataclass(frozen=True)
class DeepAlign(Settings):
    r"""Learn to align from a population of networks; then read two of them and say how to relabel the second.

    A Siamese, equivariant `Encoder` turns the weights of a network into one feature vector :math:`f_i` of unit length
    for each unit. The similarity of unit i of a and unit j of b is :math:`s^2 \langle f_i, f'_j \rangle`, the soft
    permutation of training `sinkhorn` of it, the permutation in use its best assignment. By construction, relabelling
    the networks relabels the answer, exchanging them inverts it, and a relabelled copy is recovered.

    Training minimises a sum of three losses, all on pairs of different networks drawn anew in each step: to find
    the units of a network among those of a relabelled, augmented copy (``supervised``, a cross entropy); the squared
    distance between a and the softly relabelled b, in units of that between two networks as they are (``alignment``);
    and the loss of the network at a random point of the line between them (``connectivity``).

    It pays where many pairs of one architecture are to be aligned: the fit takes minutes to hours, aligning a pair as
    long as a look at its weights. Networks it was not fitted for are not aligned: their groups must be those of the
    population, and what it learned is for networks that were trained in the same way. Units in blocks (heads, the
    channels of ``nn.GroupNorm``) are refused. So are recurrent cells (``nn.RNN``, ``nn.GRU``, ``nn.LSTM``), which
    cannot be run many at once, unless ``connectivity`` is 0, with which networks are not run. (MLP 64-32-32-32-10 on
    digits, 1,000 networks: a fit of 87 to 115 s on one core leaves a barrier of 0.034 on other pairs, activation
    matching 0.067, weight matching 0.078.)

    Args:
        features: Channels of a unit; a multiple of ``edge_features``.
        edge_features: Channels of the edge between two units.
        depth: Number of blocks.
        scale: ``s`` at the beginning.
        num_steps: Training steps; 0 leaves the encoder untrained, for comparison.
        batch_size: Pairs of networks in a step.
        learning_rate: AdamW's highest, of a one-cycle schedule.
        weight_decay: AdamW's.
        supervised: Weight of that loss, 0 or more.
        alignment: Weight of that loss, 0 or more.
        connectivity: Weight of that loss, 0 or more; if 0, no data is needed, and recurrent cells are allowed.
        augmentation: How the copies of the supervised loss differ from their originals.
        num_validation_pairs: How many fixed pairs choose the best state.
        validate_every: After so many steps.
        seed: Of initial weights, pairs, copies, points on the line and the order of data.
        fitted: What `fit` or `load` fills in.

    Raises:
        ValueError: If a setting is out of range.

    References:
        Navon et al., 2023, https://arxiv.org/abs/2310.13397

    Example:
        >>> from modeconn import align, data, models
        >>> train, _ = data.load("digits")
        >>> networks = [models.mlp(64, (8,), 10, seed=seed) for seed in range(4)]
        >>> aligner = DeepAlign(features=8, depth=1, num_steps=2).fit(networks, train)
        >>> align(networks[0], networks[0], method=aligner).permutation.num_moved
        0
    """

    made_by: ClassVar[Mapping[str, Any] | None] = None

    fitted: Fitted | None = field(default=None, compare=False)

    @shared
    @checked
    def fit(
        self,
        population: Iterable[nn.Module],
        loader: Iterable[Any] | None = None,
        *,
        validation: Iterable[nn.Module] | None = None,
        loss_fn: LossFn = cross_entropy,
        spec: PermutationSpec | None = None,
        example_input: Any = None,
        outputs: Selection = None,
        checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
        sharded: bool = False,
        progress: bool = False,
    ) -> DeepAlign:
        """Return a fitted copy of these settings; networks and global random state stay as they are.

        The weights of all networks are held together, on their device and in their dtype, which the encoder shares.
        Networks that hold NaN or infinite weights are left out, with a warning that counts them.

        Where several processes are an initialised group of `torch.distributed`, all must make this call, with the same
        networks: each step takes ``batch_size`` pairs in each of them.

        Args:
            population: Two or more networks of one architecture, of any origin; `models.train_population` makes many.
            loader: Training data ``(inputs, targets)`` for the loss on the line, which also chooses the best state; not
                needed if ``connectivity`` is 0: then the nearest parameters choose it, and networks are not run.
            validation: Other networks, for choosing the best state. Default: a tenth of a population of 20 or more,
                drawn with the seed; a smaller one's own networks.
            loss_fn: ``loss_fn(outputs, targets)``, a mean over examples, of what `torch.func.vmap` knows; so must the
                networks be, which excludes ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM``, unless ``connectivity`` is 0.
            spec: What `discover` found for this architecture. Default: it is discovered and proved here.
            example_input: For discovery, and to check rescaling; default the first inputs of the loader.
            outputs: Which of the model's outputs have to stay as they are, see `modeconn.discover`; default all of
                them.
            checkpoint: A file to which the run saves itself as it validates, after every ``validate_every`` steps. If
                it exists, the run goes on from it and ends with the same bits as one that was never interrupted, on
                the same machine and versions.
            sharded: Of several processes: whether ``loader`` yields other examples in each of them, see
                `modeconn.fit_curve`.
            progress: Whether to show a progress bar.

        Raises:
            ValueError: If there are not two networks, or not half of them finite; one differs from the first, in which
                tensor or group; they are in float16; data is missing; units lie in blocks, such as heads; a layer
                cannot be run for many networks at once; or rescaling does not fit. The same if the checkpoint belongs
                to another run.
            OSError: If the checkpoint cannot be written.
            FloatingPointError: If the loss became infinite or NaN, or never was finite between validation networks.
        """
        models = _at_least_two(population, "population")
        if loader is None and self.connectivity:
            raise ValueError(
                f"DeepAlign(connectivity={self.connectivity}) learns through the task's loss, so it needs data: pass "
                f"loader=, or use DeepAlign(connectivity=0)."
            )
        others = None if validation is None else _at_least_two(validation, "validation")
        space = WeightSpace(models[0])
        if space.dtype is torch.float16:
            raise ValueError(
                "the networks are in torch.float16, in which an encoder cannot be trained: convert them with "
                "model.float() or model.bfloat16()."
            )
        with seeded(self.seed, space.device):
            first = None if loader is None else first_batch(loader)
            example = inputs_of(first) if example_input is None and first is not None else example_input
            spec = find_spec(models[0], None, Symmetry(spec, example, outputs))
            graph = UnitGraph(spec, layout_of(models[0]), space.device)
            states = _read(graph, models, "population", space.dtype)
            if others is not None:
                held_out = _read(graph, others, "validation", space.dtype)
            elif len(states) >= _ENOUGH:
                order = torch.randperm(len(states))
                held_out, states = (states[part] for part in order.tensor_split([len(states) // 10]))
            else:
                held_out = states
            encoder = Encoder(graph, self.features, self.edge_features, self.depth, self.scale)
            encoder = encoder.to(device=states.device, dtype=states.dtype)
            encoder.standardise(states)
            network = PopulationNetwork(models[0], loss_fn)
            about = partial(self._identified, loss_fn, spec, states, held_out)
            if (them := joined()).size > 1:
                them.agree({**about(), **facts_of(loader, sharded=sharded), **dict(provenance.versions())})
            training = EncoderTraining(self, encoder, network, states, held_out, loader, example, sharded=sharded)
            with run_file(checkpoint, about, space.device, ALIGNER, loader, sharded=sharded) as file:
                training.run(file, progress=progress)
        fitted = Fitted(encoder.requires_grad_(False), training.history, training.validations)
        return replace(self, fitted=fitted)

    def _identified(self, loss_fn: LossFn, spec: PermutationSpec, states: Tensor, held_out: Tensor) -> dict[str, Any]:
        """Return what makes a run what it is, as texts under the names its caller knows."""
        settings = {name: identify(getattr(self, name)) for name in (field.name for field in fields(Settings))}
        networks = {
            "the digest of the population": digest([states]),
            "the digest of the validation networks": digest([held_out]),
        }
        return {**settings, "loss_fn": identify(loss_fn), "spec": identify(spec), **networks}

    def match(
        self, spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, loader: Iterable[Any] | None = None
    ) -> Match:
        """Return the relabelling of b; ``loader`` is not read.

        Raises:
            ValueError: If the aligner is not fitted, or was fitted on networks of other groups or tensors: which, and
                their sizes.
        """
        check_permutes(spec, self)
        found = spec_difference(self._encoder.graph.spec, {group.name: group.size for group in spec.groups})
        if found:
            raise ValueError(f"this DeepAlign was fitted on other networks: {found}. Fit one on networks like these.")
        similarities = self.similarities(model_a, model_b)
        return Match(match_groups(spec, similarities))

    @torch.no_grad()
    def similarities(self, model_a: nn.Module, model_b: nn.Module) -> dict[str, Tensor]:
        """Return how alike units of a (rows) and b (columns) are, ``(n, n)`` in ``[-s^2, s^2]``, by group.

        Raises:
            ValueError: As `match` does.
        """
        encoder = self._encoder
        for end, model in (("a", model_a), ("b", model_b)):
            found = difference(encoder.graph, model)
            if found:
                raise ValueError(
                    f"{end} is of another architecture than this DeepAlign was fitted on: {shortened(found)}."
                )
        states = encoder.graph.read([model_a, model_b], encoder.mean.dtype)
        a, b = zip(*(x.split(1) for x in encoder(states)), strict=True)
        groups = encoder.graph.spec.groups
        return {group.name: x[0] for group, x in zip(groups, encoder.similarities(a, b), strict=True)}

    @property
    def _encoder(self) -> Encoder:
        if self.fitted is None:
            raise ValueError("this DeepAlign is not fitted: call .fit(population, loader), or DeepAlign.load(path).")
        return self.fitted.encoder

    @checked
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted aligner to a safetensors file, all or nothing.

        Raises:
            ValueError: If it is not fitted.
        """
        graph = self._encoder.graph
        about = {
            "format": _FORMAT,
            "settings": asdict(replace(self, fitted=None)),
            "spec": graph.spec.to_json(),
            "layout": graph.layout,
            "history": self.fitted.history,
            "validation": [(step, value if isfinite(value) else None) for step, value in self.fitted.validation],
            **provenance.entry(self),
        }
        files.write(path, _KIND, self._encoder.state_dict(), about)

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> DeepAlign:
        """Read what `save` wrote, with the same bits.

        Raises:
            ValueError: If the file is no aligner of modeconn, or of another version's format.
        """
        with files.opened(path, _KIND) as (tensors, about):
            if about["format"] != _FORMAT:
                kept = f"{about['format']!r:.60}"
                raise ValueError(
                    f"{os.fspath(path)!r} has format {kept}; this version of modeconn reads {_FORMAT}. Fit the aligner "
                    f"anew, or use the version that wrote it."
                )
            settings = about["settings"]
            aligner = cls(**{**settings, "augmentation": WeightAugmentation(**settings["augmentation"])})
            largest = max(aligner.features, aligner.edge_features, aligner.depth)
            if largest > sum(tensor.numel() for tensor in tensors.values()):
                raise ValueError("it does not hold the encoder of its settings. Write it again, or take a copy.")
            layout = {name: Entry.restored(*entry) for name, entry in about["layout"].items()}
            graph = UnitGraph(PermutationSpec.from_json(about["spec"]), layout, device)
            with preserved():  # the encoder draws initial weights, which are replaced below
                encoder = Encoder(graph, aligner.features, aligner.edge_features, aligner.depth, aligner.scale)
            encoder = encoder.to(device=device, dtype=tensors["scale"].dtype).requires_grad_(False)
            encoder.load_state_dict(tensors)
            validation = [(step, inf if value is None else value) for step, value in about["validation"]]
            found = replace(aligner, fitted=Fitted(encoder, about["history"], validation))
        provenance.keep(found, about.get(provenance.ATTRIBUTE))
        return found


def _at_least_two(models: Iterable[nn.Module], what: str) -> list[nn.Module]:
    found = list(models)
    if len(found) < 2:
        raise ValueError(f"{what} must hold at least two networks to be aligned, got {len(found)}.")
    return found


def _read(graph: UnitGraph, models: Sequence[nn.Module], what: str, dtype: torch.dtype) -> Tensor:
    """Return the states of the networks that are finite, but for what is the same in all of them and of no unit."""
    for number, model in enumerate(models):
        found = difference(graph, model)
        if found:
            raise ValueError(f"{what}[{number}] is of another architecture than population[0]: {shortened(found)}.")
    states = graph.read(models, dtype)
    constant = torch.zeros_like(graph.is_buffer)
    constant[graph.fixed] = (states[:, graph.fixed] == states[0, graph.fixed]).all(0)
    finite = (states.isfinite() | constant).all(1)
    lost, total = int((~finite).sum()), len(models)
    if lost > total / 2 or total - lost < 2:
        raise ValueError(
            f"{what} must hold two or more networks, most of them finite, but {lost} of its {total} hold NaN or "
            f"infinite weights."
        )
    if lost:
        warn(f"{lost} of the {total} networks in {what} hold NaN or infinite weights and are left out.")
    return states[finite]
