"""What is written is whole or not there, and nothing else is touched."""

from __future__ import annotations

import multiprocessing
import os
import stat
import threading
import time

import pytest

from modeconn.tools import writing


def listing(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_new_file_is_written_as_open_would(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"x")
    writing.write_bytes(b"content", tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == b"content"
    assert (tmp_path / "new").stat().st_mode == plain.stat().st_mode
    assert listing(tmp_path) == ["new", "plain"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664])
def test_permissions_of_the_old_file_are_kept(tmp_path, mode):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(mode)
    writing.write_bytes(b"new", path)
    assert path.read_bytes() == b"new" and stat.S_IMODE(path.stat().st_mode) == mode


def test_a_link_stays_one_and_its_target_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    writing.write_bytes(b"new", link)
    assert link.is_symlink() and target.read_bytes() == b"new"
    assert listing(tmp_path) == ["elsewhere", "link"] and listing(target.parent) == ["target"]


def test_a_link_to_nothing_yet_makes_its_target(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    writing.write_bytes(b"new", link)
    assert link.is_symlink() and (tmp_path / "target").read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["file", "link", "pipe"])
def test_files_of_the_user_beside_the_target_are_left_alone(tmp_path, kind):
    precious, beside = tmp_path / "precious", tmp_path / "x.tmp"
    precious.write_bytes(b"precious")
    if kind == "file":
        beside.write_bytes(b"precious")
    elif kind == "link":
        beside.symlink_to(precious)
    else:
        os.mkfifo(beside)
    before = listing(tmp_path)
    writing.check_writable(tmp_path / "x")
    writing.write_bytes(b"new", tmp_path / "x")
    assert precious.read_bytes() == b"precious" and listing(tmp_path) == sorted([*before, "x"])
    assert kind == "pipe" or beside.read_bytes() == b"precious"


def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), writing.replacing(path) as file:
            file.write(b"half of")
            raise error
    assert path.read_bytes() == b"old" and listing(tmp_path) == ["x"]


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write '.*/x' \(No space left on device\)"):
        writing.write_bytes(b"new", path)
    assert path.read_bytes() == b"old" and listing(tmp_path) == ["x"]


def test_a_disk_that_is_really_full_is_named():
    with pytest.raises(OSError, match=r"cannot write '/dev/full' \(No space left on device\)"):
        writing.write_bytes(b"x" * 100_000, "/dev/full")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_what_is_no_regular_file_is_written_through(tmp_path):
    writing.write_bytes(b"x", os.devnull)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    pipe, seen = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: seen.append(pipe.read_bytes()))
    reader.start()
    content = bytes(range(256)) * 4096  # more than a pipe holds at once
    for _ in range(200):  # until the reader is there
        try:
            writing.write_bytes(content, pipe)
            break
        except OSError:
            time.sleep(0.01)
    reader.join(10)
    assert seen == [content] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_pipe_that_nobody_reads_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for attempt in (
        lambda: writing.check_writable(tmp_path / "pipe"),
        lambda: writing.write_bytes(b"", tmp_path / "pipe"),
    ):
        with pytest.raises(OSError, match=r"cannot write '.*/pipe' \(it is a pipe that nobody reads"):
            attempt()


def test_folders_and_protected_files_are_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        writing.write_bytes(b"", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cannot write '.*missing/x' \(No such file"):
        writing.check_writable(tmp_path / "missing" / "x")
    assert listing(tmp_path) == []


def test_long_names_can_be_written(tmp_path):
    for name in ("x" * 255, "ä" * 127):
        writing.write_bytes(b"new", tmp_path / name)
        with writing.held(tmp_path / name):
            assert (tmp_path / name).read_bytes() == b"new"


def _die_in_the_middle(path) -> None:
    with writing.replacing(path) as file:
        file.write(b"half of")
        os.kill(os.getpid(), 9)


def test_what_a_killed_process_left_is_removed_and_what_others_write_is_not(tmp_path):
    others = [tmp_path / name for name in (".x.abc.tmp", ".x.tmp", ".y.abc.tmp", "x.tmp")]
    for path in others:
        path.write_bytes(b"left")
    dying = multiprocessing.get_context("spawn").Process(target=_die_in_the_middle, args=(tmp_path / "x",))
    dying.start()
    dying.join()
    assert len(listing(tmp_path)) == 5
    with writing.replacing(tmp_path / "x") as file:  # it is removed, and this one is not
        file.write(b"first")
        writing.write_bytes(b"second", tmp_path / "x")
        assert len(listing(tmp_path)) == 6
    assert (tmp_path / "x").read_bytes() == b"first"
    assert listing(tmp_path) == sorted([*(path.name for path in others), "x"])


def _write_for(path, letter: bytes, size: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        writing.write_bytes(letter * size, path)


def test_readers_see_whole_files_however_many_write(tmp_path):
    path, context = tmp_path / "x", multiprocessing.get_context("spawn")
    writing.write_bytes(b"a" * 10, path)
    writers = [
        context.Process(target=_write_for, args=(path, letter, size, 1.0))
        for letter, size in ((b"a", 10), (b"b", 10**6))
    ]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        content = path.read_bytes()
        seen.add((content[:1], len(content), content == content[:1] * len(content)))
    assert seen == {(b"a", 10, True), (b"b", 10**6, True)}
    assert listing(tmp_path) == ["x"]


def _hold(path, ready, end) -> None:
    with writing.held(path):
        ready.set()
        end.wait(30)


def test_a_file_that_another_run_holds_is_refused_until_it_ends(tmp_path):
    path, context = tmp_path / "x", multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(path, ready, end))
    other.start()
    assert ready.wait(30)
    with (
        pytest.raises(OSError, match=rf"'.*/x' is in use by another run \(process {other.pid}\)"),
        writing.held(path),
    ):
        pass
    other.kill()  # a lock does not outlive its process
    other.join()
    with writing.held(path), pytest.raises(BlockingIOError, match="in use by another run"), writing.held(path):
        pass
    with writing.held(path):
        pass
    assert listing(tmp_path) == []


def test_a_lock_whose_owner_is_gone_is_broken_though_a_child_has_it(tmp_path):
    path = tmp_path / "x"
    ready, end = os.pipe()
    owner = os.fork()
    if owner == 0:
        with writing.held(path):
            child = os.fork()
            if child == 0:  # keeps the lock open, as worker processes do until they notice
                time.sleep(5)
                os._exit(0)
            os.write(end, str(child).encode())
            os._exit(0)
    child = int(os.read(ready, 32))
    os.waitpid(owner, 0)
    with writing.held(path):
        pass
    os.kill(child, 9)
