"""FedLLM's aggregations in whole rounds: bytes by formula, weights against dense ones, and what absent sites miss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from test_fedllm import base_state
from tiny import adapted, config_of, distance, examples, federation, lab, same
from torch import Tensor

from fedtrio.aggregation.lora import factor_of, pairs
from fedtrio.checkpoint import Memory, pack_tree, unpack_tree
from fedtrio.compare import compare
from fedtrio.config_file import load_config
from fedtrio.data.batches import collate
from fedtrio.errors import MessageError
from fedtrio.frameworks import FedLLM
from fedtrio.frameworks.lab import Lab
from fedtrio.ledger import Ledger
from fedtrio.message import Message, Reply
from fedtrio.meter import Meter
from fedtrio.models.adapter import AdaptedModel
from fedtrio.program import Site, drive
from fedtrio.wires.loopback import Loopback

Dense = dict[str, Tensor]
SLOW = pytest.mark.slow
SIZES = (5, 8, 3)
SITES = ("site-1", "site-2", "site-3")
RAGGED = {"site-1": 2, "site-2": 4, "site-3": 3}
ABSENT = (SITES, ("site-1", "site-3"), ("site-1", "site-2"), SITES)  # one misses a round, another the next
EXACT = ("ffa", "flora", "fedex", "rolora", "fedsb", "fedsvd")
COMMON = (*EXACT, "fedavg", "flexlora", "hetlora")
WHOLE = [("flora", "gpt2"), ("fedex", "llama"), ("rolora", "gpt2"), ("flexlora", "llama"), ("fedsvd", "gpt2")]
REST = [(name, kind) for name in COMMON for kind in ("gpt2", "llama") if (name, kind) not in WHOLE]
MIXED = ("flora", "flexlora", "hetlora", "fedsb")


@dataclass
class Seen:
    """A run, and what each site's model ran with before and after it trained."""

    lab: Lab
    sites: dict[str, Site]
    ledger: Ledger = field(default_factory=Ledger)
    states: list[dict[str, Any]] = field(default_factory=list)  # after each round; first, before the first
    before: list[dict[str, dict[str, Tensor]]] = field(default_factory=list)
    after: list[dict[str, dict[str, Tensor]]] = field(default_factory=list)
    sent: list[dict[str, Mapping[str, Tensor]]] = field(default_factory=list)


def seen(
    method: FedLLM, model: AdaptedModel, cohorts: Sequence[Sequence[str]] = (SITES, SITES),
    ranks: Mapping[str, int] | None = None, folder: Path | None = None, restart: int = 0, **train: Any,
) -> Seen:  # fmt: skip
    """Drive a round for each cohort; with `restart` the server and all sites start anew from disk after that round."""
    setting = lab(model, rounds=len(cohorts), **train)
    setting.ranks, setting.sites = ranks or {}, SITES
    run = Seen(setting, {})
    descend = setting.descend

    def watched(learner: Any, site: Any, runs: Any = dict, *rest: Any) -> None:
        copied = {name: t.detach().clone() for name, t in runs(learner.tensors).items()}
        run.before[-1][site.name] = copied
        descend(learner, site, runs, *rest)
        run.after[-1][site.name] = {name: t.detach().clone() for name, t in runs(learner.tensors).items()}

    setting.descend = watched  # type: ignore[method-assign]

    def checked(site: str, sent: Message, reply: Reply) -> None:
        method.check(setting, site, sent, reply)
        run.sent[-1][site] = reply.tensors

    def made() -> tuple[dict[str, Site], Loopback]:
        plain, _ = federation(method, setting, SIZES)
        memories = {name: Memory(folder / name if folder else None) for name in plain}
        sites = {name: Site(name, s.data, method, setting, None, memories[name]) for name, s in plain.items()}
        return sites, Loopback(sites)

    run.sites, wire = made()
    state = method.setup(setting)
    run.states.append(dict(state))
    for setting.round, cohort in enumerate(cohorts, 1):
        run.before.append({})
        run.after.append({})
        run.sent.append({})
        state = dict(state)
        drive(method.server(setting, state, cohort), wire, setting.round, run.ledger, checked)
        run.states.append(dict(state))
        if setting.round == restart:
            state, _ = unpack_tree(pack_tree(state, {}))
            state = {group: state.get(group, {}) for group in run.states[-1]}
            run.sites, wire = made()
    return run


def dense(model: AdaptedModel, running: Mapping[str, Tensor]) -> Dense:
    """W + s·B·A of every adapted layer, as [out, in], and all that is no LoRA."""
    config = model.peft.peft_config["default"]
    found = {n: t for n, t in running.items() if factor_of(n) is None and "base_layer" not in n}
    for layer, pair in pairs(model.initial).items():
        base = model.module.get_submodule(f"{layer}.base_layer")
        weight = running.get(f"{layer}.base_layer.weight", base.weight)
        turned = type(base).__name__ == "Conv1D"
        change = config.lora_alpha / config.r * running[pair.b] @ running[pair.a]
        found[layer] = (weight.T if turned else weight) + change
    return found


def untouched(model: AdaptedModel) -> Dense:
    """W alone."""
    return dense(model, {**model.initial, **{p.b: 0 * model.initial[p.b] for p in pairs(model.initial).values()}})


def norm_of(change: Mapping[str, Tensor]) -> float:
    """‖·‖_F over all layers."""
    return float(torch.stack([t.square().sum() for t in change.values()]).sum().sqrt())


def mean_of(run: Seen, round: int) -> Dense:
    """Σ p_k of the sites' dense weights after they trained."""
    each = {site: dense(run.lab.model, running) for site, running in run.after[round - 1].items()}
    weights = {site: float(run.sites[site].data.weight) for site in each}
    total = sum(weights.values())
    return {name: sum(weights[s] / total * each[s][name] for s in each) for name in each[min(each)]}  # type: ignore[misc]


# Bytes (§4.2) ---------------------------------------------------------------------------------------------------------


def counts(model: AdaptedModel) -> tuple[int, int, int, int]:
    """P_A, P_B, P_h and Σ r² over matrices."""
    size = dict.fromkeys(("A", "B", None), 0)
    for name, tensor in model.initial.items():
        size[factor_of(name)] += tensor.numel()
    return size["A"], size["B"], size[None], model.rank**2 * len(pairs(model.initial))


def expected(name: str, model: AdaptedModel, round: int, cohort: int = 3) -> tuple[int, int]:
    """Numbers that cross up and down, for a site that missed nothing."""
    a, b, h, cores = counts(model)
    odd = round % 2 == 1
    stack = cohort * (a + b) if round > 1 else 0
    residual = (cohort - 1) * (a + b) if round > 1 else 0
    return {
        "fedavg": (a + b + h, a + b + h), "flexlora": (a + b + h, a + b + h), "hetlora": (a + b + h, a + b + h),
        "ffa": (b + h, b + h), "fedsvd": (b + h, a + b + h), "fedsa": (a + h, a + h), "fedsb": (cores + h, cores + h),
        "rolora": ((b if odd else a) + h, (a if odd else b) + h),  # down goes the factor that moved last
        "flora": (a + b + h, stack + h), "fedex": (a + b + h, a + b + h + residual),
    }[name]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp64", marks=SLOW)])
@pytest.mark.parametrize("name", [*COMMON, "fedsa"])
def test_bytes_of_each_aggregation(name: str, precision: str) -> None:
    model = adapted("gpt2", precision=precision, r=2)
    run = seen(FedLLM(aggregation=name), model, (SITES, SITES), epochs=1)
    b = {"fp64": 8, "fp32": 4}[precision]
    for round in (1, 2):
        for way, wanted in zip(("up", "down"), expected(name, model, round), strict=True):
            for site in SITES:
                assert run.ledger.total("payload", round=round, site=site, direction=way) == b * wanted, (round, way)


@pytest.mark.parametrize(
    "settings", [{"upload": "delta"}, {"upload": "gradients"}, {"scaffold": True}, {"local_heads": True}]
)
def test_bytes_of_each_upload(settings: Any) -> None:
    model = adapted("gpt2", precision="fp32")
    a, b, h, _ = counts(model)
    wanted = 4 * (a + b + (0 if "local_heads" in settings else h)) * (2 if "scaffold" in settings else 1)
    run = seen(FedLLM(**settings), model, epochs=1, optimizer="sgd")
    for way in ("up", "down"):
        assert run.ledger.total("payload", site="site-2", direction=way) == 2 * wanted


@pytest.mark.parametrize("name", ["flora", *(pytest.param(name, marks=SLOW) for name in MIXED[1:])])
def test_bytes_of_mixed_ranks(name: str) -> None:
    """Each site sends and gets its own rank's adapter; a stack has all ranks together."""
    model = adapted("gpt2", precision="fp32")
    a, b, h, cores = counts(model)
    run = seen(FedLLM(aggregation=name), model, ranks=RAGGED, epochs=1)
    for site, rank in RAGGED.items():
        own = cores * rank**2 // model.rank**2 if name == "fedsb" else (a + b) * rank // model.rank
        down = (a + b) * sum(RAGGED.values()) // model.rank if name == "flora" else own
        assert run.ledger.total("payload", round=2, site=site, direction="up") == 4 * (own + h)
        assert run.ledger.total("payload", round=2, site=site, direction="down") == 4 * (down + h)


def test_fedex_never_sends_more_than_the_matrix() -> None:
    """min(P_W, (K−1)-fold adapter): at rank 16 of a width of 32 two residual factors would outgrow it."""
    model = adapted("gpt2", precision="fp32", r=16)
    run = seen(FedLLM(aggregation="fedex"), model, epochs=1)
    a, b, h, _ = counts(model)
    matrices = sum(model.initial[p.b].shape[0] * model.initial[p.a].shape[1] for p in pairs(model.initial).values())
    assert matrices < 2 * (a + b)
    assert run.ledger.total("payload", round=2, site="site-1", direction="down") == 4 * (a + b + h + matrices)


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), WHOLE + [pytest.param(*one, marks=SLOW) for one in REST])
def test_the_common_model_against_dense_weights(name: str, kind: str) -> None:
    """In each round, with sites that come and go: the server's model, what sites begin with, and the error told.

    GPT-2 has Conv1D layers, Llama Linear ones, both not square; the norms are trained whole.
    """
    modules = ("ln_f",) if kind == "gpt2" else ("norm",)
    model, method = adapted(kind, modules_to_save=modules), FedLLM(aggregation=name)
    run = seen(method, model, ABSENT, epochs=1)
    for round, cohort in enumerate(ABSENT, 1):
        mean, got = mean_of(run, round), dense(model, method.adapter(run.lab, run.states[round]) or {})
        layers = list(pairs(model.initial))
        if name in EXACT:
            assert distance(got, mean) < 1e-10
        else:
            heads = got.keys() - layers
            weights = name == "hetlora"  # which weighs by norms
            assert weights or distance({n: got[n] for n in heads}, {n: mean[n] for n in heads}) < 1e-12
        start = dense(model, method.adapter(run.lab, run.states[round - 1]) or {})
        told = float(run.states[round]["diagnostics"]["aggregation_error"])
        base = start if name == "flora" else untouched(model)
        exact, lost = ({x: mean[x] - other[x] for x in layers} for other in (base, got))
        error = norm_of(lost) / norm_of(exact)
        assert told < 1e-12 if name in EXACT else abs(told - error) < 1e-10 < told
        for site in cohort:
            assert distance(dense(model, run.before[round - 1][site]), start) < 1e-10, (round, site)
    assert distance(dense(model, method.adapter(run.lab, run.states[-1]) or {}), start) > 1e-3


@pytest.mark.parametrize("name", MIXED)
def test_mixed_ranks_and_scales(name: str) -> None:
    """Each site trains and sends W + s_k·B·A at its own rank and scale; the result is exact, or nearest in FlexLoRA."""
    model, method = adapted("gpt2"), FedLLM(aggregation=name)
    run = seen(method, model, ABSENT, RAGGED, epochs=1)
    layers, (pair, *_) = list(pairs(model.initial)), pairs(model.initial).values()
    for round, cohort in enumerate(ABSENT, 1):
        mean, got = mean_of(run, round), dense(model, method.adapter(run.lab, run.states[round]) or {})
        start = dense(model, method.adapter(run.lab, run.states[round - 1]) or {})
        base = start if name == "flora" and round > 1 else untouched(model)
        told = float(run.states[round]["diagnostics"]["aggregation_error"])
        for site in cohort:
            assert run.before[round - 1][site][pair.a].shape[0] == RAGGED[site]
            if name != "fedsb":
                sent, own = run.sent[round - 1][site], dense(model, run.after[round - 1][site])
                change = 8 / RAGGED[site] * sent[pair.b] @ sent[pair.a]  # lora_alpha is 8
                assert distance({"": base[layers[0]] + change}, {"": own[layers[0]]}) < 1e-12
        if name in ("flora", "fedsb"):
            assert distance(got, mean) < 1e-10 and told < 1e-12
        if name == "flexlora":
            exact = {x: mean[x] - base[x] for x in layers}
            tails = torch.stack([torch.linalg.svdvals(exact[x])[model.rank :].square().sum() for x in layers])
            lost = torch.stack([(mean[x] - got[x]).square().sum() for x in layers])
            assert float((lost - tails).abs().max()) < 1e-10  # Eckart and Young
            assert abs(told - float(tails.sum().sqrt()) / norm_of(exact)) < 1e-10
        if name == "hetlora":
            assert 0 < told < 1


def test_scales_are_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("gpt2")
    layer: Any = model.module.get_submodule("transformer.h.0.attn.c_attn")
    assert model.scale() == layer.scaling["default"] == 2 and model.scale(2) == 4
    monkeypatch.setattr(model.peft.peft_config["default"], "use_rslora", True)
    assert (model.scale(), model.scale(16)) == (4, 2)


def test_a_frozen_factor_keeps_every_bit() -> None:
    """FFA's A, and FedSB's A and B, which were drawn; RoLoRA's other factor; and the one that trains moves."""
    model = adapted("gpt2", precision="fp32")
    pair = next(iter(pairs(model.initial).values()))
    ffa = seen(FedLLM(aggregation="ffa"), model)
    assert all(torch.equal(run[pair.a], model.initial[pair.a]) for now in ffa.after for run in now.values())
    assert not torch.equal(ffa.states[-1]["adapter"][pair.b], model.initial[pair.b])
    rolora = seen(FedLLM(aggregation="rolora"), model)
    (start, one, two) = (state["adapter"] for state in rolora.states)
    assert torch.equal(start[pair.a], one[pair.a]) and not torch.equal(start[pair.b], one[pair.b])
    assert torch.equal(one[pair.b], two[pair.b]) and not torch.equal(one[pair.a], two[pair.a])
    fedsb = seen(FedLLM(aggregation="fedsb"), model)
    assert all(
        torch.equal(run[pair.b], fedsb.after[0]["site-1"][pair.b]) for now in fedsb.after for run in now.values()
    )
    fedsvd = seen(FedLLM(aggregation="fedsvd"), adapted("gpt2")).states[-1]["adapter"]
    assert distance({"": fedsvd[pair.a] @ fedsvd[pair.a].T}, {"": torch.eye(4, dtype=torch.float64)}) < 1e-10


@pytest.mark.slow
def test_flora_starts_anew() -> None:
    """L13: every round from B = 0 and an A that all draw alike, another one each time."""
    model = adapted("gpt2")
    run = seen(FedLLM(aggregation="flora"), model, (SITES, SITES, SITES), RAGGED)
    pair = next(iter(pairs(model.initial).values()))
    for now in run.before[1:]:
        assert all(not running[pair.b].any() for running in now.values())
        assert torch.equal(now["site-1"][pair.a], now["site-2"][pair.a][:2])
    assert not torch.equal(run.before[1]["site-1"][pair.a], run.before[2]["site-1"][pair.a])


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMON)
def test_one_site_keeps_its_weights(name: str) -> None:
    """L17."""
    model, method = adapted("llama"), FedLLM(aggregation=name)
    run = seen(method, model, (("site-2",),), epochs=1)
    got = dense(model, method.adapter(run.lab, run.states[1]) or {})
    assert distance(got, dense(model, run.after[0]["site-2"])) < 1e-10
    assert distance(got, dense(model, run.before[0]["site-2"])) > 1e-3


def test_a_site_that_lost_its_memory_says_so() -> None:
    model, method = adapted("gpt2"), FedLLM(aggregation="fedex")
    run = seen(method, model)
    run.lab.round = 3
    fresh, _ = federation(method, run.lab, SIZES)
    with pytest.raises(MessageError, match="site-1 is taken for up to date after round 2, but has forgotten"):
        drive(method.server(run.lab, dict(run.states[-1]), SITES), Loopback(fresh), 3, Ledger())


# The folder that is saved ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "ranks"),
    [
        ("flora", "gpt2", RAGGED),
        ("fedex", "llama", None),
        pytest.param("flexlora", "gpt2", RAGGED, marks=SLOW),
        pytest.param("fedsb", "llama", None, marks=SLOW),
    ],
)
def test_the_saved_folder_gives_the_evaluated_logits(name: str, kind: str, ranks: Any, tmp_path: Path) -> None:
    """Also of what was merged into the base, as one adapter of a larger rank."""
    model, method = adapted(kind), FedLLM(aggregation=name)
    run = seen(method, model, ranks=ranks)
    batch = collate(examples(n=6, seed=5), np.arange(6), 1)
    config = model.peft.peft_config["default"]
    before = config.r, config.lora_alpha
    shipped = method.shipped(run.lab, run.states[-1])
    assert shipped is not None and not any("base_layer" in name for name in shipped)
    model.save(shipped, tmp_path)
    assert (config.r, config.lora_alpha) == before
    with torch.no_grad():
        wanted = model.forward(method.adapter(run.lab, run.states[-1]) or {}, batch.lengths_B, batch.ids_BT)
        untouched = model.forward(model.initial, batch.lengths_B, batch.ids_BT)
    assert float((wanted - untouched).abs().max()) > 1e-3
    plain = transformers.AutoModelForSequenceClassification.from_config(config_of(kind)).double()
    plain.load_state_dict(base_state(model), strict=True)
    opened = peft.PeftModel.from_pretrained(plain, str(tmp_path)).double().eval()
    with torch.no_grad():
        logits = opened(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
    assert float((logits - wanted).abs().max()) < 1e-6  # PEFT may load it in fp32


# Costs, and rounds that are broken off --------------------------------------------------------------------------------


def test_frozen_factors_and_small_ranks_cost_less() -> None:
    """Though all share one table of what a pass costs."""
    model, costs = adapted("gpt2"), {}

    def flops(method: FedLLM, ranks: Mapping[str, int]) -> int:
        meter, setting = Meter(costs), lab(model, epochs=1)
        setting.ranks = ranks
        _, wire = federation(method, setting, SIZES, meter)
        setting.round = 1
        drive(method.server(setting, method.setup(setting), SITES), wire, 1, Ledger())
        return int(meter.total("flops"))

    whole = flops(FedLLM(), {})
    assert flops(FedLLM(aggregation="ffa"), {}) < whole
    assert flops(FedLLM(aggregation="flexlora"), dict.fromkeys(SITES, 2)) < whole == flops(FedLLM(), {})


STATEFUL: list[dict[str, Any]] = [
    *({"aggregation": name} for name in ("fedavg", "flora", "fedex", "rolora", "fedsa", "fedsb", "fedsvd")),
    {"scaffold": True}, {"keep_optimizer": True}, {"local_heads": True}, {"upload": "seeds", "candidate_seeds": 8},
    {"server_optimizer": "fedyogi", "server_learning_rate": 0.1}, {"server_optimizer": "fedavgm", "upload": "delta"},
]  # fmt: skip


QUICK = {"fedex", "fedsa", "fedyogi"}


@pytest.mark.parametrize(
    "settings",
    [pytest.param(s, marks=[] if QUICK & set(map(str, s.values())) else SLOW) for s in STATEFUL],
    ids=lambda settings: "-".join(f"{key}-{value}" for key, value in settings.items()),
)
def test_a_resumed_run_ends_in_the_same_bits(settings: Any, tmp_path: Path) -> None:
    """Server and sites start anew from disk after the second round."""
    model, method = adapted("gpt2", precision="fp32"), FedLLM(**settings)
    sgd = {"optimizer": "sgd", "weight_decay": 0.0} if {"scaffold", "upload"} & settings.keys() else {}
    whole = seen(method, model, ABSENT, epochs=1, **sgd)
    again = seen(method, model, ABSENT, folder=tmp_path, restart=2, epochs=1, **sgd)
    assert whole.states[-1].keys() == again.states[-1].keys()
    assert all(same(whole.states[-1][group], again.states[-1][group]) for group in whole.states[-1])
    assert list(whole.ledger) == list(again.ledger)
    for name, site in whole.sites.items():
        assert pack_tree(site.memory, {}) == pack_tree(again.sites[name].memory, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["fedllm.aggregation=flora", "lora.capacity={site-0: 2, site-1: 5, site-2: 8}"],
        ["fedllm.aggregation=fedsa", "fedllm.keep_optimizer=true"],
        ["fedllm.scaffold=true", "train.optimizer=sgd", "train.lr_scheduler_type=constant", "train.warmup_ratio=0"],
    ],
)
def test_a_comparison_that_was_broken_off_goes_on(settings: list[str], tmp_path: Path) -> None:
    small = ["data.max_train=60", "data.max_test=20", "data.max_public=8", "rounds=3", "threads=1", "clients=3"]
    config = load_config(settings=[*small, "partition={name: iid}", "frameworks=[fedllm]", *settings])

    def stop(framework: str, seed: int, entry: Mapping[str, Any]) -> None:
        if entry["round"] == 2:
            raise KeyboardInterrupt

    (whole,) = compare(config, tmp_path / "whole", jobs=1)["runs"]
    if "fedllm.aggregation=fedsa" in settings:
        assert len(whole["adapters"]) == 3 and whole["curve"][0]["accuracy"] is None
    else:
        assert [entry["aggregation_error"] >= 0 for entry in whole["curve"]] == [True] * 3
    with pytest.raises(KeyboardInterrupt):
        compare(config, tmp_path / "run", stop, jobs=1)
    (again,) = compare(config, tmp_path / "run", jobs=1)["runs"]
    assert again["adapter_sha256"] == whole["adapter_sha256"] and again["client_accuracy"] == whole["client_accuracy"]
    ledgers = [(tmp_path / name / "ledger.jsonl").read_bytes() for name in ("whole", "run")]
    assert ledgers[0] == ledgers[1]
