"""Devices and lines by name, and what a run would take on them: seconds and joules.

All numbers of devices are orders of magnitude, for planning: what a device sustains on matrix products of this kind,
not what its data sheet promises. Measure your own and give them as numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Device:
    """What computes: FLOPs a second that it sustains, FLOPs a joule, and bytes of memory for the model."""

    flops_per_second: float
    flops_per_joule: float
    memory_bytes: float
    source: str = "own numbers"


@dataclass(frozen=True)
class Link:
    """A site's line: bytes a second each way, seconds of a round trip, and joules for each byte at the site."""

    up_bytes_per_second: float
    down_bytes_per_second: float
    round_trip_seconds: float
    joules_per_byte: float
    source: str = "own numbers"

    @property
    def bytes_per_second(self) -> float:
        """Of as many bytes up as down."""
        return 2 / (1 / self.up_bytes_per_second + 1 / self.down_bytes_per_second)


GUESS = "order of magnitude"
DEVICES = {
    "phone": Device(5e10, 2e10, 4 * 2**30, f"{GUESS}: CPU of a phone, 2.5 W"),
    "laptop": Device(2e11, 1e10, 8 * 2**30, f"{GUESS}: CPU of a laptop, 20 W"),
    "edge-gpu": Device(2e12, 1e11, 16 * 2**30, f"{GUESS}: embedded GPU of 20 W"),
    "hospital-server": Device(5e13, 1.5e11, 48 * 2**30, f"{GUESS}: one GPU of 300 W, a third of its peak"),
    "datacenter-gpu": Device(3e14, 4e11, 80 * 2**30, f"{GUESS}: one GPU of 700 W, a third of its bf16 peak"),
}
LINKS = {
    "4g": Link(10e6 / 8, 30e6 / 8, 0.05, 1e-6, f"{GUESS}: 10 Mbit/s up, 30 down"),
    "5g": Link(50e6 / 8, 200e6 / 8, 0.02, 3e-7, f"{GUESS}: 50 Mbit/s up, 200 down"),
    "dsl": Link(10e6 / 8, 50e6 / 8, 0.03, 1e-6, f"{GUESS}: 10 Mbit/s up, 50 down; 10 W of a modem"),
    "100mbit": Link(100e6 / 8, 100e6 / 8, 0.01, 1e-7, "the rate by name; the rest an order of magnitude"),
    "1gbit": Link(1e9 / 8, 1e9 / 8, 0.005, 1e-8, "the rate by name; the rest an order of magnitude"),
}


def device(text: str) -> Device:
    """A profile by name, or `flops_per_second=2e11,flops_per_joule=1e10,memory_bytes=8e9`; laptop for what is left out.

    Raises ConfigError.
    """
    return _of(text, "device", DEVICES, "laptop")


def link(text: str) -> Link:
    """A profile by name, or `up_bytes_per_second=1e6,…`; 100mbit for what is left out. Raises ConfigError."""
    return _of(text, "link", LINKS, "100mbit")


def _of(text: str, what: str, known: Mapping[str, Any], usual: str) -> Any:
    if text.lower() in known:
        return known[text.lower()]
    names = [name for name in vars(known[usual]) if name != "source"]
    if "=" not in text:
        near = did_you_mean(text.lower(), known)
        raise ConfigError(
            f"{what} {text!r} is unknown{near} (there are {', '.join(known)}, or {names[0]}=… of your own)"
        )
    given = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name.strip() not in names:
            near = did_you_mean(name.strip(), names) or did_you_mean(f"{name.strip()}_per_second", names)
            raise ConfigError(f"{what}: {name.strip()!r} is no number of it (there are {', '.join(names)}){near}")
        try:
            given[name.strip()] = float(number)
        except ValueError:
            raise ConfigError(f"{what}: {name.strip()}={number!r} is no number") from None
        if not 0 < given[name.strip()] < float("inf"):
            raise ConfigError(f"{what}: {name.strip()} must be above 0, not {number}")
    return type(known[usual])(**{name: getattr(known[usual], name) for name in names} | given)


def timed(entry: Mapping[str, Any], at: Device, over: Link, server: Device) -> dict[str, float]:
    """Seconds of a round and joules of its slowest site, of an entry of `predict`; all modelled.

    T = max_k [F_k/φ_k + up_k/R↑ + down_k/R↓ + RTT·exchanges_k] + F_s/φ_s, and of a site E = F/(FLOPs a joule) + bytes ·
    J/byte. A site and the server never work at the same time here, so a run that overlaps them is faster.
    """
    rounds = max(1, int(entry["rounds"]))
    sites = [
        {
            "compute_seconds": site["client_flops"] / at.flops_per_second / rounds,
            "transfer_seconds": (
                site["bytes_up"] / over.up_bytes_per_second + site["bytes_down"] / over.down_bytes_per_second
            )
            / rounds,
            "latency_seconds": over.round_trip_seconds * site["messages"] / 2 / rounds,
            "joules": (
                site["client_flops"] / at.flops_per_joule
                + (site["bytes_up"] + site["bytes_down"]) * over.joules_per_byte
            )
            / rounds,
        }
        for site in entry["sites"]
    ]
    parts = ("compute_seconds", "transfer_seconds", "latency_seconds")
    slowest = max(sites, key=lambda site: sum(site[part] for part in parts))
    waiting = entry["server_flops"] / server.flops_per_second / rounds
    total = sum(slowest[part] for part in parts) + waiting
    return {
        "seconds_per_round": total,
        **{part: slowest[part] for part in parts},
        "server_seconds": waiting,
        "joules_per_site_and_round": max(site["joules"] for site in sites),
    }
