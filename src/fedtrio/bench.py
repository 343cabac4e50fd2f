"""What all runs of one configuration share: texts, tokens, the model for each seed, and counted costs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpoint import Memory
from .config import Config
from .data.batches import Encoded, encode
from .data.load import Corpus, load_corpus
from .data.partition import Share, describe, partition
from .data.private import PrivateData
from .errors import ConfigError, DataError, ModelError
from .evaluate import Scores, evaluate
from .frameworks.lab import Framework, Lab
from .meter import Meter, peak_memory
from .models.adapter import AdaptedModel, adapt
from .models.cut import check_cut
from .models.load import load_base, load_tokenizer, reads, resolve, vocabulary
from .models.train import Adapter
from .program import Site


class Bench:
    """Built from a configuration; what is costly is made when first asked for."""

    def __init__(self, config: Config, corpus: Corpus | None = None) -> None:
        self.config = config.resolved()
        if corpus is not None:
            self.corpus = corpus
        torch.set_num_threads(self.config.threads or 1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.costs: dict[Any, Any] = {}
        self.alone = False  # whether this process works for a single site
        self._model: tuple[int, AdaptedModel] | None = None
        self._others: dict[tuple[str, str], Bench] = {}

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
    def vocabulary(self) -> str:
        """Of the common model's tokenizer: equal where the same text becomes the same tokens."""
        return vocabulary(self.tokenizer)

    @cached_property
    def encoded(self) -> dict[str, Encoded]:
        """`train`, `test` and `public` as tokens. Raises ModelError where the model knows fewer than the tokenizer."""
        corpus, length, words = self.corpus, self.max_length, reads(self.path).vocabulary
        sets = {"train": corpus.train, "test": corpus.test, "public": corpus.public}
        encoded = {name: encode(rows, self.tokenizer, self.config.task, length) for name, rows in sets.items()}
        highest = max((int(ids.max()) for rows in encoded.values() for ids in rows.input_ids), default=0)
        if words is not None and highest >= words:
            raise ModelError(
                f"the tokenizer of {self.config.model!r} gives token {highest}, but the model knows {words} tokens "
                f"(0 to {words - 1}): use the tokenizer that it was trained with"
            )
        return encoded

    @property
    def max_length(self) -> int:
        """Tokens of a text at most: train.max_length, or what the model reads where that is less."""
        return min(self.config.train.max_length, reads(self.path).positions or self.config.train.max_length)

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
            device, train = torch.device(config.device), config.train
            model = AdaptedModel(peft_model, config.task, train.precision, device, train.pad_to_multiple_of)
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
        which = (self.path, self.config.lora.model_dump_json())  # another model costs other FLOPs
        model.observe = lambda key, weights: meter.work((*key, which), weights)
        if cuts:
            model.verify_cut(cuts)
        labs: dict[Bench, Lab] = {}

        def unlike(site: str) -> Lab | None:
            other = self.at(method, site)
            if other is not self and other not in labs:
                labs[other] = other.lab(method, seed, meter)
            return labs.get(other)

        return Lab(
            model, self.config.train, self.encoded["public"], seed, self.config.rounds,
            self.tokenizer.pad_token_id, guards=self.config.guards, hold=meter.hold, unlike=unlike,
        )  # fmt: skip

    def at(self, method: Framework, site: str) -> Bench:
        """The bench of the model that a site holds: this one, unless the method gives it another.

        Raises ConfigError where in causal-lm the two models do not share a tokenizer.
        """
        own = method.model_of(site)
        if own is None:
            return self
        model, lora = own[0], own[1] or self.config.lora
        key = (model, lora.model_dump_json())
        if key not in self._others:
            config = self.config.model_copy(update={"model": model, "lora": lora})
            config._base = self.config.base
            other = Bench(config, self.corpus)
            if config.task == "causal-lm" and other.vocabulary != self.vocabulary:
                raise ConfigError(
                    f"{site} holds {model!r}, whose tokenizer ({len(other.tokenizer)} words) is another than that of "
                    f"{self.config.model!r}: in causal-lm logits mean the same only where models share a tokenizer"
                )
            other.alone = self.alone
            self._others[key] = other
        return self._others[key]

    def check_models(self, method: Framework) -> None:
        """Raises ConfigError or ModelError where sites' own models do not go with the common one."""
        seed = self.config.seeds[0]
        for share in self.roster(method, seed) if len(self.corpus.train) else ():
            other = self.at(method, share.name)
            if other is self:
                continue
            try:
                theirs, ours = other.model(seed).classes, self.model(seed).classes
            except ModelError as error:
                hint = "; set kd.lora, which is for kd.models" if other.config.lora is self.config.lora else ""
                raise ModelError(f"{share.name} holds {other.config.model!r}: {error}{hint}") from error
            if theirs != ours:
                raise ConfigError(
                    f"{share.name} holds {other.config.model!r}, whose logits have {theirs} columns, and those of "
                    f"{self.config.model!r} have {ours}"
                )
            if other.encoded["public"].target_tokens() != self.encoded["public"].target_tokens():
                raise ConfigError(
                    f"{share.name} holds {other.config.model!r}, which reads {other.max_length} tokens of a text, and "
                    f"{self.config.model!r} {self.max_length}: set train.max_length to the lesser"
                )

    def roster(self, method: Framework, seed: int) -> list[Share]:
        """Names of the clients and what they hold; the centralized yardstick has a single one with everything.

        That one bears the name of the first site, so that with one client all frameworks see the same batches.
        """
        shares = self.shares(seed)
        if method.pooled:
            shares = [Share(shares[0].name, np.sort(np.concatenate([share.indices for share in shares])))]
        return shares

    def names(self, method: Framework, seed: int) -> list[str]:
        """The sites' names; of sites elsewhere, those that the configuration lists."""
        here = len(self.corpus.train) > 0
        return [share.name for share in self.roster(method, seed)] if here else list(self.config.wire.sites or [])

    def sites(
        self,
        method: Framework,
        lab: Lab,
        meter: Meter,
        folder: Path | None = None,
        names: Collection[str] | None = None,
    ) -> dict[str, Site]:
        """The clients, or those of `names`; with a folder they keep memory and models there, by their number."""
        sites = {}
        for number, share in enumerate(self.roster(method, lab.seed)):
            if names is None or share.name in names:
                own = self.at(method, share.name)
                examples = own.encoded["train"].take(share.indices)
                place = place_of(folder, number)
                sites[share.name] = own.site(share.name, examples, method, lab.of_site(share.name), meter, place)
        return sites

    def site(
        self, name: str, examples: Encoded, method: Framework, lab: Lab, meter: Meter, folder: Path | None = None
    ) -> Site:
        """One client. Raises DataError where its examples leave nothing to predict."""
        train = self.config.train
        data = PrivateData(examples, name, lab.seed, train.batch_size, train.epochs, lab.pad_id, train.group_by_length)
        if not data.weight:
            raise DataError(f"{name} has nothing to predict: max_length {train.max_length} cuts it all off")

        def conclude(site: Site) -> Mapping[str, float]:
            memory = {"process_peak_bytes": peak_memory()} if self.alone else {}
            own = method.own_adapter(lab, site)
            if folder:
                self.save_own(method, lab, site, folder)
            scores = self.evaluate(lab, own).facts() if own is not None and len(self.encoded["test"]) else {}
            return scores | memory

        coding = self.config.wire.coding(lab.seed)
        return Site(name, data, method, lab, meter, memory_at(folder), conclude, coding)

    def save_own(self, method: Framework, lab: Lab, site: Any, folder: Path) -> None:
        """Write the model that a site keeps to itself, found in `site.memory`, where the run leaves no common one."""
        own = method.own_adapter(lab, site)
        if own is not None and method.adapter(lab, method.setup(lab)) is None:
            lab.model.save(own, folder / "adapter")

    def evaluate(self, lab: Lab, adapter: Adapter) -> Scores:
        """Score an adapter on the test set."""
        return evaluate(lab.model, adapter, self.encoded["test"], lab.pad_id)

    def answers(self, digits: str) -> dict[str, Any]:
        """Which of the test texts a run answered right, as results.json has it; the server's own texts, not a site's.

        Answers of two runs can be compared text by text where `sha256`, of texts and labels in order, is the same.
        """
        rows = self.corpus.test
        assert rows.labels is not None
        said = json.dumps([rows.prompts, [self.corpus.labels[label] for label in rows.labels]])
        lines = [digits[start : start + 64] for start in range(0, len(digits), 64)]
        return {"texts": len(rows), "sha256": hashlib.sha256(said.encode()).hexdigest(), "bits": lines}

    def describe(self) -> dict[str, Any]:
        """The `data` part of results.json."""
        seeds = self.config.seeds if len(self.corpus.train) else []  # a server knows nothing of what sites hold
        partitions = [
            {
                "seed": seed,
                "sites": describe(self.shares(seed), self.corpus.train.labels, len(self.corpus.labels)),
            }
            for seed in seeds
        ]
        return {
            "labels": list(self.corpus.labels),
            **{name: len(examples) for name, examples in self.encoded.items()},
            "truncated": sum(examples.truncated for examples in self.encoded.values()),
            "partitions": partitions,
        }


def place_of(folder: Path | None, number: int) -> Path | None:
    """A site's own folder in a run's folder; without one it has none."""
    return folder / "sites" / str(number) if folder else None


def memory_at(place: Path | None) -> Memory:
    """The memory of the site whose folder that is."""
    return Memory(place / "memory" if place else None)
