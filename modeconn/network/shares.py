"""Which batches each of several processes reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from torch.utils.data.distributed import DistributedSampler

from modeconn.network.batches import checksum, described, first_batch, in_order, tensors_of
from modeconn.tools.fingerprint import digest
from modeconn.tools.processes import Processes, number_in_group


@runtime_checkable
class Shareable(Protocol):
    """A loader that knows what each of several processes reads of it, as `modeconn.data.TensorLoader` does."""

    def share(self, number: int, count: int) -> Iterable[Any]:
        """Return the batches of process ``number`` of ``count``; together they read every example once."""
        ...


def sampler_of(loader: Any) -> DistributedSampler | None:
    """Return the sampler of a DataLoader that gives each process examples of its own."""
    found = getattr(loader, "sampler", None)
    return found if isinstance(found, DistributedSampler) else None


def is_shared_out(loader: Any, *, sharded: bool = False) -> bool:
    """Whether a loader yields a part of the data in each process by itself."""
    return sharded or sampler_of(loader) is not None


def share_of(loader: Any, them: Processes, *, sharded: bool, name: str = "loader") -> Any:
    """Return what this process is to read of a loader.

    Args:
        loader: Any re-iterable of batches.
        them: The processes.
        sharded: Whether its user says that it yields other examples in each process.
        name: What an error message calls it.

    Raises:
        ValueError: If all processes would read the same batches, or there are more processes than batches.
    """
    if them.size == 1:
        return loader
    sampler = sampler_of(loader)
    if sampler is not None:
        if (sampler.num_replicas, sampler.rank) != (them.size, them.rank):
            raise ValueError(
                f"the DistributedSampler of {name} is for process {sampler.rank} of {sampler.num_replicas}, and this "
                f"is {them.rank} of {them.size}. Make it without num_replicas= and rank=, which it takes from the "
                f"group."
            )
    elif not sharded:
        if not isinstance(loader, Shareable):
            raise ValueError(
                f"{name} would yield the same batches in each of {them.size} processes. Give the DataLoader a "
                f"torch.utils.data.DistributedSampler, or pass sharded=True if each process has a loader of its own "
                f"share."
            )
        loader = loader.share(them.rank, them.size)
    count = _length(loader)
    if count == 0:
        raise ValueError(
            f"there are {them.size} processes and fewer batches in an epoch, so process {them.rank} has none. Start "
            f"fewer, or make batches smaller."
        )
    return loader


def check_whole(loader: Any, *, sharded: bool = False, name: str = "loader") -> None:
    """Raise a ValueError if processes that share a call would each measure on other data."""
    count = number_in_group()
    if count > 1 and is_shared_out(loader, sharded=sharded):
        raise ValueError(
            f"{name} yields other examples in each of {count} processes, and here all of them need the same data. Pass "
            f"{name}= a loader of all of it, without a DistributedSampler."
        )


def begin_epoch(loader: Any, epoch: int) -> None:
    """Tell a DistributedSampler which epoch begins, which its order depends on."""
    sampler = sampler_of(loader)
    if sampler is not None:
        sampler.set_epoch(epoch)


def numbered_passes(loader: Any) -> Any:
    """Return a loader whose passes are epochs to its DistributedSampler, if it has one."""
    return loader if sampler_of(loader) is None else _Numbered(loader)


class _Numbered:
    def __init__(self, loader: Any) -> None:
        self._loader, self._epoch = loader, 0

    def __iter__(self) -> Iterator[Any]:
        begin_epoch(self._loader, self._epoch)
        self._epoch += 1
        return iter(self._loader)


def facts_of(loader: Any, *, sharded: bool = False, name: str = "loader", is_measured: bool = False) -> dict[str, Any]:
    """Return what has to be the same in all processes of a loader: of one that each reads a share of, all of it."""
    if loader is None:
        return {}
    if is_shared_out(loader, sharded=sharded):
        return {f"the first batch of {name}": _kind(first_batch(loader))}
    if callable(whole := getattr(loader, "digest", None)):
        return {f"the digest of {name}": whole()}
    if is_measured:  # all of it, since each process takes other points of it
        return {f"the digest of {name}": digest(tensor for batch in loader for tensor in tensors_of(batch))}
    first = first_batch(in_order(loader))  # which draws nothing
    return {f"the first batch of {name}": f"{described(first)}, CRC-32 {checksum(first):08x}"}


def _kind(batch: Any) -> str:
    """Return the dtypes of a batch, whose sizes may differ between processes."""
    return described(batch).split(" ")[0]


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None
