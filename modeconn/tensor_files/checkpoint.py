"""Files as networks of one architecture: which of its tensors they hold, and its groups of units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.network.sketch import sketch
from modeconn.network.weights import named_state
from modeconn.symmetry.discover import discover
from modeconn.symmetry.export import ExportError
from modeconn.symmetry.gains import Folding
from modeconn.symmetry.outputs import Selection
from modeconn.symmetry.relabelling import Relabelling
from modeconn.symmetry.spec import PermutationSpec
from modeconn.tensor_files.reading import Entry, TensorFiles, in_dtype, listed
from modeconn.tools.progress import bars

Factory = Callable[[], nn.Module] | type[nn.Module]
"""Makes a model of an architecture; its parameters are made one by one, and their values are not kept."""


@dataclass(frozen=True)
class Discovery:
    """What is known of the symmetries of an architecture, or how to find them.

    Args:
        spec: What `modeconn.discover` found before, None to discover it.
        example_input: What the model takes; default: ``model.example_input()``, where it has that method.
        outputs: Which outputs have to stay as they are.
        symmetries: The largest kind of group that is looked for.
        untie: Whether tied weights get a tensor for each of their names.
    """

    spec: PermutationSpec | None = None
    example_input: Any = None
    outputs: Selection = None
    symmetries: str = "permutation"
    untie: bool = False

    def of(self, model: nn.Module, progress: bool) -> PermutationSpec:
        """Return the groups of units of a model whose parameters need no values.

        Raises:
            ValueError: If a spec is of another model, or the model cannot be looked at.
        """
        if self.spec is not None:
            for name, default in (("outputs", None), ("symmetries", "permutation"), ("untie", False)):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}= is for discovery, and spec= was discovered. Pass it to modeconn.discover."
                    )
            self.spec.check_model(model)
            return self.spec
        how = {"outputs": self.outputs, "symmetries": self.symmetries, "untie": self.untie}
        try:
            return discover(model, self.example_input, **how, progress=progress)
        except ExportError as error:
            raise ExportError(f"{error} Such networks are aligned in memory, with modeconn.align.") from error


class Architecture:
    """Tensors of a model by name, without values, and which of its names are of one tensor.

    Args:
        model: Makes a model of it.

    Attributes:
        model: The model, its parameters on the meta device.
        shapes: Of all tensors that its state dict has.
        parameters: Names of parameters, tied ones once.

    Raises:
        ValueError: If the factory makes no model.
    """

    def __init__(self, model: Factory) -> None:
        self.model = sketch(model)
        if not isinstance(self.model, nn.Module):
            raise ValueError(f"model must be a function that returns a torch.nn.Module, got {self.model!r:.100} of it.")
        saved = {name for name, x in self.model.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}
        tensors = {name: x for name, x in named_state(self.model) if name in saved}
        names: dict[int, list[str]] = {}
        for name, tensor in tensors.items():
            names.setdefault(id(tensor), []).append(name)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.parameters = [name for name, _ in self.model.named_parameters()]
        self._names = {name: tuple(names[id(tensor)]) for name, tensor in tensors.items()}

    def names(self, name: str) -> tuple[str, ...]:
        """Return all names of a tensor."""
        return self._names[name]

    def compared(self, files: TensorFiles) -> Lacks:
        """Return what files lack of the model, or have in another way."""
        held = files.entries
        return Lacks(
            files,
            missing=tuple(name for name in self.shapes if not any(one in held for one in self._names[name])),
            unexpected=tuple(name for name in held if name not in self.shapes),
            mismatching={
                name: (held[name].shape, shape)
                for name, shape in self.shapes.items()
                if name in held and held[name].shape != shape
            },
        )

    def take_whole_numbers(self, files: TensorFiles) -> None:
        """Give the model the buffers of whole numbers that files hold: by them units may be read."""
        for name, buffer in list(self.model.named_buffers()):
            if name in files.entries and not (buffer.is_floating_point() or buffer.is_complex()):
                path, _, own = name.rpartition(".")
                self.model.get_submodule(path)._buffers[own] = files.read(name)


@dataclass(frozen=True)
class Lacks:
    """What files lack of a model, or have in another way.

    Args:
        files: Which.
        missing: Names of the model that they do not hold.
        unexpected: Names that the model does not have.
        mismatching: By name, the shape in the files and that in the model.
    """

    files: TensorFiles
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatching: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def is_nothing(self) -> bool:
        """Whether the files hold the model."""
        return not (self.missing or self.unexpected or self.mismatching)

    def told(self, limit: int | None = 10) -> Iterator[str]:
        """Yield in words what there is, of each kind ``limit`` names."""
        shapes = [f"{name} is {own} there and {made} in the model" for name, (own, made) in self.mismatching.items()]
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes)):
            if names:
                yield f"{len(names)} {what}: {listed(list(names), limit)}"

    def check(self) -> None:
        """Raise a ValueError unless there is nothing."""
        if not self.is_nothing:
            raise ValueError(
                f"{str(self.files.path)!r} does not hold the model that is asked for: {'; '.join(self.told())}. Name "
                f"the factory of this architecture, or take other files; modeconn.tensor_files.plan tells all, and "
                f"--dry-run on the command line."
            )


def opened(
    paths: Sequence[Any], model: Factory, discovery: Discovery, *, progress: bool = False
) -> tuple[list[Checkpoint], PermutationSpec]:
    """Return files as networks of the architecture that a factory makes, and its groups.

    Raises:
        ValueError: If files are damaged or of other models, or the model cannot be looked at.
        OSError: If a file is missing.
    """
    files = [TensorFiles(path) for path in paths]
    architecture = Architecture(model)
    for one in files:
        architecture.compared(one).check()
    architecture.take_whole_numbers(files[0])
    with bars(progress):
        spec = discovery.of(architecture.model, progress)
    return [Checkpoint(one, architecture, spec) for one in files], spec


class Checkpoint:
    """A network in files, of whose tensors one is in memory at a time.

    Args:
        files: The files.
        architecture: Its model.
        spec: Its groups.

    Attributes:
        files: The same.
        parameters: Names of the parameters that a relabelling moves apart from one another.

    Raises:
        ValueError: If the files hold other positions than the spec was found with, or two tensors where the model has
            one; or gains cannot be folded.
    """

    def __init__(self, files: TensorFiles, architecture: Architecture, spec: PermutationSpec) -> None:
        self.files = files
        self._architecture = architecture
        self._spec = spec
        spec.check_positions({name: files.read(name) for name in spec.positions if name in files.entries})
        if not spec.untied:
            self._check_ties()
        known_parameters = {other for name in architecture.parameters for other in architecture.names(name)}
        names = filter(known_parameters.__contains__, spec.state)
        self.parameters = [name for name in names if spec.untied or name == architecture.names(name)[0]]
        known = {name: architecture.shapes[name] for name in spec.state}
        self._folding = Folding(self.given, known, spec.folds) if spec.folds else None

    def _check_ties(self) -> None:
        """Raise a ValueError if names of one tensor have different values."""
        for name in self._architecture.shapes:
            first, *others = [one for one in self._architecture.names(name) if one in self.files.entries]
            if name != first:
                continue
            for other in others:
                if not torch.equal(self.files.read(first), self.files.read(other)):
                    raise ValueError(
                        f"{str(self.files.path)!r} holds two tensors, {first!r} and {other!r}, that are one in the "
                        f"model. Pass untie=True, or a factory of a model in which they are two."
                    )

    @property
    def model(self) -> nn.Module:
        """The model, its parameters without values."""
        return self._architecture.model

    def loaded(self, model: nn.Module) -> nn.Module:
        """Return a model with the values that the files hold, as they are."""
        tensors = {name: x for name, x in named_state(model) if name in self._architecture.shapes}
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(self.given(name))
        return model

    @property
    def is_untied(self) -> bool:
        """Whether tied weights have a tensor for each of their names."""
        return self._spec.untied

    def given(self, name: str) -> Tensor:
        """Read a tensor as it is: under its own name, else under another one that it has in the model."""
        names = (name, *self._architecture.names(name))
        return self.files.read(next(one for one in names if one in self.files.entries))

    def weight(self, name: str) -> Tensor:
        """Read a tensor of the network whose gains are folded, where the groups are of such networks."""
        if self._folding is None:
            return self.given(name)
        first = name if self._spec.untied else self._architecture.names(name)[0]
        return self._folding.apply(first, self.given(name))

    @property
    def precision(self) -> torch.dtype:
        """The least precision, at least single, that holds all parameters.

        Raises:
            ValueError: If some are no real numbers.
        """
        found = torch.float32
        for name in self.parameters:
            dtype = self._dtype(name)
            if not dtype.is_floating_point:
                raise ValueError(
                    f"{str(self.files.path)!r} holds {name!r} in {str(dtype).removeprefix('torch.')}. Networks are "
                    f"aligned by weights of floating point."
                )
            found = torch.promote_types(found, dtype) if dtype.itemsize > 1 else found
        return found

    @property
    def eps(self) -> float:
        """The distance from one to the next larger number in the coarsest precision of parameters."""
        dtypes = {self._dtype(name) for name in self.parameters}
        return max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)

    def _dtype(self, name: str) -> torch.dtype:
        held, names = self.files.entries, (name, *self._architecture.names(name))
        return next(held[one].dtype for one in names if one in held)

    def entries(self, dtype: torch.dtype | None = None) -> dict[str, Entry]:
        """Return what is written of the network: the names of the files and, untied, also those that they leave out.

        Args:
            dtype: Of all tensors of floating point; default: that which they have.
        """
        found = dict(self.files.entries)
        if self._spec.untied:
            for name in self._architecture.shapes:
                if name not in found:
                    found[name] = next(found[one] for one in self._architecture.names(name) if one in found)
        return in_dtype(found, dtype)

    def relabelled(self, name: str, relabelling: Relabelling | None) -> Tensor:
        """Read a tensor of the network relabelled; without a relabelling, of the folded one."""
        tensor = self.weight(name)
        first = name if self._spec.untied else self._architecture.names(name)[0]
        if relabelling is None or first not in self._spec.state:
            return tensor
        if any(self.turned_dims(name)):
            tensor = tensor.double()  # to be rounded once, when it is written
        return relabelling.relabel({first: tensor})[first]

    def turned_dims(self, name: str) -> list[bool]:
        """Return for each dimension of a tensor whether some group rotates units along it."""
        first = name if self._spec.untied else self._architecture.names(name)[0]
        turning = {group.atom for group in self._spec.groups if group.rotates}
        axes = self._spec.state.get(first)
        if axes is None:
            return [False] * len(self._architecture.shapes[name])
        return [bool(self._spec.structure.moving_atoms(axis) & turning) for axis in axes]

    def is_rounded(self, name: str) -> bool:
        """Whether a tensor is computed with, and not moved as it is."""
        first = name if self._spec.untied else self._architecture.names(name)[0]
        return any(self.turned_dims(name)) or any(first in fold.names for fold in self._spec.folds)


def as_pair(a: Checkpoint, b: Checkpoint) -> dict[str, Any]:
    """Return two networks as `modeconn.WeightMatching.match_weights` takes them.

    Raises:
        ValueError: If some parameters are no real numbers.
    """
    read_a, read_b = in_one_precision(a, b)
    return {"a": read_a, "b": read_b, "eps": max(a.eps, b.eps)}


def in_one_precision(*networks: Checkpoint) -> list[Callable[[str], Tensor]]:
    """Return what reads the parameters of networks, all in the same precision.

    Raises:
        ValueError: If some are no real numbers.
    """
    dtype = reduce(torch.promote_types, [network.precision for network in networks])
    return [partial(_read_as, network, dtype) for network in networks]


def _read_as(network: Checkpoint, dtype: torch.dtype, name: str) -> Tensor:
    return network.weight(name).to(dtype)
