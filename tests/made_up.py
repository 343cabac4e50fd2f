"""Results in the shape of results.json, plainly made up: every number here is invented."""

from __future__ import annotations

import hashlib
import math

FINALS = {"fedllm": 0.82, "kd": 0.70, "split": 0.76, "centralized": 0.86, "local": 0.58}
COSTS = {  # bytes up, bytes down, operations of all sites in a round
    "fedllm": (8e6, 8e6, 3e12),
    "kd": (2e5, 2e5, 9e12),
    "split": (9e7, 9e7, 8e11),
    "centralized": (0, 0, 0),
    "local": (0, 0, 3e12),
}
KINDS = {
    "fedllm": [("up", "adapter", 1.0), ("down", "adapter", 1.0)],
    "kd": [("up", "logits", 1.0), ("down", "logits", 1.0)],
    "split": [
        ("up", "activations", 0.95),
        ("up", "labels", 0.01),
        ("up", "adapter", 0.04),
        ("down", "activation gradients", 0.96),
        ("down", "adapter", 0.04),
    ],
}


def made_up_curve(framework, seed, sites, rounds, final, causal):
    up, down, flops = COSTS[framework]
    curve = []
    for number in range(1, rounds + 1):
        value = 0.3 + (final - 0.3) * (1 - math.exp(-3 * number / rounds)) / (1 - math.exp(-3))
        value += 0.004 * (seed - 1) * (1 + math.sin(number))
        entry = {"round": number, "accuracy": value, "loss": 1.0}
        entry |= {"bytes_up": up * number, "bytes_down": down * number, "client_flops": flops * number}
        entry |= {"messages": 2 * number * sites * bool(up), "client_seconds": 40.0 * number}
        entry["server_seconds"] = 0.5 * number
        if framework == "local" and number < rounds:
            entry["accuracy"] = None
        if causal:
            entry |= {"accuracy": None, "perplexity": None if entry["accuracy"] is None else 8 / value}
        curve.append(entry)
    return curve


def made_up_run(framework, seed, names, rounds, final, causal):
    up, down, flops = COSTS[framework]
    curve = made_up_curve(framework, seed, len(names), rounds, final, causal)
    last = curve[-1]
    share = [2 * (place + 1) / (len(names) * (len(names) + 1)) for place in range(len(names))]  # rising, in all 1
    sums = {"bytes_up": up * rounds, "bytes_down": down * rounds, "client_flops": flops * rounds}
    sums |= {
        "client_seconds": 40.0 * rounds,
        "client_peak_bytes": 700 * 2**20,
        "messages": 2 * rounds * len(names) * bool(up),
    }
    sites = [
        {
            "name": name,
            "examples": 100,
            "accuracy": None if causal else min(1.0, final - 0.1 + 0.2 * (place % 7) / 7 * (framework == "local")),
            **{k: v * share[place] for k, v in sums.items()},
        }
        for place, name in enumerate(names)
    ]
    kinds = []
    for direction, kind, part in KINDS.get(framework, []):
        size = part * sums[f"bytes_{direction}"]
        kinds.append({"direction": direction, "kind": kind, "messages": 10, "bytes": size, "payload": 0.98 * size})
    extra = {"perplexity": last["perplexity"]} if causal else {}
    return {
        "framework": framework,
        "seed": seed,
        "accuracy": None if causal else last["accuracy"],
        "loss": 1.0,
        "rounds": rounds,
        **extra,
        **sums,
        "server_seconds": 0.5 * rounds,
        "round_seconds": 60.0 * rounds,
        "payload_up": sums["bytes_up"],
        "payload_down": sums["bytes_down"],
        "client_accuracy": {"mean": None if causal else final - 0.01, "min": None if causal else final - 0.1},
        "adapter": f"{framework}-{seed}/adapter",
        "adapter_sha256": hashlib.sha256(f"{framework} {seed}".encode()).hexdigest(),
        "sites": sites,
        "kinds": kinds,
        "how": {
            "bytes": "measured",
            "client_flops": "counted",
            "client_seconds": "measured",
            "client_peak_bytes": "modelled",
        },
        "curve": curve,
    }


def made_up(
    labels=5,
    sites=8,
    seeds=(0, 1, 2),
    rounds=10,
    finals=FINALS,
    task="classification",
    test=2000,
    prefix="site",
):
    """Results in the shape of results.json; all numbers invented."""
    names = [f"{prefix}-{place:02}" for place in range(sites)]
    words = [f"made_up_label_{place}" for place in range(labels)]
    held = []
    for place, name in enumerate(names):
        counts = [max(0, (place * 13 + label * 29) % 47 - 20) for label in range(labels)]
        total = sum(counts) if labels else 50 + 37 * place % 90
        far = {"emd": 0.6 + 0.01 * place, "effective_labels": 0.4 * labels or None}
        held.append({"name": name, "examples": total, "label_counts": counts, **far})
    causal = task == "causal-lm"
    return {
        "schema_version": 1,
        "config": {
            "task": task,
            "model": "made-up/tiny-model",
            "data": {"train": "data/made-up-intents.csv"},
            "clients": sites,
            "participation": 1.0,
            "partition": {"name": "dirichlet", "alpha": 0.3},
            "rounds": rounds,
            "seeds": list(seeds),
            "frameworks": list(finals),
            "train": {"batch_size": 16, "learning_rate": 0.0005, "local_epochs": 1},
            "lora": {"rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
            "fedllm": {"server_optimizer": "average"},
            "kd": {"temperature": 2.0, "distill_epochs": 2},
            "split": {"cut": 2, "variant": "sequential", "labels": "server"},
        },
        "environment": {
            "fedtrio": "0.1.0",
            "python": "3.11.2",
            "torch": "2.6",
            "device": "cpu",
            "threads": 2,
        },
        "warnings": ["12 made-up texts were cut at 64 tokens."],
        "data": {
            "labels": words,
            "train": 1000,
            "test": test,
            "public": 400,
            "truncated": 12,
            "partitions": [{"seed": seed, "sites": held} for seed in seeds],
        },
        "runs": [
            made_up_run(name, seed, names, rounds, final, causal) for name, final in finals.items() for seed in seeds
        ],
    }
