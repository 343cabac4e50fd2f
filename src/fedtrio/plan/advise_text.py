"""Advice in words: settings, reasons, what is ruled out and what would flip the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ..report.tables import TITLES, Score
from ..report.units import bytes_text, count_text, factor_text, flops_text, memory_text, names_text, seconds_text
from .advise_choice import Barred, Candidate, Flip, Loosening, Miss, Place
from .advise_limits import KINDS, Costs, Limits
from .advise_measured import Gap, gap
from .advise_price import Where

BROKEN = {
    "labels_stay": "sends labels",
    "activations_stay": "sends activations",
    "logits_stay": "sends logits",
    "parameters_stay": "sends adapters",
    "unlike_models": "averages adapters, which must be alike at all sites",
    "no_public_set": "needs texts that all parties may see",
}


def title(candidate: Candidate) -> str:
    """The framework's name."""
    return TITLES[candidate.framework]


def settings_text(candidate: Candidate) -> str:
    """What differs from the configuration, in the field's words."""
    words = [_setting(key, value) for key, value in candidate.settings.items() if key != "kd.logits_down"]
    if "kd.logits" in candidate.settings:
        words[-1] += " up" if "kd.logits_down" in candidate.settings else " both ways"
    return ", ".join(words) or "as configured"


def _setting(key: str, value: Any) -> str:
    match key, value:
        case "lora.r", _:
            return f"rank {value}"
        case "split.cut", _:
            return f"cut {value}"
        case "split.labels", _:
            return "labels and head at the site" if value == "client" else "labels and head at the server"
        case "kd.public_per_round", _:
            return f"{count_text(value)} public texts a round"
        case "kd.logits", _:
            return f"logits {logits_text(value)}"
        case "wire.up" | "wire.down", Mapping() if len({*value.values()}) > 1:
            return f"{key[5:]} " + names_text(f"{codec} for {use}" for use, codec in value.items())
        case "wire.up" | "wire.down", Mapping():
            return f"{next(iter(value.values()))} {key[5:]}"
        case "wire.up" | "wire.down", _:
            return f"{value} {key[5:]}"
    return f"{key}={value}"


def logits_text(codec: str) -> str:
    """`top-8 in fp16` of `topk:8:logits+fp16`."""
    first, _, rest = codec.partition("+")
    name, *words = first.split(":")
    if name != "topk":
        return f"in {codec}" if codec != "none" else "in full"
    return f"top-{words[0]}" + (f" in {rest}" if rest else "")


def command(candidate: Candidate) -> list[str]:
    """The arguments with which `fedtrio compare` runs it."""
    import json

    given = {"frameworks": [candidate.framework], **candidate.settings}
    texts = {
        key: value if isinstance(value, str) else json.dumps(value).replace('"', "") for key, value in given.items()
    }
    return [word for key, value in texts.items() for word in ("--set", f"{key}={value}")]


def costs_cells(costs: Costs) -> dict[str, str]:
    """Of one round at the site that spends the most."""
    return {
        "Up": bytes_text(costs.bytes_up),
        "Down": bytes_text(costs.bytes_down),
        "Compute": flops_text(costs.flops),
        "Memory": memory_text(costs.peak_bytes),
        "Round": seconds_text(costs.seconds),
    }


def order(measured: bool, where: Where) -> str:
    """By what frameworks are ranked."""
    costs = f"the seconds of a round on {where.device} over {where.link} (modelled), then the bytes"
    if measured:
        return f"By accuracy where it was measured, and those too close to call by {costs}; those not run stand last."
    return f"By cost alone: who gives up least of the configuration, then {costs}."


def answer_text(places: Sequence[Place]) -> str:
    """The answer in two sentences."""
    said = [f"{_named(place.candidate)}: {reason(places, index)}." for index, place in enumerate(places[:2])]
    return " Next is ".join(said)


def _named(candidate: Candidate) -> str:
    scored = candidate.measured
    return f"{title(candidate)}, {settings_text(candidate)}" + (
        f" ({scored.score.text(scored.mean)})" if scored else ""
    )


# Reasons -------------------------------------------------------------------------------------------------------------


def reason(places: Sequence[Place], index: int) -> str:
    """Why a framework stands where it does: against the one above it, the first against the one below."""
    own, before = places[index], places[index - 1] if index else None
    if own.level is not None:
        return _by_score(places, own)
    if before is not None and before.level is not None:
        return "its accuracy is unknown, as it was not run at settings that fit"
    if before is not None:
        return _behind(own.candidate, before.candidate)
    fits = (
        "gives up the least of the configuration" if any(own.candidate.given_up) else "fits without giving up anything"
    )
    if len(places) == 1 or own.candidate.given_up != places[1].candidate.given_up:
        return fits
    seconds = own.candidate.costs.seconds
    shortest = seconds < places[1].candidate.costs.seconds
    return f"{fits}, in the shortest round ({seconds_text(seconds)})" if shortest else fits


def _behind(own: Candidate, above: Candidate) -> str:
    if own.given_up == above.given_up:
        return _slower(own, above)
    shorter = own.costs.seconds < above.costs.seconds
    return f"gives up more, in a {'shorter' if shorter else 'longer'} round ({seconds_text(own.costs.seconds)})"


def _slower(own: Candidate, above: Candidate) -> str:
    times, seconds = own.costs.seconds / above.costs.seconds, seconds_text(own.costs.seconds)
    if times == 1:
        return "its round is as long, and it sends more"
    longer = f"{factor_text(times)}× as long" if times >= 1.05 else "a little longer"
    return f"its round is {longer} ({seconds})"


def _by_score(places: Sequence[Place], place: Place) -> str:
    own = place.candidate.measured
    assert own is not None
    if own.mean is None:
        return f"ended without a finite {own.score.key}"
    group = [p.candidate for p in places if p.level == place.level]
    if len(group) > 1:
        first = place.candidate is group[0]
        others = group[1:] if first else group[:1]
        found = max((gap(own, m) for c in others if (m := c.measured)), key=lambda g: abs(g.by))
        close = f"too close to call with {names_text(map(title, others))} ({gap_text(found, own.score)})"
        return f"{close}, and the quicker one" if first else f"{close}; {_slower(place.candidate, group[0])}"
    if place.level == 0:
        return "the most accurate that fits"
    above = [p.candidate for p in places if p.level == (place.level or 0) - 1]
    best = max(above, key=lambda c: c.measured.worth if c.measured else 0.0)
    assert best.measured is not None
    return f"behind {title(best)} ({gap_text(gap(own, best.measured), own.score)})"


def gap_text(found: Gap, score: Score) -> str:
    """`0.3 points apart, where 3 seeds leave 6.1 points open`."""
    apart = f"{score.gap(abs(found.by))} apart"
    if found.open is None:
        return f"{apart}, with {'one seed' if found.seeds else 'no seed in common'}"
    seeds = "one seed leaves" if found.seeds == 1 else f"{found.seeds} seeds leave"
    return f"{apart}, where {seeds} {score.gap(found.open)} open"


# What is ruled out, and what would change it -----------------------------------------------------------------------


def flag(key: str) -> str:
    """A constraint as it is named on the command line."""
    return "--" + key.replace("_", "-")


def limit_text(key: str, limits: Limits) -> str:
    """A constraint as it was given: `--max-up 2MB`."""
    kind = next((kind for kind in KINDS if kind.key == key), None)
    return flag(key) if kind is None else f"{flag(key)} {kind.unit.text(getattr(limits, key))}"


def _needs(misses: Sequence[Miss]) -> str:
    """`3.2 MB up (2.6× the limit)`."""

    def over(times: float) -> str:
        return f"{100 * (times - 1):.2g} % over" if times < 1.995 else f"{factor_text(times)}×"

    kinds = {kind.key: kind for kind in KINDS}
    some = [(kinds[miss.key], miss) for miss in misses if miss.needs]
    return names_text(f"{k.shown(m.needs)} {k.noun} ({over(m.times)} the limit)" for k, m in some)


def barred_text(one: Barred, limits: Limits) -> str:
    """What rules a framework out, and how near its best settings come."""
    hard = names_text(BROKEN[miss.key] for miss in one.misses if miss.needs is None)
    keys = one.by or [miss.key for miss in one.misses]
    by = names_text(limit_text(key, limits) for key in keys) + ("" if one.by else " together")
    if hard:
        return f"{by}: it {hard}"
    return f"{by}: its nearest settings ({settings_text(one.nearest)}) need {_needs(one.misses)}"


def flip_text(flip: Flip, limits: Limits) -> str:
    """`with --max-up 3.2MB in place of 2MB: FedLLM, as configured`."""
    leads = f"{title(flip.leader)}, {settings_text(flip.leader)}"
    if isinstance(flip.to, bool):
        return f"{'with' if flip.to else 'without'} {flag(flip.key)}: {leads}"
    return f"with {flag(flip.key)} {flip.to}{_was(flip.key, limits)}: {leads}"


def loosening_text(one: Loosening, limits: Limits) -> str:
    """What a lifted limit would let in."""
    fits = f"{title(one.leader)}, {settings_text(one.leader)}"
    if one.to is None:
        return f"without {flag(one.key)}: {fits}"
    return f"with {flag(one.key)} {one.to}{_was(one.key, limits)}: {fits}"


def _was(key: str, limits: Limits) -> str:
    before = getattr(limits, key, None)
    return f" in place of {limit_text(key, limits).partition(' ')[2]}" if before else ""


# The whole -----------------------------------------------------------------------------------------------------------


def table(found: Mapping[str, Any], write: Callable[[str], str]) -> Table:
    """The ranking's costs."""
    shown = Table(pad_edge=False, show_edge=False, header_style="bold", box=box.SIMPLE_HEAD)
    rows = [(TITLES[one["framework"]], one, costs_cells(Costs(**one["costs"]))) for one in found["ranking"]]
    scored = next((one["score"]["key"] for one in found["ranking"] if one["score"]), None)
    heads = [*([scored.capitalize()] if scored else []), *rows[0][2]]
    for head in ("", *heads):
        shown.add_column(head, justify="right" if head else "left", no_wrap=True)
    for place, (name, one, cells) in enumerate(rows, 1):
        cells = {scored.capitalize(): score_text(one["score"])} | cells if scored else cells
        shown.add_row(*(Text(write(word)) for word in (f"{place} {name}", *cells.values())))
    return shown


def score_text(score: Mapping[str, Any] | None) -> str:
    """A mean, or that it is not known."""
    return "unknown" if score is None else Score(score["key"], score["key"] == "accuracy").text(score["mean"])


def lines(found: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """What stands below the table: heads and their lines."""
    looked = ", ".join(f"{TITLES[name]} {number}" for name, number in found["looked_at"].items())
    refused = f"; {found['refused']} more do not go with the configuration" if found["refused"] else ""
    reasons = [
        f"{place} {TITLES[one['framework']]}, {one['words']}: {one['reason']}"
        for place, one in enumerate(found["ranking"], 1)
    ]
    nothing = (
        [f"{found['tightest']['words']}, kept by the fewest settings, is the tightest"] if found["tightest"] else []
    )
    nothing += [one["words"] for one in found["loosenings"]]
    if found["tightest"] and not found["loosenings"]:
        nothing.append("no single one is enough: several have to be loosened together, as above")
    flips = [one["words"] for one in found["flips"]] or ["no change of a single constraint, device or line"]
    parts = {
        "Why": [found["order"], *reasons] if reasons else [],
        "Ruled out": [f"{TITLES[one['framework']]} by {one['words']}" for one in found["ruled_out"]],
        "What would flip the answer": flips if found["answer"] else [],
        "What would let something in": nothing,
        "To know": [*found["notes"], f"settings looked at: {looked} ({found['predictions']} predictions){refused}"],
    }
    return [(head, body) for head, body in parts.items() if body]
