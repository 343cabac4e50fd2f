"""What can be said of a model without loading its weights: whether its files are whole, its size, and its cut."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import ModelError, did_you_mean
from ..hub import HUB_TIMEOUT_SECONDS, hub_or_cache
from ..models.adapter import adapt
from ..models.cut import check_cut, find_blocks
from ..models.load import BUILT_IN, load_tokenizer, resolve
from .finding import Finding, Found, Seen, Size

ACTIVATIONS = 70  # bytes that autograd keeps for each token, block and unit of width (fp32)
INDEX = "model.safetensors.index.json"


def examine_model(config: Config, seen: Seen) -> Found:
    """Files, tokenizer, size, targets of LoRA and cut. ModelError."""

    path, download = resolve(config.model, config.base), 0
    folder = Path(path) if Path(path).is_dir() else _cached(path)
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if folder is None:
        download = _on_hub(path, offline)
        yield Finding("hub", "ok", f"{path} is not in the cache; {download / 1e6:,.0f} MB will be downloaded")
    else:
        size = check_weights(folder)
        if config.model not in BUILT_IN:
            where = f"the cache of the Hub ({'offline' if offline else 'online'})" if folder != Path(path) else path
            yield Finding("hub", "ok", f"{size / 1e6:,.0f} MB of weights are whole in {where}")
    load_tokenizer(path)
    yield from _measure(config, path, download, seen)
    for model in sorted(set(config.kd.models.values())) if "kd" in config.frameworks else ():
        place = resolve(model, config.base)
        there = Path(place) if Path(place).is_dir() else _cached(place)
        size = check_weights(there) if there else _on_hub(place, offline)
        load_tokenizer(place)
        yield Finding("model", "ok", f"{model}: {size / 1e6:,.0f} MB, for sites with a model of their own (kd.models)")


def check_weights(folder: Path) -> int:
    """Bytes of a model's weights. Raises ModelError where a file is missing, cut short or a mere pointer."""
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{folder / INDEX} is broken; download the model again") from error
    else:
        usual = ("model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json")
        names = [name for name in usual if (folder / name).is_file()][:1]
    if not names:
        raise ModelError(f"{folder} holds no weights (model.safetensors); download the model again")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing[:3])} of {len(names)} files; download the model again")
    for name in names:
        _check_whole(folder / name)
    return sum((folder / name).stat().st_size for name in names)


def _check_whole(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head == b"version ":
            raise ModelError(f"{path} is a pointer of Git LFS and no weights; run `git lfs pull` where it came from")
        if path.suffix != ".safetensors":
            return
        length = int.from_bytes(head, "little")
        try:
            tensors = json.loads(file.read(length)) if 0 < length <= size - 8 else {}
            ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            ends = None
    if not ends or max(ends) + 8 + length != size:
        want = f", {max(ends) + 8 + length:,} expected" if ends else ""
        raise ModelError(f"{path} is cut short or broken ({size:,} bytes{want}); download the model again")


def _cached(model: str) -> Path | None:
    """The folder of the Hub's cache that holds that model."""
    import huggingface_hub

    try:
        found = huggingface_hub.try_to_load_from_cache(model, "config.json")
    except huggingface_hub.errors.HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _on_hub(model: str, offline: bool) -> int:
    """Bytes to download. Raises ModelError where the Hub can't give them."""
    import huggingface_hub

    near = did_you_mean(model, BUILT_IN)
    if offline:
        raise ModelError(
            f"{model!r} is not in the Hub's cache, and HF_HUB_OFFLINE is set; unset it once to download{near}"
        )
    try:
        found = huggingface_hub.HfApi().model_info(model, files_metadata=True, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # whatever the Hub's HTTP library says
        said = str(error).strip().partition("\n")[0][:160] or type(error).__name__
        raise ModelError(
            f"{model!r} is neither a folder nor in the Hub's cache, and the Hub does not give it ({said}); check the "
            f"id, the network and the proxy, or copy the model's folder here{near}"
        ) from error
    sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
    chosen = [n for n in sizes if n.endswith(".safetensors")] or [n for n in sizes if n.endswith(".bin")]
    return sum(sizes[name] for name in chosen)


def _measure(config: Config, path: str, download: int, seen: Seen) -> Found:
    """The model's shape, on torch's meta device. Raises ModelError."""

    base, plan = _empty(config, path, seen.labels)
    depth, width = len(find_blocks(base)), int(plan.hidden_size)
    weights = sum(p.numel() for p in base.parameters())
    adapted = adapt(base, config.lora, config.task)
    trains = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    cuts = config.framework("split").cuts(depth) if "split" in config.frameworks else ()
    for cut in cuts:
        check_cut(cut, depth)
    tokens = config.train.batch_size * min(config.train.max_length, getattr(plan, "max_position_embeddings", 1 << 30))
    heads = getattr(plan, "num_attention_heads", 1)
    kept = tokens * depth * (ACTIVATIONS * width + 10 * heads * config.train.max_length)
    kept += 12 * tokens * plan.vocab_size if config.task == "causal-lm" else 0
    memory = (8 if config.train.precision == "fp64" else 4) * (weights + 4 * trains) + kept
    seen.size = Size(download, 4 * trains, memory)
    at = f"; cut before block {' and '.join(map(str, cuts))}" if cuts else ""
    yield Finding("model", "ok", f"{config.model}: {weights:,} weights in {depth} blocks, {trains:,} train{at}")


def _empty(config: Config, path: str, labels: int) -> tuple[Any, Any]:
    """The model without weights, and its plan. Raises ModelError."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    causal = config.task == "causal-lm"
    kind: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification
    try:
        with nullcontext() if Path(path).is_dir() else hub_or_cache(path, "model"):
            plan = transformers.AutoConfig.from_pretrained(path, **({} if causal else {"num_labels": labels}))
        with torch.device("meta"):
            return kind.from_config(plan, attn_implementation=config.attn_implementation), plan
    except Exception as error:  # transformers' errors share no base class
        said = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise ModelError(f"the model in {path!r} can't be used for {config.task}: {said}") from error
