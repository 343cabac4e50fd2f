"""Models that are the same but for the rank of their adapters: what was counted of one tells of the others.

A pass over n blocks costs what it costs over one, and as much more for each other as the second one does; so two blocks
are built and counted, whatever the depth. Where blocks differ, or the adapter's targets are a pattern, all of them are.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch

from ..errors import ConfigError, FedtrioError, ModelError, did_you_mean
from ..models.cut import WHOLE, Span, find_blocks
from ..models.load import Task
from ..models.lora import LoraConfig
from .quantity import Quantity, shapes
from .weightless import Ghost, How, Weightless

SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
FEW = 2  # blocks that are built where all are alike
Three = tuple[Quantity, Quantity, Quantity]  # forward FLOPs, bytes kept for backward, backward FLOPs


@dataclass
class Family:
    """Models of one configuration (transformers'), task and precision."""

    config: Any
    task: Task
    labels: int
    lora: LoraConfig
    precision: str
    pad_to_multiple_of: int = 1
    _models: dict[int, Weightless] = field(default_factory=dict)
    _known: dict[Hashable, dict[int, Three]] = field(default_factory=dict)

    def model(self, rank: int) -> Weightless:
        """The one whose adapter has that rank. Raises ModelError where it can't be built, or has no equal blocks."""
        if rank not in self._models:
            depth, config = self._depth(), copy.deepcopy(self.config)
            few = FEW if self._alike(depth) and depth > FEW else depth
            _shorten(config, depth, few)
            config.num_labels, config.use_cache = self.labels, False
            config.pad_token_id = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
            base = _built(config, self.task)
            names = [name for name, module in base.named_modules() if module is find_blocks(base)]
            lora = self.lora.model_copy(update={"r": rank, "capacity": None})
            try:
                ghost = Ghost(base, lora, self.task, self.precision, self.pad_to_multiple_of)
            except FedtrioError:
                raise
            except Exception as error:  # whatever a model of another kind may raise
                raise _uncounted(self.config, error) from error
            self._models[rank] = Weightless(ghost, depth, names[0], self)
        return self._models[rank]

    def _depth(self) -> int:
        depth = getattr(self.config, "num_hidden_layers", None)
        if not isinstance(depth, int) or depth < 1:
            raise ModelError(
                f"model_type {self.config.model_type}: num_hidden_layers is {depth}, not a number of blocks"
            )
        return depth

    def _alike(self, depth: int) -> bool:
        """Whether all blocks are: no list of the configuration tells them apart, and no pattern of target modules.

        Where there are experts, settings of many names say which blocks have some; there the blocks are looked at.
        """
        lists = [v for v in self.config.to_dict().values() if isinstance(v, list) and len(v) == depth and depth > 1]
        plain = not isinstance(self.lora.target_modules, str) or self.lora.target_modules == "all-linear"
        same = plain and all(value == values[0] for values in lists for value in values)
        if same and any("expert" in name for name in self.config.to_dict()):
            blocks = find_blocks(_built(copy.deepcopy(self.config), self.task))
            shapes = [[(name, p.shape) for name, p in block.named_parameters()] for block in blocks]
            return all(other == shapes[0] for other in shapes)
        return same

    # What passes cost ----------------------------------------------------------------------------------------------

    def quantities(self, model: Weightless, span: Span, how: How) -> Three:
        """Of a pass over a span of this model. Of two ranks that were counted all others follow."""
        how = how if model.has_dropout else replace(how, dropout=False)
        by_rank = self._known.setdefault((span, how), {})
        if model.rank not in by_rank:
            if len(by_rank) >= 2 and how.frozen != "AB":
                (r, first), (s, second) = list(by_rank.items())[:2]
                share = Fraction(model.rank - r, s - r)
                by_rank[model.rank] = _plus(first, (share, second), (-share, first))
            else:
                by_rank[model.rank] = self._of_span(model, span, how)
        return by_rank[model.rank]

    def _of_span(self, model: Weightless, span: Span, how: How) -> Three:
        """With a few blocks counted, what any number of them costs: each after the first costs the same."""
        depth, few = model.depth, model.ghost.depth
        if depth == few:
            return self._counted(model, span, how)
        start, stop = span
        blocks = (depth if stop is None else stop) - max(start, 0)
        one, two = self._counted(model, (-1, 1), how), self._counted(model, (-1, 2), how)
        if span == WHOLE:  # the first block, the last one with the head, and those in between
            above = replace(how, below=bool(model.ghost.part(model.ghost.initial, (-1, 1))))
            head = self._counted(model, (few - 1, None), above)
            return _plus(one, (1, head), (blocks - 2, two), (2 - blocks, one))
        some = min(blocks, 1)
        short: Span = (few - some, None) if stop is None else (min(start, 0), some)
        first = self._counted(model, short, how)
        return _plus(first, (blocks - some, two), (some - blocks, one))

    def _counted(self, model: Weightless, span: Span, how: How) -> Three:
        unit = self.pad_to_multiple_of
        widths = (4, 6, 9) if unit == 1 else (unit, 2 * unit, 3 * unit)
        try:
            found = {shape: model.ghost.count(shape, span, how) for shape in shapes(widths)}
        except Exception as error:  # as above
            raise _uncounted(self.config, error) from error
        return (
            Quantity.through(widths, {shape: cost.flops for shape, (cost, _) in found.items()}),
            Quantity.through(widths, {shape: cost.saved_bytes for shape, (cost, _) in found.items()}),
            Quantity.through(widths, {shape: backward for shape, (_, backward) in found.items()}),
        )


def _plus(three: Three, *more: tuple[Fraction | int, Three]) -> Three:
    """three + Σ factor · other."""
    for factor, other in more:
        three = tuple(q.plus(r, factor) for q, r in zip(three, other, strict=True))  # type: ignore[assignment]
    return three


def _shorten(config: Any, depth: int, few: int) -> None:
    """The configuration with fewer blocks, also where a list has an entry for each."""
    config.num_hidden_layers = few
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth and depth > 1 and depth != few:
            setattr(config, name, value[:few])


def _built(config: Any, task: Task) -> torch.nn.Module:
    """The model on the meta device. Raises ModelError where there is none for this task."""
    import transformers

    transformers.logging.set_verbosity_error()
    kind: Any = transformers.AutoModelForCausalLM
    if task == "classification":
        kind = transformers.AutoModelForSequenceClassification
    try:
        with torch.device("meta"):
            base = kind.from_config(config, attn_implementation="eager")
    except Exception as error:  # transformers' own errors share no base class
        said = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(f"no model of type {config.model_type} can be built for {task}: {said}") from error
    return base


def _uncounted(config: Any, error: Exception) -> ModelError:
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return ModelError(
        f"a model of type {config.model_type} can't be counted on shapes alone: it must be an encoder or a decoder "
        f"that costs the same whatever its tokens are. Said there: {said}"
    )


def described(shape: Mapping[str, Any]) -> Any:
    """The configuration (transformers') of a shape in its own words. Raises ConfigError for words that it lacks."""
    from transformers import CONFIG_MAPPING, AutoConfig

    rest = dict(shape)
    kind = rest.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        near = did_you_mean(str(kind), CONFIG_MAPPING.keys())
        raise ConfigError(
            f"a shape's model_type is one that transformers knows, as llama, gpt2 or bert, not {kind!r}{near}"
        )
    usual = AutoConfig.for_model(kind)
    known = {*usual.to_dict(), *type(usual).attribute_map}
    sizes = {*SIZES, *(type(usual).attribute_map.get(name, name) for name in SIZES)}
    for word in rest:
        if word not in known:
            raise ConfigError(f"a shape of {kind} has no {word!r}{did_you_mean(word, sorted(known))}")
        if word in sizes and (type(rest[word]) is not int or rest[word] < 1):
            raise ConfigError(f"a shape's {word} is a whole number above 0, not {rest[word]!r}")
    try:
        return AutoConfig.for_model(kind, **rest)
    except Exception as error:  # of whichever library checks the values
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"a {kind} can't have this shape: {said}") from error


@lru_cache(maxsize=8)
def family(configuration: str, task: Task, labels: int, lora: str, precision: str, pad_to_multiple_of: int) -> Family:
    """One for all that ask for the same; `configuration` and `lora` as JSON, the rank left out of account."""
    from transformers import AutoConfig

    settings = json.loads(configuration)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return Family(config, task, labels, LoraConfig.model_validate_json(lora), precision, pad_to_multiple_of)
