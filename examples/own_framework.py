"""A framework of your own: the adapter goes from site to site, and each trains it on.

This is cyclic weight transfer of "Distributed deep learning networks among institutions for medical imaging" (Chang et
al., JAMIA 25(8), 2018): nothing is averaged, and a round is as many crossings as there are sites.

python examples/own_framework.py [FOLDER]     runs it beside FedLLM on a little of the built-in data
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

from pydantic import Field

from fedtrio import extend
from fedtrio.compare import compare
from fedtrio.config_file import load_config
from fedtrio.frameworks.lab import Framework, Lab, ServerProgram, Site, State
from fedtrio.message import Message, Reply
from fedtrio.models.train import Adapter


class Cyclic(Framework):
    """Settings are fields; every `yield` is one crossing of the wire."""

    shuffle: bool = Field(default=True, description="another order of the sites in each round")

    def setup(self, lab: Lab) -> State:
        return {"adapter": lab.initial}

    def server(self, lab: Lab, state: State, cohort: Sequence[str]) -> ServerProgram:
        for site in lab.shuffled(cohort) if self.shuffle else sorted(cohort):
            inbox = yield {site: Message("adapter", state["adapter"])}
            if site in inbox:  # one that falls silent is passed over
                state["adapter"] = dict(inbox[site].tensors)

    def client(self, lab: Lab, site: Site, first: Reply) -> Message:
        return Message("adapter", lab.fit(first.tensors, site))

    def check(self, lab: Lab, site: str, sent: Message, reply: Reply) -> None:
        lab.guards.kind(site, reply, "adapter")
        lab.guards.like(site, reply.tensors, sent.tensors)

    def adapter(self, lab: Lab, state: State) -> Adapter:
        return state["adapter"]


extend.framework("cyclic", Cyclic())

if __name__ == "__main__":
    settings = ["frameworks=[fedllm, cyclic]", "rounds=2", "threads=1"]
    settings += ["data.max_train=120", "data.max_test=60", "data.max_public=8"]
    with tempfile.TemporaryDirectory() as folder:
        out = sys.argv[1] if len(sys.argv) > 1 else folder
        for run in compare(load_config(settings=settings), out, jobs=1)["runs"]:
            print(f"{run['framework']:<8} accuracy {run['accuracy']:.3f}, {run['messages']} messages")
