"""A cut for each site, two cuts, one server step for all, and the chooser: against plain loops over whole models."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import DEPTH, PAD, adapted, distance, federation, lab, play, rounds, same
from torch import Tensor

from fedtrio.aggregation.holders import mean_over_holders
from fedtrio.config import Config
from fedtrio.data.batches import collate
from fedtrio.errors import ConfigError, ModelError
from fedtrio.frameworks import Centralized, FedLLM, Split
from fedtrio.frameworks.lab import Lab
from fedtrio.frameworks.split_cuts import Costs, Device, choose, of_batch, seconds
from fedtrio.frameworks.split_server import ServerHalf
from fedtrio.meter import Meter
from fedtrio.models.train import TrainConfig, task_loss

FEW = [("gpt2", "classification"), ("llama", "causal-lm"), ("qwen3", "causal-lm"), ("bert", "classification")]
REST = [("gpt2", "causal-lm"), ("llama", "classification"), ("qwen3", "classification")]
ALL = FEW + [pytest.param(*case, marks=pytest.mark.slow) for case in REST]
LABELS_AT = ("server", "client")
UNLIKE = {"site-1": 0, "site-2": DEPTH, "others": 2}
SIZES = (5, 6, 3)


# A cut for each site -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "task"), ALL)
def test_sflv1_is_fedllm_wherever_each_site_cuts(kind: str, task: str) -> None:
    """S3 and S5 at once: each layer is averaged over the sites and server halves that hold it, which are all."""
    model = adapted(kind, task)
    federated = play(FedLLM(), model, SIZES, epochs=1)
    for labels in LABELS_AT:
        run = play(Split(cut=UNLIKE, labels=labels), model, SIZES, epochs=1)  # type: ignore[arg-type]
        assert same(run.adapter, federated.adapter)
        sent = {s: run.ledger.total("payload", site=s, direction="down", kind="adapter") for s in run.sites}
        assert sent["site-1"] < sent["site-3"] < sent["site-2"]  # they did cut at different blocks
    apart = Split(cut={"site-1": 1, "others": 0}, labels="client", last_blocks=3)
    assert same(play(apart, model, SIZES, epochs=1).adapter, federated.adapter)


def test_unlike_cuts_with_everything_on() -> None:
    """S13 too: dropout, clipping, a schedule and fp32, where the order of a sum would show."""
    model = adapted("bert", precision="fp32", dropout=0.1, lora_dropout=0.1)
    rest = {"max_grad_norm": 0.5, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "abreast": 2, "epochs": 1}
    federated = play(FedLLM(), model, SIZES, **rest)
    for labels in LABELS_AT:
        assert same(play(Split(cut=UNLIKE, labels=labels), model, SIZES, **rest).adapter, federated.adapter)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "task"), ALL)
def test_the_head_and_the_last_blocks_at_the_site(kind: str, task: str) -> None:
    """S2 for every pair of cuts of one model, and for some of the others; the site holds what it should."""
    model = adapted(kind, task)
    whole = play(Centralized(), model, (7,), n=1, epochs=1)
    pairs = [(c, n) for n in range(1, DEPTH + 1) for c in range(DEPTH - n + 1)]
    for cut, last in pairs if (kind, task) == ("gpt2", "classification") else [(1, 1), (2, 2)]:
        run = play(Split(cut=cut, labels="client", last_blocks=last), model, (7,), n=1, epochs=1)
        assert same(run.adapter, whole.adapter), (cut, last)
        assert {n for n in run.state["server"] if "lora_" in n} == {
            n for n in model.initial if "lora_" in n and cut <= block_of(n) < DEPTH - last
        }


def block_of(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), DEPTH)


def taught(method: Split, setting: Lab, sizes: Sequence[int], n: int) -> dict[str, Tensor]:
    """sflv2, sequential and concatenated written plainly: whole models, one loop, no wire and no cut."""
    sites, _ = federation(method, setting, sizes)
    whole: dict[str, Tensor] = {**method.setup(setting)["site"], **method.setup(setting)["server"]}
    total = sum(site.data.weight for site in sites.values())
    for setting.round in range(1, n + 1):
        order = setting.shuffled(list(sites))
        held = {s: list(setting.model.part(whole, *method.layout(setting, s).site)) for s in order}
        top = setting.learner({n: t for n, t in whole.items() if not all(n in held[s] for s in order)})
        bottoms = {s: setting.learner({n: whole[n] for n in held[s]}) for s in order}
        batches = {s: list(sites[s].data.batches(setting.round)) for s in order}
        turns = [[s for s in order if t < len(batches[s])] for t in range(max(map(len, batches.values())))]
        if method.variant == "sequential":
            turns = [[s] for s in order for _ in batches[s]]
        if method.variant == "sflv2":
            turns = [[s] for turn in turns for s in turn]
        steps = dict.fromkeys(order, 0)
        for turn in turns:
            if method.variant == "sequential" and steps[turn[0]] == 0:
                bottoms[turn[0]] = setting.learner({n: {**whole, **top.values()}.get(n) for n in held[turn[0]]})  # type: ignore[misc]
            counts = {s: max(1, batches[s][steps[s]].target_tokens()) for s in turn}
            for s in turn:
                batch, seed = batches[s][steps[s]], setting.dropout_seed(setting.round, s, steps[s])
                tensors = {**top.tensors, **bottoms[s].tensors}
                logits = setting.model.forward(tensors, batch.lengths_B, batch.ids_BT, dropout_seed=seed)
                loss = task_loss(logits, batch.targets)  # type: ignore[arg-type]
                (loss * (counts[s] / sum(counts.values())) if method.variant == "concatenated" else loss).backward()
            norms = top.squared_norms(), torch.cat([bottoms[s].squared_norms() for s in turn])
            longest = max(turn, key=lambda s: len(batches[s]))
            top.step(setting.progress(setting.round, steps[longest], len(batches[longest])), norms[1])
            for s in turn:
                bottoms[s].step(setting.progress(setting.round, steps[s], len(batches[s])), norms[0])
                steps[s] += 1
            if method.variant == "sequential" and steps[turn[0]] == len(batches[turn[0]]):
                done = bottoms[turn[0]].values()
                with torch.no_grad():
                    for name in done.keys() & top.tensors.keys():
                        top.tensors[name].copy_(done[name])
                whole = {**whole, **done}
        if method.variant == "sequential":
            whole = {**whole, **{name: t.clone() for name, t in top.values().items()}}
        else:
            own = {s: bottoms[s].values() for s in order}
            p = {s: sites[s].data.weight / total for s in order}
            whole = {n: sum(p[s] * own[s].get(n, top.values().get(n)) for s in order) for n in whole}  # type: ignore[operator,misc]
    return whole


@pytest.mark.parametrize("variant", ["sflv2", "sequential", "concatenated"])
@pytest.mark.parametrize(("task", "labels"), [("classification", "server"), ("causal-lm", "client")])
@pytest.mark.parametrize("cut", [UNLIKE, pytest.param(2, marks=pytest.mark.slow)])
def test_one_server_half_against_a_plain_loop(task: str, labels: Any, variant: Any, cut: Any) -> None:
    """Clipped, with dropout and a schedule, sites of unlike sizes and cuts: two rounds end where the loop does."""
    model, rest = adapted("gpt2", task, dropout=0.1), {"max_grad_norm": 0.5, "lr_scheduler_type": "linear", "epochs": 1}
    method = Split(cut=cut, variant=variant, labels=labels)
    run = play(method, model, SIZES, n=2, **rest)
    plain = taught(method, lab(model, rounds=2, **rest), SIZES, 2)
    assert distance(run.adapter, plain) < 1e-11
    assert all(distance({n: run.adapter[n]}, {n: model.initial[n]}) > 1e-4 for n in plain)
    assert distance(play(Split(cut=cut, labels=labels), model, SIZES, n=2, **rest).adapter, plain) > 1e-3


@pytest.mark.parametrize(("task", "labels"), [("causal-lm", "server"), ("classification", "client")])
def test_one_step_for_all_without_clipping(task: str, labels: Any) -> None:
    method, model = Split(cut=2, variant="concatenated", labels=labels), adapted("gpt2", task)
    assert distance(play(method, model, SIZES).adapter, taught(method, lab(model), SIZES, 2)) < 1e-11


def test_holders_by_hand() -> None:
    """Three sites of weights 1, 2, 5; the server's copy stands in for those that do not hold a tensor."""

    def of(**values: float) -> dict[str, Tensor]:
        return {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}

    sites = {"a": of(x=1.0), "b": of(x=3.0, y=10.0), "c": of(x=7.0, y=20.0)}
    mean = mean_over_holders(sites, {"a": 1.0, "b": 2.0, "c": 5.0}, of(y=40.0, z=9.0))
    assert {name: float(t) for name, t in mean.items()} == {
        "x": (1 + 2 * 3 + 5 * 7) / 8, "y": (40 + 2 * 10 + 5 * 20) / 8, "z": 9.0,
    }  # fmt: skip
    everyone = mean_over_holders({"b": sites["b"], "c": sites["c"]}, {"b": 2.0, "c": 5.0}, of(y=1e9))
    assert float(everyone["y"]) == pytest.approx((2 * 10 + 5 * 20) / 7)  # nobody used the server's copy


# One server step over the batches of all -----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "task"), ALL)
def test_concatenated_is_one_large_batch(kind: str, task: str) -> None:
    """S4 over the wire: with SGD the server moves as for one large batch, and the sites' moves add up to its other."""
    sgd = {"optimizer": "sgd", "weight_decay": 0.0, "learning_rate": 0.5, "head_learning_rate": 0.5, "epochs": 1}
    model, sizes = adapted(kind, task), (4, 2, 3)  # one batch each
    setting = lab(model, **sgd)
    setting.round = 1
    sites, _ = federation(Split(), setting, sizes)
    encoded = [site.data.encoded for site in sites.values()]
    whole = collate(join(encoded), range(sum(sizes)), PAD)
    large = setting.learner(model.initial)
    loss = task_loss(model.forward(large.tensors, whole.lengths_B, whole.ids_BT), whole.targets)  # type: ignore[arg-type]
    model.backward(loss, whole.shape)
    large.step(0.0)
    for labels in LABELS_AT:
        method = Split(cut=2, variant="concatenated", labels=labels)  # type: ignore[arg-type]
        ends: dict[str, dict[str, Tensor]] = {}
        setting = lab(model, **sgd)
        check = method.check

        def note(lab: Lab, site: str, sent: Any, reply: Any, ends=ends, check=check) -> None:
            check(lab, site, sent, reply)
            if reply.done:
                ends[site] = dict(reply.tensors)

        state = one_round(method, setting, sizes, note)
        assert distance(state["server"], {name: large.values()[name] for name in state["server"]}) < 1e-12
        for name in state["site"]:
            moved = sum(end[name] - model.initial[name] for end in ends.values())
            assert float((moved - (large.values()[name] - model.initial[name])).abs().max()) < 1e-12, name  # type: ignore[union-attr]
            assert float(moved.abs().max()) > 1e-6  # type: ignore[union-attr]


def join(parts: Sequence[Any]) -> Any:
    first = parts[0]
    ids = [row for part in parts for row in part.input_ids]
    if isinstance(first.targets, list):
        return type(first)(ids, [row for part in parts for row in part.targets])
    import numpy as np

    return type(first)(ids, np.concatenate([part.targets for part in parts]))


def one_round(method: Split, setting: Lab, sizes: Sequence[int], check: Any) -> Any:
    from functools import partial

    from fedtrio.ledger import Ledger
    from fedtrio.program import drive

    _, wire = federation(method, setting, sizes)
    state = method.setup(setting)
    setting.round = 1
    drive(method.server(setting, state, wire.sites), wire, 1, Ledger(), partial(check, setting))
    return state


@pytest.mark.parametrize("labels", LABELS_AT)
def test_the_server_holds_one_batch_at_a_time(labels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many sites, one half with its optimizer and at most one autograd graph."""
    model, graphs, halves = adapted("gpt2"), [], []
    half_init, half_forward = ServerHalf.__init__, ServerHalf._forward

    def init(self: ServerHalf, *arguments: Any) -> None:
        halves.append(self)
        half_init(self, *arguments)

    def forward(self: ServerHalf, site: str, reply: Any) -> Any:
        assert not [graph for graph in graphs if graph() is not None]
        one = half_forward(self, site, reply)
        if one[1].requires_grad:
            graphs.append(weakref.ref(one[1]))
        return one

    monkeypatch.setattr(ServerHalf, "__init__", init)
    monkeypatch.setattr(ServerHalf, "_forward", forward)
    play(Split(variant="concatenated", labels=labels), model, (4, 4, 4, 4), n=1, epochs=1)
    assert len(halves) == 1 and len(graphs) == 4


def test_with_one_site_concatenated_is_sflv1() -> None:
    """S11, clipped or not."""
    for labels, clip in (("server", 0.05), ("client", None), ("client", 0.05)):
        pair = [
            play(Split(variant=v, labels=labels), adapted("gpt2"), (9,), n=1, epochs=1, max_grad_norm=clip)  # type: ignore[arg-type]
            for v in ("concatenated", "sflv1")
        ]
        assert same(pair[0].adapter, pair[1].adapter)


# The chooser ---------------------------------------------------------------------------------------------------------

COSTS = Costs(flops=100.0, site_flops=(0.0, 40.0, 80.0, 100.0), bytes=(10.0, 20.0, 20.0, 20.0), memory=(1, 2, 3, 4))


@pytest.mark.parametrize(
    ("device", "server", "least", "cut", "time"),
    [
        (Device(1.0, 1.0), 10.0, 0, 0, 0 + 10 + 10.0),  # a slow site does as little as it may
        (Device(1.0, 1.0), 10.0, 1, 1, 40 + 20 + 6.0),
        (Device(100.0, 1.0), 10.0, 1, 3, 1 + 20 + 0.0),  # a site faster than the server does all
        (Device(100.0, 1.0, 3), 10.0, 1, 2, 0.8 + 20 + 2.0),  # as much as fits
        (Device(10.0, 1.0), 10.0, 1, 1, 4 + 20 + 6.0),  # of equals the lowest
    ],
)
def test_the_chooser_by_hand(device: Device, server: float, least: int, cut: int, time: float) -> None:
    assert choose(COSTS, device, server, least) == cut
    assert seconds(COSTS, device, server, cut) == pytest.approx(time)
    allowed = [c for c in range(least, 4) if COSTS.memory[c] <= (device.memory_bytes or 9)]
    assert seconds(COSTS, device, server, cut) == min(seconds(COSTS, device, server, c) for c in allowed)


def test_where_no_cut_fits() -> None:
    with pytest.raises(ConfigError, match="least_cut 2 on for the clinic: the smallest half needs 3 bytes"):
        choose(COSTS, Device(1.0, 1.0, 2.5), 1.0, 2, "the clinic")
    with pytest.raises(ConfigError, match="fewer blocks"):
        choose(COSTS, Device(1.0, 1.0), 1.0, 4)


@pytest.mark.parametrize(("kind", "task"), [("gpt2", "classification"), ("llama", "causal-lm")])
def test_costs_are_those_of_the_meter(kind: str, task: str) -> None:
    """FLOPs, memory and bytes of each cut, as a run of one full batch is counted."""
    model, train = adapted(kind, task, "fp32"), TrainConfig(batch_size=3, max_length=6, epochs=1)
    for labels in LABELS_AT:
        costs = of_batch(model, train, None if labels == "server" else 0)
        for cut in (0, 1, 3, DEPTH):
            meter, method = Meter({}), Split(cut=cut, labels=labels)  # type: ignore[arg-type]
            setting = lab(model, batch_size=3, epochs=1, max_length=6)
            sites, wire = federation(method, setting, (3,), meter)
            data = sites["site-1"].data
            rows = [row[:2].repeat(3) for row in data.encoded.input_ids]  # all of 6 tokens
            targets = rows if task == "causal-lm" else data.encoded.targets
            sites["site-1"].data = type(data)(type(data.encoded)(rows, targets), "site-1", 0, 3, 1, PAD)
            _, ledger = rounds(method, setting, wire, 1)
            assert costs.site_flops[cut] == meter.total("flops")
            assert 0 <= costs.memory[cut] - meter.peak_bytes <= (DEPTH + 1) * 3 * 6 * model.width * 4
            kinds = ("activations", "activations and labels", "activation gradients")
            crossed = sum(ledger.total("payload", kind=kind) for kind in kinds)
            labelled = 4 * (3 if task == "classification" else 18) if labels == "server" else 0
            assert crossed == costs.bytes[cut] + labelled


def test_auto_cuts_by_what_each_site_has() -> None:
    """A slow site runs one block, a fast one all but the head, one of little memory what fits; weights are FedLLM's."""
    model = adapted("gpt2")
    tight = of_batch(model, lab(model).train).memory[2]
    method = Split(
        cut="auto", labels="server", server_flops_per_second=1e9, site_bytes_per_second=1e12,
        site_flops_per_second={"site-1": 1e6, "others": 1e12}, site_memory_bytes={"site-3": tight, "others": 1e18},
    )  # fmt: skip
    setting = lab(model)
    cuts = [method.layout(setting, f"site-{i}").bottom[1] for i in (1, 2, 3)]
    assert cuts == [1, DEPTH, 2]
    assert same(play(method, model, SIZES).adapter, play(FedLLM(), model, SIZES).adapter)
    assert method.cuts(DEPTH) == (1, 2, 3, 4)
    alike = Split(cut="auto", labels="server", site_flops_per_second=3e11, server_flops_per_second=3e11)
    assert alike.layout(setting, "x").bottom == (-1, 1)  # the lowest of equals
    upright = Split(cut="auto", labels="client", last_blocks=1, server_flops_per_second=1.0)
    assert upright.layout(setting, "x").bottom == (-1, 3) and upright.layout(setting, "x").top == (3, None)


# Errors --------------------------------------------------------------------------------------------------------------


def test_settings_that_do_not_go_together() -> None:
    for split, says in (
        ({"cut": -1}, "greater than or equal to 0"),
        ({"cut": {"a": -1}}, "greater than or equal to 0"),
        ({"cut": {}}, "one for each site by name"),
        ({"cut": "deep"}, "or auto"),
        ({"cut": True}, "or auto"),
        ({"last_blocks": 1, "labels": "server"}, "last_blocks need labels: client"),
        ({"site_flops_per_second": 0}, "greater than 0"),
    ):
        with pytest.raises(ValueError, match=says):
            Config.model_validate({"split": split})
    assert Config(split=Split(last_blocks=1)).resolved().split.labels == "client"
    assert Config().resolved().split.labels == "server"


def test_sites_and_blocks_that_there_are_not() -> None:
    model, train, sites = adapted("gpt2"), TrainConfig(), ["berlin", "paris"]
    with pytest.raises(ConfigError, match=r"names 'pariss', which is no site; did you mean 'paris'"):
        Split(cut={"pariss": 1, "others": 2}).check_sites(sites, 2)
    with pytest.raises(ConfigError, match="no value for berlin: name it, or add 'others'"):
        Split(cut={"paris": 1}).check_sites(sites, 2)
    Split(cut={"paris": 1, "berlin": 2}).check_sites(sites, 2)
    with pytest.raises(ConfigError, match=r"least_cut 1 on for paris: the smallest half needs .* bytes"):
        Split(cut="auto", site_memory_bytes={"paris": 9, "others": 1e12}).admit(model, train, sites)
    with pytest.raises(ModelError, match=r"split\.cut 3 and split\.last_blocks 2 are more than the 4 blocks"):
        Split(cut=3, last_blocks=2, labels="client").cuts(4)
    assert Split(cut={"a": 3, "b": 1}, last_blocks=1, labels="client").cuts(4) == (1, 3, 3)
