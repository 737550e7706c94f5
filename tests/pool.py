"""Processes that are spawned once and run functions of tests as the members of one group of torch.distributed."""

import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

LIMIT = 40  # seconds that a function may take


class Failure(Exception):
    """What a function raised in one process: ``kind`` is the name of its class."""

    def __init__(self, kind, message, trace=""):
        super().__init__(message)
        self.kind, self.trace = kind, trace

    def __reduce__(self):
        return Failure, (self.kind, str(self), self.trace)


class Pool:
    """Up to four processes, started when they are needed.

    Args:
        folder: Where groups meet, each at a file of its own.
    """

    def __init__(self, folder):
        self._members, self._folder, self._count = [], folder, 0

    def outcomes(self, size, function, *args):
        """Run ``function(rank, *args)`` in ``size`` processes; return what each returned, or its `Failure`."""
        context = multiprocessing.get_context("spawn")
        while len(self._members) < size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._members.append((process, ours))
        self._count += 1
        place = self._folder / str(self._count)
        for rank, (_, pipe) in enumerate(self._members[:size]):
            pipe.send((rank, size, str(place), function, args))
        found = []
        for process, pipe in self._members[:size]:
            if not pipe.poll(LIMIT):
                self.close()
                raise TimeoutError(f"{function.__name__} took more than {LIMIT} s in one of {size} processes")
            try:
                found.append(pipe.recv())
            except EOFError:
                process.join()
                found.append(Failure("Killed", f"exit status {process.exitcode}"))
        self._members = [member for member in self._members if member[0].is_alive()]
        return found

    def run(self, size, function, *args):
        """Do the same, and raise the first failure."""
        found = self.outcomes(size, function, *args)
        for one in found:
            if isinstance(one, Failure):
                raise AssertionError(f"{one.kind}: {one}\n{one.trace}")
        return found

    def close(self):
        """End the processes."""
        for process, _ in self._members:
            process.kill()
        self._members = []


def _serve(pipe):
    torch.set_num_threads(1)
    while True:
        try:
            rank, size, place, function, args = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size)
            dist.barrier()  # one that leaves at once would break the connections that others still make
            pipe.send(function(rank, *args))
        except BaseException as error:
            pipe.send(Failure(type(error).__name__, str(error), traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
