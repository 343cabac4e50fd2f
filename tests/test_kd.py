"""KD-FedLLM: the distillation loss, the aggregation of logits, and that nothing but logits moves."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from tiny import KINDS, LABELS, VOCAB, adapted, distance, examples, federation, lab, play, public_set, rounds, same
from torch import Tensor

from fedtrio.aggregation.logits import RULES, aggregate, mean_logits, mean_probabilities
from fedtrio.data.batches import Encoded
from fedtrio.errors import MessageError
from fedtrio.evaluate import evaluate
from fedtrio.frameworks import KD, Local
from fedtrio.frameworks.lab import Lab
from fedtrio.ledger import Ledger
from fedtrio.message import Message, Reply
from fedtrio.models.train import distillation_loss
from fedtrio.program import Site

SIZES = (5, 8, 3)


def logits(n: int = 6, c: int = 5, seed: int = 0, scale: float = 2.0) -> Tensor:
    """Random logits, fp64 [n, c]."""
    return scale * torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    z = student.clone().requires_grad_()
    distillation_loss(z, teacher, temperature).backward()
    assert z.grad is not None
    return z.grad


# The loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_gradient_of_distillation(temperature):
    """K1: ∇_z T²KL(q_T ‖ softmax(z/T))/N == T(softmax(z/T) − q_T)/N."""
    z, teacher = logits(seed=1), logits(seed=2)
    q = F.softmax(teacher / temperature, dim=-1)
    wanted = temperature * (F.softmax(z / temperature, dim=-1) - q) / len(z)
    assert float((gradient(z, teacher, temperature) - wanted).abs().max()) < 1e-12
    assert float(wanted.abs().max()) > 1e-2
    p = F.softmax(z / temperature, dim=-1)
    by_hand = sum(float((q_n * (q_n / p_n).log()).sum()) for q_n, p_n in zip(q, p, strict=True))
    assert math.isclose(float(distillation_loss(z, teacher, temperature)), temperature**2 * by_hand / len(z))


def test_hot_distillation_compares_centred_logits():
    """K2: T → ∞ gives the gradient of the squared distance of centred logits over 2NC."""
    z, teacher = logits(seed=1), logits(seed=2)
    n, c = z.shape
    wanted = ((z - z.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))) / (n * c)
    found = gradient(z, teacher, 1e4)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3
    assert float((gradient(z, teacher, 2.0) - wanted).norm() / wanted.norm()) > 1e-2


def test_divergence_and_soft_cross_entropy():
    """K3: the same gradient; KL(p ‖ p) = 0 and KL ≥ 0. K10: no gradient where the student is the teacher."""
    for temperature in (1.0, 2.0):
        z, teacher = logits(seed=3).requires_grad_(), logits(seed=4)
        q = F.softmax(teacher / temperature, dim=-1)
        soft = -(q * F.log_softmax(z / temperature, dim=-1)).sum(-1).mean() * temperature**2
        (wanted,) = torch.autograd.grad(soft, z)
        assert float((gradient(z.detach(), teacher, temperature) - wanted).abs().max()) < 1e-12
        assert abs(float(distillation_loss(teacher, teacher, temperature))) < 1e-12
        assert float(gradient(teacher, teacher, temperature).abs().max()) < 1e-12
        shifted = teacher + torch.arange(6.0, dtype=torch.float64)[:, None]
        assert abs(float(distillation_loss(shifted, teacher, temperature))) < 1e-12
    divergences = [float(distillation_loss(logits(seed=s), logits(seed=s + 50), 1.0)) for s in range(20)]
    assert min(divergences) > 0


# The aggregate ------------------------------------------------------------------------------------------------------


WEIGHTS = {"a": 5.0, "b": 11.0, "c": 8.0}


def three() -> dict[str, Tensor]:
    return {site: logits(seed=seed) for seed, site in enumerate(WEIGHTS)}


def test_mean_logits_by_hand():
    z = {"a": torch.tensor([[0.0, 4.0]]), "b": torch.tensor([[8.0, 0.0]])}
    assert torch.equal(mean_logits(z, {"a": 3.0, "b": 1.0}), torch.tensor([[2.0, 3.0]], dtype=torch.float64))


def test_mean_logits_is_the_geometric_mean():
    """K6: softmax(Σ p_k z_k) ∝ Π softmax(z_k)^p_k, whatever constant a site adds to its rows."""
    z, total = three(), sum(WEIGHTS.values())
    product = torch.ones(6, 5, dtype=torch.float64)
    for site, weight in WEIGHTS.items():
        product *= F.softmax(z[site], dim=-1) ** (weight / total)
    found = F.softmax(mean_logits(z, WEIGHTS), dim=-1)
    assert float((found - product / product.sum(-1, keepdim=True)).abs().max()) < 1e-12

    shifted = {site: t + logits(6, 1, seed=9) * (k + 1) for k, (site, t) in enumerate(z.items())}
    assert float((F.softmax(mean_logits(shifted, WEIGHTS), dim=-1) - found).abs().max()) < 1e-12
    assert float((mean_logits(shifted, WEIGHTS) - mean_logits(z, WEIGHTS)).abs().max()) > 0.1


def test_mean_probabilities_is_the_arithmetic_mean():
    z = three()
    by_hand = (5 * F.softmax(z["a"], -1) + 11 * F.softmax(z["b"], -1) + 8 * F.softmax(z["c"], -1)) / 24
    found = mean_probabilities(z, WEIGHTS)
    assert float((found - by_hand.log()).abs().max()) < 1e-12
    assert float((F.softmax(found, dim=-1) - by_hand).abs().max()) < 1e-12
    assert float((by_hand - F.softmax(mean_logits(z, WEIGHTS), dim=-1)).abs().max()) > 1e-2  # another mean


def test_identical_clients_agree():
    """K7."""
    z = logits()
    same_everywhere = {site: z for site in WEIGHTS}
    assert float((mean_logits(same_everywhere, WEIGHTS) - z).abs().max()) < 1e-12
    found = mean_probabilities(same_everywhere, WEIGHTS)
    assert float((found.exp() - F.softmax(z, dim=-1)).abs().max()) < 1e-12


@pytest.mark.filterwarnings("ignore:entropy reduction")
@pytest.mark.parametrize("rule", list(RULES))
def test_aggregate_keeps_dtype_and_order_of_sites_does_not_matter(rule):
    z = {site: t.float() for site, t in three().items()}
    found = aggregate(rule, z, WEIGHTS)
    assert found.dtype == torch.float32
    assert torch.equal(found, aggregate(rule, {s: z[s] for s in "cab"}, {s: WEIGHTS[s] for s in "bca"}))
    sure = {site: torch.tensor([[2e4, -2e4, 0.0]]) for site in WEIGHTS}  # probabilities of exactly zero
    teacher = aggregate(rule, sure, WEIGHTS)
    assert bool(torch.isfinite(teacher).all())
    assert bool(torch.isfinite(gradient(torch.zeros(1, 3), teacher, 2.0)).all())


# Rounds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "switched_off"), [*((kind, "weight") for kind in KINDS), ("gpt2", "no public set"), ("gpt2", "epochs")]
)
def test_without_distillation_sites_are_alone(kind, switched_off):
    """K11: M = 0, λ = 0 or no passes: to the last bit the sites' adapters are those of the Local yardstick."""
    model = adapted(kind, precision="fp32")
    method = {"no public set": KD(), "weight": KD(distill_weight=0.0), "epochs": KD(distill_epochs=0)}[switched_off]
    more = {"public": Encoded([], None)} if switched_off == "no public set" else {}
    alone = play(Local(), model, SIZES)
    run = play(method, model, SIZES, **more)
    for name in run.sites:
        assert same(run.sites[name].memory["adapter"], alone.sites[name].memory["adapter"])
    if switched_off == "no public set":
        assert same(run.adapter, model.initial)  # nothing to learn from
        assert {e.kind for e in run.ledger} == {"start", "done"}
    taught = play(KD(), model, SIZES)
    assert not same(taught.sites["site-1"].memory["adapter"], alone.sites["site-1"].memory["adapter"])


def test_weight_scales_what_sites_learn_from_the_aggregate():
    """With SGD, one full batch and λ, the move away from private training is λ times as long."""
    model = adapted("gpt2")
    sgd = {"optimizer": "sgd", "batch_size": 64, "epochs": 1, "weight_decay": 0.0, "n": 1}
    alone = play(Local(), model, SIZES, **sgd).sites["site-1"].memory["adapter"]
    moves = []
    for weight in (1.0, 0.25):
        adapter = play(KD(distill_weight=weight), model, SIZES, **sgd).sites["site-1"].memory["adapter"]
        moves.append({name: (adapter[name] - alone[name]) / weight for name in alone})
    assert distance(*moves) < 1e-12
    assert max(float(move.abs().max()) for move in moves[0].values()) > 1e-5


def test_student_learns_from_the_aggregate_by_hand(monkeypatch):
    """One SGD step over the whole public set, in numbers computed here from the frames alone."""
    model = adapted("gpt2")
    method = KD(temperature=3.0, aggregation="probabilities")
    sent: dict[str, Tensor] = {}
    setting = lab(model, rounds=1, optimizer="sgd", batch_size=64, weight_decay=0.0)
    sites, wire = federation(method, setting, SIZES)
    state, setting.round = method.setup(setting), 1
    program = method.server(setting, state, wire.sites)
    outbox = next(program)
    assert {message.kind for message in outbox.values()} == {"start"}
    inbox = {}
    for site in outbox:
        sent[site] = logits(7, LABELS, seed=len(sent))
        inbox[site] = Reply("logits", {"logits": sent[site]}, {"weight": len(sites[site].data)}, round=1)
    answer = program.send(inbox)
    shares = {site: len(sites[site].data) / 16 for site in sites}
    teacher = sum(shares[site] * F.softmax(sent[site], dim=-1) for site in sites).log()  # type: ignore[union-attr]
    assert all(float((m.tensors["logits"] - teacher).abs().max()) < 1e-12 for m in answer.values())

    student = {name: t.clone().requires_grad_() for name, t in model.initial.items()}
    z = torch.cat([one_by_one(setting, student, i) for i in range(7)])
    loss = distillation_loss(z, teacher, 3.0)
    gradients = torch.autograd.grad(loss, list(student.values()), allow_unused=True)
    for (name, t), g in zip(student.items(), gradients, strict=True):
        rate = 1e-2 if "lora_" in name else 2e-2
        wanted = t.detach() if g is None else t.detach() - rate * g
        assert float((state["student"][name] - wanted).abs().max()) < 1e-12
    assert distance(state["student"], model.initial) > 1e-5


def one_by_one(setting: Lab, adapter: dict[str, Tensor], i: int) -> Tensor:
    """The logits of public text i alone, without any padding."""
    ids = torch.from_numpy(setting.public.input_ids[i])[None]
    z = setting.model.forward(adapter, torch.tensor([ids.shape[1]]), ids)
    return z if z.dim() == 2 else z[0, :-1]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_do_not_depend_on_the_batch(kind):
    """K12: alone, in small and in large batches; and in the order of the public set, whatever its lengths."""
    model = adapted(kind, precision="fp32")
    public = public_set(n=11)
    lengths = [len(ids) for ids in public.input_ids]
    assert lengths != sorted(lengths)
    alone = lab(model, public=public)
    with torch.no_grad():
        wanted = torch.cat([one_by_one(alone, model.initial, i) for i in range(11)])
    assert wanted.shape == (11, LABELS) and float((wanted[0] - wanted[1]).abs().max()) > 1e-2
    for batch_size in (1, 3, 64):
        found = lab(model, public=public, batch_size=batch_size).predict(model.initial)
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-6
    turned = lab(model, public=public.take(range(10, -1, -1)), batch_size=4).predict(model.initial)
    assert float((turned.flip(0) - wanted).abs().max() / wanted.abs().max()) < 1e-6


def test_rows_of_a_language_model_are_its_target_tokens():
    model = adapted("gpt2", "causal-lm", precision="fp32")
    public = examples("causal-lm", n=9, seed=4)  # some lead with a prompt
    assert 0 < public.target_tokens() < sum(len(ids) - 1 for ids in public.input_ids)
    setting = lab(model, public=public, batch_size=4)
    found = setting.predict(model.initial)
    assert found.shape == (public.target_tokens(), VOCAB)
    assert public.targets is not None
    wanted = []
    with torch.no_grad():
        for i, targets in enumerate(public.targets):
            wanted.append(one_by_one(setting, model.initial, i)[torch.from_numpy(targets[1:] != -100)])
    assert float((found - torch.cat(wanted)).abs().max()) < 1e-5

    run = play(KD(), model, (4, 3), n=1, public=public)
    assert run.ledger.total("payload", kind="logits") == 2 * public.target_tokens() * VOCAB * 4
    self_taught = setting.distil(model.initial, found, 1, "server", 1, 2.0, learning_rate=0.1)
    other = setting.distil(model.initial, found.roll(1, 0), 1, "server", 1, 2.0, learning_rate=0.1)
    assert distance(other, model.initial) > 0.05  # AdamW's first steps are as long as the rate, whatever the gradient
    sgd = lab(model, public=public, batch_size=4, optimizer="sgd", weight_decay=0.0)
    self_taught = sgd.distil(model.initial, found, 1, "server", 2, 2.0, learning_rate=0.1)
    other = sgd.distil(model.initial, found.roll(1, 0), 1, "server", 2, 2.0, learning_rate=0.1)
    assert distance(self_taught, model.initial) < 1e-5 < 1e-3 < distance(other, model.initial)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_only_logits_move(task, tmp_path):
    """No frame has the name, the shape or the size of a trainable tensor, and the payload is M × C numbers each way."""
    model = adapted("gpt2", task, precision="fp32")
    run = play(KD(), model, SIZES, n=2, frames=tmp_path)
    assert {(e.direction, e.kind) for e in run.ledger} == {
        ("down", "start"),
        ("up", "logits"),
        ("down", "aggregated logits"),
        ("up", "done"),
    }
    rows, columns = (7, LABELS) if task == "classification" else (run.lab.public.target_tokens(), VOCAB)
    shapes = {tuple(t.shape) for t in model.initial.values()}
    assert (rows, columns) not in shapes
    frames = sorted(tmp_path.iterdir())
    assert len(frames) == run.ledger.total("messages") == 2 * len(SIZES) * 4
    for frame in frames:
        tensors = safetensors.torch.load_file(str(frame))
        assert all(name == "logits" and t.shape == (rows, columns) for name, t in tensors.items())
        head = frame.read_bytes()
        assert not [name for name in model.initial if name.encode() in head] and b"lora" not in head
        facts = json.loads(read_metadata(frame)["fedtrio"])["facts"]
        assert set(facts) <= {"weight"}
    assert run.ledger.total("payload", kind="logits") == 2 * len(SIZES) * rows * columns * 4
    assert run.ledger.total("payload", kind="aggregated logits") == 2 * len(SIZES) * rows * columns * 4
    assert run.ledger.total("payload", kind="start") == run.ledger.total("payload", kind="done") == 0
    assert not same(run.adapter, model.initial)


def read_metadata(path) -> dict[str, str]:
    with safetensors.safe_open(str(path), framework="pt") as frame:
        return frame.metadata()


def test_logits_of_another_public_set_are_refused():
    model = adapted("gpt2")
    method, setting = KD(), lab(model)
    state, setting.round = method.setup(setting), 1
    program = method.server(setting, state, ["a", "b"])
    next(program)
    replies = {
        site: Reply("logits", {"logits": logits(rows, LABELS)}, {"weight": 3}, round=1)
        for site, rows in (("a", 7), ("b", 6))
    }
    with pytest.raises(MessageError, match="b sent logits"):
        program.send(replies)
    assert same(state["student"], model.initial)


def test_all_logits_of_another_public_set_are_refused():
    """All sites agree with each other but not with the server."""
    model = adapted("gpt2")
    for wrong in (logits(6, LABELS), logits(8, LABELS), logits(7, LABELS + 1), logits(7, LABELS)[:, None]):
        method, setting = KD(), lab(model)
        state, setting.round = method.setup(setting), 1
        program = method.server(setting, state, ["a", "b"])
        next(program)
        with pytest.raises(MessageError):
            program.send({s: Reply("logits", {"logits": wrong}, {"weight": 3}, round=1) for s in ("a", "b")})
        site = Site("a", federation(method, setting, (3,))[0]["site-1"].data, method, setting)
        site.round = 1
        dialogue = method.client(setting, site, Reply("start", round=1))
        assert not isinstance(dialogue, Message)
        assert next(dialogue).kind == "logits"
        with pytest.raises(MessageError):
            dialogue.send(Reply("aggregated logits", {"logits": wrong}, round=1))


def separable(n: int, seed: int) -> Encoded:
    """Texts whose class is the region that their tokens come from: learnable by any model."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, LABELS, n)
    return Encoded([2 + 4 * label + rng.integers(0, 4, rng.integers(3, 7)) for label in targets], targets)


@pytest.mark.parametrize("aggregation", ["logits", "probabilities"])
def test_student_improves_over_rounds(aggregation, monkeypatch):
    """The student sees no label and no private text, and is right in the end because the sites are."""
    monkeypatch.setattr("tiny.examples", lambda task, n, seed: separable(n, seed))
    model = adapted("llama", precision="fp32")
    public = Encoded(separable(60, 77).input_ids, None)
    method = KD(aggregation=aggregation, server_epochs=3)
    setting = lab(model, rounds=3, public=public, batch_size=8, learning_rate=5e-3, weight_decay=0.0)
    sites, wire = federation(method, setting, (30, 30, 30))
    test, state, ledger = separable(100, 78), method.setup(setting), Ledger()
    scores = [evaluate(model, state["student"], test, setting.pad_id)]
    for _ in range(3):
        state, ledger = rounds(method, setting, wire, 1, ledger, state)
        scores.append(evaluate(model, state["student"], test, setting.pad_id))
    assert scores[0].accuracy < 0.4 and scores[-1].accuracy > 0.7, scores
    assert scores[-1].loss < scores[1].loss < scores[0].loss
    assert not same(state["student"], sites["site-1"].memory["adapter"])
