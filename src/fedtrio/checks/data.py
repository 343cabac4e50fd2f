"""The data of a comparison, a server or a site."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from ..config import Config, SiteConfig
from ..data.load import Rows, load_corpus, load_server_corpus, load_site_corpus
from ..data.partition import partition
from ..data.read import is_file, read_file, read_hub
from ..errors import ConfigError
from .finding import Finding, Found, Seen


def all_data(config: Config, seen: Seen) -> Found:
    """All sets of a comparison on one machine, and how they are dealt. DataError."""
    corpus = load_corpus(config.data, config.task, config.base)
    seen.task, seen.labels = config.task, len(corpus.labels) or 2
    sets = f"{len(corpus.train)} training, {len(corpus.test)} test, {len(corpus.public)} public texts"
    assert config.partition is not None
    shares = partition(config.partition, corpus.train, config.clients, config.seeds[0])
    sizes = [len(share.indices) for share in shares]
    seen.sites = len(shares)
    dealt = f"{len(shares)} sites by {config.partition.name} with {min(sizes)} to {max(sizes)} examples"
    yield Finding("data", "ok", f"{sets}, {len(corpus.labels)} classes; {dealt}")
    for text in corpus.warnings:
        yield Finding("data", "warning", text)


def server_data(config: Config, seen: Seen) -> Found:
    """What a server holds. DataError."""
    corpus = load_server_corpus(config.data, config.task, config.base)
    seen.task, seen.labels = config.task, len(corpus.labels) or 2
    names = f"{len(corpus.labels)} classes" if corpus.labels else "no classes"
    yield Finding("data", "ok", f"{len(corpus.test)} test and {len(corpus.public)} public texts, {names}")
    for text in corpus.warnings:
        yield Finding("data", "warning", text)
    known = set(corpus.test.prompts)
    if not any("also occur" in text for text in corpus.warnings) and (
        shared := sum(text in known for text in corpus.public.prompts)
    ):
        yield Finding("data", "warning", f"{shared} of {len(corpus.public)} public texts also occur in the test set")


def site_data(own: SiteConfig, seen: Seen) -> Found:
    """A site's own file: rows, columns and classes. DataError."""
    data = own.data
    if data.train is None:
        raise ConfigError("data.train is missing: name the file with this site's own examples")
    table = read_file(own.base / data.train) if is_file(data.train, own.base) else read_hub(data.train, "train")
    label = data.label or "label"
    chats = data.messages in table.columns or {data.prompt, data.completion} <= table.columns.keys()
    causal = chats or (data.label is None and label not in table.columns and data.text in table.columns)
    seen.task = "causal-lm" if causal else "classification"
    names = [] if causal else [re.sub(r"^([+-]?\d+)\.0*$", r"\1", str(v).strip()) for v in table.column(label)]
    labels = tuple(data.labels or sorted(set(names) - {"None", "nan", ""}))
    seen.labels = max(2, len(labels))
    corpus = load_site_corpus(data, seen.task, own.base, labels, Rows([]))
    text = f"{table.where}: {len(corpus.train)} examples for {seen.task}"
    if not causal:
        text += f", {len(labels)} classes, which must be among the server's data.labels"
    yield Finding("data", "ok", text)
    for warning in [*corpus.warnings, *_odd(corpus.train)]:
        yield Finding("data", "warning", warning)


def _odd(train: Rows) -> Iterator[str]:
    often = Counter(train.identities())
    if twice := sum(count - 1 for count in often.values()):
        yield f"{twice} of {len(train)} examples occur more than once"
