"""Predictions against runs: bytes and FLOPs to the last one, on tiny models of every kind and on every option."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tiny import PAD, adapted, config_of, examples, tiny
from tiny import lab as tiny_lab
from typer.testing import CliRunner

from fedtrio.cli import app
from fedtrio.coding import Coding, codecs_of
from fedtrio.config import Config
from fedtrio.config_file import load_config
from fedtrio.data.private import PrivateData
from fedtrio.errors import ConfigError, ModelError
from fedtrio.frameworks import PROTOCOLS, FedLLM, Split
from fedtrio.frameworks.split_cuts import of_batch
from fedtrio.ledger import Ledger
from fedtrio.meter import Meter
from fedtrio.models.adapter import AdaptedModel, adapt
from fedtrio.models.lora import LoraConfig
from fedtrio.plan.family import Family, described, family
from fedtrio.plan.predict import COUNTS, Assumed, model_of, play, predict
from fedtrio.plan.profiles import DEVICES, LINKS, Device, Link, device, link, timed
from fedtrio.plan.rehearsal import DryLab, Place
from fedtrio.plan.split import CACHED, chosen
from fedtrio.plan.weightless import How
from fedtrio.program import Site, drive
from fedtrio.run import run, sample
from fedtrio.wires.loopback import Loopback

SIZES = (5, 9, 3)
FAMILIES: dict[Any, Family] = {}


def kin(kind: str, task: str, precision: str) -> Family:
    key = (kind, task, precision)
    if key not in FAMILIES:
        lora = LoraConfig(r=4, lora_alpha=8)
        FAMILIES[key] = Family(config_of(kind), task, 5, lora, precision)  # type: ignore[arg-type]
    return FAMILIES[key]


def both(
    method, kind="gpt2", task="classification", up="none", down="none", precision="fp64", ranks=None, n=2,
    participation=1.0, **train,
):  # fmt: skip
    """A run's ledger, efforts of its sites, and the rehearsal of the same."""
    coding = Coding(0, codecs_of(up, "up"), codecs_of(down, "down"))
    real = tiny_lab(adapted(kind, task, precision), rounds=n, abreast=1, **train)
    model = kin(kind, task, precision).model(4)
    dry = DryLab(model, real.train, real.public, 0, n, PAD, abreast=1)
    meter, ledger = Meter(), Ledger()
    real.hold, real.model.observe = meter.hold, meter.work
    sites, places, counted = {}, {}, Meter(COUNTS)
    for i, size in enumerate(SIZES):
        name = f"site-{i + 1}"
        data = PrivateData(examples(task, size, seed=i), name, 0, real.train.batch_size, real.train.epochs, PAD)
        sites[name] = Site(name, data, method, real, meter, coding=coding)
        places[name] = Place(name, dry, data, counted)
    for lab in (real, dry):
        lab.sites, lab.ranks = list(sites), ranks or {}
    wire, state = Loopback(sites), method.setup(real)
    for real.round in range(1, n + 1):
        cohort = sample(wire.sites, participation, 0, real.round)
        drive(method.server(real, state, cohort), wire, real.round, ledger, coding=coding)
    return ledger, meter, play(method, dry, places, coding, n, participation)


def check(found) -> None:
    """Every entry of the ledger is equal, and so are FLOPs; peak memory too, as it is found by the same rules."""
    ledger, meter, run = found
    assert run.ledger.saved() == ledger.saved()
    for name, place in run.sites.items():
        ours, theirs = place.meter.effort(name), meter.effort(name)
        assert ours.flops == theirs.flops
        assert ours.peak_bytes == pytest.approx(theirs.peak_bytes, rel=0.02)


# Bytes and FLOPs of runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["fedavg", "rolora", "fedsb"])
def test_fedllm(aggregation: str) -> None:
    check(both(FedLLM(aggregation=aggregation), n=2))


def test_stacks_that_grow_with_mixed_ranks_and_sites_that_miss_rounds() -> None:
    check(both(FedLLM(aggregation="flora"), ranks={"site-1": 2, "site-2": 4, "site-3": 3}, n=3, participation=0.67))


@pytest.mark.parametrize("codec", ["int8", "topk:0.1+int8"])
def test_codecs_of_adapters(codec: str) -> None:
    check(both(FedLLM(), up=codec, n=1))


@pytest.mark.parametrize("settings", [{}, {"logits": "topk:2:logits+fp16"}, {"protocol": "feddf"}])
def test_kd(settings: dict[str, Any]) -> None:
    method = PROTOCOLS[settings.get("protocol", "standard")](**settings)
    check(both(method.resolved(False, False), "bert"))


@pytest.mark.slow
def test_kd_of_a_language_model() -> None:
    check(both(PROTOCOLS["fedmkt"](protocol="fedmkt").resolved(False, True), "llama", "causal-lm", n=1))


SPLIT = [{}, {"cut": 1, "labels": "client", "last_blocks": 2}, {"variant": "concatenated", "cut": 1}]


@pytest.mark.parametrize("settings", SPLIT)
def test_split(settings: dict[str, Any]) -> None:
    check(both(Split(**settings).decided("classification"), "bert", n=1, max_grad_norm=1.0))


def test_split_of_a_language_model() -> None:
    check(both(Split(local_loss=True, send_every=2).decided("causal-lm"), "llama", "causal-lm", n=1))
    check(both(Split().decided("causal-lm"), "llama", "causal-lm", n=1))


@pytest.mark.parametrize(
    ("kind", "labels"), [("bert", "server"), pytest.param("gpt2", "client", marks=pytest.mark.slow)]
)
def test_an_automatic_cut_is_that_which_a_run_chooses(kind: str, labels: str) -> None:
    """One site computes slower than the server, one has memory for three blocks, one for all."""
    real, last = tiny_lab(adapted(kind)), None if labels == "server" else 0
    costs = of_batch(real.model, real.train, last)
    assert costs == of_batch(kin(kind, "classification", "fp64").model(4), real.train, last)
    method = Split(
        cut="auto", labels=labels, server_flops_per_second=1e9, site_bytes_per_second=1e12,
        site_flops_per_second={"site-1": 1e8, "others": 1e12},
        site_memory_bytes={"site-2": costs.memory[3], "others": 1e12},
    )  # fmt: skip
    ledger, meter, run = both(method, kind, n=1)
    check((ledger, meter, run))
    cuts = {name: group["cut"] for group in chosen(run, method) for name in group["sites"]}
    assert cuts == {"site-1": 1, "site-2": 3, "site-3": 4}


STANDARD = PROTOCOLS["standard"]()
EXPERTS = [
    ("mixtral", FedLLM(), "classification"),
    ("qwen2_moe", Split(), "causal-lm"),
    pytest.param("qwen3_moe", STANDARD.resolved(False, False), "classification", marks=pytest.mark.slow),
    pytest.param("qwen3_moe", Split(), "classification", marks=pytest.mark.slow),
    pytest.param("qwen2_moe", FedLLM(), "classification", marks=pytest.mark.slow),
    pytest.param("mixtral", STANDARD.resolved(False, True), "causal-lm", marks=pytest.mark.slow),
    pytest.param("mixtral", Split(), "causal-lm", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "method", "task"), EXPERTS)
def test_mixtures_of_experts(kind: str, method: Any, task: str) -> None:
    """Each token is routed to 2 of 4 experts, whichever these are, and so is padding."""
    settled = method.decided(task) if isinstance(method, Split) else method
    check(both(settled, kind, task, precision="fp32", n=1))


@pytest.mark.parametrize("codec", ["int4", "lowrank:2"])
def test_codecs_at_the_cut(codec: str) -> None:
    given = {"activations": codec, "gradients": codec}
    check(both(Split().decided("classification"), "bert", up=given, down=given, n=1))


@pytest.mark.parametrize("cache", ["fixed", pytest.param("adaptive", marks=pytest.mark.slow)])
def test_a_cache_has_an_upper_bound(cache: str) -> None:
    method = Split(cache=cache, cache_threshold=0.9).decided("causal-lm")  # type: ignore[arg-type]
    ledger, meter, run = both(method, "llama", "causal-lm", n=2)
    assert run.bounds == {CACHED}
    assert ledger.total("bytes") < run.ledger.total("bytes")
    for entry, bound in zip(ledger, run.ledger, strict=True):
        assert entry.messages == bound.messages and entry.bytes <= bound.bytes
    assert run.sites["site-1"].meter.effort("site-1").flops == meter.effort("site-1").flops


def test_a_dry_run_tells_what_the_run_then_counts() -> None:
    """By the door that users take: the built-in model in the machine's own precision, real texts and partition."""
    given = ["rounds=1", "data.max_train=40", "data.max_public=12", "data.max_test=6", "seeds=[3]"]
    speeds = ["split.site_flops_per_second={bank: 1e8, others: 1e12}", "split.server_flops_per_second=1e9"]
    auto = ["split.cut=auto", *speeds]
    config = load_config(None, [*given, *auto, 'frameworks=["fedllm", "split", "centralized"]'])
    for found in predict(config):
        assert [group["cut"] for group in found.get("cuts", [])] == ([1, 4] if found["framework"] == "split" else [])
        real = run(config, found["framework"], found["seed"])
        same = (
            "bytes_up",
            "bytes_down",
            "payload_up",
            "payload_down",
            "messages",
            "client_flops",
            "kinds",
            "left_sites",
        )
        assert {key: found[key] for key in same} == {key: real[key] for key in same}
        assert found["client_peak_bytes"] == pytest.approx(real["client_peak_bytes"], rel=0.2)
        for ours, theirs in zip(found["sites"], real["sites"], strict=True):
            assert ours.items() <= {**theirs, "client_peak_bytes": ours["client_peak_bytes"]}.items()
        assert not found["bounds"] and found["how"]["bytes"] == "exact"


# Numbers worked out by hand -------------------------------------------------------------------------------------------


def shaped(lora: LoraConfig, task: str, **shape: Any):
    """A model by shape alone, with its adapter, in fp32."""
    found = described(shape)
    return family(found.to_json_string(use_diff=False), task, 77, lora.model_dump_json(), "fp32", 1).model(lora.rank)  # type: ignore[arg-type]


def numbers(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def test_gpt2_small_as_worked_out_by_hand() -> None:
    """d = 768, L = 12, V = 50257: P = Vd + 1024d + L(12d² + 13d) + 2d; r = 8 on c_attn; 1000 texts of 32 tokens."""
    config = Config.model_validate(
        {"model": "nano", "clients": 1, "rounds": 1, "lora": {"r": 8, "target_modules": ["c_attn"]},
         "train": {"precision": "fp32"}, "frameworks": ["fedllm", "kd", "split"]}
    )  # fmt: skip
    shape, assumed, d = {"model_type": "gpt2", "pad_token_id": 0}, Assumed(1000, 32, 77, 1000), 768
    model = model_of(config, 77, shape)
    assert model.parameters == 124_439_808 and model.held_bytes((-1, 2)) == 4 * (1024 * d + 50257 * d + 2 * 7_087_872)
    assert numbers(model.initial) == 294_912 + 59_136

    fedllm, kd, split = predict(config, assumed, shape)
    assert fedllm["payload_up"] == fedllm["payload_down"] == 1_416_192
    assert kd["payload_up"] == kd["payload_down"] == 308_000
    at_sync, labels = 4 * 2 * 8 * (d + 3 * d), 4 * 1000
    assert split["payload_up"] == 98_304_000 + labels + at_sync and split["payload_down"] == 98_304_000 + at_sync
    assert at_sync == 196_608

    def per_token(blocks: int) -> int:  # forward: 24d² + 4Sd + 8rd in each block
        return blocks * (24 * d * d + 4 * 32 * d + 8 * 8 * d)

    head = 2 * d * 77 * 32  # GPT-2 applies it to every token
    forward = 32 * per_token(12) + head
    assert forward == pytest.approx(5.49e9, rel=2e-3)
    # backward: dX of all but the lowest matrix, attention twice, A and B twice and dX of the lowest A never
    backward = 32 * (12 * (24 * d * d + 8 * 32 * d + 16 * 8 * d) - 6 * d * d - 2 * 8 * d) + 2 * head
    assert fedllm["client_flops"] == pytest.approx(1000 * (forward + backward), rel=0.01)
    assert kd["client_flops"] == pytest.approx(2.73e13, rel=0.01)
    assert split["client_flops"] / fedllm["client_flops"] == pytest.approx(0.158, abs=0.002)


WIRED = [
    pytest.param("fedllm", {"fedllm": {"aggregation": "ffa"}}, 1_121_280, marks=pytest.mark.slow),
    pytest.param("fedllm", {"fedllm": {"aggregation": "fedsb"}}, 239_616, marks=pytest.mark.slow),
    ("kd", {"kd": {"logits": "fp16"}}, 154_000),
    ("kd", {"kd": {"logits": "topk:8:absent+fp16", "aggregation": "union"}}, 24_000),
    ("split", {"wire": {"up": {"activations": "fp16"}}}, 49_152_000 + 4_000 + 196_608),
    ("split", {"wire": {"up": {"activations": "int8"}}}, 24_640_000 + 4_000 + 196_608),
    ("split", {"split": {"labels": "client"}}, 196_608_000 + 196_608 + 4 * 59_136),
]


@pytest.mark.parametrize(("name", "changes", "payload"), WIRED)
def test_bytes_of_gpt2_small_by_method_and_codec(name: str, changes: dict[str, Any], payload: int) -> None:
    tree = {"clients": 1, "rounds": 1, "lora": {"r": 8, "target_modules": ["c_attn"]}, "train": {"precision": "fp32"}}
    config = Config.model_validate({**tree, "frameworks": [name], **changes})
    (entry,) = predict(config, Assumed(1000, 32, 77, 1000), {"model_type": "gpt2", "pad_token_id": 0})
    assert entry["payload_up"] == payload


LLAMA2 = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008}
LLAMA3 = LLAMA2 | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}


def test_llamas_as_worked_out_by_hand() -> None:
    """P = 2Vd + L(2d² + 2d·d_kv + 3df + 2d) + d, and r(i + o) for each adapted matrix."""
    few = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    seven, eight = shaped(few, "causal-lm", **LLAMA2), shaped(few, "causal-lm", **LLAMA3)
    assert (seven.parameters, numbers(seven.initial)) == (6_738_415_616, 4_194_304)
    assert (eight.parameters, numbers(eight.initial)) == (8_030_261_248, 3_407_872)
    assert numbers(shaped(LoraConfig(r=16), "causal-lm", **LLAMA2).initial) == 39_976_960
    assert seven.held_bytes((-1, 1)) == 4 * (131_072_000 + 202_383_360)


def test_mixtral_as_worked_out_by_hand() -> None:
    """P = 2Vd + L(2d² + 2d·d_kv + 3Edf + Ed + 2d) + d; of E experts a token costs its k: 6kdf, and the router 2dE."""
    d, f, L, E, V = 4096, 14336, 32, 8, 32000
    seven = shaped(LoraConfig(r=8), "causal-lm", model_type="mixtral")
    assert seven.parameters == 2 * V * d + L * (2 * d * d + 2 * d * 1024 + 3 * E * d * f + E * d + 2 * d) + d
    assert seven.parameters == 46_702_792_704
    assert numbers(seven.initial) == L * 8 * (2 * 2 * d + 2 * (d + 1024))  # of attention alone
    B, T, d, f, L, E, V, k, r = 3, 7, 32, 48, 4, 4, 97, 2, 4
    block = 6 * d * d + 2 * r * (2 * 2 * d + 2 * (d + d // 2)) + 4 * T * d + 2 * d * E + 6 * k * d * f
    cost, _ = kin("mixtral", "causal-lm", "fp32").model(r).cost((B, T), (-1, None), How())
    assert cost.flops == B * T * (L * block + 2 * d * V)


def test_blocks_with_and_without_experts_are_told_apart() -> None:
    config = config_of("qwen2_moe")
    config.decoder_sparse_step = 2  # experts in every second block
    mixed, alike = (
        Family(found, "causal-lm", 5, LoraConfig(r=4), "fp32").model(4) for found in (config, config_of("qwen2_moe"))
    )
    assert mixed.ghost.depth == 4 and alike.ghost.depth == 2
    assert mixed.cost((2, 5), (-1, None), How())[0].flops < alike.cost((2, 5), (-1, None), How())[0].flops


def test_experts_are_no_layers() -> None:
    for targets, precision, said in (
        (["q_proj", "gate"], "fp32", "reach experts or their router.*'k_proj', 'o_proj', 'q_proj', 'v_proj'"),
        ("all-linear", "fp64", "fp32 and bf16 alone"),
    ):
        with pytest.raises(ModelError, match=said):
            made = adapt(tiny("mixtral"), LoraConfig(target_modules=targets), "classification")
            AdaptedModel(made, "classification", precision)


@pytest.mark.slow
def test_a_step_of_llama_2_at_the_cut() -> None:
    """8 texts of 512 tokens in fp16: 33.6 MB each way, more than the adapter's 8.4 MB in a whole round."""
    config = Config.model_validate(
        {"task": "causal-lm", "clients": 1, "rounds": 1, "frameworks": ["split"], "split": {"cut": 1},
         "lora": {"target_modules": ["q_proj", "v_proj"]}, "train": {"batch_size": 8, "max_length": 512},
         "wire": {"up": {"activations": "fp16"}}}
    )  # fmt: skip
    (entry,) = predict(config, Assumed(8, 512, 2, 0), LLAMA2)
    sent = {kind["kind"]: kind["payload"] for kind in entry["kinds"] if kind["direction"] == "up"}
    assert sent["activations"] == 8 * 512 * 4096 * 2 == 33_554_432 > 2 * 4_194_304


# Time, energy, words --------------------------------------------------------------------------------------------------


def test_seconds_and_joules_by_hand() -> None:
    at, over, server = Device(100.0, 50.0, 1.0), Link(10.0, 20.0, 0.5, 2.0), Device(1000.0, 1.0, 1.0)
    slow = {"client_flops": 2000, "bytes_up": 40, "bytes_down": 60, "messages": 8}
    quick = {"client_flops": 20, "bytes_up": 4, "bytes_down": 6, "messages": 8}
    found = timed({"rounds": 2, "sites": [quick, slow], "server_flops": 6000}, at, over, server)
    assert found["compute_seconds"] == 10 and found["transfer_seconds"] == (4 + 3) / 2 and found["latency_seconds"] == 1
    assert found["server_seconds"] == 3 and found["seconds_per_round"] == 17.5
    assert found["joules_per_site_and_round"] == (2000 / 50 + 100 * 2) / 2


def test_profiles_by_name_and_of_ones_own() -> None:
    assert device("phone") == DEVICES["phone"] and link("4G") == LINKS["4g"]
    own = device("flops_per_second=7,memory_bytes=1e9")
    assert (own.flops_per_second, own.memory_bytes, own.flops_per_joule) == (7, 1e9, DEVICES["laptop"].flops_per_joule)
    with pytest.raises(ConfigError, match="did you mean 'laptop'"):
        device("labtop")
    with pytest.raises(ConfigError, match="did you mean 'up_bytes_per_second'"):
        link("up_byte_per_second=3")
    with pytest.raises(ConfigError, match="above 0"):
        link("round_trip_seconds=-1")


WRONG = [
    (["--set", "split.cut=9", "--model", "nano"], ModelError, "choose 0 to 4"),
    (["--set", "split.cut=auto", "--set", "split.site_memory_bytes=9"], ConfigError, "auto finds no cut from"),
    (["--shape", "model_type=lama"], ConfigError, "did you mean 'llama'"),
    (["--shape", "model_type=llama,hidden_sice=3"], ConfigError, "did you mean 'hidden_size'"),
    (["--shape", "model_type=gpt2,n_layer=0"], ConfigError, "n_layer is a whole number above 0, not 0"),
    (["--shape", "model_type=gpt2,hidden_size=-3"], ConfigError, "hidden_size is a whole number above 0, not -3"),
    (["--shape", "model_type=gpt2", "--task", "causal"], ConfigError, "did you mean 'causal-lm'"),
    (["--device", "flops=1"], ConfigError, "did you mean 'flops_per_second'"),
    (["--shape", "hidden_size=3"], ConfigError, "needs model_type"),
    (["--link", "6g"], ConfigError, "there are 4g, 5g, dsl"),
    (["--model", "./nowhere"], ModelError, "no such folder"),
]


@pytest.mark.parametrize(("arguments", "kind", "said"), WRONG)
def test_what_is_wrong_is_named(arguments: list[str], kind: type[Exception], said: str) -> None:
    found = CliRunner().invoke(app, ["plan", "--examples", "4", *arguments])
    assert isinstance(found.exception, kind) and said in str(found.exception)


def test_the_plan_as_json_and_as_a_table() -> None:
    asked = ["plan", "--examples", "20", "--public", "6", "--link", "dsl", "--device", "phone", "--set", "clients=2"]
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert [run["framework"] for run in found["runs"] if not run["option"]] == ["fedllm", "kd", "split"]
    plain, frozen = (run for run in found["runs"][:2])
    assert frozen["option"] == "A frozen" and frozen["bytes_up"] < plain["bytes_up"]
    assert [(t["device"], t["link"], t["fits"]) for t in plain["times"]] == [("phone", "dsl", True)]
    shown = CliRunner().invoke(app, asked, env={"COLUMNS": "60"}).stdout
    assert "Split-FedLLM, U-shape" in shown and "Server memory" in shown


def test_a_plan_cuts_by_device_line_and_server() -> None:
    """At each the cut that a run would take with these numbers in its configuration, and what that costs."""
    asked = ["plan", "--examples", "20", "--set", "clients=1", "--set", "split.cut=auto", "--set", "frameworks=[split]"]
    asked += ["--server", "phone", "--link", "4g", "--device", "hospital-server", "--device", "flops_per_second=1e9"]
    (run, *_) = json.loads(CliRunner().invoke(app, [*asked, "--device", "memory_bytes=9", "--json"]).stdout)["runs"]
    assert [(group["cut"], group["sites"]) for group in run["cuts"]] == [(1, ["site-1"])]
    assert [(time["cut"], time["fits"]) for time in run["times"]] == [(4, True), (1, True), (None, False)]
    at, over, server = device("hospital-server"), link("4g"), device("phone")
    numbers = {"site_flops_per_second": at.flops_per_second, "site_bytes_per_second": 2 / (8 / 10e6 + 8 / 30e6)}
    numbers |= {"site_memory_bytes": at.memory_bytes, "server_flops_per_second": server.flops_per_second}
    tree = {"frameworks": ["split"], "clients": 1, "rounds": 1, "split": {"cut": "auto", **numbers}}
    (entry,) = predict(Config.model_validate(tree), Assumed(20))
    assert entry["cuts"][0]["cut"] == 4 and timed(entry, at, over, server).items() <= run["times"][0].items()
    shown = CliRunner().invoke(app, asked).stdout
    assert "split.cut auto takes cut 1 for the site" in shown and "cut 4: " in shown


# Longer ---------------------------------------------------------------------------------------------------------------

FEDLLM = [
    *({"aggregation": name} for name in ("ffa", "fedsvd", "fedsa", "flexlora", "hetlora", "flora", "fedex")),
    {"upload": "delta"}, {"upload": "gradients"}, {"local_heads": True},
]  # fmt: skip
KD = [
    {"logits": "fp16"}, {"logits": "int8", "logits_down": "fp16"}, {"public_per_round": 3}, {"upload_bytes": 60},
    {"protocol": "fedmd"}, {"protocol": "fedmd", "server_epochs": 0}, {"distill_epochs": 2}, {"distill_weight": 0},
    {"protocol": "dsfl", "aggregation": "era"},
]  # fmt: skip
SPLITS = [
    {"cut": 0}, {"cut": 4}, {"cut": 1, "labels": "client"}, {"variant": "sflv2"}, {"variant": "sequential"},
    {"variant": "concatenated", "labels": "client"}, {"cut": {"site-1": 1, "others": 3}}, {"clip": 1.0},
    {"cache": "fixed", "cache_threshold": 2}, {"local_loss": True}, {"local_loss": True, "send_every": 2},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("settings", FEDLLM)
def test_all_of_fedllm(settings: dict[str, Any]) -> None:
    check(both(FedLLM(**settings), n=3, participation=0.67))


@pytest.mark.slow
def test_fedllm_of_seeds_and_of_control_variates() -> None:
    check(both(FedLLM(upload="seeds", candidate_seeds=5), optimizer="sgd"))
    check(both(FedLLM(scaffold=True), optimizer="sgd"))


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["flora", "flexlora", "fedsb"])
def test_mixed_ranks(aggregation: str) -> None:
    check(both(FedLLM(aggregation=aggregation), ranks={"site-1": 2, "site-2": 4, "site-3": 3}))


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["fp16", "int4", "qsgd:7", "rank:2+bf16"])
def test_more_codecs_of_adapters(codec: str) -> None:
    check(both(FedLLM(), up=codec, n=1))


@pytest.mark.slow
@pytest.mark.parametrize("settings", KD)
def test_all_of_kd(settings: dict[str, Any]) -> None:
    method = PROTOCOLS[settings.get("protocol", "standard")](**settings)
    check(both(method.resolved(False, False), "bert"))


@pytest.mark.slow
@pytest.mark.parametrize("settings", SPLITS)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_all_of_split(settings: dict[str, Any], clip: float | None) -> None:
    check(both(Split(**settings).decided("classification"), "bert", max_grad_norm=clip))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"last_blocks": 1}, {"variant": "sflv2"}, {"labels": "server"}])
@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_more_of_split_language_models(settings: dict[str, Any], kind: str) -> None:
    check(both(Split(cut=1, **settings).decided("causal-lm"), kind, "causal-lm"))


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8", "topk:4:token"])
def test_more_codecs_at_the_cut(codec: str) -> None:
    given = {"activations": codec, "gradients": codec}
    check(both(Split().decided("classification"), "bert", up=given, down=given, precision="fp32", n=1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["roberta", "distilbert", "opt", "gpt_neox", "gemma2"])
def test_other_architectures(kind: str) -> None:
    check(both(Split().decided("classification"), kind, precision="fp32"))
    check(both(FedLLM(), kind, precision="fp32"))
