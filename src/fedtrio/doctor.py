"""What `fedtrio doctor` looks at before anything runs: each check says what it found, and a fault its cause and fix.

The cheap checks come first: versions, certificates and the way to the server need no torch. Nothing is trained, and no
weight is loaded.
"""

from __future__ import annotations

import json
import os
import platform
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from .checks.finding import Finding, Found, Seen
from .errors import ConfigError, FedtrioError

if TYPE_CHECKING:
    from .config import Config, SiteConfig

PACKAGES = ("fedtrio", "torch", "transformers", "peft")
FILES = {"data": 3, "model": 4}  # exit codes where the system refuses a file


@dataclass(frozen=True)
class Patient:
    """What is to be checked; `folder` is where a run or a site's memory will be kept."""

    config: Path | None = None
    settings: Sequence[str] = ()
    certs: Path | None = None
    server: str | None = None
    site: bool = False
    folder: Path = Path("runs")


def examine(patient: Patient) -> Found:
    """All findings, each as soon as it is known. What one check found wrong keeps no other from being made."""
    yield from _safe("versions", _versions())
    if patient.certs is not None or patient.server is not None:
        from .checks import network

        if patient.certs is not None:
            yield from _safe("certificates", network.certificates(patient.certs, patient.site))
        if patient.server is not None:
            yield from _safe("server", network.server(patient.server, patient.certs))
        if patient.config is None:
            yield Finding("configuration", "warning", "no file was named, so data, model and room are not checked")
            return
    yield from _safe("configuration", _site(patient) if patient.site else _server_or_all(patient))


def _safe(check: str, findings: Found) -> Found:
    """The findings of one check, and an error that ends it as a fault."""
    try:
        yield from findings
    except FedtrioError as error:
        yield Finding(check, "fault", " ".join(str(error).split("\n")), error.exit_code)
    except OSError as error:
        yield Finding(check, "fault", f"{error.filename}: {error.strerror}", FILES.get(check, ConfigError.exit_code))


def _site(patient: Patient) -> Found:
    """A site's own configuration, data and model; what the server will say is not known. ConfigError."""
    if patient.config is None:
        raise ConfigError("name the site's YAML file: fedtrio doctor my-site.yaml --site")
    from .checks import data
    from .config import Config
    from .config_file import load_site_config

    own: SiteConfig = load_site_config(patient.config, patient.settings)
    yield Finding("configuration", "ok", f"{patient.config}: a site's, device {own.device}")
    seen = Seen()
    yield from _safe("data", data.site_data(own, seen))
    model = own.kd_model or own.model or "nano"
    config = Config(task=seen.task, model=model, device=own.device, threads=own.threads)
    config._base = own.base
    if own.model is None:
        yield Finding("model", "ok", "the server names it; to check one that lies here: --set model=<folder or Hub id>")
    yield from _machine(patient, config.resolved(), seen, (own.kd_model or own.model) is not None)


def _server_or_all(patient: Patient) -> Found:
    """A server's configuration, or that of a comparison on this machine. ConfigError, ModelError for the device."""
    from .checks import data, wire
    from .config_file import load_config

    config = load_config(patient.config, patient.settings).resolved()
    serving = config.wire.sites is not None or patient.certs is not None
    yield from _safe("configuration", _configuration(patient, config, serving))
    yield from _safe("wire", wire.wire(config, serving))
    seen = Seen(config.task, len(config.data.labels or ()) or 2, 0 if serving else config.clients)
    yield from _safe("data", data.server_data(config, seen) if serving else data.all_data(config, seen))
    yield from _machine(patient, config, seen, True)


def _machine(patient: Patient, config: Config, seen: Seen, known: bool) -> Found:
    """The model, where it is known, and room for it."""
    from .checks import model, room

    if known:
        yield from _safe("model", model.examine_model(config, seen))
    yield from _safe("disk", room.disk(patient.folder, len(config.frameworks) * len(config.seeds), seen))
    if seen.size is not None:
        yield from _safe("memory", room.memory(config, seen.size, several=seen.sites > 1))


def _versions() -> Found:
    """Python and packages against what fedtrio asks for. ConfigError for what is missing or too old."""
    from packaging.requirements import Requirement

    for line in metadata.requires("fedtrio") or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            raise ConfigError(f"{wanted.name} is not installed; pip install '{wanted}'") from None
        if not wanted.specifier.contains(found, prereleases=True):
            raise ConfigError(f"{wanted.name} is {found}, needed is {wanted.specifier}; pip install '{wanted}'")
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    yield Finding("versions", "ok", f"python {platform.python_version()}, {shown}")


def _configuration(patient: Patient, config: Config, serving: bool) -> Found:
    """Sites, quorum and port. ConfigError."""
    name = patient.config or "the built-in demo"
    rounds = "1 round" if config.rounds == 1 else f"{config.rounds} rounds"
    what = f"{name}: {config.task}, {', '.join(config.frameworks)}; {rounds}, device {config.device}"
    if not serving:
        yield Finding("configuration", "ok", what)
        return
    sites, wire = config.wire.sites, config.wire
    if not sites:
        raise ConfigError("wire.sites is missing: list the sites' names, as their certificates say them")
    if config.min_sites > len(sites):
        raise ConfigError(f"min_sites is {config.min_sites}, but wire.sites lists {len(sites)}: no round could count")
    if wire.port:
        try:
            family = socket.AF_INET6 if ":" in wire.host else socket.AF_INET
            socket.create_server((wire.host, wire.port), family=family).close()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {wire.host}:{wire.port}: {os.strerror(error.errno or 0)}; stop what holds it (a "
                "server that already runs, perhaps), or choose another wire.port"
            ) from error
    yield Finding("configuration", "ok", f"{what}; sites {', '.join(sites)} at port {wire.port or 'any'}")
    if config.deadline is None:
        text = "deadline is null: one slow site holds up every round, however long it takes; set it to seconds"
        yield Finding("configuration", "warning", text)


def summary(findings: Sequence[Finding]) -> str:
    """The last line."""
    counts = Counter(finding.state for finding in findings)
    shown = [f"{counts[state]} {state}{'s' * (counts[state] > 1)}" for state in ("fault", "warning") if counts[state]]
    return " and ".join(shown) or "all is well"


def exit_code(findings: Sequence[Finding]) -> int:
    """That of the first fault, or 0."""
    return next((finding.code for finding in findings if finding.state == "fault"), 0)


def as_json(findings: Sequence[Finding]) -> str:
    """An object with all findings."""
    found = [finding.facts() for finding in findings]
    return json.dumps({"exit_code": exit_code(findings), "findings": found}, ensure_ascii=False, indent=1)
