"""Sites in worker processes of this machine: all cores work, and each worker's peak memory is its own."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from .loopback import Answers

Make = Callable[[Sequence[str]], Mapping[str, Answers]]  # the sites of one worker, by name; importable there

RESET, CLOSE = "reset", "close"


def fork_server(preload: Sequence[str] = ()) -> Any:
    """What makes worker processes: a server that has imported `preload` once for all of them; elsewhere, new ones."""
    context: Any = multiprocessing.get_context("forkserver" if hasattr(signal, "SIGALRM") else "spawn")
    if preload and hasattr(context, "set_forkserver_preload"):
        context.set_forkserver_preload(list(preload))
    return context


class Process:
    """Each worker makes its sites itself and answers for them, one after the other.

    A worker that dies takes its sites out of the round, and is started again when the next one begins.
    """

    def __init__(self, make: Make, sites: Sequence[str], workers: int, preload: Sequence[str] = ()) -> None:
        self._make, self._names = make, list(sites)
        self.abreast = max(1, min(workers, len(sites)))  # sites that work at the same time
        self._groups = [self._names[i :: self.abreast] for i in range(self.abreast)]
        self._context = fork_server(preload)
        self._workers = [self._started(group) for group in self._groups]

    @property
    def sites(self) -> list[str]:
        """Names of all sites, sorted."""
        return sorted(self._names)

    def start_round(self, run: str, round: int, deadline: float | None) -> None:
        """Workers forget open dialogues; those that have died are started again."""
        for index, (process, _) in enumerate(self._workers):
            if not process.is_alive():
                self._workers[index] = self._started(self._groups[index])
        for _, pipe in self._workers:
            with suppress(BrokenPipeError, ConnectionResetError):
                pipe.send((RESET, "", b""))

    def exchange(self, frames: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes | None]]:
        """Deliver each frame and yield each answer as it comes, or None where its worker died before.

        Raises what a site raised.
        """
        pipes = {site: pipe for group, (_, pipe) in zip(self._groups, self._workers, strict=True) for site in group}
        queues: dict[Connection, deque[tuple[str, bytes]]] = {}
        for site, frame in frames:
            queues.setdefault(pipes[site], deque()).append((site, frame))
        waiting = [pipe for pipe in queues if self._sent_next(pipe, queues[pipe])]
        while waiting:
            for pipe in wait(waiting):
                assert isinstance(pipe, Connection)
                try:
                    site, answer = pipe.recv()
                except (EOFError, OSError):
                    waiting.remove(pipe)  # its sites are silent for the rest of the round
                    continue
                if isinstance(answer, Exception):
                    raise answer
                if not self._sent_next(pipe, queues[pipe]):
                    waiting.remove(pipe)
                yield site, answer
        yield from ((site, None) for queue in queues.values() for site, _ in queue)

    def _sent_next(self, pipe: Connection, queue: deque[tuple[str, bytes]]) -> bool:
        """One frame at a time: two who send to each other and do not read would wait for ever."""
        with suppress(BrokenPipeError, ConnectionResetError):
            if queue:
                pipe.send(("answer", *queue[0]))
                queue.popleft()
                return True
        return False

    def wait_for(self, number: int, timeout: float | None) -> list[str]:
        """All sites are always there."""
        return self.sites

    def refuse(self, site: str, reason: str) -> None:
        """Nobody needs to be told."""

    def close(self) -> None:
        """End all workers."""
        for process, pipe in self._workers:
            with suppress(BrokenPipeError, ConnectionResetError):
                pipe.send((CLOSE, "", b""))
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()

    def _started(self, group: Sequence[str]) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(self._make, group, theirs), daemon=True)
        process.start()
        theirs.close()
        return process, ours


def _work(make: Make, group: Sequence[str], pipe: Connection) -> None:
    """A worker's life. Ctrl-C is the parent's business; when the parent is gone, so is the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sites: Mapping[str, Answers] | None = None
    while True:
        try:
            what, site, frame = pipe.recv()
        except (EOFError, OSError):
            return
        if what == CLOSE:
            return
        try:
            sites = make(group) if sites is None else sites
            if what == RESET:
                for each in sites.values():
                    each.reset()
                continue
            answer: bytes | Exception = sites[site].answer(frame)
        except Exception as error:
            answer = error
        with suppress(BrokenPipeError, ConnectionResetError):
            pipe.send((site, answer))
