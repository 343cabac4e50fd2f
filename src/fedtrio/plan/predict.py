"""What each framework of a configuration would cost: a run without values, entry by entry as in results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..bench import Bench
from ..coding import Coding
from ..config import Config
from ..data.batches import Encoded
from ..data.private import PrivateData
from ..frameworks import KD, FedLLM, Local, Split
from ..frameworks.lab import Framework
from ..meter import Meter
from ..models.cut import check_cut
from ..models.load import configuration, resolve
from ..result import costs
from ..run import cohort_size, sample
from . import fedllm, kd, split
from .family import described, family
from .rehearsal import SERVER, Costs, DryLab, Place, Rehearsal
from .weightless import Weightless

COUNTS = Costs()  # of all models, so that another prediction finds what was counted for an earlier one


@dataclass(frozen=True)
class Assumed:
    """What is assumed of data that are not at hand: each site has so many examples, each of so many tokens."""

    examples: int = 1000
    tokens: int = 64
    classes: int = 77
    public: int = 1000


def predict(
    config: Config, assumed: Assumed | None = None, shape: Mapping[str, Any] | None = None, bench: Bench | None = None
) -> list[dict[str, Any]]:
    """An entry for each framework and seed, with the names of results.json as far as it says the same.

    Without `assumed`, texts, partition and batches are those of the run that the configuration describes, and so are
    the bytes, to the last one. With it no data are read. `shape` describes a model in transformers' words
    (`{"model_type": "llama", "hidden_size": 4096, …}`) in place of `config.model`. No weights are loaded.

    Keys: framework, seed, rounds, bytes_up, bytes_down, payload_up, payload_down, messages, client_flops,
    client_peak_bytes, server_flops, server_peak_bytes, sites, kinds, left_sites, how, bounds. What is no exact number
    stands in `how` as an upper bound, and `bounds` says why. With `split.cut: auto` there is also `cuts`: the cuts that
    a run would choose, each with its sites and the numbers it follows from.

    Raises ConfigError, DataError, ModelError.
    """
    config = config.resolved()
    bench = None if assumed else bench or Bench(config)
    return [_entry(config, name, seed, bench, assumed, shape) for seed in config.seeds for name in config.frameworks]


def _entry(
    config: Config, name: str, seed: int, bench: Bench | None, assumed: Assumed | None, shape: Mapping[str, Any] | None
) -> dict[str, Any]:
    method = config.framework(name)
    run = rehearse(config, method, seed, bench, assumed, shape)
    examples = {site: len(place.data) for site, place in sorted(run.sites.items())}
    efforts = {site: place.meter.effort(site).spent() for site, place in run.sites.items()}
    entry = costs(method, examples, dict.fromkeys(examples), run.ledger, efforts)
    for key in ("client_seconds", "client_accuracy"):  # nobody has trained
        del entry[key]
    for site in entry["sites"]:
        del site["client_seconds"], site["accuracy"]
    effort = run.server.meter.effort(run.server.name)
    entry |= {"server_flops": effort.flops, "server_peak_bytes": effort.peak_bytes}
    exact = "upper bound" if run.bounds else "exact"
    entry["how"] = {"bytes": exact, "client_flops": "counted", "client_peak_bytes": "modelled"}
    entry["how"] |= {"server_flops": "counted", "server_peak_bytes": "modelled"}
    if isinstance(method, Split) and (cuts := split.chosen(run, method)):
        entry |= {"cuts": cuts}
        entry["how"] |= {"cuts": "chosen as at a run's start"}
    if config.attn_implementation != "eager":
        counted = ("client_flops", "server_flops", *(["cuts"] if "cuts" in entry else []))
        entry["how"] |= dict.fromkeys(counted, "counted as for eager attention")
    return {"framework": name, "seed": seed, "rounds": config.rounds, **entry, "bounds": sorted(run.bounds)}


def rehearse(
    config: Config, method: Framework, seed: int, bench: Bench | None, assumed: Assumed | None,
    shape: Mapping[str, Any] | None,
) -> Rehearsal:  # fmt: skip
    """All rounds of one run. Raises ConfigError for what is not predicted, and for settings that don't fit."""
    meter = Meter(COUNTS)
    lab = _lab(config, seed, bench, assumed, shape)
    for cut in method.cuts(lab.model.depth):
        check_cut(cut, lab.model.depth)
    sites, train = {}, config.train
    for name, indices in _holdings(config, method, seed, bench, assumed):
        own, its_lab = bench and bench.at(method, name), lab
        if (unlike := method.model_of(name)) is not None:
            other = config.model_copy(update={"model": unlike[0], "lora": unlike[1] or config.lora})
            its_lab = _lab(other, seed, own, assumed, None)
        examples = own.encoded["train"].take(indices) if own else _texts(its_lab, len(indices), assumed or Assumed())
        data = PrivateData(examples, name, seed, train.batch_size, train.epochs, lab.pad_id, train.group_by_length)
        sites[name] = Place(name, its_lab, data, meter)
    names = sorted(sites)
    method.check_sites(names, cohort_size(len(names), config.participation))
    method.admit(lab.model, train, names)
    lab.sites, lab.ranks = names, config.lora.ranks(names) if method.federated else {}
    return play(method, lab, sites, config.wire.coding(seed), config.rounds, config.participation)


def play(
    method: Framework, lab: DryLab, sites: Mapping[str, Place], coding: Coding, rounds: int, participation: float = 1.0
) -> Rehearsal:
    """All rounds with these sites."""
    data = PrivateData(lab.public, SERVER, lab.seed, 1, 0, lab.pad_id)
    run = Rehearsal(lab, dict(sites), Place(SERVER, lab, data, Meter(COUNTS)), coding)
    state = fedllm.setup(run, method) if isinstance(method, FedLLM) else {}
    for lab.round in range(1, rounds + 1):
        cohort = sample(list(sites), participation, lab.seed, lab.round)
        match method:
            case FedLLM():
                fedllm.round(run, method, state, cohort)
            case KD():
                kd.round(run, method, cohort)
            case Split():
                split.round(run, method, cohort)
            case Local():
                for name in cohort:
                    with sites[name].meter.at(name):
                        sites[name].fit(lab.model.initial, sites[name].loads(lab.round))
    return run


def _lab(
    config: Config, seed: int, bench: Bench | None, assumed: Assumed | None, shape: Mapping[str, Any] | None
) -> DryLab:
    """Settings, model and public set of a run."""
    given = assumed or Assumed()
    model = model_of(config, len(bench.corpus.labels) if bench else given.classes, shape)
    pad = bench.tokenizer.pad_token_id if bench else 0
    public = bench.encoded["public"] if bench else Encoded([], None)
    lab = DryLab(model, config.train, public, seed, config.rounds, pad, abreast=1, guards=config.guards)
    return lab if bench else replace(lab, public=_texts(lab, given.public, given))


def model_of(config: Config, labels: int, shape: Mapping[str, Any] | None = None) -> Weightless:
    """The configuration's model without its weights, or one of that shape. Raises ConfigError, ModelError."""
    found = described(shape) if shape else configuration(resolve(config.model, config.base))
    train, lora = config.train, config.lora.model_copy(update={"r": 8, "capacity": None})
    given = (found.to_json_string(use_diff=False), config.task, labels, lora.model_dump_json())
    return family(*given, train.precision, train.pad_to_multiple_of).model(config.lora.rank)


def _holdings(
    config: Config, method: Framework, seed: int, bench: Bench | None, assumed: Assumed | None
) -> Sequence[tuple[str, Sequence[int]]]:
    """Sites and their examples, by number."""
    if bench is not None:
        return [(share.name, share.indices.tolist()) for share in bench.roster(method, seed)]
    number = (assumed or Assumed()).examples
    if method.pooled:
        return [("site-1", range(number * config.clients))]
    width = len(str(config.clients))
    return [(f"site-{i + 1:0{width}}", range(number)) for i in range(config.clients)]


def _texts(lab: DryLab, number: int, assumed: Assumed) -> Encoded:
    """So many texts of one length, as long as the model reads; in causal-lm every token is a target."""
    ids = np.ones(min(assumed.tokens, lab.model.reads or assumed.tokens, lab.train.max_length), dtype=np.int64)
    targets = np.zeros(number, dtype=np.int64) if lab.model.task == "classification" else [ids] * number
    return Encoded([ids] * number, targets)
