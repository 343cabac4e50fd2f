"""What the user calls data, as a `Corpus` of three sets: training, test and public (without labels).

Nothing here depends on a run's seed: every seed of a sweep sees the same test and the same public examples.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedtrio.data.read import Table, is_file, read_file, read_hub
from fedtrio.errors import DataError, did_you_mean

Task = Literal["classification", "causal-lm"]
Role = Literal["train", "test", "public"]
SPLIT_SEED = 0


class DataConfig(BaseModel):
    """Where the examples come from, and what their columns are called."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    train: str | None = Field(
        default=None,
        description="CSV, JSONL, Parquet or text file (a row for each line that is not empty), or a Hub "
        "dataset as `id` or `id:config`; without it, the built-in demo. Paths start at the configuration.",
    )
    test: str | float = Field(
        default=0.2,
        description="A file, the name of a split where `train` is a Hub dataset, or the fraction of `train` "
        "that is held out. The demo has its own test set, used unless this is changed.",
    )
    public: str | float | list[str] = Field(
        default=0.1,
        description="Texts that all parties may see, for distillation: a file, a split as in `test`, or the "
        "fraction of `train` that is held out without its labels. A list mixes several: an equal part of `max_public` "
        "from each. The demo has its own, as in `test`.",
    )
    text: str = Field(default="text", description="Column with the text.")
    label: str | None = Field(
        default=None, description="Column with the class; `label` in classification, none in causal-lm unless given."
    )
    prompt: str = Field(default="prompt", description="causal-lm: column with what is given.")
    completion: str = Field(default="completion", description="causal-lm: column with what is to be predicted.")
    messages: str = Field(default="messages", description="causal-lm: column with chats, lists of {role, content}.")
    labels: list[str] | None = Field(
        default=None,
        description="Class names in their order; needed where no training data tell them, as at a server.",
    )
    site: str | None = Field(
        default=None, description="Column that says to which site an example belongs; `site` in the demo."
    )
    max_train: int | None = Field(default=None, ge=1, description="Use at most this many training examples.")
    max_test: int | None = Field(default=None, ge=1, description="Use at most this many test examples.")
    max_public: int | None = Field(default=None, ge=1, description="Use at most this many public examples.")

    @field_validator("test", "public", mode="before")
    @classmethod
    def _number_if_it_reads_like_one(cls, value: Any) -> Any:
        """The command line hands over strings: "0.2" is a fraction, not a file."""
        if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", value.strip()):
            return float(value)
        return value

    @field_validator("test", "public")
    @classmethod
    def _fraction_in_range(cls, value: str | float | list[str]) -> str | float | list[str]:
        if value == []:
            raise ValueError("an empty list names no public texts")
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError("a fraction must lie between 0 and 1, for instance 0.2")
        return value

    @field_validator("labels")
    @classmethod
    def _no_repeats(cls, values: list[str] | None) -> list[str] | None:
        if twice := [name for name, count in Counter(values or ()).items() if count > 1]:
            raise ValueError(f"{twice[0]!r} occurs twice")
        return values

    @model_validator(mode="after")
    def _something_left_to_train(self) -> DataConfig:
        if isinstance(self.test, float) and isinstance(self.public, float) and self.test + self.public >= 1:
            raise ValueError(f"test ({self.test:g}) and public ({self.public:g}) together leave nothing to train on")
        return self

    def is_default(self, field: str) -> bool:
        """Whether a field has its default value; a resolved configuration writes out all of them."""
        return getattr(self, field) == type(self).model_fields[field].default


@dataclass(frozen=True)
class Rows:
    """N examples before tokenization.

    `prompts` [N] is the text, or in causal-lm with completions what precedes them; `completions` [N] is
    what is to be predicted; `labels` int64 [N] are indices into `Corpus.labels`; `sites` [N] names the
    natural owner.
    """

    prompts: list[str]
    completions: list[str] | None = None
    labels: np.ndarray | None = None
    sites: list[str] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The rows at `indices`, in that order."""
        return Rows(
            prompts=[self.prompts[i] for i in indices],
            completions=None if self.completions is None else [self.completions[i] for i in indices],
            labels=None if self.labels is None else self.labels[np.asarray(indices, dtype=np.int64)],
            sites=None if self.sites is None else [self.sites[i] for i in indices],
        )

    def identities(self) -> list[tuple[str, str]]:
        """What makes an example the same example: prompt and completion."""
        return list(zip(self.prompts, self.completions or [""] * len(self), strict=True))


@dataclass(frozen=True)
class Corpus:
    """The three sets; `labels` are the class names in order, `warnings` what the user should be told."""

    train: Rows
    test: Rows
    public: Rows
    labels: tuple[str, ...]
    warnings: tuple[str, ...]


def load_corpus(config: DataConfig, task: Task, base: Path) -> Corpus:
    """Read, check and split the data; relative paths start at `base`, the folder of the configuration file.

    Raises `DataError` where the data cannot be used; what is merely odd goes into `Corpus.warnings`.
    """
    config = _resolved(config, task)
    warnings: list[str] = []
    table = _read(config, "train", base)
    train, names = _rows(table, config, task, "train", warnings)
    labels = tuple(config.labels) if config.labels else _sorted_labels(names)
    if task == "classification" and len(labels) < 2:
        raise DataError(f"{table.where}: only one class ({', '.join(labels)}); classification needs two or more")
    unknown = "are not in data.labels" if config.labels else "do not occur in training"
    train = replace(train, labels=_indices(names, labels, table.where, unknown) if names else None)

    n_test = _held_out(config.test, len(train))
    n_public = _held_out(config.public, len(train))
    if n_test + n_public >= len(train):
        raise DataError(f"{table.where}: {len(train)} rows are too few to hold out {n_test + n_public} of them")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
    test = train.take(np.sort(order[:n_test]))
    public = train.take(np.sort(order[n_test : n_test + n_public]))
    train = train.take(np.sort(order[n_test + n_public :]))

    if isinstance(config.test, str):
        table = _read(config, "test", base)
        test, names = _rows(table, config, task, "test", warnings)
        test = replace(test, labels=_indices(names, labels, table.where, unknown) if names else None)
    if not isinstance(config.public, float):
        public = _public(config, task, base, warnings)
    public = replace(public, labels=None, sites=None)

    train, test = _subset(train, config.max_train), _subset(test, config.max_test)
    public = _subset(public, config.max_public)
    warnings += _overlaps(train, test, public)
    return Corpus(train, test, public, labels, tuple(warnings))


def load_server_corpus(config: DataConfig, task: Task, base: Path) -> Corpus:
    """What a server holds: class names, test set and public set; no training data, unless it has some for the names.

    Raises `DataError` where a set is missing or cannot be used.
    """
    if config.train is not None or config.is_default("test"):
        corpus = load_corpus(config, task, base)
        return replace(corpus, train=corpus.train.take([]))
    config = _resolved(config.model_copy(update={"train": ""}), task)
    if not isinstance(config.test, str) or isinstance(config.public, float):
        raise DataError("a server without data.train needs files in data.test and data.public: it has no other texts")
    warnings: list[str] = []
    test, names = _rows(_read(config, "test", base), config, task, "test", warnings)
    labels = tuple(config.labels or _sorted_labels(names))
    test = replace(test, labels=_indices(names, labels, str(config.test), "are not in data.labels") if names else None)
    public = _subset(replace(_public(config, task, base, warnings), labels=None, sites=None), config.max_public)
    empty, test = test.take([]), _subset(test, config.max_test)
    warnings += _overlaps(empty, test, public)
    return Corpus(empty, test, public, labels, tuple(warnings))


def load_site_corpus(config: DataConfig, task: Task, base: Path, labels: tuple[str, ...], public: Rows) -> Corpus:
    """What a site holds: its own training data, a test set if it names a file, and what the server has sent.

    Raises `DataError` where they cannot be used, among it a class that the server does not know.
    """
    config = _resolved(config, task)
    warnings: list[str] = []
    table = _read(config, "train", base)
    train, names = _rows(table, config.model_copy(update={"site": None}), task, "train", warnings)
    unknown = "are not in the server's data.labels"
    train = replace(train, labels=_indices(names, labels, table.where, unknown) if names else None)
    test = train.take([])
    if isinstance(config.test, str):
        table = _read(config, "test", base)
        test, names = _rows(table, config, task, "test", warnings)
        test = replace(test, labels=_indices(names, labels, table.where, unknown) if names else None)
    return Corpus(_subset(train, config.max_train), test, public, labels, tuple(warnings))


def _resolved(config: DataConfig, task: Task) -> DataConfig:
    """Fill in what the task or the demo implies."""
    known: dict[str, Any] = {}
    if task == "classification" and config.label is None:
        known["label"] = "label"
    if config.train is None:
        demo = Path(str(resources.files("fedtrio.data") / "demo"))
        known["train"] = str(demo / "train.csv")
        known |= {name: str(demo / f"{name}.csv") for name in ("test", "public") if config.is_default(name)}
        known["site"] = config.site or "site"
    return config.model_copy(update=known)


def _read(config: DataConfig, role: Role, base: Path) -> Table:
    """A file, or a split of the Hub dataset that `train` names."""
    train, source = str(config.train), str(getattr(config, role))
    if is_file(train, base) or (role != "train" and is_file(source, base)):
        return read_file(base / source)
    return read_hub(train, "train" if role == "train" else source)


def _rows(table: Table, config: DataConfig, task: Task, role: Role, warnings: list[str]) -> tuple[Rows, list[str]]:
    """The usable rows of one table, their `labels` still to be set, and their label names.

    Rows without text are dropped with a warning. A public set needs texts alone, a test set no sites and, in
    causal-lm, no labels. Raises `DataError` for a missing column, a missing value and where no row is left.
    """
    prompts, completions = _texts(table, config, task)
    wanted = [i for i, text in enumerate(completions or prompts) if text.strip()]
    if not wanted:
        raise DataError(f"{table.where}: all {len(table)} texts are empty")
    if dropped := len(prompts) - len(wanted):
        warnings.append(f"{table.where}: dropped {dropped} of {len(prompts)} rows because their text is empty")
    rows = Rows(prompts, completions).take(wanted)
    if role == "public":
        return rows, []
    label, site = config.label, config.site
    if role == "test":
        label = label if task == "classification" or label in table.columns else None
        site = site if site in table.columns else None
    names = _named(table, label, wanted) if label else []
    return replace(rows, sites=_named(table, site, wanted) if site else None), names


def _public(config: DataConfig, task: Task, base: Path, warnings: list[str]) -> Rows:
    """The public texts of one source, or equal parts of several, one after the other."""
    sources = config.public if isinstance(config.public, list) else [config.public]
    most, parts = config.max_public, []
    for n, source in enumerate(sources):
        table = _read(config.model_copy(update={"public": source}), "public", base)
        rows, _ = _rows(table, config, task, "public", warnings)
        share = None if most is None else most * (n + 1) // len(sources) - most * n // len(sources)
        parts.append(_subset(rows, share))
    if len({part.completions is None for part in parts}) > 1:
        raise DataError(f"data.public: some of {', '.join(map(str, sources))} have completions, and others have none")
    completions = None if parts[0].completions is None else [c for part in parts for c in part.completions or ()]
    return Rows([prompt for part in parts for prompt in part.prompts], completions)


def _texts(table: Table, config: DataConfig, task: Task) -> tuple[list[str], list[str] | None]:
    """Prompts and completions: chats first, then prompt and completion, then plain text."""
    if task == "classification":
        return _strings(table, config.text), None
    if config.messages in table.columns:
        turns = [_last_turn(table, i, chat) for i, chat in enumerate(table.column(config.messages), start=1)]
        return [prompt for prompt, _ in turns], [completion for _, completion in turns]
    pair = (config.prompt, config.completion)
    if all(name in table.columns for name in pair):
        return _strings(table, config.prompt), _strings(table, config.completion)
    for field in ("messages", "prompt", "completion"):  # a column the user has named must be there
        if not config.is_default(field):
            table.column(getattr(config, field))
    if config.text in table.columns:
        return _strings(table, config.text), None
    near = did_you_mean(config.text, table.columns)
    raise DataError(
        f"{table.where}: neither {config.messages!r}, nor {pair[0]!r} with {pair[1]!r}, nor {config.text!r} "
        f"is a column; found: {', '.join(table.columns)}{near}"
    )


def _strings(table: Table, name: str) -> list[str]:
    return ["" if value is None else str(value) for value in _plain(table, name)]


def _plain(table: Table, name: str) -> list[Any]:
    """A column without lists, objects or bytes."""
    values = table.column(name)
    if odd := [i for i, value in enumerate(values, start=1) if isinstance(value, bytes)]:
        raise DataError(f"{table.where}: bytes instead of text in column {name!r} {_at(odd)}; write them as strings")
    if odd := [i for i, value in enumerate(values, start=1) if isinstance(value, (list, dict))]:
        raise DataError(f"{table.where}: a list or an object in column {name!r} {_at(odd)}")
    return values


def _last_turn(table: Table, row: int, chat: Any) -> tuple[str, str]:
    """What precedes the assistant's last answer, as lines "role: content", and the answer; else ("", "")."""
    turns: list[tuple[Any, Any]]
    try:
        turns = [(turn["role"], turn["content"] or "") for turn in chat]
    except (TypeError, KeyError):
        turns = [(None, None)]
    if not all(isinstance(part, str) for turn in turns for part in turn):
        shown = f"{reprlib.repr(chat)[:60]}"  # str may be too deep
        raise DataError(f"{table.where}: row {row}: a chat is a list of {{role, content}} in text, got {shown}")
    answers = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
    if not answers:
        return "", ""
    before = turns[: answers[-1]]
    return "".join(f"{role}: {content}\n" for role, content in before), turns[answers[-1]][1]


def _named(table: Table, column: str, wanted: list[int]) -> list[str]:
    """A column of names (labels, sites) as strings at the wanted rows; 3, 3.0 and "3.0" are all "3"."""
    values = [_name(value) for value in _plain(table, column)]
    if missing := [i + 1 for i in wanted if not values[i]]:
        raise DataError(f"{table.where}: no value in column {column!r} {_at(missing)}")
    return [values[i] for i in wanted]


def _name(value: Any) -> str:
    if value is None or value != value:  # NaN is how Parquet writers say "missing"
        return ""
    return re.sub(r"^([+-]?\d+)\.0*$", r"\1", str(value).strip())


def _at(rows: list[int]) -> str:
    """ "in row 7" or "in 12 rows: 1, 2, 3, 4, 5, ..." """
    if len(rows) == 1:
        return f"in row {rows[0]}"
    return f"in {len(rows)} rows: {', '.join(map(str, rows[:5]))}{', ...' if len(rows) > 5 else ''}"


def _sorted_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Distinct names: numerically where all are integers, else alphabetically."""
    distinct = set(names)
    if all(re.fullmatch(r"[+-]?\d{1,1000}", name) for name in distinct):  # Python reads no longer ones
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))


def _indices(names: list[str], labels: tuple[str, ...], where: str, unknown: str) -> np.ndarray:
    index = {name: i for i, name in enumerate(labels)}
    if unseen := Counter(name for name in names if name not in index):
        shown = ", ".join(f"{name!r} ({count} row{'s' if count > 1 else ''})" for name, count in unseen.most_common(5))
        more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
        raise DataError(f"{where}: labels that {unknown}: {shown}{more}")
    return np.array([index[name] for name in names], dtype=np.int64)


def _held_out(part: str | float | list[str], n: int) -> int:
    """How many of `n` rows a fraction holds out: at least one, none where the set has a source of its own."""
    return max(1, round(part * n)) if isinstance(part, float) else 0


def _subset(rows: Rows, limit: int | None) -> Rows:
    if limit is None or limit >= len(rows):
        return rows
    return rows.take(np.sort(np.random.default_rng(SPLIT_SEED).permutation(len(rows))[:limit]))


def _overlaps(train: Rows, test: Rows, public: Rows) -> list[str]:
    """A sentence for each pair of sets that share examples: they make a result look better than it is."""
    sets = {"training": set(train.identities()), "test": set(test.identities())}
    warnings = []
    for name, rows, other in (
        ("test", test, "training"),
        ("public", public, "training"),
        ("public", public, "test"),
    ):
        if shared := sum(row in sets[other] for row in rows.identities()):
            warnings.append(f"{shared} of {len(rows)} {name} texts also occur in the {other} set")
    return warnings
