"""Whole comparisons with the built-in model and data: what they leave behind, and that it is the same each time."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from same import timeless

from fedtrio.bench import Bench
from fedtrio.compare import compare as _compare
from fedtrio.config import Config
from fedtrio.config_file import load_config
from fedtrio.frameworks import FRAMEWORKS
from fedtrio.meter import Meter
from fedtrio.report.folders import written_anew

compare = partial(_compare, jobs=1)
SMALL = ["data.max_train=120", "data.max_test=40", "data.max_public=24", "rounds=2", "threads=1"]

KEYS = {
    "framework", "seed", "accuracy", "loss", "rounds", "bytes_up", "bytes_down", "payload_up", "payload_down",
    "client_flops", "client_seconds", "server_seconds", "round_seconds", "client_peak_bytes", "messages",
    "client_accuracy", "adapter", "curve",
}  # fmt: skip


def config(*more: str) -> Config:
    return load_config(settings=[*SMALL, *more])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("end-to-end")


@pytest.fixture(scope="module")
def results(place: Path) -> dict[str, Any]:
    """All five frameworks at fp32: the run folder is `place / "run"`, every frame lies in `place / "frames"`."""
    return compare(config("train.precision=fp32"), place / "run", record_frames=place / "frames")


def runs_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["framework"]: entry for entry in results["runs"]}


def ledger_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(folder: Path, entry: dict[str, Any]) -> bytes:
    return (folder / entry["adapter"] / "adapter_model.safetensors").read_bytes()


# What a comparison leaves behind --------------------------------------------------------------------------------------


def test_results_have_every_key(results, place):
    assert results == json.loads((place / "run" / "results.json").read_text(encoding="utf-8"))
    runs = runs_of(results)
    assert tuple(runs) == FRAMEWORKS and results["schema_version"] == 1
    for name, entry in runs.items():
        assert entry.keys() >= KEYS, KEYS - entry.keys()
        assert entry["client_accuracy"].keys() == {"mean", "min", "p10", "jain"}
        assert 0 <= entry["client_accuracy"]["min"] <= entry["client_accuracy"]["mean"] + 1e-12 <= 1
        assert [point["round"] for point in entry["curve"]] == [1, 2] and entry["rounds"] == 2
        for point in entry["curve"]:
            assert point.keys() >= {"round", "accuracy", "bytes_up", "bytes_down", "client_flops"}
        last = entry["curve"][-1]
        assert all(last[key] == entry[key] for key in ("accuracy", "loss", "bytes_up", "bytes_down", "client_flops"))
        assert all(last[key] == entry[key] for key in ("messages", "client_seconds", "server_seconds"))
        assert entry["client_seconds"] + entry["server_seconds"] <= entry["round_seconds"] + 0.01  # one after the other
        assert 0 <= entry["accuracy"] <= 1 and (name == "local" or (entry["accuracy"] * 40).is_integer())
        assert math.isfinite(entry["loss"]) and entry["loss"] > 0
        flops = [point["client_flops"] for point in entry["curve"]]
        assert 0 < flops[0] < flops[1] == sum(site["client_flops"] for site in entry["sites"])
        assert entry["client_seconds"] > 0 and entry["client_peak_bytes"] > 5_000_000  # nano weighs 10 MB, its half 5
        assert (place / "run" / entry["adapter"] / "adapter_config.json").is_file()
    names = [site["name"] for site in results["data"]["partitions"][0]["sites"]]
    assert len(names) == 6 and sum(s["examples"] for s in results["data"]["partitions"][0]["sites"]) == 120
    for name in ("fedllm", "kd", "split", "local"):
        assert sorted(site["name"] for site in runs[name]["sites"]) == sorted(names)
    assert len(runs["centralized"]["sites"]) == 1


def test_which_texts_were_answered_right(results):
    told = {name: entry["right"] for name, entry in runs_of(results).items() if "right" in entry}
    assert told.keys() == {"fedllm", "kd", "split", "centralized"}  # `local` has as many models as sites
    assert len({right["sha256"] for right in told.values()}) == 1
    for name, right in told.items():
        bits = "".join(f"{int(digit, 16):04b}" for digit in "".join(right["bits"]))
        assert right["texts"] == len(bits) == 40 and bits.count("1") / 40 == runs_of(results)[name]["accuracy"]
    assert told["fedllm"] == told["split"] != told["kd"]  # the first two end in the same weights


def test_the_report_can_be_written_anew(results, place):
    path = place / "run" / "report.html"
    assert written_anew(place / "run") == {path: path.read_text(encoding="utf-8")}


def test_bytes_and_messages(results, place):
    runs, ledger = runs_of(results), ledger_of(place / "run")
    for name in ("centralized", "local"):  # nothing crosses a wire
        assert all(runs[name][key] == 0 for key in ("bytes_up", "bytes_down", "payload_up", "payload_down", "messages"))
    assert {line["framework"] for line in ledger} == {"fedllm", "kd", "split"}
    for name in ("fedllm", "kd", "split"):
        entry, lines = runs[name], [line for line in ledger if line["framework"] == name]
        for direction in ("up", "down"):
            chosen = [line for line in lines if line["direction"] == direction]
            assert entry[f"bytes_{direction}"] == sum(line["bytes"] for line in chosen)
            assert entry[f"payload_{direction}"] == sum(line["payload"] for line in chosen)
            assert entry[f"bytes_{direction}"] == sum(site[f"bytes_{direction}"] for site in entry["sites"])
            assert 0 < entry[f"payload_{direction}"] < entry[f"bytes_{direction}"]
            first = sum(line["bytes"] for line in chosen if line["round"] == 1)
            assert entry["curve"][0][f"bytes_{direction}"] == first < entry[f"bytes_{direction}"]
        assert entry["messages"] == sum(line["messages"] for line in lines)
    assert runs["kd"]["payload_up"] == 2 * 6 * 24 * 20 * 4  # rounds, sites, public texts, labels, fp32
    adapter = sum(t.nbytes for t in safetensors.torch.load(weights(place / "run", runs["fedllm"])).values())
    assert runs["fedllm"]["payload_up"] == runs["fedllm"]["payload_down"] == 2 * 6 * adapter
    batches = sum(-(-site["examples"] // 16) for site in runs["split"]["sites"])
    assert runs["split"]["messages"] == 2 * 2 * (batches + 6)  # N batches cost N + 1 exchanges


def test_frames_on_disk_are_the_ledger(results, place):
    """Every counted byte lies in a file that safetensors opens."""
    for name in ("fedllm", "kd", "split"):
        lines = [line for line in ledger_of(place / "run") if line["framework"] == name]
        frames = sorted((place / "frames" / f"{name}-0").iterdir())
        assert len(frames) == sum(line["messages"] for line in lines)
        assert sum(frame.stat().st_size for frame in frames) == sum(line["bytes"] for line in lines)
        sizes: Counter[tuple[int, str, str, str]] = Counter()
        payload = 0
        for frame in frames:
            with safetensors.safe_open(str(frame), framework="pt") as opened:
                head = json.loads(opened.metadata()["fedtrio"])
                payload += sum(opened.get_tensor(key).nbytes for key in opened.keys())  # noqa: SIM118
            _, round_, direction, rest = frame.stem.split("-", 3)
            assert f"round{head['round']}" == round_
            site = next(line["site"] for line in lines if rest.startswith(f"{line['site']}-"))
            sizes[head["round"], site, direction, head["kind"]] += frame.stat().st_size
        assert sizes == {(e["round"], e["site"], e["direction"], e["kind"]): e["bytes"] for e in lines}
        assert payload == sum(line["payload"] for line in lines)


def test_no_private_text_leaves_a_site(results, place):
    """The reference of what crosses is the frames: no run sends texts or token ids, and only `split` sends labels."""
    sent = {
        name: {
            key
            for frame in (place / "frames" / f"{name}-0").iterdir()
            for key in safetensors.torch.load_file(str(frame))
            if "-up-" in frame.name
        }
        for name in ("fedllm", "kd", "split")
    }
    assert sent["kd"] == {"logits"}
    assert all("lora_" in key or "score" in key for key in sent["fedllm"])
    assert {key for key in sent["split"] if "lora_" not in key} == {"h", "labels"}


def test_adapters_open_in_peft(results, place):
    """`PeftModel.from_pretrained` on the plain base gives the accuracy that was reported, head included."""
    import peft
    import transformers

    bench = Bench(config("train.precision=fp32"))
    texts, labels = bench.corpus.test.prompts, bench.corpus.test.labels
    assert labels is not None
    batch = bench.tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
    found: dict[str, torch.Tensor] = {}
    for seed, name in enumerate(("fedllm", "kd", "centralized")):
        entry = runs_of(results)[name]
        torch.manual_seed(1000 + seed)  # the base's own new head must not matter
        base = transformers.AutoModelForSequenceClassification.from_pretrained(bench.path, num_labels=20)
        opened = peft.PeftModel.from_pretrained(base, str(place / "run" / entry["adapter"])).eval()
        with torch.no_grad():
            found[name] = opened(**batch).logits
        right = found[name].argmax(-1).numpy() == labels
        assert right.sum() / 40 == entry["accuracy"] and 0 < right.sum() < 40
        assert "".join(entry["right"]["bits"]) == np.packbits(right).tobytes().hex()  # text by text, in their order
        loss = float(torch.nn.functional.cross_entropy(found[name], torch.from_numpy(labels)))
        assert math.isclose(loss, entry["loss"], rel_tol=1e-5)
    for one, other in itertools.combinations(found.values(), 2):
        assert float((one - other).abs().max()) > 1e-3


# The same each time, and the same both ways ---------------------------------------------------------------------------


def test_same_configuration_gives_the_same_bytes(results, place):
    torch.manual_seed(7)  # a run must not depend on what was drawn before it
    again = compare(load_config(place / "run" / "config.yaml"), place / "again")
    assert timeless(again["runs"]) == timeless(results["runs"])
    assert timeless(again["data"]) == results["data"]
    for name in ("ledger.jsonl", "config.yaml"):
        assert (place / "again" / name).read_bytes() == (place / "run" / name).read_bytes()
    for one, other in zip(results["runs"], again["runs"], strict=True):
        assert one["adapter_sha256"] == other["adapter_sha256"]
        assert weights(place / "run", one) == weights(place / "again", other)


def test_other_seed_is_another_run(place):
    more = ["train.precision=fp32", "frameworks=[fedllm]", "rounds=1", "data.max_train=48"]
    first, second = (
        compare(config(*more, f"seeds={seeds}"), place / f"seeds{len(seeds)}")["runs"] for seeds in ([0, 1], [1])
    )
    assert [entry["seed"] for entry in first] == [0, 1]
    assert first[0]["adapter_sha256"] != first[1]["adapter_sha256"] == second[0]["adapter_sha256"]


def test_fedllm_is_split(results, place):
    """SFLv1 averages both halves as FedAvg averages the whole, so the adapters are equal to the last bit."""
    runs = runs_of(results)
    assert results["config"]["split"]["variant"] == "sflv1" and results["config"]["split"]["cut"] == 2
    assert weights(place / "run", runs["fedllm"]) == weights(place / "run", runs["split"])
    assert runs["fedllm"]["client_flops"] > runs["split"]["client_flops"]
    others = {runs[name]["adapter_sha256"] for name in ("fedllm", "kd", "centralized", "local")}
    assert len(others) == 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_client_split_is_centralized(precision, place):
    more = ["clients=1", "partition={name: iid}", "frameworks=[split,centralized]", "data.max_train=60"]
    folder = place / f"one-{precision}"
    runs = runs_of(compare(config(*more, f"train.precision={precision}"), folder))
    assert weights(folder, runs["split"]) == weights(folder, runs["centralized"])
    assert timeless(runs["split"]["curve"][-1])["loss"] == runs["centralized"]["loss"]
    assert runs["split"]["messages"] == 2 * 2 * (4 + 1) and runs["centralized"]["messages"] == 0


def test_bf16_is_on(place):
    """The test above would pass with fp32 twice."""
    folders = {name: place / f"one-{name}" for name in ("fp32", "bf16")}
    if not all(folder.is_dir() for folder in folders.values()):
        pytest.skip("runs after the two before it")
    contents = {
        (folder / "split-0" / "adapter" / "adapter_model.safetensors").read_bytes() for folder in folders.values()
    }
    assert len(contents) == 2


# Language modelling ---------------------------------------------------------------------------------------------------


def test_perplexity_falls(tmp_path):
    """A tiny text file, the three frameworks, the perplexity of the untouched model before them."""
    stories = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260k"
    names, places = ("clerk", "nurse", "pilot", "baker"), ("office", "ward", "tower", "shop")
    lines = [
        f"Ticket {n}: the {who} in the {where} cannot log in to the {what} since {day}."
        for n, (who, where, what, day) in enumerate(
            itertools.product(names, places, ("portal", "scanner"), ("Monday", "Friday")), start=100
        )
    ]
    (tmp_path / "tickets.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(
        "task: causal-lm\nrounds: 2\nclients: 2\nthreads: 1\nframeworks: [fedllm, kd, split]\n"
        "data: {train: tickets.txt, test: 0.2, public: 0.2}\n"
        "train: {learning_rate: 1e-2, batch_size: 4, precision: fp32, max_length: 48}\nkd: {server_epochs: 3}\n",
        encoding="utf-8",
    )
    settings = [f"model={stories}"] if stories.is_dir() else []
    setup = load_config(tmp_path / "mine.yaml", settings)
    bench = Bench(setup)
    assert bench.config.split.labels == "client" and bench.config.data.train == str(tmp_path / "tickets.txt")
    before = bench.evaluate(bench.lab(setup.framework("fedllm"), 0, Meter()), bench.model(0).initial).perplexity
    results = compare(setup, tmp_path / "run")
    runs = runs_of(results)
    for name, entry in runs.items():
        perplexities = [before, *(point["perplexity"] for point in entry["curve"])]
        assert perplexities == sorted(perplexities, reverse=True), (name, perplexities)
        assert entry["perplexity"] < 0.8 * before, (name, perplexities)
        assert math.isclose(entry["perplexity"], math.exp(entry["loss"]))
    assert weights(tmp_path / "run", runs["fedllm"]) == weights(tmp_path / "run", runs["split"])
    kinds = {line["kind"] for line in ledger_of(tmp_path / "run") if line["framework"] == "split"}
    assert kinds == {"adapter", "activations", "activation gradients"}  # neither labels nor tokens
