"""FedKSeed: sites send seeds and scalars, and whoever has the scalars replays every step.

"Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18 Kilobytes" (FedKSeed,
arXiv:2312.06353), here on the adapter. A step along z_s, which seed s draws, is g = (ℓ(θ+εz_s) − ℓ(θ−εz_s)) / 2ε and
θ ← θ − ηgz_s. Sums of g by seed say all that happened since the start: θ = θ₀ − η Σ_s G_s z_s. That holds for plain SGD
at constant rates alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..aggregation.adapters import normalised
from ..errors import MessageError
from ..message import Message, Reply
from ..models.cut import WHOLE
from ..models.train import Adapter
from .lab import Lab, ServerProgram, Site, State, weights_of


@dataclass(frozen=True)
class Seeds:
    """The two programs of FedKSeed; `number` of candidate seeds, `epsilon` of the differences."""

    number: int
    epsilon: float

    def setup(self, lab: Lab) -> State:
        """No seed has been walked along yet."""
        return {"adapter": lab.initial, "seeds": {"sums": torch.zeros(self.number, dtype=torch.float64)}}

    def server(self, lab: Lab, state: State, cohort: Sequence[str]) -> ServerProgram:
        """Send the sums of all seeds, add the weighted mean of what comes back, replay."""
        sums = state["seeds"]["sums"]
        inbox = yield dict.fromkeys(cohort, Message("seed sums", {"sums": sums.to(lab.model.dtype)}))
        sums = sums.clone()
        for site, share in normalised(weights_of(inbox)).items():
            if inbox[site].tensors:
                seeds = inbox[site].tensor("seeds").long()
                sums.index_add_(0, seeds, share * inbox[site].tensor("sums").double())
        state["seeds"] = {"sums": sums}
        state["adapter"] = self.replayed(lab, sums.to(lab.model.dtype))

    def client(self, lab: Lab, site: Site, first: Reply) -> Message:
        """Replay, walk, and send the seeds that were touched with their sums."""
        walked = self.walk(lab, self.replayed(lab, first.tensor("sums")), site)
        tensors = {}
        if walked:
            seeds = sorted(walked)
            sums = torch.tensor([walked[s] for s in seeds], dtype=torch.float64).to(lab.model.dtype)
            tensors = {"seeds": torch.tensor(seeds, dtype=torch.int32), "sums": sums}
        return Message("seed sums", tensors, {"weight": site.data.weight})

    def check(self, lab: Lab, site: str, reply: Reply) -> None:
        """Known seeds, each once and in order, and a bounded number for each."""
        lab.guards.kind(site, reply, "seed sums")
        lab.guards.weight(site, reply)
        if not reply.tensors:
            return
        lab.guards.names(site, reply, "seeds", "sums")
        seeds = reply.tensor("seeds")
        lab.guards.form(site, "seeds", seeds, (None,), torch.int32)
        lab.guards.form(site, "sums", reply.tensor("sums"), (len(seeds),), lab.model.dtype)
        lab.guards.values(site, "sums", reply.tensor("sums"))
        if int(seeds.min()) < 0 or int(seeds.max()) >= self.number or bool((seeds.diff() <= 0).any()):
            raise MessageError(f"{site} sent seeds that are not in rising order from 0 to {self.number - 1}")

    def replayed(self, lab: Lab, sums: Tensor) -> dict[str, Tensor]:
        """θ₀ − η Σ_s G_s z_s, summed in fp64 in the order of the seeds: the same bits wherever it is done."""
        moved = {name: tensor.double() for name, tensor in lab.initial.items()}
        for seed in sums.nonzero().flatten().tolist():
            for name, z in self.direction(lab, seed).items():
                moved[name] = moved[name] - lab.train.rate(name) * float(sums[seed]) * z.double()
        return {name: tensor.to(lab.initial[name].dtype) for name, tensor in moved.items()}

    def walk(self, lab: Lab, start: Adapter, site: Site) -> dict[int, float]:
        """The sum of g for each seed that a site's steps along its batches touched."""
        lab.hold(lab.model.held_bytes(WHOLE) + 2 * sum(t.numel() * t.element_size() for t in start.values()))
        here = {name: tensor.double() for name, tensor in start.items()}
        walked: dict[int, float] = {}
        with torch.no_grad():
            for step, batch in enumerate(site.data.batches(site.round)):
                seed = lab.seed_of(site.round, f"seeds {site.name}", step) % self.number
                z = self.direction(lab, seed)
                above, below = (
                    float(lab.loss(_stepped(lab, here, z, sign * self.epsilon), batch, site, step).double())
                    for sign in (1, -1)
                )
                slope = (above - below) / (2 * self.epsilon)
                walked[seed] = walked.get(seed, 0.0) + slope
                here = {name: t - lab.train.rate(name) * slope * z[name].double() for name, t in here.items()}
        return walked

    def direction(self, lab: Lab, seed: int) -> dict[str, Tensor]:
        """z_s ~ N(0, 1), always drawn on the CPU: devices draw differently."""
        generator = torch.Generator().manual_seed(lab.seed_of(0, "direction", seed))
        return {name: _normal(lab.initial[name], generator) for name in sorted(lab.initial)}


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def _stepped(lab: Lab, here: Adapter, z: Adapter, by: float) -> dict[str, Tensor]:
    """θ + by·z in the model's precision; θ itself is never moved there and back."""
    return {name: lab.to_device((t + by * z[name].double()).to(z[name].dtype)) for name, t in here.items()}
