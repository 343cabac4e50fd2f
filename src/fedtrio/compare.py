"""The comparison: every framework with every seed, into one run folder."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from .config import Config, load_config
from .errors import ConfigError
from .run import Bench, OnRound, run

SCHEMA_VERSION = 1


def compare(
    config: Config | None = None,
    out: Path | str | None = None,
    on_round: OnRound = lambda framework, seed, entry: None,
    on_start: Callable[[Bench], None] = lambda bench: None,
    record_frames: Path | None = None,
) -> dict[str, Any]:
    """Run all frameworks and seeds of a configuration (None: the embedded default); what results.json holds.

    With `out`, the folder gets `config.yaml`, `results.json` and `report.html` (written anew after each run, so that
    nothing finished is lost), `ledger.jsonl` and the adapters. Runs that a folder of the same configuration already
    holds are kept and not repeated.

    Raises ConfigError (also where `out` holds another configuration), DataError, ModelError.
    """
    bench = Bench(config or load_config())
    config = bench.config
    results: dict[str, Any] = {"runs": []}
    folder = Path(out) if out is not None else None
    if folder is not None:
        results["runs"] = _finished(folder, config)
    results = {
        "schema_version": SCHEMA_VERSION,
        "config": config.model_dump(mode="json"),
        "environment": environment(config),
        "warnings": warnings_of(bench),
        "data": bench.describe(),
        "runs": results["runs"],
    }
    for name in config.frameworks:
        bench.cuts(config.framework(name), config.seeds[0])  # better refused now than after an hour of another one
    if record_frames is not None:
        _make(record_frames, "--record-frames")
    on_start(bench)
    done = {(entry["framework"], entry["seed"]) for entry in results["runs"]}
    if folder is not None:
        _write(folder, config, results)
        _keep_ledger(folder / "ledger.jsonl", done)
    for seed in config.seeds:
        for name in config.frameworks:
            if (name, seed) in done:
                continue
            frames = record_frames / f"{name}-{seed}" if record_frames else None
            results["runs"].append(run(config, name, seed, folder, bench, on_round, frames))
            if folder is not None:
                _write(folder, config, results)
    return results


def warnings_of(bench: Bench) -> list[str]:
    """What a user should know before reading the numbers."""
    config, found = bench.config, list(bench.corpus.warnings)
    causal = config.task == "causal-lm"
    truncated = sum(examples.truncated for examples in bench.encoded.values())
    if truncated:
        found.append(f"{truncated} texts are longer than max_length {config.train.max_length} tokens and were cut off")
    blind = sum(not (targets[1:] >= 0).any() for targets in bench.encoded["train"].targets or ()) if causal else 0
    if blind:
        found.append(f"{blind} training examples have nothing left to predict: the prompt fills max_length")
    if causal and config.split.labels == "server" and "split" in config.frameworks:
        found.append(
            "split.labels is 'server': in causal-lm the labels are the text itself, which the server thus sees"
        )
    if "split" in config.frameworks and config.split.cut == 0:
        found.append("split.cut is 0: the server can read the texts off the embeddings that sites send")
    if causal and "kd" in config.frameworks:
        rows, vocabulary = bench.encoded["public"].target_tokens(), len(bench.tokenizer)
        if (size := rows * vocabulary * 4) > 100_000_000:
            found.append(
                f"kd sends {size / 1e6:,.0f} MB of logits a site and round ({rows} tokens x {vocabulary} words)"
            )
    small = min((len(share.indices) for share in bench.shares(config.seeds[0])), default=0)
    if small < config.train.batch_size:
        found.append(f"the smallest site has {small} examples, fewer than a batch of {config.train.batch_size}")
    return found


def environment(config: Config) -> dict[str, Any]:
    """Versions and hardware that the numbers were made with."""
    versions = {name: metadata.version(name) for name in ("fedtrio", "torch", "transformers", "peft", "datasets")}
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "device": config.device,
        "threads": config.threads,
        "precision": config.train.precision,
    }


def _finished(folder: Path, config: Config) -> list[dict[str, Any]]:
    """Runs that the folder holds already. Raises ConfigError where they are of another configuration."""
    path = folder / "results.json"
    if not path.is_file():
        return []
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        earlier, now = _flat(before["config"]), _flat(config.model_dump(mode="json"))
        runs = before["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} can't be read as results of fedtrio: {error}; choose another --out") from error
    differing = sorted(key for key in earlier.keys() | now.keys() if earlier.get(key) != now.get(key))
    if differing:
        shown = ", ".join(f"{key} ({earlier.get(key)} there, {now.get(key)} here)" for key in differing[:4])
        raise ConfigError(f"{folder} holds another configuration: {shown}; choose another --out or remove the folder")
    return [entry for entry in runs if (folder / entry["adapter"]).is_dir()]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _write(folder: Path, config: Config, results: Mapping[str, Any]) -> None:
    from .report.page import render

    _replace(folder / "config.yaml", config.to_yaml())
    _replace(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    if results["runs"]:
        _replace(folder / "report.html", render(dict(results)))


def _keep_ledger(path: Path, done: set[tuple[str, int]]) -> None:
    """Drop the lines of runs that did not finish: they will be run again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    entries = ((json.loads(line), line) for line in lines)
    _replace(path, "".join(line for entry, line in entries if (entry["framework"], entry["seed"]) in done))


def _make(folder: Path, option: str = "--out") -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} can't be written: {error.strerror}; choose another {option}") from error


def _replace(path: Path, text: str) -> None:
    """Write whole or not at all. Raises ConfigError where the folder can't be written."""
    try:
        _make(path.parent)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}; choose another --out") from error
