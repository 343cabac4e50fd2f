"""What is counted is what was spent: bytes, FLOPs and memory against formulas that know only shapes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tiny import (
    DECODERS,
    DEPTH,
    KINDS,
    LABELS,
    PAD,
    VOCAB,
    WIDTH,
    Played,
    adapted,
    federation,
    lab,
    play,
    public_set,
    rounds,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedtrio.data.batches import IGNORE, Encoded
from fedtrio.data.private import PrivateData
from fedtrio.evaluate import evaluate
from fedtrio.frameworks import KD, Centralized, FedLLM, Local, Split
from fedtrio.ledger import Ledger
from fedtrio.meter import Meter
from fedtrio.models.adapter import AdaptedModel
from fedtrio.models.cut import WHOLE, find_blocks
from fedtrio.models.train import task_loss
from fedtrio.program import drive

ALL = [(kind, "classification") for kind in KINDS] + [(kind, "causal-lm") for kind in DECODERS]
CASES = [(*one, "fp32") for one in ALL] + [("gpt2", "causal-lm", p) for p in ("fp64", "bf16")]
SIZES, EPOCHS, ROUNDS, R = (5, 3), 2, 2, 4
BYTES = {"fp64": 8, "fp32": 4, "bf16": 4}  # what leaves a model under autocast is fp32


def matrices(module: nn.Module) -> list[tuple[int, int]]:
    """(in, out) of each frozen matrix with LoRA beside it."""
    found = []
    for inner in module.modules():
        base = getattr(inner, "base_layer", None)
        if base is not None:
            shape = tuple(base.weight.shape)
            found.append(shape if type(base).__name__ == "Conv1D" else shape[::-1])
    return found


def numbers(model: AdaptedModel, below: int = DEPTH, head: bool = True) -> int:
    """P_A + P_B of the first `below` blocks, and with `head` of all that comes after the last: pooler and P_h."""
    blocks = find_blocks(model.module)
    count = sum(R * (i + o) for block in list(blocks)[:below] for i, o in matrices(block))
    if head:
        count += sum(R * (i + o) for i, o in matrices(model.module))
        count -= sum(R * (i + o) for block in blocks for i, o in matrices(block))
        count += sum(t.numel() for n, t in model.initial.items() if "lora_" not in n)
    return count


def tokens(run: Played) -> dict[str, int]:
    return {name: sum(len(ids) for ids in site.data.encoded.input_ids) for name, site in run.sites.items()}


def spent(run: Played, site: str) -> dict[str, int]:
    """Payload up and down, in the whole run."""
    return {way: run.ledger.total("payload", site=site, direction=way) for way in ("up", "down")}


# Bytes (P2) ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "task", "precision"), CASES)
def test_fedllm_sends_the_adapter(kind: str, task: str, precision: str) -> None:
    """b(P_A + P_B + P_h) each way and round."""
    model = adapted(kind, task, precision)
    if task == "classification":
        bias = LABELS if kind == "bert" else 0
        assert sum(t.numel() for n, t in model.initial.items() if "lora_" not in n) == WIDTH * LABELS + bias
    per_block = {"gpt2": 4, "llama": 7, "qwen3": 7, "bert": 6}[kind]
    assert len(matrices(model.module)) == DEPTH * per_block + (kind == "bert")  # and BERT's pooler
    wanted = ROUNDS * BYTES[precision] * numbers(model)
    run = play(FedLLM(), model, SIZES, n=ROUNDS, epochs=1)
    assert all(spent(run, site) == {"up": wanted, "down": wanted} for site in run.sites)


@pytest.mark.parametrize(("kind", "task"), ALL)
def test_kd_sends_logits(kind: str, task: str) -> None:
    """M·C·b, and for causal-lm M·(target tokens)·V·b; not a parameter among it."""
    model, public = adapted(kind, task, "fp32"), public_set(task)
    if task == "classification":
        wanted = len(public) * LABELS * 4
    else:
        public.input_ids[0], public.targets[0] = public.input_ids[0][:1], public.targets[0][:1]  # type: ignore[index]
        assert isinstance(public.targets, list)
        public.targets[1][:2] = IGNORE  # one text without any target, one with a prompt
        wanted = sum(int((t[1:] != IGNORE).sum()) for t in public.targets) * VOCAB * 4
    run = play(KD(), model, SIZES, n=ROUNDS, public=public, epochs=1)
    assert all(spent(run, site) == {"up": ROUNDS * wanted, "down": ROUNDS * wanted} for site in run.sites)
    assert {entry.kind for entry in run.ledger if entry.payload} == {"logits", "aggregated logits"}


@pytest.mark.parametrize(
    ("kind", "task", "variant"),
    [(*one, "sflv1") for one in ALL] + [("gpt2", "classification", v) for v in ("sflv2", "sequential")],
)
def test_split_sends_activations_and_labels(kind: str, task: str, variant: str) -> None:
    """Up T·d·b and 4 bytes a label, down T·d·b, each epoch; and the site's half of the adapter both ways each round."""
    model, rounds = adapted(kind, task, "fp32"), 1 if variant == "sflv1" else ROUNDS
    for cut in (0, 1, DEPTH) if variant == "sflv1" else (2,):
        run = play(Split(cut=cut, labels="server", variant=variant), model, SIZES, n=rounds, epochs=EPOCHS)  # type: ignore[arg-type]
        sync = 4 * numbers(model, cut, head=False)
        assert (sync > 0) == (cut > 0)
        for site, T in tokens(run).items():
            labels = 4 * (len(run.sites[site].data) if task == "classification" else T)
            up = rounds * (EPOCHS * (T * WIDTH * 4 + labels) + sync)
            down = rounds * (EPOCHS * (T * WIDTH * 4 if cut else 0) + sync)
            assert spent(run, site) == {"up": up, "down": down}


@pytest.mark.parametrize(("kind", "task", "precision"), CASES)
def test_the_u_shape_sends_activations_twice(kind: str, task: str, precision: str) -> None:
    """T·d·2b each way, each epoch, and no label; the head belongs to the site's half."""
    model, b = adapted(kind, task, precision), BYTES[precision]
    for cut in (0, 2) if precision == "fp32" else (2,):
        run = play(Split(cut=cut, labels="client"), model, SIZES, n=1, epochs=EPOCHS)
        sync = b * numbers(model, cut, head=True)
        for site, T in tokens(run).items():
            up = EPOCHS * 2 * T * WIDTH * b + sync
            down = EPOCHS * (2 if cut else 1) * T * WIDTH * b + sync
            assert spent(run, site) == {"up": up, "down": down}


def test_each_site_pays_for_its_own_cut() -> None:
    """Each site's half both ways, and the last blocks with the head; a step for all costs no number more."""
    model, cuts = adapted("gpt2", precision="fp32"), {"site-1": 0, "others": 3}
    run = play(Split(cut=cuts, labels="server", variant="concatenated"), model, SIZES, n=1, epochs=EPOCHS)
    for site, T in tokens(run).items():
        cut = cuts.get(site, 3)
        sync, labels = 4 * numbers(model, cut, head=False), 4 * EPOCHS * len(run.sites[site].data)
        up, down = EPOCHS * 4 * T * WIDTH, EPOCHS * 4 * T * WIDTH * (cut > 0)
        assert spent(run, site) == {"up": up + labels + sync, "down": down + sync}
    run = play(Split(cut=1, labels="client", last_blocks=1), model, SIZES, n=1, epochs=EPOCHS)
    sync = 4 * (numbers(model, 1, head=True) + numbers(model, 4, head=False) - numbers(model, 3, head=False))
    for site, T in tokens(run).items():
        assert spent(run, site) == dict.fromkeys(("up", "down"), EPOCHS * 2 * 4 * T * WIDTH + sync)


@pytest.mark.parametrize("labels", ["server", "client"])
def test_clipping_sends_one_number_for_each_tensor(labels: Any) -> None:
    model, method = adapted("gpt2", precision="fp32"), Split(cut=2, labels=labels)
    free = play(method, model, SIZES, n=1, epochs=1)
    clipped = play(method, model, SIZES, n=1, epochs=1, max_grad_norm=0.1)
    for site in free.sites:
        steps = free.sites[site].data.steps
        for way, half in (("up", "site"), ("down", "server")):
            assert spent(clipped, site)[way] - spent(free, site)[way] == 8 * steps * len(clipped.state[half])


def test_frames_cost_a_little_more_than_their_tensors() -> None:
    """`bytes` are whole frames: header and 8 bytes before it, so always above the payload."""
    for method in (FedLLM(), KD(), Split(labels="server")):
        for entry in play(method, adapted("gpt2"), SIZES, n=1).ledger:
            assert entry.bytes > entry.payload + 8 * entry.messages


def test_messages_of_each_framework() -> None:
    """Up: one a round; two; and one for each batch and one more, twice as many in the U-shape."""
    model, batches = adapted("gpt2"), {"site-1": 2 * EPOCHS, "site-2": EPOCHS}
    for method, wanted in (
        (FedLLM(), dict.fromkeys(batches, 1)),
        (KD(), dict.fromkeys(batches, 2)),
        (Split(labels="server"), {s: n + 1 for s, n in batches.items()}),
        (Split(labels="client"), {s: 2 * n + 1 for s, n in batches.items()}),
    ):
        ledger = play(method, model, SIZES, n=1, epochs=EPOCHS).ledger
        for way in ("up", "down"):
            assert {s: ledger.total("messages", site=s, direction=way) for s in batches} == wanted


# The ledger ----------------------------------------------------------------------------------------------------------


def test_the_ledger_does_not_depend_on_who_answered_first() -> None:
    records = [(r, s, d, k) for r in (2, 1) for s in ("b", "a", "c") for d in ("up", "down") for k in ("x", "y")] * 3
    shuffled = random.Random(1).sample(records, len(records))
    ledgers = [Ledger(), Ledger()]
    for ledger, order in zip(ledgers, (records, shuffled), strict=True):
        for record in order:
            ledger.record(*record, b"-" * (10 * record[0] + len(record[3])), 5)
    assert list(ledgers[0]) == list(ledgers[1]) and list(ledgers[0].lines(seed=1)) == list(ledgers[1].lines(seed=1))
    assert ledgers[0].by_kind() == ledgers[1].by_kind()
    assert ledgers[0].total("messages") == 72 == sum(int(kind["messages"]) for kind in ledgers[0].by_kind())
    assert ledgers[0].total("bytes", round=2, site="a") == 3 * 4 * 21
    assert ledgers[0].total("payload", direction="up", kind="x") == 5 * 18


@pytest.mark.parametrize("method", [FedLLM(), KD(), Split(labels="server"), Split(labels="client")])
def test_a_frame_that_could_not_leave_is_not_counted(method: Any) -> None:
    """One site is gone from its second turn on: of it there stands what crossed, and of the others all."""

    class Gone:
        abreast = None

        def __init__(self, wire: Any) -> None:
            self.wire, self.sites, self.crossed, self.unsent = wire, wire.sites, 0, 0

        def exchange(self, frames: Any) -> Any:
            for site, frame in frames:
                if site == self.sites[0] and self.crossed:
                    self.unsent += 1
                    yield site, None
                    continue
                [(_, answer)] = self.wire.exchange([(site, frame)])
                self.crossed += len(frame) + len(answer)
                yield site, answer

    setting, ledger = lab(adapted("gpt2", precision="fp32")), Ledger()
    gone = Gone(federation(method, setting, (5, 3, 4))[1])
    state, setting.round = method.setup(setting), 1
    drive(method.server(setting, state, gone.sites), gone, 1, ledger)
    assert ledger.total("bytes") == gone.crossed and gone.unsent == (not isinstance(method, FedLLM))
    if isinstance(method, FedLLM):
        setting.round = 2
        drive(method.server(setting, state, gone.sites), gone, 2, ledger)
        assert ledger.total("bytes") == gone.crossed and gone.unsent == 1
        assert ledger.total("messages", site=gone.sites[0]) == 2


@pytest.mark.parametrize("method", [FedLLM(), KD(), Split(labels="server"), Split(labels="client")])
def test_a_wire_that_answers_backwards_changes_nothing(method: Any) -> None:
    """Neither a bit of the result nor a line of the ledger."""

    class Backwards:
        abreast = None

        def __init__(self, wire: Any) -> None:
            self.wire, self.sites = wire, wire.sites

        def exchange(self, frames: Any) -> Any:
            return reversed(list(self.wire.exchange(list(frames)[::-1])))

        def close(self) -> None: ...

    model, found = adapted("gpt2", precision="fp32"), []
    for wrap in (lambda wire: wire, Backwards):
        setting, ledger = lab(model), Ledger()
        _, wire = federation(method, setting, (5, 3, 4))
        state = method.setup(setting)
        for setting.round in (1, 2):
            drive(method.server(setting, state, wire.sites), wrap(wire), setting.round, ledger)
        found.append((list(ledger), {n: t.tolist() for n, t in method.adapter(setting, state).items()}))
    assert found[0] == found[1]


# FLOPs ---------------------------------------------------------------------------------------------------------------


def counted(model: AdaptedModel, data: PrivateData, rounds: int) -> int:
    """FLOPs of plain PyTorch on the same batches: no adapter beside the model, no cut, no meter."""
    named = dict(model.module.named_parameters())
    trained = [named[name] for name in model.initial]
    for p in trained:
        p.requires_grad_(True)
    try:
        with FlopCounterMode(display=False) as count:
            for round in range(1, rounds + 1):
                for batch in data.batches(round):
                    output: Any = model.module(input_ids=batch.ids_BT, attention_mask=batch.mask_BT)
                    task_loss(output.logits, batch.targets).backward()  # type: ignore[arg-type]
    finally:
        for p in trained:
            p.grad = None
            p.requires_grad_(False)
    return count.get_total_flops()


@pytest.mark.parametrize(("kind", "task"), ALL)
def test_flops_of_fedllm_are_those_of_a_plain_loop(kind: str, task: str) -> None:
    model, meter = adapted(kind, task), Meter({})
    run = play(FedLLM(), model, SIZES, n=1, meter=meter, epochs=1)
    for site in run.sites.values():
        assert meter.effort(site.name).flops == counted(model, site.data, 1) > 0
    assert meter.total("flops") == sum(meter.effort(name).flops for name in run.sites)


@pytest.mark.parametrize("method", [Centralized(), Local()])
def test_flops_of_the_yardsticks(method: Any) -> None:
    model, meter = adapted("gpt2"), Meter({})
    run = play(method, model, (5,), meter=meter, epochs=1)
    assert meter.total("flops") == counted(model, run.sites["site-1"].data, 2)


def gpt2_flops(B: int, T: int, blocks: int, forward: bool, backward: bool, lowest: bool = True) -> int:
    """The closed formula for LoRA on all matrices of GPT-2 blocks; a multiply-add is 2 FLOPs, computed with padding.

    Forward for each token and block: 24d² (linear), 4Td (attention), 2r·Σ(i+o) (LoRA). Backward: dX of the linear maps
    and of LoRA's, dA and dB, and twice the attention; below the lowest adapter's input nothing: −6d² − 2rd.
    """
    d = WIDTH
    linear, attention, lora = 24 * d * d, 4 * T * d, 2 * R * ((d + 3 * d) + (d + d) + 2 * (d + 4 * d))
    per_token = blocks * (forward * (linear + attention + lora) + backward * (linear + 2 * attention + 2 * lora))
    if backward and lowest and blocks:
        per_token -= 6 * d * d + 2 * R * d
    return B * T * per_token


def head_flops(B: int, T: int, forward: bool, backward: bool) -> int:
    """The classification head sees every position; backward both dX and dW."""
    return B * T * 2 * WIDTH * LABELS * (forward + 2 * backward)


def shapes(run: Played, site: str, rounds: int) -> list[tuple[int, int]]:
    return [batch.shape for round in range(1, rounds + 1) for batch in run.sites[site].data.batches(round)]


def test_flops_of_gpt2_by_the_closed_formula() -> None:
    """FedLLM, Split at each cut with labels at either side, and KD with its private part, its logits and its lesson."""
    model, costs = adapted("gpt2"), {}
    meter = Meter(costs)
    run = play(FedLLM(), model, SIZES, n=1, meter=meter)
    for site in run.sites:
        wanted = sum(gpt2_flops(*s, DEPTH, True, True) + head_flops(*s, True, True) for s in shapes(run, site, 1))
        assert meter.effort(site).flops == wanted
    private = {site: meter.effort(site).flops for site in run.sites}

    for cut in range(DEPTH + 1):
        for labels in ("server", "client"):
            meter = Meter(costs)
            run = play(Split(cut=cut, labels=labels), model, SIZES, n=1, meter=meter)  # type: ignore[arg-type]
            for site in run.sites:
                wanted = sum(
                    gpt2_flops(*s, cut, True, True) + head_flops(*s, labels == "client", labels == "client")
                    for s in shapes(run, site, 1)
                )
                assert meter.effort(site).flops == wanted, (cut, labels)

    meter = Meter(costs)
    run = play(KD(distill_epochs=3), model, SIZES, n=1, meter=meter, public=public_of(6, 4))
    for site in run.sites:
        logits = gpt2_flops(6, 4, DEPTH, True, False) + head_flops(6, 4, True, False)
        lesson = gpt2_flops(6, 4, DEPTH, True, True) + head_flops(6, 4, True, True)
        assert meter.effort(site).flops == private[site] + logits + 3 * lesson


def public_of(n: int, length: int) -> Encoded:
    """Texts of one length."""
    rng = torch.Generator().manual_seed(0)
    return Encoded([torch.randint(2, VOCAB, (length,), generator=rng).numpy() for _ in range(n)], None)


def test_the_server_costs_its_clients_nothing() -> None:
    """What works outside of a site is not counted: the server's half and student, and evaluation."""
    model, meter = adapted("gpt2"), Meter({})
    run = play(Split(cut=0, labels="server"), model, SIZES, n=1, meter=meter)
    assert meter.total("flops") == 0 and set(meter._efforts) == set(run.sites)
    few, many = Meter({}), Meter({})
    for meter, epochs in ((few, 0), (many, 5)):
        run = play(KD(server_epochs=epochs), model, SIZES, n=1, meter=meter)
        evaluate(model, run.adapter, run.sites["site-1"].data.encoded, PAD)
    assert few.total("flops") == many.total("flops") > 0
    assert few.peak_bytes == many.peak_bytes > 0


@pytest.mark.parametrize("method", [FedLLM(), KD(), Split(labels="server"), Split(labels="client")])
def test_counting_changes_no_bit_and_a_second_count_is_the_same(method: Any) -> None:
    """Costs are watched once and reused; with dropout on, since a watch must not draw random numbers either."""
    model, costs = adapted("gpt2", precision="fp32", dropout=0.1), {}
    meters = [None, Meter(costs), Meter(costs), Meter({})]
    runs = [play(method, model, SIZES, n=1, meter=meter) for meter in meters]
    plain = {n: t.tolist() for n, t in runs[0].adapter.items()}
    assert costs
    assert all({n: t.tolist() for n, t in run.adapter.items()} == plain for run in runs[1:])
    efforts = [{s: (e.flops, e.peak_bytes, e.saved_bytes) for s, e in m._efforts.items()} for m in meters if m]
    assert efforts[0] == efforts[1] == efforts[2]
    assert all(meter.total("seconds") > 0 for meter in meters if meter)


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "task"), ALL)
def test_memory_of_a_site(kind: str, task: str) -> None:
    """Held: frozen weights of its spans and 4 numbers for each trained one (AdamW); kept: more in a deeper half."""
    model = adapted(kind, task, "fp32")
    meters: dict[Any, Meter] = {"fedllm": Meter({}), 1: Meter({}), 3: Meter({}), "u": Meter({})}
    play(FedLLM(), model, (4,), n=1, meter=meters["fedllm"], epochs=1)
    for cut in (1, 3):
        play(Split(cut=cut, labels="server"), model, (4,), n=1, meter=meters[cut], epochs=1)
    play(Split(cut=1, labels="client"), model, (4,), n=1, meter=meters["u"], epochs=1)
    effort = {name: meter.effort("site-1") for name, meter in meters.items()}
    assert effort["fedllm"].held_bytes == model.held_bytes(WHOLE) + 16 * numbers(model)
    for cut in (1, 3):
        assert effort[cut].held_bytes == model.held_bytes((-1, cut)) + 16 * numbers(model, cut, head=False)
    assert effort["u"].held_bytes == model.held_bytes((-1, 1), (DEPTH, None)) + 16 * numbers(model, 1)
    kept = {name: e.peak_bytes - e.held_bytes for name, e in effort.items()}
    assert 0 < kept[1] < kept["u"] < kept["fedllm"]
    assert kept[1] < kept[3] < kept["fedllm"]
    assert all(e.saved_bytes == 0 for e in effort.values())  # every graph was used up


def test_kept_bytes_hold_no_weights() -> None:
    """What autograd keeps grows with the batch in proportion; weights, which it keeps too, are not counted."""
    model = adapted("gpt2", precision="fp32")
    kept = []
    for B in (2, 4):
        meter = Meter({})
        ids = torch.randint(2, VOCAB, (B, 6), generator=torch.Generator().manual_seed(0))
        model.observe = meter.work
        with meter.at("site-1"):
            adapter = {n: t.clone().requires_grad_() for n, t in model.initial.items()}
            logits = model.forward(adapter, torch.full((B,), 6), ids, span=(-1, 2))
        kept.append(meter.effort("site-1").saved_bytes)
        del logits
    assert 1.9 < kept[1] / kept[0] < 2.1
    with torch.no_grad(), Meter({}).at("site-1"):
        meter = Meter({})
        model.observe = meter.work
        with meter.at("site-2"):
            model.forward(model.initial, torch.full((4,), 6), ids, span=(-1, 2))
        assert meter.effort("site-2").saved_bytes == 0 and meter.effort("site-2").flops > 0


def test_wider_batches_are_taken_off_again() -> None:
    """With padding to a multiple, what is kept for the backward pass is not held beyond it."""
    model, meter = adapted("gpt2"), Meter()
    setting = lab(model)
    model.pad_to_multiple_of = 8
    try:
        _, wire = federation(FedLLM(), setting, (8, 8), meter)
        rounds(FedLLM(), setting, wire, 1)
    finally:
        model.pad_to_multiple_of = 1
    assert all(effort.saved_bytes == 0 < effort.peak_bytes for effort in meter._efforts.values())
