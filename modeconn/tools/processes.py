"""Several processes that share one call: each does its part, and all get the result, or all end with one error.

`torch.distributed` carries what they tell each other. All that they exchange begins with a header of one form, and a
process that fails sends its error in place of it: so the others hear of it wherever they are, and nobody waits.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pickle
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_PATIENCE = timedelta(minutes=5)
"""How long processes wait for the last of them to come to a call; they may have loaded data before it."""

_MOMENT = 0.5
"""Seconds that a process that was a member of a group stays at its end."""

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_WAY_OUT = (
    "Call it in every process with the same arguments, or `with modeconn.alone():` in those that are to work by "
    "themselves."
)

_NUMBERS = 6
"""How many numbers an exchange carries."""

_PLAIN, _OBJECT, _OF_FIRST, _FAILED, _HEARD = range(5)
"""Kinds of messages; of a process that failed, and of one that fails because it was told of another."""

_HEADER = 3
"""How many numbers a message has before those it carries."""

_LONG = timedelta(days=30)
"""For how long processes wait for one that is alive: what it does alone, such as an alignment, may take long."""


class OtherProcessError(Exception):
    """Another process failed or ended, so this one cannot go on.

    It is no RuntimeError, of which some are taken for errors of models and files.
    """


class Processes:
    """The processes that share the work of a call; this one is number ``rank`` of ``size``.

    Args:
        rank: Which one this is, from 0.
        size: How many there are.
        control: The group in which they exchange messages, over gloo; None if there is one process.
        meeting: The group in which they wait for each other, not as long.
    """

    def __init__(self, rank: int = 0, size: int = 1, control: Any = None, meeting: Any = None) -> None:
        self.rank, self.size, self._control, self._meeting = rank, size, control, meeting
        self._over: str | None = None  # why the call at work has failed, once that is known to all
        self._num_exchanged = 0
        self.verbs: list[str] = []  # that are at work, each inside of the one before
        self.speaker: int | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this is the process that reports an error: the first of those that had one."""
        return self.rank == (self.speaker or 0)

    def says_what_was_lost(self) -> bool:
        """Whether this process reports that another one is gone: the first of those left that asks."""
        try:
            store = dist.distributed_c10d._get_default_store()
            return store.add("modeconn: who says that a process is gone", 1) == 1
        except Exception:  # the first process held the store, and is the one that is gone
            return self.rank == 1

    def each(self, work: Callable[[], T]) -> list[T]:
        """Do ``work`` in every process; return what each of them returned, in their order, in all.

        Results are pickled, and reach every process: keep them small, and their tensors on the CPU.

        Raises:
            OtherProcessError: If another one failed; the one that did raises what ``work`` raised.
        """
        if self.size == 1:
            return [work()]
        with self._failing_is_told():
            mine = pickle.dumps(work())
        with _uninterrupted():
            lengths = self._headers(_OBJECT, len(mine))[:, 1]
            parts = self._padded(lengths, mine)
        return [pickle.loads(part) for part in parts]

    def first(self, work: Callable[[], T]) -> T:
        """Do ``work`` in the first process alone; return what it returned in all of them.

        Raises:
            OtherProcessError: If another one failed; the first one raises what ``work`` raised.
        """
        if self.size == 1:
            return work()
        with self._failing_is_told(), alone():
            mine = pickle.dumps(work()) if self.is_first else b""
        with _uninterrupted():
            size = int(self._headers(_OF_FIRST, len(mine))[0, 1])
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
            if self.is_first:
                buffer.copy_(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
            with self._lost_is_told():
                dist.broadcast(buffer, src=0, group=self._control)
        return pickle.loads(buffer.numpy().tobytes())

    def numbers(
        self, work: Callable[[], Sequence[float]], summed: Callable[[Tensor], Tensor | None] | None = None
    ) -> Tensor:
        """Do ``work`` in every process, which returns up to `_NUMBERS` numbers; return those of all.

        It is a single message, fit for every step of a run.

        Args:
            work: What may fail.
            summed: Given the numbers of all, returns a contiguous tensor to be replaced by the sum of those of all
                processes, the same bits in each; or None, in all of them alike.

        Returns:
            float64 ``(size, _NUMBERS)`` on the CPU.
        """
        if self.size == 1:
            found = torch.tensor([_filled(work())], dtype=torch.float64, device="cpu")
            if summed is not None:
                summed(found)
            return found
        with self._failing_is_told():
            mine = work()
        with _uninterrupted():
            found = self._headers(_PLAIN, 0, mine)[:, _HEADER:]
            tensor = None if summed is None else summed(found)
            if tensor is not None:
                self._add(tensor)
        return found

    def sum(self, work: Callable[[], Tensor]) -> Tensor:
        """Do ``work`` in every process, which returns a tensor; return the sum of all, the same bits in each.

        The sum takes the place of the tensor.
        """
        if self.size == 1:
            return work()
        with self._failing_is_told():
            mine = work().contiguous()
        with _uninterrupted():
            self._headers(_PLAIN, 0)
            self._add(mine)
        return mine

    def _add(self, tensor: Tensor) -> None:
        with self._lost_is_told():
            dist.all_reduce(tensor, group=self._control if tensor.device.type == "cpu" else None)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise in all processes unless they state the same facts.

        Raises:
            ValueError: Naming the first fact that differs, and both values.
        """
        of_all = self.each(lambda: {name: str(value) for name, value in facts.items()})
        for rank, theirs in enumerate(of_all[1:], 1):
            for name in [*of_all[0], *theirs]:
                if of_all[0].get(name) != theirs.get(name):
                    raise ValueError(
                        f"processes differ: {name} is {_short(of_all[0].get(name))} in process 0 and "
                        f"{_short(theirs.get(name))} in process {rank}. Start all with the same arguments, versions "
                        f"and data."
                    )

    def mine(self, items: Any) -> Any:
        """Return the part of a sequence that this process works on: every ``size``-th item from ``rank`` on."""
        return items[self.rank :: self.size]

    def in_order(self, parts: list[list[T]]) -> list[T]:
        """Return the items that `mine` distributed in their order, from what each process made of its part."""
        count = sum(map(len, parts))
        return [parts[place % self.size][place // self.size] for place in range(count)]

    def tell(self, error: BaseException) -> None:
        """Tell the others of an error, once, in place of what they wait for."""
        if self.size == 1 or self._over is not None:
            return
        said, kind = _said(error), _HEARD if isinstance(error, OtherProcessError) else _FAILED
        with contextlib.suppress(OtherProcessError), _uninterrupted():  # it says that others failed too, or are gone
            self._headers(kind, len(said) if kind == _FAILED else 0, said=said)

    @contextmanager
    def _failing_is_told(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.tell(error)
            raise

    def _headers(self, kind: int, length: int, numbers: Sequence[float] = (), *, said: bytes = b"") -> Tensor:
        """Exchange what every message begins with: kind, length of what follows, where we are, and a few numbers.

        So a process that fails is heard whatever the others wait for, and no answers to different questions meet.
        """
        if self._over is not None:
            raise OtherProcessError(self._over)
        self._num_exchanged += 1
        place = zlib.crc32(repr((self.verbs, self._num_exchanged)).encode())
        mine = torch.tensor([kind, length, place, *_filled(numbers)], dtype=torch.float64, device="cpu")
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self._lost_is_told():
            dist.all_gather(found, mine, group=self._control)
        headers = torch.stack(found)
        kinds = headers[:, 0].tolist()
        if _FAILED in kinds:
            self.speaker = kinds.index(_FAILED)
            lengths = torch.where(headers[:, 0] == _FAILED, headers[:, 1], 0)
            why = self._padded(lengths, said if kind == _FAILED else b"")[self.speaker].decode()
            self._end(f"process {self.speaker} of {self.size} failed: {why}")
        if _HEARD in kinds:
            self._end("another process of the group failed.")
        if len(set(kinds)) > 1 or len(set(headers[:, 2].tolist())) > 1:
            self._end(f"the processes are at different places of their work. {_WAY_OUT}")
        return headers

    def _end(self, why: str) -> NoReturn:
        """Let the call at work be over in this process, as it is in all others."""
        self._over = why
        raise OtherProcessError(why)

    def _padded(self, lengths: Tensor, mine: bytes) -> list[bytes]:
        """Exchange bytes of these lengths."""
        buffer = torch.zeros(int(lengths.max()), dtype=torch.uint8, device="cpu")
        buffer[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if mine else 0
        found = [torch.empty_like(buffer) for _ in range(self.size)]
        with self._lost_is_told():
            dist.all_gather(found, buffer, group=self._control)
        return [part[: int(length)].numpy().tobytes() for part, length in zip(found, lengths, strict=True)]

    @contextmanager
    def _lost_is_told(self) -> Iterator[None]:
        """Turn what torch raises when a process of the group is gone into one sentence."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._over = (
                "another process of the group ended, or its connection was lost, while this one waited for its part."
            )
            if "imed out" in str(error):
                self._over = "this process waited for the others longer than the timeout of the group allows."
            raise OtherProcessError(self._over) from error

    def _begin(self) -> None:
        """Wait for all processes to come to the call."""
        self._over = self.speaker = None
        self._num_exchanged = 0
        with _all_come():
            dist.monitored_barrier(group=self._meeting, timeout=_PATIENCE, wait_all_ranks=True)


@contextmanager
def _all_come() -> Iterator[None]:
    """Turn what torch raises when not all processes come to a call into one sentence."""
    try:
        yield
    except RuntimeError as error:
        raise OtherProcessError(
            f"not all {dist.get_world_size()} processes of the group came to this call within "
            f"{_PATIENCE.seconds // 60} minutes, or one of them has ended. {_WAY_OUT}"
        ) from error


_ONE = Processes()
_group: list[tuple[Any, Processes]] = []
_joined: ContextVar[Processes | None] = ContextVar("the processes that share the call at work", default=None)
_first_writes: ContextVar[bool] = ContextVar("whether only the first process writes files", default=False)
_is_alone: ContextVar[bool] = ContextVar("whether this process works by itself", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work by itself in the block, whatever group of processes it belongs to.

    Without it, `modeconn.fit_curve`, `modeconn.compare` and the other verbs share their work among the processes of an
    initialised group of `torch.distributed`, all of which must call them.
    """
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


@contextmanager
def together(verb: str = "") -> Iterator[Processes]:
    """Give the processes that share the work of the block: all come to it, and all leave it, or fail.

    Inside of another such block, its processes; this process alone where `alone` says so, or there is no group.

    Args:
        verb: What the block does, which has to be the same in all processes.

    Raises:
        RuntimeError: If a launcher started several processes, and none of them made a group.
        OtherProcessError: If not all come to the block, or another one fails in it.
    """
    if _is_alone.get():
        yield _ONE
        return
    if (outer := _joined.get()) is not None:
        outer.verbs.append(verb)
        try:
            yield outer
        finally:
            outer.verbs.pop()
        return
    them = _current()
    if them.size == 1:
        yield them
        return
    them._begin()
    them.verbs[:] = [verb]
    token = _joined.set(them)
    try:
        yield them
    except BaseException as error:
        them.tell(error)
        raise
    else:
        them.each(lambda: None)
    finally:
        _joined.reset(token)


def shared(function: F) -> F:
    """Let the processes of the group share the work of a public function, see `together`."""

    @functools.wraps(function)
    def among_all(*args: Any, **kwargs: Any) -> Any:
        with together(function.__qualname__):
            return function(*args, **kwargs)

    return among_all  # type: ignore[return-value]


def number_in_group() -> int:
    """Return how many processes the initialised group has; 1 where `alone` says so, or there is none."""
    has_group = dist.is_available() and dist.is_initialized() and not _is_alone.get()
    return dist.get_world_size() if has_group else 1


def wait_for_all(seconds: float) -> None:
    """Wait until all processes of the group come here, or one of them has ended, or for so many seconds."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        with contextlib.suppress(RuntimeError):
            dist.monitored_barrier(group=_current()._meeting, timeout=timedelta(seconds=seconds))


@contextmanager
def one_writes() -> Iterator[None]:
    """Let only the first of the processes that share the call at work write files in the block."""
    token = _first_writes.set(True)
    try:
        yield
    finally:
        _first_writes.reset(token)


def writes() -> bool:
    """Whether this process writes files: where a command line is shared, the first alone."""
    them = _joined.get()
    return not _first_writes.get() or them is None or them.is_first


def joined() -> Processes:
    """Return the processes that share the call at work; this one alone where there are no others."""
    return (None if _is_alone.get() else _joined.get()) or _ONE


def _current() -> Processes:
    """Return the processes of the initialised group."""
    if not (dist.is_available() and dist.is_initialized()):
        if is_launched():
            raise RuntimeError(
                f"a launcher started {os.environ['WORLD_SIZE']} processes, of which this is number "
                f"{os.environ.get('RANK')}, but they are no group yet: call "
                f"torch.distributed.init_process_group('gloo') first, or `with modeconn.alone():` where each is to "
                f"work by itself."
            )
        return _ONE
    if dist.get_world_size() == 1:
        return _ONE
    world = dist.group.WORLD
    if not _group or _group[0][0] is not world:
        with _all_come():
            meeting = dist.new_group(backend="gloo", timeout=_PATIENCE)
        control = dist.new_group(backend="gloo", timeout=_LONG)
        atexit.register(_stay_a_moment)
        _group[:] = [(world, Processes(dist.get_rank(), dist.get_world_size(), control, meeting))]
    return _group[0][1]


def _stay_a_moment() -> None:
    """Let the threads of gloo finish: a process that ends at once may be aborted by them."""
    atexit.unregister(_stay_a_moment)  # once, however many groups there were
    _group.clear()
    time.sleep(_MOMENT)


def is_launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    count = os.environ.get("WORLD_SIZE", "1")
    return count.isdigit() and int(count) > 1


@contextmanager
def launched() -> Iterator[None]:
    """Make a group of the processes that a launcher started, for the block; nothing if it started one, or made it.

    The program ``modeconn`` does so under ``torchrun``. GPUs, if there are any, speak over NCCL.

    Raises:
        ValueError: If the launcher did not say enough, or the processes do not find each other.
    """
    if not is_launched() or dist.is_initialized():
        yield
        return
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that this is one of several processes, but "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set. Start them with torchrun, or unset "
            f"WORLD_SIZE."
        )
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    except (ValueError, RuntimeError, OSError) as error:
        lines = str(error).strip().splitlines()
        raise ValueError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not find the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({lines[0] if lines else error!r}). If the port "
            f"is in use, choose another one: torchrun --master-port."
        ) from error
    atexit.register(_stay_a_moment)
    try:
        yield
    finally:
        _group.clear()
        dist.destroy_process_group()


def _filled(numbers: Sequence[float]) -> list[float]:
    return [*map(float, numbers), *[0.0] * (_NUMBERS - len(numbers))]


def _said(error: BaseException) -> bytes:
    """Return what a process says of its error: its class, and the first line of its text."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:
        lines = []
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text.encode("utf-8", "backslashreplace")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block, in which all processes are in step."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda *signalled: came.append(signalled))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


def _short(value: Any, length: int = 80) -> str:
    text = "missing" if value is None else str(value)
    return text if len(text) <= length else text[: length - 3] + "..."
