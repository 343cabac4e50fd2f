"""The configuration: one pydantic model; its fields are the YAML keys, the `--set` keys and the Python arguments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from .data.load import DataConfig
from .data.partition import PartitionConfig
from .errors import ConfigError, did_you_mean
from .frameworks import FRAMEWORKS, KD, Centralized, FedLLM, Local, Split
from .frameworks.lab import Framework
from .models.adapter import LoraConfig
from .models.load import BUILT_IN, pick_device, pick_precision
from .models.train import TrainConfig

FrameworkName = Literal["fedllm", "kd", "split", "centralized", "local"]
MAX_CONFIG_BYTES = 1_000_000


class Config(BaseModel):
    """Everything a comparison depends on. Every key has a default; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    task: Literal["classification", "causal-lm"] = Field(default="classification", description="what is learnt")
    model: str = Field(default="nano", description="built-in name, local Hugging Face folder, or Hub id")
    data: DataConfig = Field(default_factory=DataConfig)
    clients: int = Field(default=10, ge=1, description="number of sites (not used with partition column)")
    participation: float = Field(default=1.0, gt=0, le=1, description="share of the sites that take part in a round")
    partition: PartitionConfig | None = Field(
        default=None, description="null: dirichlet with alpha 0.5 for classification, iid for causal-lm"
    )
    rounds: int = Field(default=5, ge=1, description="exchanges of what a framework exchanges")
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(
        default=[0], min_length=1, description="one run of each framework for each seed"
    )
    frameworks: list[FrameworkName] = Field(
        default=list(FRAMEWORKS), min_length=1, description="what is compared, in this order"
    )
    train: TrainConfig = Field(default_factory=TrainConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    fedllm: FedLLM = Field(default_factory=FedLLM)
    kd: KD = Field(default_factory=KD)
    split: Split = Field(default_factory=Split)
    device: str = Field(default="auto", description="auto, cpu or cuda")
    threads: int | None = Field(
        default=None, ge=1, description="torch threads; null: one for each core this process may use"
    )
    attn_implementation: str = Field(default="eager", description="of transformers; eager is counted exactly")

    _base: Path = PrivateAttr(default_factory=Path)  # folder that relative paths start from

    @field_validator("seeds", "frameworks")
    @classmethod
    def _no_repeats(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) < len(values):
            raise ValueError("an entry occurs twice")
        return values

    @property
    def base(self) -> Path:
        """The folder that relative paths start from."""
        return self._base

    def framework(self, name: str) -> Framework:
        """The framework of that name with its settings."""
        built = {"fedllm": self.fedllm, "kd": self.kd, "split": self.split}
        return built[name] if name in built else {"centralized": Centralized(), "local": Local()}[name]

    def resolved(self) -> Config:
        """The same configuration with every `auto` decided and paths absolute; itself a valid input."""
        device = pick_device(self.device)
        causal = self.task == "causal-lm"
        labels = self.split.labels if self.split.labels != "auto" else ("client" if causal else "server")
        changed: dict[str, Any] = {
            "device": device.type,
            "train": self.train.model_copy(update={"precision": pick_precision(self.train.precision, device)}),
            "split": self.split.model_copy(update={"labels": labels}),
            "partition": self.partition or PartitionConfig(name="iid" if causal else "dirichlet"),
            "threads": self.threads or _usable_cores(),
            "data": self.data.model_copy(update={k: self._absolute(getattr(self.data, k)) for k in _PATHS}),
            "model": self.model if self.model in BUILT_IN else self._absolute(self.model),
        }
        config = self.model_copy(update=changed)
        config._base = self._base
        return config

    def _absolute(self, value: Any) -> Any:
        path = self._base / value if isinstance(value, str) else None
        return str(path.resolve()) if path is not None and path.exists() else value

    def to_yaml(self) -> str:
        """YAML that `load_config` reads back to the same settings."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


_PATHS = ("train", "test", "public")


def load_config(path: Path | None = None, settings: Sequence[str] = ()) -> Config:
    """Read a YAML file, or the embedded default, and apply `key.sub=value` settings over it.

    Raises ConfigError, with file and line, for what is unknown (with the near name), mistyped or out of range.
    """
    base = Path.cwd() if path is None else path.parent.resolve()
    path = path or Path(__file__).parent / "data" / "demo" / "config.yaml"
    text = _read(path)
    try:
        tree = yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not a plain YAML file: {getattr(error, 'problem', None) or error}") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys to values")
    given = [_set(tree, setting) for setting in settings]
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, path, text, given)) from error
    config._base = base
    return config


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases, which could make a small file explode."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed in a configuration")
        return super().compose_node(parent, index)


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: {error.strerror}{did_you_mean(path.name, near)}") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: {len(raw)} bytes; a configuration has at most {MAX_CONFIG_BYTES}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start})") from error


def _set(tree: dict[str, Any], setting: str) -> tuple[str, ...]:
    """Apply one `a.b=value`; the value is YAML. The path that was set."""
    key, equals, value = setting.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {setting!r}: write key=value, for example --set lora.r=16")
    path = tuple(key.strip().split("."))
    try:
        parsed = yaml.load(value, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {setting!r}: the value is not YAML") from error
    node: Any = tree
    for part in path[:-1]:
        child = node.get(part)
        node[part] = child if isinstance(child, dict) else {}
        node = node[part]
    if path == ("partition", "name") and node.get("name") != parsed:
        node.clear()  # another partitioner has other parameters
    node[path[-1]] = parsed
    return path


def _explain(error: ValidationError, path: Path, text: str, given: Iterable[tuple[str, ...]]) -> str:
    """The first fault in one line: where, what, what would be right; and how many more there are."""
    faults = error.errors()
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    loc = tuple(str(part) for part in fault["loc"])
    name = ".".join(loc)
    if fault["type"] == "extra_forbidden":
        known = _keys_beside(loc)
        what = f"{name} is no setting{did_you_mean(loc[-1], known)}" + (
            f" (known: {', '.join(known)})" if known else ""
        )
    else:
        shown = re.sub(r"^(Value error|Assertion failed), ", "", fault["msg"])
        what = f"{name or 'configuration'}: {shown}, got {fault['input']!r:.80}"
    where = "--set" if any(loc[: len(p)] == p for p in given) else f"{path}:{_line_of(text, loc)}"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{where}: {what}{more}"


def _keys_beside(loc: tuple[str, ...]) -> list[str]:
    kind: Any = Config
    for part in loc[:-1]:
        field = kind.model_fields.get(part)
        options = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        kind = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if kind is None:
            return []
    return list(kind.model_fields)


def _line_of(text: str, loc: tuple[str, ...]) -> int:
    """The line (from 1) on which a key, or the nearest key above it, stands."""
    node, line = yaml.compose(text, Loader=yaml.SafeLoader), 1
    for part in loc:
        if not isinstance(node, yaml.MappingNode):
            break
        pair = next(((k, v) for k, v in node.value if k.value == part), None)
        if pair is None:
            break
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line


def _usable_cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
