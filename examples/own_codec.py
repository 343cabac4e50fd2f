"""A codec of your own: one bit for each number of an update, and what that loses is sent later.

The scaled sign with error feedback of "Error Feedback Fixes SignSGD and other Gradient Compression Schemes"
(arXiv:1901.09847): x becomes (‖x‖₁ / d) · sign(x), d being the number of its elements.

python examples/own_codec.py [FOLDER]     runs it on a little of the built-in data
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedtrio import extend
from fedtrio.codecs import Crossing, Parts, Spec, Stage
from fedtrio.compare import compare
from fedtrio.config_file import load_config


@dataclass(frozen=True)
class Sign(Stage):
    reduces: ClassVar[bool] = False  # a number format, which comes last: topk:0.1:plain+sign is one more codec
    feedback: bool = True  # so it is for updates of adapters alone

    def layout(self, spec: Spec) -> dict[str, Spec]:
        """What a tensor becomes, known without its values: the bytes of a codec can be told beforehand."""
        bits = spec.part("bits", torch.uint8, (spec.size + 7) // 8)
        return {"bits": bits, "step": spec.part("step", torch.float32, 1)}

    def encode(self, x: Tensor, spec: Spec, at: Crossing) -> Parts:
        bits = torch.from_numpy(np.packbits((x >= 0).cpu().numpy().ravel()))
        return {"bits": bits, "step": x.abs().mean().float().reshape(1)}

    def decode(self, parts: Parts, spec: Spec) -> Tensor:
        """Types and shapes have been checked against `layout`; what the values may be is the codec's to say."""
        step = float(parts["step"])
        if step < 0:
            raise spec.wrong("a step that is not negative", step)
        signs = np.unpackbits(parts["bits"].numpy(), count=spec.size).reshape(spec.shape)
        return (torch.from_numpy(signs).to(spec.dtype) * 2 - 1) * step


extend.codec("sign", Sign, "one bit a number and one step a tensor, for updates")

if __name__ == "__main__":
    settings = ["frameworks=[fedllm]", "rounds=2", "threads=1", "data.max_train=120", "data.max_test=60"]
    with tempfile.TemporaryDirectory() as folder:
        out = sys.argv[1] if len(sys.argv) > 1 else folder
        (run,) = compare(load_config(settings=[*settings, "wire.up=sign", "data.max_public=8"]), out, jobs=1)["runs"]
        print(f"accuracy {run['accuracy']:.3f}, {run['bytes_up']:,} bytes up and {run['bytes_down']:,} down")
