"""What can be set in Split-FedLLM, which settings go together, and who runs which blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..errors import ConfigError, ModelError, did_you_mean
from ..models.adapter import AdaptedModel
from ..models.cut import Span
from ..models.train import TrainConfig
from .lab import Framework, Lab
from .split_cuts import Device, choose, of_batch

NORMS = "squared norms"
OTHERS = "others"  # in a mapping from site to value: all that are not named

PerSite = Annotated[float, Field(gt=0)] | dict[str, Annotated[float, Field(gt=0)]]


@dataclass(frozen=True)
class Layout:
    """Which blocks run where, for one site: its bottom, the server's stretch, and in the U-shape the site's top."""

    bottom: Span
    server: Span
    top: Span | None = None

    @property
    def site(self) -> tuple[Span, ...]:
        """All that the site holds."""
        return (self.bottom,) if self.top is None else (self.bottom, self.top)


class SplitSettings(Framework):
    """The settings of `Split`."""

    cut: Annotated[int, Field(ge=0)] | dict[str, Annotated[int, Field(ge=0)]] | Literal["auto"] = Field(
        default=2,
        description="blocks that run at the site; 0: the embeddings alone; or one for each site by name, and for "
        "`others`; auto: where a step would take the least time, by the speeds below",
    )
    variant: Literal["sflv1", "sflv2", "sequential", "concatenated"] = Field(
        default="sflv1", description="how the server half is kept"
    )
    labels: Literal["auto", "server", "client"] = Field(
        default="auto", description="who has labels and head; auto: server for classification, client for causal-lm"
    )
    last_blocks: int = Field(
        default=0, ge=0, description="labels at the client: blocks before the head that run at the site too"
    )
    cache: Literal["none", "fixed", "adaptive"] = Field(
        default="none", description="send a text's activations only where they have moved; how the threshold is kept"
    )
    cache_threshold: float = Field(
        default=0.99, ge=-1, le=2, description="cosine with what was last sent, below which they are sent; 2: always"
    )
    cache_step: float = Field(
        default=0.002, gt=0, le=1, description="cache adaptive: up after a round of more loss, down after one of less"
    )
    local_loss: bool = Field(
        default=False, description="the site learns from an auxiliary head of its own; no gradients come back"
    )
    send_every: int = Field(default=1, ge=1, description="local_loss: steps from one message to the next")
    clip: float | None = Field(
        default=None, gt=0, description="largest norm of a token's activations as they leave a site; null: no limit"
    )
    noise: float = Field(
        default=0.0, ge=0, description="standard deviation of Gaussian noise on them, as a multiple of clip"
    )
    least_cut: int = Field(default=1, ge=0, description="cut auto: the lowest that may be chosen, as it shows the most")
    site_flops_per_second: PerSite = Field(
        default=1e11, description="cut auto: speed of a site, or one for each by name and for `others`"
    )
    site_bytes_per_second: PerSite = Field(default=1e7, description="cut auto: speed of a site's line, likewise")
    site_memory_bytes: PerSite | None = Field(
        default=None, description="cut auto: what a site may hold, likewise; null: no limit"
    )
    server_flops_per_second: float = Field(default=1e13, gt=0, description="cut auto: speed of the server")

    # Which settings go together --------------------------------------------------------------------------------------

    @field_validator("cut", mode="before")
    @classmethod
    def _cuts_are_blocks(cls, value: Any) -> Any:
        """One sentence where pydantic would say why each kind of value did not fit."""
        blocks = list(value.values()) if isinstance(value, dict) else [] if value == "auto" else [value]
        named = not isinstance(value, dict) or (value and all(isinstance(site, str) for site in value))
        if not named or not all(type(block) is int and block >= 0 for block in blocks):
            raise ValueError("a number of blocks, greater than or equal to 0, one for each site by name, or auto")
        return value

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        for wrong, why in self.refusals():
            if wrong:
                raise ValueError(why)
        return self

    def refusals(self) -> list[tuple[bool, str]]:
        """Combinations that make no sense, and why."""
        return [
            (self.last_blocks > 0 and self.labels == "server", "last_blocks need labels: client"),
            (self.local_loss and self.labels == "client", "local_loss needs labels: server"),
            (self.local_loss and self.last_blocks > 0, "last_blocks and local_loss don't go together"),
            (self.send_every > 1 and not self.local_loss, "send_every needs local_loss: true"),
            (self.noise > 0 and self.clip is None, "noise is a multiple of clip: name the norm, as clip: 10"),
        ]  # fmt: skip

    def decided(self, task: str) -> Self:
        """With `labels: auto` decided."""
        client = (task == "causal-lm" or self.last_blocks > 0) and not self.local_loss
        return self.model_copy(update={"labels": "client" if client else "server"}) if self.labels == "auto" else self

    def check_sites(self, sites: Sequence[str], cohort: int) -> None:
        """Raises ConfigError where the settings name sites that there are not, or leave some without a value."""
        for key in ("cut", "site_flops_per_second", "site_bytes_per_second", "site_memory_bytes"):
            value = getattr(self, key)
            for name in value if isinstance(value, dict) else ():
                if name != OTHERS and name not in sites:
                    raise ConfigError(f"split.{key} names {name!r}, which is no site{did_you_mean(name, sites)}")
            for site in sites:
                of_site(value, site, f"split.{key}")

    def admit(self, model: AdaptedModel, train: TrainConfig, sites: Sequence[str]) -> None:
        """Raises ConfigError where no cut fits a site, or the model has no place for the auxiliary head."""
        for site in sites:
            self._cut_of(model, train, site)
        wide = model.module.get_input_embeddings().weight.shape[1]  # type: ignore[operator, union-attr, index]
        if self.local_loss and model.task == "causal-lm" and wide != model.width:
            raise ConfigError(f"split.local_loss needs embeddings as wide as the blocks, not {wide} and {model.width}")

    def exchanges_norms(self, train: TrainConfig) -> bool:
        """Whether the norm that gradients are clipped by is that of both sides; two losses have a norm each."""
        return train.max_grad_norm is not None and not self.local_loss

    # Who runs what ---------------------------------------------------------------------------------------------------

    def layout(self, lab: Lab, site: str) -> Layout:
        """The stretches of one site. Raises ConfigError where no cut is named for it."""
        cut, end = self._cut_of(lab.model, lab.train, site), lab.model.depth - self.last_blocks
        if self.labels == "server":
            return Layout((-1, cut), (cut, None))
        return Layout((-1, cut), (cut, end), (end, None))

    def cuts(self, depth: int) -> tuple[int, ...]:
        """Where the model is cut, for any site: once, or twice in the U-shape. Raises ModelError where cuts cross."""
        end = depth - self.last_blocks
        cuts = list(range(min(self.least_cut, end), end + 1))
        if isinstance(self.cut, int):
            cuts = [self.cut]
        elif isinstance(self.cut, dict):
            cuts = sorted(set(self.cut.values()))
        if self.last_blocks > 0 and (end < 0 or max(cuts) > end):
            raise ModelError(
                f"split.cut {max(cuts)} and split.last_blocks {self.last_blocks} are more than the {depth} blocks of "
                "the model"
            )
        return tuple(cuts) if self.labels == "server" else (*cuts, end)

    def spans(self, depth: int) -> tuple[Span, ...]:
        """All that some site may hold."""
        end = depth - self.last_blocks
        highest = end
        if self.cut != "auto":
            highest = self.cut if isinstance(self.cut, int) else max(self.cut.values())
        return ((-1, highest),) if self.labels == "server" else ((-1, highest), (end, None))

    def device_of(self, site: str) -> Device:
        """What `cut: auto` takes a site to have. Raises ConfigError where a setting has no value for it."""
        return Device(
            of_site(self.site_flops_per_second, site, "split.site_flops_per_second"),
            of_site(self.site_bytes_per_second, site, "split.site_bytes_per_second"),
            of_site(self.site_memory_bytes, site, "split.site_memory_bytes"),
        )

    def _cut_of(self, model: AdaptedModel, train: TrainConfig, site: str) -> int:
        if self.cut != "auto":
            return of_site(self.cut, site, "split.cut")
        costs = of_batch(model, train, self.last_blocks if self.labels == "client" else None)
        return choose(costs, self.device_of(site), self.server_flops_per_second, self.least_cut, site)


def of_site(value: Any, site: str, key: str) -> Any:
    """A site's own value of a setting. Raises ConfigError where there is none."""
    if not isinstance(value, Mapping):
        return value
    if site not in value and OTHERS not in value:
        raise ConfigError(f"{key} has no value for {site}: name it, or add {OTHERS!r}")
    return value.get(site, value.get(OTHERS))
