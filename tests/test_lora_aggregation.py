"""The algebra of adapters and every aggregation rule, held against dense products, PEFT's own forward pass and numbers
worked out by hand. L… and F… name the identities of the rules' papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from tiny import adapted, distance, examples, same, tiny
from torch import Tensor, nn

from fedtrio.aggregation import rules
from fedtrio.aggregation.adapters import normalised, weighted_mean
from fedtrio.aggregation.lora import (
    Product,
    aggregation_error,
    at_scale,
    check_alike,
    core_name,
    factor_of,
    fresh,
    mean_product,
    merged,
    norm,
    pairs,
    placed,
    product,
    product_norm,
    remainder,
    resized,
    stacked,
    svd,
    travelling,
    truncated,
)
from fedtrio.data.batches import collate
from fedtrio.errors import ConfigError, MessageError
from fedtrio.models.adapter import AdaptedModel, adapt
from fedtrio.models.lora import LoraConfig

Adapter = dict[str, Tensor]
Scaled = list[tuple[Mapping[str, Tensor], float]]  # adapters with their scales, whose products add up

SHAPES = {"h.0.attn.c_attn": (12, 8), "h.0.mlp.c_proj": (7, 20), "h.1.square": (6, 6)}  # [o, i]
RAGGED = {"s0": 2, "s1": 4, "s2": 4, "s3": 6, "s4": 3}
EVEN = dict.fromkeys(RAGGED, 4)
WEIGHTS = {"s0": 5.0, "s1": 11.0, "s2": 8.0, "s3": 3.0, "s4": 7.5}
SCALES = {"s0": 4.0, "s1": 2.0, "s2": 2.0, "s3": 8 / 6, "s4": 8 / 3}  # lora_alpha 8, and mixed for equal ranks too
SCALE = 2.0  # the server's
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
DTYPES = list(TOLERANCE)


def names(layer: str) -> tuple[str, str]:
    return f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"


def made(rank: int, seed: int, dtype: torch.dtype = torch.float64, shapes: Mapping[str, Any] = SHAPES) -> Adapter:
    """A random adapter of that rank, with a head."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    found = {"score.modules_to_save.default.weight": drawn(5, 8), "ln_f.modules_to_save.default.bias": drawn(8)}
    for layer, (o, i) in shapes.items():
        a, b = names(layer)
        found |= {a: drawn(rank, i), b: drawn(o, rank)}
    return found


def sites(ranks: Mapping[str, int] = RAGGED, dtype: torch.dtype = torch.float64, **rest: Any) -> dict[str, Adapter]:
    return {site: made(rank, seed, dtype, **rest) for seed, (site, rank) in enumerate(ranks.items())}


def shared(factor: str, dtype: torch.dtype = torch.float64) -> dict[str, Adapter]:
    """Sites of equal rank that hold the same factor."""
    common = made(4, 99, dtype)
    return {
        site: {n: common[n] if factor_of(n) == factor else t for n, t in adapter.items()}
        for site, adapter in sites(EVEN, dtype).items()
    }


def dense(adapter: Mapping[str, Tensor], scale: float = 1.0) -> Adapter:
    """s·B·A by layer, multiplied out in NumPy, from tensors found by their names alone."""
    found = {}
    for name in adapter:
        if ".lora_A." in name:
            a, b = adapter[name].double().numpy(), adapter[name.replace("lora_A", "lora_B")].double().numpy()
            found[name.split(".lora_A.")[0]] = torch.from_numpy(scale * (b @ a))
    return found


def added(terms: Scaled) -> Adapter:
    each = [dense(adapter, scale) for adapter, scale in terms]
    return {layer: torch.stack([e[layer] for e in each if layer in e]).sum(0) for layer in each[0]}


def mean_dense(adapters: Mapping[str, Adapter], scales: Mapping[str, float] = SCALES) -> Adapter:
    p = {site: WEIGHTS[site] / sum(WEIGHTS[s] for s in adapters) for site in adapters}
    each = {site: dense(adapter, scales[site]) for site, adapter in adapters.items()}
    return {layer: torch.stack([p[s] * each[s][layer] for s in each]).sum(0) for layer in SHAPES}


def relative(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    assert got.keys() == wanted.keys()
    return max(float((got[n].double() - wanted[n]).norm() / wanted[n].norm()) for n in wanted)


def scaled(adapters: Mapping[str, Adapter], scales: Mapping[str, float] = SCALES) -> dict[str, Adapter]:
    """All at the server's scale."""
    return {site: at_scale(adapter, scales[site], SCALE) for site, adapter in adapters.items()}


def sent(adapters: Mapping[str, Adapter], factor: Any) -> dict[str, Adapter]:
    return {site: travelling(adapter, factor) for site, adapter in adapters.items()}


def common_of(adapters: Mapping[str, Adapter]) -> Adapter:
    return adapters[min(adapters)]


def cut(weights: Mapping[str, float], adapters: Mapping[str, Any]) -> dict[str, float]:
    return {site: weights[site] for site in adapters}


# Every rule as (which sites it takes, what it makes of them); its effect is the sum of s·B·A over what it gives.


def by_fedavg(adapters: dict[str, Adapter]) -> Scaled:
    return [(rules.fedavg(scaled(adapters), cut(WEIGHTS, adapters)), SCALE)]


def by_ffa(adapters: dict[str, Adapter]) -> Scaled:
    ours = scaled(adapters)
    return [(rules.ffa(common_of(ours), sent(ours, "B"), cut(WEIGHTS, adapters)), SCALE)]


def by_rolora_b(adapters: dict[str, Adapter]) -> Scaled:
    ours = scaled(adapters)
    return [(rules.rolora(common_of(ours), sent(ours, "B"), cut(WEIGHTS, adapters), round=1), SCALE)]


def by_rolora_a(adapters: dict[str, Adapter]) -> Scaled:
    same_b = {site: at_scale(adapter, SCALE, SCALES[site]) for site, adapter in adapters.items()}  # what sites hold
    ours = scaled(same_b)
    return [(rules.rolora(common_of(ours), sent(ours, "A"), cut(WEIGHTS, adapters), round=2), SCALE)]


def by_fedsvd(adapters: dict[str, Adapter]) -> Scaled:
    ours = scaled(adapters)
    return [(rules.fedsvd(common_of(ours), sent(ours, "B"), cut(WEIGHTS, adapters)), SCALE)]


def by_flora(adapters: dict[str, Adapter]) -> Scaled:
    return [(rules.flora(adapters, cut(WEIGHTS, adapters), SCALES), 1.0)]


def by_fedex(adapters: dict[str, Adapter]) -> Scaled:
    mean, residual = rules.fedex(scaled(adapters), cut(WEIGHTS, adapters), SCALE)
    return [(mean, SCALE), (residual, 1.0)]


def by_flexlora(adapters: dict[str, Adapter]) -> Scaled:
    return [(rules.flexlora(adapters, cut(WEIGHTS, adapters), SCALES, SCALE), SCALE)]


def by_hetlora(adapters: dict[str, Adapter]) -> Scaled:
    return [(rules.hetlora(scaled(adapters), cut(WEIGHTS, adapters), rank=6), SCALE)]


def by_lora_fair(adapters: dict[str, Adapter]) -> Scaled:
    return [(rules.lora_fair(scaled(adapters), cut(WEIGHTS, adapters)), SCALE)]


def by_fedrot(adapters: dict[str, Adapter]) -> Scaled:
    ours = scaled(adapters)
    return [
        (rules.fedrot(ours, cut(WEIGHTS, adapters), made(4, 77, ours[min(ours)][names("h.1.square")[0]].dtype)), SCALE)
    ]


Rule = Callable[[dict[str, Adapter]], Scaled]
MIXED: list[Rule] = [by_flora, by_flexlora, by_hetlora]
ONE_RANK: list[Rule] = [by_fedavg, by_fedex, by_lora_fair, by_fedrot]
ONE_FACTOR: list[tuple[Rule, str]] = [(by_ffa, "A"), (by_rolora_b, "A"), (by_rolora_a, "B"), (by_fedsvd, "A")]
ALL = [(rule, "") for rule in MIXED + ONE_RANK] + ONE_FACTOR


def sites_for(rule: Rule, common: str, dtype: torch.dtype = torch.float64) -> dict[str, Adapter]:
    if common:
        return shared(common, dtype)
    return sites(RAGGED if rule in MIXED else EVEN, dtype)


def truth_for(rule: Rule, adapters: dict[str, Adapter]) -> Adapter:
    """Σ p_k s_k B_k A_k; in RoLoRA's even rounds sites hold the common B in their own scale."""
    return mean_dense(adapters, dict.fromkeys(SCALES, SCALE) if rule is by_rolora_a else SCALES)


# Names --------------------------------------------------------------------------------------------------------------


def test_pairs_are_found_by_name():
    adapter = made(3, 0)
    assert list(pairs(adapter)) == sorted(SHAPES)
    assert pairs(adapter)["h.0.mlp.c_proj"] == names("h.0.mlp.c_proj")
    assert set(remainder(adapter)) == {"score.modules_to_save.default.weight", "ln_f.modules_to_save.default.bias"}
    assert {factor_of(n) for n in adapter} == {"A", "B", None}
    embedding = ("wte.lora_embedding_A.default", "wte.lora_embedding_B.default")
    file = ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight")
    assert pairs([*embedding, *file]) == {"wte": embedding, "base_model.model.q": file}
    assert core_name(pairs(embedding)["wte"]) == "wte.lora_R.default"
    assert core_name(pairs(adapter)["h.1.square"]) == "h.1.square.lora_R.default.weight"
    with pytest.raises(MessageError, match=r"q\.lora_A\.default\.weight came without q\.lora_B"):
        pairs(["q.lora_A.default.weight"])
    with pytest.raises(MessageError, match="q has two adapters"):
        pairs([f"q.lora_{f}.{n}.weight" for f in "AB" for n in ("default", "second")])


def test_a_layer_as_wide_as_the_rank():
    """Which factor a tensor is must not be told by its shape: here all of them are 4 × 4."""
    adapters = sites({"a": 4, "b": 4}, shapes={"q": (4, 4)})
    stack = rules.flora(adapters, {"a": 1, "b": 3}, {"a": 2.0, "b": 5.0})
    a, b = names("q")
    wanted = sum(p * s * adapters[k][b] @ adapters[k][a] for k, p, s in (("a", 0.25, 2.0), ("b", 0.75, 5.0)))
    assert torch.allclose(stack[b] @ stack[a], wanted, rtol=0, atol=1e-12)  # type: ignore[arg-type]
    assert stack[a].shape == (8, 4) and stack[b].shape == (4, 8)


def test_sites_that_sent_something_else_are_named():
    adapters = sites(EVEN)
    del adapters["s2"]["ln_f.modules_to_save.default.bias"]
    with pytest.raises(MessageError, match="s2 and s0 differ in 1 tensors, such as ln_f"):
        rules.fedavg(adapters, WEIGHTS)
    wrong = sites() | {"s3": made(4, 3, shapes=SHAPES | {"h.1.square": (6, 5)})}
    with pytest.raises(
        MessageError, match=r"s3 sent h\.1\.square\.lora_A\.default\.weight as \[4, 5\], s0 as \[2, 6\]"
    ):
        rules.flora(wrong, WEIGHTS, SCALES)
    with pytest.raises(MessageError, match="differ in 3 tensors"):  # a frozen factor is no business of the wire
        rules.ffa(made(4, 0), sites(EVEN), WEIGHTS)


@pytest.mark.parametrize("rule", ONE_RANK)
def test_mixed_ranks_are_refused(rule: Rule):
    with pytest.raises(ConfigError, match=r"s1 sent .*only flora, flexlora, hetlora and fedsb can mix ranks"):
        rule(sites(RAGGED))
    assert check_alike(sites(RAGGED), mixed_ranks=True) is None


# The algebra --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("o", "i", "r"), [(30, 20, 5), (20, 30, 5), (6, 9, 19), (5, 5, 1)])
def test_svd_by_the_core_is_the_dense_svd(o: int, i: int, r: int):
    """L9, also where the rank is more than either side."""
    b, a = made(r, 1, shapes={"q": (o, i)})[names("q")[1]], made(r, 2, shapes={"q": (o, i)})[names("q")[0]]
    whole = b @ a
    u, s, v = svd(Product(b, a))
    q = min(o, i, r)
    assert u.shape == (o, q) and v.shape == (q, i)
    assert float((s - torch.linalg.svdvals(whole)[:q]).abs().max() / s[0]) < 1e-13
    assert float((u * s @ v - whole).norm() / whole.norm()) < 1e-13
    for basis in (u.T, v):
        assert float((basis @ basis.T - torch.eye(q, dtype=torch.float64)).abs().max()) < 1e-13
    assert bool((v.gather(1, v.abs().argmax(1, keepdim=True)) > 0).all())  # signs are fixed
    turned = svd(Product(-b.flip(1), -a.flip(0)))  # the same product from other factors
    assert float((turned.v - v).abs().max()) < 1e-9
    assert abs(norm(Product(b, a)) / float(whole.norm()) - 1) < 1e-13


def test_the_norm_of_nothing_is_nothing():
    """Gram matrices would give 1e-8 of the terms here."""
    b, a = torch.randn(50, 4, dtype=torch.float64), torch.randn(4, 30, dtype=torch.float64)
    assert norm(stacked([(1.0, Product(b, a)), (-0.5, Product(2 * b, a))])) / norm(Product(b, a)) < 1e-14
    with torch.no_grad():
        both, gram = torch.cat([b, -b], 1), torch.cat([a, a])
        assert float(((both.T @ both) * (gram @ gram.T)).sum().abs().sqrt()) < 1e-5  # what is avoided


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_truncation_loses_what_it_must(rank: int):
    """L8: the error is √Σ_{j>r} σ_j² (Eckart and Young), so no other product of that rank is nearer."""
    adapters = sites()
    pair = pairs(adapters["s0"])["h.0.mlp.c_proj"]
    exact = mean_product(adapters, pair, WEIGHTS, SCALES)
    whole = exact.b @ exact.a
    near = truncated(exact, rank)
    left = torch.linalg.svdvals(whole)[rank:].square().sum().sqrt()
    assert abs(float((near.b @ near.a - whole).norm() - left)) < 1e-10 * float(whole.norm())
    assert near.b.shape == (7, rank) and (float(left) > 1e-2 or rank == 7)


def test_energy_by_hand():
    """σ² of 9, 4, 2, 1: 16 together."""
    values = torch.tensor([3.0, 2.0, math.sqrt(2), 1.0], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64)).Q
    planted = Product(basis * values, basis.T)
    for energy, rank in ((0.5, 1), (0.56, 1), (0.57, 2), (0.81, 2), (0.82, 3), (0.93, 3), (0.94, 4), (1.0, 4)):
        assert truncated(planted, energy=energy).a.shape[0] == rank, energy
    assert truncated(planted, rank=2, energy=0.94).a.shape[0] == 2
    nothing = truncated(Product(0 * planted.b, planted.a), energy=0.9)
    assert nothing.a.shape[0] == 1 and float(nothing.b.abs().max()) == 0


def test_the_dense_product_is_never_built():
    """200,000 × 200,000 numbers would take 298 GiB."""
    wide = {"q": (200_000, 200_000)}
    adapters = {site: made(2, k, torch.float32, wide) for k, site in enumerate("ab")}
    weights, scales = {"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 3.0}
    assert 0.1 < aggregation_error(adapters, weights, scales) < 10
    new = rules.flexlora(adapters, weights, scales, scale=1.0, rank=2)
    assert aggregation_error(adapters, weights, scales, new) > 0.1
    assert aggregation_error(adapters, weights, scales, rules.flora(adapters, weights, scales)) < 1e-6
    rules.fedex(adapters, weights, 1.0)
    rules.fedsvd(adapters["a"], sent(adapters, "B"), weights)
    assert rules.norm_weights(adapters, scales)["b"] > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_scale_is_the_same_change(dtype: torch.dtype):
    adapter = made(4, 0, dtype)
    assert relative(dense(at_scale(adapter, 8 / 3, 2.0), 2.0), dense(adapter, 8 / 3)) < TOLERANCE[dtype]
    unchanged = at_scale(adapter, 2.0, 2.0)
    assert same(unchanged, adapter)
    moved = at_scale(adapter, 4.0, 2.0)
    assert all(torch.equal(moved[n], adapter[n]) == (factor_of(n) != "B") for n in adapter)


def test_padding_and_truncating():
    """L10 and L11: padding changes no product, truncating takes it back; the right rank changes nothing."""
    adapter = made(3, 0)
    padded = resized(adapter, 7)
    assert relative(dense(padded), dense(adapter)) < 1e-15
    assert same(resized(padded, 3), adapter) and same(resized(adapter, 3), adapter)
    assert padded[names("h.1.square")[0]].shape == (7, 6) and not padded[names("h.1.square")[0]][3:].any()
    lost = dense(resized(adapter, 2))["h.1.square"] - dense(adapter)["h.1.square"]
    a, b = (adapter[n] for n in names("h.1.square"))
    assert float((lost + torch.outer(b[:, 2], a[2])).abs().max()) < 1e-14
    for made_of in (resized(adapter, 3), resized(adapter, 2), fresh(adapter)):
        addresses = {t.untyped_storage().data_ptr() for t in adapter.values()}
        assert not addresses & {t.untyped_storage().data_ptr() for t in made_of.values()}
        assert all(t.is_contiguous() for t in made_of.values())


def test_components_of_zeros_never_train():
    """A site of larger rank that is given zeros could as well have the smaller one; its own first A makes it live."""
    common, first = made(2, 0), made(5, 1)
    first = {n: torch.zeros_like(t) if factor_of(n) == "B" else t for n, t in first.items()}
    x, target = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    name_a, name_b = names("h.1.square")
    for beyond, alive in ((None, False), (first, True)):
        grown = resized(common, 5, beyond)
        assert relative(dense(grown), dense(common)) < 1e-15
        a, b = grown[name_a].requires_grad_(), grown[name_b].requires_grad_()
        ((x @ a.T @ b.T) - target).square().sum().backward()
        assert a.grad is not None and b.grad is not None
        assert bool(b.grad[:, 2:].any() or a.grad[2:].any()) == alive
        assert bool(a.grad[:2].all())
    assert torch.equal(resized(common, 5, first)[name_a][2:], first[name_a][2:])


# The error of averaging factors ---------------------------------------------------------------------------------------


def test_aggregation_error_by_hand():
    """1·1 and (−1)·(−1): the mean product is 1, but of weights 3 : 1 the factors' means are ½ and ½."""
    one, other = (
        {"q.lora_A.default.weight": torch.tensor([[s]]), "q.lora_B.default.weight": torch.tensor([[s]])}
        for s in (1.0, -1.0)
    )
    adapters, weights = {"a": one, "b": other}, {"a": 3.0, "b": 1.0}
    assert aggregation_error(adapters, weights, {"a": 1.0, "b": 1.0}) == pytest.approx(0.75, abs=1e-15)
    # at scale 2 for the second: ¾ + ½ = 1.25 is wanted, and (¾ − ½)·½ is got
    assert aggregation_error(adapters, weights, {"a": 1.0, "b": 2.0}) == pytest.approx(1.125 / 1.25, abs=1e-15)
    assert aggregation_error(adapters, {"a": 1, "b": 1}, {"a": 1.0, "b": 1.0}) == pytest.approx(1.0, abs=1e-15)
    assert aggregation_error({"a": one}, {"a": 3.0}, {"a": 2.0}) == pytest.approx(0, abs=1e-15)
    nothing = {n: torch.zeros_like(t) for n, t in one.items()}
    assert aggregation_error({"a": nothing, "b": nothing}, weights, {"a": 1.0, "b": 1.0}) == 0.0
    assert aggregation_error({"a": {"score": torch.ones(3)}}, {"a": 1.0}, {"a": 1.0}) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [RAGGED, EVEN])
def test_aggregation_error_is_the_dense_one(ranks, dtype: torch.dtype):
    adapters = sites(ranks, dtype)
    exact = mean_dense(adapters)
    p, wide = normalised(WEIGHTS), {site: resized(adapter, max(ranks.values())) for site, adapter in adapters.items()}
    got = {}
    for layer in SHAPES:
        a, b = names(layer)
        mean_b = sum(p[s] * SCALES[s] * wide[s][b].double() for s in p)
        got[layer] = mean_b @ sum(p[s] * wide[s][a].double() for s in p)  # type: ignore[operator]
    lost = math.hypot(*(float((exact[n] - got[n]).norm()) for n in exact))  # type: ignore[operator]
    by_hand = lost / math.hypot(*(float(exact[n].norm()) for n in exact))
    assert aggregation_error(adapters, WEIGHTS, SCALES) == pytest.approx(by_hand, rel=TOLERANCE[dtype])
    assert by_hand > 0.3


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_common_factor_leaves_no_error(factor: str):
    """L3: zero where all A or all B are equal; else it isn't."""
    adapters, one_scale = shared(factor), dict.fromkeys(SCALES, SCALE)
    assert aggregation_error(adapters, WEIGHTS, one_scale) < 1e-14
    assert aggregation_error(sites(EVEN), WEIGHTS, one_scale) > 0.3


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_of_any_result(dtype: torch.dtype):
    """By the rule that was used: nothing for a stack, Eckart and Young's for a truncation."""
    adapters = sites(RAGGED, dtype)
    assert aggregation_error(adapters, WEIGHTS, SCALES, by_flora(adapters)[0][0]) < TOLERANCE[dtype]
    exact = mean_dense(adapters)
    low = rules.flexlora(adapters, WEIGHTS, SCALES, SCALE, rank=3)
    left = [torch.linalg.svdvals(exact[n])[3:].square().sum() for n in exact]
    wanted = math.sqrt(sum(left) / sum(exact[n].square().sum() for n in exact))  # type: ignore[arg-type]
    assert aggregation_error(adapters, WEIGHTS, SCALES, low, SCALE) == pytest.approx(wanted, rel=TOLERANCE[dtype])


# What every rule must do ----------------------------------------------------------------------------------------------


EXACT = [by_flora, by_fedex, by_flexlora, by_ffa, by_rolora_a, by_rolora_b, by_fedsvd]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "common"), ALL)
def test_mean_of_the_products(rule: Rule, common: str, dtype: torch.dtype):
    """L1, L2, L4, L5, L7: Σ p_k s_k B_k A_k, of layers that aren't square, of mixed scales, and of mixed ranks where
    the rule takes them. The others miss it by far, so this can tell."""
    adapters = sites_for(rule, common, dtype)
    error = relative(added(rule(adapters)), truth_for(rule, adapters))
    assert error < TOLERANCE[dtype] if rule in EXACT else error > 0.1


@pytest.mark.parametrize(("rule", "common"), ALL)
def test_one_site_keeps_its_weights(rule: Rule, common: str):
    """L17: of the effective weights; factors may differ."""
    adapters = {"s3": sites_for(rule, common)["s3"]}
    tolerance = 1e-2 if rule is by_lora_fair else 1e-10  # its ridge pulls towards FedIT, which is exact here
    assert relative(added(rule(adapters)), truth_for(rule, adapters)) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "common"), ALL)
def test_order_of_sites_changes_no_bit(rule: Rule, common: str, dtype: torch.dtype):
    """F10."""
    adapters = sites_for(rule, common, dtype)
    turned = {site: adapters[site] for site in ("s3", "s0", "s4", "s2", "s1")}
    for (ours, _), (theirs, _) in zip(rule(adapters), rule(turned), strict=True):
        assert same(ours, theirs)
    swapped = adapters | {"s0": adapters["s2"], "s2": adapters["s0"]}
    assert relative(added(rule(swapped)), added(rule(adapters))) > 1e-3  # while who sent what does matter


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "common"), ALL)
def test_the_head_is_averaged_and_nothing_is_changed(rule: Rule, common: str, dtype: torch.dtype):
    """Heads and `modules_to_save` by weight, in every rule; inputs keep every bit, and lend no storage."""
    adapters = sites_for(rule, common, dtype)
    before = {site: {n: t.clone() for n, t in adapter.items()} for site, adapter in adapters.items()}
    found = rule(adapters)[0][0]
    assert all(same(adapters[site], before[site]) for site in adapters)
    heads = {site: remainder(adapter) for site, adapter in adapters.items()}
    assert same(remainder(found), weighted_mean(heads, WEIGHTS)) and len(heads["s0"]) == 2
    assert {t.dtype for t in found.values()} == {dtype} and found.keys() == adapters["s0"].keys()
    assert all(t.is_contiguous() and t.numel() for t in found.values())


@pytest.mark.parametrize("rule", [*MIXED, by_fedavg, by_fedex])
def test_equal_sites_are_one_site(rule: Rule):
    """F3: the same change of the weights at each, written at each one's own scale."""
    one = made(4, 0)
    adapters = {site: at_scale(one, SCALE, SCALES[site]) for site in WEIGHTS}
    assert relative(added(rule(adapters)), dense(one, SCALE)) < 1e-10
    assert aggregation_error(adapters, WEIGHTS, SCALES) < 1e-14


# Rule by rule ---------------------------------------------------------------------------------------------------------


def test_fedavg_is_the_weighted_mean():
    adapters = sites(EVEN, torch.float32)
    assert same(rules.fedavg(adapters, WEIGHTS), weighted_mean(adapters, WEIGHTS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ffa_never_touches_a(dtype: torch.dtype):
    """L4 over five rounds."""
    common = start = made(4, 0, dtype)
    for round in range(1, 6):
        new = {site: travelling(made(4, 10 * round + k, dtype), "B") for k, site in enumerate(WEIGHTS)}
        wanted = mean_dense({s: common | b for s, b in new.items()}, dict.fromkeys(SCALES, SCALE))
        common = rules.ffa(common, new, WEIGHTS)
        assert relative(dense(common, SCALE), wanted) < TOLERANCE[dtype]
        assert all(torch.equal(common[n], start[n]) == (factor_of(n) == "A") for n in start)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rolora_is_exact_in_every_round(dtype: torch.dtype):
    """L5 over six rounds, both parities; averaging both factors of the same sites would not be."""
    common, new = made(4, 0, dtype), {}
    assert [rules.rolora_factor(round) for round in range(1, 7)] == list("BABABA")
    for round in range(1, 7):
        factor = rules.rolora_factor(round)
        new = {site: travelling(made(4, 10 * round + k, dtype), factor) for k, site in enumerate(WEIGHTS)}
        wanted = mean_dense({s: common | t for s, t in new.items()}, dict.fromkeys(SCALES, SCALE))
        before, common = common, rules.rolora(common, new, WEIGHTS, round)
        assert relative(dense(common, SCALE), wanted) < TOLERANCE[dtype]
        frozen = {n for n in common if factor_of(n) not in (factor, None)}
        assert len(frozen) == 3 and all(torch.equal(common[n], before[n]) for n in frozen)
    with pytest.raises(MessageError, match="differ in 6 tensors"):
        rules.rolora(common, new, WEIGHTS, round=7)  # the factor of the round before


def test_rolora_starts_with_b():
    """While B is zero, A has no gradient, so a first round of A would be lost."""
    adapter = {n: t.requires_grad_() for n, t in fresh(made(4, 0)).items()}
    a, b = (adapter[n] for n in names("h.1.square"))
    ((torch.randn(3, 6, dtype=torch.float64) @ a.T @ b.T) - 1).square().sum().backward()
    assert a.grad is not None and b.grad is not None
    assert not a.grad.any() and bool(b.grad.any()) and rules.rolora_factor(1) == "B"


def test_flora_by_hand():
    one = {"q.lora_A.default.weight": torch.tensor([[1.0, 2.0]]), "q.lora_B.default.weight": torch.tensor([[3.0]])}
    two = {
        "q.lora_A.default.weight": torch.tensor([[4.0, 0.0], [0.0, 8.0]]),
        "q.lora_B.default.weight": torch.tensor([[1.0, -1.0]]),
    }
    stack = rules.flora({"b": two, "a": one}, {"b": 3.0, "a": 1.0}, {"a": 8.0, "b": 4.0})  # lora_alpha 8
    assert torch.equal(stack["q.lora_B.default.weight"], torch.tensor([[24.0, 4.0, -4.0]]))
    assert torch.equal(stack["q.lora_A.default.weight"], torch.tensor([[0.25, 0.5], [3.0, 0.0], [0.0, 6.0]]))


def test_flora_needs_the_scales_inside():
    """α/r differs where ranks do: one common scale outside of the stack would be wrong."""
    adapters = sites()
    without = rules.flora(adapters, WEIGHTS, dict.fromkeys(SCALES, 1.0))
    assert relative(dense(without, SCALE), mean_dense(adapters)) > 0.1


def test_fresh_is_drawn_as_peft_draws():
    adapter = made(4, 0, shapes={"q": (300, 400)})
    first, again = (fresh(adapter, torch.Generator().manual_seed(5)) for _ in range(2))
    assert same(first, again) and not same(first, fresh(adapter, torch.Generator().manual_seed(6)))
    a, b = (first[n] for n in names("q"))
    drawn = nn.Linear(400, 4, bias=False).weight.detach()
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
    assert not b.any() and float(a.abs().max()) <= 0.05 and float(drawn.abs().max()) <= 0.05
    assert float(a.std()) == pytest.approx(0.05 / math.sqrt(3), rel=0.05)
    assert same(remainder(first), remainder(adapter))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fedex_residual_is_the_covariance_of_the_factors(dtype: torch.dtype):
    """L3: Σ p_k (B_k − B̄)(A_k − Ā), of rank (K−1)r and sent as that, with weights that aren't uniform."""
    wide = {"q": (40, 50)}
    adapters = sites(EVEN, dtype, shapes=wide)
    mean, residual = rules.fedex(adapters, WEIGHTS, SCALE)
    a, b = names("q")
    p = normalised(WEIGHTS)
    mean_a, mean_b = (sum(p[s] * adapters[s][n].double() for s in p) for n in (a, b))
    wanted = SCALE * sum(p[s] * (adapters[s][b].double() - mean_b) @ (adapters[s][a].double() - mean_a) for s in p)  # type: ignore[operator]
    got = residual[b].double() @ residual[a].double()
    assert float((got - wanted).norm() / wanted.norm()) < TOLERANCE[dtype]  # type: ignore[union-attr]
    assert residual[a].shape == (16, 50) and residual[b].shape == (40, 16) and len(residual) == 2
    assert int(torch.linalg.matrix_rank(wanted, rtol=1e-9)) == 16  # type: ignore[arg-type]
    assert same(mean, rules.fedavg(adapters, WEIGHTS))


def test_fedex_residual_vanishes_where_it_must():
    """L3."""
    for adapters in (shared("A"), shared("B")):
        _, residual = rules.fedex(adapters, WEIGHTS, SCALE)
        assert product_norm(residual) < 1e-12 * product_norm(adapters["s0"])
    assert rules.fedex({"s0": made(4, 0)}, {"s0": 1.0}, SCALE)[1] == {}
    assert product_norm(rules.fedex(sites(EVEN), WEIGHTS, SCALE)[1]) > 1


def test_fedex_residual_can_be_compressed():
    """By the same truncation: exact at its rank, nearest below."""
    _, residual = rules.fedex(sites(EVEN, shapes={"q": (40, 50)}), WEIGHTS, SCALE)
    whole = product(residual, pairs(residual)["q"])
    for rank, exact in ((16, True), (15, False)):
        near = dense(placed({"q": truncated(whole, rank)}, residual))
        assert (relative(near, dense(residual)) < 1e-12) == exact


def test_flexlora_by_hand():
    """Half of 3·e₁e₁ᵀ and half of e₂e₂ᵀ: σ = 1.5 and 0.5."""
    e = torch.eye(2, dtype=torch.float64)
    adapters = {
        "a": {"q.lora_A.default.weight": e[:1], "q.lora_B.default.weight": -3 * e[:, :1]},
        "b": {"q.lora_A.default.weight": e[1:], "q.lora_B.default.weight": e[:, 1:]},
    }
    new = rules.flexlora(adapters, {"a": 1, "b": 1}, {"a": 1.0, "b": 1.0}, scale=0.5)
    assert torch.allclose(new["q.lora_A.default.weight"], e, atol=1e-15)
    assert torch.allclose(new["q.lora_B.default.weight"], torch.diag(torch.tensor([-3.0, 1.0]).double()), atol=1e-15)
    for energy, rank in ((0.89, 1), (0.91, 2)):  # 2.25 of 2.5
        found = rules.flexlora(adapters, {"a": 1, "b": 1}, {"a": 1.0, "b": 1.0}, 0.5, energy=energy)
        assert found["q.lora_A.default.weight"].shape == (rank, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_flexlora_gives_each_site_its_rank(dtype: torch.dtype):
    """The first r_k components at the site's own scale are the nearest of that rank to the mean."""
    adapters = sites(RAGGED, dtype)
    common = rules.flexlora(adapters, WEIGHTS, SCALES, SCALE, rank=max(RAGGED.values()))
    wanted = mean_dense(adapters)
    for site, rank in RAGGED.items():
        own = at_scale(resized(common, rank, adapters[site]), SCALE, SCALES[site])
        assert own[names("h.1.square")[0]].shape == (rank, 6)
        for layer, change in dense(own, SCALES[site]).items():
            u, s, v = torch.linalg.svd(wanted[layer])
            nearest = u[:, :rank] * s[:rank] @ v[:rank]
            assert float((change - nearest).norm() / nearest.norm()) < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_hetlora_of_one_rank_is_fedit(dtype: torch.dtype):
    """L10: with sample weights."""
    adapters = sites(EVEN, dtype)
    assert same(rules.hetlora(adapters, WEIGHTS, rank=4), rules.fedavg(adapters, WEIGHTS))


def test_hetlora_by_hand():
    """Ranks 1 and 2; the padded second row of `a` counts as zero."""
    adapters = {
        "a": {"q.lora_A.default.weight": torch.tensor([[2.0, 4.0]]), "q.lora_B.default.weight": torch.tensor([[8.0]])},
        "b": {
            "q.lora_A.default.weight": torch.tensor([[6.0, 0.0], [4.0, 8.0]]),
            "q.lora_B.default.weight": torch.tensor([[0.0, 4.0]]),
        },
    }
    new = rules.hetlora(adapters, {"a": 1.0, "b": 1.0}, rank=2)
    assert torch.equal(new["q.lora_A.default.weight"], torch.tensor([[4.0, 2.0], [2.0, 4.0]]))
    assert torch.equal(new["q.lora_B.default.weight"], torch.tensor([[4.0, 2.0]]))
    by_norm = rules.norm_weights(adapters, {"a": 1.0, "b": 0.5})  # ‖8·(2, 4)‖ = √1280 = ‖4·(4, 8)‖
    assert by_norm["a"] == pytest.approx(math.sqrt(1280)) and by_norm["b"] == pytest.approx(math.sqrt(320))
    silent = {s: {n: torch.zeros_like(t) for n, t in a.items()} for s, a in adapters.items()}
    assert rules.norm_weights(silent, {"a": 1.0, "b": 1.0}) == {"a": 1.0, "b": 1.0}
    with pytest.raises(ConfigError, match="rank 1, but a site sent rank 2"):
        rules.hetlora(adapters, {"a": 1.0, "b": 1.0}, rank=1)


def test_hetlora_needs_one_scale():
    """Padding keeps s_k·B_k·A_k only if B brings its own scale along: of rank 2 with α/r = 4 into rank 6 with 8/6."""
    adapter = made(2, 0)
    right, wrong = (resized(a, 6) for a in (at_scale(adapter, 4.0, 8 / 6), adapter))
    assert relative(dense(right, 8 / 6), dense(adapter, 4.0)) < 1e-14
    assert relative(dense(wrong, 8 / 6), dense(adapter, 4.0)) == pytest.approx(2 / 3)


def test_hetlora_keeps_components_that_no_one_held():
    """Without the common adapter a cohort of small ranks would erase the rest for good."""
    common = made(6, 50)
    adapters = sites({"s0": 2, "s4": 3})
    weights = cut(WEIGHTS, adapters)
    kept, erased = (rules.hetlora(adapters, weights, 6, c) for c in (common, None))
    for layer in SHAPES:
        a, b = names(layer)
        assert torch.equal(kept[a][3:], common[a][3:]) and torch.equal(kept[b][:, 3:], common[b][:, 3:])
        assert not erased[a][3:].any() and not erased[b][:, 3:].any()
        assert torch.equal(kept[a][:3], erased[a][:3]) and torch.equal(kept[b][:, :3], erased[b][:, :3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ragged", [False, True])
def test_fedsb_is_exact(dtype: torch.dtype, ragged: bool):
    """L6: B·mean(R_k)·A = mean(B·R_k·A); of mixed ranks the smaller blocks are padded; B and A never change."""
    like = made(6, 0, dtype)
    frozen, start = rules.fedsb_start(like, torch.Generator().manual_seed(3))
    kept = {n: t.clone() for n, t in frozen.items()}
    ranks = RAGGED if ragged else dict.fromkeys(RAGGED, 6)
    generator = torch.Generator().manual_seed(4)
    cores = {
        site: {
            n: torch.randn(*([ranks[site]] * 2 if "lora_R" in n else t.shape), generator=generator).to(dtype)
            for n, t in start.items()
        }
        for site in WEIGHTS
    }
    whole = rules.fedsb(cores, WEIGHTS, rank=6)
    sites_run = {site: rules.fedsb_adapter(frozen, core) for site, core in cores.items()}
    got = dense(rules.fedsb_adapter(frozen, whole), SCALE)
    assert relative(got, mean_dense(sites_run, dict.fromkeys(SCALES, SCALE))) < TOLERANCE[dtype]
    assert same(frozen, kept)
    for site, run in sites_run.items():
        r, (a, b) = ranks[site], names("h.0.mlp.c_proj")
        core = cores[site]["h.0.mlp.c_proj.lora_R.default.weight"].double()
        by_hand = frozen[b].double()[:, :r] @ core @ frozen[a].double()[:r]
        assert float((dense(run)["h.0.mlp.c_proj"] - by_hand).abs().max()) < TOLERANCE[dtype]
    assert {n for n in whole if "lora_" not in n} == set(remainder(like))
    a, b = (frozen[n].double() for n in names("h.0.attn.c_attn"))
    eye = torch.eye(6, dtype=torch.float64)
    assert float((a @ a.T - eye).abs().max()) < TOLERANCE[dtype] > float((b.T @ b - eye).abs().max())
    assert not dense(rules.fedsb_adapter(frozen, start))["h.1.square"].any()  # it starts by changing nothing
    if ragged:
        with pytest.raises(MessageError, match=r"as \[4, 4\], s0 as \[2, 2\]"):
            rules.fedsb(cores, WEIGHTS)
        with pytest.raises(ConfigError, match=r"fedsb at rank 4, but .* is \[6, 6\]"):
            rules.fedsb(cores, WEIGHTS, rank=4)


def test_fedsb_trains_r_and_nothing_else():
    frozen, start = rules.fedsb_start(made(4, 0), torch.Generator().manual_seed(3))
    leaves = {n: t.requires_grad_() for n, t in start.items()}
    runs = rules.fedsb_adapter(frozen, leaves)
    a, b = (runs[n] for n in names("h.0.attn.c_attn"))
    ((torch.randn(3, 8, dtype=torch.float64) @ a.T @ b.T) - 1).square().sum().backward()
    assert bool(leaves["h.0.attn.c_attn.lora_R.default.weight"].grad.any())  # type: ignore[union-attr]
    assert not any(t.requires_grad for t in frozen.values())
    with pytest.raises(ConfigError, match="at most 6 at h"):
        rules.fedsb_start(made(7, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["full", "zero", "narrow"])
def test_fedsvd_keeps_the_product_and_makes_a_orthonormal(case: str, dtype: torch.dtype):
    """L7, also where B is zero, as before the first round, and where a layer is narrower than the rank."""
    shapes = {"q": (2, 9)} if case == "narrow" else SHAPES
    adapters = sites(EVEN, dtype, shapes=shapes)
    common, new, eye = adapters["s0"], sent(adapters, "B"), torch.eye(4, dtype=torch.float64)
    if case == "zero":
        new = {s: {n: t * (factor_of(n) is None) for n, t in tensors.items()} for s, tensors in new.items()}
    plain, turned = rules.ffa(common, new, WEIGHTS), rules.fedsvd(common, new, WEIGHTS)
    assert float(max((dense(plain)[n] - dense(turned)[n]).abs().max() for n in shapes)) < TOLERANCE[dtype] * 10
    for layer in shapes:
        old, (a, b) = common[names(layer)[0]].double(), (turned[n].double() for n in names(layer))
        assert a.shape == old.shape and float((a @ a.T - eye).abs().max()) < TOLERANCE[dtype]
        assert int(torch.linalg.matrix_rank(torch.cat([old, a]), rtol=1e-4)) == 4  # the rows span the same space
        gram = b.T @ b
        assert float((gram - torch.diag(gram.diagonal())).abs().max()) < 1e-4  # B is UΣ


def test_lora_fair():
    """L16: stationary, the projection on the rows of Ā for λ → 0, and FedIT for λ → ∞; nearer than FedIT."""
    adapters = scaled(sites(EVEN))
    wanted, fedit = mean_dense(adapters, dict.fromkeys(SCALES, 1.0)), rules.fedavg(adapters, WEIGHTS)
    new = rules.lora_fair(adapters, WEIGHTS, ridge=0.3)
    for layer in SHAPES:
        a, b = names(layer)
        gradient = (new[b] @ new[a] - wanted[layer]) @ new[a].T + 0.3 * (new[b] - fedit[b])
        assert float(gradient.abs().max()) < 1e-10 and torch.equal(new[a], fedit[a])
        rows = torch.linalg.qr(fedit[a].T).Q
        sharp = rules.lora_fair(adapters, WEIGHTS, ridge=1e-13)
        assert float((sharp[b] @ sharp[a] - wanted[layer] @ rows @ rows.T).abs().max()) < 1e-9
    assert distance(rules.lora_fair(adapters, WEIGHTS, ridge=1e15), fedit) < 1e-10
    ones = dict.fromkeys(SCALES, 1.0)
    assert aggregation_error(adapters, WEIGHTS, ones, new) < aggregation_error(adapters, WEIGHTS, ones) - 0.01


def rotated(adapter: Adapter, seed: int) -> Adapter:
    """The same products in other factors, Q·A and B·Qᵀ."""
    generator, found = torch.Generator().manual_seed(seed), dict(adapter)
    for pair in pairs(adapter).values():
        r = adapter[pair.a].shape[0]
        q = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q.to(adapter[pair.a])
        found |= {pair.a: q @ adapter[pair.a], pair.b: adapter[pair.b] @ q.T}
    return found


@pytest.mark.parametrize("factor", ["A", "B"])
def test_fedrot_undoes_rotations(factor: Any):
    """L15: eight sites hold the same adapter, turned. FedIT misses their mean by more than half, FedRot by nothing."""
    adapter = made(4, 0)
    adapters = {f"s{k}": rotated(adapter, k) for k in range(8)}
    weights, ones = dict.fromkeys(adapters, 1.0), dict.fromkeys(adapters, 1.0)
    assert max(relative(dense(a), dense(adapter)) for a in adapters.values()) < 1e-13
    new = rules.fedrot(adapters, weights, reference=adapter, factor=factor)
    assert distance(new, adapter) < 1e-12  # each rotation is found again
    assert aggregation_error(adapters, weights, ones) > 0.5
    assert aggregation_error(adapters, weights, ones, new) < 1e-12
    for exact in (rules.flora(adapters, weights, ones), rules.flexlora(adapters, weights, ones, 1.0, rank=4)):
        assert aggregation_error(adapters, weights, ones, exact) < 1e-12


@pytest.mark.parametrize("factor", ["A", "B"])
def test_fedrot_is_exact_for_one_site_and_without_reference(factor: Any):
    """L15: turning leaves the product; a reference of zeros, as B before the first round, turns nothing."""
    mine = {"s0": made(4, 0)}
    assert relative(dense(rules.fedrot(mine, {"s0": 1.0}, made(4, 5), factor)), dense(mine["s0"])) < 1e-13
    assert distance(rules.fedrot(mine, {"s0": 1.0}, made(4, 5), factor), mine["s0"]) > 0.1
    nothing = {n: torch.zeros_like(t) for n, t in mine["s0"].items()}
    assert distance(rules.fedrot(mine, {"s0": 1.0}, nothing, factor), mine["s0"]) < 1e-14


def test_gauge():
    """G4: (QA, BQᵀ) trains to the same product by SGD with momentum and weight decay, and not by AdamW."""
    adapter = made(4, 0, shapes={"q": (5, 7)})
    x, y = torch.randn(20, 7, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)

    def trained(start: Adapter, optimizer: Callable[..., torch.optim.Optimizer], **settings: float) -> Adapter:
        leaves = {n: t.clone().requires_grad_() for n, t in start.items() if "lora_" in n}
        steps = optimizer(list(leaves.values()), **settings)
        for _ in range(10):
            steps.zero_grad()
            (x @ leaves[names("q")[0]].T @ leaves[names("q")[1]].T - y).square().mean().backward()
            steps.step()
        return dense({n: t.detach() for n, t in leaves.items()})

    sgd = (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1})
    adam = (torch.optim.AdamW, {"lr": 1e-2})
    moves = [relative(trained(rotated(adapter, 1), o, **s), trained(adapter, o, **s)) for o, s in (sgd, adam)]
    assert moves[0] < 1e-12 and moves[1] > 1e-3
    assert relative(trained(adapter, sgd[0], **sgd[1]), dense(adapter)) > 1e-2


# Against PEFT ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """One layer, of which the output is linear in the weights: the mean of outputs is the output of the mean."""

    def __init__(self, kind: str, i: int, o: int) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        torch.manual_seed(11)
        self.layer = nn.Linear(i, o) if kind == "Linear" else Conv1D(o, i)
        self.layer.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Lora:
    """A `Net` in PEFT with a random adapter."""

    def __init__(self, shape: tuple[str, int, int], r: int, alpha: float, seed: int = 0, rslora: bool = False) -> None:
        import peft

        settings: Any = {"r": r, "lora_alpha": alpha, "use_rslora": rslora, "fan_in_fan_out": shape[0] == "Conv1D"}
        config = peft.LoraConfig(target_modules=["layer"], **settings)
        self.peft: Any = peft.get_peft_model(Net(*shape), config).double()  # type: ignore[arg-type]
        self.net: Any = self.peft.get_base_model()
        generator = torch.Generator().manual_seed(seed)
        self.load({n: torch.randn(t.shape, generator=generator).double() for n, t in self.adapter.items()})
        self.scale = self.net.layer.scaling["default"]

    @property
    def adapter(self) -> Adapter:
        return {n: p.detach().clone() for n, p in self.net.named_parameters() if "lora_" in n}

    def load(self, adapter: Mapping[str, Tensor], weight: Tensor | None = None) -> Lora:
        named = dict(self.net.named_parameters())
        more = {} if weight is None else {"layer.base_layer.weight": weight}
        with torch.no_grad():
            for name, tensor in {**adapter, **more}.items():
                assert named[name].shape == tensor.shape, name
                named[name].copy_(tensor)
        return self

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.net(x)

    @property
    def weight(self) -> Tensor:
        return self.net.layer.base_layer.weight.detach().clone()


LAYERS = [("Linear", 8, 12), ("Linear", 9, 9), ("Conv1D", 8, 12), ("Conv1D", 9, 9)]  # GPT-2's Conv1D keeps i × o
P3 = {"a": 5.0, "b": 11.0, "c": 8.0}
X = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def outputs(clients: Mapping[str, Lora], x: Tensor) -> Tensor:
    """Σ p_k f_k(x), by PEFT alone."""
    return sum(P3[s] / 24 * client(x) for s, client in clients.items())  # type: ignore[return-value]


def close(got: Tensor, wanted: Tensor) -> bool:
    return float((got - wanted).norm() / wanted.norm()) < 1e-12


@pytest.mark.parametrize("shape", LAYERS)
def test_shapes_and_merging_are_pefts(shape: tuple[str, int, int]):
    """L12 and L18: A is [r, i] and B [o, r] for `Conv1D` too; merging by us is merging by PEFT, and the adapter beside
    W does the same; a weight merged the other way round is noticed even where it is square."""
    kind, i, o = shape
    client, x = Lora(shape, 3, 5.0), X[:, :i]
    adapter = client.adapter
    assert [tuple(t.shape) for t in adapter.values()] == [(3, i), (o, 3)]
    wanted, change = client(x), product(adapter, pairs(adapter)["layer"], client.scale)
    ours = merged(client.weight, change, transposed=kind == "Conv1D")
    silent = {n: torch.zeros_like(t) for n, t in adapter.items()}
    assert close(Lora(shape, 3, 5.0).load(silent, ours)(x), wanted)
    if i == o:
        wrong = merged(client.weight, change, transposed=kind != "Conv1D")
        assert not close(Lora(shape, 3, 5.0).load(silent, wrong)(x), wanted)
    theirs = client.peft.merge_and_unload().layer.weight
    assert float((theirs - ours).abs().max()) < 1e-14
    back = merged(ours, Product(-change.b, change.a), transposed=kind == "Conv1D")
    assert float((back - Lora(shape, 3, 5.0).weight).abs().max()) < 1e-14


def test_never_unmerge_in_bf16():
    """L12: keep W; what is taken back again is another weight."""
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    change = product(made(3, 0), pairs(made(3, 0))["h.0.attn.c_attn"])
    back = merged(merged(weight, change), Product(-change.b, change.a))
    assert back.dtype == torch.bfloat16 and not torch.equal(back, weight)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("shape", LAYERS)
def test_flora_in_peft(shape: tuple[str, int, int], rslora: bool):
    """The stack in PEFT with its own scale of 1, and merged: the mean of what three sites of ranks 2, 4, 3 answer."""
    kind, i, _ = shape
    clients = {s: Lora(shape, r, 8.0, k, rslora) for k, (s, r) in enumerate({"a": 2, "b": 4, "c": 3}.items())}
    x, scales = X[:, :i], {s: c.scale for s, c in clients.items()}
    assert len(set(scales.values())) == 3
    wanted = outputs(clients, x)
    stack = rules.flora({s: c.adapter for s, c in clients.items()}, P3, scales)
    loaded = Lora(shape, 9, 3.0 if rslora else 9.0, rslora=rslora).load(stack)
    assert loaded.scale == 1 and close(loaded(x), wanted)
    weight = merged(clients["a"].weight, product(stack, pairs(stack)["layer"]), transposed=kind == "Conv1D")
    started = fresh(clients["b"].adapter, torch.Generator().manual_seed(1))
    assert close(Lora(shape, 4, 8.0).load(started, weight)(x), wanted)  # L13: starting again changes nothing
    assert not close(Lora(shape, 9, 8.0).load(stack)(x), wanted)  # lora_alpha kept as it was: wrong


@pytest.mark.parametrize("shape", LAYERS)
def test_fedex_in_peft(shape: tuple[str, int, int]):
    """The residual merged, and the mean adapter on top. Public code merges it transposed, unseen in square layers."""
    kind, i, _ = shape
    alphas = {"a": 4.0, "b": 8.0, "c": 16.0}
    clients = {s: Lora(shape, 4, alpha, k) for k, (s, alpha) in enumerate(alphas.items())}
    x, common = X[:, :i], 2.0
    wanted = outputs(clients, x)
    ours = {s: at_scale(c.adapter, c.scale, common) for s, c in clients.items()}
    mean, residual = rules.fedex(ours, P3, common)
    change = product(residual, pairs(residual)["layer"])
    weight = merged(clients["a"].weight, change, transposed=kind == "Conv1D")
    assert close(Lora(shape, 4, 8.0).load(mean, weight)(x), wanted)
    assert not close(Lora(shape, 4, 8.0).load(mean)(x), wanted)  # FedIT
    if i == shape[2]:
        wrong = merged(clients["a"].weight, change, transposed=kind != "Conv1D")
        assert not close(Lora(shape, 4, 8.0).load(mean, wrong)(x), wanted)


@pytest.mark.parametrize("shape", LAYERS)
def test_flexlora_in_peft(shape: tuple[str, int, int]):
    """At full rank the mean of what sites answer; at a site's rank and scale, the nearest of its rank."""
    kind, i, o = shape
    clients = {s: Lora(shape, r, 8.0, k) for k, (s, r) in enumerate({"a": 2, "b": 4, "c": 3}.items())}
    x, scales = X[:, :i], {s: c.scale for s, c in clients.items()}
    adapters = {s: c.adapter for s, c in clients.items()}
    full = rules.flexlora(adapters, P3, scales, scale=2.0)
    rank = full["layer.lora_A.default.weight"].shape[0]
    assert rank == min(9, i, o)
    assert close(Lora(shape, rank, 2.0 * rank).load(full)(x), outputs(clients, x))
    own = at_scale(resized(full, 3), 2.0, scales["c"])
    answer = Lora(shape, 3, 8.0).load(own)(x) - Lora(shape, 3, 8.0).load(fresh(own))(x)
    base = clients["a"].weight if kind == "Conv1D" else clients["a"].weight.T
    bias = outputs(clients, torch.zeros(1, i).double())
    change = outputs(clients, torch.eye(i).double()) - bias - base  # [i, o], read off the answers
    u, s, v = torch.linalg.svd(change)
    assert close(answer, x @ (u[:, :3] * s[:3] @ v[:3]))


@pytest.mark.parametrize("shape", LAYERS)
def test_frozen_factors_in_peft(shape: tuple[str, int, int]):
    """FFA, FedSVD, RoLoRA in its even rounds, and Fed-SB: each is the mean of what sites answer."""
    x, first, again = X[:, : shape[1]], Lora(shape, 4, 8.0, 9).adapter, Lora(shape, 4, 8.0)
    cases: list[tuple[Any, Any]] = [(rules.ffa, "B"), (rules.fedsvd, "B"), (rules.rolora, "A")]
    for rule, factor in cases:
        clients = {s: Lora(shape, 4, 8.0, k) for k, s in enumerate(P3)}
        new = {s: travelling(c.adapter, factor) for s, c in clients.items()}
        more = {"round": 4} if rule is rules.rolora else {}
        found = again.load(rule(first, new, P3, **more))
        assert not close(found(x), outputs(clients, x))  # while each has a frozen factor of its own
        for site, client in clients.items():
            client.load({**first, **new[site]})
        assert close(found(x), outputs(clients, x)), rule
    frozen, start = rules.fedsb_start(first, torch.Generator().manual_seed(0))
    cores = {s: {n: torch.randn(4, 4).double() for n in start} for s in P3}
    clients = {s: Lora(shape, 4, 8.0).load(rules.fedsb_adapter(frozen, core)) for s, core in cores.items()}
    assert close(again.load(rules.fedsb_adapter(frozen, rules.fedsb(cores, P3)))(x), outputs(clients, x))


@pytest.mark.parametrize("shape", LAYERS)
def test_gradients_by_hand(shape: tuple[str, int, int]):
    """L14: ∂ℓ/∂B = s·Gᵀ(xAᵀ) and ∂ℓ/∂A = s·BᵀGᵀx."""
    client, x = Lora(shape, 3, 5.0), X[:, : shape[1]]
    gradient = torch.randn(6, shape[2], dtype=torch.float64)
    client.net(x).backward(gradient)
    a, b = client.adapter.values()
    grads = {n: p.grad for n, p in client.net.named_parameters() if "lora_" in n}
    assert torch.allclose(grads["layer.lora_B.default.weight"], client.scale * gradient.T @ (x @ a.T), atol=1e-12)
    assert torch.allclose(grads["layer.lora_A.default.weight"], client.scale * b.T @ gradient.T @ x, atol=1e-12)


def gpt2(r: int, alpha: float) -> AdaptedModel:
    """A tiny GPT-2 in fp64; its base is the same at every rank."""
    torch.manual_seed(0)
    peft_model = adapt(tiny("gpt2"), LoraConfig(r=r, lora_alpha=alpha), "classification")
    return AdaptedModel(peft_model, "classification", "fp64")


def moved(model: AdaptedModel, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator).double() for n, t in model.initial.items()}


def dense_weights(model: AdaptedModel, changes: Mapping[str, Tensor]) -> Adapter:
    """W + ΔW by name, in the layout of `Conv1D`."""
    named = dict(model.module.named_parameters())
    assert {type(model.module.get_submodule(f"{layer}.base_layer")).__name__ for layer in changes} == {"Conv1D"}
    return {f"{n}.base_layer.weight": named[f"{n}.base_layer.weight"] + d.T for n, d in changes.items()}


def test_gpt2_of_mixed_ranks():
    """FLoRA and FlexLoRA on a whole GPT-2: its logits are those of W + Σ p_k s_k B_k A_k with the mean head; and a
    fresh adapter on the merged weights leaves them, has no gradient in A, and one in B (L13)."""
    ranks = {"a": 2, "b": 4, "c": 3}
    models = {s: gpt2(r, 8.0) for s, r in ranks.items()}
    adapters = {s: moved(model, k) for k, (s, model) in enumerate(models.items())}
    scales = {s: 8.0 / r for s, r in ranks.items()}
    batch = collate(examples(n=6, seed=5), np.arange(6), 1)
    p = normalised(P3)
    each = {s: dense(a, scales[s]) for s, a in adapters.items()}
    exact = {layer: torch.stack([p[s] * each[s][layer] for s in p]).sum(0) for layer in each["a"]}
    assert len(exact) == 16 and {tuple(d.shape) for d in exact.values()} == {(96, 32), (32, 32), (128, 32), (32, 128)}

    small = models["a"]
    weights = dense_weights(small, exact)
    heads = {n: torch.stack([p[s] * remainder(adapters[s])[n] for s in p]).sum(0) for n in remainder(adapters["a"])}
    silent = {n: t if factor_of(n) == "A" else torch.zeros_like(t) for n, t in small.initial.items()}
    start = fresh(small.initial, torch.Generator().manual_seed(2))
    leaves = {n: t.clone().requires_grad_() for n, t in start.items()} | heads | weights
    with torch.no_grad():
        wanted = small.forward(silent | heads | weights, batch.lengths_B, batch.ids_BT)
        stack = rules.flora(adapters, P3, scales)
        assert close(gpt2(9, 9.0).forward(stack, batch.lengths_B, batch.ids_BT), wanted)
        ours = {
            f"{layer}.base_layer.weight": merged(
                dict(small.module.named_parameters())[f"{layer}.base_layer.weight"], product(stack, pair), True
            )
            for layer, pair in pairs(stack).items()
        }
        assert distance(ours, weights) < 1e-13
        full = rules.flexlora(adapters, P3, scales, scale=0.5)
        assert close(gpt2(9, 4.5).forward(full, batch.lengths_B, batch.ids_BT), wanted)
        fedit = rules.hetlora({s: at_scale(a, scales[s], 2.0) for s, a in adapters.items()}, P3, rank=4)
        assert not close(models["b"].forward(fedit, batch.lengths_B, batch.ids_BT), wanted)
    logits = small.forward(leaves, batch.lengths_B, batch.ids_BT)
    assert close(logits.detach(), wanted)
    logits.square().sum().backward()
    for pair in pairs(start).values():
        assert not leaves[pair.a].grad.any() and bool(leaves[pair.b].grad.any())  # type: ignore[union-attr]


def test_gpt2_by_fedex():
    model = adapted("gpt2")
    adapters = {s: moved(model, k) for k, s in enumerate(P3)}
    p, scale = normalised(P3), 2.0
    each = {s: dense(a, scale) for s, a in adapters.items()}
    exact = {layer: torch.stack([p[s] * each[s][layer] for s in p]).sum(0) for layer in each["a"]}
    batch = collate(examples(n=6, seed=5), np.arange(6), 1)
    mean, residual = rules.fedex(adapters, P3, scale)
    silent = {n: torch.zeros_like(t) if factor_of(n) else t for n, t in mean.items()}
    named = dict(model.module.named_parameters())
    weights = {
        f"{layer}.base_layer.weight": merged(
            named[f"{layer}.base_layer.weight"], product(residual, pair), transposed=True
        )
        for layer, pair in pairs(residual).items()
    }
    with torch.no_grad():
        wanted = model.forward(silent | dense_weights(model, exact), batch.lengths_B, batch.ids_BT)
        assert close(model.forward(mean | weights, batch.lengths_B, batch.ids_BT), wanted)
        assert not close(model.forward(mean, batch.lengths_B, batch.ids_BT), wanted)


# What crosses the wire ------------------------------------------------------------------------------------------------


def test_bytes_of_gpt2_small():
    """r = 8 on c_attn of twelve blocks and a head of 768 × 77, in fp32: the numbers of the cost model."""
    shapes = {f"h.{k}.attn.c_attn": (2304, 768) for k in range(12)}

    def sized(rank: int) -> Adapter:
        found = {"score.modules_to_save.default.weight": torch.ones(77, 768)}
        for layer, (o, i) in shapes.items():
            a, b = names(layer)
            found |= {a: torch.ones(rank, i), b: torch.ones(o, rank)}
        return found

    def nbytes(tensors: Mapping[str, Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors.values())

    one, head = sized(8), 4 * 59_136
    assert nbytes(one) == 1_416_192
    assert nbytes(travelling(one, "B")) == 1_121_280  # FFA, FedSVD up, odd rounds of RoLoRA
    assert nbytes(travelling(one, "A")) == 4 * (294_912 - 221_184) + head  # even rounds of RoLoRA
    adapters, weights, scales = {s: sized(8) for s in "abc"}, P3, dict.fromkeys("abc", 2.0)
    stack = rules.flora({"a": sized(2), "b": sized(8), "c": sized(5)}, weights, scales)
    assert nbytes(stack) == 4 * 12 * (2 + 8 + 5) * 3072 + head
    mean, residual = rules.fedex(adapters, weights, 2.0)
    assert nbytes(mean) == 1_416_192 and nbytes(residual) == 2 * 4 * 294_912  # (K−1)-fold, and no head
    assert nbytes(rules.flexlora(adapters, weights, scales, 2.0, rank=8)) == 1_416_192
    assert nbytes(rules.fedsvd(one, sent(adapters, "B"), weights)) == 1_416_192
    assert nbytes(rules.fedsb_start(one)[1]) == 239_616
    assert nbytes(rules.fedsb_start(sized(200))[1]) == 2_156_544
    assert nbytes(resized(mean, 4)) == 4 * 147_456 + head
