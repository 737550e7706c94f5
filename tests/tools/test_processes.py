"""What several processes tell each other."""

import os
import signal
import time

import pytest
import torch

from modeconn.tools import processes


def exchanged(rank):
    with processes.together() as them:
        assert (them.rank, them.is_first) == (rank, rank == 0)
        found = them.each(lambda: {"rank": rank, "tensor": torch.full((rank,), rank)})
        told = them.first(lambda: f"said by {rank}")
        total = them.sum(lambda: torch.arange(3.0) * (rank + 1))
        table = them.numbers(lambda: [rank, 10 * rank])
        with processes.together() as inner:
            assert inner is them
        with processes.alone(), processes.together() as one:
            assert one.size == 1 and one.each(lambda: rank) == [rank]
        assert processes.joined() is them
    assert processes.joined().size == 1
    return [part["rank"] for part in found], [len(part["tensor"]) for part in found], told, total, table[:, :2]


@pytest.mark.parametrize("size", [2, 4])
def test_exchanges(pool, size):
    ranks = list(range(size))
    for found in pool.run(size, exchanged):
        of_each, lengths, told, total, table = found
        assert of_each == lengths == ranks
        assert told == "said by 0"
        assert torch.equal(total, torch.arange(3.0) * sum(range(1, size + 1)))
        assert table.tolist() == [[rank, 10 * rank] for rank in ranks]


def distributed(rank):
    with processes.together() as them:
        parts = them.each(lambda: them.mine(list("abcdefg")))
        return them.in_order(parts)


def test_items_come_back_in_order(pool):
    assert pool.run(4, distributed) == [list("abcdefg")] * 4


def failing(rank, where):
    """Fail in process 1, while the others wait for something else."""
    with processes.together() as them:
        if rank == 1 and where == "outside":
            raise LookupError("lost\nsecond line")

        def work():
            if rank == 1:
                raise LookupError("lost")
            return torch.zeros(2)

        if where == "first":
            them.first(lambda: 1)
            work()
            them.first(lambda: 2)
        elif where == "numbers":
            them.numbers(lambda: work().tolist())
        elif where == "sum":
            them.sum(work)
        else:
            them.each(work)


@pytest.mark.parametrize("where", ["outside", "each", "first", "numbers", "sum"])
def test_all_hear_of_a_failure(pool, where):
    found = pool.outcomes(4, failing, where)
    assert [one.kind for one in found] == ["OtherProcessError", "LookupError", "OtherProcessError", "OtherProcessError"]
    assert str(found[0]) == str(found[3]) == "process 1 of 4 failed: LookupError: lost"


def failing_and_going_on(rank):
    with pytest.raises((LookupError, processes.OtherProcessError)):
        failing(rank, "each")
    return exchanged(rank)[2]


def test_a_group_that_failed_goes_on(pool):
    assert pool.run(2, failing_and_going_on) == ["said by 0"] * 2


def ending(rank, where):
    with processes.together() as them:
        if rank == 1:
            os._exit(9)
        begun = time.monotonic()
        try:
            them.sum(lambda: torch.zeros(2)) if where == "sum" else them.each(lambda: 1)
        finally:
            assert time.monotonic() - begun < 30


@pytest.mark.parametrize("where", ["sum", "each"])
def test_nobody_waits_for_a_process_that_ended(pool, where):
    found = pool.outcomes(2, ending, where)
    assert found[0].kind == "OtherProcessError" and "ended, or its connection was lost" in str(found[0])
    assert found[1].kind == "Killed"


def differing(rank):
    with processes.together() as them:
        them.agree({"seed": 1, "loss": "cross_entropy" if rank < 2 else "mse"})


def test_processes_that_differ_are_refused_in_all(pool):
    found = pool.outcomes(4, differing)
    assert {one.kind for one in found} == {"ValueError"}
    assert {str(one) for one in found} == {
        "processes differ: loss is cross_entropy in process 0 and mse in process 2. Start all with the same arguments, "
        "versions and data."
    }


def at_different_places(rank):
    with processes.together() as them:
        them.each(lambda: 1) if rank else them.first(lambda: 1)


def test_processes_at_different_places_are_told(pool):
    assert {one.kind for one in pool.outcomes(2, at_different_places)} == {"OtherProcessError"}


def missing(rank):
    processes._PATIENCE = processes.timedelta(seconds=1)
    try:
        if rank == 0:
            with processes.together():
                pass
    finally:
        processes._PATIENCE = processes.timedelta(minutes=5)


def test_a_process_that_does_not_come_is_not_waited_for_for_ever(pool):
    found = pool.outcomes(2, missing)
    assert found[0].kind == "OtherProcessError" and "with modeconn.alone():" in str(found[0])


def test_a_launcher_without_a_group_is_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError, match=r"started 2 processes, of which this is number 1, .*init_process_group"):
        with processes.together():
            pass
    with processes.alone(), processes.together() as them:
        assert them.size == 1


def test_a_launcher_that_says_too_little_is_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"but RANK, MASTER_ADDR, MASTER_PORT are not set\. Start them with torchrun"):
        with processes.launched():
            pass


def test_a_port_in_use_is_told(monkeypatch):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken.getsockname()[1]}
        for name, value in settings.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ValueError, match=r"process 0 of 2 did not find the others at .*torchrun --master-port"):
            with processes.launched():
                pass


def test_one_process_exchanges_nothing():
    with processes.together() as them:
        assert them.each(lambda: 1) == [1] and them.first(lambda: 2) == 2
        assert torch.equal(them.sum(lambda: torch.ones(2)), torch.ones(2))
        assert them.numbers(lambda: [3]).tolist() == [[3, 0, 0, 0, 0, 0]]
        them.agree({"seed": 1})


class Mute(Exception):
    """An error that cannot say what it is."""

    def __str__(self):
        raise ValueError


def failing_with_any_text(rank):
    with pytest.raises((OSError, processes.OtherProcessError)), processes.together() as them:
        if rank == 1:
            raise OSError("no file '\udce9.bin'")
        them.each(lambda: 1)
    told = None
    try:
        with processes.together() as them:
            if rank == 1:
                raise Mute
            them.each(lambda: 1)
    except processes.OtherProcessError as error:
        told = str(error)
    except Mute:
        pass
    return told


def test_an_error_is_told_whatever_its_text(pool):
    assert pool.run(2, failing_with_any_text) == ["process 1 of 2 failed: Mute", None]


def interrupted(rank):
    with processes.together() as them:
        came = []
        before = signal.signal(signal.SIGINT, lambda *_: came.append(them.each(lambda: "heard")))
        try:
            with processes._uninterrupted():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
                assert not came
            assert came == [["heard", "heard"]]
        finally:
            signal.signal(signal.SIGINT, before)
        return them.each(lambda: rank)


def test_ctrl_c_waits_for_the_end_of_an_exchange(pool):
    assert pool.run(2, interrupted) == [[0, 1]] * 2
