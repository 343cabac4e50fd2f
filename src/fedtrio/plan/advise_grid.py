"""The settings that are looked at: of each framework its configuration, and what costs less.

What changes no result (where the model is cut, and in `sflv1` who has the head) is free. All else gives something up:
numbers are rounded, or fewer of them trained and sent. Rounding comes first: to 16 and to 8 bits it was not seen to
cost accuracy, while the top tenth of an update lost half of what was learnt (docs/results.md), and is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from pydantic import ValidationError

from ..config import Config
from ..errors import ConfigError
from ..frameworks.kd_logits import codec_of, top_k

BITS = {"none": 0, "bf16": 1, "int8": 2, "int4": 3}  # how often fp32's 32 bits are halved
LOGITS = {"none": 0, "fp16": 1, "int8": 2}
SHARES = (1, 2, 4, 8)  # of the public texts, as 1/2
CUTS = 8  # cuts that are looked at, at most: closer together where they are low

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Option:
    """Values of some settings, as `--set` keys (none: as configured), and what they give up.

    `reduced` is how often what trains or travels was halved in number, `rounded` how often in bits; up and down are
    added up. Bytes up, bytes down and a site's work depend on some of the settings alone, on `up`, `down` and `work`
    (None: on all), so that few predictions serve many options.
    """

    settings: Settings = field(default_factory=dict)
    reduced: float = 0.0
    rounded: float = 0.0
    up: Settings | None = None
    down: Settings | None = None
    work: Settings | None = None

    def __add__(self, other: Option) -> Option:
        joined = {way: {**self.on(way), **other.on(way)} for way in ("up", "down", "work")}
        settings = {**self.settings, **other.settings}
        return Option(settings, self.reduced + other.reduced, self.rounded + other.rounded, **joined)

    def on(self, what: str) -> Settings:
        """The settings that bytes `up` or `down` or the `work` depend on."""
        return self.settings if (some := getattr(self, what)) is None else some


AS_IS = Option()


def options(config: Config, framework: str, depth: int, classes: int, public: int) -> Iterator[Option]:
    """All that are looked at of one framework, of a resolved configuration.

    The model has `depth` blocks and `classes` outputs, and there are `public` texts.
    """
    parts = {"fedllm": _fedllm, "kd": _kd, "split": _split}[framework](config, depth, classes, public)
    for chosen in product(*parts):
        option = sum(chosen, AS_IS)
        if framework != "split" or not _idle_server(config, option.settings, depth):
            yield option


def applied(config: Config, framework: str, settings: Settings) -> Config | None:
    """The configuration of one framework with these settings; None where they don't go together."""
    tree = config.model_dump() | {"frameworks": [framework], "seeds": config.seeds[:1]}
    for key, value in settings.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node[part] = dict(node[part])
            node = node[part]
        node[last] = value
    try:
        made = Config.model_validate(tree)
    except (ValidationError, ConfigError):
        return None
    made._base = config.base
    return made


Parts = list[list[Option]]


def _fedllm(config: Config, depth: int, classes: int, public: int) -> Parts:
    return [_ranks(config), _codecs(config, "adapter")]


def _kd(config: Config, depth: int, classes: int, public: int) -> Parts:
    if config.kd.protocol == "feddf":  # adapters travel
        return [_ranks(config), _texts(config, public), _codecs(config, "adapter")]
    ranks = [replace(option, up={}, down={}) for option in _ranks(config)]
    return [ranks, _texts(config, public), _logits(config, classes)]


def _split(config: Config, depth: int, classes: int, public: int) -> Parts:
    split, labels = config.split, [AS_IS]
    end = depth - split.last_blocks
    first = min(split.least_cut, end, split.cut if isinstance(split.cut, int) else end)
    if split.labels == "server" and not split.local_loss:
        labels.append(Option({"split.labels": "client"}))
    cuts = [Option({} if cut == split.cut else {"split.cut": cut}) for cut in spread(first, end, CUTS)]
    as_is = [] if isinstance(split.cut, int) else [AS_IS]  # each site's own cut, or auto
    return [_ranks(config), [*as_is, *cuts], labels, _codecs(config, "activations", "gradients", "adapter")]


def _idle_server(config: Config, settings: Settings, depth: int) -> bool:
    """Whether a U-shape would leave the server without a block, where nobody has asked for that."""
    cut, labels = (settings.get(f"split.{key}", getattr(config.split, key)) for key in ("cut", "labels"))
    asked = not settings.keys() & {"split.cut", "split.labels"}
    return labels == "client" and cut == depth - config.split.last_blocks and not asked


def spread(first: int, last: int, number: int) -> list[int]:
    """At most so many whole numbers from first to last, both among them, in steps that grow."""
    if last - first < number:
        return list(range(first, last + 1))
    growing = [first + round((last - first) ** (i / (number - 1))) for i in range(number)]
    return sorted({first, *growing[1:], last})


def _ranks(config: Config) -> list[Option]:
    """The configured rank, and halves of it; ranks that sites have of their own stay."""
    if not isinstance(rank := config.lora.r, int) or config.lora.capacity:
        return [AS_IS]
    halved = [rank >> times for times in range(1, rank.bit_length())]
    return [AS_IS, *(Option({"lora.r": r}, reduced=2 * math.log2(rank / r)) for r in halved)]


def _texts(config: Config, public: int) -> list[Option]:
    """All public texts that a round uses, and shares of them."""
    used = min(config.kd.public_per_round or public, public)
    fewer = dict.fromkeys(math.ceil(used / share) for share in SHARES[1:])
    return [
        AS_IS,
        *(Option({"kd.public_per_round": n}, reduced=2 * math.log2(used / n)) for n in fewer if 0 < n < used),
    ]


def _codecs(config: Config, *uses: str) -> list[Option]:
    """The wire's codecs as configured, and coarser ones each way, for what travels; most of it is the first."""
    return _both_ways(*(_coarser(config, way, uses) for way in ("up", "down")))


def _coarser(config: Config, way: str, uses: Sequence[str]) -> list[Option]:
    given = getattr(config.wire, way)
    now = given if isinstance(given, str) else given.get(uses[0], "none")
    if now not in BITS:
        return [AS_IS]  # a codec that is none of these was chosen with care
    names = [name for name in BITS if BITS[name] > BITS[now]]
    others = {} if isinstance(given, str) else given
    values = {name: {**others, **dict.fromkeys(uses, name)} for name in names}
    return [AS_IS, *(Option({f"wire.{way}": values[n]}, rounded=BITS[n] - BITS[now]) for n in names)]


def _both_ways(ups: Sequence[Option], downs: Sequence[Option]) -> list[Option]:
    """Each with each; where there are as many of both, one way costs what it does with the same codec both ways."""
    alike = [(u + d).settings for u, d in zip(ups, downs, strict=False)] if len(ups) == len(downs) else None
    found = []
    for (i, u), (j, d) in product(enumerate(ups), enumerate(downs)):
        ways = {"up": alike[i], "down": alike[j]} if alike else {}
        found.append(replace(u + d, **{"up": None, "down": None, "work": {}, **ways}))
    return found


def _logits(config: Config, classes: int) -> list[Option]:
    """The codec of logits as configured, coarser ones, and the likeliest classes alone; both ways, or up alone."""
    kd, coding = config.kd, config.wire.coding(0)
    top = top_k(codec_of(kd.logits))
    chosen = kd.upload_bytes or kd.upload_rate or "logits" in {*coding.up, *coding.down}
    if chosen or (top is None and kd.logits not in LOGITS):
        return [AS_IS]
    now, bits = (classes, LOGITS[kd.logits]) if top is None else (top.kept(classes), LOGITS["fp16"])
    coarser = [(name, 0.0, LOGITS[name] - bits) for name in LOGITS if top is None and LOGITS[name] > bits]
    rest = "absent" if kd.aggregation == "union" else "logits"
    ending = kd.logits.partition("+")[2] if top else "fp16"
    for k in (1 << power for power in range(now.bit_length(), -1, -1)):
        if k < now:
            text = f"topk:{k}:{rest}" + (f"+{ending}" if ending else "")
            coarser.append((text, math.log2(now / k), max(0, LOGITS["fp16"] - bits)))
    found = [AS_IS]
    for text, reduced, rounded in coarser:
        up_alone = {"kd.logits": text, "kd.logits_down": kd.logits_down or kd.logits}
        if kd.logits_down is None:
            both = {"kd.logits": text}
            found.append(Option(both, 2 * reduced, 2 * rounded, work={}))
            found.append(Option(up_alone, reduced, rounded, up=both, down={}, work={}))
        else:
            found.append(Option(up_alone, reduced, rounded, work={}))
    return found


def same_result(config: Config, framework: str, settings: Settings) -> dict[str, Any]:
    """The settings on which a result depends: in `sflv1` it is the same wherever the model is cut, to the last bit.

    Not so where activations are changed underway, or the site learns by itself.
    """
    split, coding = config.split, config.wire.coding(0)
    changed = split.cache != "none" or split.local_loss or split.clip is not None or split.variant != "sflv1"
    changed = changed or bool({"activations", "gradients"} & {*coding.up, *coding.down})
    if framework != "split" or changed or settings.keys() & {"wire.up", "wire.down"}:
        return dict(settings)
    return {key: value for key, value in settings.items() if key not in ("split.cut", "split.labels")}
