"""From `"topk:0.1+int8"` to a `Codec`: which codecs there are and what they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..errors import ConfigError, did_you_mean
from .codec import Codec
from .ranks import LowRank, Rank
from .stages import QSGD, Cast, Nearest, Stage, TopK

PER = {"tensor": {"per": "tensor"}, "row": {"per": "row"}, "token": {"per": "token"}}
SCALES = {"fp32": {"scale": torch.float32}, "fp16": {"scale": torch.float16}, "bf16": {"scale": torch.bfloat16}}
FEEDBACK = {"feedback": {"feedback": True}}
KEPT = {
    "plain": {"feedback": False},
    "token": {"per": "token", "feedback": False},
    "logits": {"per": "token", "feedback": False, "rest": "mass"},
    "absent": {"per": "token", "feedback": False, "rest": "absent"},
}


@dataclass(frozen=True)
class Kind:
    """One codec as it is written: what makes it, what it does, its number if it takes one, and its words."""

    make: Callable[..., Stage]
    about: str
    number: str | None = None
    words: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    "fp16": Kind(partial(Cast, torch.float16), "half precision: 2 bytes a number, range 6e-8 … 65504"),
    "bf16": Kind(partial(Cast, torch.bfloat16), "bfloat16: 2 bytes a number, the range of fp32"),
    "int8": Kind(partial(Nearest, 127), "1 byte a number and a step for each row", words=PER | SCALES | FEEDBACK),
    "int4": Kind(partial(Nearest, 7), "half a byte a number and a step for each row", words=PER | SCALES | FEEDBACK),
    "qsgd": Kind(QSGD, "random rounding to so many levels, for updates", "levels", PER | SCALES),
    "topk": Kind(TopK, "the largest: a count or a fraction; of an update, of each token, of logits", "amount", KEPT),
    "rank": Kind(Rank, "LoRA pairs of a smaller rank", "rank"),
    "lowrank": Kind(LowRank, "tokens on so many principal directions of the batch", "rank"),
}


def known() -> dict[str, str]:
    """How each codec is written, and what it does."""
    return {_usage(name): kind.about for name, kind in KINDS.items()}


def parse(text: str | Sequence[str] | None, use: str | None = None, **options: Any) -> Codec:
    """The codec of a text such as `"topk:0.1+int8"`, or of the list of its stages; None and `"none"`: no codec.

    `use` is what it shall encode: `adapter`, `activations`, `gradients` or `logits`. Options are fields of `Codec`.
    Raises ConfigError for what is unknown, what makes no sense together, and what is not for this use.
    """
    stages = text.split("+") if isinstance(text, str) else list(text or [])
    stages = [stage.replace(" ", "") for stage in stages]
    if stages == ["none"]:
        stages = []
    codec = Codec(tuple(_stage(stage) for stage in stages), text="+".join(stages) or "none", **options)
    if use is not None and use not in codec.uses:
        raise ConfigError(f"codec {codec.text!r} is for {' and '.join(sorted(codec.uses))}, not for {use}")
    return codec


def _stage(text: str) -> Stage:
    name, *words = text.split(":")
    if name not in KINDS:
        raise ConfigError(f"no codec {name!r}{did_you_mean(name, KINDS)}; there are {', '.join(KINDS)}")
    kind, chosen = KINDS[name], {}
    for word in words:
        found = kind.words.get(word) or _numbered(kind, word)
        if found is None or found.keys() & chosen.keys():
            why = "says the same twice" if found else f"does not know {word!r}{did_you_mean(word, kind.words)}"
            raise ConfigError(f"codec {text!r} {why}; it is written {_usage(name)}")
        chosen |= found
    if kind.number and kind.number not in chosen:
        raise ConfigError(f"codec {text!r} lacks its number; it is written {_usage(name)}")
    return kind.make(**chosen)


def _numbered(kind: Kind, word: str) -> dict[str, Any] | None:
    number = _number(word)
    return {kind.number: number} if kind.number and number is not None else None


def _number(word: str) -> int | float | None:
    for read in (int, float):
        try:
            return read(word)
        except ValueError:
            continue
    return None


def _usage(name: str) -> str:
    kind = KINDS[name]
    number = f":{kind.number.upper()}" if kind.number else ""
    return name + number + (f"[:{'|'.join(kind.words)}]" if kind.words else "")
