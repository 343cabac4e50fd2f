"""Robust means: numbers by hand, honest sites against hostile ones, and who is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from tiny import distance, same
from torch import Tensor

from fedtrio.aggregation.adapters import weighted_mean
from fedtrio.aggregation.lora import at_scale, pairs
from fedtrio.aggregation.robust import (
    clipped,
    coordinate_median,
    distances,
    krum,
    krum_scores,
    krum_sites,
    multi_krum,
    product_distances,
    trimmed_mean,
    update_norm,
)
from fedtrio.errors import ConfigError, MessageError

Named = dict[str, Tensor]
LINE = {"a": 0.0, "b": 1.0, "c": 2.5, "d": 4.5, "e": 100.0}


def line(values: Mapping[str, float] = LINE) -> dict[str, Named]:
    return {site: {"x": torch.tensor([value], dtype=torch.float64)} for site, value in values.items()}


def drawn(n: int, spread: float = 1.0, dtype: torch.dtype = torch.float64) -> dict[str, Named]:
    """Updates around a common one, of two tensors."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"q.lora_A.default.weight": (3, 7), "q.lora_B.default.weight": (5, 3), "score.weight": (4,)}
    centre = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    return {
        f"s{k}": {
            n: (t + spread * torch.randn(t.shape, generator=generator, dtype=t.dtype)).to(dtype)
            for n, t in centre.items()
        }
        for k in range(n)
    }


def equal(updates: Mapping[str, object]) -> dict[str, float]:
    return dict.fromkeys(updates, 1.0)


# Elementwise ----------------------------------------------------------------------------------------------------------


def test_median_and_trimmed_mean_by_hand():
    updates = line() | {"f": {"x": torch.tensor([-50.0]).double()}}  # −50, 0, 1, 2.5, 4.5, 100
    assert trimmed_mean(updates, 1)["x"].item() == 2.0
    assert trimmed_mean(updates, 2)["x"].item() == coordinate_median(updates)["x"].item() == 1.75
    assert coordinate_median(line())["x"].item() == 2.5
    rows = {k: {"x": torch.tensor(v)} for k, v in {"a": [1.0, 9.0], "b": [2.0, 7.0], "c": [9.0, 8.0]}.items()}
    assert torch.equal(coordinate_median(rows)["x"], torch.tensor([2.0, 8.0]))  # each element for itself


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [3, 4, 7])
def test_trimming_nothing_is_the_mean(n: int, dtype: torch.dtype):
    """R1."""
    updates = drawn(n, dtype=dtype)
    assert distance(trimmed_mean(updates, 0), weighted_mean(updates, equal(updates))) < torch.finfo(dtype).eps * 8
    assert {t.dtype for t in trimmed_mean(updates, 0).values()} == {dtype}
    assert distance(trimmed_mean(updates, 1), trimmed_mean(updates, 0)) > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_identical_sites_are_their_own_mean(dtype: torch.dtype):
    """R1: to the last bit."""
    one = drawn(1, dtype=dtype)["s0"]
    updates = {f"s{k}": one for k in range(7)}
    for found in (
        coordinate_median(updates),
        trimmed_mean(updates, 2),
        krum(updates, 2),
        multi_krum(updates, 2, keep=5),
        trimmed_mean(updates, 0),
    ):
        assert same(found, one)
    many = {"x": torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)}
    assert same(trimmed_mean({f"s{k:02}": many for k in range(14)}, 1), many)
    if dtype is torch.float64:  # where the plain mean of equal values is another
        assert not torch.equal(torch.stack([many["x"]] * 12).mean(0), many["x"])


def test_hostile_values_do_not_move_the_median():
    """Two of seven may say anything at all: what comes out lies among what honest sites said."""
    honest = drawn(5, spread=0.1)
    low = {n: torch.stack([h[n] for h in honest.values()]).min(0).values for n in honest["s0"]}
    high = {n: torch.stack([h[n] for h in honest.values()]).max(0).values for n in honest["s0"]}
    for size in (-1e30, -10.0, 1e4, 1e300):
        updates = honest | {f"evil{k}": {n: torch.full_like(t, size) for n, t in honest["s0"].items()} for k in (1, 2)}
        for found in (coordinate_median(updates), trimmed_mean(updates, 2), krum(updates, 2)):
            assert all(bool(((found[n] >= low[n]) & (found[n] <= high[n])).all()) for n in low)
        assert distance(weighted_mean(updates, equal(updates)), honest["s0"]) > 1


# Krum -----------------------------------------------------------------------------------------------------------------


def test_krum_by_hand():
    """f = 1 of five: the two nearest count. 0: 1² + 2.5²; 1: 1² + 1.5²; 2.5: 1.5² + 2²; 4.5: 2² + 3.5²."""
    scores = krum_scores(distances(line()), byzantine=1)
    assert scores[:4].tolist() == pytest.approx([7.25, 3.25, 6.25, 16.25], abs=1e-12)
    assert float(scores[4]) == pytest.approx(95.5**2 + 97.5**2)
    assert krum_sites(line(), 1, keep=5) == ["b", "c", "a", "d", "e"]
    assert krum(line(), 1)["x"].item() == 1.0
    assert multi_krum(line(), 1, keep=2)["x"].item() == 1.75
    assert krum_scores(distances(line()), byzantine=0)[0].item() == pytest.approx(7.25 + 4.5**2)


def test_distances_are_over_all_tensors():
    updates = drawn(4)
    flat = torch.stack([torch.cat([t.flatten() for t in u.values()]) for u in updates.values()])
    assert torch.allclose(distances(updates), torch.cdist(flat, flat), atol=1e-12)
    far = drawn(3, spread=1e-9)  # a Gram matrix would lose these
    apart = [torch.cat([(far["s0"][n] - far[s][n]).flatten() for n in far["s0"]]).norm() for s in ("s1", "s2")]
    assert distances(far)[0, 1:].tolist() == pytest.approx([float(a) for a in apart], rel=1e-12)


@pytest.mark.parametrize("byzantine", [1, 2])
def test_krum_takes_an_honest_one(byzantine: int):
    """R1: with 2f + 3 sites, of which f are far off, together and of one mind."""
    honest = drawn(byzantine + 3, spread=0.1)
    for shift in (2.0, 1e6):
        evil = {f"e{k}": {n: t + shift for n, t in honest["s0"].items()} for k in range(byzantine)}
        updates = evil | honest
        assert krum_sites(updates, byzantine, keep=3)[0] in honest
        assert set(krum_sites(updates, byzantine, keep=len(honest))) == set(honest)
        kept = multi_krum(updates, byzantine, keep=len(honest))
        assert distance(kept, weighted_mean(honest, equal(honest))) < 1e-14
        assert distance(weighted_mean(updates, equal(updates)), kept) > 0.1


def test_multi_krum_of_all_is_the_mean():
    """R1."""
    updates = drawn(7)
    assert distance(multi_krum(updates, 2, keep=7), weighted_mean(updates, equal(updates))) < 1e-15
    assert same(multi_krum(updates, 2, keep=1), krum(updates, 2))


def test_factors_and_products_differ():
    """R2: hostile sites send the mean of everybody's factors, which is near to all of them, and far from their product.

    The honest ones hold one product in factors that are turned against each other.
    """
    generator, one = torch.Generator().manual_seed(0), drawn(1)["s0"]
    honest = {}
    for k in range(5):
        q = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
        a, b = one["q.lora_A.default.weight"], one["q.lora_B.default.weight"]
        honest[f"s{k}"] = one | {"q.lora_A.default.weight": q @ a, "q.lora_B.default.weight": b @ q.T}
    middle = weighted_mean(honest, equal(honest))
    updates = honest | {"evil1": middle, "evil2": middle}
    scales = dict.fromkeys(updates, 2.0)
    between = product_distances(updates, scales)
    assert krum_sites(updates, 2, keep=1)[0] in ("evil1", "evil2")
    assert krum_sites(updates, 2, keep=1, distances_KK=between)[0] in honest
    assert float(between[2:, 2:].max()) < 1e-12 < 1 < float(between[0, 2]), "in sorted order: evil1, evil2, s0 …"
    assert float(distances(honest).fill_diagonal_(9).min()) > 0.5


def test_product_distances_are_the_dense_ones():
    """Of mixed ranks and scales; the head counts too; the same change at another scale is at no distance."""
    updates = drawn(2) | {"s2": drawn(3)["s2"]}
    updates["s1"] = {n: t[:2] if "lora_A" in n else t[:, :2] if "lora_B" in n else t for n, t in updates["s1"].items()}
    scales = {"s0": 2.0, "s1": 3.0, "s2": 0.5}
    (pair,) = pairs(updates["s0"]).values()
    whole = {
        s: torch.cat([(scales[s] * u[pair.b] @ u[pair.a]).flatten(), u["score.weight"]]) for s, u in updates.items()
    }
    wanted = torch.stack([torch.stack([(x - y).norm() for y in whole.values()]) for x in whole.values()])
    assert torch.allclose(product_distances(updates, scales), wanted, atol=1e-12)
    twin = {"a": updates["s0"], "b": at_scale(updates["s0"], 2.0, 5.0)}
    assert float(product_distances(twin, {"a": 2.0, "b": 5.0}).max()) < 1e-12 < float(distances(twin).max())


# Clipping -------------------------------------------------------------------------------------------------------------


def test_clipping_by_hand():
    update = {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([[4.0]])}
    assert update_norm(update) == 5.0
    half = clipped(update, 2.5)
    assert torch.equal(half["x"], torch.tensor([1.5, 0.0])) and torch.equal(half["y"], torch.tensor([[2.0]]))
    assert update_norm(clipped(update, 1e-3)) == pytest.approx(1e-3)
    nothing = {name: torch.zeros_like(t) for name, t in update.items()}
    assert same(clipped(nothing, 1.0), nothing) and same(clipped(update, 0.0), nothing)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_within_the_limit_keeps_every_bit(dtype: torch.dtype):
    update = drawn(1, dtype=dtype)["s0"]
    assert same(clipped(update, update_norm(update)), update) and same(clipped(update, math.inf), update)
    assert not same(clipped(update, 0.9 * update_norm(update)), update)


def test_clipping_bounds_what_one_site_can_do():
    honest = drawn(4, spread=0.1)
    boosted = honest | {"evil": {n: -1e6 * t for n, t in honest["s0"].items()}}
    limit = max(update_norm(u) for u in honest.values())
    kept = weighted_mean({s: clipped(u, limit) for s, u in boosted.items()}, equal(boosted))
    mean = weighted_mean(honest, equal(honest))
    moved = math.sqrt(sum(float((kept[n] - mean[n]).square().sum()) for n in kept))
    assert moved <= 2 * limit / 5 + 1e-12


# All of them ----------------------------------------------------------------------------------------------------------


def test_too_few_sites_are_refused():
    for n, byzantine in ((4, 1), (6, 2), (2, 0)):
        with pytest.raises(ConfigError, match=f"needs {2 * byzantine + 3} sites at least, and {n} answered"):
            krum(drawn(n), byzantine)
        assert len(krum_sites(drawn(n + 1), byzantine, keep=1)) == 1
    with pytest.raises(ConfigError, match="a trimmed mean without 2 on either side needs 5"):
        trimmed_mean(drawn(4), 2)
    with pytest.raises(ConfigError, match="the median needs 3 sites at least, and 2 answered"):
        coordinate_median(drawn(2))
    for keep in (0, 6):
        with pytest.raises(ConfigError, match=f"can keep 1 to 5 of 5 sites, not {keep}"):
            multi_krum(drawn(5), 1, keep=keep)


def test_sites_that_differ_are_named():
    updates = drawn(5)
    updates["s3"] = {n: t for n, t in updates["s3"].items() if n != "score.weight"}
    with pytest.raises(MessageError, match=r"s3 and s0 differ in 1 tensors, such as score\.weight"):
        coordinate_median(updates)
    updates = drawn(5)
    updates["s2"]["q.lora_A.default.weight"] = torch.zeros(2, 7)
    with pytest.raises(ConfigError, match=r"s2 sent q\.lora_A\.default\.weight as \[2, 7\]"):
        krum(updates, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_order_of_sites_changes_no_bit(dtype: torch.dtype):
    """F10, ties included: there the first by name is taken."""
    updates = drawn(7, dtype=dtype)
    turned = {s: updates[s] for s in sorted(updates, reverse=True)}
    for rule in (
        coordinate_median,
        lambda u: trimmed_mean(u, 2),
        lambda u: krum(u, 2),
        lambda u: multi_krum(u, 2, keep=4),
    ):
        assert same(rule(updates), rule(turned))
    tied = line({"e": 1.0, "d": 1.0, "c": 1.0, "b": 1.0, "a": 1.0})
    assert krum_sites(tied, 1, keep=5) == ["a", "b", "c", "d", "e"]


def test_nothing_given_is_changed():
    updates = drawn(5)
    before = {s: {n: t.clone() for n, t in u.items()} for s, u in updates.items()}
    for found in (coordinate_median(updates), trimmed_mean(updates, 1), krum(updates, 1), clipped(updates["s0"], 0.1)):
        for tensor in found.values():
            tensor.add_(1.0)
    assert all(same(updates[s], before[s]) for s in updates)
