"""Which wire carries the messages, what it suits, and whether it can be used."""

from __future__ import annotations

from ..config import Config
from .finding import Finding, Found

SUITS = {
    "loopback": "all sites in one process, one after the other; suits a few sites, or one GPU",
    "process": "sites in worker processes; suits one machine of several cores",
    "ray": "sites in workers of a Ray cluster; suits hundreds of sites, several GPUs or machines",
    "https": "sites dial in from their own machines; suits real ones, whose data stay there",
}


def wire(config: Config, serving: bool) -> Found:
    """The wire of a run. ConfigError where its package is missing or too little is there; WireError for no cluster."""
    name = "https" if serving else config.wire.name
    room = _room_in_ray(config) if name == "ray" else ""
    yield Finding("wire", "ok", f"{name}: {SUITS[name]}{room}")


def _room_in_ray(config: Config) -> str:
    from ..wires.ray import connect, package, room_for, said

    package()
    if config.wire.address is None:
        return "; a cluster of this machine will be started"
    asked = config.wire.asks(config.threads)
    return (
        f"; {config.wire.address} has room for {room_for(connect(config.wire.address), asked)} with {said(asked)} each"
    )
