"""The comparison: every framework with every seed, into one run folder."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

from .bench import Bench
from .checkpoint import make_folder, write_whole
from .config import Config, WireConfig, flat
from .config_file import load_config
from .errors import ConfigError
from .meter import Meter
from .run import OnRound, cohort_size
from .trackers import Trackers
from .wires.ray import package as ray_package
from .workers import Workers

SCHEMA_VERSION = 1
OnStart = Callable[[Mapping[str, Any]], None]  # what results.json holds before the first run


def compare(
    config: Config | None = None,
    out: Path | str | None = None,
    on_round: OnRound = lambda framework, seed, entry: None,
    on_start: OnStart = lambda results: None,
    record_frames: Path | None = None,
    jobs: int | None = None,
) -> dict[str, Any]:
    """Run all frameworks and seeds of a configuration (None: the embedded default); what results.json holds.

    With `out`, the folder gets `config.yaml`, `results.json` and `report.html` (written anew after each run, so that
    nothing finished is lost), `ledger.jsonl` and the adapters. Runs that a folder of the same configuration already
    holds are kept and not repeated, and one that was broken off goes on after its last round.

    `jobs` runs at a time, each in a process of its own with `threads` threads; None: as many as the cores allow. It
    changes nothing but the time.

    Raises ConfigError (also where `out` holds another configuration), DataError, ModelError.
    """
    config = (config or load_config()).resolved()
    folder = Folder(Path(out) if out is not None else None, config)
    runs = folder.finished()
    todo = folder.missing(runs)
    if todo and config.wire.name == "ray":
        ray_package()  # refused while there is no folder yet
    tasks = [(*pair, folder.path, record_frames / "{}-{}".format(*pair) if record_frames else None) for pair in todo]
    alone = config.device != "cpu" or config.wire.name != "loopback"
    jobs = jobs or (1 if alone else config.room)
    with closing(Trackers(config, folder.path)) as trackers, Workers(config, min(len(todo), jobs)) as workers:
        results = {"schema_version": SCHEMA_VERSION, **workers.prepare(prepare), "runs": runs}
        if record_frames is not None:
            make_folder(record_frames, "--record-frames")
        on_start(results)
        folder.write(results)
        for entry in workers.results(tasks, trackers.watching(on_round)):
            folder.add(results, entry)
            trackers.finished(entry)
    return results


class Folder:
    """A run folder, or where there is no path, none: what it holds already, and what is added to it."""

    def __init__(self, path: Path | None, config: Config) -> None:
        self.path, self._config = path, config
        self._order = [(name, seed) for seed in config.seeds for name in config.frameworks]

    def finished(self) -> list[dict[str, Any]]:
        """Entries of the runs that the folder holds. Raises ConfigError where they are of another configuration."""
        path = self.path / "results.json" if self.path else None
        if self.path is None or path is None or not path.is_file():
            return []
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            earlier, now = flat(before["config"]), flat(self._config.model_dump(mode="json", exclude={"report_to"}))
            runs = before["runs"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} can't be read as results of fedtrio: {error}; choose another --out") from error
        carrier = {("wire", key) for key in WireConfig.model_fields.keys() - {"up", "down"}}  # it changes no result
        keys = {key for key in earlier.keys() | now.keys() if tuple(key.split(".")[:2]) not in carrier}
        differing = sorted(key for key in keys if earlier.get(key) != now.get(key))
        if differing:
            shown = ", ".join(f"{key} ({earlier.get(key)} there, {now.get(key)} here)" for key in differing[:4])
            raise ConfigError(
                f"{self.path} holds another configuration: {shown}; choose another --out or remove the folder"
            )
        return [entry for entry in runs if entry["adapter"] is None or (self.path / entry["adapter"]).is_dir()]

    def missing(self, runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
        """Framework and seed of what is still to be run, in order."""
        done = {(entry["framework"], entry["seed"]) for entry in runs}
        return [pair for pair in self._order if pair not in done]

    def add(self, results: dict[str, Any], entry: dict[str, Any]) -> None:
        """A run is finished: its entry takes its place, and its checkpoints go."""
        results["runs"].append(entry)
        results["runs"].sort(key=lambda entry: self._order.index((entry["framework"], entry["seed"])))
        self.write(results)
        if self.path:
            shutil.rmtree(self.path / f"{entry['framework']}-{entry['seed']}" / "rounds", ignore_errors=True)

    def write(self, results: Mapping[str, Any]) -> None:
        """Configuration, results, ledger and report, each whole. Raises ConfigError where it can't be written."""
        if self.path is None:
            return
        from .report.page import render

        write_whole(self.path / "config.yaml", self._config.to_yaml().encode())
        text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
        write_whole(self.path / "results.json", text.encode())
        parts = [self.path / f"{entry['framework']}-{entry['seed']}" / "ledger.jsonl" for entry in results["runs"]]
        write_whole(self.path / "ledger.jsonl", b"".join(part.read_bytes() for part in parts))
        if results["runs"]:
            write_whole(self.path / "report.html", render(dict(results)).encode())


def prepare(bench: Bench) -> dict[str, Any]:
    """Check all that can be checked before anything is trained; the head of results.json.

    Raises ConfigError, DataError, ModelError.
    """
    config = bench.config
    for name in config.frameworks:  # better refused now than after an hour of another one
        method, seed = config.framework(name), config.seeds[0]
        bench.cuts(method, seed)
        if sites := bench.names(method, seed):
            method.check_sites(sites, cohort_size(len(sites), config.participation))
            config.lora.ranks(sites) if method.federated else None
        bench.check_models(method)
        method.admit(bench.model(seed), config.train, sites)
    return {
        "config": config.model_dump(mode="json", exclude={"report_to"}),  # who is told changes no result
        "environment": environment(config),
        "warnings": warnings_of(bench),
        "data": bench.describe(),
    }


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
    if "split" in config.frameworks and 0 in config.split.cuts(bench.model(config.seeds[0]).depth):
        found.append("split.cut is 0: the server can read the texts off the embeddings that sites send")
    if "kd" in config.frameworks:
        method, seed = config.framework("kd"), config.seeds[0]
        found += method.foresee(bench.lab(method, seed, Meter()), bench.names(method, seed))
    if not len(bench.corpus.train):
        return found  # the sites are elsewhere
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
