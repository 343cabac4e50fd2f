"""Studies: a grid or list of settings over one configuration, each point of it a comparison of its own."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .checkpoint import write_whole
from .compare import Folder, compare
from .config import Config
from .config_file import load_config
from .errors import ConfigError, FedtrioError, did_you_mean
from .wires.process import fork_server

Settings = dict[str, Any]
Outcome = list[dict[str, Any]] | FedtrioError  # the runs of a point, or why there are none
OnPoint = Callable[[str, int, int, Outcome], None]  # point, how many are done, of how many, what came of it


class Study(BaseModel):
    """What a study file says: `points` by name, a `grid`, or both, which makes each point with each of the grid."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str | None = Field(default=None, description="configuration file that all start from; null: the demo's")
    set: Settings = Field(default_factory=dict, description="settings of all points, as lora.r: 16")
    points: dict[str, Settings] = Field(default_factory=dict, description="named points, each with its settings")
    grid: dict[str, list[Any]] = Field(default_factory=dict, description="for each setting the values it takes")

    @field_validator("grid")
    @classmethod
    def _values(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in grid.items():
            if not values or len({json.dumps(value) for value in values}) < len(values):
                raise ValueError(f"{key} must have at least one value, and each once")
        return grid

    def all_points(self) -> dict[str, Settings]:
        """Settings of each point by its name."""
        found: dict[str, Settings] = {}
        for name, own in (self.points or {"": {}}).items():
            for values in itertools.product(*self.grid.values()):
                chosen = dict(zip(self.grid, values, strict=True))
                label = ", ".join(f"{key}={_shown(value)}" for key, value in chosen.items())
                found[", ".join(part for part in (name, label) if part) or "base"] = {**self.set, **own, **chosen}
        return found


def load_study(path: Path, over: Sequence[str] = ()) -> tuple[Study, dict[str, Config]]:
    """A study file and the configuration of each point, with settings `key=value` over all of them.

    Raises ConfigError, before anything runs, for any of them.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"{path}: can't be read as a study: {why}") from error
    try:
        study = Study.model_validate(tree or {})
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"])) or "study"
        what = f": {fault['msg'].removeprefix('Value error, ')}"
        if fault["type"] == "extra_forbidden":
            what = (
                f" is no key of a study{did_you_mean(key, Study.model_fields)} (known: {', '.join(Study.model_fields)})"
            )
        raise ConfigError(f"{path}: {key}{what}") from error
    base = path.parent / study.base if study.base else None
    configs = {}
    for name, settings in study.all_points().items():
        try:
            written = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
            configs[name] = load_config(base, [*written, *over]).resolved()
        except ConfigError as error:
            raise ConfigError(f"{path}: point {name!r}: {error}") from error
    return study, configs


def sweep(
    path: Path,
    out: Path,
    jobs: int | None = None,
    on_point: OnPoint = lambda name, done, of, runs: None,
    over: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a study file's points into `out`, each into a folder of its own.

    Gives {"study", "varied", "points": [{"name", "settings", "config", "runs"}]}, which `study.json` holds too.
    `over` are settings `key=value` that stand above those of the file.
    `jobs` points at a time (None: as the cores allow), each in a process of its own. Points that are finished are not
    run again, one that was broken off goes on. `study.json`, `table.csv`, `table.tex` and `report.html` are written
    anew after each point. One that fails does not keep the others from being run.

    Raises ConfigError for a study or a point that can't be, and at the end what the first point to fail raised.
    """
    study, configs = load_study(path, over)
    folders = {name: out / _slug(name) for name in configs}
    if len(set(folders.values())) < len(folders):
        raise ConfigError(f"{path}: two points would share a folder; give them names that differ in letters and digits")
    done = {name: _finished(configs[name], folders[name]) for name in configs}
    todo = {name: (configs[name], folders[name]) for name, runs in done.items() if runs is None}
    settings = study.all_points()

    def found() -> dict[str, Any]:
        points = [
            {"name": n, "settings": settings[n], "config": configs[n].model_dump(mode="json"), "runs": runs}
            for n, runs in done.items()
            if runs is not None
        ]
        return {"study": path.stem, "varied": _varied(settings), "points": points}

    failed: dict[str, FedtrioError] = {}
    for name, outcome in _results(todo, jobs):
        if isinstance(outcome, FedtrioError):
            failed[name] = outcome
        else:
            done[name] = outcome
            _write(found(), out)
        on_point(name, len(done) - sum(runs is None for runs in done.values()), len(done), outcome)
    _write(found(), out)
    for name, error in failed.items():
        more = f" (and {len(failed) - 1} more of {len(done)} points failed)" if len(failed) > 1 else ""
        raise type(error)(f"point {name!r}: {error}{more}") from error
    return found()


def _results(todo: Mapping[str, tuple[Config, Path]], jobs: int | None) -> Iterator[tuple[str, Outcome]]:
    """What came of each point as it is finished."""
    room = min((config.room for config, _ in todo.values()), default=1)
    jobs = min(jobs or room, len(todo))
    if jobs < 2:
        yield from ((name, _run(*point)) for name, point in todo.items())
        return
    with ProcessPoolExecutor(jobs, fork_server(["fedtrio.compare", "peft"]), _ignore_interrupts) as pool:
        pending: dict[Future[Outcome], str] = {pool.submit(_run, *todo[name]): name for name in todo}
        try:
            while pending:
                finished, _ = wait(pending, return_when=FIRST_COMPLETED)
                yield from ((pending.pop(future), future.result()) for future in finished)
        except BrokenProcessPool as error:
            raise FedtrioError("a process that ran a point was killed (out of memory?); try --jobs 1") from error
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _ignore_interrupts() -> None:
    """Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(config: Config, folder: Path) -> Outcome:
    try:
        return compare(config, folder, jobs=1)["runs"]
    except FedtrioError as error:
        return error


def _finished(config: Config, folder: Path) -> list[dict[str, Any]] | None:
    """The runs of a point that is whole, without loading data or model. Raises ConfigError for another's folder."""
    kept = Folder(folder, config)
    runs = kept.finished()
    return None if kept.missing(runs) else runs


def _write(found: Mapping[str, Any], out: Path) -> None:
    from .report.study import pages

    write_whole(out / "study.json", (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    for name, text in pages(found).items():
        write_whole(out / name, text.encode())


def _varied(settings: Mapping[str, Settings]) -> list[str]:
    """Keys that are not the same in all points, in order of appearance."""
    keys = dict.fromkeys(key for own in settings.values() for key in own)
    return [key for key in keys if len({json.dumps(own.get(key), sort_keys=True) for own in settings.values()}) > 1]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+=-]+", "_", name)[:120].strip("._") or "point"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
