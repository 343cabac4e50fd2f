"""The entry of `runs` in results.json: what a run has reached, what it has cost, and how each number was found."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .evaluate import Scores
from .frameworks.lab import Framework, Lab
from .ledger import Ledger
from .models.train import Adapter

Efforts = Mapping[str, Mapping[str, Any]]  # what each site says of itself: flops, seconds, peak_bytes
HOW = dict.fromkeys(("bytes", "client_seconds", "server_seconds", "round_seconds"), "measured")
HOW |= {"client_flops": "counted", "client_peak_bytes": "modelled"}
# process_peak_bytes, measured, stands beside a site that had a process of its own


def shown(scores: Scores | None, task: str) -> dict[str, Any]:
    """Accuracy, loss and for causal-lm perplexity; None for what isn't known or is no number."""
    names = ["accuracy", "loss", *(["perplexity"] if task == "causal-lm" else [])]
    if scores is None or not math.isfinite(scores.loss):  # it diverged; JSON knows no NaN
        return dict.fromkeys(names)
    return {name: getattr(scores, name) for name in names}


def answered(scores: Scores | None) -> str:
    """Which test texts were answered right, as hexadecimal digits; empty where nobody knows, or the run diverged."""
    return scores.right.hex() if scores is not None and math.isfinite(scores.loss) else ""


def mean_of(scores: Sequence[Scores]) -> Scores:
    """The mean over sites, which stands for a run in which each has its own model."""
    accuracy = math.fsum(s.accuracy for s in scores) / len(scores)
    return Scores(accuracy, math.fsum(s.loss for s in scores) / len(scores), scores[0].counted)


def spent(method: Framework, ledger: Ledger, efforts: Efforts) -> dict[str, int | float]:
    """Bytes as frames, messages, and FLOPs and seconds of all sites, so far."""
    return {
        "bytes_up": _counted(method, ledger, "bytes", direction="up"),
        "bytes_down": _counted(method, ledger, "bytes", direction="down"),
        "messages": _counted(method, ledger, "messages"),
        "client_flops": sum(int(effort["flops"]) for effort in efforts.values()),
        "client_seconds": round(sum(float(effort["seconds"]) for effort in efforts.values()), 3),
    }


def costs(
    method: Framework,
    examples: Mapping[str, int],
    accuracies: Mapping[str, float | None],
    ledger: Ledger,
    efforts: Efforts,
) -> dict[str, Any]:
    """What a run has cost, in all and for each site.

    `accuracies` are of the model that each site ends up with; None where a site has no test set.
    """
    sent = [entry.kind for entry in ledger if entry.direction == "up" and entry.payload and method.federated]
    parts = {part for kind in sent for part in kind.split(" and ")}
    known = [accuracy for accuracy in accuracies.values() if accuracy is not None]
    return {
        **spent(method, ledger, efforts),
        "payload_up": _counted(method, ledger, "payload", direction="up"),
        "payload_down": _counted(method, ledger, "payload", direction="down"),
        "client_peak_bytes": max((int(effort["peak_bytes"]) for effort in efforts.values()), default=0),
        "client_accuracy": spread(known),
        "sites": [
            {
                "name": site,
                "examples": number,
                "accuracy": accuracies[site],
                "bytes_up": _counted(method, ledger, "bytes", site=site, direction="up"),
                "bytes_down": _counted(method, ledger, "bytes", site=site, direction="down"),
                "messages": _counted(method, ledger, "messages", site=site),
                **_own(efforts.get(site, {})),
            }
            for site, number in examples.items()
        ],
        "kinds": ledger.by_kind() if method.federated else [],
        "left_sites": ["labels", "texts"] if method.pooled else sorted(parts),
        "how": HOW,
    }


def spread(accuracies: Sequence[float]) -> dict[str, float | None]:
    """How a value is spread over sites: mean, minimum, 10th percentile, and Jain's index, all None without any.

    The percentile lies linearly between the two nearest. Jain's index (Σx)² / (K·Σx²) is 1 where all are equal and 1/K
    where one has all ("A Quantitative Measure of Fairness", DEC-TR-301, arXiv:cs/9809099).
    """
    if not accuracies:
        return dict.fromkeys(("mean", "min", "p10", "jain"))
    ordered, count = sorted(accuracies), len(accuracies)
    place = 0.1 * (count - 1)
    below, above = ordered[int(place)], ordered[min(int(place) + 1, count - 1)]
    squares = math.fsum(x * x for x in accuracies)
    return {
        "mean": math.fsum(accuracies) / count,
        "min": ordered[0],
        "p10": below + (place - int(place)) * (above - below),
        "jain": math.fsum(accuracies) ** 2 / (count * squares) if squares else 1.0,
    }


def save(
    lab: Lab, adapter: Adapter | None, unlike: Mapping[str, Adapter], sites: Sequence[str], out: Path, name: str
) -> dict[str, Any]:
    """Write the adapter, and those of sites that hold another model; paths and hash.

    Where there is no common one, the sites have written theirs.
    """
    folders = {site: f"{name}/sites/{number}/adapter" for number, site in enumerate(sites)}
    if adapter is not None:
        lab.model.save(adapter, out / name / "adapter")
        for site, held in unlike.items():
            lab.of_site(site).model.save(held, out / folders[site])
        others = {"adapters": {site: folders[site] for site in unlike}} if unlike else {}
        return {"adapter": f"{name}/adapter", "adapter_sha256": _sha256(out / name / "adapter"), **others}
    if not (out / name / "sites").is_dir():  # they lie at the sites
        return {"adapter": None, "adapter_sha256": None}
    first = next(iter(folders.values()))
    return {"adapter": first, "adapter_sha256": _sha256(out / first), "adapters": folders}


def _own(effort: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "client_flops": int(effort.get("flops", 0)),
        "client_seconds": round(float(effort.get("seconds", 0.0)), 3),
        "client_peak_bytes": int(effort.get("peak_bytes", 0)),
        **({"process_peak_bytes": int(effort["process_peak_bytes"])} if "process_peak_bytes" in effort else {}),
    }


def _counted(method: Framework, ledger: Ledger, field: str, **where: object) -> int:
    """From the ledger; a yardstick's messages to itself are no traffic."""
    return ledger.total(field, **where) if method.federated else 0


def _sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
