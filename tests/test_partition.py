"""Partitions: disjoint, complete, a function of their arguments alone, and as skewed as their numbers say."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from fedtrio.data.load import Rows
from fedtrio.data.partition import (
    PartitionConfig,
    Share,
    column,
    describe,
    dirichlet,
    length_bins,
    partition,
    quantity,
    shards,
)
from fedtrio.errors import DataError

N, CLASSES = 600, 6


@pytest.fixture(scope="module")
def rows() -> Rows:
    rng = np.random.default_rng(1)
    return Rows(
        prompts=["x" * int(n) for n in rng.integers(1, 200, N)],
        labels=rng.integers(0, CLASSES, N),
        sites=[f"bank {i % 4}" for i in range(N)],
    )


WAYS = [
    {"name": "iid"},
    {"name": "dirichlet", "alpha": 0.1},
    {"name": "dirichlet", "alpha": 100.0, "variant": "balanced"},
    {"name": "shards", "shards_per_client": 2},
    {"name": "quantity", "beta": 0.5},
    {"name": "length", "alpha": 0.3, "bins": 5},
    {"name": "column"},
]


def indices(config: dict, rows: Rows, clients: int = 4, seed: int = 0) -> list[list[int]]:
    return [s.indices.tolist() for s in partition(PartitionConfig(**config), rows, clients, seed)]


@pytest.mark.parametrize("config", WAYS, ids=lambda c: "-".join(map(str, c.values())))
class TestEveryWay:
    def test_disjoint_complete_sorted(self, config, rows):
        for clients in (1, 4, 13):
            for seed in range(3):
                shares = partition(PartitionConfig(**config), rows, clients, seed)
                together = np.concatenate([s.indices for s in shares])
                assert sorted(together.tolist()) == list(range(N))
                assert all(s.indices.dtype == np.int64 and (np.diff(s.indices) > 0).all() for s in shares)
                assert all(len(s.indices) >= 1 for s in shares)
                assert len(shares) == (4 if config["name"] == "column" else clients)

    def test_function_of_its_arguments_alone(self, config, rows):
        first = indices(config, rows)
        np.random.seed(99)  # global state must not matter
        assert indices(config, rows) == first
        if config["name"] != "column":
            assert indices(config, rows, seed=1) != first
            assert len(indices(config, rows, clients=5)) == 5

    def test_a_written_configuration_reads_back(self, config, rows):
        written = PartitionConfig(**config).model_dump()
        assert indices(written, rows) == indices(config, rows)


def test_alpha_matters(rows):
    assert indices({"name": "dirichlet", "alpha": 0.1}, rows) != indices({"name": "dirichlet", "alpha": 0.2}, rows)


def test_names_sort():
    rows = Rows(["x"] * 24)
    assert [s.name for s in partition(PartitionConfig(name="iid"), rows, 10, 0)][-1] == "site-9"
    names = [s.name for s in partition(PartitionConfig(name="iid"), rows, 12, 0)]
    assert names[:2] == ["site-00", "site-01"]
    assert names == sorted(names)


def test_iid_sizes_differ_by_at_most_one():
    assert sorted(len(part) for part in indices({"name": "iid"}, Rows(["x"] * 10))) == [2, 2, 3, 3]


def test_alpha_orders_the_skew(rows):
    def mean_emd(alpha: float) -> float:
        config = PartitionConfig(name="dirichlet", alpha=alpha)
        each = [describe(partition(config, rows, 4, seed), rows.labels, CLASSES) for seed in range(5)]
        return float(np.mean([d["emd"] for described in each for d in described]))

    assert mean_emd(0.1) > 1.3 * mean_emd(1.0)
    assert mean_emd(1.0) > 3 * mean_emd(100.0)


def test_balanced_bounds_the_sizes():
    """A client that holds N/K before a class gets none of it, so none passes N/K by more than a class."""
    keys = np.repeat(np.arange(20), 30)
    sizes = {}
    for variant in ("plain", "balanced"):
        parts = dirichlet(keys, 5, np.random.default_rng(0), 0.1, variant)
        sizes[variant] = [len(part) for part in parts]
    assert max(sizes["balanced"]) < 600 / 5 + 30
    assert np.std(sizes["balanced"]) < np.std(sizes["plain"])


def test_dirichlet_splits_each_class_by_its_own_draw():
    """The draw replayed by hand: q for class 0, its permutation, then class 1."""
    keys = np.array([1, 0, 1, 0, 1, 0, 1, 0])
    parts = dirichlet(keys, 2, np.random.default_rng(3), 5.0)
    rng = np.random.default_rng(3)
    expected: list[list[int]] = [[], []]
    for members in ([1, 3, 5, 7], [0, 2, 4, 6]):
        q = rng.dirichlet([5.0, 5.0])
        order = rng.permutation(members).tolist()
        cut = int(q[0] * 4)
        expected[0] += order[:cut]
        expected[1] += order[cut:]
    assert [part.tolist() for part in parts] == [sorted(e) for e in expected]


def test_shards_hold_few_labels():
    keys = np.repeat(np.arange(10), 20)[::-1].copy()
    parts = shards(keys, 5, np.random.default_rng(0), 2)
    assert [len(part) for part in parts] == [40] * 5
    assert all(len(set(keys[part])) <= 2 for part in parts)


def test_quantity_is_unequal_in_size_only():
    keys = np.arange(10_000)
    parts = quantity(keys, 5, np.random.default_rng(0), 0.5)
    assert max(map(len, parts)) > 3 * min(map(len, parts))
    large = max(parts, key=len)
    assert abs(large.mean() - 5_000) < 300


def test_column_by_hand():
    parts = column(["lyon", "bern", "lyon", "bern", "aix"])
    assert {name: part.tolist() for name, part in parts.items()} == {
        "aix": [4],
        "bern": [1, 3],
        "lyon": [0, 2],
    }
    assert list(parts) == ["aix", "bern", "lyon"]


def test_length_bins_by_hand():
    rows = Rows(["a", "bb", "bb", "cccc", "", "eeeee"], ["", "", "", "", "fff", "fff"])
    assert length_bins(rows, 2).tolist() == [0, 0, 0, 1, 1, 1]  # lengths 1 2 2 4 3 8, median 2.5


def test_length_skews_lengths(rows):
    lengths = np.array([len(p) for p in rows.prompts])
    means = [lengths[part].mean() for part in indices({"name": "length", "alpha": 0.1, "bins": 4}, rows)]
    assert max(means) - min(means) > 50


def test_describe_by_hand():
    labels = np.array([0, 0, 1, 1])
    shares = [Share("a", np.array([0, 1])), Share("b", np.array([2])), Share("c", np.array([3]))]
    first, second, _ = describe(shares, labels, 2)
    assert first == {"name": "a", "examples": 2, "label_counts": [2, 0], "emd": 1.0, "effective_labels": 1.0}
    assert second["label_counts"] == [0, 1]
    whole = describe([Share("all", np.arange(4))], labels, 2)[0]
    assert whole["emd"] == 0.0
    assert whole["effective_labels"] == pytest.approx(2.0)
    assert describe(shares, None, 0)[0] == {"name": "a", "examples": 2}


class TestErrors:
    def test_impossible_before_any_draw(self, rows):
        with pytest.raises(DataError, match=r"clients with 200 .* 800, there are 600; feasible: at most 3 clients"):
            indices({"name": "dirichlet", "min_examples": 200}, rows)
        with pytest.raises(DataError, match="at least 1"):
            indices({"name": "iid"}, rows, clients=0)
        with pytest.raises(DataError, match=r"at most 600 clients$"):
            indices({"name": "iid"}, rows, clients=601)

    def test_infeasible_after_the_draws(self, rows):
        with pytest.raises(DataError, match=r"none of 1,000 draws gave all 4 clients 150 .* best gave \d+.*alpha"):
            indices({"name": "dirichlet", "alpha": 0.05, "min_examples": 150}, rows)
        with pytest.raises(DataError, match="larger beta"):
            indices({"name": "quantity", "beta": 0.05, "min_examples": 150}, rows)

    def test_min_examples_is_kept_by_redrawing(self, rows):
        assert min(map(len, indices({"name": "dirichlet", "alpha": 0.3, "min_examples": 60}, rows))) >= 60

    def test_shards(self, rows):
        with pytest.raises(DataError, match="800 shards need as many examples; there are 600"):
            indices({"name": "shards", "shards_per_client": 200}, rows)
        with pytest.raises(DataError, match="the smallest site has 6 examples, min_examples is 7"):
            shards(np.zeros(13), 2, np.random.default_rng(0), 2, min_examples=7)

    def test_no_labels(self):
        with pytest.raises(DataError, match=r"shards: the data has no labels; set data\.label"):
            indices({"name": "shards"}, Rows(["x"] * 9))

    def test_column(self, rows):
        with pytest.raises(DataError, match=r"names no sites; set data\.site"):
            indices({"name": "column"}, Rows(["x"] * 9))
        with pytest.raises(DataError, match=r"fewer than 151 examples: 'bank 0' \(150\)"):
            indices({"name": "column", "min_examples": 151}, rows)

    def test_parameter_of_another_way(self):
        with pytest.raises(ValidationError, match=r"'iid' has no 'alpha' \(that belongs to dirichlet or length\)"):
            PartitionConfig(name="iid", alpha=0.1)
        with pytest.raises(ValidationError, match="extra"):
            PartitionConfig(name="iid", alhpa=0.1)  # type: ignore[call-arg]
        with pytest.raises(ValidationError, match="greater than 0"):
            PartitionConfig(name="dirichlet", alpha=0)
