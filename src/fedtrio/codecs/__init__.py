"""Codecs: fewer bytes for what crosses the wire. `parse("topk:0.1+int8")` is a `Codec`; see `codec.py`."""

from .codec import Codec, difference, restore
from .parse import KINDS, known, parse
from .parts import Crossing, Spec
from .stages import Parts, Stage

__all__ = ["KINDS", "Codec", "Crossing", "Parts", "Spec", "Stage", "difference", "known", "parse", "restore"]
