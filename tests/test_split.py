"""Split-FedLLM is what it says: to the last bit plain training where it should be, and not a byte or bit beside it.

The letters (S1, S3, …) name the identities; each test also proves that what it tests was on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import (
    DECODERS,
    DEPTH,
    KINDS,
    PAD,
    VOCAB,
    Played,
    adapted,
    distance,
    examples,
    federation,
    lab,
    play,
    rounds,
    same,
)
from torch import Tensor
from torch.nn.utils.stateless import _reparametrize_module

from fedtrio.data.batches import Batch, Encoded, collate
from fedtrio.errors import MessageError, ModelError
from fedtrio.frameworks import KD, Centralized, FedDF, FedLLM, Split
from fedtrio.frameworks.lab import Framework, Lab
from fedtrio.frameworks.split_server import ServerHalf
from fedtrio.ledger import Ledger
from fedtrio.message import Reply, decode, encode
from fedtrio.meter import Meter
from fedtrio.models.adapter import AdaptedModel
from fedtrio.models.cut import WHOLE, check_cut
from fedtrio.models.train import task_loss
from fedtrio.program import drive

ALL = [(kind, "classification") for kind in KINDS] + [(kind, "causal-lm") for kind in DECODERS]
LABELS_AT = ("server", "client")
FACTS = {"step": 0, "steps": 1}


def moved(run: Played) -> bool:
    """Whether every tensor that can learn has left where it started."""
    start = run.lab.model.initial
    return all(distance({n: run.adapter[n]}, {n: start[n]}) > 1e-4 for n in start)


def grads_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.grad.clone() for name, t in tensors.items() if t.grad is not None}


# One site: split is plain training ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "task", "precision"),
    [(*one, "fp64") for one in ALL]
    + [(*one, "fp32") for one in ALL if one[1] == "classification"]
    + [(*one, "bf16") for one in ALL if one[1] == "causal-lm" or one[0] == "bert"],
)
def test_one_site_is_centralized_at_every_cut(kind: str, task: str, precision: str) -> None:
    """S1, S2, S5: four AdamW steps in two rounds, each cut, labels at either side; not one bit differs."""
    model = adapted(kind, task, precision)
    shape = {"epochs": 1, "lr_scheduler_type": "linear"}
    whole = play(Centralized(), model, (7,), **shape)
    assert moved(whole)
    for cut in range(DEPTH + 1):
        for labels in LABELS_AT if precision == "fp64" else LABELS_AT[cut % 2 :][:1]:
            run = play(Split(cut=cut, labels=labels), model, (7,), **shape)
            assert same(run.adapter, whole.adapter), (cut, labels)
            assert run.ledger.total("messages", direction="up") == 2 * (2 * (2 if labels == "client" else 1) + 1)


@pytest.mark.parametrize(("kind", "task"), ALL)
def test_dropout_is_the_same_on_both_sides_of_every_cut(kind: str, task: str) -> None:
    model = adapted(kind, task, dropout=0.1, lora_dropout=0.1)
    plain = adapted(kind, task)
    assert same(model.initial, plain.initial)  # so that dropout is all that differs
    whole, without = play(Centralized(), model, (7,), n=1, epochs=1), play(Centralized(), plain, (7,), n=1, epochs=1)
    assert distance(whole.adapter, without.adapter) > 1e-3
    for cut, labels in zip((0, 1, 2, 2, 3, 4), LABELS_AT * 3, strict=True):
        assert same(play(Split(cut=cut, labels=labels), model, (7,), n=1, epochs=1).adapter, whole.adapter), (
            cut,
            labels,
        )


def test_dropout_differs_between_sites_and_steps() -> None:
    model = adapted("gpt2", dropout=0.1, lora_dropout=0.1)
    setting = lab(model)
    batch = collate(examples(n=4), range(4), PAD)
    seeds = [setting.dropout_seed(1, "site-1", 0), setting.dropout_seed(1, "site-1", 1)]
    seeds += [setting.dropout_seed(1, "site-2", 0), setting.dropout_seed(2, "site-1", 0)]
    logits = [model.forward(model.initial, batch.lengths_B, batch.ids_BT, dropout_seed=s) for s in seeds]
    assert all(not torch.equal(logits[i], logits[j]) for i in range(4) for j in range(i))
    assert torch.equal(model.forward(model.initial, batch.lengths_B, batch.ids_BT, dropout_seed=seeds[0]), logits[0])
    calm = model.forward(model.initial, batch.lengths_B, batch.ids_BT)
    assert torch.equal(calm, adapted("gpt2").forward(model.initial, batch.lengths_B, batch.ids_BT))


@pytest.mark.parametrize("labels", LABELS_AT)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_with_one_site_all_variants_are_one(labels: str, clip: float | None) -> None:
    """S11."""
    model = adapted("gpt2")
    runs = [
        play(Split(variant=v, labels=labels), model, (9,), max_grad_norm=clip) for v in ("sflv1", "sflv2", "sequential")
    ]
    assert moved(runs[0])
    assert same(runs[0].adapter, runs[1].adapter) and same(runs[0].adapter, runs[2].adapter)


# Clipping ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "task"), ALL)
def test_clipping_by_the_norm_of_both_halves(kind: str, task: str) -> None:
    """S13; the optimizer is SGD, for which a clipped gradient can't hide."""
    model = adapted(kind, task)
    rates = {"optimizer": "sgd", "learning_rate": 0.5, "head_learning_rate": 0.5, "n": 1, "epochs": 1}
    whole = play(Centralized(), model, (7,), max_grad_norm=0.05, **rates)
    loose = play(Centralized(), model, (7,), max_grad_norm=1e9, **rates)
    free = play(Centralized(), model, (7,), **rates)
    assert distance(whole.adapter, free.adapter) > 1e-3  # it did clip
    assert same(loose.adapter, free.adapter)  # and does nothing where there is nothing to clip
    for cut, labels in zip((0, 1, 2, 2, 3, 4), LABELS_AT * 3, strict=True):
        run = play(Split(cut=cut, labels=labels), model, (7,), max_grad_norm=0.05, **rates)
        assert same(run.adapter, whole.adapter), (cut, labels)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_clipping_in_other_precisions_with_adamw(precision: str) -> None:
    model = adapted("bert", precision=precision)
    whole = play(Centralized(), model, (7,), max_grad_norm=0.05)
    assert not same(whole.adapter, play(Centralized(), model, (7,)).adapter)
    for labels in LABELS_AT:
        assert same(play(Split(cut=2, labels=labels), model, (7,), max_grad_norm=0.05).adapter, whole.adapter)


# Many sites ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "task"), ALL)
def test_sflv1_is_fedllm(kind: str, task: str) -> None:
    """S3: three unequal sites, two rounds, two epochs, AdamW; labels at either side."""
    model, sizes = adapted(kind, task), (3, 5, 2)
    federated = play(FedLLM(), model, sizes)
    assert moved(federated)
    for labels in LABELS_AT:
        split = play(Split(cut=2, variant="sflv1", labels=labels), model, sizes)
        assert same(split.adapter, federated.adapter)
        assert split.state["site"] and split.state["server"]


@pytest.mark.parametrize("labels", LABELS_AT)
def test_sflv1_is_fedllm_with_everything_on(labels: str) -> None:
    """S3 with dropout, clipping, a schedule and fp32, where the order of a sum would show."""
    model, sizes = adapted("bert", precision="fp32", dropout=0.1, lora_dropout=0.1), (3, 5, 2)
    rest = {"max_grad_norm": 0.5, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1}
    federated = play(FedLLM(), model, sizes, **rest)
    assert distance(federated.adapter, play(FedLLM(), model, sizes).adapter) > 1e-4
    assert same(play(Split(cut=1, labels=labels), model, sizes, **rest).adapter, federated.adapter)


@pytest.mark.parametrize("labels", LABELS_AT)
def test_sites_abreast_change_no_bit(labels: str, tmp_path: Path) -> None:
    method, model = Split(labels=labels), adapted("gpt2", precision="fp32")
    runs = [play(method, model, (5, 4, 3, 2), n=1, abreast=abreast, max_grad_norm=0.1) for abreast in (None, 1, 2, 3)]
    for run in runs[1:]:
        assert same(run.adapter, runs[0].adapter)
        assert list(run.ledger) == list(runs[0].ledger)
    setting = lab(model, abreast=2)
    setting.round = 1
    sites, _ = federation(method, setting, (5, 8, 3, 2))
    first = next(method.server(setting, method.setup(setting), sorted(sites)))
    assert len(first) == 2  # the groups are real


def taught(method: Split, setting: Lab, sizes: Sequence[int], n: int) -> dict[str, Tensor]:
    """sflv2 and sequential written plainly: whole models, one loop, no wire and no cut; what they must amount to."""
    sites, _ = federation(method, setting, sizes)
    state = method.setup(setting)
    for setting.round in range(1, n + 1):
        order = setting.shuffled(list(sites))
        top = setting.learner(state["server"])
        halves = {}
        if method.variant == "sflv2":
            turns = [(s, step, b) for s in order for step, b in enumerate(sites[s].data.batches(setting.round))]
            turns.sort(key=lambda turn: turn[1])  # stable: batch by batch, within them in order of sites
            halves = {s: setting.learner(state["site"]) for s in order}
        else:
            turns = [(s, step, b) for s in order for step, b in enumerate(sites[s].data.batches(setting.round))]
        for site, step, batch in turns:
            if site not in halves:
                before = halves[last].values() if halves else state["site"]  # noqa: F821
                halves[site] = setting.learner(before)
            last = site  # noqa: F841
            bottom, seed = halves[site], setting.dropout_seed(setting.round, site, step)
            logits = setting.model.forward(
                {**bottom.tensors, **top.tensors}, batch.lengths_B, batch.ids_BT, dropout_seed=seed
            )
            task_loss(logits, batch.targets).backward()  # type: ignore[arg-type]
            progress = setting.progress(setting.round, step, sites[site].data.steps)
            norms = bottom.squared_norms(), top.squared_norms()
            bottom.step(progress, norms[1])
            top.step(progress, norms[0])
        if method.variant == "sflv2":
            weight = {s: sites[s].data.weight / sum(sites[s].data.weight for s in order) for s in order}
            state["site"] = {n: sum(weight[s] * halves[s].values()[n] for s in order) for n in state["site"]}  # type: ignore[misc]
        else:
            state["site"] = halves[order[-1]].values()
        state["server"] = top.values()
    return {**state["site"], **state["server"]}


@pytest.mark.parametrize(
    ("task", "labels", "clip"),
    [("classification", side, clip) for side in LABELS_AT for clip in (None, 0.05)] + [("causal-lm", "client", 0.05)],
)
@pytest.mark.parametrize("variant", ["sflv2", "sequential"])
def test_shared_server_half_against_a_plain_loop(task: str, variant: str, labels: str, clip: float | None) -> None:
    """One server half that learns from three unequal sites in turn, equal to the last bit after the first round."""
    model, sizes = adapted("gpt2", task, dropout=0.1), (5, 6, 3)
    method = Split(cut=2, variant=variant, labels=labels)  # type: ignore[arg-type]
    rest = {"max_grad_norm": clip, "lr_scheduler_type": "linear", "epochs": 1, "rounds": 2}
    setting = lab(model, **rest)
    _, wire = federation(method, setting, sizes)
    state, _ = rounds(method, setting, wire, 1)
    plain = taught(method, lab(model, **rest), sizes, 1)
    assert same(state["server"], {name: plain[name] for name in state["server"]})
    assert distance(method.adapter(setting, state), plain) < 1e-14  # type: ignore[arg-type]  # rounding of the mean
    parallel = play(method.model_copy(update={"variant": "sflv1"}), model, sizes, n=1, **rest)
    assert distance(plain, parallel.adapter) > 1e-3  # another algorithm, as it should be
    rounds(method, setting, wire, 1, state=state)
    assert distance(method.adapter(setting, state), taught(method, lab(model, **rest), sizes, 2)) < 1e-11  # type: ignore[arg-type]


def test_a_silent_site_is_left_out_and_its_gradients_dropped() -> None:
    """With clipping the server waits for a site's norms; where they never come the others go on as if it weren't."""

    class Broken:
        def __init__(self, wire, victim: str, after: int) -> None:
            self.wire, self.victim, self.left = wire, victim, after
            self.sites, self.abreast = wire.sites, wire.abreast

        def exchange(self, frames) -> Iterator[tuple[str, bytes]]:
            for site, answer in self.wire.exchange(frames):
                if site == self.victim:
                    self.left -= 1
                if site != self.victim or self.left >= 0:
                    yield site, answer

        def close(self) -> None: ...

    model = adapted("gpt2")
    for labels in LABELS_AT:
        for clip in (None, 0.05):
            method = Split(variant="sflv1", labels=labels)  # type: ignore[arg-type]
            setting = lab(model, rounds=1, max_grad_norm=clip, epochs=1)
            _, wire = federation(method, setting, (3, 5, 5))
            state = method.setup(setting)
            setting.round = 1
            drive(method.server(setting, state, wire.sites), Broken(wire, "site-3", 1), 1, Ledger())  # type: ignore[arg-type]
            alone = play(method, model, (3, 5), n=1, max_grad_norm=clip, epochs=1)
            assert same({**state["site"], **state["server"]}, alone.adapter)
            for variant in ("sflv2", "sequential", "concatenated"):
                method = Split(variant=variant, labels=labels)  # type: ignore[arg-type]
                _, wire = federation(method, setting, (3, 5, 5))
                state = method.setup(setting)
                drive(method.server(setting, state, wire.sites), Broken(wire, "site-3", 1), 1, Ledger())  # type: ignore[arg-type]
                assert distance(state["server"], method.setup(setting)["server"]) > 1e-3


# One step over the union of batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "task"), ALL)
def test_concatenated_activations_make_one_large_batch(kind: str, task: str) -> None:
    """S4: packed activations of three sites put together are a larger batch; the site gradients add up."""
    model, cut = adapted(kind, task), 2
    setting = lab(model, optimizer="sgd", weight_decay=0.0, learning_rate=0.5, head_learning_rate=0.5)
    setting.round = 1
    encoded = examples(task, 9)
    parts = [collate(encoded, range(*ends), PAD) for ends in ((0, 4), (4, 6), (6, 9))]
    whole = collate(encoded, range(9), PAD)
    split = Split(cut=cut, labels="server")
    state = split.setup(setting)

    large = setting.learner(model.initial)
    model.backward(task_loss(model.forward(large.tensors, whole.lengths_B, whole.ids_BT), whole.targets), whole.shape)  # type: ignore[arg-type]
    wanted = grads_of(large.tensors)
    large.step(0.0)

    bottoms = [setting.learner(state["site"]) for _ in parts]
    sent = [
        model.forward(b.tensors, p.lengths_B, p.ids_BT, span=(-1, cut)) for b, p in zip(bottoms, parts, strict=True)
    ]
    half = ServerHalf(split, setting, state["server"])
    answer = half.answer("all", activations(torch.cat([h.detach() for h in sent]), whole, task))
    dh = answer.tensor("dh").split([len(h) for h in sent])
    for h, part, gradient in zip(sent, parts, dh, strict=True):
        model.backward(h, part.shape, gradient, (-1, cut))
    summed = {name: sum(b.tensors[name].grad for b in bottoms) for name in state["site"]}  # type: ignore[misc]
    assert max(float(g.abs().max()) for g in summed.values()) > 1e-4
    assert distance(summed, {name: wanted[name] for name in summed}) < 1e-12
    assert distance(half.learner.values(), {name: large.values()[name] for name in state["server"]}) < 1e-12
    assert distance(large.values(), model.initial) > 1e-4


def activations(h_ND: Tensor, batch: Batch, task: str) -> Reply:
    """What a site sends, by hand."""
    labels = batch.targets
    assert labels is not None
    if task == "causal-lm":
        labels = torch.cat([row[:n] for row, n in zip(labels, batch.lengths_B.tolist(), strict=True)])
    facts = FACTS | {"lengths": " ".join(map(str, batch.lengths_B.tolist()))}
    return Reply("activations and labels", {"h": h_ND, "labels": labels.int()}, facts)


# Gradients and texts over the cut ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "task"), ALL)
def test_the_surrogate_has_the_gradients_of_the_whole(kind: str, task: str) -> None:
    """S6: with λ = ∂ℓ/∂h, the site's part of ∇ℓ is ∇(λᵀh): all that it needs of the server is λ."""
    model, encoded = adapted(kind, task), examples(task, 5)
    batch = collate(encoded, range(5), PAD)
    whole, below = lab(model).learner(model.initial), lab(model).learner(model.part(model.initial, (-1, 2)))
    task_loss(model.forward(whole.tensors, batch.lengths_B, batch.ids_BT), batch.targets).backward()  # type: ignore[arg-type]
    h_ND = model.forward(below.tensors, batch.lengths_B, batch.ids_BT, span=(-1, 2))
    there_ND = h_ND.detach().requires_grad_()
    logits = model.forward(model.initial, batch.lengths_B, h_ND=there_ND, span=(2, None))
    task_loss(logits, batch.targets).backward()  # type: ignore[arg-type]
    assert there_ND.grad is not None
    (there_ND.grad * h_ND).sum().backward()
    wanted, got = grads_of(whole.tensors), grads_of(below.tensors)
    assert got.keys() == below.tensors.keys() and distance(got, {name: wanted[name] for name in got}) < 1e-12
    assert max(float(g.abs().max()) for g in got.values()) > 1e-4


@pytest.mark.parametrize("kind", DECODERS)
def test_texts_are_continued_over_the_cuts_as_by_the_whole(kind: str) -> None:
    """S12: greedy, token by token, against `generate` of transformers with its cache; here each prefix runs anew."""
    model, prompts = adapted(kind, "causal-lm", tied=False), ([5, 17, 60, 8], [90], [33, 2, 71])
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "eos_token_id": None}
    with _reparametrize_module(model.module, dict(model.initial)), model._gates.open(WHOLE, None, None):
        whole = [model.module.generate(torch.tensor([prompt]), **options)[0].tolist() for prompt in prompts]  # type: ignore[operator]
    texts = [list(prompt) for prompt in prompts]
    with torch.no_grad():
        for ids in texts * 6:
            lengths_B = torch.tensor([len(ids)])
            h_ND = model.forward(model.initial, lengths_B, torch.tensor([ids]), span=(-1, 1))
            for span in ((1, 3), (3, None)):
                h_ND = model.forward(model.initial, lengths_B, h_ND=h_ND, span=span)
            ids.append(int(h_ND[0, -1].argmax()))
    assert texts == whole and len({ids[-1] for ids in texts}) > 1


# What crosses the cut ------------------------------------------------------------------------------------------------


def frames_of(folder: Path, direction: str) -> list[Reply]:
    return [decode(path.read_bytes()) for path in sorted(folder.glob(f"*-{direction}-*.safetensors"))]


@pytest.mark.parametrize(("kind", "task"), ALL)
def test_only_real_tokens_travel(kind: str, task: str, tmp_path: Path) -> None:
    """S10: rows of every activation and gradient are the sum of the lengths; batches with padding occur."""
    for labels in LABELS_AT:
        folder = tmp_path / labels
        run = play(Split(cut=2, labels=labels), adapted(kind, task), n=1, frames=folder)  # type: ignore[arg-type]
        assert len(list(folder.iterdir())) == run.ledger.total("messages")
        padded = 0
        for reply in frames_of(folder, "up"):
            if "lengths" in reply.facts:
                lengths = [int(n) for n in str(reply.fact("lengths")).split()]
                name = "h" if "h" in reply.tensors else "dh"
                assert reply.tensor(name).shape == (sum(lengths), 32)
                padded += max(lengths) * len(lengths) > sum(lengths)
        assert padded > 3
        rows = {d: sum(len(r.tensors.get("h", ())) for r in frames_of(folder, d)) for d in ("up", "down")}
        grads = {d: sum(len(r.tensors.get("dh", ())) for r in frames_of(folder, d)) for d in ("up", "down")}
        tokens = sum(len(i) for s in run.sites.values() for i in s.data.encoded.input_ids) * 2  # two epochs
        assert rows == {"up": tokens, "down": tokens if labels == "client" else 0}
        assert grads == {"up": tokens if labels == "client" else 0, "down": tokens}


@pytest.mark.parametrize(("kind", "task"), ALL)
def test_padding_changes_nothing(kind: str, task: str) -> None:
    """S10: a padded batch, its packed form over a cut, and each text alone give the same logits."""
    model, encoded = adapted(kind, task), examples(task, 6)
    batch = collate(encoded, range(6), PAD)
    assert len(set(batch.lengths_B.tolist())) > 2
    with torch.no_grad():
        padded = model.forward(model.initial, batch.lengths_B, batch.ids_BT)
        h_ND = model.forward(model.initial, batch.lengths_B, batch.ids_BT, span=(-1, 2))
        joined = model.forward(model.initial, batch.lengths_B, h_ND=h_ND, span=(2, None))
        start = 0
        for i in range(6):
            one = collate(encoded, [i], PAD)
            n = int(one.lengths_B)
            alone = model.forward(model.initial, one.lengths_B, one.ids_BT)
            h_one = model.forward(model.initial, one.lengths_B, one.ids_BT, span=(-1, 2))
            assert torch.allclose(h_ND[start : start + n], h_one, atol=1e-10, rtol=0)
            rows = (slice(i, i + 1), slice(0, n)) if task == "causal-lm" else (slice(i, i + 1),)
            for logits in (padded, joined):
                assert torch.allclose(logits[rows], alone, atol=1e-10, rtol=0)
            start += n


def kinds_down(run: Played) -> set[str]:
    return {entry.kind for entry in run.ledger if entry.direction == "down"}


@pytest.mark.parametrize(("kind", "task"), ALL)
def test_nothing_trains_below_cut_0_so_no_gradient_goes_down(kind: str, task: str) -> None:
    """S9: no such message, no backward work at the site, and nothing of its half in the adapter message."""
    meter = Meter({})
    run = play(Split(cut=0, labels="server"), adapted(kind, task), (7,), n=1, meter=meter)
    assert kinds_down(run) == {"adapter", "step taken"}
    assert run.ledger.total("payload", kind="adapter") == 0
    assert run.ledger.total("payload", direction="down") == 0
    assert meter.total("flops") == 0
    assert moved(run)  # it learnt all the same
    meter = Meter({})
    more = play(Split(cut=1, labels="server"), adapted(kind, task), (7,), n=1, meter=meter)
    assert "activation gradients" in kinds_down(more)
    assert sum(cost.flops for key, cost in meter._costs.items() if key[0] == "backward") > 0


def test_nothing_trains_in_a_frozen_bottom() -> None:
    """S9 where blocks do run at the site, but only those above the cut have LoRA."""
    model = adapted("gpt2", target_modules=r".*\.h\.[23]\.attn\.c_attn")
    meter = Meter({})
    run = play(Split(cut=2, labels="server"), model, meter=meter)
    assert kinds_down(run) == {"adapter", "step taken"} and meter.total("flops") > 0
    assert {key[0] for key in meter._costs} == {"forward"}
    assert same(run.adapter, play(FedLLM(), model).adapter)
    clipped = play(Split(cut=2, labels="server"), model, max_grad_norm=0.01)
    assert same(clipped.adapter, play(FedLLM(), model, max_grad_norm=0.01).adapter)


CANARY = 83  # a label that no count, step or length here equals


@pytest.mark.parametrize("variant", ["sflv1", "sflv2", "sequential", "concatenated"])
@pytest.mark.parametrize(("kind", "task"), [("gpt2", "classification"), ("qwen3", "causal-lm")])
def test_labels_stay_at_the_site(kind: str, task: str, variant: str, tmp_path: Path) -> None:
    """labels: client — whole numbers never cross, and until a gradient does, nothing depends on the labels at all."""
    model = adapted(kind, task, labels=VOCAB)
    found = {}
    for labels in LABELS_AT:
        for value in (CANARY, CANARY + 1):
            method = Split(cut=2, labels=labels, variant=variant)  # type: ignore[arg-type]
            setting = lab(model, epochs=1)
            sites, wire = federation(method, setting, (6, 3))
            for site in sites.values():
                site.data = relabelled(site.data, value)
            folder = tmp_path / f"{labels}-{value}"
            rounds(method, setting, wire, 1, Ledger(folder))
            found[labels, value] = frames_of(folder, "up") + frames_of(folder, "down")

    def leaks(reply: Reply) -> bool:
        whole = [t for t in reply.tensors.values() if not t.is_floating_point()]
        return "labels" in reply.tensors or bool(whole) or str(CANARY) in str(dict(reply.facts)).replace(".", " ")

    assert any(leaks(reply) for reply in found["server", CANARY])  # the detector works
    assert not any(leaks(reply) for reply in found["client", CANARY])
    first = [
        [encode(r, 1) for r in found["client", value] if r.kind == "activations" and r.facts.get("step") == 0]
        for value in (CANARY, CANARY + 1)
    ]
    if variant in (
        "sflv2",
        "sequential",
    ):  # the second site's come after the server has learnt from the first's
        first = [frames[:1] for frames in first]
    assert first[0] and first[0] == first[1]
    for reply in found["client", CANARY]:
        assert set(reply.facts) <= {"step", "steps", "lengths", "weight", "targets", "share"}


U_SHAPE = Split(cut=1, labels="client")


@pytest.mark.parametrize(
    ("method", "kind", "task"),
    [
        (U_SHAPE, "gpt2", "classification"),
        (U_SHAPE, "qwen3", "causal-lm"),
        (Split(cut=1, labels="client", last_blocks=2), "qwen3", "causal-lm"),
        (Split(cut=1, labels="client", variant="concatenated"), "gpt2", "classification"),
        (Split(cut=1, labels="client", cache="fixed", cache_threshold=-1), "qwen3", "causal-lm"),
        (KD(), "gpt2", "classification"),
        (KD(), "qwen3", "causal-lm"),
        (FedDF(), "gpt2", "classification"),
    ],
    ids=["u-shape", "u-shape of text", "last blocks", "concatenated", "cache", "kd", "kd of text", "feddf"],
)
def test_tokens_and_labels_stay_at_the_site(method: Framework, kind: str, task: str, tmp_path: Path) -> None:
    """What leaves a site names no token and no label.

    Tensors hold no whole numbers, as such or as floats, and facts are those of sites with other tokens and labels.
    """

    def said(value: int, folder: str) -> list[Reply]:
        setting = lab(adapted(kind, task, labels=VOCAB), epochs=2, rounds=1)
        sites, wire = federation(method, setting, (6, 3))
        for site in sites.values():
            private = relabelled(site.data, value)
            ids = [i * 0 + value for i in private.encoded.input_ids]
            site.data = replace(private, encoded=replace(private.encoded, input_ids=ids))
        rounds(method, setting, wire, 1, Ledger(tmp_path / folder))
        return frames_of(tmp_path / folder, "up")

    one, other = said(CANARY, "one"), said(CANARY + 1, "other")
    assert [(r.kind, r.facts) for r in one] == [(r.kind, r.facts) for r in other]
    for reply in one:
        for name, tensor in reply.tensors.items():
            assert tensor.is_floating_point() and not bool((tensor == CANARY).any()), (reply.kind, name)
    if method is U_SHAPE:  # the detector works
        at_server = method.model_copy(update={"labels": "server"})
        sites, wire = federation(at_server, (setting := lab(adapted(kind, task, labels=VOCAB))), (6,))
        sites["site-1"].data = relabelled(sites["site-1"].data, CANARY)
        rounds(at_server, setting, wire, 1, Ledger(tmp_path / "server"))
        labels = [r.tensors["labels"] for r in frames_of(tmp_path / "server", "up") if not r.done]
        assert labels and all(bool((t == CANARY).any()) for t in labels)


def relabelled(data, value: int):
    encoded = data.encoded
    if isinstance(encoded.targets, list):
        targets = [(t * 0 + value) for t in encoded.targets]
    else:
        targets = encoded.targets * 0 + value
    return type(data)(Encoded(encoded.input_ids, targets), data.site, data.seed, data.batch_size, data.epochs, PAD)


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [-1, 5, 99])
def test_a_wrong_cut_names_the_legal_ones(cut: int) -> None:
    with pytest.raises(ModelError, match=rf"{cut}.* 4 blocks.* 0 to 4"):
        check_cut(cut, adapted("gpt2").depth)


def test_cut_of_cuts() -> None:
    assert Split(cut=1, labels="server").cuts(4) == (1,)
    assert Split(cut=1, labels="client").cuts(4) == (1, 4)


@pytest.mark.parametrize("lengths", ["", "3 x", "0 3", "-1 4", "3.5", "2 2"])
def test_a_wrong_batch_is_refused(lengths: str) -> None:
    split, setting = Split(cut=2, labels="server"), lab(adapted("gpt2"))
    half = ServerHalf(split, setting, split.setup(setting)["server"])
    h_ND = torch.zeros(3, 32, dtype=torch.float64)
    reply = Reply("activations and labels", {"h": h_ND}, FACTS | {"lengths": lengths})
    with pytest.raises(MessageError, match="length"):
        half.answer("site-1", reply)
    with pytest.raises(MessageError, match="not open"):
        half.answer("site-1", Reply("activation gradients", {}, FACTS))


def test_tied_embeddings() -> None:
    """A head tied to the embeddings runs at both sides of the cut, frozen; it is no part of the adapter."""
    for kind in ("gpt2", "qwen3"):
        model = adapted(kind, "causal-lm")
        module = model.module
        assert module.get_output_embeddings().weight is module.get_input_embeddings().weight  # type: ignore[operator]
        assert all("lora_" in name for name in model.initial)
    untied: AdaptedModel = adapted("qwen3", "causal-lm", tied=False)
    assert untied.module.get_output_embeddings().weight is not untied.module.get_input_embeddings().weight  # type: ignore[operator]
    assert same(play(Split(labels="client"), untied, (7,)).adapter, play(Centralized(), untied, (7,)).adapter)
