"""Deal the training examples to sites.

A partitioner is a plain function `(keys, clients, rng, ...) -> indices of each client`, where `keys` [N] is
what it looks at (labels, length bins, site names). The result is a partition, disjoint and complete, and a
pure function of the keys, the number of clients, the parameters and the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from fedtrio.data.load import Rows
from fedtrio.errors import DataError
from fedtrio.names import or_added

SEED_TAG = 0x7061  # "pa": keeps this stream apart from others that start from the same seed
MAX_DRAWS = 1_000

PARAMETERS = {
    "iid": {"min_examples"},
    "dirichlet": {"alpha", "variant", "min_examples"},
    "shards": {"shards_per_client", "min_examples"},
    "quantity": {"beta", "min_examples"},
    "column": {"min_examples"},
    "length": {"alpha", "variant", "bins", "min_examples"},
}
Partitioner = Callable[[Rows, int, np.random.Generator], list[np.ndarray]]
ADDED: dict[str, Partitioner] = {}  # by users, see `fedtrio.extend`; min_examples is their only parameter


class PartitionConfig(BaseModel):
    """How the training examples are dealt to sites; a parameter that `name` does not use is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[Literal["iid", "dirichlet", "shards", "quantity", "column", "length"], *or_added(ADDED)] = Field(
        default="dirichlet",
        description="iid: at random; dirichlet: skewed labels; shards: few labels for each site; "
        "quantity: unequal sizes; column: the natural sites in `data.site`; length: skewed text lengths.",
    )
    alpha: float = Field(
        default=0.5, gt=0, le=1e6, description="dirichlet, length: concentration; 0.1 is very skewed, 100 nearly IID."
    )
    variant: Literal["plain", "balanced"] = Field(
        default="plain",
        description="dirichlet, length: balanced gives nothing more to a site that has its N/K examples.",
    )
    beta: float = Field(
        default=0.5, gt=0, le=1e6, description="quantity: concentration of the sizes; small is very unequal."
    )
    shards_per_client: int = Field(
        default=2, ge=1, le=1_000_000, description="shards: label-sorted pieces that each site gets."
    )
    bins: int = Field(default=10, ge=2, le=10_000, description="length: quantile bins of text length.")
    min_examples: int = Field(default=1, ge=1, le=10**9, description="The least number of examples of a site.")

    @model_validator(mode="after")
    def _only_its_own_parameters(self) -> PartitionConfig:
        for field in sorted(self.model_fields_set - {"name"} - PARAMETERS.get(self.name, {"min_examples"})):
            users = " or ".join(name for name, fields in PARAMETERS.items() if field in fields)
            raise ValueError(f"partition {self.name!r} has no {field!r} (that belongs to {users}); leave it out")
        return self

    @model_serializer(mode="wrap")
    def _write_its_own_parameters(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """What is written can be read again: foreign defaults stay out."""
        return {
            k: v for k, v in handler(self).items() if k == "name" or k in PARAMETERS.get(self.name, {"min_examples"})
        }


@dataclass(frozen=True)
class Share:
    """One site's part: its name and its sorted indices, int64 [n_k]."""

    name: str
    indices: np.ndarray


def partition(config: PartitionConfig, rows: Rows, clients: int, seed: int) -> list[Share]:
    """Deal `rows` to `clients` sites named site-0, site-1, ..., padded with zeros so that they sort.

    `column` ignores `clients` and `seed`: its sites are the distinct names in `rows.sites`, in alphabetical
    order. The stream is `default_rng([seed, SEED_TAG])`. Raises `DataError` where the rows lack what the
    partition looks at and where no partition gives every site `min_examples`.
    """
    rng = np.random.default_rng([seed, SEED_TAG])
    if config.name == "column":
        return _natural_sites(rows, config.min_examples)
    _check_feasible(len(rows), clients, config.min_examples)
    match config.name:
        case "iid":
            parts = iid(np.arange(len(rows)), clients, rng)
        case "quantity":
            parts = quantity(np.arange(len(rows)), clients, rng, config.beta, config.min_examples)
        case "shards":
            parts = shards(_labels(rows, "shards"), clients, rng, config.shards_per_client, config.min_examples)
        case "dirichlet" | "length":
            keys = length_bins(rows, config.bins) if config.name == "length" else _labels(rows, "dirichlet")
            parts = dirichlet(keys, clients, rng, config.alpha, config.variant, config.min_examples)
        case own:
            parts = _checked(ADDED[own](rows, clients, rng), own, len(rows), clients)
            _check_smallest(parts, config.min_examples, own)
    width = len(str(clients - 1))
    return [Share(f"site-{k:0{width}}", part) for k, part in enumerate(parts)]


def iid(keys: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Permute and cut into equal pieces; sizes differ by at most one."""
    return _sorted(np.array_split(rng.permutation(len(keys)), clients))


def dirichlet(
    keys: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    alpha: float,
    variant: Literal["plain", "balanced"] = "plain",
    min_examples: int = 1,
) -> list[np.ndarray]:
    """Split every class by its own q_c ~ Dir(α·1_K) (Hsu, arXiv:1909.06335; Li, arXiv:2102.02079).

    `balanced` follows `partition_data` of NIID-Bench and FedML: before a class is split, q is set to zero
    for clients that already hold N/K examples, and renormalised. The whole is drawn anew until every client
    has `min_examples`; `DataError` after 1,000 draws.
    """
    _check_feasible(len(keys), clients, min_examples)
    classes = [np.flatnonzero(keys == key) for key in np.unique(keys)]

    def draw() -> list[np.ndarray]:
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        sizes = np.zeros(clients, dtype=np.int64)
        for members in classes:
            q = rng.dirichlet(np.full(clients, alpha))
            if variant == "balanced":
                has_room = sizes < len(keys) / clients
                q = q * has_room
                q = q / q.sum() if q.sum() > 0 else has_room / has_room.sum()
            for k, piece in enumerate(_cut(rng.permutation(members), q)):
                parts[k].append(piece)
                sizes[k] += len(piece)
        return [np.concatenate(pieces) for pieces in parts]

    return _draw_until(draw, min_examples, f"dirichlet with alpha {alpha:g}", "a larger alpha")


def shards(
    keys: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    shards_per_client: int = 2,
    min_examples: int = 1,
) -> list[np.ndarray]:
    """Sort by label, cut into K·s shards, deal s to every client (McMahan, arXiv:1602.05629)."""
    n_shards = clients * shards_per_client
    if n_shards > len(keys):
        fewer = [f"at most {len(keys) // shards_per_client} clients"] if len(keys) >= shards_per_client else []
        fewer += [f"shards_per_client at most {len(keys) // clients}"] if len(keys) >= clients else []
        raise DataError(
            f"partition shards: {n_shards} shards need as many examples; there are {len(keys)}; "
            f"feasible: {' or '.join(fewer)}"
        )
    shuffled = rng.permutation(len(keys))  # so that which examples of a class share a shard is random too
    pieces = np.array_split(shuffled[np.argsort(keys[shuffled], kind="stable")], n_shards)
    deal = rng.permutation(n_shards).reshape(clients, shards_per_client)
    parts = [np.concatenate([pieces[s] for s in mine]) for mine in deal]
    _check_smallest(parts, min_examples, "shards")
    return _sorted(parts)


def quantity(
    keys: np.ndarray, clients: int, rng: np.random.Generator, beta: float, min_examples: int = 1
) -> list[np.ndarray]:
    """Sizes in proportion to Dir(β·1_K), labels IID (Li, arXiv:2102.02079); redrawn as in `dirichlet`."""
    _check_feasible(len(keys), clients, min_examples)

    def draw() -> list[np.ndarray]:
        return _cut(rng.permutation(len(keys)), rng.dirichlet(np.full(clients, beta)))

    return _draw_until(draw, min_examples, f"quantity with beta {beta:g}", "a larger beta")


def column(keys: Sequence[str]) -> dict[str, np.ndarray]:
    """The natural sites: distinct names in alphabetical order, each with its indices."""
    names, inverse = np.unique(np.asarray(keys, dtype=object).astype(str), return_inverse=True)
    return {str(name): np.flatnonzero(inverse == k).astype(np.int64) for k, name in enumerate(names)}


def length_bins(rows: Rows, bins: int) -> np.ndarray:
    """The quantile bin of every example's length in characters, int64 [N]; equal lengths share a bin.

    Split by `dirichlet` as if they were labels, they give sites that hold mostly short or mostly long texts
    (length-based partition of SplitFT; the binning is ours).
    """
    lengths = np.array([len(prompt) + len(completion) for prompt, completion in rows.identities()])
    edges = np.quantile(lengths, np.arange(1, bins) / bins)
    return np.searchsorted(edges, lengths, side="right").astype(np.int64)


def describe(shares: Sequence[Share], labels: np.ndarray | None, n_labels: int) -> list[dict[str, Any]]:
    """One record for each share: name, examples and, where there are labels [N], how skewed they are.

    `label_counts` [C]; `emd` = ‖p_k − p‖₁, from 0 (labels as in the whole) towards 2 (labels of its own);
    `effective_labels` = e^{H(p_k)}, from 1 to C. p_k and p are the label frequencies of the share and of
    all shares.
    """
    records: list[dict[str, Any]] = [{"name": s.name, "examples": len(s.indices)} for s in shares]
    if labels is None or n_labels == 0:
        return records
    counts_KC = np.stack([np.bincount(labels[s.indices], minlength=n_labels) for s in shares])
    p_C = counts_KC.sum(axis=0) / counts_KC.sum()
    for record, counts_C in zip(records, counts_KC, strict=True):
        p_k = counts_C / max(1, counts_C.sum())
        held = p_k[p_k > 0]
        record["label_counts"] = counts_C.tolist()
        record["emd"] = float(np.abs(p_k - p_C).sum())
        record["effective_labels"] = float(np.exp(-(held * np.log(held)).sum()))
    return records


def _natural_sites(rows: Rows, min_examples: int) -> list[Share]:
    if rows.sites is None:
        raise DataError("partition column: the data names no sites; set data.site to the column that does")
    parts = column(rows.sites)
    if small := [f"{name!r} ({len(part)})" for name, part in parts.items() if len(part) < min_examples]:
        raise DataError(
            f"partition column: sites with fewer than {min_examples} examples: {', '.join(small[:5])}"
            f"{', …' if len(small) > 5 else ''}; feasible: min_examples at most {min(map(len, parts.values()))}"
        )
    return [Share(name, part) for name, part in parts.items()]


def _labels(rows: Rows, name: str) -> np.ndarray:
    if rows.labels is None:
        raise DataError(
            f"partition {name}: the data has no labels; set data.label, or use iid, quantity, length, column"
        )
    return rows.labels


def _check_feasible(n: int, clients: int, min_examples: int) -> None:
    """Refuse before any draw what no draw can give."""
    if clients < 1:
        raise DataError(f"partition: {clients} clients; at least 1 is needed")
    if clients * min_examples > n:
        raise DataError(
            f"partition: {clients} clients with {min_examples} or more examples each need "
            f"{clients * min_examples}, there are {n}; feasible: at most {n // min_examples} clients"
            + (f", or min_examples at most {n // clients}" if n >= clients else "")
        )


def _checked(parts: Sequence[Any], name: str, n: int, clients: int) -> list[np.ndarray]:
    """What an added partitioner gave. Raises DataError unless each example lies at one site, and each site has some."""
    arrays = [np.asarray(part, dtype=np.int64).ravel() for part in parts]
    times = np.bincount(np.concatenate(arrays), minlength=n) if arrays else np.zeros(n)
    if len(arrays) != clients or len(times) > n or not (times == 1).all():
        raise DataError(
            f"partition {name}: it gave {len(arrays)} parts for {clients} clients, and of {n} examples "
            f"{int((times[:n] == 0).sum())} to none and {int((times > 1).sum())} to several; each belongs to one"
        )
    return _sorted(arrays)


def _check_smallest(parts: Sequence[np.ndarray], min_examples: int, name: str) -> None:
    smallest = min(map(len, parts))
    if smallest < min_examples:
        raise DataError(
            f"partition {name}: the smallest site has {smallest} examples, min_examples is {min_examples}; "
            f"feasible: min_examples at most {smallest}"
        )


def _draw_until(draw: Callable[[], list[np.ndarray]], min_examples: int, what: str, remedy: str) -> list[np.ndarray]:
    best, clients = 0, 0
    for _ in range(MAX_DRAWS):
        parts = draw()
        best, clients = max(best, min(map(len, parts))), len(parts)
        if best >= min_examples:
            return _sorted(parts)
    raise DataError(
        f"partition {what}: none of {MAX_DRAWS:,} draws gave all {clients} clients {min_examples} examples "
        f"(the best gave {best}); use {remedy}, fewer clients"
        + (f", or min_examples at most {best}" if best else " or another partition")
    )


def _cut(indices: np.ndarray, q: np.ndarray) -> list[np.ndarray]:
    """Cut [n] into pieces in the proportions q [K], which sum to 1."""
    ends = np.cumsum(q)[:-1] * len(indices) + 1e-9  # a sum of 0.999… must not leave one over for a q of zero
    return np.split(indices, ends.astype(np.int64))


def _sorted(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.sort(part).astype(np.int64) for part in parts]
