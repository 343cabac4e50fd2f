"""What the house costs beside a bare PyTorch loop: time of a round, memory of many sites, start of the command line.

    python benchmarks/overhead.py [--repeats 5] [--threads 1] [--only time gpt2 memory help] [--json]

* **time**: one loopback round of FedLLM, and of Split-FedLLM (sflv1; cut 2 with labels at the server, the U-shape, and
  sites that cut before blocks 1, 2 and 3), over the time of a bare loop on an ordinary PEFT model: the same batches,
  precision, optimizer and averaging, nothing of fedtrio's. Pairs are interleaved; the median of their ratios counts.
  Evaluation is outside on both sides. The first round is not timed: in it the meter counts the FLOPs of each shape of
  batch, once, and every measured round finds them counted. CPU seconds count what the round itself took; on a machine
  with other work they are the ones to read. In bf16 the house casts frozen weights once, where autocast does so in
  every forward pass: the last ratio is that over a bare loop which casts its own beforehand too.
* **gpt2**: the same for a model of the size that is fine-tuned in earnest: GPT-2 small's configuration (12 blocks of
  width 768) with random weights and no dropout; three sites with one batch of 16 texts each, and for unlike cuts before
  blocks 2, 3 and 4.
* **memory**: peak RSS of a round with 64 sites minus that with 4, each in a fresh process, with 16 examples a site. All
  texts are cut to 8 tokens: for bf16 on a CPU oneDNN keeps memory for each shape of batch, however few the sites.
* **help**: CPU seconds of `fedtrio --help`, and whether it loads torch.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

SITES = (4, 64)
EXAMPLES_EACH = 16
SPARE_BYTES = 50_000_000


@dataclass(frozen=True)
class Finding:
    """One line of the table; `limit` is None where a number only explains another one."""

    what: str
    measured: float
    limit: float | None
    unit: str
    note: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.limit is None else self.measured <= self.limit


# One round of a framework, as run.py drives it ------------------------------------------------------------------------


def a_round(bench: Any, name: str, **changed: Any) -> Callable[[], dict[str, Any]]:
    """A function that runs round 1 from the initial adapter over loopback and gives the adapter after it."""
    from fedtrio.ledger import Ledger
    from fedtrio.meter import Meter
    from fedtrio.program import drive
    from fedtrio.wires.loopback import Loopback

    method, meter = bench.config.framework(name).model_copy(update=changed), Meter(bench.costs)
    lab = bench.lab(method, 0, meter)
    wire = Loopback(bench.sites(method, lab, meter))
    lab.abreast, lab.round = wire.abreast, 1

    def once() -> dict[str, Any]:
        bench.model(0).observe = lambda key, weights: meter.work(key, weights)
        state = method.setup(lab)
        drive(method.server(lab, state, wire.sites), wire, 1, Ledger(), partial(method.check, lab))
        return dict(method.adapter(lab, state) or {})

    return once


# The bare loop --------------------------------------------------------------------------------------------------------


def bare_model(bench: Any, cast_once: bool) -> Any:
    """An ordinary PEFT model; `cast_once`: the frozen weights of its matrix products are bf16 from the start."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    config = bench.config
    torch.manual_seed(0)
    options = {"attn_implementation": config.attn_implementation, "dtype": torch.float32}
    kind = transformers.AutoModelForSequenceClassification
    base = kind.from_pretrained(bench.path, num_labels=len(bench.corpus.labels), **options)
    base.config.pad_token_id = bench.tokenizer.pad_token_id
    scale = {"r": config.lora.r, "lora_alpha": int(config.lora.lora_alpha)}
    lora = LoraConfig(task_type="SEQ_CLS", **scale, target_modules=config.lora.target_modules, fan_in_fan_out=True)
    model = get_peft_model(base, lora).to(config.device)
    for module in model.modules() if cast_once else ():
        if type(module).__name__ == "Conv1D":
            module.to(torch.bfloat16)
    return model


def bare_round(bench: Any, cast_once: bool = False) -> Callable[[], dict[str, Any]]:
    """The same round as a plain loop over sites and batches. Of fedtrio it takes token ids and their order alone."""
    import torch
    import torch.nn.functional as F
    from torch.nn.utils.rnn import pad_sequence

    from fedtrio.data.batches import epoch_batches

    train, device, pad_id = bench.config.train, torch.device(bench.config.device), bench.tokenizer.pad_token_id
    model = bare_model(bench, cast_once)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    initial = {name: p.detach().clone() for name, p in trainable.items()}

    encoded = bench.encoded["train"]
    ids = [torch.from_numpy(row) for row in encoded.input_ids]
    labels = torch.from_numpy(encoded.targets)
    rows_of = {share.name: share.indices for share in bench.shares(0)}
    order = {
        site: [rows[b] for b in epoch_batches(len(rows), train.batch_size, seed=0, round=1, site=site, epoch=0)]
        for site, rows in rows_of.items()
    }

    def one_site(batches: list[Any]) -> dict[str, Any]:
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(initial[name])
        body = [p for name, p in trainable.items() if "lora_" in name]
        head = [p for name, p in trainable.items() if "lora_" not in name]
        groups = [{"params": body, "lr": train.learning_rate}, {"params": head, "lr": train.head_learning_rate}]
        optimizer = torch.optim.AdamW(groups, weight_decay=train.weight_decay, fused=True)
        for batch in batches:
            ids_BT = pad_sequence([ids[i] for i in batch], batch_first=True, padding_value=pad_id).to(device)
            ids_BT = F.pad(ids_BT, (0, -ids_BT.shape[1] % train.pad_to_multiple_of), value=pad_id)
            mask_BT = (ids_BT != pad_id).long()
            with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
                logits = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
            F.cross_entropy(logits.float(), labels[batch].to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: p.detach().clone() for name, p in trainable.items()}

    def once() -> dict[str, Any]:
        adapters = {site: one_site(batches) for site, batches in order.items()}
        total = sum(len(rows) for rows in rows_of.values())
        return {n: sum(adapters[s][n] * (len(rows_of[s]) / total) for s in adapters) for n in initial}

    return once


def measure_time(threads: int, repeats: int, max_train: int | None) -> Iterator[Finding]:
    yield from ratios("", threads, repeats, f"data.max_train={max_train or 'null'}")


def measure_gpt2(threads: int, repeats: int) -> Iterator[Finding]:
    """GPT-2 small, made here; its tokenizer is the built-in model's, as only the number of tokens matters."""
    import torch
    import transformers

    from fedtrio.models.load import BUILT_IN

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        transformers.AutoTokenizer.from_pretrained(BUILT_IN["nano"]).save_pretrained(folder)
        transformers.logging.disable_progress_bar()
        still: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        transformers.GPT2Model(transformers.GPT2Config(**still)).save_pretrained(folder)
        few = ("data.max_train=48", "clients=3", "partition={name: iid}")
        yield from ratios("GPT-2 small, ", threads, repeats, f"model={folder}", *few)


def ratios(model: str, threads: int, repeats: int, *changed: str) -> Iterator[Finding]:
    """A round of each framework over the bare loop's, with the built-in model or the one that `changed` names."""
    from fedtrio.bench import Bench
    from fedtrio.config_file import load_config

    settings = [f"threads={threads}", "split.cut=2", "split.labels=server", "train.group_by_length=false"]
    settings += ["train.lr_scheduler_type=constant", "train.warmup_ratio=0"]  # as the bare loop trains
    bench = Bench(load_config(None, [*settings, *changed]))
    bare, cast = bare_round(bench), bare_round(bench, cast_once=True)
    cast()
    reference = {name.removeprefix("base_model.model."): value for name, value in bare().items()}
    shares, size = bench.shares(0), bench.config.train.batch_size
    batches = sum(-(-len(share.indices) // size) for share in shares)
    lowest = max(1, bench.model(0).depth // 6)  # before blocks 1, 2 and 3 of the built-in model
    cuts = {share.name: lowest + number % 3 for number, share in enumerate(shares)}
    cases = [("fedllm", "FedLLM", 1.05, {}), ("split", "Split-FedLLM", 1.10, {})]
    cases += [("split", "U-shape", 1.10, {"labels": "client"}), ("split", "Unlike cuts", 1.10, {"cut": cuts})]
    for name, title, limit, differing in cases:
        ours = a_round(bench, name, **differing)
        adapter, start = ours(), bench.model(0).initial  # this round counts the FLOPs
        apart, moved = (max(float((adapter[n] - x[n]).abs().max()) for n in reference) for x in (reference, start))
        assert adapter.keys() == reference.keys() and apart < 0.01 * moved, "the bare loop computes something else"
        turns = []  # each side's wall-clock and CPU seconds
        for repeat in range(repeats):
            order = (bare, ours, cast) if repeat % 2 else (cast, ours, bare)
            turns.append({side: clocked(side) for side in order})

        alone = statistics.median(turn[bare][1] for turn in turns)
        note = f"{repeats} pairs; weights {apart:.0e} apart after moving by {moved:.0e}"
        yield Finding(f"{model}{title} / bare loop, seconds", median_ratio(turns, ours, bare, 0), limit, "x", note)
        note = f"bare loop {alone:.2f} CPU-s, {1e3 * alone / batches:.0f} ms a batch"
        yield Finding(f"{model}{title} / bare loop, CPU seconds", median_ratio(turns, ours, bare, 1), None, "x", note)
        yield Finding(
            f"{model}{title} / bare loop that casts once", median_ratio(turns, ours, cast, 1), None, "x", "CPU seconds"
        )


def median_ratio(turns: list[dict[Any, tuple[float, float]]], side: Any, other: Any, clock: int) -> float:
    return statistics.median(turn[side][clock] / turn[other][clock] for turn in turns)


def clocked(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure_memory(threads: int) -> Iterator[Finding]:
    for name, title in (("fedllm", "FedLLM"), ("split", "Split-FedLLM")):
        few, many = (child("--peak-of", name, str(sites), "--threads", str(threads)) for sites in SITES)
        limit = (SITES[1] - SITES[0]) * 3 * many["adapter_bytes"] + SPARE_BYTES
        grown = many["peak_bytes"] - few["peak_bytes"]
        note = f"{few['peak_bytes'] / 1e6:.0f} and {many['peak_bytes'] / 1e6:.0f} MB"
        yield Finding(f"{title}: peak RSS, {SITES[1]} sites minus {SITES[0]}", grown / 1e6, limit / 1e6, "MB", note)


def child(*arguments: str) -> dict[str, int]:
    """This file again in a fresh process."""
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def peak_of(name: str, sites: int, threads: int) -> None:
    """In the child: one round, then the process's own peak, and the bytes of an adapter."""
    from fedtrio.bench import Bench
    from fedtrio.config_file import load_config

    sizes = [f"clients={sites}", f"data.max_train={EXAMPLES_EACH * sites}", "train.max_length=8"]
    settings = [f"threads={threads}", "partition.name=iid", "split.cut=2", "split.labels=server", *sizes]
    bench = Bench(load_config(None, settings))
    adapter = a_round(bench, name)()
    adapter_bytes = sum(t.numel() * t.element_size() for t in adapter.values())
    print(json.dumps({"peak_bytes": peak_rss(), "adapter_bytes": adapter_bytes}))


def peak_rss() -> int:
    """Of this program: `ru_maxrss` would begin with what the parent held when it started us."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_help(repeats: int) -> Iterator[Finding]:
    seconds = []
    for _ in range(repeats + 1):  # the first one may have to write .pyc files
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([Path(sys.executable).with_name("fedtrio"), "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    yield Finding("fedtrio --help, CPU seconds", statistics.median(seconds[1:]), 0.3, "s", f"median of {repeats}")
    code = "import sys, fedtrio.cli\nsys.argv = ['fedtrio', '--help']\ntry: fedtrio.cli.main()\n"
    code += "except SystemExit: pass\nprint('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    yield Finding("fedtrio --help, torch loaded", float(shown.split()[-1] == "True"), 0.0, "", "1: yes, 0: no")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed pairs, and starts of the command line")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--max-train", type=int, help="fewer training examples in the timed rounds (default: all)")
    every = ["help", "memory", "time", "gpt2"]
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--peak-of", nargs=2, metavar=("FRAMEWORK", "SITES"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if chosen.peak_of:
        return peak_of(chosen.peak_of[0], int(chosen.peak_of[1]), chosen.threads)
    measures = {
        "help": lambda: measure_help(chosen.repeats),
        "memory": lambda: measure_memory(chosen.threads),
        "time": lambda: measure_time(chosen.threads, chosen.repeats, chosen.max_train),
        "gpt2": lambda: measure_gpt2(chosen.threads, chosen.repeats),
    }
    findings = (finding for name in chosen.only for finding in measures[name]())
    if chosen.json:
        return print(json.dumps([asdict(f) | {"met": f.met} for f in findings], indent=1))
    print(f"{'':<44} {'measured':>11} {'limit':>9}  met")
    for f in findings:  # each line as soon as it is known
        limit, met = ("", "") if f.limit is None else (f"{f.limit:.3g} {f.unit}", "yes" if f.met else "NO")
        print(f"{f.what:<44} {f'{f.measured:.3f} {f.unit}':>11} {limit:>9}  {met:<3}  {f.note}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
