"""What an architect is bound by: limits on what a site spends in a round, and what must not leave it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..errors import ConfigError, did_you_mean
from ..report.units import bytes_text, flops_text, memory_text, seconds_text
from .amounts import BYTES, FLOPS, MEMORY, SECONDS, Unit


@dataclass(frozen=True)
class Costs:
    """Of one round, at the site that spends the most of each, and bytes of the server's memory."""

    bytes_up: float
    bytes_down: float
    peak_bytes: float
    flops: float
    seconds: float
    server_peak_bytes: float


@dataclass(frozen=True)
class Kind:
    """A limit on one of the costs: its key, which cost it bounds, and how amounts of it are read, shown and named."""

    key: str
    cost: str
    unit: Unit
    shown: Callable[[float | None], str]
    noun: str

    @property
    def flag(self) -> str:
        """As it is written on the command line."""
        return "--" + self.key.replace("_", "-")


KINDS = (
    Kind("max_up", "bytes_up", BYTES, bytes_text, "up"),
    Kind("max_down", "bytes_down", BYTES, bytes_text, "down"),
    Kind("client_memory", "peak_bytes", MEMORY, memory_text, "of memory"),
    Kind("client_flops", "flops", FLOPS, flops_text, "of compute"),
    Kind("deadline", "seconds", SECONDS, seconds_text, "for a round"),
    Kind("server_memory", "server_peak_bytes", MEMORY, memory_text, "of the server's memory"),
)

# What must not leave a site, as `left_sites` of results.json calls it.
PARTS = {
    "labels_stay": frozenset({"labels"}),
    "activations_stay": frozenset({"activations", "activation gradients"}),
    "logits_stay": frozenset({"logits"}),
    "parameters_stay": frozenset({"adapter", "update", "gradients", "seed sums"}),
}


def _read(unit: Unit) -> BeforeValidator:
    return BeforeValidator(lambda value: None if value is None else unit.read(value))


Bytes = Annotated[float | None, _read(BYTES)]
Memory = Annotated[float | None, _read(MEMORY)]
Flops = Annotated[float | None, _read(FLOPS)]
Seconds = Annotated[float | None, _read(SECONDS)]


class Limits(BaseModel):
    """Constraints; null or false: none of this kind. Amounts are of one round, and of one site but for the server's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_up: Bytes = Field(default=None, description="bytes that a site sends, as 5MB")
    max_down: Bytes = Field(default=None, description="bytes that a site is sent")
    client_memory: Memory = Field(default=None, description="memory of a site, as 2GiB")
    client_flops: Flops = Field(default=None, description="operations of a site, as 1TFLOP")
    deadline: Seconds = Field(default=None, description="time, as 10min")
    server_memory: Memory = Field(default=None, description="memory of the server, as 24GiB")
    labels_stay: bool = Field(default=False, description="labels must not leave a site")
    activations_stay: bool = Field(default=False, description="activations must not leave a site, nor their gradients")
    logits_stay: bool = Field(default=False, description="logits must not leave a site")
    parameters_stay: bool = Field(default=False, description="adapters must not leave a site, nor changes of them")
    unlike_models: bool = Field(default=False, description="sites hold models of different shapes")
    no_public_set: bool = Field(default=False, description="there are no texts that all parties may see")


def load_limits(path: Path | None, given: Mapping[str, Any]) -> Limits:
    """Constraints of a YAML file (None: none), with those of the command line above them.

    Raises ConfigError for what is unknown or can't be read.
    """
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            why = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise ConfigError(f"{path}: can't be read as constraints: {why}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: constraints are a mapping of keys to values, as max_up: 5MB")
    given = {key: value for key, value in given.items() if value not in (None, False)}
    try:
        return Limits.model_validate({**tree, **given})
    except ValidationError as error:
        fault = error.errors()[0]
        key = str(fault["loc"][0])
        where = "--" + key.replace("_", "-") if key in given else f"{path}: {key}"
        if fault["type"] == "extra_forbidden":
            known = ", ".join(Limits.model_fields)
            raise ConfigError(
                f"{where} is no constraint{did_you_mean(key, Limits.model_fields)} (known: {known})"
            ) from error
        said = fault["msg"].removeprefix("Value error, ")
        if fault["type"].startswith("bool_"):
            said = f"{fault['input']!r} is neither true nor false"
        raise ConfigError(f"{where}: {said}") from error
