"""Several runs of one comparison at a time, each in a process of its own; or one after the other in this one."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from .bench import Bench
from .config import Config
from .errors import FedtrioError
from .run import OnRound, run
from .wires.process import fork_server

Task = tuple[str, int, Path | None, Path | None]  # framework, seed, run folder, folder for frames


class Workers:
    """With `jobs` above 1 the processes come from a fork server, which has imported torch once for all of them."""

    def __init__(self, config: Config, jobs: int) -> None:
        self._pool, self._news = None, None
        if jobs < 2:
            self._bench = Bench(config)
            return
        context = fork_server(["fedtrio.run", "peft"])
        self._news = context.SimpleQueue()
        self._pool = ProcessPoolExecutor(jobs, context, _open, (config, self._news))

    def prepare(self, what: Callable[[Bench], dict[str, Any]]) -> dict[str, Any]:
        """`what(bench)`, done where the runs will be; with several processes each of them gets ready meanwhile."""
        if self._pool is None:
            return what(self._bench)
        first = self._pool.submit(_prepare, what)
        self._pool.submit(_prepare, None)
        return first.result()

    def results(self, tasks: Iterable[Task], on_round: OnRound) -> Iterator[dict[str, Any]]:
        """The entry of each run as it is finished. Raises what a run raises."""
        if self._pool is None or self._news is None:
            for framework, seed, out, frames in tasks:
                yield run(self._bench.config, framework, seed, out, self._bench, on_round, frames)
            return
        pending: set[Future[dict[str, Any]]] = {self._pool.submit(_run, *task) for task in tasks}
        try:
            while pending:
                finished, pending = wait(pending, 0.1, FIRST_COMPLETED)
                self._tell(on_round)
                yield from (future.result() for future in finished)
        except BrokenProcessPool as error:
            raise FedtrioError("a process that ran a framework was killed (out of memory?); try --jobs 1") from error

    def _tell(self, on_round: OnRound) -> None:
        assert self._news is not None
        while not self._news.empty():
            on_round(*self._news.get())

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._pool is None:
            return
        if kind is not None:
            for process in multiprocessing.active_children():
                process.terminate()
        self._pool.shutdown(cancel_futures=True)


_bench: Bench
_news: Any


def _open(config: Config, news: Any) -> None:
    """In a new process: what it will need for all its runs. Ctrl-C is the parent's business."""
    global _bench, _news
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _bench, _news = Bench(config), news


def _prepare(what: Callable[[Bench], dict[str, Any]] | None) -> dict[str, Any]:
    _bench.model(_bench.config.seeds[0])
    return what(_bench) if what else {}


def _run(framework: str, seed: int, out: Path | None, frames: Path | None) -> dict[str, Any]:
    return run(_bench.config, framework, seed, out, _bench, lambda *entry: _news.put(entry), frames)
