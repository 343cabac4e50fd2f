"""The model card of an export: Hugging Face's front matter, and what was trained, measured and not proved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from fedtrio.report.svg import printable
from fedtrio.report.tables import TITLES, Results, score_of, summary
from fedtrio.report.units import bytes_text, count_text, flops_text

KINDS = {"classification": "SequenceClassification", "causal-lm": "CausalLM"}
PIPELINES = {"classification": "text-classification", "causal-lm": "text-generation"}
AWAY = """The base model is not on the Hub: `adapter_config.json` names the folder in which it lay, as
`base_model_name_or_path`. Correct it, or merge (`fedtrio export … --merge`): a merged model needs no other.
"""
LIMITS = """## Limits

- **No proof of privacy.** That texts stayed at their sites does not prove that nothing can be learnt of them: adapters,
  logits and activations may reveal what they were made from, and so may this model. It was trained without secure
  aggregation, and without noise unless the settings above name it.
- The accuracy is that on one test set, and says nothing of other texts, languages or groups of people.
- What the base model may be used for, its own card and license say.
"""


def card(
    results: Results, run: Mapping[str, Any], merged: bool, name: str, base: str, on_hub: bool = False,
    license: str | None = None, dataset: str | None = None, site: str | None = None,
) -> str:  # fmt: skip
    """README.md of an export, from `results.json` and the entry of its run.

    `name` is the folder's; `base` the base model's Hub id, or with `on_hub` false the name of its folder; `license` the
    base model's where it is known; `dataset` the Hub id of the data where they came from there; `site` whose own model
    this is.
    """
    config = results["config"]
    known = {"license": license, "base_model": base if on_hub else None, "datasets": [dataset] if dataset else []}
    front = {key: value for key, value in known.items() if value}
    front |= {"base_model_relation": "finetune" if merged else "adapter"} if on_hub else {}
    front |= {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": PIPELINES[config["task"]],
        "tags": ["fedtrio", "federated-learning", "lora", run["framework"]],
        "metrics": [score_of(results).key],
    }
    title = TITLES.get(run["framework"], run["framework"])
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n# {name}\n",
        f"{'A whole model' if merged else 'A LoRA adapter (PEFT)'}, fine-tuned on {_where(results, run)} by {title}"
        + (f"; the own model of `{site}`" if site else "")
        + ", with fedtrio.\n",
        f"```python\n{loading(config['task'], merged, name, len(results['data']['labels']))}```\n",
        "" if merged or on_hub else AWAY,
        "## What was trained\n",
        _table([("base model", f"`{base}`"), *_trained(results, run)]),
        "## What it reached and cost\n",
        _table(_reached(results, run, site)),
        LIMITS,
        f"## Versions\n\n{_versions(results['environment'])}\n",
    ]
    return "\n".join(part for part in parts if part)


def loading(task: str, merged: bool, folder: str, labels: int) -> str:
    """The lines of Python that load an export; for an adapter they fetch or open its base model."""
    kind, peft = KINDS[task], "" if merged else "Peft"
    imported = [f"from transformers import Auto{f'ModelFor{kind}, Auto' if merged else ''}Tokenizer\n"]
    imported += [] if merged else [f"from peft import AutoPeftModelFor{kind}\n"]
    count = f", num_labels={labels}" if task == "classification" and not merged else ""
    lines = [*sorted(imported), "\n", f'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n']
    lines.append(f'model = Auto{peft}ModelFor{kind}.from_pretrained("{folder}"{count})\n')
    if not merged and task == "classification":  # which pools the last token that is no padding
        lines.append("model.config.pad_token_id = tokenizer.pad_token_id\n")
    return "".join(lines)


def _where(results: Results, run: Mapping[str, Any]) -> str:
    sites, pooled = len(run["sites"]), run["framework"] == "centralized"
    examples = count_text(sum(site["examples"] for site in run["sites"]))
    return f"{examples} examples " + ("in one place" if pooled else f"at {sites} site{'s' * (sites > 1)}")


def _trained(results: Results, run: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Settings that make the model what it is. Names of sites and files stay out: a card is for the public."""
    config, labels = results["config"], results["data"]["labels"]
    train, lora, method = config["train"], config["lora"], config.get(run["framework"]) or {}
    for key in ("aggregation", "upload", "protocol", "variant", "cut", "labels", "clip", "noise"):
        value = "by site" if isinstance(method.get(key), dict) else method.get(key)
        if value not in (None, "none") and (value or key != "noise"):
            yield key, f"`{str(value).rpartition(':')[2]}`"  # of an own rule, file.py:function, the function
    yield "task", f"{config['task']}, {len(labels)} classes" if labels else config["task"]
    if labels:
        yield "classes", ", ".join(f"`{label}`" for label in labels)
    yield "partition", f"`{(config.get('partition') or {}).get('name', 'column')}`"
    yield "rounds", f"{run['rounds']}, {train['epochs']} epoch{'s' * (train['epochs'] != 1)} each"
    yield "participation", config["participation"]
    rates = f"{train['learning_rate']:g}, head {train['head_learning_rate']:g}"
    yield "training", f"{train['optimizer']}, rates {rates}, batches of {train['batch_size']}, {train['precision']}"
    rank = lora["r"] if isinstance(lora["r"], int) else "by site"
    targets = lora["target_modules"] if isinstance(lora["target_modules"], str) else ", ".join(lora["target_modules"])
    yield "LoRA", f"r {rank}, lora_alpha {lora['lora_alpha']:g}, on {targets}"
    if codecs := {way: config["wire"][way] for way in ("up", "down") if config["wire"][way] != "none"}:
        yield "codecs", ", ".join(f"{way} `{codec}`" for way, codec in codecs.items())
    yield "tokens of a text", f"at most {train['max_length']}"
    yield "seed", run["seed"]


def _reached(results: Results, run: Mapping[str, Any], site: str | None) -> Iterator[tuple[str, str]]:
    """Scores with their meaning and seeds, and the costs of this run."""
    score, tests = score_of(results), results["data"]["test"]
    one = next((s for s in run["sites"] if s["name"] == site), {})
    causal = results["config"]["task"] == "causal-lm"
    texts = f"{count_text(tests)} test text{'s' * (tests != 1)}"
    of = f"target tokens of {texts}" if causal else texts
    accuracy = one.get("accuracy") if site else run.get("accuracy")
    if accuracy is not None:
        yield "accuracy", f"{100 * accuracy:.1f} % of the {of} predicted right after the last round"
    if score.key == "perplexity" and run.get("perplexity") is not None:
        yield "perplexity", score.text(run["perplexity"]) + (" (mean over sites)" if site else "")
    row = next(row for row in summary(results) if row.framework == run["framework"])
    if row.seeds > 1 and row.score is not None:
        spread = f"{score.text(row.score)} ± {score.text(row.score_sd, unit=False)}"
        yield f"{score.key} of {row.seeds} seeds", f"{spread} (mean and standard deviation)"
    else:
        yield "seeds", "one; how far another would lie from it was not measured"
    sites, up, down = len(run["sites"]), run["bytes_up"], run["bytes_down"]
    if up or down:
        yield "traffic of a site", f"{bytes_text(up / sites)} up, {bytes_text(down / sites)} down (measured, the mean)"
    yield "compute of a site", f"{flops_text(run['client_flops'] / sites)} (counted, the mean)"
    yield "left the sites", ", ".join(run["left_sites"]) or "nothing"


def _versions(environment: Mapping[str, Any]) -> str:
    names = ("fedtrio", "torch", "transformers", "peft", "python")
    return ", ".join(f"{name} {environment[name]}" for name in names if name in environment) + "."


def _table(rows: Iterable[tuple[str, object]]) -> str:
    lines = (f"| {name} | {printable(' '.join(str(value).split()).replace('|', '/'))} |\n" for name, value in rows)
    return "| | |\n|-|-|\n" + "".join(lines)
