"""Guards: what a site may not send is refused by name, the round goes on with the others, and honest runs never notice.

In each case one site of three says the truth but for one answer. The state that the server ends in must be the one of
a federation in which that site never was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import DECODERS, KINDS, LABELS, WIDTH, adapted, federation, lab, same
from torch import Tensor

from fedtrio.errors import MessageError, QuorumError
from fedtrio.frameworks import KD, FedLLM, Split
from fedtrio.frameworks.guards import Guards
from fedtrio.frameworks.lab import Framework, Lab, State
from fedtrio.frameworks.split import NORMS
from fedtrio.ledger import Ledger
from fedtrio.message import PROTOCOL, Reply, decode, encode
from fedtrio.program import Site, drive
from fedtrio.wires.loopback import Loopback

LIAR = "site-2"
Lie = Callable[[Reply], Reply | bytes]


def forged(reply: Reply) -> bytes:
    """A frame with whatever it says, where `encode` would refuse."""
    head = {"v": PROTOCOL, "round": reply.round, "kind": reply.kind, "done": reply.done, "facts": dict(reply.facts)}
    return safetensors.torch.save(dict(reply.tensors), metadata={"fedtrio": json.dumps(head)})


class Lying(Loopback):
    """A wire on which one site's first answer of a kind, after `skip` others, is another than it gave."""

    def __init__(self, sites: Mapping[str, Site], kind: str, lie: Lie, skip: int = 0) -> None:
        super().__init__(sites)
        self._kind, self._lie, self._skip = kind, lie, skip
        self.told = 0
        self.refused: dict[str, str] = {}

    def exchange(self, frames: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
        for site, answer in super().exchange(frames):
            if site == LIAR and (reply := decode(answer)).kind == self._kind and not self.told:
                self._skip -= 1
                if self._skip < 0:
                    lie = self._lie(reply)
                    answer = lie if isinstance(lie, bytes) else forged(lie)
                    self.told += 1
            yield site, answer

    def refuse(self, site: str, reason: str) -> None:
        self.refused[site] = reason


def one_round(
    method: Framework, setting: Lab, wire: Loopback, cohort: Iterable[str], state: State, min_sites: int = 1
) -> dict[str, str]:
    """Drive a round with guards; what was refused, by site."""
    refusals: dict[str, str] = {}

    def refuse(site: str, error: MessageError) -> None:
        assert site not in refusals, "a site is refused once in a round"
        refusals[site] = str(error)

    setting.round += 1
    wire.start_round("run", setting.round, None)
    program = method.server(setting, state, sorted(cohort))
    check = partial(method.check, setting)
    drive(program, wire, setting.round, Ledger(), check, refuse, min_sites, sites=len(wire.sites))
    return refusals


def lied(method: Framework, kind: str, lie: Lie, task: str = "classification", skip: int = 0, **train: Any) -> str:
    """Why the lie was refused; the round must end as if the liar had never been, and it must be back in the next."""
    setting = lab(adapted("gpt2", task), **train)
    sites, _ = federation(method, setting)
    wire = Lying(sites, kind, lie, skip)
    state = method.setup(setting)
    refusals = one_round(method, setting, wire, sites, state)
    assert wire.told == 1, "the lie was never told"
    assert refusals.keys() == {LIAR}, "the lie was believed"
    assert wire.refused == refusals
    if getattr(method, "variant", "sflv1") == "sflv1":
        honest = lab(adapted("gpt2", task), **train)
        others = {name: site for name, site in federation(method, honest)[0].items() if name != LIAR}
        wanted = method.setup(honest)
        assert not one_round(method, honest, Loopback(others), others, wanted)
        assert state.keys() == wanted.keys()
        for group in wanted:
            assert same(state[group], wanted[group]), group
    assert not one_round(method, setting, wire, sites, state)  # where all sites take part
    return refusals[LIAR]


# The ways to lie ------------------------------------------------------------------------------------------------------


def tensors(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Lie:
    return lambda reply: replace(reply, tensors=change(dict(reply.tensors)))


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Lie:
    return tensors(lambda known: {**known, name: change(known[name]).contiguous()})


def first(change: Callable[[Tensor], Tensor]) -> Lie:
    return tensors(lambda known: {n: change(t).contiguous() if n == min(known) else t for n, t in known.items()})


def facts(**changed: Any) -> Lie:
    return lambda reply: replace(reply, facts={k: v for k, v in {**reply.facts, **changed}.items() if v is not None})


def without(name: str | None = None) -> Lie:
    return tensors(lambda known: {n: t for n, t in known.items() if n != (name or min(known))})


def extra(known: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**known, "evil": torch.ones(2)}


def poked(value: float) -> Callable[[Tensor], Tensor]:
    def poke(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return poke


ANY: dict[str, tuple[Lie, str]] = {  # of any message of any framework
    "NaN": (first(poked(float("nan"))), r"tensor '.+' holds NaN or infinity"),
    "infinity": (first(poked(float("-inf"))), r"tensor '.+' holds NaN or infinity"),
    "another kind": (lambda reply: replace(reply, kind="gossip"), r"site-2 sent 'gossip'; expected '[a-z ]+'"),
    "nothing": (lambda reply: b"", "a frame of 0 bytes"),
    "rubbish": (lambda reply: b"\x80\x04\x95" * 50, "a frame of 150 bytes"),
    "the half": (lambda reply: encode(reply, reply.round, reply.done)[:-9], "data_offsets"),
    "another round": (lambda reply: replace(reply, round=7), "site-2 answered for round 7 in round 1"),
    "a newer protocol": (
        lambda reply: forged(reply).replace(b'\\"v\\": 1', b'\\"v\\": 2'), "protocol 2; this side speaks 1"
    ),
    "a tensor too many": (tensors(extra), "site-2 sent an unknown tensor 'evil'"),
    "a tensor too few": (without(), r"(site-2 lacks tensor|lacks the tensor) '.+'"),
    "another shape": (first(lambda t: t[None]), r"site-2 sent .*'?\w+'? .*\(1, .+expected|wants"),
}  # fmt: skip
WEIGHTS: dict[str, tuple[Lie, str]] = {
    "zero": (facts(weight=0), "site-2 sent the weight 0; it must lie above 0, up to 1e"),
    "negative": (facts(weight=-3), "site-2 sent the weight -3"),
    "huge": (facts(weight=10**12), "site-2 sent the weight 1000000000000"),
    "a text": (facts(weight="many"), "site-2 sent the weight 'many'"),
    "NaN": (facts(weight=float("nan")), "NaN is no number"),
    "infinite": (facts(weight=float("inf")), "Infinity is no number"),
    "beyond a float": (facts(weight=10**400), "the fact 'weight' is"),
    "none": (facts(weight=None), "lacks the fact 'weight'"),
}
MESSAGES: dict[str, tuple[Framework, str]] = {
    "fedllm": (FedLLM(), "adapter"),
    "kd": (KD(), "logits"),
    "split": (Split(cut=2, labels="server"), "activations and labels"),
    "split, adapter": (Split(cut=2, labels="server"), "adapter"),
    "u-shape": (Split(cut=2, labels="client"), "activations"),
    "u-shape, gradients": (Split(cut=2, labels="client"), "activation gradients"),
}


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize("lie", ANY)
def test_what_no_message_may_say(name: str, lie: str) -> None:
    method, kind = MESSAGES[name]
    said = lied(method, kind, ANY[lie][0])
    assert re.search(ANY[lie][1], said), said


@pytest.mark.parametrize("name", ["fedllm", "kd", "split, adapter"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_weights(name: str, weight: str) -> None:
    method, kind = MESSAGES[name]
    assert WEIGHTS[weight][1] in lied(method, kind, WEIGHTS[weight][0])


@pytest.mark.parametrize("name", ["fedllm", "split, adapter"])
@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (first(lambda t: t.float()), "as torch.float32; expected torch.float64"),
        (first(lambda t: t.long()), "as torch.int64; expected torch.float64"),
        (first(lambda t: t.bool()), "as torch.bool; expected torch.float64"),
        (first(lambda t: t.T), r"of shape \(\d+, \d+\); expected \(\d+, \d+\)"),
        (
            tensors(lambda known: {n.replace("lora_A", "lora_C"): t for n, t in known.items()}),
            "site-2 lacks tensor '.+lora_A",
        ),
        (tensors(lambda known: {}), "site-2 lacks tensor"),
        (
            tensors(lambda known: {n: 1e6 * t for n, t in known.items()}),
            r"norm .+e\+\d+ where .+ guards.max_growth allows 100",
        ),
        (first(poked(1e30)), r"norm 1e\+30 where"),
        (first(poked(1e200)), r"norm (1e\+200|inf) where"),
    ],
)  # fmt: skip
def test_adapters(name: str, lie: Lie, said: str) -> None:
    method, kind = MESSAGES[name]
    text = lied(method, kind, lie)
    assert text.startswith("site-2 ") and re.search(said, text), text


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (
            tensor("logits", lambda t: t[:-1]),
            rf"site-2 sent logits \(6, {LABELS}\); this public set wants \(7, {LABELS}\)",
        ),
        (tensor("logits", lambda t: torch.cat([t, t])), rf"site-2 sent logits \(14, {LABELS}\)"),
        (tensor("logits", lambda t: t[:, :-1]), rf"site-2 sent logits \(7, {LABELS - 1}\)"),
        (tensor("logits", lambda t: t.T), rf"site-2 sent logits \({LABELS}, 7\)"),
        (tensor("logits", lambda t: t.flatten()), rf"site-2 sent logits \({7 * LABELS},\)"),
        (tensor("logits", poked(-2e6)), r"site-2 sent tensor 'logits' with values beyond guards.max_value 1e\+06"),
        (tensor("logits", lambda t: t.long()), "site-2 sent tensor 'logits' as torch.int64; expected torch.float64"),
        (tensor("logits", lambda t: t > 0), "site-2 sent tensor 'logits' as torch.bool; expected torch.float64"),
        (lambda reply: replace(reply, kind="done", tensors={}, done=True), "site-2 sent 'done'; expected 'logits'"),
        (lambda reply: replace(reply, done=True), "site-2 sent 'logits'; expected"),
    ],
)  # fmt: skip
def test_logits(lie: Lie, said: str) -> None:
    text = lied(KD(), "logits", lie)
    assert re.search(said, text), text


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (
            tensor("h", lambda t: t[:-1]),
            rf"site-2 sent tensor 'h' of shape \(\d+, {WIDTH}\); expected \(\d+, {WIDTH}\)",
        ),
        (tensor("h", lambda t: t[:, :-1]), rf"of shape \(\d+, {WIDTH - 1}\); expected \(\d+, {WIDTH}\)"),
        (tensor("h", lambda t: t.float()), "site-2 sent tensor 'h' as torch.float32; expected torch.float64"),
        (tensor("h", poked(1e7)), r"site-2 sent tensor 'h' with values beyond guards.max_value 1e\+06"),
        (facts(lengths="1 1 1"), r"site-2 sent tensor 'h' of shape .+; expected \(3, "),
        (facts(lengths="3 -1"), "no whole numbers above 0: '3 -1'"),
        (facts(lengths="3 0"), "lengths of a batch that are no whole numbers above 0"),
        (facts(lengths="three"), "lengths of a batch that are no whole numbers above 0"),
        (facts(lengths=""), "lengths of a batch that are no whole numbers above 0"),
        (facts(lengths=1.5), "lengths of a batch that are no whole numbers above 0"),
        (facts(lengths=None), "lacks the fact 'lengths'"),
        (facts(lengths="9" * 30), "site-2"),
        (facts(lengths="9" * 5000), "lengths of a batch that are no whole numbers above 0"),
        (facts(lengths="1 " * 400), "site-2 sent a batch of 400 texts of up to 1 tokens; train allows 4 of"),
        (facts(lengths="65"), "site-2 sent a batch of 1 texts of up to 65 tokens; train allows 4 of 64"),
        (facts(step="first"), "site-2 sent step 'first'; it must be a whole number from 0"),
        (facts(step=-1), "site-2 sent step -1; it must be a whole number from 0"),
        (facts(step=0.5), "site-2 sent step 0.5"),
        (facts(steps="all"), "site-2 sent steps 'all'"),
        (facts(step=None), "lacks the fact 'step'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("labels", ["server", "client"])
def test_activations(task: str, labels: Any, lie: Lie, said: str) -> None:
    kind = "activations and labels" if labels == "server" else "activations"
    text = lied(Split(cut=2, labels=labels), kind, lie, task)
    assert re.search(said, text), text


@pytest.mark.parametrize(
    ("task", "lie", "said"),
    [
        ("classification", tensor("labels", poked(LABELS)), "site-2 sent labels"),
        ("classification", tensor("labels", poked(-1)), "site-2 sent labels"),
        ("classification", tensor("labels", poked(-100)), "site-2 sent labels"),
        ("causal-lm", tensor("labels", poked(97)), "site-2 sent labels"),
        ("causal-lm", tensor("labels", poked(-5)), "site-2 sent labels"),
        ("causal-lm", tensor("labels", poked(-101)), "site-2 sent labels"),
        ("classification", tensor("labels", lambda t: t[:-1]), r"'labels' of shape \(\d,\); expected \(\d,\)"),
        ("causal-lm", tensor("labels", lambda t: t[:-1]), r"'labels' of shape \(\d+,\); expected \(\d+,\)"),
        ("classification", tensor("labels", lambda t: t.long()), "'labels' as torch.int64; expected torch.int32"),
        ("classification", tensor("labels", lambda t: t.double()), "'labels' as torch.float64; expected torch.int32"),
        ("classification", without("labels"), "lacks tensor 'labels'"),
    ],
)
def test_labels(task: str, lie: Lie, said: str) -> None:
    text = lied(Split(cut=2, labels="server"), "activations and labels", lie, task)
    assert re.search(said, text), text


@pytest.mark.parametrize(
    ("kind", "lie", "said"),
    [
        ("activation gradients", tensor("dh", lambda t: t[:-1]), r"'dh' of shape \(\d+, 32\); expected \(\d+, 32\)"),
        ("activation gradients", tensor("dh", lambda t: t.float()), "'dh' as torch.float32"),
        ("activation gradients", tensor("dh", poked(-1e9)), "'dh' with values beyond"),
        ("activation gradients", facts(step="x"), "site-2 sent step 'x'"),
        ("activation gradients", facts(step=9), "site-2 sent step 9"),
        ("activation gradients", lambda reply: replace(reply, kind="activations"), "expected 'activation gradients'"),
        ("activations", lambda reply: replace(reply, kind="activation gradients"), "expected 'activations'"),
        ("activations", lambda reply: replace(reply, done=True), "site-2 sent 'activations'; expected 'adapter'"),
    ],
)
def test_gradients(kind: str, lie: Lie, said: str) -> None:
    """Also of a step that is not open: nothing was sent that it could be the gradient of."""
    text = lied(Split(cut=2, labels="client"), kind, lie, skip=1)
    assert re.search(said, text), text


def minus(tensor: Tensor) -> Tensor:
    return -tensor - 1.0


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("variant", ["sflv1", "sflv2", "sequential"])
@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (without(NORMS), NORMS),
        (tensor(NORMS, minus), NORMS),
        (tensor(NORMS, lambda t: t[None]), r"'squared norms' of shape \(1, \d+\)"),
        (tensor(NORMS, lambda t: t.float()), "'squared norms' as torch.float32; expected torch.float64"),
        (tensor(NORMS, poked(float("nan"))), "'squared norms' holds NaN"),
    ],
)
def test_norms(labels: Any, variant: Any, lie: Lie, said: str) -> None:
    """Where gradients are clipped by their common norm, each side must say its own."""
    kind = "activations and labels" if labels == "server" else "activations"
    method = Split(cut=2, labels=labels, variant=variant)
    text = lied(method, kind, lie, skip=1, max_grad_norm=0.5)
    assert re.search(said, text), text


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (facts(targets=9), "site-2 sent 9 targets of a batch with at most 4"),
        (facts(targets=-1), "site-2 sent targets -1; it must be a whole number from 0"),
        (facts(targets=None), "lacks the fact 'targets'"),
    ],
)
def test_targets_of_a_batch(lie: Lie, said: str) -> None:
    """Where one step is taken for all, they say by what a site counts."""
    assert said in lied(Split(labels="client", variant="concatenated"), "activations", lie)


TEXTS = "site-2 sent texts .*; expected 4 below 8"


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (facts(texts="1 2 3"), TEXTS), (facts(texts="1 2 3 3"), TEXTS), (facts(texts="1 2 3 8"), TEXTS),
        (facts(texts="1 2 3 -4"), TEXTS), (facts(texts="1 2 3 x"), TEXTS), (facts(texts=7), TEXTS),
        (facts(texts="1 2 3 " + "9" * 5000), TEXTS), (facts(texts="1 2 3 ٤"), TEXTS),
        (facts(texts=None), "lacks the fact 'texts'"), (facts(fresh=None), "lacks the fact 'fresh'"),
        (facts(fresh="111"), "site-2 sent fresh '111'; expected a 0 or 1 for each of 4 texts"),
        (facts(fresh="11x1"), "site-2 sent fresh '11x1'"), (facts(fresh=1111.0), "site-2 sent fresh '1111.0'"),
        (facts(fresh="0000"), "site-2 sent an unknown tensor 'h'"),
        (facts(fresh="0111"), r"site-2 sent tensor 'h' of shape \(\d+, 32\); expected \(\d+, 32\)"),
        (without("h"), "site-2 lacks tensor 'h'"),
    ],
)  # fmt: skip
def test_texts_that_have_not_moved(lie: Lie, said: str) -> None:
    """Which texts a batch holds, and which of them travel."""
    method = Split(labels="server", cache="fixed", cache_threshold=2)
    text = lied(method, "activations and labels", lie, epochs=1)
    assert re.search(said, text), text


@pytest.mark.parametrize("loss", ["low", -0.5])
def test_losses(loss: Any) -> None:
    """By which an adaptive threshold moves."""
    method = Split(labels="client", cache="adaptive")
    assert f"site-2 sent the loss {loss!r}" in lied(method, "adapter", facts(loss=loss))


def test_auxiliary_heads() -> None:
    method = Split(labels="server", local_loss=True)
    assert "site-2 lacks tensor 'auxiliary.weight'" in lied(method, "adapter", without("auxiliary.weight"))
    assert "guards.max_growth" in lied(method, "adapter", tensor("auxiliary.weight", poked(1e9)))


def test_each_site_is_held_to_its_own_cut() -> None:
    """What is right for one site is not for another."""
    method = Split(cut={LIAR: 1, "others": 2}, labels="server")
    whole = adapted("gpt2").part(adapted("gpt2").initial, (-1, 2))
    assert "site-2 sent an unknown tensor" in lied(method, "adapter", tensors(lambda known: whole))


@pytest.mark.parametrize("variant", ["sflv2", "sequential", "concatenated"])
@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("skip", [0, 1])
def test_a_shared_half_goes_on_without_the_liar(variant: Any, labels: Any, skip: int) -> None:
    kind = "activations and labels" if labels == "server" else "activations"
    text = lied(Split(cut=2, labels=labels, variant=variant), kind, tensor("h", poked(1e9)), skip=skip)
    assert "guards.max_value" in text


# The bounds are settings ----------------------------------------------------------------------------------------------


def test_bounds_can_be_moved() -> None:
    reply = Reply("adapter", {"x": torch.tensor([150.0])}, {"weight": 20}, round=1)
    sent = {"x": torch.tensor([1.0])}
    with pytest.raises(MessageError, match=r"norm 150 where 1 was sent; guards.max_growth allows 100 times"):
        Guards().like("s", reply.tensors, sent)
    Guards(max_growth=150).like("s", reply.tensors, sent)
    Guards(max_value=150).values("s", "x", reply.tensors["x"])
    with pytest.raises(MessageError, match=r"guards\.max_value 149"):
        Guards(max_value=149).values("s", "x", reply.tensors["x"])
    Guards(max_weight=20).weight("s", reply)
    with pytest.raises(MessageError, match="above 0, up to 19"):
        Guards(max_weight=19).weight("s", reply)


def test_small_tensors_may_grow_from_nothing() -> None:
    """LoRA's B starts at zero."""
    Guards().like("s", {"b": torch.full((4,), 40.0)}, {"b": torch.zeros(4)})


# Too few --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedllm", "kd", "split", "u-shape"])
def test_too_few_are_left(name: str) -> None:
    method, kind = MESSAGES[name]
    for min_sites, enough in ((2, True), (3, False)):
        setting = lab(adapted("gpt2"))
        sites, _ = federation(method, setting)
        state = method.setup(setting)
        before = {group: dict(known) for group, known in state.items()}
        wire = Lying(sites, kind, first(poked(1e30)))
        if enough:
            assert one_round(method, setting, wire, sites, state, min_sites).keys() == {LIAR}
        else:
            with pytest.raises(QuorumError, match="round 1: 2 of at least 3 sites are left; site-2 sent "):
                one_round(method, setting, wire, sites, state, min_sites)
            assert all(same(state[group], before[group]) for group in before)  # a round that fails leaves no trace


def test_all_are_liars() -> None:
    method, setting = FedLLM(), lab(adapted("gpt2"))
    sites, _ = federation(method, setting, (5,))
    sites = {LIAR: sites["site-1"]}
    with pytest.raises(QuorumError, match="round 1: 0 of at least 1 sites are left; site-2 sent the weight 0"):
        one_round(method, setting, Lying(sites, "adapter", facts(weight=0)), sites, method.setup(setting))


def test_without_guards_a_lie_ends_the_run() -> None:
    """`drive` without `refuse` raises."""
    method, setting = FedLLM(), lab(adapted("gpt2"))
    sites, _ = federation(method, setting)
    setting.round = 1
    with pytest.raises(MessageError, match="holds NaN"):
        wire = Lying(sites, "adapter", first(poked(float("nan"))))
        drive(method.server(setting, method.setup(setting), wire.sites), wire, 1, Ledger())


# Honest runs ----------------------------------------------------------------------------------------------------------


HONEST: list[tuple[Framework, str, dict[str, Any]]] = [
    (FedLLM(), "any", {}), (FedLLM(), "any", {"max_grad_norm": 0.1}), (FedLLM(), "any", {"epochs": 0}),
    (KD(), "any", {}), (KD(aggregation="probabilities"), "any", {}), (KD(distill_weight=0.0), "any", {}),
]  # fmt: skip
HONEST += [
    (Split(cut=cut, variant=variant, labels=labels), "any", train)
    for cut in (0, 2)
    for variant in ("sflv1", "sflv2", "sequential")
    for labels in ("server", "client")
    for train in ({}, {"max_grad_norm": 0.1}, {"epochs": 0})
]


HONEST += [
    (Split(cut=cut, variant=variant, labels=labels), "any", train)
    for cut, variant in (({"site-1": 0, "others": 3}, "sflv1"), ({"site-1": 1, "others": 4}, "concatenated"))
    for labels in ("server", "client")
    for train in ({}, {"max_grad_norm": 0.1})
]
HONEST += [(Split(cut=1, last_blocks=2, variant="concatenated"), "any", {})]
HONEST += [
    (Split(cache="adaptive", cache_threshold=theta, labels=labels, variant=variant), "any", {"epochs": 2})
    for theta, labels, variant in ((-1, "server", "sflv1"), (0.9, "client", "sflv2"), (2, "client", "concatenated"))
]
HONEST += [
    (Split(local_loss=True, labels="server", send_every=2, clip=1.0, noise=0.1, **rest), "any", {"max_grad_norm": 0.1})
    for rest in ({}, {"cache": "fixed", "variant": "sequential"})
]


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
@pytest.mark.parametrize(("method", "_", "train"), HONEST)
def test_honest_sites_are_never_refused(task: str, method: Framework, _: str, train: dict[str, Any]) -> None:
    setting = lab(adapted("gpt2", task), **{"epochs": 1, **train})
    sites, wire = federation(method, setting)
    state = method.setup(setting)
    for _round in range(2):
        assert one_round(method, setting, wire, sites, state, min_sites=3) == {}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gpt2"])
@pytest.mark.parametrize("method", [FedLLM(), KD(), Split(labels="server"), Split(labels="client")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_honest_models_are_never_refused(kind: str, method: Framework, precision: str) -> None:
    for task in ("classification", "causal-lm") if kind in DECODERS else ("classification",):
        setting = lab(adapted(kind, task, precision), epochs=1)
        sites, wire = federation(method, setting)
        assert one_round(method, setting, wire, sites, method.setup(setting), min_sites=3) == {}


def test_an_empty_public_set_is_fine() -> None:
    from fedtrio.data.batches import Encoded

    setting = lab(adapted("gpt2"), public=Encoded([], None))
    sites, wire = federation(KD(), setting)
    assert one_round(KD(), setting, wire, sites, KD().setup(setting), min_sites=3) == {}


def test_bounds_must_be_positive() -> None:
    for name in Guards.model_fields:
        with pytest.raises(ValueError, match="greater than 0"):
            Guards(**{name: 0})
