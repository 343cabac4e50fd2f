"""`fedtrio export`: what is written loads with plain transformers or PEFT, and gives the logits of base and adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from test_kd_unlike import folder
from torch import Tensor
from typer.testing import CliRunner

from fedtrio.cli import app
from fedtrio.compare import compare
from fedtrio.config_file import load_config
from fedtrio.errors import ConfigError, ModelError
from fedtrio.export import export
from fedtrio.models.load import BUILT_IN
from fedtrio.report.card import card

TEXTS = ["my screen stays black since this morning", "help", "please send me a new password for the printer"]
SMALL = ["data.max_train=48", "data.max_test=20", "data.max_public=8", "threads=1", "train.precision=fp32"]
LARGE_STEPS = [
    "train.learning_rate=0.02",
    "train.head_learning_rate=0.02",
    "train.batch_size=4",
    "train.warmup_ratio=0",
]
KINDS = {
    "classification": transformers.AutoModelForSequenceClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
}
RUNS = {
    "classes": ["frameworks=[fedllm, local]", "rounds=1", "lora.target_modules=[c_attn, c_fc, c_proj]"],
    "flora": ["task=causal-lm", "frameworks=[fedllm]", "rounds=2", "fedllm.aggregation=flora", "lora.r=2"],
    "tied": ["task=causal-lm", "frameworks=[fedllm]", "rounds=1", "lora.modules_to_save=[lm_head]"],
    "embedded": ["task=causal-lm", "frameworks=[fedllm]", "rounds=1", "lora.target_modules=[wte, c_attn]"],
}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of one of the RUNS, made when first asked for."""
    place = tmp_path_factory.mktemp("runs")

    def made(name: str) -> Path:
        if not (place / name).is_dir():
            compare(load_config(settings=[*SMALL, *LARGE_STEPS, *RUNS[name]]), place / name, jobs=1)
        return place / name

    return made


def results_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def logits(model: Any, tokenizer: Any) -> Tensor:
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        found = model.eval()(**inputs).logits
    return found if found.dim() == 2 else found[inputs["attention_mask"].bool()]


def by_hand(task: str, adapter: Path, path: Path = BUILT_IN["nano"]) -> tuple[Tensor, Tensor]:
    """Logits of base and adapter, and of the base alone, as PEFT and transformers load them."""
    more = {"num_labels": 20} if task == "classification" else {}
    base = KINDS[task].from_pretrained(path, **more)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    base.config.pad_token_id = tokenizer.pad_token_id
    plain = logits(base, tokenizer)
    return logits(peft.PeftModel.from_pretrained(base, str(adapter)), tokenizer), plain


@pytest.mark.parametrize("name", RUNS)
def test_merged_model_is_base_and_adapter(name: str, run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run, task = run_of(name), "classification" if name == "classes" else "causal-lm"
    done = export(run, tmp_path / "out", "fedllm", merge=True)
    wanted, plain = by_hand(task, run / "fedllm-0" / "adapter")
    assert (wanted - plain).abs().max() > 0.1  # the adapter matters
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = KINDS[task].from_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*")) and model.dtype == torch.float32
    torch.testing.assert_close(logits(model, tokenizer), wanted, rtol=1e-4, atol=1e-4)
    assert done.difference is not None and done.difference < 1e-4 and done.parameters == model.num_parameters()
    if name == "flora":  # was saved with a larger rank than the configuration's
        assert peft.PeftConfig.from_pretrained(str(run / "fedllm-0" / "adapter")).r > 2  # type: ignore[attr-defined]
    if name in ("tied", "embedded"):  # embeddings and output were one matrix, and only one of them was trained
        assert not model.config.tie_word_embeddings
        assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def test_sites_with_models_of_their_own(tmp_path: Path) -> None:
    """BERT, whose head is `classifier` and whose layers are linear, at one site; the built-in model at the others."""
    bert = folder(tmp_path / "bert", "bert")
    own = ["frameworks=[kd]", "kd.protocol=fedmd", "kd.server_epochs=0", f"kd.models={{site-0: {bert}}}", "rounds=1"]
    deal = ["partition={name: iid}", "clients=3", "lora.target_modules=all-linear", "train.pad_to_multiple_of=1"]
    compare(load_config(settings=[*SMALL, *LARGE_STEPS, *own, *deal]), tmp_path / "run", jobs=1)
    for number, path in enumerate((bert, BUILT_IN["nano"])):
        out = tmp_path / f"out-{number}"
        export(tmp_path / "run", out, site=f"site-{number}", merge=True)
        wanted, plain = by_hand("classification", tmp_path / "run" / "kd-0" / "sites" / str(number) / "adapter", path)
        assert (wanted - plain).abs().max() > 0.1
        model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        torch.testing.assert_close(logits(model, tokenizer), wanted, rtol=1e-4, atol=1e-4)
        assert f"| base model | `{path.name}` |" in (out / "README.md").read_text(encoding="utf-8")


def test_classes_have_names(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    export(run_of("classes"), tmp_path / "out", "fedllm", merge=True)
    classify = transformers.pipeline("text-classification", str(tmp_path / "out"))
    labels = results_of(run_of("classes"))["data"]["labels"]
    assert classify.model.config.id2label == dict(enumerate(labels))
    assert {found["label"] for found in classify(TEXTS, top_k=20)[0]} == set(labels)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", ["classes", "flora"])
def test_lines_of_the_card_load_it(
    name: str, merge: bool, run_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, task = run_of(name), "classification" if name == "classes" else "causal-lm"
    export(run, tmp_path / "shared", "fedllm", merge=merge)
    monkeypatch.chdir(tmp_path)
    text = (tmp_path / "shared" / "README.md").read_text(encoding="utf-8")
    found: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], found)
    wanted, _ = by_hand(task, run / "fedllm-0" / "adapter")
    torch.testing.assert_close(logits(found["model"], found["tokenizer"]), wanted, rtol=1e-4, atol=1e-4)


def test_card_says_what_it_is(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    export(run_of("classes"), tmp_path / "out", "local", site="hospital", merge=True)
    found = ModelCard.load(tmp_path / "out" / "README.md")
    front = found.data.to_dict()
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-classification"
    assert front["license"] == "apache-2.0" and "base_model" not in front  # the built-in model is not on the Hub
    assert {"fedtrio", "local"} <= set(front["tags"])
    assert "No proof of privacy" in found.text and "`hospital`" in found.text and "20 test texts" in found.text


def test_card_of_a_hub_model(run_of: Callable[[str], Path]) -> None:
    results = results_of(run_of("classes"))
    results["runs"].append({**results["runs"][0], "seed": 1, "accuracy": results["runs"][0]["accuracy"] + 0.1})
    text = card(results, results["runs"][0], False, "mine", "owner/base", True, None, "owner/data")
    front = ModelCard(text).data.to_dict()
    assert front["base_model"] == "owner/base" and front["base_model_relation"] == "adapter"
    assert front["datasets"] == ["owner/data"] and front["library_name"] == "peft" and "license" not in front
    assert "accuracy of 2 seeds" in text and "± 7.1" in text  # of two values that lie 0.1 apart: 0.1/√2


def test_card_of_split_learning_says_where_the_cut_was(run_of: Callable[[str], Path]) -> None:
    """Also where it is 0, at which the server could read the texts."""
    results = results_of(run_of("classes"))
    run = results["runs"][0] = {**results["runs"][0], "framework": "split", "left_sites": ["activations"]}
    results["config"]["split"] |= {"cut": 0, "clip": 2.0}
    results["config"]["wire"]["up"] = "int8"
    text = card(results, run, True, "mine", "base")
    for row in ("cut | `0`", "labels | `server`", "clip | `2.0`", "codecs | up `int8`", "left the sites | activations"):
        assert f"| {row} |" in text
    assert "| noise |" not in text


def test_refuses(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_of("classes")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, said in {
        (tmp_path / "nowhere", "x"): "holds no results.json",
        (run, "x"): "holds fedllm, local: choose one by --framework",
        (run, "x", "fedlm"): "no fedlm; did you mean 'fedllm'?; it holds fedllm, local",
        (run, "x", "fedllm", 3): "no seed 3 of fedllm; it holds 0",
        (run, "x", "fedllm", 0, "hq"): "leave out --site",
        (run, "x", "local"): "choose one by --site: ",
        (run, "x", "local", 0, "hospitl"): "did you mean 'hospital'?",
        (run, "full", "fedllm"): "is not empty",
        (run, "full/file", "fedllm"): "is a file",
        (run, "full/file/below", "fedllm"): "can't be written",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(said)):
            export(arguments[0], tmp_path / arguments[1], *arguments[2:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]  # nothing half-made is left


def test_a_merge_that_is_not_the_same_is_refused(
    run_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtrio.export._untie", lambda base: None)
    with pytest.raises(ModelError, match="can't be merged"):
        export(run_of("embedded"), tmp_path / "out", merge=True)
    assert not list(tmp_path.iterdir())


def test_command(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    command = ["export", str(run_of("flora")), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "adapter of" in done.stdout and (tmp_path / "out" / "README.md").is_file()
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, ConfigError) and "not empty" in str(again.exception)
