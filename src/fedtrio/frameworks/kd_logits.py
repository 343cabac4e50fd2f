"""How logits travel in KD-FedLLM: which codec, and how many of each row fit into what a site may send."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import Tensor

from ..codecs import Codec, Spec, parse
from ..codecs.stages import TopK
from ..errors import ConfigError, did_you_mean
from ..message import Message

T = TypeVar("T")


def codec_of(text: str) -> Codec:
    """The codec of logits; small public sets are encoded like large ones, so that bytes are those of the formula.

    Raises ConfigError for what is no codec of logits.
    """
    text = "none" if text == "auto" else text
    return parse(text, "logits" if text != "none" else None, small=0, limit_bytes=1 << 62)  # what is decoded is known


def top_k(codec: Codec) -> TopK | None:
    """Its first stage, where that keeps the largest."""
    first = codec.stages[0] if codec.stages else None
    return first if isinstance(first, TopK) else None


def fitted(codec: Codec, logits: Spec, budget: float | None, who: str) -> Codec:
    """The codec, or with as small a k as fits into `budget` bytes: k = ⌊budget / (M·(b_v + b_i))⌋.

    The k is a function of the budget and of M and C alone, so that both sides know it. After AdaLD (arXiv:2509.01750),
    where k follows from the rate of a site's channel. Raises ConfigError where not even k = 1 fits.
    """
    top = top_k(codec)
    if budget is None or top is None or codec.payload_bytes({"logits": logits}) <= budget:
        return codec

    def keeping(k: int) -> Codec:
        return replace(codec, stages=(replace(top, amount=k), *codec.stages[1:]))

    def nbytes(k: int) -> int:
        return keeping(k).payload_bytes({"logits": logits})

    k = bisect_right(range(1, top.kept(logits.shape[-1])), budget, key=nbytes)
    if not k:
        raise ConfigError(
            f"{who} may send {budget:,.0f} bytes of logits, and one of each row takes {nbytes(1):,}: raise the budget, "
            "or take fewer public texts (data.max_public, kd.public_per_round)"
        )
    return keeping(k)


class Unread(Mapping[str, Tensor]):
    """Logits by site, decoded when they are asked for: over a vocabulary, those of all sites would fill the memory."""

    def __init__(self, messages: Mapping[str, Message], read: Callable[[str, Message], Tensor]) -> None:
        self._messages, self._read = messages, read

    def __getitem__(self, site: str) -> Tensor:
        return self._read(site, self._messages[site])

    def __iter__(self) -> Iterator[str]:
        return iter(self._messages)

    def __len__(self) -> int:
        return len(self._messages)


def check_names(settings: Mapping[str, object], sites: Sequence[str]) -> None:
    """Raises ConfigError for a name or pattern that no site bears; `settings` by what they are called."""
    for setting, given in settings.items():
        for pattern in given if isinstance(given, Mapping) else ():
            if not any(fnmatchcase(site, pattern) for site in sites):
                near = did_you_mean(pattern, sites)
                shown = ", ".join(sites[:8]) + (f" and {len(sites) - 8} more" if len(sites) > 8 else "")
                raise ConfigError(f"{setting}: no site is called {pattern!r}{near}; there are {shown}")


def of_site(setting: Mapping[str, T] | T | None, site: str) -> T | None:
    """A setting for one site: the same for all, or that of the first pattern (such as `bank-*`) that fits its name."""
    if not isinstance(setting, Mapping):
        return setting
    return next((value for pattern, value in setting.items() if fnmatchcase(site, pattern)), None)
