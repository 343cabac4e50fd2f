"""The two yardsticks: all data in one place (the ceiling), and each site alone (the floor). Nothing crosses a wire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ..message import Message, Reply
from ..models.train import Adapter
from .fedllm import FedLLM
from .lab import Framework, Lab, ServerProgram, Site, State


class Centralized(FedLLM):
    """Plain training on the pooled data: the run gives it one site that holds everything."""

    federated: ClassVar[bool] = False
    pooled: ClassVar[bool] = True


class Local(Framework):
    """Each site trains on its own data alone and keeps its adapter."""

    federated: ClassVar[bool] = False

    def setup(self, lab: Lab) -> State:
        """The server holds nothing."""
        return {}

    def server(self, lab: Lab, state: State, cohort: Sequence[str]) -> ServerProgram:
        """Let each site train."""
        yield dict.fromkeys(cohort, Message("start"))

    def client(self, lab: Lab, site: Site, first: Reply) -> Message:
        """Train the site's own adapter further."""
        site.memory["adapter"] = lab.fit(site.memory.get("adapter", lab.model.initial), site)
        return Message("done")

    def adapter(self, lab: Lab, state: State) -> Adapter | None:
        """There is no common model."""
        return None

    def own_adapter(self, lab: Lab, site: Site) -> Adapter:
        """The site's own; one that never took part still has the common start."""
        return site.memory.get("adapter", lab.model.initial)
