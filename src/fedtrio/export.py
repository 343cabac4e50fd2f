"""From a run folder to a model that others can load: an adapter, or base and adapter merged, each with its card."""

from __future__ import annotations

import json
import shutil
import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import Config
from .config_file import load_config
from .data.read import is_file
from .errors import ConfigError, ModelError, did_you_mean
from .hub import hub_or_cache
from .models.load import load_base, load_tokenizer, resolve
from .report.card import card

TOLERANCE = 1e-4  # of the largest logit: fp32 rounds (W + s·BA)·x and W·x + s·B(A·x) apart by some 1e-6 of it
NOT_NEEDED = ["frameworks=[local]", "partition=null", "wire.up=none", "wire.down=none"]  # may name what a script added


@dataclass(frozen=True)
class Exported:
    """What was written; `difference` is the largest between merged and unmerged logits, None without a merge."""

    folder: Path
    parameters: int
    difference: float | None = None


def export(
    run: Path, out: Path, framework: str | None = None, seed: int | None = None, site: str | None = None,
    merge: bool = False,
) -> Exported:  # fmt: skip
    """Write a finished run's adapter into `out`, or with `merge` a model that transformers alone can load, in fp32.

    Beside it lie the tokenizer and a model card. `framework` may be left out where the folder holds one alone, `seed`
    is the first there is, and `site` is needed where each site has its own model. A merged model is opened once more
    and must give the logits that the adapter gives on its base.

    Raises ConfigError where there is no such run or `out` is not empty, ModelError where the base model can't be loaded
    or the merged one does not give the same.
    """
    results = _results(run)
    entry = _entry(results, run, framework, seed)
    adapter = run / _adapter(entry, site)
    config = load_config(run / "config.yaml", NOT_NEEDED)
    own = config.framework("kd").model_of(site) if site and entry["framework"] == "kd" else None
    path = resolve(own[0] if own else config.model, config.base)
    part = _place(out)
    try:
        done = _write(path, config, results["data"]["labels"], adapter, part, merge)
        base, on_hub = (Path(path).name, False) if Path(path).is_dir() else (path, True)
        text = card(results, entry, merge, out.resolve().name, base, on_hub, _license(path), _dataset(config), site)
        (part / "README.md").write_text(text, encoding="utf-8")
        part.replace(out)
    except OSError as error:
        raise ConfigError(f"--out {out} can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Exported(out, *done)


# What is asked for ----------------------------------------------------------------------------------------------------


def _results(run: Path) -> dict[str, Any]:
    path = run / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        return results if results["runs"] is not None and results["data"] else {}
    except FileNotFoundError as error:
        raise ConfigError(f"{run} is no run folder: it holds no results.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} can't be read as results of fedtrio: {error}") from error


def _entry(results: dict[str, Any], run: Path, framework: str | None, seed: int | None) -> dict[str, Any]:
    """The run that is meant. Raises ConfigError with those that there are."""
    found = {(entry["framework"], entry["seed"]): entry for entry in results["runs"]}
    names = list(dict.fromkeys(name for name, _ in found))
    if not found:
        raise ConfigError(f"{run} holds no finished run; go on with: fedtrio resume {run}")
    if framework is None and len(names) > 1:
        raise ConfigError(f"{run} holds {', '.join(names)}: choose one by --framework")
    name: str = framework or names[0]
    if name not in names:
        raise ConfigError(f"{run} holds no {name}{did_you_mean(name, names)}; it holds {', '.join(names)}")
    seeds = [number for other, number in found if other == name]
    if seed is not None and seed not in seeds:
        raise ConfigError(f"{run} holds no seed {seed} of {name}; it holds {', '.join(map(str, seeds))}")
    return found[name, seeds[0] if seed is None else seed]


def _adapter(entry: dict[str, Any], site: str | None) -> str:
    """Where the adapter lies, beneath the run folder."""
    name, own = entry["framework"], entry.get("adapters")
    if entry["adapter"] is None:
        raise ConfigError(f"{name}: each site keeps a model of its own, in its own folder, and none of them is here")
    if own is None and site is None:
        return entry["adapter"]
    if own is None:
        raise ConfigError(f"{name} has one model for all sites: leave out --site")
    if site is None or site not in own:
        what = f"no site {site!r}{did_you_mean(site, own)}" if site else "a model of its own for each site"
        raise ConfigError(f"{name} has {what}; choose one by --site: {', '.join(own)}")
    return own[site]


def _place(out: Path) -> Path:
    """A new folder beside `out`, to become `out` when it is whole. Raises ConfigError where `out` holds anything."""
    part = out.with_name(f".{out.name}.part")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out {out} is {'not empty' if out.is_dir() else 'a file'}; choose another --out")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--out {out} can't be written: {error.strerror or error}") from error
    return part


def _dataset(config: Config) -> str | None:
    """The Hub's id where the data came from there; the name of a file is nobody's business."""
    train = config.data.train
    return train.partition(":")[0] if train is not None and not is_file(train, config.base) else None


def _license(path: str) -> str | None:
    """What the base model's own card says, where there is one within reach."""
    from huggingface_hub import ModelCard

    local = Path(path).is_dir()
    with suppress(Exception), nullcontext() if local else hub_or_cache(path, "model"):  # no card is no fault
        return ModelCard.load(f"{path}/README.md" if local else path, ignore_metadata_errors=True).data.get("license")
    return None


# The model ------------------------------------------------------------------------------------------------------------


def _write(
    path: str, config: Config, labels: list[str], adapter: Path, out: Path, merge: bool
) -> tuple[int, float | None]:
    """Tokenizer and model; the number of parameters written, and by how much the merged logits differ."""
    from safetensors.torch import load_file

    tokenizer = load_tokenizer(path)
    tokenizer.save_pretrained(out)
    if not merge:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(adapter / name, out / name)
        return sum(tensor.numel() for tensor in load_file(out / "adapter_model.safetensors").values()), None
    return _merge(path, config, labels, adapter, out, tokenizer.pad_token_id)


def _merge(
    path: str, config: Config, labels: list[str], adapter: Path, out: Path, pad: int
) -> tuple[int, float | None]:
    import peft

    base = load_base(path, config.task, len(labels), pad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied matrices, which are seen to below
        tuned = peft.PeftModel.from_pretrained(base, str(adapter)).eval()  # type: ignore[arg-type]
    wanted = _logits(tuned)
    _untie(base)
    model: Any = tuned.merge_and_unload(safe_merge=True)
    model.config.use_cache = True
    if config.task == "classification":
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}
        model.config.problem_type = "single_label_classification"
    model.save_pretrained(out)
    parameters = model.num_parameters()
    del base, tuned, model
    difference = float((_logits(load_base(str(out), config.task, len(labels), pad).eval()) - wanted).abs().max())
    if not difference <= TOLERANCE * float(wanted.abs().max()):
        raise ModelError(
            f"merged, {config.model!r} gives logits that are {difference:.2g} off those of its adapter: this model "
            "can't be merged; export the adapter, without --merge"
        )
    return parameters, difference


def _untie(base: Any) -> None:
    """Where the adapter changes one of two tied matrices (embeddings and output), each becomes its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    ends = base.get_input_embeddings(), base.get_output_embeddings()
    if base.config.tie_word_embeddings and any(isinstance(end, BaseTunerLayer | ModulesToSaveWrapper) for end in ends):
        base.config.tie_word_embeddings = False
        for end in ends:
            if isinstance(end, BaseTunerLayer):
                weight: Any = end.get_base_layer()
                weight.weight = nn.Parameter(weight.weight.clone())


def _logits(model: Any) -> Tensor:
    """On four texts of random tokens, fp32."""
    config = model.config
    length = min(16, getattr(config, "max_position_embeddings", None) or 16)
    ids_BT = torch.randint(0, config.vocab_size, (4, length), generator=torch.Generator().manual_seed(0))
    ids_BT[ids_BT == config.pad_token_id] = 0 if config.pad_token_id else 1
    with torch.no_grad():
        return model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits.float()
