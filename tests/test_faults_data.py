"""Configuration and data that are wrong, through the command line: the code, the words, and that nothing is left over.

What the functions beneath say is tested in test_data, test_partition and test_models; test_cli has the other faults.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import test_cli
from safetensors.torch import load_file, save_file
from test_cli import refused, small, written
from test_models import word_tokenizer
from tiny import config_of

from fedtrio.models.load import BUILT_IN, reads
from fedtrio.report.svg import text

run = test_cli.run
WTE = "transformer.wte.weight"
Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to


def texts(n: int, classes: int = 2, words: str = "word") -> str:
    return "text,label\n" + "".join(f"text {i} {words},{i % classes}\n" for i in range(n))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def results_of(run: test_cli.Run, folder: Path, *words: object) -> dict[str, Any]:
    """What a run that must succeed leaves in results.json; its warnings stand on the terminal too."""
    said = run("compare", *words, "--out", folder)
    assert said.code == 0 and said.err == "", said.err
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    shown = " ".join(said.out.split())  # a terminal breaks lines
    assert all(f"warning: {' '.join(warning.split())}" in shown for warning in results["warnings"]), said.out
    return results


# Data ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("empty.csv", "", ["the file is empty"]),
        ("empty.jsonl", "\n\n", ["the file is empty"]),
        ("header.csv", "text,label\n", ["no rows, only a header (text, label)"]),
        ("columns.csv", "query,class\na,0\n", ["no column 'text'", "found: query, class"]),
        ("latin.csv", b"text,label\na,0\ncaf\xe9,1\n", ["line 3", "0xe9", "save the file as UTF-8"]),
        ("wide.csv", texts(10).encode("utf-16"), ["not UTF-8"]),
        ("one.csv", texts(20, classes=1), ["only one class (0)", "two or more"]),
        ("few.csv", texts(2), ["2 rows are too few to hold out 2"]),
        ("blank.csv", "text,label\n,1\n ,0\n", ["all 2 texts are empty"]),
        ("ragged.csv", "text,label\na,1\nb,2,3\n", ["line 3 has 3 values for 2 columns", "double quotes"]),
        ("semicolons.csv", 'text;label\n"a; ""b""";1\n', ["';' between its columns", "a .csv must have ','"]),
        ("tabs.csv", "text\tlabel\na\t1\n", ["'\\t' between its columns"]),
        ("commas.tsv", "text,label\na,1\n", ["',' between its columns", "a .tsv must have '\\t'"]),
        ("unlabelled.csv", texts(20) + "more,\n", ["no value in column 'label' in row 21"]),
        ("broken.jsonl", '{"text": "a", "label": 0}\n{"text": \n', ["line 2, column 10 is not JSON"]),
        ("rows.jsonl", '3\n{"text": "a"}\n', ["row 1 is of type int, not an object"]),
        ("nested.jsonl", '{"text": ["a"], "label": 0}\n', ["a list or an object in column 'text' in row 1"]),
        ("fake.parquet", b"PAR1 no", ["cannot be read as Parquet"]),
        ("deep.jsonl", '{"text": "a"}\n{"text": ' + "[" * 100_000, ["line 2", "stand within each other"]),
        ("deep.json", "\n" + "[" * 100_000, ["line 2", "stand within each other"]),
        ("digits.jsonl", '{"text": "a"}\n{"text": ' + "9" * 5000 + "}", ["line 2", "more than 4300 digits", "as text"]),
        ("digits.json", '[{"text": "a"},\n{"text": ' + "9" * 5000 + "}]", ["line 2", "more than 4300 digits"]),
        ("half.jsonl", '{"text": "a\\ud800", "label": 0}\n', ["row 1 holds half a character", "ud800"]),
        ("table.xlsx", b"PK", ["unknown kind of file '.xlsx'", ".parquet"]),
    ],
)
def test_files_that_cannot_be_used(run, write, tmp_path, name, content, wanted):
    write(name, content)
    path = written(tmp_path, f"data: {{train: {name}}}\n")
    before = files(tmp_path)
    refused(run("compare", path, *small(), "--out", tmp_path / "run"), 3, name, *wanted)
    assert files(tmp_path) == before, "refused, and yet something was written"


def test_files_that_are_none(run, write, tmp_path):
    write("labels.csv", "text,label\n" + "".join(f"a {i},{'9' * 5000 if i % 2 else 1}\n" for i in range(60)))
    results_of(run, tmp_path / "run", *small(f"data.train={tmp_path}/labels.csv"))  # labels of 5,000 digits are names
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"a\xff"] * 9, "label": [0] * 9}), tmp_path / "bytes.parquet")
    refused(run("compare", *small(f"data.train={tmp_path}/bytes.parquet")), 3, "bytes instead of text", "'text'")
    for name, wanted in {"fifo.csv": "is a pipe or a device", "loop.csv": "Too many levels of symbolic links"}.items():
        os.mkfifo(tmp_path / name) if "fifo" in name else os.symlink(name, tmp_path / name)
        refused(run("compare", *small(f"data.train={tmp_path}/{name}")), 3, name, wanted)


@pytest.mark.parametrize(("setting", "code"), [("model", 4), ("data.train", 3), ("data.test", 3), ("--out", 2)])
@pytest.mark.parametrize("suffix", ["", ".csv"])
def test_names_that_no_file_can_have(run, tmp_path, setting, code, suffix):
    name = "n" * 5000 + suffix
    words = [setting, name] if setting == "--out" else ["--set", f"{setting}={name}", "--out", tmp_path / "run"]
    said = run("compare", *small(), *words)
    refused(said, code, "nnn…nnn", "model" if setting == "model" else "File name too long")
    assert len(said.err) < 500


def test_labels_that_training_has_not_seen(run, write, tmp_path):
    write("train.csv", texts(60))
    write("test.csv", 'text,label\na,0\nb,loan\nc,"\x1b[31mtwo\nlines"\n')
    path = written(tmp_path, "data: {train: train.csv, test: test.csv}\n")
    said = run("compare", path, *small(), "--out", tmp_path / "run")
    refused(said, 3, "test.csv", "do not occur in training", "'loan' (1 row)", r"'\x1b[31mtwo\nlines'")
    assert "\x1b" not in said.err, "what a file says reached the terminal as it stands"


def test_byte_order_marks_change_nothing(run, write, tmp_path):
    """Of the data and of the configuration; spreadsheets write them."""
    numbers = []
    for mark in (b"", b"\xef\xbb\xbf"):
        write("train.csv", mark + texts(60).encode())
        path = write("mine.yaml", mark + b"data: {train: train.csv}\n")
        results = results_of(run, tmp_path / f"run{len(mark)}", path, *small())
        (entry,) = results["runs"]
        numbers.append([entry[key] for key in ("accuracy", "loss", "bytes_up", "client_flops")])
    assert numbers[0] == numbers[1]


def test_overlapping_sets_are_counted_and_said(run, write, tmp_path):
    write("train.csv", texts(60))
    write("test.csv", "text,label\ntext 3 word,1\ntext 4 word,0\nnew,0\n")
    write("public.csv", "text\ntext 5 word\nnew\nnewer\n")
    path = written(tmp_path, "data: {train: train.csv, test: test.csv, public: public.csv}\n")
    results = results_of(run, tmp_path / "run", path, *small("data.max_train=null"))
    wanted = {
        "2 of 3 test texts also occur in the training set",
        "1 of 3 public texts also occur in the training set",
        "1 of 3 public texts also occur in the test set",
    }
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert wanted <= set(results["warnings"]) and all(sentence in report for sentence in wanted)


def test_a_site_smaller_than_a_batch(run, tmp_path):
    """It trains with what it has, and the reader is told."""
    results = results_of(run, tmp_path / "run", *small("train.batch_size=64"))
    assert "the smallest site has 20 examples, fewer than a batch of 64" in results["warnings"]
    assert all(site["client_flops"] > 0 for site in results["runs"][0]["sites"])
    assert not results_of(run, tmp_path / "other", *small("train.batch_size=8"))["warnings"]


def test_texts_that_are_cut_off_are_counted(run, write, tmp_path):
    write("train.csv", texts(30) + texts(30, words="word " * 40)[len("text,label\n") :])
    path = written(tmp_path, "data: {train: train.csv}\n")
    results = results_of(run, tmp_path / "run", path, *small("train.max_length=20", "data.max_train=null"))
    (warning,) = [warning for warning in results["warnings"] if "longer than max_length 20" in warning]
    count = results["data"]["truncated"]
    assert warning.startswith(f"{count} texts") and 20 <= count <= 30  # the public set may leave some out


def test_texts_longer_than_the_model_reads(run, write, tmp_path):
    write("train.csv", texts(30) + texts(30, words="word " * 300)[len("text,label\n") :])
    words = small("train.max_length=400", "data.max_train=null", f"data.train={tmp_path}/train.csv")
    results = results_of(run, tmp_path / "run", *words)
    assert results["data"]["truncated"] == 30 and "30 texts are longer than" in results["warnings"][0]
    roberta = config_of("roberta", 0.0, 2, False)  # it numbers positions from pad_token_id + 1 on
    roberta.save_pretrained(tmp_path / "roberta")
    assert reads(str(tmp_path / "roberta")).positions == roberta.max_position_embeddings - roberta.pad_token_id - 1


@pytest.mark.parametrize(
    ("partition", "wanted"),
    [
        (
            "{name: shards, shards_per_client: 6}",
            ["60 shards need as many examples; there are 40", "per_client at most 4"],
        ),
        ("{name: shards, min_examples: 4, shards_per_client: 3}", ["smallest site has 3", "min_examples at most 3"]),
        (
            "{name: dirichlet, alpha: 0.1, min_examples: 4}",
            ["none of 1,000 draws", "the best gave", "a larger alpha"],
        ),
        ("{name: quantity, beta: 0.01, min_examples: 4}", ["none of 1,000 draws", "a larger beta"]),
        ("{name: column, min_examples: 13}", ["fewer than 13 examples", "'hospital' (4)", "min_examples at most 4"]),
        ("{name: iid, min_examples: 5}", ["10 clients with 5", "need 50, there are 40", "feasible: at most 8 clients"]),
    ],
)
def test_partitions_that_cannot_be(run, tmp_path, partition, wanted):
    words = small(clients=10, partition=partition)
    refused(run("compare", *words, "--out", tmp_path / "run"), 3, "partition", *wanted)
    assert files(tmp_path) == set(), "said after something was written"


def test_a_partition_by_a_column_that_is_not_named(run, write, tmp_path):
    write("train.csv", texts(60))
    path = written(tmp_path, "data: {train: train.csv}\n")
    refused(run("compare", path, *small(partition="{name: column}")), 3, "names no sites", "set data.site")
    words = small("data.site=bank", partition="{name: column}")
    refused(run("compare", path, *words), 3, "no column 'bank'", "found: text, label")


def test_hostile_names_of_sites_and_labels(run, write, tmp_path):
    """Paths, tags and a line break: they stay names, and nothing leaves the run folder."""
    sites, labels = ("../../evil", "<script>alert(1)</script>"), ("<img src=x onerror=y>", '"two\nlines"')
    rows = "".join(f"text {i} word,{labels[i % 2]},{sites[i // 2 % 2]}\n" for i in range(80))
    write("train.csv", "text,label,site\n" + rows)
    path = written(tmp_path, "data: {train: train.csv, site: site}\n")
    before, folder = files(tmp_path), tmp_path / "deep" / "down" / "run"
    words = small("frameworks=[fedllm,local]", "data.max_train=null", partition="{name: column}")
    results = results_of(run, folder, path, *words, "--record-frames", folder / "frames")
    assert {site["name"] for site in results["data"]["partitions"][0]["sites"]} == set(sites)
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in report
    assert "<script>alert(1)" not in report and "<img src=x" not in report
    new = files(tmp_path) - before - {"deep", "deep/down", "deep/down/run"}
    assert len(list((folder / "frames" / "fedllm-0").glob("*.safetensors"))) == 4
    assert all(name.startswith("deep/down/run/") for name in new) and "evil" not in {Path(name).name for name in new}


def test_control_characters_do_not_reach_the_report(run, write, tmp_path):
    rows = "".join(f"text {i},\x1b[3{i % 2}m\u202e,s\x07{i % 2}\n" for i in range(80))
    write("train.csv", "text,label,site\n" + rows)
    words = small("frameworks=[fedllm,local]", "data.site=site", partition="{name: column}")
    results = results_of(run, tmp_path / "run", *words, "--set", f"data.train={tmp_path}/train.csv")
    assert results["data"]["labels"] == ["\x1b[30m\u202e", "\x1b[31m\u202e"], "they stay what they are in the data"
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "s�0" in report and not set(report) & set("\x1b\x07\u202e")
    assert text(0, 0, "a\x1b<b").endswith(">a�&lt;b</text>")


# Models --------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_pad_token(run, tmp_path):
    word_tokenizer(tmp_path / "model")
    shutil.copy(BUILT_IN["nano"] / "config.json", tmp_path / "model")
    said = run("compare", *small(model=tmp_path / "model"), "--out", tmp_path / "run")
    refused(said, 4, str(tmp_path / "model"), "neither a pad token nor an end token", "set one")
    assert not (tmp_path / "run").exists()


def test_models_that_do_not_fit_together(run, tmp_path):
    weights = load_file(BUILT_IN["nano"] / "model.safetensors")
    cases: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
        "lost": ({n: w for n, w in weights.items() if ".h.1." not in n}, {}, "the weights in '{}' are incomplete"),
        "rows": ({**weights, WTE: weights[WTE][:100].clone()}, {"vocab_size": 100}, "the model knows 100 tokens"),
        "pad": (weights, {}, "pad token of the tokenizer in '{}' has number 4096"),
    }
    for name, (kept, changed, wanted) in cases.items():
        folder = shutil.copytree(BUILT_IN["nano"], tmp_path / name)
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        for file, extra in (("config", changed), ("tokenizer_config", {"pad_token": "<new>"} if name == "pad" else {})):
            path = folder / f"{file}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | extra))
        refused(run("compare", *small(model=folder), "--out", tmp_path / "run"), 4, wanted.format(folder))


def test_models_and_data_of_a_hub_that_is_offline(run, tmp_path, monkeypatch):
    """What was looked for and what to do, in under a second (the imports once done)."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    cases = {
        "model=nobody/nothing": (4, "'nobody/nothing'", "HF_HUB_OFFLINE", "give a local folder, a built-in name"),
        "data.train=nobody/nothing": (3, "'nobody/nothing'", "split 'train'", "name a local CSV, JSONL or Parquet"),
    }
    for setting, (code, *wanted) in cases.items():
        for _ in range(2):
            start = time.perf_counter()
            refused(run("compare", *small(setting), "--out", tmp_path / "run"), code, *wanted)
            took = time.perf_counter() - start
        assert took < 1, f"{setting}: {took:.1f} s"
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("setting", "code", "wanted"),
    [
        ("device=abacus", 4, ["'abacus' is unknown", "cpu"]),
        ("attn_implementation=kernels-community/flash-attn", 2, ["kernels-community", "'sdpa'"]),
        ("train.precision=fp8", 2, ["train.precision", "'fp8'", "bf16"]),
        ("split.cut=-1", 2, ["split.cut", "greater than or equal to 0"]),
        ("lora.target_modules=[]", 4, ["match nothing", "'c_attn'"]),
        ("lora.target_modules=[c_attn, nowhere]", 4, ["['nowhere'] match nothing", "'c_attn'"]),
        ("lora.target_modules=(((", 4, ["'(((' is no regular expression"]),
        ("lora.modules_to_save=[nowhere]", 4, ["modules_to_save 'nowhere' matches nothing", "'ln_f'"]),
        ("lora.modules_to_save=[h]", 4, ["modules_to_save 'h' is a block or holds blocks", "'ln_f'"]),
        ("model=''", 2, ["--set: model: no model is named", "nano"]),
        ("model=a b", 4, ["'a b': no such folder, and no Hub id"]),
        ("lora.r=0", 2, ["lora.r", "greater than or equal to 1"]),
    ],
)
def test_settings_that_no_model_could_use(run, tmp_path, setting, code, wanted):
    refused(run("compare", *small(setting), "--out", tmp_path / "run"), code, *wanted)
    assert files(tmp_path) == set()


# The configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1: 2\n", (":1: 1", "strings")),
        ("? [a]\n: b\n", (":1", "not a plain YAML file")),
        ("rounds: 1\nmodel: a\0b\n", ("not a plain YAML file", "#x0000")),
        ("a: \t b\n", (":1", "cannot start any token")),
        ("rounds: .nan\n", (":1: rounds", "finite", "nan")),
        ("rounds: 1e400\n", (":1: rounds", "integer", "1e400")),
        (f"rounds: {'9' * 5000}\n", ("not a plain YAML file", "4300 digits")),
        ("train:\n  learning_rate: .inf\n", (":2: train.learning_rate", "finite")),
        ("model: 2020-01-01\n", (":1: model", "string")),
        ("seeds: [0, 1.5]\n", (":1: seeds.1", "integer")),
        ("data: [train.csv]\n", (":1: data", "train.csv")),
        ("data:\n  trian: x.csv\n", (":2: data.trian", "did you mean 'train'?")),
        ("data:\n  test: 1.5\n", (":2: data.test", "between 0 and 1, for instance 0.2, got 1.5")),
        ("data: {test: 0.6, public: 0.5}\n", (":1: data", "together leave nothing to train on\n")),
        ("partition:\n  name: iid\n  min_examples: 0\n", (":3: partition.min_examples", "got 0")),
        (f"rounds: {'9' * 400}\n", (":1: rounds", "less than or equal to 1000000")),
        ("train:\n  epochs: 100000000000000000000\n", (":2: train.epochs", "less than or equal to 1000000")),
        ("threads: 100000000000000000000\n", (":1: threads", "less than or equal to 1024")),
        ("rounds: 1\n'rounds': 2\n", (":2: ", "'rounds' occurs twice, first in line 1")),
        ("rounds: 1\ntrain: {epochs: 1, epochs: 2}\n", (":2: ", "'epochs' occurs twice")),
        ("data: {labels: [a, b, a]}\n", (":1: data.labels", "'a' occurs twice")),
        ("rounds: !!timestamp x\n", ("not a plain YAML file", "does not fit its tag")),
        ("rounds: !!python/name:os.system\n", (":1", "not a plain YAML file")),
    ],
)
def test_configurations_that_are_wrong(run, tmp_path, text, wanted):
    path = written(tmp_path, text)
    refused(run("compare", path, "--out", tmp_path / "run"), 2, str(path), *wanted)
    assert files(tmp_path) == {"mine.yaml"}


def test_what_set_is_blamed_for(run, tmp_path):
    path = written(tmp_path, "rounds: 1\ntrain:\n  epochs: 1\n")
    refused(run("compare", "--set", "a.b.c.d=1"), 2, "--set: a is no setting")
    refused(run("compare", path, "--set", "a.b.c.d=1"), 2, "--set: a is no setting")
    refused(run("compare", path, "--set", "train.epochs.x=1"), 2, f"{path}:3 with --set train.epochs.x: train.epochs")
    refused(run("compare", path, "--set", "model=caf\udcc3\udca9"), 2, "--set model", "encoding", "LC_ALL=C.UTF-8")
    refused(run("compare", "/dev/zero"), 2, "/dev/zero: a configuration has at most")


def test_frames_that_cannot_be_recorded(run, tmp_path):
    (tmp_path / "file").write_text("here already", encoding="utf-8")
    said = run("compare", *small(), "--out", tmp_path / "run", "--record-frames", tmp_path / "file" / "frames")
    refused(said, 2, "can't be written", "--record-frames")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "here already"


# The terminal --------------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_no_terminal_no_locale_and_forty_columns(tmp_path):
    """As under cron: nothing to read from, ASCII alone, and what is too long for a line is one to copy."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "40"}
    words = [sys.executable, "-m", "fedtrio.cli", "compare", *small(), "--out", "run"]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, cwd=tmp_path, env=os.environ | plain
    )
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    lines = done.stdout.decode("ascii").splitlines()
    assert any("FedLLM" in line for line in lines)
    assert [line for line in lines if len(line) > 40 and not line.startswith(("Report:", "Next:"))] == []
    assert "\x1b" not in done.stdout.decode("ascii")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("> /dev/full", 2, "fedtrio: standard output can't be written: No space left on device\n"),
        ("--json > /dev/full", 2, "fedtrio: standard output can't be written: No space left on device\n"),
        ("| head -c 1", 0, ""),
        ("--json | head -c 1", 0, ""),
    ],
)
def test_output_that_goes_nowhere(tmp_path, redirection, code, said):
    command = shlex.join([sys.executable, "-m", "fedtrio.cli", "compare", *small(), "--out", str(tmp_path / "run")])
    line = f"{command} {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert done.stderr.endswith(said) and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "report.html").is_file() or redirection == "> /dev/full"
