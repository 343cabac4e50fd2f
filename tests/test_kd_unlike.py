"""Sites with models of their own: another architecture, another size, the server's student a third."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from remotes import Launch, World, write_yaml
from safetensors.torch import load_file

from fedtrio import Config
from fedtrio.bench import Bench
from fedtrio.checks.finding import Seen
from fedtrio.checks.model import examine_model
from fedtrio.compare import compare
from fedtrio.config import SiteConfig
from fedtrio.config_file import load_config
from fedtrio.errors import ConfigError, ModelError
from fedtrio.frameworks import KD
from fedtrio.message import Message, decode, encode
from fedtrio.meter import Meter
from fedtrio.models.load import BUILT_IN
from fedtrio.models.lora import LoraConfig
from fedtrio.plan.predict import predict
from fedtrio.remote import Host, settings_of

SMALL = [
    "data.max_train=60", "data.max_test=12", "data.max_public=10", "rounds=2", "threads=1", "train.precision=fp32",
    "clients=3", "partition={name: iid}", "train.pad_to_multiple_of=1", "frameworks=[kd]",
    "lora.target_modules=all-linear",
]  # fmt: skip


def folder(path: Path, kind: str, words: tuple[str, ...] = ()) -> Path:
    """A tiny random model with the built-in model's tokenizer, and perhaps some words more."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUILT_IN["nano"])
    tokenizer.add_tokens(list(words))
    tokenizer.save_pretrained(path)
    torch.manual_seed(3)
    size: dict[str, Any] = {"vocab_size": 4096 if words else vocabulary(), "num_hidden_layers": 2}
    size |= {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 128}
    size |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": None}
    if kind == "bert":
        transformers.BertModel(transformers.BertConfig(**size)).save_pretrained(path)
    else:
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**size)).save_pretrained(path)
    return path


def vocabulary() -> int:
    return json.loads((BUILT_IN["nano"] / "config.json").read_text())["vocab_size"]


def config(*more: str) -> Config:
    return load_config(settings=[*SMALL, *more])


def shapes(path: Path) -> set[tuple[int, ...]]:
    return {tuple(t.shape) for t in load_file(path / "adapter_model.safetensors").values()}


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two sites with models of their own; the third holds the student's."""
    home = tmp_path_factory.mktemp("models")
    bert, llama = folder(home / "bert", "bert"), folder(home / "llama", "llama")
    return f"kd.models={{site-0: {bert}, '*-1': {llama}}}"


def test_any_mix_of_models_classifies(unlike: str, tmp_path: Path) -> None:
    """Each site trains its own model and hands in logits of one form; FLOPs and sizes are those of its own."""
    setup = config(unlike)
    bench = Bench(setup)
    names = [share.name for share in bench.shares(0)]
    assert len(names) == 3
    results = compare(setup, tmp_path / "run")
    (run,) = results["runs"]
    sites = {site["name"]: site for site in run["sites"]}
    assert len({site["client_flops"] / site["examples"] for site in sites.values()}) == 3
    assert len({site["client_peak_bytes"] for site in sites.values()}) == 3
    assert len({site["bytes_up"] for site in sites.values()}) == 1
    assert all(0 <= site["accuracy"] <= 1 for site in sites.values())


def test_feddf_has_a_student_for_each_model(unlike: str, tmp_path: Path) -> None:
    """All sites' scores are those of their own student, which is saved as a PEFT adapter of its own model."""
    setup = config(unlike, "kd.protocol=feddf", "rounds=1")
    (run,), (foreseen,) = compare(setup, tmp_path / "run")["runs"], predict(setup)
    assert all(foreseen[key] == run[key] for key in ("bytes_up", "bytes_down", "messages", "client_flops"))
    sites = {site["name"]: site for site in run["sites"]}
    assert len({site["bytes_up"] for site in sites.values()}) == 3
    assert run["adapters"].keys() == {"site-0", "site-1"} and run["adapter"] == "kd-0/adapter"
    found = [shapes(tmp_path / "run" / place) for place in (run["adapter"], *run["adapters"].values())]
    assert found[0] != found[1] != found[2] != found[0]
    bench = Bench(config(unlike))
    other = bench.at(bench.config.framework("kd"), "site-0")
    loaded = load_file(tmp_path / "run" / run["adapters"]["site-0"] / "adapter_model.safetensors")
    named = {name.removeprefix("base_model.model."): tensor for name, tensor in loaded.items()}
    initial = other.model(0).initial
    adapter = {name: named[name.replace(".default", "").replace(".modules_to_save", "")] for name in initial}
    lab = other.lab(bench.config.framework("kd"), 0, Meter())
    assert other.evaluate(lab, adapter).accuracy == sites["site-0"]["accuracy"]


@pytest.mark.slow
def test_processes_give_the_same_bits(unlike: str, tmp_path: Path) -> None:
    one, three = (
        compare(config(unlike, f"wire={wire}"), tmp_path / name, jobs=1)["runs"][0]
        for name, wire in (("one", "{name: loopback}"), ("three", "{name: process, workers: 3}"))
    )
    assert one["adapter_sha256"] == three["adapter_sha256"]
    assert [site["client_flops"] for site in one["sites"]] == [site["client_flops"] for site in three["sites"]]


class Pulled(Exception):
    """The plug is."""


@pytest.mark.parametrize(
    "settings",
    [
        ["kd.protocol=fedmd", "unlike"],
        pytest.param(["kd.protocol=feddf", "unlike"], marks=pytest.mark.slow),
        pytest.param(["kd.protocol=fedmkt", "task=causal-lm", "kd.public_weight=0.5"], marks=pytest.mark.slow),
        pytest.param(["kd.protocol=dsfl", "kd.aggregation=power", "kd.public_per_round=4"], marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_broken_off_ends_in_the_same_bits(settings: list[str], unlike: str, tmp_path: Path) -> None:
    """Sites remember their own models, and the server its student."""

    def pull(framework: str, seed: int, entry: object) -> None:
        raise Pulled

    setup = config("data.max_train=24", *(unlike if word == "unlike" else word for word in settings))
    whole = compare(setup, tmp_path / "whole", jobs=1)["runs"][0]
    with pytest.raises(Pulled):
        compare(setup, tmp_path / "broken", pull, jobs=1)
    assert list((tmp_path / "broken" / "kd-0" / "rounds").glob("round-*"))
    resumed = compare(setup, tmp_path / "broken", jobs=1)["runs"][0]
    assert resumed["adapter_sha256"] == whole["adapter_sha256"] and len(resumed["curve"]) == 2
    assert [site["accuracy"] for site in resumed["sites"]] == [site["accuracy"] for site in whole["sites"]]
    ledgers = [(tmp_path / name / "ledger.jsonl").read_bytes() for name in ("whole", "broken")]
    assert ledgers[0] == ledgers[1]


def test_a_site_keeps_its_own_model(unlike: str, tmp_path: Path) -> None:
    """Without a student each site's adapter is saved, and it is of its own model."""
    results = compare(config(unlike, "kd.protocol=fedmd", "kd.server_epochs=0", "rounds=1"), tmp_path / "run")
    (run,) = results["runs"]
    found = [shapes(tmp_path / "run" / place) for place in run["adapters"].values()]
    assert len(found) == 3 and found[0] != found[1] != found[2]
    assert run["accuracy"] == pytest.approx(sum(site["accuracy"] for site in run["sites"]) / 3)


def test_language_models_must_share_a_tokenizer(tmp_path: Path) -> None:
    causal = ["task=causal-lm", "data.max_train=12", "data.max_public=4", "data.max_test=4", "rounds=1"]
    same_words = folder(tmp_path / "same", "llama")
    found = compare(config(*causal, f"kd.models={{site-1: {same_words}}}"), tmp_path / "run")
    assert {entry["name"]: entry["client_flops"] for entry in found["runs"][0]["sites"]}
    assert any("in full they would be" in warning for warning in found["warnings"])  # top-k is the default
    more_words = folder(tmp_path / "more", "llama", ("zebra", "yak"))
    with pytest.raises(
        ConfigError, match=r"holds '.+more', whose tokenizer \(\d+ words\) is another than that of 'nano'"
    ):
        compare(config(*causal, f"kd.models={{site-1: {more_words}}}"), tmp_path / "no")
    own = [f"kd.models={{site-1: {more_words}}}", "lora.target_modules=[c_attn]"]
    with pytest.raises(ModelError, match=r"^site-1 holds '.+more': .*\['c_attn'\] match nothing.*; set kd\.lora"):
        compare(config(*own, "rounds=1"), tmp_path / "no")
    own += ["kd.lora={target_modules: [q_proj]}"]
    compare(config(*own, "rounds=1"), tmp_path / "classes")  # any mix classifies


def test_patterns_and_adapters_of_own_models() -> None:
    method = KD.model_validate({"models": {"bank-north": "a", "bank-*": "b"}, "lora": {"r": 3}})
    for site, model in (("bank-north", "a"), ("bank-x", "b")):
        assert method.model_of(site) == (model, LoraConfig(r=3))
    assert method.model_of("mill") is None and KD().model_of("bank-north") is None
    assert config("kd.models={a: nano}", "kd.lora={r: 2}").resolved().kd.lora.r == 2  # type: ignore[union-attr]


def test_a_site_elsewhere_may_hold_what_the_server_does_not_know(tmp_path: Path) -> None:
    """Its logits are of the form that the server asks for; its frames are those of any site."""
    own = folder(tmp_path / "own", "bert")
    bench = Bench(config("data.train=null"))
    rows = ["text,label", *(f"the printer is broken {n},{bench.corpus.labels[n % 3]}" for n in range(8))]
    (tmp_path / "mine.csv").write_text("\n".join(rows) + "\n")
    site = SiteConfig.model_validate(
        {"data": {"train": str(tmp_path / "mine.csv")}, "kd_model": str(own), "threads": 1}
    )
    host = Host("mill", site, tmp_path / "memory")
    host.welcome(settings_of(bench, "0123456789abcdef"))
    frame = host.answer("s", "kd-0", 1, 0, True, encode(Message("start"), 1))
    method = bench.config.framework("kd")
    lab = bench.lab(method, 0, Meter())
    lab.round = 1
    method.check(lab, "mill", Message("start"), decode(frame))
    assert host._sites["kd-0"]._lab.model.width == 24 != lab.model.width


def test_feddf_needs_the_same_models_at_both_sides(tmp_path: Path) -> None:
    """A server runs its students' models itself: a site whose weights are others is told so before the first round."""
    own, other = folder(tmp_path / "own", "bert"), folder(tmp_path / "other", "llama")
    rows = ["text,label", *(f"the printer is broken {n},{n}" for n in range(8))]
    (tmp_path / "mine.csv").write_text("\n".join(rows) + "\n")

    def meet(models: str, **mine: str) -> None:
        bench = Bench(config("data.train=null", "wire.sites=[mill]", "kd.protocol=feddf", f"kd.models={models}"))
        site = SiteConfig.model_validate({"data": {"train": str(tmp_path / "mine.csv")}, "threads": 1, **mine})
        told = settings_of(bench, "0123456789abcdef")
        told["labels"] = [str(n) for n in range(len(told["labels"]))]
        Host("mill", site, tmp_path / "memory").welcome(told)

    meet(f"{{mill: {own}}}")
    meet(f"{{'mil*': {own}}}", kd_model=str(own))
    with pytest.raises(ModelError, match=r"other differs from the server's \(\w+ here, \w+ there\)"):
        meet(f"{{'mil*': {own}}}", kd_model=str(other))
    with pytest.raises(ModelError, match=r"own differs .* here, no such model: name it in kd\.models there"):
        meet("{}", kd_model=str(own))


def test_the_doctor_looks_at_own_models(unlike: str, tmp_path: Path) -> None:
    setup = config(unlike).resolved()
    found = [finding.text for finding in examine_model(setup, Seen("classification", 20, 3))]
    assert any("bert: 0 MB, for sites with a model of their own (kd.models)" in text for text in found), found
    with pytest.raises(ModelError, match="no such folder"):
        list(examine_model(config(f"kd.models={{a: {tmp_path / 'none'}}}").resolved(), Seen("classification", 20, 3)))


@pytest.mark.slow
def test_over_https_as_in_one_process(tmp_path: Path) -> None:
    """One site brings a model that the server's settings do not name, and holds the common one for FedLLM."""
    world, own = World(tmp_path / "world"), folder(tmp_path / "own", "bert")
    mine = {"data": {"train": "ada.csv", "test": "test.csv"}, "threads": 1, "kd_model": str(own)}
    write_yaml(world.folder / "ada.yaml", mine)
    settings = ["frameworks=[fedllm,kd]", "kd.lora={r: 4, target_modules: all-linear}", "kd.logits=topk:4:logits+int8"]
    with Launch(world, settings) as run:
        run.start()
        run.finish()
        there = run.results()["runs"]
    here = load_config(world.folder / "loop.yaml", [*settings, f"kd.models={{ada: {own}}}"])
    for ours, theirs in zip(there, compare(here, tmp_path / "loop", jobs=1)["runs"], strict=True):
        assert ours["adapter_sha256"] == theirs["adapter_sha256"]
        assert [(s["bytes_up"], s["client_flops"]) for s in ours["sites"]] == [
            (s["bytes_up"], s["client_flops"]) for s in theirs["sites"]
        ]
    flops = {site["name"]: site["client_flops"] / site["examples"] for site in there[1]["sites"]}
    assert flops["ada"] < flops["bob"] / 2
