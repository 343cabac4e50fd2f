"""Which codec which message gets: what a side sends is encoded by kind and direction, and decoded by the other.

What training depends on is what arrives: a site starts from the adapter as it decoded it, and an update (Δ) is taken
and restored against that. What error feedback has not yet sent is part of the site's memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from torch import Tensor

from .codecs import Codec, Crossing, difference, parse, restore
from .errors import ConfigError
from .message import Message

Use = Literal["adapter", "activations", "gradients", "logits"]
USES: dict[str, Use] = {
    "adapter": "adapter",
    "update": "adapter",
    "gradients": "adapter",
    "activations": "activations",
    "activations and labels": "activations",
    "activation gradients": "gradients",
    "logits": "logits",
    "aggregated logits": "logits",
}
M = TypeVar("M", bound=Message)
EXACT = frozenset({"squared norms"})  # a few numbers that both sides must agree on


def codecs_of(given: str | Mapping[Use, str], direction: str) -> dict[str, Codec]:
    """A codec for each use; one text stands for all uses that it is made for.

    Raises ConfigError for codecs that do not exist, or are not for that use or direction.
    """
    if isinstance(given, str):
        codec = parse(given, skip=EXACT)
        chosen = dict.fromkeys(codec.uses, codec) if codec.stages else {}
    else:
        chosen = {use: parse(text, use, skip=EXACT) for use, text in given.items()}
    for use, codec in chosen.items():
        if direction == "down" and use == "adapter" and codec.on_delta:
            raise ConfigError(f"{codec.text} encodes updates, and down to the sites travel adapters: not for wire.down")
    return {str(use): codec for use, codec in chosen.items()}


@dataclass(frozen=True)
class Coding:
    """The codecs of a run; the default changes nothing."""

    seed: int = 0
    up: Mapping[str, Codec] = field(default_factory=dict)
    down: Mapping[str, Codec] = field(default_factory=dict)

    def write(self, message: Message, at: Crossing, start: Message | None, memory: dict[str, Any]) -> Message:
        """The message as it travels. `start` is the first that the site received in the round, `memory` the site's.

        Raises MessageError for numbers that the codec can't hold.
        """
        codec = self.codec(message.kind, at.direction)
        if codec is None:
            return message
        tensors, state = dict(message.tensors), None
        if codec.on_delta and message.kind == "adapter" and start is not None:
            tensors |= difference(_shared(tensors, start), start.tensors)
        if codec.feedback:
            state = memory["feedback"] = dict(memory.get("feedback", {}))
        return replace(message, tensors=codec.encode(tensors, at, state))

    def read(self, message: M, direction: str, start: Message | None) -> M:
        """The message as it was meant. Raises MessageError for what the codec of this kind does not give."""
        codec = self.codec(message.kind, direction)
        if codec is None:
            return message
        tensors = codec.decode(message.tensors)
        if codec.on_delta and message.kind == "adapter" and start is not None:
            tensors |= restore(_shared(tensors, start), start.tensors)
        return replace(message, tensors=tensors)

    def codec(self, kind: str, direction: str) -> Codec | None:
        """What encodes messages of that kind; None: nothing does."""
        codecs = self.up if direction == "up" else self.down
        return codecs.get(USES.get(kind, ""))


def _shared(tensors: Mapping[str, Tensor], start: Message) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name in start.tensors}
