"""How every file is written: the whole new one or the old one, whatever happens, and nothing else is touched."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import secrets
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from modeconn.tools.door import check
from modeconn.tools.processes import writes

try:
    import fcntl
except ImportError:  # Windows, where files of killed processes are not cleaned up and runs are not told of each other
    fcntl = None  # type: ignore[assignment]

_LONGEST_NAME = 200  # bytes of a target's name that its temporary file keeps; most systems allow 255 in all


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Give a binary file that takes the place of ``path`` in one step when the block ends without an error.

    Whoever reads ``path``, at any time, finds the old file or the new one. The new file is written under a name that no
    other file has, beside the target (of a link: beside what it links to), synced, renamed, and its folder synced; it
    keeps the permissions of the old one. Of processes that share a command line the first alone writes. A target that
    is no regular file, such as a terminal, is written to, not replaced.

    Args:
        path: The file; its folder must exist.

    Raises:
        OSError: If it cannot be written, naming it and the cause; ``path`` is as it was.
    """
    check("path", path, str | os.PathLike[str])
    if not writes():
        yield io.BytesIO()
        return
    target = Path(path)
    with _named(target):
        mode = _mode(target)
        if mode is not None and not stat.S_ISREG(mode):
            content = _Written(target, mode)
        else:
            content = _Replaced(Path(os.path.realpath(target)), mode)
    try:
        yield _Told(content.file, target)
        with _named(target):
            content.finish()
    except BaseException:
        content.abandon()
        raise


def write_bytes(content: bytes, path: str | os.PathLike[str]) -> None:
    """Write bytes to a file, all or nothing."""
    with replacing(path) as file:
        file.write(content)


def write_text(text: str, path: str | os.PathLike[str] | None) -> str:
    """Write a text to ``path``, all or nothing, unless that is None; return the text."""
    if path is not None:
        write_bytes(text.encode("utf-8"), path)
    return text


def write_arrays(arrays: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write arrays under their names for `numpy.load`, compressed, all or nothing."""
    with replacing(path) as file:
        np.savez_compressed(file, **{name: np.asarray(value) for name, value in arrays.items()})


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise unless a file can be written to ``path``; nothing is left behind.

    Raises:
        OSError: Naming the file and the reason.
    """
    check("path", path, str | os.PathLike[str])
    if not writes():
        return
    target = Path(path)
    with _named(target):
        mode = _mode(target)
        if mode is not None and not stat.S_ISREG(mode):
            _Written(target, mode).abandon()
        else:
            _Replaced(Path(os.path.realpath(target)), mode).abandon()


def made_folder(path: str | os.PathLike[str]) -> Path:
    """Return a folder that files can be written to, made if it is not there, with those above it.

    Raises:
        ValueError: If the name is empty.
        OSError: Naming the folder and the reason.
    """
    check("folder", path, str | os.PathLike[str])
    if not os.fspath(path):
        raise ValueError("the name of the folder is empty; '.' is the current one.")
    folder = Path(path)
    if writes():
        with _named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _Replaced(folder / "file", None).abandon()
    return folder


@contextlib.contextmanager
def held(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a file against other processes, and other runs of this one, for the block.

    They are told by a lock on a hidden file beside it, which the system lets go when a process ends in any way. Where
    the file system has no locks, nothing is held.

    Raises:
        OSError: If another run holds it.
    """
    target = Path(os.path.realpath(path))
    lock = target.with_name(f".{_short(target.name)}.lock")
    with _named(target):
        handle, owner = _locked(lock)
    if owner is not None:
        who = f"process {owner.split()[0]}" if owner else "another process"
        raise BlockingIOError(
            f"{str(path)!r} is in use by another run ({who}). Wait for its end, or give this run a file of its own."
        )
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                lock.unlink()  # before it is let go, so that whoever waits for it finds a file of its own
            os.close(handle)


def _locked(lock: Path) -> tuple[int | None, str | None]:
    """Return the descriptor of a lock file that this process now holds, or who holds it; twice None without locks."""
    if fcntl is None:
        return None, None
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(lock, handle):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
                return handle, None
            os.close(handle)  # the run before removed this lock file in between
        except BlockingIOError:
            owner = os.pread(handle, 256, 0).decode(errors="replace")
            is_gone = _is_gone(owner)  # killed, but workers that it had forked have not noticed yet
            if is_gone and _is_at(lock, handle):
                with contextlib.suppress(FileNotFoundError):
                    lock.unlink()
            os.close(handle)
            if not is_gone:
                return None, owner
        except OSError:
            os.close(handle)
            return None, None


def _is_at(path: Path, handle: int) -> bool:
    """Whether an open file is the one that a path leads to."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _is_gone(owner: str) -> bool:
    """Whether a process ``"number host"`` of this machine has ended."""
    number, _, host = owner.partition(" ")
    if not number.isdigit() or host != socket.gethostname():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


class _Replaced:
    """A new file beside a regular target."""

    def __init__(self, target: Path, mode: int | None) -> None:
        if mode is not None and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "it is write-protected")
        _remove_left(target)
        self._target = target
        self._path, descriptor = _new_file(target)
        self.file = os.fdopen(descriptor, "wb")
        if mode is not None and hasattr(os, "fchmod"):
            os.fchmod(descriptor, stat.S_IMODE(mode))
            about = target.stat()
            with contextlib.suppress(OSError):  # only the superuser may give a file to another user
                os.fchown(descriptor, about.st_uid, about.st_gid)

    def finish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self._path, self._target)
        self.file.close()
        _sync_folder(self._target.parent)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self._path.unlink()


class _Written:
    """A target that is no regular file, such as a terminal or a pipe, written through."""

    def __init__(self, target: Path, mode: int) -> None:
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if stat.S_ISBLK(mode):
            raise OSError(errno.EINVAL, "it is a device that holds files")
        flags = os.O_WRONLY | getattr(os, "O_NONBLOCK", 0)  # a pipe that nobody reads would have us wait for ever
        try:
            descriptor = os.open(target, flags)
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise OSError(errno.ENXIO, "it is a pipe that nobody reads, or a socket") from None
            raise
        os.set_blocking(descriptor, True)
        self.file = os.fdopen(descriptor, "wb")

    def finish(self) -> None:
        self.file.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()


class _Told:
    """A binary file whose errors name the file that they are about."""

    def __init__(self, file: IO[bytes], target: Path) -> None:
        self._file, self._target = file, target

    def write(self, content: bytes) -> int:
        with _named(self._target):
            return self._file.write(content)

    def flush(self) -> None:
        with _named(self._target):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """Give an error of the system the name of the file and a way out."""
    try:
        yield
    except OSError as error:
        raise type(error)(
            f"cannot write {str(target)!r} ({error.strerror or error}). Choose a place that can be written to."
        ) from error


def _mode(target: Path) -> int | None:
    """Return type and permissions of what a path leads to; None if there is nothing."""
    try:
        return target.stat().st_mode
    except FileNotFoundError:
        return None


def _short(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_LONGEST_NAME])


def _begins(target: Path) -> str:
    """Return how names of temporary files of a target begin on this machine."""
    machine = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:4]
    return f".{_short(target.name)}.{machine}"


def _new_file(target: Path) -> tuple[Path, int]:
    """Make a file that did not exist beside the target, locked as long as it is open, so that nobody removes it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    while True:
        path = target.with_name(f"{_begins(target)}{secrets.token_hex(6)}.tmp")
        descriptor = os.open(path, flags, 0o666)
        if fcntl is None:
            return path, descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process takes it for one that was left, and removes it
            os.close(descriptor)
            continue
        except OSError:  # a file system without locks, where nothing is removed
            return path, descriptor
        if _is_at(path, descriptor):
            return path, descriptor
        os.close(descriptor)


def _remove_left(target: Path) -> None:
    """Remove what processes of this machine left that were killed while they wrote the same file: unlocked files."""
    if fcntl is None:
        return
    begins = _begins(target)
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if entry.name.startswith(begins) and entry.name.endswith(".tmp") and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_if_unlocked(Path(entry.path))


def _remove_if_unlocked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
