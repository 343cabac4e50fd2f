"""A comparison whose sites are elsewhere: the same runs and the same run folder, over the HTTPS or another wire."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .bench import Bench
from .checkpoint import write_whole
from .compare import SCHEMA_VERSION, Folder, prepare
from .config import Config
from .data.load import load_server_corpus
from .data.partition import PartitionConfig
from .errors import ConfigError, FedtrioError, WireError
from .message import PROTOCOL
from .program import Wire
from .remote import settings_of
from .run import OnRound, run
from .trackers import Trackers
from .wires.https import Https

OnEvent = Callable[[Mapping[str, Any]], None]
RETURN_S = 5.0  # a site that waits for a server knocks at least as often


class ServerWire(Wire, Protocol):
    """A wire that can tell its sites that all is over."""

    def finish(self, reason: str = "") -> None:
        """All is over, by that error or well; close."""
        ...


AnyWire = TypeVar("AnyWire", bound=ServerWire)


@dataclass(frozen=True)
class Greeter:
    """Who is admitted, and what each site is told."""

    sites: Sequence[str]
    settings: dict[str, Any]

    def welcome(self, site: str, greeting: dict[str, Any]) -> dict[str, Any]:
        """The settings. Raises ValueError for a site that speaks another protocol."""
        if greeting.get("protocol") != PROTOCOL:
            raise ValueError(f"this server speaks protocol {PROTOCOL}, the site {greeting.get('protocol')!r:.20}")
        return self.settings


def serve(
    config: Config,
    certs: Path,
    out: Path,
    on_round: OnRound = lambda framework, seed, entry: None,
    on_start: Callable[[Mapping[str, Any], Https], None] = lambda results, wire: None,
    on_event: OnEvent = lambda event: None,
) -> dict[str, Any]:
    """Wait for the sites of `wire.sites`, run all frameworks and seeds with them; what results.json holds.

    `certs` is the server's folder of certificates. A run folder that was broken off goes on after its last round.
    Raises ConfigError, DataError, ModelError, QuorumError, WireError.
    """

    def connect(greeter: Greeter, note: OnEvent) -> Https:
        host, port, limit = config.wire.host, config.wire.port, config.wire.max_frame_bytes
        return Https(certs, greeter.sites, greeter.welcome, host=host, port=port, limit=limit, on_event=note)

    return serve_over(connect, config, out, on_round, on_start, on_event)


def serve_over(
    connect: Callable[[Greeter, OnEvent], AnyWire],
    config: Config,
    out: Path,
    on_round: OnRound = lambda framework, seed, entry: None,
    on_start: Callable[[Mapping[str, Any], AnyWire], None] = lambda results, wire: None,
    on_event: OnEvent = lambda event: None,
    road: Callable[[AnyWire, str], AbstractContextManager[Wire]] = lambda wire, framework: nullcontext(wire),
) -> dict[str, Any]:
    """As `serve`, over the wire that `connect(greeter, note)` makes; `road` gives that of a framework's run."""
    config = _possible(config).resolved()
    names = config.wire.sites
    if not names:
        raise ConfigError("wire.sites is missing: list the sites' names, as their certificates say them")
    folder = Folder(out, config)
    runs = folder.finished()
    bench = Bench(config, load_server_corpus(config.data, config.task, config.base))
    greeter = Greeter(names, settings_of(bench, _run_id(out)))
    log = out / "events.jsonl"

    def note(event: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:  # whoever serves must not fail
            file.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")
        on_event(event)

    results = {"schema_version": SCHEMA_VERSION, **prepare(bench), "runs": runs}
    trackers = Trackers(config, out)
    wire = connect(greeter, note)
    reason = None  # broken off: sites wait for the server to come back
    try:
        folder.write(results)
        on_start(results, wire)
        _gather(wire, config, folder.missing(runs))
        for framework, seed in folder.missing(runs):
            with road(wire, framework) as remote:
                entry = run(config, framework, seed, out, bench, trackers.watching(on_round), None, remote)
            folder.add(results, entry)
            trackers.finished(entry)
        reason = ""
    except FedtrioError as error:
        reason = str(error)
        raise
    finally:
        wire.close() if reason is None else wire.finish(reason)
        trackers.close()
    return results


def _gather(wire: ServerWire, config: Config, todo: Collection[object]) -> None:
    """Wait for all sites; after the deadline `min_sites` are enough, if they are more than the one of the default.

    Where nothing is left to do, those who wait for the server shall hear of it.
    """
    patience = max(RETURN_S, config.deadline or 0.0) if config.deadline or not todo else None
    try:
        wire.wait_for(len(wire.sites), patience)
    except WireError:
        enough = len(wire.sites) if config.min_sites == 1 else config.min_sites
        if todo and len(wire.wait_for(0, 0)) < enough:
            raise


def _possible(config: Config) -> Config:
    """Without the yardstick that needs all data in one place; the sites are those that there are."""
    frameworks = [name for name in config.frameworks if not config.framework(name).pooled]
    if not frameworks:
        raise ConfigError("frameworks: centralized needs all data in one place; sites elsewhere can't run it")
    natural = {"partition": PartitionConfig(name="column"), "clients": len(config.wire.sites or [0])}
    changed = config.model_copy(update={"frameworks": frameworks, **natural})
    changed._base = config.base
    return changed


def _run_id(out: Path) -> str:
    """By which sites know the run again when the server was started anew."""
    path = out / "run_id"
    if not path.is_file():
        write_whole(path, secrets.token_hex(8).encode())
    return path.read_text(encoding="ascii")
