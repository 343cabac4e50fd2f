"""What each of the settings of `advise_grid` costs a site in a round, by `predict`; and its score, where it was run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..bench import Bench
from ..config import Config
from ..errors import ConfigError, ModelError
from . import profiles
from .advise_choice import Candidate
from .advise_grid import Option, applied, options, same_result
from .advise_limits import Costs
from .advise_measured import Measured, differing
from .predict import Assumed, model_of, predict

THREE = ("fedllm", "kd", "split")
Entry = dict[str, Any]


@dataclass(frozen=True)
class Where:
    """The devices of sites and server, and the line between them: names of profiles, or numbers of one's own."""

    device: str = "laptop"
    link: str = "4g"
    server: str = "datacenter-gpu"

    def __post_init__(self) -> None:
        """Raises ConfigError for what is neither a profile nor numbers."""
        _ = self._profiles

    @property
    def _profiles(self) -> tuple[profiles.Device, profiles.Link, profiles.Device]:
        return profiles.device(self.device), profiles.link(self.link), profiles.device(self.server)

    def seconds(self, entry: Entry) -> float:
        """Of a round, modelled."""
        return profiles.timed(entry, *self._profiles)["seconds_per_round"]


@dataclass(frozen=True)
class Priced:
    """An option of a framework, and what each of its rounds that were looked at costs."""

    framework: str
    option: Option
    rounds: Sequence[Entry]
    unlike: bool
    measured: Measured | None = None

    def at(self, where: Where) -> Candidate:
        """As a candidate; of each cost the largest of all sites and rounds."""
        sites = [site for entry in self.rounds for site in entry["sites"]]
        most = {key: float(max(site[key] for site in sites)) for key in _COSTS}
        seconds = max(map(where.seconds, self.rounds))
        server = float(max(entry["server_peak_bytes"] for entry in self.rounds))
        spent = {_COSTS[key]: value for key, value in most.items()}
        costs = Costs(**spent, seconds=seconds, server_peak_bytes=server)
        left = {part for entry in self.rounds for part in entry["left_sites"]}
        given = self.option.settings, self.option.reduced, self.option.rounded
        return Candidate(self.framework, *given, costs, left, self.unlike, self.framework == "kd", self.measured)


_COSTS = {
    "bytes_up": "bytes_up",
    "bytes_down": "bytes_down",
    "client_peak_bytes": "peak_bytes",
    "client_flops": "flops",
}


@dataclass
class Pricer:
    """Predictions of one configuration, each made once."""

    config: Config
    assumed: Assumed | None = None
    shape: Mapping[str, Any] | None = None
    bench: Bench | None = None
    refused: int = 0  # options that the configuration does not allow
    bounds: set[str] = field(default_factory=set)  # why some bytes are upper bounds
    _made: dict[str, list[Entry] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = self.config.resolved()
        if self.assumed is None:
            self.bench = self.bench or Bench(self.config)

    @property
    def predictions(self) -> int:
        """How many were made."""
        return sum(entries is not None for entries in self._made.values())

    @property
    def public(self) -> int:
        """The number of public texts."""
        return len(self.bench.encoded["public"]) if self.bench else (self.assumed or Assumed()).public

    def priced(self, measured: Sequence[Measured] = ()) -> list[Priced]:
        """All options of all frameworks, with scores where they were run. Raises ConfigError, DataError, ModelError."""
        if not (frameworks := [name for name in self.config.frameworks if name in THREE]):
            raise ConfigError(f"frameworks names none of {', '.join(THREE)}, and so leaves no choice")
        found = []
        for framework in frameworks:
            own = [one for one in measured if one.framework == framework]
            runs = [(differing(self.config.model_dump(mode="json"), one.config, framework), one) for one in own]
            grid = [*self._grid(framework), *(Option(settings) for settings, _ in runs)]
            seen = set()
            for option in grid:
                if (name := _named(option.settings)) in seen:
                    continue
                seen.add(name)
                if (rounds := self._rounds(framework, option)) is None:
                    self.refused += 1
                    continue
                unlike = framework == "kd"
                found.append(Priced(framework, option, rounds, unlike, self._score(framework, option, runs)))
        return found

    def _grid(self, framework: str) -> list[Option]:
        labels = len(self.bench.corpus.labels) if self.bench else (self.assumed or Assumed()).classes
        model = model_of(self.config, labels, self.shape)
        return list(options(self.config, framework, model.depth, model.classes, self.public))

    def _score(
        self, framework: str, option: Option, runs: Sequence[tuple[dict[str, Any], Measured]]
    ) -> Measured | None:
        """Scores of a run with these settings, or with some that end in the same model."""
        wanted = same_result(self.config, framework, option.settings)
        return next((one for settings, one in runs if same_result(self.config, framework, settings) == wanted), None)

    def _rounds(self, framework: str, option: Option) -> list[Entry] | None:
        """The costs of an option, put together from the predictions of what each cost depends on."""
        on = {what: option.on(what) for what in ("up", "down", "work")}
        both = {key: value for key, value in on["work"].items() if key in on["up"]}
        parts = {what: self._predicted(framework, settings) for what, settings in {**on, "both": both}.items()}
        if applied(self.config, framework, option.settings) is None:
            return None
        if None in parts.values():  # what stands for this option does not go together, and it does
            parts = dict.fromkeys(parts, self._predicted(framework, option.settings))
        found = [entries for entries in parts.values() if entries is not None]
        return [_joined(*entries) for entries in zip(*found, strict=True)] if len(found) == len(parts) else None

    def _predicted(self, framework: str, settings: Mapping[str, Any]) -> list[Entry] | None:
        """The first round, and the second where it costs something else; None where settings don't go together."""
        key = f"{framework} {_named(settings)}"
        if key not in self._made:
            config = applied(self.config, framework, settings)
            try:
                self._made[key] = self._first_rounds(config) if config else None
            except (ConfigError, ModelError):
                if not settings:
                    raise
                self._made[key] = None
        return self._made[key]

    def _first_rounds(self, config: Config) -> list[Entry]:
        entries = []
        for rounds in range(1, min(config.rounds, 2) + 1):
            (entry,) = predict(config.model_copy(update={"rounds": rounds}), self.assumed, self.shape, self.bench)
            self.bounds |= set(entry["bounds"])
            entries.append(entry)
        return entries if len(entries) < 2 else [entries[0], _less(entries[1], entries[0])]


def _named(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


_SUMS = ("bytes_up", "bytes_down", "messages", "client_flops")


def _less(both: Entry, first: Entry) -> Entry:
    """The second round alone."""
    before = {site["name"]: site for site in first["sites"]}
    sites = [
        {**site, **{key: site[key] - before.get(site["name"], {}).get(key, 0) for key in _SUMS}}
        for site in both["sites"]
    ]
    return {**both, "rounds": 1, "sites": sites, "server_flops": both["server_flops"] - first["server_flops"]}


def _joined(up: Entry, down: Entry, work: Entry, both: Entry) -> Entry:
    """Bytes up of one prediction, bytes down of another, all else of a third.

    The server's memory is that of `work`, and what `up` makes it hold beside: `up` less `both`, which has the settings
    that the two share.
    """
    sites = [
        {**w, "bytes_up": u["bytes_up"], "bytes_down": d["bytes_down"], "messages": u["messages"]}
        for u, d, w in zip(up["sites"], down["sites"], work["sites"], strict=True)
    ]
    server = work["server_peak_bytes"] + up["server_peak_bytes"] - both["server_peak_bytes"]
    return {**work, "sites": sites, "left_sites": up["left_sites"], "server_peak_bytes": server}
