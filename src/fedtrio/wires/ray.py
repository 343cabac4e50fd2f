"""Sites in workers of a Ray cluster: each is an actor that holds one base model and many sites.

Ray ("Ray: A Distributed Framework for Emerging AI Applications", arXiv:1712.05889) starts the workers, on this machine
or on others, gives each the cores and GPUs it asks for, and carries the frames. It moves them by pickle within one
cluster, whose members trust each other; what is in a frame stays a frame.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import re
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol

from ..errors import ConfigError, FedtrioError, WireError
from .loopback import Answers

INLINE_BYTES = 1 << 20  # shorter answers come with Ray's reply, and not by way of the object store
PATIENCE_S = 120.0  # for workers to start; those of a machine under load import Python modules for a while
SHARED_BYTES = 100_000  # longer frames lie in the object store, and a broadcast once

Versions = Mapping[int, bytes]  # a site's memory by round


class Keeps(Protocol):
    """The memory of one site, which outlives its worker."""

    def add(self, round: int, version: bytes) -> None:
        """Keep what the site knew at the end of a round."""
        ...

    def saved(self) -> dict[int, bytes]:
        """What is kept, by round."""
        ...


class Remembers(Answers, Protocol):
    """A site in a worker, as far as the wire knows it."""

    def recall(self, versions: Versions) -> None:
        """Begin with what was kept of this site elsewhere."""
        ...

    def learnt(self) -> bytes:
        """What the answer just given has left in the site's memory; empty where it is as it was."""
        ...


Make = Callable[[Sequence[str]], Mapping[str, Remembers]]  # the sites of one worker, by name; importable there


class SiteWorker:
    """The actor: makes its sites when first asked, and answers for them, one after the other."""

    def __init__(self, make: Make, kept: Mapping[str, Versions]) -> None:
        self._make, self._kept = make, kept
        self._sites: Mapping[str, Remembers] = {}

    def hello(self) -> tuple[str, str]:
        """It is there: on which node, and with which fedtrio."""
        return socket.gethostname(), metadata.version("fedtrio")

    def reset(self) -> None:
        """A round starts."""
        for site in self._sites.values():
            site.reset()

    def answer(self, site: str, frame: bytes) -> tuple[bytes, bytes]:
        """The site's next frame, and what of its memory is new."""
        if not self._sites:
            try:
                sites = self._make(list(self._kept))
            except FedtrioError as error:  # files that this node lacks, perhaps
                raise type(error)(f"on node {socket.gethostname()}: {error}") from error
            for name, versions in self._kept.items():
                sites[name].recall(versions)
            self._sites, self._kept = sites, {}
        return self._sites[site].answer(frame), self._sites[site].learnt()


class _Worker:
    """A place in the cluster: which sites it works for, and the actor that does, while there is one."""

    def __init__(self, sites: Sequence[str]) -> None:
        self.sites = sites
        self.actor: Any = None
        self.hello: Any = None  # a reference, until the actor has said it
        self.ask: Any = None  # its method that answers

    @property
    def up(self) -> bool:
        return self.actor is not None and self.hello is None


class Ray:
    """The wire to sites in workers of a Ray cluster.

    `memories` has one for each site: what a worker's sites learn comes back with their answers and is kept here, so a
    worker that dies takes its sites out of the round only; it is started again when the next one begins, and knows
    what they knew. `resources` is what each worker asks of its node: num_cpus, num_gpus, memory (bytes), or a resource
    of the cluster's own. `workers` None: as many as the cluster has room for. `address` None: a cluster of this machine
    with `cores`, which ends with this process.

    Raises ConfigError without the package, or where the cluster can't hold the workers; WireError where it can't be
    reached, and where workers don't start within `patience` seconds.
    """

    def __init__(
        self,
        make: Make,
        memories: Mapping[str, Keeps],
        workers: int | None,
        resources: Mapping[str, float],
        address: str | None = None,
        cores: int | None = None,
        patience: float = PATIENCE_S,
    ) -> None:
        self._ray = connect(address, cores)
        self._make, self._memories = make, dict(memories)
        self._asked, self._patience = dict(resources), patience
        names, room = list(memories), room_for(self._ray, resources)
        wanted = min(workers or room or len(names), len(names))
        if wanted > room:
            raise ConfigError(
                f"wire: {wanted} workers with {said(resources)} each don't fit into the Ray cluster, which has "
                f"{_total(self._ray)}, room for {room}: lower workers or resources, or add nodes"
            )
        self.abreast = wanted  # sites that work at the same time
        self._workers = [_Worker(names[i::wanted]) for i in range(wanted)]
        self._round, self._until, self._began = 0, math.inf, False
        self._shared: tuple[bytes, Any] = (b"", None)
        self.reasons: dict[str, str] = {}  # why sites are silent in this round

    @property
    def sites(self) -> list[str]:
        """Names of all sites, sorted."""
        return sorted(self._memories)

    def start_round(self, run: str, round: int, deadline: float | None) -> None:
        """Workers forget open dialogues; those that have died are started again. WireError at the first start."""
        self._round, self._until = round, math.inf if deadline is None else time.monotonic() + deadline
        self.reasons = {}
        told = {worker.actor.reset.remote(): worker for worker in self._workers if worker.up}
        self._ray.wait(list(told), num_returns=len(told), timeout=self._patience) if told else None
        for reference, worker in told.items():
            self._fetched(worker, reference)
        new = [worker for worker in self._workers if worker.actor is None]
        for worker in new:
            self._start(worker)
        self._greet(self._patience if new else 0)

    def exchange(self, frames: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes | None]]:
        """Deliver each frame and yield each answer as it comes, or None where its worker was gone before.

        A worker that is not done at the round's deadline is ended. Raises what a site raised.
        """
        of = {site: worker for worker in self._workers for site in worker.sites}
        queues: dict[_Worker, deque[tuple[str, bytes]]] = {}
        for site, frame in frames:
            queues.setdefault(of[site], deque()).append((site, frame))
        under_way = {}
        for worker, queue in queues.items():
            under_way |= self._sent_next(worker, queue)
        while under_way:
            left = None if self._until == math.inf else max(0.0, self._until - time.monotonic())
            ready, _ = self._ray.wait(list(under_way), timeout=left)
            if not ready:
                for worker, *_ in under_way.values():
                    self._end(worker, "its worker was not done at the round's deadline")
                break
            worker, site, memory = under_way.pop(ready[0])
            if (answer := self._fetched(worker, ready[0], memory)) is None:
                continue  # its sites are silent for the rest of the round
            under_way |= self._sent_next(worker, queues[worker])
            if answer[1]:
                self._memories[site].add(self._round, answer[1])
            yield site, answer[0]
        self._shared = (b"", None)
        yield from ((site, None) for queue in queues.values() for site, _ in queue)

    def wait_for(self, number: int, timeout: float | None) -> list[str]:
        """All sites are always there."""
        return self.sites

    def refuse(self, site: str, reason: str) -> None:
        """Nobody needs to be told."""

    def close(self) -> None:
        """End all workers. The cluster stays: another one's, or ours for the next run."""
        for worker in self._workers:
            self._end(worker)

    def _start(self, worker: _Worker) -> None:
        kept = {site: self._memories[site].saved() for site in worker.sites}
        options: dict[str, Any] = {key: self._asked[key] for key in _NAMED & self._asked.keys()}
        options["resources"] = {key: value for key, value in self._asked.items() if key not in _NAMED}
        actor = self._ray.remote(SiteWorker).options(**options, max_restarts=0, scheduling_strategy="SPREAD")
        worker.actor = actor.remote(self._make, kept)
        worker.hello = worker.actor.hello.remote()
        worker.ask = worker.actor.answer.options(num_returns=2)

    def _greet(self, patience: float) -> None:
        """Hear the workers that were started. All must be there at first; one that can't come back is silent."""
        waiting = {worker.hello: worker for worker in self._workers if worker.hello is not None}
        if not waiting:
            return
        ready, late = self._ray.wait(list(waiting), num_returns=len(waiting), timeout=patience)
        for reference in ready:
            worker = waiting[reference]
            try:
                host, version = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                if not self._began:
                    raise WireError(_why_not(error)) from error
                self._end(worker, _why_not(error))
                continue
            if version != metadata.version("fedtrio"):
                raise WireError(
                    f"{host} has fedtrio {version}, and this side {metadata.version('fedtrio')}: make equal"
                )
            worker.hello = None
        if late and not self._began:
            free = {k: v for k, v in self._ray.available_resources().items() if k in self._asked or k in _SHOWN}
            raise WireError(
                f"{len(late)} of {self.abreast} workers did not start within {patience:.0f} s: each asks for "
                f"{said(self._asked)}; the cluster has {_total(self._ray)}, of which free: {said(free)}"
            )
        for reference in late:
            self.reasons |= dict.fromkeys(waiting[reference].sites, "the cluster has no room for its worker yet")
        self._began = True

    def _sent_next(self, worker: _Worker, queue: deque[tuple[str, bytes]]) -> dict[Any, tuple[_Worker, str, Any]]:
        """Each worker has one frame at a time, and the next as soon as it has answered; a broadcast is stored once."""
        if not queue or not worker.up:
            return {}
        site, frame = queue.popleft()
        if len(frame) > SHARED_BYTES:
            if self._shared[0] is not frame:
                self._shared = frame, self._ray.put(frame)
            frame = self._shared[1]
        answer, memory = worker.ask.remote(site, frame)
        return {answer: (worker, site, memory)}

    def _fetched(self, worker: _Worker, *references: Any) -> list[Any] | None:
        """What a worker has answered, or None where it has died. Raises what a site raised."""
        try:
            return self._ray.get(list(references), timeout=self._patience)
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except self._ray.exceptions.RayError as error:
            self._end(worker, f"its worker died: {_cause(error)}")
            return None

    def _end(self, worker: _Worker, reason: str = "") -> None:
        if worker.actor is not None:
            self.reasons |= dict.fromkeys(worker.sites, reason)
            self._ray.kill(worker.actor)
            worker.actor = worker.hello = None


# The cluster ----------------------------------------------------------------------------------------------------------

_NAMED = {"num_cpus", "num_gpus", "memory"}  # Ray's own resources as options name them …
_SHOWN = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}  # … and as it counts them


def package() -> Any:
    """Ray itself, with its usage statistics off. Raises ConfigError where it is not installed."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # what matters is asked for
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(f"wire.name is ray, and {error.name} is missing: pip install 'fedtrio[ray]'") from error


def connect(address: str | None, cores: int | None = None) -> Any:
    """Ray, connected: by the connection that this process has already, to `address`, or to a cluster of its own.

    Raises ConfigError, WireError.
    """
    ray = package()
    if ray.is_initialized():
        return ray
    _knock(address)
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if main else None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    own = {"address": "local", "num_cpus": cores, "include_dashboard": False}
    if address is None:
        os.environ.setdefault("RAY_max_direct_call_object_size", str(INLINE_BYTES))
    try:
        ray.init(**options, **(own if address is None else {"address": address}))
    except BaseException as error:
        ray.shutdown()  # of what was started meanwhile
        if isinstance(error, Exception):  # Ray raises what it comes upon: ConnectionError, RuntimeError, its own
            raise WireError(f"the Ray cluster {address or 'of this machine'} can't be used: {_cause(error)}") from error
        if isinstance(error, SystemExit) and callable(handler):  # by Ray's own handler of SIGTERM
            handler(signal.SIGTERM, None)
        raise
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)  # for Ray has put its own in place
    private: Any = importlib.import_module("ray._private.worker")
    private._worker_logs_enabled = False  # else deaths are told on standard output
    return ray


def _knock(address: str | None) -> None:
    """Where nothing listens, Ray would try for a minute, and end the process. Raises ConfigError, WireError."""
    if address is None or address == "auto" or "://" in address:
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise ConfigError(
            f"wire.address is {address!r}: write host:port (6379 by default), or auto for one that runs here"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise WireError(
            f"no Ray cluster at {address}: {why}; start it by `ray start --head`, and correct wire.address"
        ) from error


def room_for(ray: Any, resources: Mapping[str, float]) -> int:
    """How many workers the cluster's nodes hold if nothing else runs there."""
    asked = {next((k for k, v in _SHOWN.items() if v == name), name): n for name, n in resources.items() if n}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    each = [min((have.get(k, 0.0) / n for k, n in asked.items()), default=have.get("CPU", 0.0)) for have in nodes]
    return sum(int(n + 1e-6) for n in each)


def _total(ray: Any) -> str:
    have: dict[str, float] = {}
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for node in alive:
        for key, number in node.items():
            if key not in ("memory", "object_store_memory") and not key.startswith("node:"):
                have[key] = have.get(key, 0.0) + number
    return f"{len(alive)} node{'s' * (len(alive) != 1)} with {said(have)} in all"


def said(resources: Mapping[str, float]) -> str:
    """For people."""
    return ", ".join(f"{_SHOWN.get(key, key)} {number:g}" for key, number in sorted(resources.items())) or "nothing"


def _why_not(error: Exception) -> str:
    """Why a worker could not start, where Ray says what raised."""
    node = re.search(r"\bip=([^,)]+)", str(error))
    mend = "; install the same fedtrio on every node" if "ModuleNotFoundError" in str(error) else ""
    return f"a worker could not start{f' on node {node[1]}' if node else ''}: {_cause(error)}{mend}"


def _cause(error: Exception) -> str:
    """The one sentence of what Ray says that tells most: the last exception in it, or else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return (raised[-1] if raised else lines[0] if lines else type(error).__name__).partition(". ")[0][:300]
