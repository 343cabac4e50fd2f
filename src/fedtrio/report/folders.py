"""Run folders and studies as they lie on disk: read, checked, and made into one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedtrio.errors import ConfigError
from fedtrio.report.page import flat, render
from fedtrio.report.study import pages
from fedtrio.report.study import render as render_study
from fedtrio.report.tables import Results

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
CARRIER = ("wire.name", "wire.workers", "wire.sites", "wire.host", "wire.port", "wire.max_frame_bytes")


class _Open(BaseModel):
    """Only what the pages build on is checked."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Spent(_Open):
    """A run, a site in it, or a round of it."""

    accuracy: Share | None = None
    perplexity: Amount | None = None
    bytes_up: Amount = 0
    bytes_down: Amount = 0
    messages: Amount = 0
    client_flops: Amount = 0
    client_seconds: Amount = 0
    server_seconds: Amount = 0


class _Kind(_Open):
    direction: str
    kind: str
    messages: Amount
    bytes: Amount
    payload: Amount


class _Event(_Open):
    round: int
    site: str
    reason: str | None = None


class _Site(_Spent):
    name: str


class _Round(_Spent):
    round: int
    aggregation_error: Amount | None = None


class _Right(_Open):
    texts: Annotated[int, Field(ge=1)]
    sha256: str
    bits: list[Annotated[str, Field(pattern="^[0-9a-f]+$")]]

    @model_validator(mode="after")
    def _a_bit_for_each_text(self) -> _Right:
        if sum(map(len, self.bits)) != 2 * -(-self.texts // 8):
            raise ValueError(f"{4 * sum(map(len, self.bits))} bits are not one for each of {self.texts} texts")
        return self


class _Run(_Spent):
    framework: str
    seed: int
    curve: list[_Round] = []
    sites: list[_Site] = []
    kinds: list[_Kind] = []
    events: list[_Event] = []
    client_peak_bytes: Amount = 0
    round_seconds: Amount = 0
    client_accuracy: dict[str, Amount | None] = {}
    how: dict[str, str] = {}
    adapter_sha256: str | None = None
    right: _Right | None = None


class _Holding(_Open):
    name: str
    examples: Amount
    label_counts: list[Amount] | None = None
    effective_labels: Amount | None = None
    emd: Amount | None = None


class _Partition(_Open):
    seed: int
    sites: list[_Holding]


class _Data(_Open):
    labels: list[str] | None = None
    train: Count = 0
    test: Count = 0
    public: Count = 0
    truncated: Count = 0
    partitions: list[_Partition] = []


class _Wire(_Open):
    sites: list[str] | None = None


class _Config(_Open):
    task: str
    model: str = ""
    frameworks: list[str] = []
    seeds: list[int] = []
    rounds: Count = 1
    clients: Count | None = None
    partition: dict[str, Any] = {}
    data: dict[str, Any] = {}
    split: dict[str, Any] = {}
    kd: dict[str, Any] = {}
    wire: _Wire = _Wire()


class _Results(_Open):
    schema_version: int
    config: _Config
    data: _Data
    runs: list[_Run]
    warnings: list[str] = []
    environment: dict[str, Any] = {}


class _Point(_Open):
    name: str
    settings: dict[str, Any]
    config: dict[str, Any] = {}
    runs: list[_Run]


class _Study(_Open):
    study: str
    varied: list[str]
    points: list[_Point]


def _read(path: Path, form: type[BaseModel], what: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        form.model_validate(found)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the whole"
        raise ConfigError(f"{path} can't be read as {what} of fedtrio: {where}: {fault['msg']}") from error
    except (OSError, ValueError, RecursionError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise ConfigError(f"{path} can't be read as {what} of fedtrio: {why}") from error
    return found


def results_of(folder: Path) -> Results:
    """What a run folder's results.json holds. Raises ConfigError where it can't be read as such."""
    found = _read(folder / "results.json", _Results, "results")
    if found["schema_version"] != 1:
        raise ConfigError(
            f"{folder / 'results.json'} has schema {found['schema_version']}, and this version of fedtrio reads 1:\n"
            "make the report with the version that made the run"
        )
    return found


def study_of(folder: Path) -> dict[str, Any]:
    """What a study's folder holds in study.json. Raises ConfigError where it can't be read as such."""
    return _read(folder / "study.json", _Study, "a study")


def _kind(folder: Path) -> str:
    """`study` or `run`. Raises ConfigError for what is neither."""
    for name, kind in (("study.json", "study"), ("results.json", "run")):
        if (folder / name).is_file():
            return kind
    why = "no such folder" if not folder.exists() else "a file" if folder.is_file() else "no results.json is in it"
    near = sorted({path.parent for path in folder.glob("*/results.json")}) if folder.is_dir() else []
    hint = f"it holds run folders, as {near[0]}" if near else "name what `fedtrio compare`, `serve` or `sweep` wrote"
    raise ConfigError(f"{folder} is no run folder: {why};\n{hint}")


def written_anew(folder: Path) -> dict[Path, str]:
    """The page of one run folder, or all that a study's folder holds of pages and tables, by path.

    Raises ConfigError for a folder that is neither.
    """
    if _kind(folder) == "run":
        return {folder / "report.html": render(results_of(folder))}
    found = {folder / name: text for name, text in pages(study_of(folder)).items()}
    points = sorted(path.parent for path in folder.glob("*/results.json"))
    return found | {point / "report.html": render(results_of(point)) for point in points}


def together(folders: Sequence[Path]) -> str:
    """One page that compares several run folders, or the points of studies.

    Raises ConfigError for a folder that is neither, and where tasks differ, whose scores can't be compared.
    """
    points = [point for folder, name in zip(folders, _names(folders), strict=True) for point in _points(folder, name)]
    tasks = {point["config"]["task"]: point["name"] for point in points}
    if len(tasks) > 1:
        (one, first), (other, second), *_ = tasks.items()
        raise ConfigError(f"{first} is {one} and {second} is {other}: their scores can't stand on one page")
    settings = {point["name"]: dict(flat(point["config"])) for point in points}
    keys = dict.fromkeys(key for own in settings.values() for key in own)
    varied = [key for key in keys if key not in CARRIER and len({own.get(key) for own in settings.values()}) > 1]
    for point in points:
        point["settings"] = settings[point["name"]]
    notes = []
    if len({(point["tests"], settings[point["name"]].get("data.test")) for point in points}) > 1:
        notes.append("These runs were not all tested on the same texts: compare their scores with care.")
    if len({settings[point["name"]].get("model") for point in points}) > 1:
        notes.append("These runs are not all of the same model.")
    title = f"{len(folders)} runs compared"
    return render_study({"study": title, "varied": varied, "points": points, "notes": notes, "folders": True})


def _points(folder: Path, name: str) -> list[dict[str, Any]]:
    if _kind(folder) == "run":
        found = results_of(folder)
        tests = found["data"].get("test") or 0
        return [{"name": name, "config": found["config"], "tests": tests, "runs": found["runs"]}]
    inner = sorted(path.parent for path in folder.glob("*/results.json"))
    return [point for path in inner for point in _points(path, f"{name}/{path.name}")]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, and as many before it as tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"{folders[0]} is named twice: name each run folder once")
