"""What each codec costs and what it loses: milliseconds, bytes and relative error, one thread.

    python benchmarks/codecs.py [--tokens 330] [--width 192] [--repeats 30]

Tables: tokens at the cut [tokens, width]; an update of rank-8 adapters of 12 blocks with a head; the same adapters
pruned, with the error of the products B·A; logits [1000, 77], with the error of their softmax. Values are normal
numbers, the worst case for codecs that keep less: real updates and activations are sparser and of lower rank. Times are
the least of the repeats.
"""

from __future__ import annotations

import argparse
import timeit
from collections.abc import Callable

import torch

from fedtrio.codecs import Crossing, parse

AT = Crossing(seed=0, round=1, site="a", direction="up")
BOUNDARY = ["fp16", "bf16", "int8", "int4", "topk:16:token", "topk:0.25:token+int8", "lowrank:32", "lowrank:32+int8"]
ADAPTER = ["fp16", "int8:tensor", "int4:row", "qsgd:127:row", "qsgd:7:row", "topk:0.01", "topk:0.1", "topk:0.1+int8"]
RANK = ["rank:6", "rank:4", "rank:4+int8:row"]
LOGITS = ["fp16", "int8", "topk:8:logits", "topk:8:logits+fp16", "topk:8:absent+fp16"]


Tensors = dict[str, torch.Tensor]


def products(adapter: Tensors) -> Tensors:
    return {name: adapter[name.replace("_A", "_B")] @ A for name, A in adapter.items() if "_A" in name}


def probabilities(logits: Tensors) -> Tensors:
    return {name: z.softmax(-1) for name, z in logits.items()}


def line(text: str, tensors: Tensors, seen: Callable[[Tensors], Tensors], repeats: int) -> str:
    """One codec: milliseconds to encode and decode, bytes, their share, and the relative error of what is `seen`."""
    codec = parse(text)
    sent = codec.encode(tensors, AT, {})
    back = codec.decode(sent)
    encode = min(timeit.repeat(lambda: codec.encode(tensors, AT, {}), number=1, repeat=repeats))
    decode = min(timeit.repeat(lambda: codec.decode(sent), number=1, repeat=repeats))
    size, full = codec.payload_bytes(tensors), parse("none").payload_bytes(tensors)
    before, after = seen(tensors), seen(back)
    lost = sum(float((after[n] - t).square().sum()) for n, t in before.items())
    error = (lost / sum(float(t.square().sum()) for t in before.values())) ** 0.5
    return f"{text:32s} {encode * 1e3:9.3f} {decode * 1e3:9.3f} {size:11,d} {size / full:7.1%} {error:9.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=330)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width = options.width
    adapter = {"score.weight": torch.randn(77, width)}
    for block in range(12):
        adapter[f"h.{block}.c_attn.lora_A.weight"] = torch.randn(8, width)
        adapter[f"h.{block}.c_attn.lora_B.weight"] = torch.randn(3 * width, 8)
    tables = {
        f"tokens [{options.tokens}, {width}]": (BOUNDARY, {"h": torch.randn(options.tokens, width)}, dict),
        f"an update of {sum(t.numel() for t in adapter.values()):,} numbers": (ADAPTER, adapter, dict),
        "the adapters themselves": (RANK, adapter, products),
        "logits [1000, 77]": (LOGITS, {"logits": 3 * torch.randn(1000, 77)}, probabilities),
    }
    for title, (texts, tensors, seen) in tables.items():
        print(f"\n{title:32s} {'encode ms':>9s} {'decode ms':>9s} {'bytes':>11s} {'share':>7s} {'error':>9s}")
        for text in texts:
            print(line(text, tensors, seen, options.repeats))


if __name__ == "__main__":
    main()
