"""The adapter's settings, and the rank of each site."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from ..errors import ConfigError

_RANK = TypeAdapter(Annotated[int, Field(ge=1, le=10_000)])


class LoraConfig(BaseModel):
    """The adapter, in PEFT's words: W + (lora_alpha / r)·B·A (LoRA, arXiv:2106.09685)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    r: int | list[int] | dict[str, int] = Field(
        default=8,
        description="rank, 1 to 10000; for fedllm also one for each site: a list in the order of their names, or a "
        "mapping {site: r}; the yardsticks take the largest",
    )
    capacity: dict[str, Annotated[float, Field(gt=0, le=1e18)]] | None = Field(
        default=None,
        description="for fedllm: what each site can bear, as {site: bytes of memory}, in any unit. The largest gets "
        "`r`, the others their share of it, rounded down; null: all get `r`",
    )
    r_min: int = Field(default=1, ge=1, le=10_000, description="with `capacity`: no site's rank is below it")
    lora_alpha: float = Field(default=16, gt=0, description="scale is lora_alpha / r")
    target_modules: str | list[str] = Field(default="all-linear", description="module names, or all-linear")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on the input of A")
    use_rslora: bool = Field(default=False, description="scale is lora_alpha / sqrt(r)")
    modules_to_save: list[str] | None = Field(default=None, description="modules trained whole, beside the head")

    @field_validator("r", mode="before")
    @classmethod
    def _ranks_in_range(cls, value: Any) -> Any:
        """One fault in plain words, where a union of types would name three."""
        given = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if not given:
            raise ValueError("a rank is missing: give one, or one for each site")
        try:
            ranks = [_RANK.validate_python(rank) for rank in given]
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"]) from None
        if isinstance(value, dict):
            return dict(zip(value, ranks, strict=True))
        return ranks if isinstance(value, list) else ranks[0]

    @model_validator(mode="after")
    def _capacity_fits(self) -> LoraConfig:
        if self.capacity is None:
            if self.r_min > 1:
                raise ValueError("r_min goes with lora.capacity, which is not set")
        elif not self.capacity:
            raise ValueError("capacity names no site: give each site's, or null")
        elif not isinstance(self.r, int):
            raise ValueError("capacity shares out one lora.r, and r is given site by site: keep one of them")
        elif self.r_min > self.r:
            raise ValueError(f"r_min {self.r_min} is above r {self.r}, the rank of the site with the largest capacity")
        return self

    @property
    def rank(self) -> int:
        """The largest rank, that of the server."""
        return self.r if isinstance(self.r, int) else max(self.r.values() if isinstance(self.r, dict) else self.r)

    @property
    def by_site(self) -> str | None:
        """The setting that gives ranks site by site."""
        return "lora.capacity" if self.capacity else None if isinstance(self.r, int) else "lora.r by site"

    def ranks(self, sites: Sequence[str]) -> dict[str, int]:
        """The rank of each site; empty where all have one. Raises ConfigError where they don't fit the sites."""
        sites = sorted(sites)
        if isinstance(self.r, int):
            return self._shares(self.r, self.capacity, sites) if self.capacity else {}
        if isinstance(self.r, list):
            if len(self.r) != len(sites):
                raise ConfigError(f"lora.r lists {len(self.r)} ranks for {len(sites)} sites: {', '.join(sites)}")
            return dict(zip(sites, self.r, strict=True))
        _name_all("lora.r", "rank", self.r, sites)
        return dict(self.r)

    def _shares(self, r: int, capacity: dict[str, float], sites: Sequence[str]) -> dict[str, int]:
        """What LoRA holds and sends grows with r, so r_k = ⌊r · c_k / max c⌋, and r_min at least."""
        _name_all("lora.capacity", "capacity", capacity, sites)
        largest = max(capacity.values())
        shares = {site: round(r * c / largest, 9) for site, c in capacity.items()}  # 2.9999999999999996 is 3
        return {site: max(self.r_min, math.floor(share)) for site, share in shares.items()}


def _name_all(setting: str, what: str, given: dict[str, Any], sites: Sequence[str]) -> None:
    """Raises ConfigError unless a mapping names each site, and nothing else."""
    if wrong := sorted(given.keys() ^ set(sites)):
        fault = "is no site" if wrong[0] in given else f"has no {what}"
        raise ConfigError(f"{setting}: {wrong[0]!r} {fault}; the sites are {', '.join(sites)}")
