"""Models that are the same but for the rank of their adapters: what was counted of one tells of the others.

A pass over n blocks costs what it costs over one, and as much more for each other as the second one does; so two blocks
are built and counted, whatever the depth. Where blocks differ, or the adapter's targets are a pattern, all of them are.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch

from ..errors import ModelError
from ..models.cut import WHOLE, Span, find_blocks
from ..models.load import Task
from ..models.lora import LoraConfig
from .quantity import Quantity
from .weightless import Ghost, How, Weightless

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
            except (RuntimeError, NotImplementedError) as error:
                raise _data_dependent(self.config, error) from error
            self._models[rank] = Weightless(ghost, depth, names[0], self)
        return self._models[rank]

    def _depth(self) -> int:
        depth = getattr(self.config, "num_hidden_layers", None)
        if not isinstance(depth, int) or depth < 1:
            raise ModelError(f"model_type {self.config.model_type}: its configuration has no num_hidden_layers")
        return depth

    def _alike(self, depth: int) -> bool:
        """Whether all blocks are: no list of the configuration tells them apart, and no pattern of target modules."""
        lists = [v for v in self.config.to_dict().values() if isinstance(v, list) and len(v) == depth and depth > 1]
        plain = not isinstance(self.lora.target_modules, str) or self.lora.target_modules == "all-linear"
        return plain and all(value == values[0] for values in lists for value in values)

    # What passes cost ----------------------------------------------------------------------------------------------

    def quantities(self, model: Weightless, span: Span, how: How) -> Three:
        """Of a pass over a span of this model. Of two ranks that were counted all others follow."""
        how = how if model.has_dropout else replace(how, dropout=False)
        by_rank = self._known.setdefault((span, how), {})
        if model.rank not in by_rank:
            if len(by_rank) >= 2 and how.frozen != "AB":
                (r, first), (s, second) = list(by_rank.items())[:2]
                share = Fraction(model.rank - r, s - r)
                by_rank[model.rank] = _sum((1 - share, first), (share, second))
            else:
                by_rank[model.rank] = self._of_span(model, span, how)
        return by_rank[model.rank]

    def _of_span(self, model: Weightless, span: Span, how: How) -> Three:
        """With a few blocks counted, what any number of them costs: each after the first costs the same."""
        start, stop = span
        depth, few = model.depth, model.ghost.depth
        if depth == few:
            return self._counted(model, span, how)
        if span == WHOLE:
            more = _sum((1, self._counted(model, (-1, 2), how)), (-1, self._counted(model, (-1, 1), how)))
            return _sum((1, self._counted(model, WHOLE, how)), (depth - few, more))

        def of_blocks(n: int) -> Three:
            if stop is None:
                return self._counted(model, (few - n, None), how)
            return self._counted(model, (min(start, 0), n), how)

        blocks = (depth if stop is None else stop) - max(start, 0)
        if not blocks:
            return of_blocks(0)
        one, two = of_blocks(1), of_blocks(2)
        return _sum((1, one), (blocks - 1, _sum((1, two), (-1, one))))

    def _counted(self, model: Weightless, span: Span, how: How) -> Three:
        unit = self.pad_to_multiple_of
        first, *others = (4, 6, 9) if unit == 1 else (unit, 2 * unit, 3 * unit)
        shapes = [(2, first), *((2, T) for T in others), (3, first)]
        try:
            found = {shape: model.ghost.count(shape, span, how) for shape in shapes}
        except (RuntimeError, NotImplementedError) as error:
            raise _data_dependent(self.config, error) from error
        return (
            Quantity.through({shape: cost.flops for shape, (cost, _) in found.items()}),
            Quantity.through({shape: cost.saved_bytes for shape, (cost, _) in found.items()}),
            Quantity.through({shape: backward for shape, (_, backward) in found.items()}),
        )


def _sum(*parts: tuple[Fraction | int, Three]) -> Three:
    first, *rest = [tuple(q.times(factor) for q in three) for factor, three in parts]
    for three in rest:
        first = tuple(a + b for a, b in zip(first, three, strict=True))
    return first  # type: ignore[return-value]


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


def _data_dependent(config: Any, error: Exception) -> ModelError:
    return ModelError(
        f"a model of type {config.model_type} can't be counted without values, as where each token chooses its "
        f"experts: {type(error).__name__}"
    )


@lru_cache(maxsize=8)
def family(
    configuration: str, kind: str, task: Task, labels: int, lora: str, precision: str, pad_to_multiple_of: int
) -> Family:
    """One for all that ask for the same; `configuration` and `lora` as JSON, `kind` the model type."""
    import json

    from transformers import AutoConfig

    settings = json.loads(configuration)
    settings.pop("model_type", None)
    return Family(
        AutoConfig.for_model(kind, **settings),
        task,
        labels,
        LoraConfig.model_validate_json(lora),
        precision,
        pad_to_multiple_of,
    )
