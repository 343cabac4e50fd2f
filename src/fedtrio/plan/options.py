"""A whole plan: each framework with its main options, and what each would take on devices and lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..config import Config
from ..errors import ConfigError, FedtrioError
from .predict import Assumed, model_of, predict
from .profiles import Device, Link, timed

Entry = dict[str, Any]
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "fedllm": {
        "A frozen": {"fedllm": {"aggregation": "ffa"}},
        "int8": {"wire": {"up": {"adapter": "int8"}, "down": {"adapter": "int8"}}},
    },
    "kd": {
        "fp16": {"kd": {"logits": "fp16"}},
        "top 8, fp16": {"kd": {"logits": "topk:8:logits+fp16"}},
    },
    "split": {
        "int8": {"wire": {way: {"activations": "int8", "gradients": "int8"} for way in ("up", "down")}},
        "half of the blocks": {"split": {"cut": "half"}},
        "U-shape": {"split": {"labels": "client"}},
    },
}


def plan(
    config: Config,
    assumed: Assumed,
    shape: Mapping[str, Any] | None = None,
    devices: Mapping[str, Device] | None = None,
    links: Mapping[str, Link] | None = None,
    server: Device | None = None,
    options: bool = True,
) -> dict[str, Any]:
    """What each framework of a configuration costs, with its main options, and on which devices it takes how long.

    `runs` has the entries of `predict`, each with its `option` ("" as configured) and `times`, one for each device and
    line: seconds and joules of a round (`profiles.timed`), and whether the site's half fits into the device's memory.
    With `split.cut: auto` they are those of the `cut` that would be chosen with the numbers of device, line and server.

    Raises ConfigError, ModelError.
    """
    runs = []
    for name in config.frameworks:
        plain = _changed(config, {}, name, assumed, shape)
        for option, changes in {"": {}, **(OPTIONS.get(name, {}) if options else {})}.items():
            changed = _changed(config, changes, name, assumed, shape)
            if changed is None or (changes and plain and changed.resolved() == plain.resolved()):
                continue
            try:
                found = predict(changed, assumed, shape)
            except FedtrioError:
                if not option:
                    raise
                continue  # an option that does not go with the rest of the configuration
            runs += [{"option": option, **entry} for entry in found]
            for run in runs[-len(found) :]:
                run["times"] = [
                    {"device": on, "link": by, **_time(run, changed, at, over, server, assumed, shape)}
                    for on, at in (devices or {}).items()
                    for by, over in (links or {}).items()
                    if server
                ]
    model = model_of(config.resolved(), assumed.classes, shape)
    described = {"blocks": model.depth, "width": model.width, "parameters": model.parameters, "classes": model.classes}
    trained = sum(tensor.numel() for tensor in model.initial.values())
    tokens = min(assumed.tokens, model.reads or assumed.tokens, config.train.max_length)
    return {"model": {**described, "trained": trained}, "assumed": {**vars(assumed), "tokens": tokens}, "runs": runs}


def _time(
    entry: Entry, config: Config, at: Device, over: Link, server: Device, assumed: Assumed,
    shape: Mapping[str, Any] | None,
) -> Entry:  # fmt: skip
    """Seconds and joules of a round on a device and line; with `split.cut: auto` at the cut that is chosen there."""
    if "cuts" not in entry:
        return {**timed(entry, at, over, server), "fits": entry["client_peak_bytes"] <= at.memory_bytes}
    there = {
        "site_flops_per_second": at.flops_per_second,
        "site_bytes_per_second": over.bytes_per_second,
        "site_memory_bytes": at.memory_bytes,
        "server_flops_per_second": server.flops_per_second,
    }
    changes = {"seeds": [entry["seed"]], "split": config.split.model_copy(update=there)}
    try:
        (entry,) = predict(config.model_copy(update=changes), assumed, shape)
    except ConfigError:  # not one cut fits into the memory
        return {**timed(entry, at, over, server), "fits": False, "cut": None}
    return {**timed(entry, at, over, server), "fits": True, "cut": entry["cuts"][0]["cut"]}


def _changed(
    config: Config, changes: Mapping[str, Any], framework: str, assumed: Assumed, shape: Mapping[str, Any] | None
) -> Config | None:
    """The configuration of one framework with an option; None where the two don't go together."""
    tree: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True) | {"frameworks": [framework]}
    for section, settings in changes.items():
        if settings.get("cut") == "half":
            settings = {"cut": model_of(config.resolved(), assumed.classes, shape).depth // 2}
        tree[section] = {**tree.get(section, {}), **settings}
    try:
        changed = Config.model_validate(tree)
    except ValidationError:
        return None
    changed._base = config.base
    return changed
