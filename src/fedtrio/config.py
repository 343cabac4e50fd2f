"""The configuration: one pydantic model; its fields are the YAML keys, the `--set` keys and the Python arguments."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails

from .coding import Coding, Use, codecs_of
from .data.load import DataConfig
from .data.partition import PartitionConfig
from .errors import ConfigError
from .frameworks import ADDED, FRAMEWORKS, KD, PROTOCOLS, Centralized, FedLLM, Local, Split
from .frameworks.guards import Guards
from .frameworks.lab import Framework
from .models.load import BUILT_IN, pick_device, pick_precision
from .models.lora import LoraConfig
from .models.train import TrainConfig
from .names import or_added

FrameworkName = Annotated[Literal["fedllm", "kd", "split", "centralized", "local"], *or_added(ADDED)]
TrackerName = Literal["trackio", "wandb", "tensorboard", "mlflow"]
MOST = 1_000_000  # no count is above it: what is, is a slip of the keyboard, and explodes further on


class WireConfig(BaseModel):
    """What carries messages between the server and its sites (no result depends on it), and in which form."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["loopback", "process", "ray"] = Field(
        default="loopback",
        description="sites in this process (loopback), in worker processes (process), in a Ray cluster (ray)",
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="process, ray: how many; null: as many as the cores allow with `threads` each",
    )
    address: str | None = Field(
        default=None,
        min_length=1,
        description="ray: a cluster's host:port, or auto for one that runs here; null: one of this machine alone",
    )
    resources: dict[str, Annotated[float, Field(ge=0, le=10**15)]] | None = Field(
        default=None,
        description="ray: what a worker asks for: num_cpus (default: `threads`), num_gpus, memory, the cluster's own",
    )
    up: str | dict[Use, str] = Field(
        default="none", description="codec of what sites send, as topk:0.1+int8, or one for each use"
    )
    down: str | dict[Use, str] = Field(default="none", description="codec of what the server sends")
    sites: list[str] | None = Field(
        default=None,
        min_length=1,
        description="serve, flower: names of the sites, as their certificates or SuperNodes say them",
    )
    host: str = Field(default="0.0.0.0", description="serve: address to listen at")
    port: int = Field(default=8443, ge=0, le=65535, description="serve: port to listen at; 0: a free one")
    max_frame_bytes: int = Field(
        default=1 << 30, ge=1 << 16, le=10**12, description="serve: the longest message of a site"
    )

    @field_validator("resources")
    @classmethod
    def _rays_own_names(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for name in value or ():
            unit = name.lower().removeprefix("num_").removesuffix("s")
            if unit in ("cpu", "gpu") and name != f"num_{unit}s":
                raise ValueError(f"{name!r} is no resource of Ray; did you mean 'num_{unit}s'?")
        return value

    @model_validator(mode="after")
    def _known_codecs(self) -> WireConfig:
        try:
            self.coding(0)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    def asks(self, threads: int | None) -> dict[str, float]:
        """What a worker of Ray asks of its node."""
        return {"num_cpus": threads or 1, **(self.resources or {})}

    def coding(self, seed: int) -> Coding:
        """The codecs of a run."""
        return Coding(seed, codecs_of(self.up, "up"), codecs_of(self.down, "down"))


class Config(BaseModel):
    """Everything a comparison depends on. Every key has a default; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    task: Literal["classification", "causal-lm"] = Field(default="classification", description="what is learnt")
    model: str = Field(default="nano", description="built-in name, local Hugging Face folder, or Hub id")
    data: DataConfig = Field(default_factory=DataConfig)
    clients: int = Field(default=10, ge=1, le=MOST, description="number of sites (not used with partition column)")
    participation: float = Field(default=1.0, gt=0, le=1, description="share of the sites that take part in a round")
    partition: PartitionConfig | None = Field(
        default=None, description="null: dirichlet with alpha 0.5 for classification, iid for causal-lm"
    )
    rounds: int = Field(default=5, ge=1, le=MOST, description="exchanges of what a framework exchanges")
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
    guards: Guards = Field(default_factory=Guards)
    deadline: float | None = Field(
        default=None,
        gt=0,
        le=10**7,
        description="seconds of a round over a network; later answers don't count; null: no limit",
    )
    min_sites: int = Field(default=1, ge=1, le=MOST, description="a round with fewer sites left does not count")
    wire: WireConfig = Field(default_factory=WireConfig)
    device: str = Field(default="auto", description="auto, cpu or cuda")
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="torch threads; null: one for each core this process may use"
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] = Field(
        default="eager", description="of transformers; eager is counted exactly"
    )  # no other name: transformers takes them for code to be fetched from the Hub

    report_to: list[TrackerName] = Field(
        default=[], description="trackers that each run is told to; an extra of the same name installs one"
    )

    _base: Path = PrivateAttr(default_factory=Path)  # folder that relative paths start from

    @field_validator("model")
    @classmethod
    def _model_is_named(cls, value: str) -> str:
        return _named(value)

    @field_validator("train", "kd", "split", "fedllm", "guards")
    @classmethod
    def _counts_in_range(cls, section: BaseModel) -> BaseModel:
        large = {k: v for k, v in section if isinstance(v, int) and v > MOST}
        if large:
            faults = [
                InitErrorDetails(type="less_than_equal", loc=(k,), input=v, ctx={"le": MOST}) for k, v in large.items()
            ]
            raise ValidationError.from_exception_data("Config", faults)
        return section

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        """Raises ValueError for what single sections can't know to be wrong."""
        try:
            refuse_wrong_pairs(self.fedllm, self.train, self.lora, self.wire.coding(0), self.frameworks)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    @field_validator("seeds", "frameworks", "report_to")
    @classmethod
    def _no_repeats(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) < len(values):
            raise ValueError("an entry occurs twice")
        return values

    @property
    def room(self) -> int:
        """How many processes with `threads` each this machine's cores have room for."""
        return max(1, usable_cores() // (self.threads or usable_cores()))

    @property
    def base(self) -> Path:
        """The folder that relative paths start from."""
        return self._base

    def framework(self, name: str) -> Framework:
        """The framework of that name with its settings."""
        kd = PROTOCOLS[self.kd.protocol](**dict(self.kd))
        built: dict[str, Framework] = {"fedllm": self.fedllm, "kd": kd, "split": self.split}
        built |= {"centralized": Centralized(), "local": Local()}
        return built[name] if name in built else ADDED[name]

    def resolved(self) -> Config:
        """The same configuration with every `auto` decided and paths absolute; itself a valid input.

        Raises ConfigError for settings of kd that do not go with the others.
        """
        device = pick_device(self.device)
        causal = self.task == "causal-lm"
        place, colon, rule = self.fedllm.aggregation.rpartition(":")
        own = f"{self._absolute(place)}{colon}{rule}" if colon else rule
        changed: dict[str, Any] = {
            "device": device.type,
            "train": self.train.model_copy(update={"precision": pick_precision(self.train.precision, device)}),
            "fedllm": self.fedllm.model_copy(update={"aggregation": own}),
            "split": self.split.decided(self.task),
            "kd": self._kd(),
            "partition": self.partition or PartitionConfig(name="iid" if causal else "dirichlet"),
            "threads": self.threads or usable_cores(),
            "data": self.data.model_copy(update={k: self._absolute(getattr(self.data, k)) for k in _PATHS}),
            "model": self._place(self.model),
        }
        config = self.model_copy(update=changed)
        config._base = self._base
        return config

    def _kd(self) -> KD:
        """KD's codec decided and its models found."""
        coding = self.wire.coding(0)
        kd = self.kd.resolved("logits" in {*coding.up, *coding.down}, self.task == "causal-lm")
        if "kd" in self.frameworks:
            kd.check_task(self.task)
        return kd.model_copy(update={"models": {site: self._place(model) for site, model in kd.models.items()}})

    def _place(self, model: str) -> str:
        return model if model in BUILT_IN else self._absolute(model)

    def _absolute(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._absolute(part) for part in value]
        path = self._base / value if isinstance(value, str) else None
        return str(path.resolve()) if path is not None and os.path.exists(path) else value  # never an OSError

    def to_yaml(self) -> str:
        """YAML that `load_config` reads back to the same settings."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


_PATHS = ("train", "test", "public")


def _named(model: str) -> str:
    if not model.strip():
        raise ValueError("no model is named; write a built-in one (nano), a local folder or a Hub id")
    return model


class SiteConfig(BaseModel):
    """What a site says for itself; all else comes from the server."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: DataConfig = Field(default_factory=DataConfig, description="its own file and columns")
    model: str | None = Field(default=None, description="where the model lies here; null: as the server names it")
    kd_model: str | None = Field(
        default=None,
        description="a model of its own for kd, which the server need not know but in feddf; null: as for the others",
    )
    device: str = Field(default="auto", description="auto, cpu or cuda")
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="torch threads; null: as many as the server uses"
    )

    _base: Path = PrivateAttr(default_factory=Path)

    @field_validator("model", "kd_model")
    @classmethod
    def _model_is_named(cls, value: str | None) -> str | None:
        return value if value is None else _named(value)

    @property
    def base(self) -> Path:
        """The folder that relative paths start from."""
        return self._base


def refuse_wrong_pairs(
    fedllm: FedLLM, train: TrainConfig, lora: LoraConfig, coding: Coding, frameworks: Collection[str]
) -> None:
    """Raises ConfigError where FedLLM's settings don't go with how sites train, their ranks, or the codecs."""
    if lora.by_site and (wrong := sorted({"kd", "split"} & set(frameworks))):
        raise ConfigError(f"{lora.by_site} is for fedllm, not for {', '.join(wrong)}: set frameworks, or one rank")
    if "fedllm" not in frameworks:
        return
    plain = {"optimizer": "sgd", "momentum": 0, "lr_scheduler_type": "constant", "warmup_ratio": 0}
    plain |= {"max_grad_norm": None} | ({"weight_decay": 0} if fedllm.upload == "seeds" else {})
    needs_plain = "scaffold" if fedllm.scaffold else "upload seeds" if fedllm.upload == "seeds" else None
    if needs_plain and (wrong := [k for k, value in plain.items() if getattr(train, k) != value]):
        wanted = ", ".join(f"train.{k}={'null' if plain[k] is None else plain[k]}" for k in wrong)
        raise ConfigError(f"fedllm.{needs_plain} is right for plain SGD at constant rates alone: set {wanted}")
    fedllm.refuse_codecs(coding.up.get("adapter"), coding.down.get("adapter"))
    if lora.by_site:
        fedllm.refuse_mixed_ranks()


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
