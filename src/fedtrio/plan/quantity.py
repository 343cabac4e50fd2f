"""A number that grows with the shape of a batch as costs of a transformer do, found from a few values of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

Terms = tuple[Fraction, Fraction, Fraction, Fraction, Fraction]


@dataclass(frozen=True)
class Quantity:
    """Q(B, T) = B·(a + bT + cT²) + d + eT.

    The first part is of each text, the second of what all texts share: adapters cast to bf16, tables of positions.
    """

    terms: Terms

    def at(self, B: int, T: int) -> int:
        """Its value, a whole number."""
        a, b, c, d, e = self.terms
        return round(B * (a + b * T + c * T * T) + d + e * T)

    def plus(self, other: Quantity, factor: Fraction | int = 1) -> Quantity:
        """Q + factor · other."""
        return Quantity(tuple(x + factor * y for x, y in zip(self.terms, other.terms, strict=True)))  # type: ignore[arg-type]

    @classmethod
    def through(cls, widths: tuple[int, int, int], values: Mapping[tuple[int, int], int]) -> Quantity:
        """That which has these values at three widths of two texts, and at the first two widths of three texts."""
        x, y, z = widths
        shared_x, shared_y = (3 * values[2, T] - 2 * values[3, T] for T in (x, y))
        e = Fraction(shared_y - shared_x, y - x)
        d = shared_x - e * x
        u, v, w = ((values[2, T] - d - e * T) / 2 for T in widths)
        c = ((w - u) / (z - x) - (v - u) / (y - x)) / (z - y)
        b = (v - u) / (y - x) - c * (x + y)
        return cls((u - b * x - c * x * x, b, c, d, e))


def shapes(widths: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Of which batches the values must be known."""
    return [*((2, T) for T in widths), *((3, T) for T in widths[:2])]
