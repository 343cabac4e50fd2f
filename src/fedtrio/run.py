"""One run: configuration → data on sites → rounds → evaluation → run folder. Start reading here."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import Config
from .data.batches import Encoded, encode
from .data.load import Corpus, load_corpus
from .data.partition import Share, describe, partition
from .data.private import PrivateData
from .errors import DataError
from .evaluate import Scores, evaluate
from .frameworks.lab import Framework, Lab
from .ledger import Ledger
from .meter import Meter
from .models.adapter import AdaptedModel, adapt
from .models.cut import check_cut
from .models.load import load_base, load_tokenizer, resolve
from .models.train import Adapter
from .program import Site, drive
from .wires.loopback import Loopback

OnRound = Callable[[str, int, Mapping[str, Any]], None]  # framework, seed, entry of the curve


def run(
    config: Config,
    framework: str,
    seed: int = 0,
    out: Path | None = None,
    bench: Bench | None = None,
    on_round: OnRound = lambda framework, seed, entry: None,
    record_frames: Path | None = None,
) -> dict[str, Any]:
    """Train with one framework and one seed; the entry of `runs` in results.json.

    With `out`, the adapter is written to `out/<framework>-<seed>/adapter` and the ledger appended to
    `out/ledger.jsonl`. `bench` holds what runs of one configuration share. Raises ConfigError, DataError, ModelError.
    """
    bench = bench or Bench(config)
    config, method = bench.config, bench.config.framework(framework)
    ledger, meter = Ledger(record_frames), Meter(bench.costs)
    lab = bench.lab(method, seed, meter)
    sites = bench.sites(method, lab, meter)
    wire = Loopback(sites)
    lab.abreast = wire.abreast
    state = method.setup(lab)
    curve: list[dict[str, Any]] = []
    scores: Scores | None = None
    for lab.round in range(1, config.rounds + 1):
        cohort = sample(wire.sites, config.participation, seed, lab.round)
        drive(method.server(lab, state, cohort), wire, lab.round, ledger)
        adapter = method.adapter(lab, state)
        scores = bench.evaluate(lab, adapter) if adapter is not None else None
        curve.append({"round": lab.round, **_shown(scores, config.task), **_spent(method, ledger, meter)})
        if lab.round < config.rounds or adapter is not None:
            on_round(framework, seed, curve[-1])
    wire.close()

    adapter = method.adapter(lab, state)
    own = method.own_adapters(lab, sites.values())
    of_sites = [bench.evaluate(lab, own[name]) for name in sites if name in own]
    if adapter is None:  # each site has its own model: the mean over sites stands for the run
        scores = _mean(of_sites)
        curve[-1] |= _shown(scores, config.task)
        on_round(framework, seed, curve[-1])
    assert scores is not None
    accuracies = [s.accuracy for s in of_sites] or [scores.accuracy] * len(sites)
    result = {"framework": framework, "seed": seed, "rounds": config.rounds, **_shown(scores, config.task)}
    result |= _costs(method, sites, accuracies, ledger, meter) | {"curve": curve}
    if out is not None:
        result |= _save(lab, adapter, own, out, f"{framework}-{seed}")
        if method.federated:
            with (out / "ledger.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in ledger.lines(framework=framework, seed=seed))
    return result


class Bench:
    """What all runs of one configuration share: texts, tokens, the model for each seed, and counted costs."""

    def __init__(self, config: Config) -> None:
        self.config = config.resolved()
        torch.set_num_threads(self.config.threads or 1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.costs: dict[Any, Any] = {}
        self._model: tuple[int, AdaptedModel] | None = None

    @cached_property
    def corpus(self) -> Corpus:
        """Texts and labels."""
        return load_corpus(self.config.data, self.config.task, self.config.base)

    @cached_property
    def path(self) -> str:
        """Where the model comes from."""
        return resolve(self.config.model, self.config.base)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.path)

    @cached_property
    def encoded(self) -> dict[str, Encoded]:
        """`train`, `test` and `public` as tokens."""
        corpus, length = self.corpus, self.config.train.max_length
        sets = {"train": corpus.train, "test": corpus.test, "public": corpus.public}
        return {name: encode(rows, self.tokenizer, self.config.task, length) for name, rows in sets.items()}

    def shares(self, seed: int) -> list[Share]:
        """Which training examples lie at which site."""
        assert self.config.partition is not None
        return partition(self.config.partition, self.corpus.train, self.config.clients, seed)

    def model(self, seed: int) -> AdaptedModel:
        """The model with the adapter and head that all frameworks of this seed start from."""
        if self._model is None or self._model[0] != seed:
            torch.manual_seed(seed)
            config = self.config
            base = load_base(
                self.path,
                config.task,
                len(self.corpus.labels),
                self.tokenizer.pad_token_id,
                config.attn_implementation,
            )
            peft_model = adapt(base, config.lora, config.task)
            model = AdaptedModel(peft_model, config.task, config.train.precision, torch.device(config.device))
            self._model = (seed, model)
        return self._model[1]

    def cuts(self, method: Framework, seed: int) -> tuple[int, ...]:
        """Where the method cuts the model. Raises ModelError where it has no such block."""
        depth = self.model(seed).depth
        for cut in method.cuts(depth):
            check_cut(cut, depth)
        return method.cuts(depth)

    def lab(self, method: Framework, seed: int, meter: Meter) -> Lab:
        """Model and settings for one run. Raises ModelError where the model can't be cut as the method asks."""
        model, cuts = self.model(seed), self.cuts(method, seed)
        model.observe = lambda key, weights: meter.work(key, weights)
        if cuts:
            model.verify_cut(cuts)
        return Lab(
            model, self.config.train, self.encoded["public"], seed, self.config.rounds,
            self.tokenizer.pad_token_id, hold=meter.hold,
        )  # fmt: skip

    def sites(self, method: Framework, lab: Lab, meter: Meter) -> dict[str, Site]:
        """The clients; the centralized yardstick has a single one that holds everything.

        That one bears the name of the first site, so that with one client all frameworks see the same batches.
        """
        shares = self.shares(lab.seed)
        if not method.federated and method.adapter(lab, method.setup(lab)) is not None:
            shares = [Share(shares[0].name, np.sort(np.concatenate([share.indices for share in shares])))]
        train = self.config.train
        sites = {}
        for share in shares:
            examples = self.encoded["train"].take(share.indices)
            data = PrivateData(
                examples, share.name, lab.seed, train.batch_size, train.epochs, lab.pad_id, train.group_by_length
            )
            if not data.weight:
                raise DataError(f"{share.name} has nothing to predict: max_length {train.max_length} cuts it all off")
            sites[share.name] = Site(share.name, data, method, lab, meter)
        return sites

    def evaluate(self, lab: Lab, adapter: Adapter) -> Scores:
        """Score an adapter on the test set."""
        return evaluate(lab.model, adapter, self.encoded["test"], lab.pad_id)

    def describe(self) -> dict[str, Any]:
        """The `data` part of results.json."""
        partitions = [
            {
                "seed": seed,
                "sites": describe(self.shares(seed), self.corpus.train.labels, len(self.corpus.labels)),
            }
            for seed in self.config.seeds
        ]
        return {
            "labels": list(self.corpus.labels),
            **{name: len(examples) for name, examples in self.encoded.items()},
            "truncated": sum(examples.truncated for examples in self.encoded.values()),
            "partitions": partitions,
        }


def sample(sites: Sequence[str], participation: float, seed: int, round: int) -> list[str]:
    """The sites that take part in a round, sorted; a pure function of its arguments."""
    number = max(1, int(participation * len(sites) + 0.5))
    return sorted(random.Random(f"cohort {seed} {round}").sample(sorted(sites), number))


def _shown(scores: Scores | None, task: str) -> dict[str, Any]:
    shown: dict[str, Any] = {"accuracy": None, "loss": None}
    if scores is not None:
        shown = {"accuracy": scores.accuracy, "loss": scores.loss}
    if task == "causal-lm":
        shown["perplexity"] = scores.perplexity if scores else None
    if scores is not None and not math.isfinite(scores.loss):  # it diverged; JSON knows no NaN
        shown = dict.fromkeys(shown)
    return shown


def _mean(scores: Sequence[Scores]) -> Scores:
    accuracy = math.fsum(s.accuracy for s in scores) / len(scores)
    return Scores(accuracy, math.fsum(s.loss for s in scores) / len(scores), scores[0].counted)


def _counted(method: Framework, ledger: Ledger, field: str, **where: object) -> int:
    """From the ledger; a yardstick's messages to itself are no traffic."""
    return ledger.total(field, **where) if method.federated else 0


HOW = {"bytes": "measured", "client_flops": "counted", "client_seconds": "measured", "client_peak_bytes": "modelled"}


def _costs(
    method: Framework, sites: Mapping[str, Site], accuracies: Sequence[float], ledger: Ledger, meter: Meter
) -> dict[str, Any]:
    """What a run has cost, in all and for each site, and how each number was found."""
    return {
        **_spent(method, ledger, meter),
        "payload_up": _counted(method, ledger, "payload", direction="up"),
        "payload_down": _counted(method, ledger, "payload", direction="down"),
        "messages": _counted(method, ledger, "messages"),
        "client_seconds": round(meter.total("seconds"), 3),
        "client_peak_bytes": meter.peak_bytes,
        "client_accuracy": {"mean": math.fsum(accuracies) / len(accuracies), "min": min(accuracies)},
        "sites": [
            _site_entry(site, accuracy, method, ledger, meter)
            for site, accuracy in zip(sites.values(), accuracies, strict=True)
        ],
        "kinds": ledger.by_kind() if method.federated else [],
        "how": HOW,
    }


def _spent(method: Framework, ledger: Ledger, meter: Meter) -> dict[str, int]:
    """Bytes as frames and client FLOPs so far."""
    return {
        "bytes_up": _counted(method, ledger, "bytes", direction="up"),
        "bytes_down": _counted(method, ledger, "bytes", direction="down"),
        "client_flops": int(meter.total("flops")),
    }


def _site_entry(site: Site, accuracy: float, method: Framework, ledger: Ledger, meter: Meter) -> dict[str, Any]:
    effort = meter.effort(site.name)
    return {
        "name": site.name,
        "examples": len(site.data),
        "accuracy": accuracy,
        "bytes_up": _counted(method, ledger, "bytes", site=site.name, direction="up"),
        "bytes_down": _counted(method, ledger, "bytes", site=site.name, direction="down"),
        "messages": _counted(method, ledger, "messages", site=site.name),
        "client_flops": effort.flops,
        "client_seconds": round(effort.seconds, 3),
        "client_peak_bytes": effort.peak_bytes,
    }


def _save(lab: Lab, adapter: Adapter | None, own: Mapping[str, Adapter], out: Path, name: str) -> dict[str, Any]:
    """Write the adapter, or where there is no common one each site's own; paths and hash for results.json."""
    if adapter is not None:
        lab.model.save(adapter, out / name / "adapter")
        return {"adapter": f"{name}/adapter", "adapter_sha256": _sha256(out / name / "adapter")}
    folders = {site: f"{name}/{index}/adapter" for index, site in enumerate(own)}
    for site, folder in folders.items():
        lab.model.save(own[site], out / folder)
    first = next(iter(folders.values()))
    return {"adapter": first, "adapter_sha256": _sha256(out / first), "adapters": folders}


def _sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
