"""Which settings of which framework: a pure function of candidates, limits and scores, so that it can be asked again.

The order of candidates, where no accuracy is known: who gives up the least of the configuration, and among equals who
is quickest, then sends least. It does not depend on the limits, so a tighter limit can only take candidates away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .advise_limits import KINDS, PARTS, Costs, Kind, Limits
from .advise_measured import Measured, levels


@dataclass(frozen=True)
class Candidate:
    """One framework at one choice of settings.

    `reduced` is how often what trains or is sent was halved in number against the configuration, `rounded` how often in
    bits, up and down added up. `left` are the parts that leave a site.
    """

    framework: str
    settings: Mapping[str, Any]
    reduced: float
    rounded: float
    costs: Costs
    left: Collection[str]
    unlike: bool  # whether sites may hold models of different shapes
    public: bool  # whether it needs a public set
    measured: Measured | None = None

    @property
    def given_up(self) -> tuple[float, float]:
        """Numbers first, then bits."""
        return round(self.reduced, 6), round(self.rounded, 6)

    @cached_property
    def cost(self) -> tuple[Any, ...]:
        """The smaller the better: seconds, bytes, operations, memory."""
        c = self.costs
        spent = c.seconds, c.bytes_up + c.bytes_down, c.flops, c.peak_bytes
        return (*spent, self.framework, str(sorted(self.settings.items())))

    @cached_property
    def order(self) -> tuple[Any, ...]:
        """The smaller the better: what is given up, then the cost."""
        return (*self.given_up, *self.cost)


@dataclass(frozen=True)
class Miss:
    """A limit that is not kept, and the amount that is needed; None for what can't be lifted by degrees."""

    key: str
    limit: float | None = None
    needs: float | None = None

    @property
    def times(self) -> float:
        """How many times the limit is needed."""
        return self.needs / self.limit if self.limit and self.needs else math.inf


def misses(candidate: Candidate, limits: Limits) -> list[Miss]:
    """All limits that a candidate does not keep."""
    found = [Miss(key) for key, parts in PARTS.items() if getattr(limits, key) and parts & set(candidate.left)]
    found += [Miss("unlike_models")] * (limits.unlike_models and not candidate.unlike)
    found += [Miss("no_public_set")] * (limits.no_public_set and candidate.public)
    for kind in KINDS:
        limit, needs = getattr(limits, kind.key), getattr(candidate.costs, kind.cost)
        if limit is not None and needs > limit:
            found.append(Miss(kind.key, limit, needs))
    return found


@dataclass(frozen=True)
class Place:
    """A framework's best settings; `level` counts groups that can't be told apart by accuracy, None: unknown."""

    candidate: Candidate
    level: int | None


def rank(candidates: Sequence[Candidate], limits: Limits) -> list[Place]:
    """The frameworks that fit, each at its best settings, best first.

    By accuracy where it was measured, and those that can't be told apart by cost; after them those of which only the
    cost is known.
    """
    return _places([c for c in candidates if not misses(c, limits)])


def _places(fitting: Sequence[Candidate]) -> list[Place]:
    options: dict[str, list[Candidate]] = {}
    for candidate in fitting:
        options.setdefault(candidate.framework, []).append(candidate)
    chosen = [_best(own) for own in options.values()]
    known = {id(c.measured): c for c in chosen if c.measured}
    groups = levels([c.measured for c in chosen if c.measured])
    places = []
    for level, group in enumerate(groups):
        places += [Place(c, level) for c in sorted((known[id(m)] for m in group), key=lambda c: c.cost)]
    return places + [Place(c, None) for c in sorted((c for c in chosen if not c.measured), key=lambda c: c.order)]


def _best(options: Sequence[Candidate]) -> Candidate:
    """Of one framework: of what was measured the best, and the cheapest that can't be told from it; else the order."""
    if not (groups := levels([c.measured for c in options if c.measured])):
        return min(options, key=lambda c: c.order)
    top = {id(measured) for measured in groups[0]}
    return min((c for c in options if id(c.measured) in top), key=lambda c: c.cost)


# What would flip the answer ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flip:
    """A change of one constraint after which another framework leads.

    `to` is the new value as it would be written, the nearest of three digits beyond `at`: the answer changes once the
    limit reaches `at` where it `loosens`, and once it is below where not. `times` is the change as a factor.
    """

    key: str
    to: str | bool
    leader: Candidate
    loosens: bool
    at: float | None = None
    times: float = math.inf


def flips(candidates: Sequence[Candidate], limits: Limits) -> list[Flip]:
    """For each constraint the smallest change, either way, after which another framework leads; by asking again."""
    now = rank(candidates, limits)
    if not now:
        return []
    leader, found = now[0].candidate, []
    for kind in KINDS:
        found += [flip for up in (True, False) if (flip := _moved(candidates, limits, kind, up, leader))]
    for key in (*PARTS, "unlike_models", "no_public_set"):
        was = getattr(limits, key)
        places = rank(candidates, limits.model_copy(update={key: not was}))
        if places and places[0].candidate.framework != leader.framework:
            found.append(Flip(key, not was, places[0].candidate, loosens=was))
    return sorted(found, key=lambda flip: flip.times)


def _moved(candidates: Sequence[Candidate], limits: Limits, kind: Kind, up: bool, leader: Candidate) -> Flip | None:
    """With one limit lifted until another framework leads, or lowered until then."""
    limit = getattr(limits, kind.key)
    free = limits.model_copy(update={kind.key: None})
    pool = [c for c in candidates if not misses(c, free)]
    base = limit if limit is not None else getattr(leader.costs, kind.cost)

    def leads(allowed: Callable[[float], bool]) -> Candidate | None:
        places = _places([c for c in pool if allowed(getattr(c.costs, kind.cost))])
        return places[0].candidate if places else None

    for at in sorted(_turns(pool, kind.cost), reverse=not up):
        if at <= 0 or (up and (limit is None or at <= limit)) or (not up and limit is not None and at > limit):
            continue
        other = leads(lambda cost: cost <= at) if up else leads(lambda cost: cost < at)  # noqa: B023
        if other is None or other.framework == leader.framework:
            continue
        to = kind.unit.above(at) if up else kind.unit.below(at)
        moved = kind.unit.read(to)
        written = leads(lambda cost: cost <= moved)  # noqa: B023
        if written is not None and written.framework != leader.framework:
            return Flip(kind.key, to, written, up, at, max(moved / base, base / moved))
    return None


def _turns(pool: Sequence[Candidate], cost: str) -> set[float]:
    """The limits on this cost at which a framework's best settings change, as its better ones come to fit."""
    best: dict[str, tuple[Any, ...]] = {}
    found = set()
    for candidate in sorted(pool, key=lambda c: (getattr(c.costs, cost), c.order)):
        before = best.get(candidate.framework)
        if candidate.measured or before is None or candidate.order < before:
            best[candidate.framework] = min(candidate.order, before or candidate.order)
            found.add(getattr(candidate.costs, cost))
    return found


# What does not fit ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Barred:
    """A framework without settings that fit: the limits that rule out all of them, and the nearest of its settings."""

    framework: str
    by: tuple[str, ...]
    nearest: Candidate
    misses: tuple[Miss, ...]


def barred(candidates: Sequence[Candidate], limits: Limits) -> list[Barred]:
    """The frameworks that are ruled out. `by` is empty where no single limit does it, but several together."""
    found = []
    for framework in dict.fromkeys(c.framework for c in candidates):
        own = [(c, misses(c, limits)) for c in candidates if c.framework == framework]
        if all(missed for _, missed in own):
            keys = dict.fromkeys(miss.key for _, missed in own for miss in missed)
            by = tuple(key for key in keys if all(key in {miss.key for miss in missed} for _, missed in own))
            nearest, missed = min(own, key=lambda pair: _distance(*pair))
            found.append(Barred(framework, by, nearest, tuple(missed)))
    return found


def _distance(candidate: Candidate, missed: Sequence[Miss]) -> tuple[Any, ...]:
    """How far away: what can't be lifted by degrees, then the product of the factors, then the order."""
    hard = sum(miss.needs is None for miss in missed)
    return hard, round(math.prod(miss.times for miss in missed if miss.needs), 6), candidate.order


@dataclass(frozen=True)
class Loosening:
    """One limit that, lifted alone, lets something in: to which amount (None: given up), and what fits then."""

    key: str
    to: str | None
    times: float
    leader: Candidate


def loosenings(candidates: Sequence[Candidate], limits: Limits) -> list[Loosening]:
    """Where nothing fits: each limit that alone would have to give way, the least change first."""
    found = []
    for key in set_limits(limits):
        lifted = limits.model_copy(update={key: False if getattr(limits, key) is True else None})
        fitting = [c for c in candidates if not misses(c, lifted)]
        if not fitting:
            continue
        kind = next((kind for kind in KINDS if kind.key == key), None)
        if kind is None:
            found.append(Loosening(key, None, math.inf, rank(fitting, lifted)[0].candidate))
            continue
        least = min(getattr(c.costs, kind.cost) for c in fitting)
        to = kind.unit.above(least)
        moved = limits.model_copy(update={key: kind.unit.read(to)})
        found.append(Loosening(key, to, least / getattr(limits, key), rank(fitting, moved)[0].candidate))
    return sorted(found, key=lambda one: one.times)


def set_limits(limits: Limits) -> list[str]:
    """The keys of the constraints that were given."""
    return [key for key, value in limits if value not in (None, False)]


def passing(candidates: Sequence[Candidate], limits: Limits) -> dict[str, int]:
    """How many candidates keep each constraint that was given, looked at alone."""
    alone: Callable[[str], Limits] = lambda key: Limits().model_copy(update={key: getattr(limits, key)})  # noqa: E731
    return {key: sum(not misses(c, alone(key)) for c in candidates) for key in set_limits(limits)}
