"""The server's side of FedLLM beyond the weighted mean: robust means, clipping, an own rule, and server optimizers.

All work on updates θ_k − θ of rules that are linear in what is sent. What else the means can be is in
`aggregation.robust`, the optimizers' formulas are in `aggregation.server_optimizers`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from ..aggregation.adapters import weighted_mean
from ..aggregation.robust import clipped, coordinate_median, krum_sites, trimmed_mean
from ..aggregation.server_optimizers import OPTIMIZERS, delta, mean_update, sampled_update
from ..errors import ConfigError
from ..models.train import Adapter
from .lab import Framework, State

OwnRule = Callable[[Mapping[str, Adapter], Mapping[str, float]], Mapping[str, Tensor]]
OWN = re.compile(r"(?P<place>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")
SETTINGS = {  # of each server optimizer
    "none": {"lr": "server_learning_rate"},
    "fedavgm": {"lr": "server_learning_rate", "momentum": "server_momentum"},
    "fedadagrad": {"lr": "server_learning_rate", "beta1": "server_beta1", "tau": "server_tau"},
    "fedadam": {
        "lr": "server_learning_rate", "beta1": "server_beta1", "beta2": "server_beta2", "tau": "server_tau",
    },
}  # fmt: skip
SETTINGS["fedyogi"] = SETTINGS["fedadam"]


class Server(Framework):
    """What the server makes of linear uploads."""

    robust: Literal["none", "median", "trimmed_mean", "krum", "multi_krum"] = Field(
        default="none",
        description="mean of updates, as they are sent, that hostile sites can't carry off; all sites count alike",
    )
    byzantine: int = Field(default=1, ge=0, description="how many such sites trimmed_mean, krum and multi_krum bear")
    multi_krum_keep: int | None = Field(
        default=None, ge=1, description="sites that multi_krum averages; null: all but `byzantine`"
    )
    clip_norm: float | None = Field(
        default=None, gt=0, description="norm that the update of a site is cut to; null: don't"
    )
    server_optimizer: Literal["none", "fedavgm", "fedadagrad", "fedadam", "fedyogi"] = Field(
        default="none", description="what steps along the mean update"
    )
    server_learning_rate: float | None = Field(
        default=None, gt=0, description="null: 1 for none and fedavgm, 0.01 for the adaptive ones"
    )
    server_momentum: float = Field(default=0.9, ge=0, lt=1, description="of fedavgm")
    server_beta1: float | None = Field(
        default=None, ge=0, lt=1, description="of the adaptive ones; null: 0.9, for fedadagrad 0"
    )
    server_beta2: float = Field(default=0.99, ge=0, lt=1, description="of fedadam and fedyogi")
    server_tau: float = Field(default=1e-3, ge=0, description="added to √v by the adaptive ones, and √v at the start")
    unbiased: bool = Field(
        default=False,
        description="with participation below 1: weights p_k·K/m with p_k over all sites, so that the mean update over "
        "cohorts is that of all sites; else weights are shared out anew in each cohort",
    )

    @property
    def plain(self) -> bool:
        """Whether nothing but the mean is asked for."""
        unset = self.server_learning_rate in (None, 1.0)
        return self.plain_mean and self.server_optimizer == "none" and unset and not self.unbiased

    @property
    def plain_mean(self) -> bool:
        """Whether updates are averaged as they are."""
        return self.robust == "none" and self.clip_norm is None

    def mean(
        self, common: Adapter, sent: Mapping[str, Adapter], weights: Mapping[str, float], own: OwnRule | None = None
    ) -> dict[str, Tensor]:
        """What takes the place of the common tensors: the weighted mean, or what stands in for it."""
        if own is not None:
            return _own_mean(own, sent, weights)
        if self.plain:
            return weighted_mean(sent, weights)
        if self.plain_mean:  # an optimizer follows, for which the mean must not be rounded to the adapter's dtype
            update = mean_update(sent, common, weights)
        else:
            update = self._robust_mean({site: delta(after, common) for site, after in sent.items()}, weights)
        return {name: common[name].double() + tensor for name, tensor in update.items()}

    def _robust_mean(
        self, updates: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        if self.clip_norm is not None:
            updates = {site: clipped(update, self.clip_norm) for site, update in updates.items()}
        match self.robust:
            case "median":
                return coordinate_median(updates)
            case "trimmed_mean":
                return trimmed_mean(updates, self.byzantine)
            case "krum" | "multi_krum":
                most = max(1, len(updates) - self.byzantine)
                keep = 1 if self.robust == "krum" else min(self.multi_krum_keep or most, len(updates))
                chosen = krum_sites(updates, self.byzantine, keep)
                return weighted_mean({site: updates[site] for site in chosen}, dict.fromkeys(chosen, 1.0))
            case _:
                return weighted_mean(updates, weights)

    def step(
        self, common: Adapter, mean: Mapping[str, Tensor], state: State, cohort: Mapping[str, float],
        everyone: Mapping[str, float],
    ) -> State:  # fmt: skip
        """The common adapter and the optimizer's moments after a step along mean − common."""
        if self.plain:
            return {"adapter": {**common, **{name: tensor.to(common[name].dtype) for name, tensor in mean.items()}}}
        update = delta(mean, common)
        if self.unbiased:
            update = sampled_update({site: update for site in cohort}, cohort, everyone)
        moments = {kind: state[f"server {kind}"] for kind in ("m", "v") if f"server {kind}" in state}
        given = {word: getattr(self, name) for word, name in SETTINGS[self.server_optimizer].items()}
        take = OPTIMIZERS["fedavg" if self.server_optimizer == "none" else self.server_optimizer]
        after, moments = take(common, update, moments, **{k: v for k, v in given.items() if v is not None})
        return {"adapter": after, **{f"server {kind}": dict(named) for kind, named in moments.items()}}

    def needed(self) -> int:
        """Sites that a round needs for its mean."""
        return {
            "median": 3, "trimmed_mean": 2 * self.byzantine + 1,
            "krum": 2 * self.byzantine + 3, "multi_krum": max(2 * self.byzantine + 3, self.multi_krum_keep or 1),
        }.get(self.robust, 1)  # fmt: skip

    def check_sites(self, sites: Sequence[str], cohort: int) -> None:
        """Raises ConfigError where a robust mean has too few sites for what it shall bear."""
        if cohort < self.needed():
            bears = "" if self.robust == "median" else f" with fedllm.byzantine {self.byzantine}"
            raise ConfigError(
                f"fedllm.robust {self.robust}{bears} needs {self.needed()} sites in a round; {cohort} of {len(sites)} "
                "take part"
            )


# A user's own rule ----------------------------------------------------------------------------------------------------


def _own_mean(own: OwnRule, sent: Mapping[str, Adapter], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """What an own rule gives, held against what it was given. Raises ConfigError where that differs in form."""
    like = sent[min(sent)]
    found = own({site: dict(adapter) for site, adapter in sent.items()}, dict(weights))
    wrong = [n for n, t in like.items() if n not in found or found[n].shape != t.shape or not found[n].isfinite().all()]
    if wrong or found.keys() - like.keys():
        name = (wrong or sorted(found.keys() - like.keys()))[0]
        raise ConfigError(
            f"fedllm.aggregation: {getattr(own, '__name__', own)} gave no finite tensor {name!r} of the shape it was "
            "given" if wrong else f"fedllm.aggregation: {getattr(own, '__name__', own)} gave a tensor {name!r} that "
            "no site sent"
        )  # fmt: skip
    return {name: found[name].detach().to(tensor.dtype) for name, tensor in like.items()}


@functools.cache
def own_rule(text: str) -> OwnRule:
    """The function that `file.py:name` or `module:name` means; it is code of the user's own configuration.

    Raises ConfigError where there is none.
    """
    match = OWN.fullmatch(text)
    if match is None:
        raise ConfigError(f"fedllm.aggregation {text!r}: write file.py:function or module:function")
    place, name = match["place"], match["name"]
    try:
        module = _module_at(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever the user's code may raise
        raise ConfigError(f"fedllm.aggregation: {place} can't be imported: {error}") from error
    found: Any = getattr(module, name, None)
    if not inspect.isroutine(found):
        known = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        raise ConfigError(f"fedllm.aggregation: {place} has no function {name!r}; it has {', '.join(known) or 'none'}")
    return found


def _module_at(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
