"""Load a model and its tokenizer: built-in, from a local Hugging Face folder, or from the Hub."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..errors import ModelError, did_you_mean
from ..hub import hub_or_cache

Task = Literal["classification", "causal-lm"]
_AFTER_PADDING = {"camembert", "esm", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta"}
_HUB_ID = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)
_HINT = "; give a local folder, a built-in name (nano) or a Hub id (name or owner/name)"
BUILT_IN = {"nano": Path(__file__).parent / "nano"}


def resolve(model: str, base: Path) -> str:
    """The folder of a built-in or local model, else the Hub id as it stands.

    Raises ModelError where it looks like a folder (it starts with `.` or `/`, or has two slashes) and isn't one.
    """
    if model in BUILT_IN:
        return str(BUILT_IN[model])
    for folder in (base / model, Path(model)):
        if os.path.isdir(folder):  # which, unlike Path.is_dir, raises nothing
            if not os.path.isfile(folder / "config.json"):
                raise ModelError(f"model {model!r} is a folder without config.json: not a Hugging Face model folder")
            return str(folder)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(f"model {model!r}: no such folder (relative paths start from the configuration file)")
    if not _HUB_ID.fullmatch(model):
        raise ModelError(f"model {model!r}: no such folder, and no Hub id{did_you_mean(model, BUILT_IN) or _HINT}")
    return model


def load_tokenizer(path: str) -> Any:
    """The tokenizer, padding and truncating on the right, with a pad token (the end-of-text token where none is set).

    Raises ModelError where it can't be found or has neither.
    """
    from transformers import AutoTokenizer

    try:
        with nullcontext() if os.path.isdir(path) else hub_or_cache(path, "model"):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the Hub's, tokenizers' and transformers' own errors share no base class
        raise _not_found("tokenizer", path, error) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ModelError(f"the tokenizer in {path!r} knows no words: its vocabulary file is missing")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer of {path!r} has neither a pad token nor an end token: set one in it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary(tokenizer: Any) -> str:
    """A digest of a tokenizer's words, their numbers and its special tokens."""
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    words = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(repr((special, words)).encode(errors="replace")).hexdigest()[:16]


@dataclass(frozen=True)
class Reads:
    """What a model can read: positions of a text, and tokens by their number; None where it sets no limit."""

    positions: int | None
    vocabulary: int | None


@cache
def configuration(path: str) -> Any:
    """The model's configuration, without its weights. Raises ModelError where there is none."""
    from transformers import AutoConfig

    try:
        with nullcontext() if os.path.isdir(path) else hub_or_cache(path, "model"):
            return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as above
        raise _not_found("model", path, error) from error


def reads(path: str) -> Reads:
    """Read off the model's configuration."""
    config = configuration(path)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in _AFTER_PADDING:
        positions -= (config.pad_token_id or 0) + 1
    return Reads(positions, getattr(config, "vocab_size", None))


def load_base(
    path: str,
    task: Task,
    labels: int,
    pad_token_id: int,
    attn_implementation: str = "eager",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The pretrained model with a new classification head (`labels` classes) or its language-model head.

    The head is drawn from torch's global generator. Raises ModelError where the model can't be loaded.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {
        "attn_implementation": attn_implementation,
        "dtype": dtype,
        "trust_remote_code": False,  # said outright, or transformers asks on the terminal
        "output_loading_info": True,
    }
    kind: Any = transformers.AutoModelForCausalLM
    if task == "classification":
        kind, options["num_labels"] = transformers.AutoModelForSequenceClassification, labels
    try:
        with nullcontext() if os.path.isdir(path) else hub_or_cache(path, "model"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, info = kind.from_pretrained(path, **options)
    except Exception as error:  # as above
        raise _not_found("model", path, error) from error
    _check_whole(path, model, info["missing_keys"], pad_token_id)
    model.config.pad_token_id = pad_token_id
    model.config.use_cache = False
    return model


def _check_whole(path: str, model: nn.Module, missing: Collection[str], pad_token_id: int) -> None:
    """Weights of the blocks must all be there (new ones would be drawn at random), and a row for the pad token."""
    lost = sorted(name for name in missing if re.search(r"\.\d+\.", name) and not re.search("classif|score", name))
    if lost:
        raise ModelError(f"the weights in {path!r} are incomplete: {len(lost)} are missing, the first is {lost[0]!r}")
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    if rows is not None and pad_token_id >= rows:
        raise ModelError(
            f"the pad token of the tokenizer in {path!r} has number {pad_token_id}, but the model knows {rows} tokens "
            f"(0 to {rows - 1}): name one of those as pad_token in tokenizer_config.json"
        )


def _not_found(what: str, path: str, error: Exception) -> ModelError:
    first_line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    if os.path.isdir(path):
        return ModelError(f"the {what} in {path!r} can't be loaded: {first_line}")
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    hint = did_you_mean(path, BUILT_IN) or f"{_HINT} that is in the cache."
    return ModelError(f"{what} {path!r}: no such folder, and the Hub gave none{offline}{hint} Said there: {first_line}")


def pick_device(device: str) -> torch.device:
    """`auto` takes CUDA where there is one, else the CPU. Raises ModelError for a device that isn't there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError("device is 'cuda', but torch sees no GPU here: use auto or cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device {device!r} is unknown: use auto, cpu or cuda") from error
    if found.type not in ("cpu", "cuda"):
        raise ModelError(f"device {device!r} is not supported: use auto, cpu or cuda")
    return found


def pick_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 where the hardware multiplies bf16 matrices, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    fast = (
        getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    )
    return "bf16" if fast else "fp32"
