"""What of a model an adapter may name: layers for LoRA, modules that train whole; and experts, which are no layers."""

from __future__ import annotations

import re

from torch import nn

from ..errors import ModelError
from .cut import find_blocks


def has_experts(module: nn.Module) -> bool:
    """Whether the module holds experts, all of a block in one tensor [E, out, in]."""
    return any(hasattr(m, "num_experts") and any(p.ndim == 3 for p in m.parameters(False)) for m in module.modules())


def layers(base: nn.Module) -> list[str]:
    """The names that the linear layers have within their blocks."""
    return sorted({n.rpartition(".")[2] for n, m in find_blocks(base).named_modules() if isinstance(m, nn.Linear)})


def check_targets(base: nn.Module, targets: str | list[str]) -> None:
    """Each name of a list must be there: PEFT only asks that one of them is. A text is a regular expression to it."""
    names = [name for name, _ in base.named_modules()]
    if isinstance(targets, list):
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise no_target(base, [target])
    elif targets != "all-linear":
        try:
            if not any(re.fullmatch(targets, name) for name in names):
                raise no_target(base, targets)
        except re.error as error:
            raise ModelError(f"lora.target_modules {targets!r} is no regular expression: {error}") from None


def no_target(base: nn.Module, targets: str | list[str]) -> ModelError:
    """What to say of targets that match nothing."""
    kinds = (nn.Linear, nn.Embedding)
    linear = {n.split(".")[-1] for n, m in base.named_modules() if isinstance(m, kinds) or "Conv1D" in type(m).__name__}
    hint = "" if isinstance(targets, list) else "; write names as a list, a text must match whole paths"
    known = sorted(linear - {"default", "base_layer"})  # which PEFT has put in already
    return ModelError(f"lora.target_modules {targets!r} match nothing; there are {known}{hint}")


def check_saved(base: nn.Module, names: list[str]) -> None:
    """Modules that can be trained whole have parameters, and are neither a block nor around the blocks."""
    modules = {n: m for n, m in base.named_modules() if n and next(m.parameters(), None) is not None}
    lists = {n for n, m in modules.items() if any(isinstance(inner, nn.ModuleList) for inner in m.modules())}
    whole = {n for n in modules.keys() - lists if not n.rpartition(".")[2].isdigit()}
    for name in names:
        found = {n for n in modules if n == name or n.endswith(f".{name}")}
        if not name or not found or found - whole:
            leaves = sorted({n.rpartition(".")[2] for n in whole if not next(modules[n].children(), None)})
            why = "is a block or holds blocks" if found else "matches nothing"
            raise ModelError(f"lora.modules_to_save {name!r} {why}; there are {leaves}")
