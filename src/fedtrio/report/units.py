"""Numbers as people read them: bytes, memory, operations, time, shares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def finite(value: object) -> float | None:
    """The number, or None where it is missing, null, NaN or infinite."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def _scaled(value: float | None, units: Sequence[str], base: float) -> str:
    if value is None:
        return "–"
    step = 0
    while abs(value) >= base * 0.9995 and step < len(units) - 1:
        value, step = value / base, step + 1
    whole = value == int(value) and step == 0
    digits = 0 if whole or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {units[step]}"


def bytes_text(count: float | None) -> str:
    """Decimal units, as networks are sold: `12.3 MB`."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"), 1000)


def memory_text(count: float | None) -> str:
    """Binary units, as memory is sold: `512 MiB`."""
    return _scaled(count, ("B", "KiB", "MiB", "GiB", "TiB"), 1024)


def flops_text(count: float | None) -> str:
    """Floating-point operations: `3.41 GFLOP`."""
    return _scaled(count, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"), 1000)


def seconds_text(seconds: float | None) -> str:
    """Seconds below two minutes, minutes below two hours, hours below two days, then days."""
    if seconds is None or seconds < 120:
        return _scaled(seconds, ("s",), 1000)
    if seconds < 172_800:
        return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:.1f} d"


def count_text(count: float | None) -> str:
    """`12,345`."""
    return "–" if count is None else f"{round(count):,}"


def percent_text(share: float | None, digits: int = 1) -> str:
    """`81.0 %` of 0.81."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def factor_text(factor: float) -> str:
    """`1.3`, `12`, `3,400`: how many times."""
    return f"{factor:.1f}" if factor < 9.95 else f"{float(f'{factor:.2g}'):,.0f}"


def names_text(names: Iterable[str]) -> str:
    """`A`, `A and B`, `A, B and C`; nothing of nothing."""
    *head, last = [*names] or [""]
    return f"{', '.join(head)} and {last}" if head else last


def mean(values: Iterable[object]) -> float | None:
    """Mean of the finite values, None where there is none."""
    kept = [number for number in map(finite, values) if number is not None]
    return sum(kept) / len(kept) if kept else None
