"""The few pieces of SVG that the charts are made of: text, line, drawing, axis. Words are escaped here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from fedtrio.report.tables import TITLES

WIDTH, HEIGHT = 420, 300  # of a chart in half a page's width
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 16, 46
LETTER = 7.0  # mean width of a letter at the charts' 12 px, rather too wide than too narrow


# Control characters (but tab and line feed), halves of characters, and what turns the direction of writing
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb\ufffe\uffff]"
)


def printable(words: str) -> str:
    """The words with `�` for what no page, drawing or terminal should be given to show."""
    return _UNPRINTABLE.sub("\ufffd", words)


def tone(framework: str) -> str:
    """The CSS colour of a framework; always the same, unknown ones share one."""
    return f"var(--{framework if framework in TITLES else 'other'})"


def short(text: object, limit: int) -> str:
    """At most `limit` letters, the last a dot-dot-dot where letters are missing."""
    words = str(text)
    return words if len(words) <= limit else words[: limit - 1] + "…"


def text(x: float, y: float, words: object, anchor: str = "start", extra: str = "") -> str:
    """Words at a spot; `extra` is further markup of our own."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(printable(str(words)))}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str, extra: str = "") -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"{extra}/>'


def svg(name: str, title: str, desc: str, size: tuple[float, float], body: Iterable[str]) -> str:
    """A whole drawing, told to screen readers by its title and description."""
    width, height = size
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-labelledby="{name}-t {name}-d"'
        f' style="--w:{width:.0f}px"><title id="{name}-t">{escape(title)}</title>'
        f'<desc id="{name}-d">{escape(desc)}</desc>{"".join(body)}</svg>'
    )


@dataclass(frozen=True)
class Axis:
    """Values to pixels, linear or logarithmic, with round ticks."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        place = math.log10(value) if self.log else value
        return self.start + (place - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the axis: 1, 2, 5 times a power of ten."""
        if not self.log:
            step = nice_step((self.high - self.low) / count)
            first = math.ceil(self.low / step - 1e-9)
            return [step * k for k in range(first, math.floor(self.high / step + 1e-9) + 1)]
        powers = range(math.floor(math.log10(self.low)) - 1, math.ceil(math.log10(self.high)) + 2)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            marks = [digit * 10.0**power for power in powers for digit in digits]
            marks = [mark for mark in marks if self.low * 0.999 <= mark <= self.high * 1.001]
            if len(marks) <= count + 1:
                return marks
        return marks[:: math.ceil(len(marks) / count)]


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * 0.999)
