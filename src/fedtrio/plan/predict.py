"""What each framework of a configuration would cost: a run without values, entry by entry as in results.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bench import Bench
from ..config import Config
from ..data.batches import Encoded
from ..data.private import PrivateData
from ..errors import ConfigError
from ..frameworks import KD, FedLLM, Local, Split
from ..frameworks.lab import Framework
from ..meter import Meter
from ..models.cut import check_cut
from ..models.load import configuration, resolve
from ..result import costs
from ..run import cohort_size, sample
from . import fedllm, kd, split
from .family import family
from .rehearsal import Costs, DryLab, Place, Rehearsal
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
    stands in `how` as an upper bound, and `bounds` says why.

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
    return {"framework": name, "seed": seed, "rounds": config.rounds, **entry, "bounds": sorted(run.bounds)}


def rehearse(
    config: Config, method: Framework, seed: int, bench: Bench | None, assumed: Assumed | None,
    shape: Mapping[str, Any] | None,
) -> Rehearsal:  # fmt: skip
    """All rounds of one run."""
    server_meter, meter = Meter(COUNTS), Meter(COUNTS)  # type: ignore[arg-type]
    lab = _lab(config, seed, bench, assumed, shape)
    for cut in method.cuts(lab.model.depth):
        check_cut(cut, lab.model.depth)
    sites = {}
    for share, examples in _holdings(config, method, seed, bench, assumed):
        data = PrivateData(
            examples,
            share,
            seed,
            config.train.batch_size,
            config.train.epochs,
            lab.pad_id,
            config.train.group_by_length,
        )
        sites[share] = Place(share, lab, data, meter)
    names = sorted(sites)
    method.check_sites(names, cohort_size(len(names), config.participation))
    lab.sites, lab.ranks = names, config.lora.ranks(names) if method.federated else {}
    server = Place("server", lab, PrivateData(lab.public, "server", seed, 1, 0, lab.pad_id), server_meter)
    run = Rehearsal(lab, sites, server, config.wire.coding(seed))
    state = fedllm.setup(run, method) if isinstance(method, FedLLM) else {}
    for lab.round in range(1, config.rounds + 1):
        cohort = sample(names, config.participation, seed, lab.round)
        match method:
            case FedLLM():
                fedllm.round(run, method, state, cohort)
            case KD():
                kd.round(run, method, cohort)
            case Split():
                split.round(run, method, cohort)
            case Local():
                for name in cohort:
                    with meter.at(name):
                        sites[name].fit(lab.model.initial, sites[name].loads(lab.round))
    return run


def _lab(
    config: Config, seed: int, bench: Bench | None, assumed: Assumed | None, shape: Mapping[str, Any] | None
) -> DryLab:
    """Settings, model and public set of a run."""
    model = model_of(config, len(bench.corpus.labels) if bench else (assumed or Assumed()).classes, shape)
    public = bench.encoded["public"] if bench else _texts(config, (assumed or Assumed()).public, assumed or Assumed())
    pad = bench.tokenizer.pad_token_id if bench else 0
    return DryLab(model, config.train, public, seed, config.rounds, pad, abreast=1, guards=config.guards)


def model_of(config: Config, labels: int, shape: Mapping[str, Any] | None = None) -> Weightless:
    """The configuration's model without its weights."""
    found = dict(shape) if shape else configuration(resolve(config.model, config.base)).to_dict()
    kind = found.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError("a model's shape needs its model_type, as llama, gpt2 or bert")
    lora = config.lora.model_copy(update={"r": config.lora.rank, "capacity": None})
    alike = lora.model_copy(update={"r": 8}).model_dump_json()
    text = json.dumps(found, default=str, sort_keys=True)
    train = config.train
    kin = family(text, kind, config.task, labels, alike, train.precision, train.pad_to_multiple_of)
    return kin.model(lora.rank)


def _holdings(
    config: Config, method: Framework, seed: int, bench: Bench | None, assumed: Assumed | None
) -> Sequence[tuple[str, Encoded]]:
    """Sites and their examples."""
    if bench is not None:
        return [(share.name, bench.encoded["train"].take(share.indices)) for share in bench.roster(method, seed)]
    assert assumed is not None
    clients = 1 if method.pooled else config.clients
    number = assumed.examples * (config.clients if method.pooled else 1)
    width = len(str(config.clients))
    return [(f"site-{i + 1:0{width}}", _texts(config, number, assumed)) for i in range(clients)]


def _texts(config: Config, number: int, assumed: Assumed) -> Encoded:
    """So many texts of one length; in causal-lm every token is a target."""
    ids = np.ones(min(assumed.tokens, config.train.max_length), dtype=np.int64)
    targets = np.zeros(number, dtype=np.int64) if config.task == "classification" else [ids] * number
    return Encoded([ids] * number, targets)
