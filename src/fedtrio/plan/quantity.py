"""A number that grows with the shape of a batch as costs of a transformer do, found from a few values of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Quantity:
    """Q(B, T) = B·(a + bT + cT²) + dT."""

    terms: tuple[Fraction, Fraction, Fraction, Fraction]

    def at(self, B: int, T: int) -> int:
        """Its value, a whole number."""
        a, b, c, d = self.terms
        return round(B * (a + b * T + c * T * T) + d * T)

    def __add__(self, other: Quantity) -> Quantity:
        return Quantity(tuple(x + y for x, y in zip(self.terms, other.terms, strict=True)))  # type: ignore[arg-type]

    def times(self, factor: Fraction | int) -> Quantity:
        """Each term multiplied."""
        return Quantity(tuple(factor * x for x in self.terms))  # type: ignore[arg-type]

    @classmethod
    def through(cls, values: Mapping[tuple[int, int], int]) -> Quantity:
        """That which has these values at three widths of two texts, and at the first width of three texts."""
        *points, (more, first) = values
        assert [B for B, _ in points] == [2, 2, 2] and more == 3 and first == points[0][1]
        d = Fraction(3 * values[points[0]] - 2 * values[3, first], first)
        (x, u), (y, v), (z, w) = ((T, (values[2, T] - d * T) / 2) for _, T in points)
        c = ((w - u) / (z - x) - (v - u) / (y - x)) / (z - y)
        b = (v - u) / (y - x) - c * (x + y)
        return cls((u - b * x - c * x * x, b, c, d))
