"""KD's other protocols against what they must equal: the standard round, FedLLM, and steps done by hand in fp64."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_guards import extra, facts, lied, poked, tensor, tensors, without
from test_kd import SIZES, one_by_one
from test_kd_codecs import refused
from tiny import LABELS, adapted, distance, federation, lab, play, public_set, rounds, same

from fedtrio.aggregation.logits import mean_logits
from fedtrio.data.batches import Encoded
from fedtrio.errors import QuorumError
from fedtrio.frameworks import KD, FedDF, FedLLM, FedMD, FedMKT, Local
from fedtrio.frameworks.kd_fedmkt import Knowledge, knowledge, least_loss, mixture
from fedtrio.frameworks.lab import Framework, Lab
from fedtrio.message import Reply
from fedtrio.models.train import distillation_loss, task_loss
from fedtrio.program import Site
from fedtrio.wires.loopback import Loopback

SGD: dict[str, Any] = {"optimizer": "sgd", "weight_decay": 0.0, "batch_size": 64, "epochs": 1}


# FedMD ----------------------------------------------------------------------------------------------------------------


def test_fedmd_is_the_standard_round_turned():
    """Digest, then revisit: its first round is the standard one with private training once more at the end."""
    model = adapted("gpt2")
    standard, turned = play(KD(), model, SIZES, n=1), play(FedMD(), model, SIZES, n=1)
    assert same(turned.adapter, standard.adapter)  # the students saw the same logits
    for name, site in standard.sites.items():
        wanted = standard.lab.fit(site.memory["adapter"], site)
        assert same(turned.sites[name].memory["adapter"], wanted)
        assert not same(wanted, site.memory["adapter"])
    assert {e.kind for e in turned.ledger} == {"start", "logits", "aggregated logits", "done"}


@pytest.mark.parametrize("switched_off", ["weight", "no public set"])
def test_fedmd_without_a_digest_is_private_training(switched_off: str):
    """K11: after R rounds a site has trained R + 1 times and seen nothing."""
    model = adapted("gpt2", precision="fp32")
    method = FedMD(distill_weight=0.0) if switched_off == "weight" else FedMD()
    more: dict[str, Any] = {"public": Encoded([], None)} if switched_off == "no public set" else {}
    run = play(method, model, SIZES, n=1, **more)
    alone = play(Local(), model, SIZES, n=1)
    for name, site in alone.sites.items():
        assert same(run.sites[name].memory["adapter"], alone.lab.fit(site.memory["adapter"], site))


def test_fedmd_needs_no_student():
    run = play(FedMD(server_epochs=0), adapted("gpt2"), SIZES, n=1)
    assert run.method.adapter(run.lab, run.state) is None
    assert KD(server_epochs=0).adapter(run.lab, run.state) is not None


# DS-FL ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [KD(public_per_round=3), FedDF(public_per_round=3)])
def test_public_texts_of_a_round(method: KD):
    """Drawn anew in each round, the same at all sites and at the server; nothing else crosses or is learnt from."""
    model = adapted("gpt2", precision="fp32")
    run = play(method, model, SIZES, n=2)
    drawn = [method.of_round(run.lab, n).public.input_ids for n in (1, 2)]
    assert [len(d) for d in drawn] == [3, 3] and [id(i) for i in drawn[0]] != [id(i) for i in drawn[1]]
    known = [id(ids) for ids in run.lab.public.input_ids]
    assert all(known.index(id(a)) < known.index(id(b)) for d in drawn for a, b in pairwise(d))
    if not isinstance(method, FedDF):
        assert {e.payload for e in run.ledger if "logits" in e.kind} == {3 * LABELS * 4}
    whole = play(method.model_copy(update={"public_per_round": 7}), model, SIZES, n=2)
    assert same(whole.adapter, play(method.model_copy(update={"public_per_round": None}), model, SIZES, n=2).adapter)
    assert not same(whole.adapter, run.adapter)


@pytest.mark.filterwarnings("ignore:entropy reduction")
def test_dsfl_learns_from_sharpened_probabilities():
    """ERA at T → ∞ is the uniform distribution, the power at T = 1 the mean itself, as the standard round has it."""
    model = adapted("gpt2")
    dsfl = play(KD(protocol="dsfl", aggregation="power", sharpening=1.0), model, SIZES)
    mean = play(KD(aggregation="probabilities"), model, SIZES)
    assert distance(dsfl.adapter, mean.adapter) < 1e-9
    era = play(KD(protocol="dsfl", aggregation="era"), model, SIZES)
    assert distance(era.adapter, mean.adapter) > 1e-4


# FedDF ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "off"), [("gpt2", "epochs"), ("bert", "no public set")])
def test_feddf_without_distillation_is_fedllm(kind: str, off: str):
    model = adapted(kind, precision="fp32")
    method = FedDF(server_epochs=0) if off == "epochs" else FedDF()
    more: dict[str, Any] = {"public": Encoded([], None)} if off == "no public set" else {}
    run, wanted = play(method, model, SIZES, **more), play(FedLLM(), model, SIZES)
    assert same(run.adapter, wanted.adapter)
    assert [(e.kind, e.bytes) for e in run.ledger] == [(e.kind, e.bytes) for e in wanted.ledger]
    assert not same(play(FedDF(), model, SIZES).adapter, wanted.adapter)


def test_feddf_by_hand():
    """One SGD step from the mean of the adapters towards the mean of the sites' logits."""
    model, method = adapted("gpt2"), FedDF(temperature=3.0)
    run = play(method, model, SIZES, n=1, rounds=1, **SGD)
    average = play(FedLLM(), model, SIZES, n=1, rounds=1, **SGD).adapter
    trained = [run.lab.fit(model.initial, site) for site in run.sites.values()]
    with torch.no_grad():
        z = {str(n): torch.cat([one_by_one(run.lab, a, i) for i in range(7)]) for n, a in enumerate(trained)}
    teacher = mean_logits(z, dict.fromkeys(z, 1.0))
    student = {name: t.clone().requires_grad_() for name, t in average.items()}
    loss = distillation_loss(torch.cat([one_by_one(run.lab, student, i) for i in range(7)]), teacher, 3.0)
    gradients = torch.autograd.grad(loss, list(student.values()), allow_unused=True)
    for (name, t), g in zip(student.items(), gradients, strict=True):
        step = 0 if g is None else (1e-2 if "lora_" in name else 2e-2) * g
        assert float((run.adapter[name] - (t.detach() - step)).abs().max()) < 1e-12
    assert distance(run.adapter, average) > 1e-5


def unlike(method: FedDF, **settings: Any) -> tuple[Lab, dict[str, Lab], dict[str, Site]]:
    """Two sites of GPT-2 and one of BERT: the common lab, each site's own, and the sites."""
    common, other = (lab(adapted(kind, **settings), **SGD) for kind in ("gpt2", "bert"))
    common.unlike = {"site-2": other}.get
    labs = {site: common.of_site(site) for site in ("site-1", "site-2", "site-3")}
    made = {its.model: federation(method, its, SIZES)[0] for its in (common, other)}
    return common, labs, {site: made[its.model][site] for site, its in labs.items()}


def test_feddf_with_unlike_models_by_hand():
    """Each student starts from the mean over its own holders, and all learn from the mean logits of all three sites."""
    method = FedDF(temperature=3.0, models={"site-2": "bert"})
    setting, labs, sites = unlike(method)
    state, ledger = rounds(method, setting, Loopback(sites), 1)
    trained = {s: labs[s].fit(labs[s].model.initial, site) for s, site in sites.items()}
    sent = {s: sum(t.numel() * t.element_size() for t in adapter.values()) for s, adapter in trained.items()}
    assert {(e.site, e.direction): e.payload for e in ledger} == {(s, d): sent[s] for s in sent for d in ("up", "down")}
    assert len(set(sent.values())) == 2

    with torch.no_grad():
        z = {s: torch.cat([one_by_one(labs[s], a, i) for i in range(7)]) for s, a in trained.items()}
    teacher = (z["site-1"] + z["site-2"] + z["site-3"]) / 3
    one, three = (trained[s] for s in ("site-1", "site-3"))
    gpt2s = {name: (SIZES[0] * one[name] + SIZES[2] * three[name]) / (SIZES[0] + SIZES[2]) for name in one}
    for start, its, learnt in (
        (gpt2s, setting, method.adapter(setting, state)),
        (trained["site-2"], labs["site-2"], method.adapter_of(state, "site-2")),
    ):
        student = {name: t.clone().requires_grad_() for name, t in start.items()}
        loss = distillation_loss(torch.cat([one_by_one(its, student, i) for i in range(7)]), teacher, 3.0)
        gradients = torch.autograd.grad(loss, list(student.values()), allow_unused=True)
        assert learnt is not None and learnt.keys() == student.keys()
        for (name, t), g in zip(student.items(), gradients, strict=True):
            step = 0 if g is None else (1e-2 if "lora_" in name else 2e-2) * g
            assert float((learnt[name] - (t.detach() - step)).abs().max()) < 1e-12
        assert distance(learnt, start) > 1e-5
    assert method.adapter_of(state, "site-1") is None  # the common one


def test_students_without_distillation_are_fedllm_among_their_holders():
    """To the last bit; and whose holders are not in a round, stays where it was."""
    method = FedDF(models={"site-2": "bert"}, server_epochs=0)
    setting, labs, sites = unlike(method, precision="fp32")
    state, _ = rounds(method, setting, Loopback(sites), 2)
    for name, holders in (("student", ["site-1", "site-3"]), ("student 1", ["site-2"])):
        its = replace(labs[holders[0]], round=0)
        made = federation(FedLLM(), its, SIZES)[0]
        wanted = rounds(FedLLM(), its, Loopback({site: made[site] for site in holders}), 2)[0]
        assert same(state[name], wanted["adapter"])
    before = dict(state)
    setting.sites = list(sites)
    rounds(method, setting, Loopback({"site-1": sites["site-1"]}), 1, state=state)
    assert same(state["student 1"], before["student 1"]) and not same(state["student"], before["student"])


def test_one_sites_ensemble_is_itself():
    """K10: the student is its own teacher, and stays where it is."""
    model = adapted("gpt2")
    run, alone = play(FedDF(), model, (5,), n=1, **SGD), play(FedLLM(), model, (5,), n=1, **SGD)
    assert distance(run.adapter, alone.adapter) < 1e-12


# FedMKT ---------------------------------------------------------------------------------------------------------------


def test_knowledge_is_each_texts_own_cross_entropy():
    model = adapted("gpt2", "causal-lm")
    setting = lab(model)
    known = knowledge(setting, model.initial)
    for i, ids in enumerate(setting.public.input_ids):
        whole = torch.from_numpy(ids)[None]
        z = model.forward(model.initial, torch.tensor([len(ids)]), whole)
        assert abs(float(known.losses_M[i]) - float(task_loss(z, whole))) < 1e-10
    assert known.logits.shape[0] == setting.public.target_tokens()


def test_least_loss_by_hand():
    rows = {name: torch.arange(4.0).add(10 * k)[:, None].repeat(1, 2) for k, name in enumerate("abc")}
    losses = {"a": [1.0, 5.0, 2.0], "b": [3.0, 0.5, 2.0], "c": [2.0, 6.0, 9.0]}
    found = least_loss({name: Knowledge(rows[name], torch.tensor(losses[name])) for name in "cba"}, [1, 2, 1])
    assert found.logits[:, 0].tolist() == [0.0, 11.0, 12.0, 3.0]  # the last is a tie: the first by name
    assert found.losses_M.tolist() == [1.0, 0.5, 2.0]


def test_mixture_by_hand():
    """Two parties, one text of one row and one of two: softmax of e^−1 and e^−3, then of equal rewards."""
    z = {"a": torch.tensor([[2.0, 0.0]] * 3).double(), "b": torch.tensor([[0.0, 1.0]] * 3).double()}
    losses = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 2.0])}
    found = mixture({name: Knowledge(z[name], losses[name]) for name in "ba"}, [1, 2]).exp()
    a, b = z["a"][0].softmax(-1), z["b"][0].softmax(-1)
    w = math.exp(math.exp(-1)) / (math.exp(math.exp(-1)) + math.exp(math.exp(-3)))
    assert float((found - torch.stack([w * a + (1 - w) * b, (a + b) / 2, (a + b) / 2])).abs().max()) < 1e-12
    model = adapted("gpt2", "causal-lm")
    mixed, best = play(FedMKT(selection="weighted"), model, SIZES, n=1), play(FedMKT(), model, SIZES, n=1)
    assert not same(mixed.adapter, best.adapter)


def test_fedmkt_learns_only_what_others_know_better():
    """One SGD step of the student by hand: half of the texts are known better by the only site."""
    model, method = adapted("gpt2", "causal-lm"), FedMKT(temperature=2.0, distill_weight=0.3, public_weight=0.7)
    setting = lab(model, rounds=1, public=public_set("causal-lm"), **SGD)
    state, setting.round = method.setup(setting), 1
    own, counts = knowledge(setting, model.initial), setting.public_rows
    better = torch.tensor([True, False, True, False, True, False, False])
    told = own.losses_M + torch.where(better, -0.1, 0.1)
    teacher = own.logits.roll(1, 0) + 0.1
    program = method.server(setting, state, ["a"])
    assert next(program)["a"].kind == "start"
    answer = program.send({"a": Reply("logits", {"logits": teacher, "losses": told}, {"weight": 3}, round=1)})

    student = {name: t.clone().requires_grad_() for name, t in model.initial.items()}
    z = [one_by_one(setting, student, i) for i in range(7)]
    ids = torch.cat([torch.from_numpy(i[1:]) for i in setting.public.input_ids])
    rows = better.double().repeat_interleave(torch.tensor(counts))
    divergence = F.kl_div((torch.cat(z) / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="none").sum(-1)
    loss = 0.3 * 4 * (rows * divergence).mean() + 0.7 * F.cross_entropy(torch.cat(z), ids)
    gradients = torch.autograd.grad(loss, list(student.values()), allow_unused=True)
    for (name, t), g in zip(student.items(), gradients, strict=True):
        step = 0 if g is None else (1e-2 if "lora_" in name else 2e-2) * g
        assert float((state["student"][name] - (t.detach() - step)).abs().max()) < 1e-12
    said = answer["a"].tensors
    assert torch.equal(said["logits"], knowledge(setting, state["student"]).logits) and said.keys() == {
        "logits",
        "losses",
    }


def test_fedmkt_leaves_a_student_alone_that_knows_best():
    """Sites that know less teach nothing, and so do all where nothing is transferred (K11)."""
    model = adapted("gpt2", "causal-lm")
    setting = lab(model, rounds=1, **SGD)
    method, own = FedMKT(), knowledge(setting, model.initial)
    state, setting.round = method.setup(setting), 1
    program = method.server(setting, state, ["a"])
    next(program)
    worse = {"logits": own.logits.flip(0).contiguous(), "losses": own.losses_M + 1e-9}
    program.send({"a": Reply("logits", worse, {"weight": 3}, round=1)})
    assert same(state["student"], model.initial)
    run, alone = play(FedMKT(distill_weight=0.0), model, SIZES), play(Local(), model, SIZES)
    assert all(same(run.sites[s].memory["adapter"], alone.sites[s].memory["adapter"]) for s in alone.sites)
    taught = play(FedMKT(logits="topk:8:logits+fp16"), model, SIZES)
    assert not same(taught.sites["site-1"].memory["adapter"], alone.sites["site-1"].memory["adapter"])


@pytest.mark.parametrize("method", [KD(aggregation="median"), FedDF(aggregation="trimmed", trim=1)])
def test_a_rule_that_needs_more_sites_than_are_left(method: KD):
    """The round ends like any with too few sites, and leaves no trace."""
    with pytest.raises(QuorumError, match=r"round 1: kd\.aggregation (median|trimmed) needs 3 sites, and 2 are left"):
        play(method, adapted("gpt2"), (5, 3), n=1)
    assert not same(play(method, adapted("gpt2"), SIZES, n=1).adapter, adapted("gpt2").initial)


# All ------------------------------------------------------------------------------------------------------------------


def test_what_is_agreed_upon_stays():
    """K13: sites that are equal, and train on nothing more, digest what they know; the aggregate stays as it was."""
    model, method = adapted("gpt2"), KD()
    setting = lab(model, **{**SGD, "epochs": 0})
    sites, wire = federation(method, setting, SIZES)
    state, ledger = rounds(method, setting, wire, 2)
    assert all(distance(site.memory["adapter"], model.initial) < 1e-12 for site in sites.values())
    assert distance(state["student"], model.initial) < 1e-12
    assert ledger.total("payload", kind="aggregated logits") > 0


@pytest.mark.parametrize(
    ("method", "kind", "task"), [(FedDF(), "adapter", "classification"), (FedMKT(), "logits", "causal-lm")]
)
def test_liars_are_left_out(method: Framework, kind: str, task: str):
    assert "site-2 sent the weight 0" in lied(method, kind, facts(weight=0), task)


@pytest.mark.parametrize("method", [FedMD(), FedMKT(), FedMKT(logits="topk:5:logits")])
def test_guards_of_each_message(method: KD):
    task = "causal-lm" if isinstance(method, FedMKT) else "classification"
    assert "site-2 sent 'gossip'; expected" in refused(method, lambda reply: replace(reply, kind="gossip"), task)
    assert "'evil'" in refused(method, tensors(extra), task)


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (tensor("losses", lambda t: t[:-1]), "site-2 sent tensor 'losses' of shape (6,); expected (7,)"),
        (tensor("losses", lambda t: t.float()), "site-2 sent tensor 'losses' as torch.float32"),
        (tensor("losses", poked(-0.5)), "site-2 sent a cross-entropy of -0.5; it must not be below 0"),
        (without("losses"), "lacks the tensor 'losses'"),
    ],
)
def test_guards_of_what_sites_say_of_themselves(lie: Any, said: str):
    assert said in refused(FedMKT(), lie, "causal-lm")


def test_nothing_private_is_in_a_dialogue():
    """FedMKT says logits and a number for each public text, and nothing of the private ones."""
    run = play(FedMKT(), adapted("gpt2", "causal-lm", "fp32"), (4, 3), n=1)
    size = run.lab.public.target_tokens() * run.lab.model.classes * 4 + 7 * 4
    assert {(e.kind, e.payload) for e in run.ledger if e.payload} == {("logits", size), ("aggregated logits", size)}
