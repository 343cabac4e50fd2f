"""Advice: which framework suits the constraints, with which settings, why, and what would change the answer.

`advise_price` says what each of the settings of `advise_grid` costs, `advise_choice` chooses among them, and
`advise_text` puts it into words. Accuracies come from finished runs (`advise_measured`), or are unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ..bench import Bench
from ..config import Config
from ..report.units import memory_text, names_text
from . import advise_text as words
from . import profiles
from .advise_choice import (
    Barred,
    Candidate,
    Flip,
    Miss,
    Place,
    barred,
    flips,
    loosenings,
    passing,
    rank,
    set_limits,
)
from .advise_limits import Limits
from .advise_measured import Measured
from .advise_price import Priced, Pricer, Where
from .predict import Assumed

HOW = (
    "of each round and cost it is the site that spends most: bytes exact, operations counted, memory and time modelled"
)
BOUND = "bytes are an upper bound: "
UNLIKE = "costs are those of `model` at every site; name the sites' own in kd.models to have theirs"
CAUSAL = "in causal-lm the labels are the text itself, which the server sees where labels leave the site"
LOW = "the lower the cut, the more the activations show the server; split.least_cut is the lowest that is looked at"


def advise(
    config: Config,
    limits: Limits | None = None,
    where: Where | None = None,
    measured: Sequence[Measured] = (),
    assumed: Assumed | None = None,
    shape: Mapping[str, Any] | None = None,
    bench: Bench | None = None,
) -> dict[str, Any]:
    """The frameworks of a configuration in order, with the best settings of each, as `fedtrio advise --json` prints it.

    Costs are of one round, each that of the site which spends the most of it: bytes, operations, and modelled bytes of
    memory and seconds. `assumed` and `shape` are those of `predict`. `answer` is null where nothing fits.

    Raises ConfigError (also where the configuration has none of the three frameworks), DataError, ModelError.
    """
    return answer(Pricer(config, assumed, shape, bench), limits or Limits(), where or Where(), measured)


def answer(pricer: Pricer, limits: Limits, where: Where, measured: Sequence[Measured] = ()) -> dict[str, Any]:
    """The same, of one who has made predictions before: another question costs no other ones."""
    priced = pricer.priced(measured)
    if not pricer.public:
        limits = limits.model_copy(update={"no_public_set": True})
    candidates = [one.at(where) for one in priced]
    places, out = rank(candidates, limits), barred(candidates, limits)
    lifted = [] if places else loosenings(candidates, limits)
    turned = [*flips(candidates, limits), *_elsewhere(priced, limits, where)] if places else []
    told = {
        "answer": _answer(places),
        "order": words.order(any(place.level is not None for place in places), where),
        "where": asdict(where),
        "constraints": {key: getattr(limits, key) for key in set_limits(limits)},
        "looked_at": {name: sum(c.framework == name for c in candidates) for name in _names(candidates)},
        "predictions": pricer.predictions,
        "refused": pricer.refused,
        "ranking": [_placed(places, index) for index in range(len(places))],
        "ruled_out": [_barred(one, limits) for one in out],
        "flips": [_flip(flip, limits) for flip in turned],
        "tightest": None if places else _tightest(candidates, limits),
        "loosenings": [
            {**asdict(one), "leader": _of(one.leader), "words": words.loosening_text(one, limits)} for one in lifted
        ],
    }
    return told | {"notes": _notes(pricer, places, limits, bool(measured))}


def _elsewhere(priced: Sequence[Priced], limits: Limits, where: Where) -> list[Flip]:
    """Other devices and lines with which another framework would lead."""
    leader, found = rank([one.at(where) for one in priced], limits)[0].candidate, []
    for key, known in (("device", profiles.DEVICES), ("link", profiles.LINKS)):
        for name in known:
            places = rank([one.at(replace(where, **{key: name})) for one in priced], limits)
            if places and places[0].candidate.framework != leader.framework:
                found.append(Flip(key, name, places[0].candidate, True))
    return found


def _tightest(candidates: Sequence[Candidate], limits: Limits) -> dict[str, Any]:
    """The constraint that, looked at alone, the fewest settings keep."""
    kept = passing(candidates, limits)
    key = min(kept, key=lambda key: kept[key])
    return {"constraint": key, "kept_by": kept[key], "words": words.limit_text(key, limits)}


def _notes(pricer: Pricer, places: Sequence[Place], limits: Limits, measured: bool) -> list[str]:
    """What a reader should know beside the numbers."""
    assumed, found = pricer.assumed, []
    if not measured:
        found.append("accuracy is unknown: no run was named. fedtrio advise RUN-FOLDER uses what it measured")
    elif any(place.level is None for place in places):
        names = names_text(words.title(place.candidate) for place in places if place.level is None)
        found.append(f"accuracy is unknown for {names}: settings that were run do not fit, and these were not run")
    if assumed:
        found.append(
            f"data are assumed: {assumed.examples} examples of {assumed.tokens} tokens at each site, {assumed.classes} "
            f"classes, {assumed.public} public texts"
        )
    found += [HOW, *(BOUND + why for why in sorted(pricer.bounds))]
    if limits.unlike_models and not pricer.config.kd.models:
        found.append(UNLIKE)
    split = [place.candidate for place in places if place.candidate.framework == "split"]
    if split and pricer.config.task == "causal-lm" and "labels" in split[0].left:
        found.append(CAUSAL)
    if limits.server_memory is not None and places:
        held = ((words.title(p.candidate), p.candidate.costs.server_peak_bytes) for p in places)
        found.append("memory of the server: " + "; ".join(f"{name} {memory_text(size)}" for name, size in held))
    leaves = "; ".join(f"{words.title(p.candidate)} {names_text(sorted(p.candidate.left))}" for p in places)
    return [*found, *([LOW] if split else []), *([f"what leaves a site: {leaves}"] if leaves else [])]


# As dictionaries ---------------------------------------------------------------------------------------------------


def _names(candidates: Sequence[Candidate]) -> list[str]:
    return list(dict.fromkeys(candidate.framework for candidate in candidates))


def _of(candidate: Candidate) -> dict[str, Any]:
    """Framework and settings, for machines and for people."""
    return {
        "framework": candidate.framework,
        "settings": dict(candidate.settings),
        "words": words.settings_text(candidate),
    }


def _answer(places: Sequence[Place]) -> dict[str, Any] | None:
    if not places:
        return None
    first = places[0].candidate
    return {**_of(first), "command": words.command(first), "sentence": words.answer_text(places)}


def _placed(places: Sequence[Place], index: int) -> dict[str, Any]:
    candidate, scored = places[index].candidate, places[index].candidate.measured
    score = None
    if scored:
        score = {"key": scored.score.key, "mean": scored.mean, "by_seed": dict(scored.scores), "point": scored.point}
    return {
        **_of(candidate),
        "costs": asdict(candidate.costs),
        "leaves_site": sorted(candidate.left),
        "level": places[index].level,
        "score": score,
        "reason": words.reason(places, index),
        "command": words.command(candidate),
    }


def _barred(one: Barred, limits: Limits) -> dict[str, Any]:
    def missed(miss: Miss) -> dict[str, Any]:
        by_degrees = {"limit": miss.limit, "needs": miss.needs, "times": miss.times} if miss.needs else {}
        return {"constraint": miss.key, **by_degrees}

    return {
        "framework": one.framework,
        "by": list(one.by),
        "nearest": {**_of(one.nearest), "costs": asdict(one.nearest.costs), "misses": [*map(missed, one.misses)]},
        "words": words.barred_text(one, limits),
    }


def _flip(flip: Flip, limits: Limits) -> dict[str, Any]:
    return {
        "constraint": flip.key,
        "to": flip.to,
        "at": flip.at,
        "loosens": flip.loosens,
        "leader": _of(flip.leader),
        "words": words.flip_text(flip, limits),
    }
