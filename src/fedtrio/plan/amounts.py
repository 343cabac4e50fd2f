"""Amounts as people write them, `5MB`, `2 GiB`, `10min`, `1TFLOP`; how they are shown elsewhere is `report.units`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

_NUMBER = re.compile(r"\s*(-?[0-9_]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {f"{name}iB": 1024.0**power for power, name in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class Unit:
    """What is measured, its multiples by name, and which of them are written, from the least on."""

    what: str
    multiples: Mapping[str, float]
    written: tuple[str, ...]
    example: str

    def read(self, amount: object) -> float:
        """In the base unit; a number without a name is in it already. Raises ValueError for what is no such amount."""
        found = _NUMBER.fullmatch(amount) if isinstance(amount, str) else None
        names = {name.lower(): factor for name, factor in self.multiples.items()} | {"": 1.0}
        if isinstance(amount, int | float) and not isinstance(amount, bool):
            value = float(amount)
        elif found and found[2].lower() in names:
            value = float(found[1].replace("_", "")) * names[found[2].lower()]
        else:
            known = ", ".join(self.multiples)
            raise ValueError(f"{amount!r} is no amount of {self.what}: write it as {self.example} (units: {known})")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{self.what} must be a number above 0, as {self.example}")
        return value

    def text(self, value: float) -> str:
        """As it may have been written: `5MB`."""
        name, factor, _ = self._scale(value)
        return f"{value / factor:.9g}{name}"

    def above(self, value: float) -> str:
        """The least amount of three digits that is not below the value."""
        name, factor, grain = self._scale(value)
        count = math.ceil(round(value / factor / grain, 6))
        while self.read(text := f"{count * grain:.12g}{name}") < value:
            count += 1
        return text

    def below(self, value: float) -> str:
        """The greatest amount of three digits that is below the value."""
        name, factor, grain = self._scale(value * (1 - 1e-9))
        count = math.floor(round(value / factor / grain, 6))
        while self.read(text := f"{count * grain:.12g}{name}") >= value:
            count -= 1
        return text

    def _scale(self, value: float) -> tuple[str, float, float]:
        """The largest unit that is not above the value, and in it the step of the third digit."""
        name = [name for name in self.written if self.multiples[name] <= value or name == self.written[0]][-1]
        factor = self.multiples[name]
        return name, factor, 10.0 ** (math.floor(math.log10(value / factor)) - 2)


def _with(suffix: str) -> dict[str, float]:
    return {prefix + suffix: factor for prefix, factor in _DECIMAL.items()}


BYTES = Unit("bytes", _with("B") | _BINARY, ("B", "kB", "MB", "GB", "TB"), "5MB")
MEMORY = Unit("bytes", BYTES.multiples, ("B", *_BINARY), "2GiB")
FLOPS = Unit("operations", _with("FLOP"), tuple(_with("FLOP")), "1TFLOP")
SECONDS = Unit("time", {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}, ("ms", "s", "min", "h"), "10min")
