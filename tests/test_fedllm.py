"""FedLLM: FedAvg of adapters, held against centralized steps, hand-computed numbers and its own invariants."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import DECODERS, KINDS, adapted, distance, examples, federation, lab, play, rounds, same, shaken
from torch import Tensor

from fedtrio.aggregation.adapters import normalised, weighted_mean
from fedtrio.data.batches import Encoded, collate
from fedtrio.frameworks import FedLLM
from fedtrio.frameworks.lab import Lab
from fedtrio.ledger import Ledger
from fedtrio.meter import Meter
from fedtrio.models.adapter import AdaptedModel
from fedtrio.models.train import task_loss
from fedtrio.program import Site, drive
from fedtrio.run import sample
from fedtrio.wires.loopback import Loopback

SIZES = (5, 11, 8)
SGD = {"optimizer": "sgd", "learning_rate": 0.5, "head_learning_rate": 0.5, "weight_decay": 0.0}
ONE_STEP = SGD | {"batch_size": 64, "epochs": 1}


def union(sites: Mapping[str, Site]) -> Encoded:
    """All sites' examples in one heap."""
    parts = [site.data.encoded for site in sites.values()]
    ids = [i for part in parts for i in part.input_ids]
    if isinstance(parts[0].targets, np.ndarray):
        return Encoded(ids, np.concatenate([part.targets for part in parts]))
    return Encoded(ids, [t for part in parts for t in part.targets or []])


def gradient_step(model: AdaptedModel, adapter: Mapping[str, Tensor], heap: Encoded, lab: Lab) -> dict[str, Tensor]:
    """θ − η∇ of the mean loss over the heap, with torch.autograd and nothing of the training loop."""
    leaves = {name: t.clone().requires_grad_() for name, t in adapter.items()}
    batch = collate(heap, np.arange(len(heap)), lab.pad_id)
    loss = task_loss(model.forward(leaves, batch.lengths_B, batch.ids_BT), batch.targets)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    rate = lab.train.learning_rate
    return {
        name: leaf.detach() if g is None else leaf.detach() - rate * g
        for (name, leaf), g in zip(leaves.items(), gradients, strict=True)
    }


@pytest.fixture
def fp64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes RMSNorm and softmax in fp32 whatever the model's dtype; here it doesn't.

    With those islands the identities of Llama and Qwen3 hold to 1e-8 only, because sites pad to other lengths.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def norm(self, h):
        return self.weight * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.variance_epsilon)

    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=None, dtype=None, **rest: softmax(x, dim=dim))
    for kind in (LlamaRMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(kind, "forward", norm)


# The mean -----------------------------------------------------------------------------------------------------------


def test_weighted_mean_by_hand():
    adapters = {
        "a": {"x": torch.tensor([1.0, -2.0]), "y": torch.tensor([[4.0]])},
        "b": {"x": torch.tensor([5.0, 2.0]), "y": torch.tensor([[0.0]])},
        "c": {"x": torch.tensor([0.0, 8.0]), "y": torch.tensor([[8.0]])},
    }
    mean = weighted_mean(adapters, {"a": 5, "b": 11, "c": 8})  # 24 together
    assert torch.equal(mean["x"], torch.tensor([60 / 24, 76 / 24]))
    assert torch.equal(mean["y"], torch.tensor([[84 / 24]]))
    assert normalised({"b": 3, "a": 1}) == {"a": 0.25, "b": 0.75}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mean_lies_between_its_terms(dtype):
    """Without holding it there, Σ p_k θ of equal θ moves by an ulp: these weights show it."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(4096, generator=generator, dtype=torch.float64).to(dtype)
    weights = {f"s{k}": float(n) for k, n in enumerate((5, 11, 8, 3, 7, 1, 19))}
    p = normalised(weights)
    naive = sum(theta.double() * share for share in p.values())
    assert (dtype is torch.float64) == (not torch.equal(naive.to(dtype), theta))  # type: ignore[union-attr]
    assert torch.equal(weighted_mean({site: {"t": theta} for site in weights}, weights)["t"], theta)

    moved = {site: {"t": theta + k * 1e-7} for k, site in enumerate(weights)}
    terms = torch.stack([adapter["t"] for adapter in moved.values()])
    mean = weighted_mean(moved, weights)["t"]
    assert mean.dtype == dtype
    assert bool((mean >= terms.min(0).values).all() and (mean <= terms.max(0).values).all())


def test_small_updates_survive_the_mean():
    """F11: a mean kept in the dtype of the terms would lose them."""
    terms = {f"s{k:02}": {"t": torch.tensor([1.0 if k else 1.0 + 2**-22])} for k in range(64)}
    mean = weighted_mean(terms, dict.fromkeys(terms, 1.0))["t"]
    assert mean.item() == torch.tensor(1.0 + 2**-28, dtype=torch.float64).to(torch.float32).item() == 1.0
    spread = {f"s{k:02}": {"t": torch.tensor([1.0 + (k % 2) * 2**-22])} for k in range(64)}
    assert weighted_mean(spread, dict.fromkeys(spread, 1.0))["t"].item() == 1.0 + 2**-23


def test_eta_one_on_the_mean_of_deltas_is_the_weighted_mean():
    """F5: θ + Σ p_k (θ_k − θ)."""
    model = adapted("gpt2")
    start = model.initial
    sent = {f"s{k}": shaken(start, seed=k) for k in range(4)}
    weights = {"s0": 3.0, "s1": 1.0, "s2": 4.0, "s3": 1.5}
    p = normalised(weights)
    stepped = {name: t + sum(p[s] * (sent[s][name] - t) for s in sent) for name, t in start.items()}
    assert distance(stepped, weighted_mean(sent, weights)) < 1e-12
    assert distance(stepped, start) > 1e-2


# Identities of a round ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_full_batch_step_each_is_the_centralized_step(kind, fp64_throughout):
    """F1, with 5, 11 and 8 examples; the second step is no longer exact."""
    run = play(FedLLM(), adapted(kind), SIZES, n=1, **ONE_STEP)
    central = gradient_step(run.lab.model, run.lab.model.initial, union(run.sites), run.lab)
    assert distance(run.adapter, central) < 1e-12
    assert distance(run.adapter, run.lab.model.initial) > 1e-2
    unweighted = play(FedLLM(), adapted(kind), (8, 8, 8), n=1, **ONE_STEP)
    assert distance(run.adapter, unweighted.adapter) > 1e-6

    twice = play(FedLLM(), adapted(kind), SIZES, n=1, **ONE_STEP | {"epochs": 2})
    central = gradient_step(run.lab.model, central, union(run.sites), run.lab)
    assert distance(twice.adapter, central) > 1e-6


@pytest.mark.parametrize("kind", DECODERS)
def test_language_models_are_weighted_by_target_tokens(kind, fp64_throughout):
    """F2: one step by token weights is the centralized step; by example weights it isn't."""
    run = play(FedLLM(), adapted(kind, "causal-lm"), SIZES, n=1, **ONE_STEP)
    central = gradient_step(run.lab.model, run.lab.model.initial, union(run.sites), run.lab)
    assert distance(run.adapter, central) < 1e-12
    assert distance(run.adapter, run.lab.model.initial) > 1e-3

    tokens = {name: site.data.weight for name, site in run.sites.items()}
    assert tokens != {name: len(site.data) for name, site in run.sites.items()}
    steps = {
        name: gradient_step(run.lab.model, run.lab.model.initial, site.data.encoded, run.lab)
        for name, site in run.sites.items()
    }
    assert distance(weighted_mean(steps, tokens), central) < 1e-12
    by_examples = weighted_mean(steps, {name: len(site.data) for name, site in run.sites.items()})
    assert distance(by_examples, central) > 1e-4


def test_identical_clients_are_one_client():
    """F3: the same examples, and the same batches too, at each of four sites."""
    method, model = FedLLM(), adapted("gpt2")
    one = play(method, model, (9,), n=3)
    setting = lab(model, rounds=3)
    data = one.sites["site-1"].data  # batches are a function of the name in the data, not of who holds them
    sites = {name: Site(name, data, method, setting) for name in ("a", "b", "c", "d")}
    state, _ = rounds(method, setting, Loopback(sites), 3)
    assert distance(state["adapter"], one.adapter) == 0.0
    assert distance(one.adapter, model.initial) > 1e-3


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize(
    "idle", [{"learning_rate": 0.0, "head_learning_rate": 0.0, "weight_decay": 0.0}, {"epochs": 0}]
)
def test_nothing_learnt_leaves_every_bit(precision, idle):
    """F4."""
    model = adapted("gpt2", precision=precision)
    assert same(play(FedLLM(), model, SIZES, n=2, **idle).adapter, model.initial)
    assert not same(play(FedLLM(), model, SIZES, n=1).adapter, model.initial)


def test_fedavg_by_hand():
    """F6: no proximal term, no momentum, no correction: one site's step is the plain one, and their mean the rest."""
    run = play(FedLLM(), adapted("llama"), (2, 6), n=1, **ONE_STEP)
    start = run.lab.model.initial
    first, second = (
        gradient_step(run.lab.model, start, run.sites[name].data.encoded, run.lab) for name in ("site-1", "site-2")
    )
    by_hand = {name: 0.25 * first[name] + 0.75 * second[name] for name in start}
    assert distance(run.adapter, by_hand) < 1e-12


def test_order_of_the_inbox_changes_no_bit():
    """F10: neither in which order the server asks, nor in which the answers come."""

    class Backwards(Loopback):
        def exchange(self, frames):
            return reversed(list(super().exchange(frames)))

    method, model = FedLLM(), adapted("gpt2", precision="fp32")
    adapters = []
    for wire_class, turned in ((Loopback, False), (Loopback, True), (Backwards, False)):
        setting = lab(model, rounds=2)
        sites, _ = federation(method, setting, SIZES)
        wire = wire_class(sites)
        state = method.setup(setting)
        for setting.round in (1, 2):
            cohort = wire.sites[::-1] if turned else wire.sites
            drive(method.server(setting, state, cohort), wire, setting.round, Ledger())
        adapters.append(state["adapter"])
    assert same(adapters[0], adapters[1]) and same(adapters[0], adapters[2])

    weights = {"a": 3.0, "b": 5.0, "c": 7.0}
    sent = {site: shaken(adapters[0], seed) for seed, site in enumerate(weights)}
    turned_around = weighted_mean({s: sent[s] for s in "cab"}, {s: weights[s] for s in "bca"})
    assert same(weighted_mean(sent, weights), turned_around)


# What an adapter does to the model ------------------------------------------------------------------------------------


def merged_weights(model: AdaptedModel, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W + s·B·A of every adapted layer, computed here, in the layout of the layer."""
    weights = dict(model.module.named_parameters())
    config = model.peft.peft_config["default"]
    merged = {}
    for name, a in adapter.items():
        if ".lora_A." not in name:
            continue
        layer = name.split(".lora_A.")[0]
        delta = config.lora_alpha / config.r * adapter[name.replace("lora_A", "lora_B")] @ a
        base = weights[f"{layer}.base_layer.weight"]
        conv1d = type(model.module.get_submodule(f"{layer}.base_layer")).__name__ == "Conv1D"
        merged[layer] = base + (delta.T if conv1d else delta)
    return merged


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_one_client_keeps_its_effective_weights(kind):
    """L17."""
    run = play(FedLLM(), adapted(kind), (6,), n=1)
    site = run.sites["site-1"]
    site.round = 1
    own = run.lab.fit(run.lab.model.initial, site)
    ours, theirs = merged_weights(run.lab.model, run.adapter), merged_weights(run.lab.model, own)
    assert len(ours) >= 8 and distance(ours, theirs) == 0.0
    assert distance(ours, merged_weights(run.lab.model, run.lab.model.initial)) > 1e-3


@pytest.mark.parametrize(("kind", "layer_kind"), [("gpt2", "Conv1D"), ("llama", "Linear"), ("bert", "Linear")])
def test_adapter_equals_merged_weights(kind, layer_kind, tmp_path):
    """L18: x(W + sBA)ᵀ == Wx + sBAx for `Conv1D`, whose weight is i × o, and for `Linear`, both not square.

    Once with weights merged here, once as PEFT merges the folder that was saved.
    """
    import peft
    import transformers
    from tiny import config_of

    run = play(FedLLM(), adapted(kind), SIZES, n=1)
    model, adapter = run.lab.model, run.adapter
    merged = merged_weights(model, adapter)
    adapted_layers = {layer: model.module.get_submodule(f"{layer}.base_layer") for layer in merged}
    assert {type(module).__name__ for module in adapted_layers.values()} == {layer_kind}
    assert any(weight.shape[0] != weight.shape[1] for weight in merged.values())
    batch = collate(examples(n=6, seed=5), np.arange(6), 1)
    with torch.no_grad():
        wanted = model.forward(adapter, batch.lengths_B, batch.ids_BT)
        silent = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in adapter.items()}
        substitute = silent | {f"{layer}.base_layer.weight": weight for layer, weight in merged.items()}
        assert float((model.forward(substitute, batch.lengths_B, batch.ids_BT) - wanted).abs().max()) < 1e-10
        assert float((model.forward(silent, batch.lengths_B, batch.ids_BT) - wanted).abs().max()) > 1e-3

    model.save(adapter, tmp_path)
    plain = transformers.AutoModelForSequenceClassification.from_config(config_of(kind)).double()
    plain.load_state_dict(base_state(model), strict=True)
    opened = peft.PeftModel.from_pretrained(plain, str(tmp_path)).double().merge_and_unload().eval()
    with torch.no_grad():
        logits = opened(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
    assert float((logits - wanted).abs().max()) < 1e-6  # the folder is written in fp64, but PEFT may load it in fp32


def base_state(model: AdaptedModel) -> dict[str, Tensor]:
    """The weights of the model without its adapters, by the names of the plain model."""
    state = {}
    for name, tensor in model.module.state_dict().items():
        if "lora_" in name or ".modules_to_save." in name:
            continue
        state[name.replace(".base_layer", "").replace(".original_module", "")] = tensor
    return state


# Who takes part -------------------------------------------------------------------------------------------------------


def test_sampling_is_a_pure_function_of_seed_and_round():
    sites = [f"site-{k}" for k in range(10)]
    torch.manual_seed(1)
    np.random.seed(1)
    first = [sample(sites, 0.3, seed=0, round=r) for r in range(1, 41)]
    torch.manual_seed(2)
    np.random.seed(2)
    assert first == [sample(sites[::-1], 0.3, seed=0, round=r) for r in range(1, 41)]
    assert first != [sample(sites, 0.3, seed=1, round=r) for r in range(1, 41)]
    assert all(len(cohort) == len(set(cohort)) == 3 and cohort == sorted(cohort) for cohort in first)
    often = Counter(site for cohort in first for site in cohort)
    assert set(often) == set(sites) and max(often.values()) < 24  # 12 expected of 40; nobody is always there
    assert sample(sites, 1.0, 0, 1) == sites
    assert len(sample(sites, 0.01, 0, 1)) == 1
    assert len(sample(sites[:5], 0.5, 0, 1)) == math.floor(2.5 + 0.5)


def test_weights_are_renormalised_over_those_who_took_part():
    method, model = FedLLM(), adapted("gpt2")
    setting = lab(model, rounds=1, **ONE_STEP)
    sites, wire = federation(method, setting, SIZES)
    state, setting.round = method.setup(setting), 1
    drive(method.server(setting, state, ["site-1", "site-3"]), wire, 1, Ledger())
    steps = [gradient_step(model, model.initial, sites[name].data.encoded, setting) for name in ("site-1", "site-3")]
    by_hand = {name: 5 / 13 * steps[0][name] + 8 / 13 * steps[1][name] for name in model.initial}
    assert distance(state["adapter"], by_hand) < 1e-12


# What is exchanged ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_everything_trainable_is_exchanged(kind):
    """Head and `modules_to_save` included: what changes in training is what is sent, and nothing else can change."""
    extra = {"gpt2": "ln_f", "llama": "norm", "qwen3": "norm", "bert": "pooler"}[kind]
    model = adapted(kind, modules_to_save=(extra,))
    marked = {n for n, _ in model.peft.get_base_model().named_parameters() if n in model.initial}
    assert marked == set(model.initial)
    assert any("lora_A" in n for n in marked) and any("lora_B" in n for n in marked)
    assert any(f"{extra}.modules_to_save" in n for n in marked)
    assert any("score.modules_to_save" in n or "classifier.modules_to_save" in n for n in marked)
    before = {name: t.clone() for name, t in model.module.state_dict().items()}
    run = play(FedLLM(), model, SIZES, n=2)
    assert run.adapter.keys() == model.initial.keys()
    unmoved = {name for name in run.adapter if torch.equal(run.adapter[name], model.initial[name])}
    assert not unmoved, unmoved
    assert same(before, model.module.state_dict())  # the base itself never moves, in no site and in no server


def test_frames_carry_the_whole_adapter(tmp_path):
    import safetensors.torch

    model = adapted("gpt2", precision="fp32")
    run = play(FedLLM(), model, (3, 4), n=2, frames=tmp_path)
    frames = sorted(tmp_path.iterdir())
    assert len(frames) == run.ledger.total("messages") == 8
    for frame in frames:
        assert set(safetensors.torch.load_file(str(frame))) == set(model.initial)
    payload = sum(t.numel() * t.element_size() for t in model.initial.values())
    assert run.ledger.total("payload", direction="up") == 4 * payload
    assert {(e.direction, e.kind) for e in run.ledger} == {("up", "adapter"), ("down", "adapter")}


def test_no_two_sites_share_storage(monkeypatch):
    """Neither while they train nor in what the server keeps."""
    leaves: dict[str, list[Tensor]] = {}
    original = Lab.learner

    def watched(self, tensors, *rest, **options):
        learner = original(self, tensors, *rest, **options)
        leaves[f"{self.round}/{len(leaves)}"] = list(learner.tensors.values())
        return learner

    monkeypatch.setattr(Lab, "learner", watched)
    model = adapted("gpt2", modules_to_save=("ln_f",))
    run = play(FedLLM(), model, SIZES, n=2)
    assert len(leaves) == 6
    everywhere = [t for group in leaves.values() for t in group]
    everywhere += [*run.adapter.values(), *model.initial.values(), *model.module.parameters()]
    addresses = [t.untyped_storage().data_ptr() for t in everywhere]
    parameters = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
    shared = [address for address, times in Counter(addresses).items() if times > 1]
    assert not set(shared) - parameters  # weights may be tied inside the frozen base, but nothing else is shared
    assert not {t.untyped_storage().data_ptr() for t in run.adapter.values()} & parameters


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_being_metered_changes_no_bit(kind):
    """Counting the first pass of each shape must not change what that pass computes."""
    model, meter = adapted(kind, precision="fp32"), Meter()
    metered = play(FedLLM(), model, SIZES, n=1, meter=meter)
    assert meter.total("flops") > 1e6
    assert same(metered.adapter, play(FedLLM(), model, SIZES, n=1).adapter)


def test_a_run_changes_nothing_that_it_was_given(tmp_path: Path):
    """The adapter all start from stays, even when it is saved and another was in between."""
    model = adapted("llama")
    start = {name: t.clone() for name, t in model.initial.items()}
    run = play(FedLLM(), model, SIZES, n=1)
    again = play(FedLLM(), model, SIZES, n=1)
    model.save(run.adapter, tmp_path)
    assert same(model.initial, start)
    assert same(run.adapter, again.adapter) and not same(run.adapter, start)
