"""The command `fedtrio plan`, and what `compare --dry-run` shows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_show import terminal
from .errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from .config import Config

TASKS = ("classification", "causal-lm")
SITES = ("phone", "laptop", "edge-gpu", "hospital-server")
HOW = (
    "Bytes are exact for these sizes, FLOPs counted, memory modelled; seconds and joules are orders of magnitude from "
    "the profiles."
)

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set split.cut=4. Repeatable."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
WORDS = "A model by shape alone: model_type=llama,hidden_size=4096,num_hidden_layers=32"


def _several(text: str) -> Any:
    return typer.Option(metavar="NAME", help=f"{text} of your own. Repeatable.")


def plan(
    config: Annotated[Path | None, typer.Argument(help="YAML file; without it, each key's default.")] = None,
    settings: Settings = None,
    model: Annotated[
        str | None, typer.Option(help="Built-in name, local folder, or Hub id; its weights are not loaded.")
    ] = None,
    shape: Annotated[str | None, typer.Option(metavar="KEY=VALUE,…", help=WORDS)] = None,
    task: Annotated[str | None, typer.Option(help="classification or causal-lm.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Examples at each site.")] = 1000,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each example.")] = 64,
    classes: Annotated[int, typer.Option(min=2, help="Classes, in classification.")] = 77,
    public: Annotated[int, typer.Option(min=0, help="Public texts, for KD-FedLLM.")] = 1000,
    device: Annotated[list[str] | None, _several("What a site has, or flops_per_second=…")] = None,
    link: Annotated[list[str] | None, _several("Its line, or up_bytes_per_second=…")] = None,
    server: Annotated[str, typer.Option(metavar="NAME", help="What the server has.")] = "datacenter-gpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON and nothing else.")] = False,
    debug: Debug = False,
) -> None:
    """Predict bytes, compute, memory, time and energy of a round, for any model, before any training."""
    if model is not None and shape is not None:
        raise ConfigError("--model and --shape both name a model: keep one of them")
    check_task(task)
    described = shape_of(shape) if shape is not None else None
    console = terminal(as_json)
    if console.is_terminal:
        console.print("[dim]loading torch, transformers and peft[/]")
    from .plan.options import plan as made
    from .plan.predict import Assumed
    from .plan.profiles import LINKS
    from .plan.profiles import device as device_of
    from .plan.profiles import link as link_of

    devices = {name: device_of(name) for name in device or SITES}
    links = {name: link_of(name) for name in link or LINKS}
    assumed = Assumed(examples, tokens, classes, public)
    chosen = _configured(config, settings or [], model, task, tokens)
    found = made(chosen, assumed, described, devices, links, device_of(server))
    if as_json:
        typer.echo(json.dumps(found))
        return
    name = model or (described["model_type"] if described else chosen.model)
    _show(found, f"{name}, {chosen.task}", chosen.clients, tokens, console)


def _show(found: dict[str, Any], what: str, clients: int, tokens: int, console: Console) -> None:
    """What was assumed, a table of costs, and one of times."""
    from .report.plan import print_runs, print_times
    from .report.tables import plain
    from .report.units import count_text

    of, assumed = found["model"], found["assumed"]
    cut_off = " (the model reads no more)" if assumed["tokens"] < tokens else ""
    said = (
        f"{what}: {count_text(of['parameters'])} parameters in {of['blocks']} blocks, {count_text(of['trained'])} "
        f"train; {clients} sites with {assumed['examples']} examples of {assumed['tokens']} tokens{cut_off}, "
        f"{assumed['public']} public; one round\n"
    )
    console.print(plain(said, console), markup=False, soft_wrap=True)
    print_runs(found["runs"], console)
    console.print("\nA round at the slowest site, as configured: seconds, and joules of that site", style="bold")
    print_times([run for run in found["runs"] if not run["option"]], console)
    console.print(plain(HOW, console), style="dim", soft_wrap=True)


def dry_run(config: Config, as_json: bool) -> None:
    """What the runs of a configuration would cost, on the data and in the order in which they would be run."""
    console = terminal(as_json)
    from .bench import Bench
    from .plan.predict import predict

    bench = Bench(config)
    runs = predict(config, bench=bench)
    if as_json:
        typer.echo(json.dumps({"config": bench.config.model_dump(mode="json"), "runs": runs}))
        return
    from .report.plan import print_runs

    for seed in bench.config.seeds:
        if len(bench.config.seeds) > 1:
            console.print(f"seed {seed}", style="bold")
        print_runs([run for run in runs if run["seed"] == seed], console)
    console.print(f"Sums over {bench.config.rounds} rounds; nothing was trained.", style="dim")


def _configured(path: Path | None, settings: list[str], model: str | None, task: str | None, tokens: int) -> Config:
    """The configuration of one round, whose texts are as long as assumed."""
    from .config_file import PLAIN, load_config

    if model and os.path.basename(model) == "config.json" and os.path.isfile(model):
        model = os.path.dirname(model) or "."
    more = [f"{key}={value}" for key, value in (("model", model), ("task", task)) if value is not None]
    more += [] if path is not None else ['frameworks=["fedllm", "kd", "split"]']
    config = load_config(path or PLAIN, [*more, *settings])
    train = config.train.model_copy(update={"max_length": max(config.train.max_length, tokens)})
    chosen: Config = config.model_copy(update={"rounds": 1, "seeds": config.seeds[:1], "train": train})
    chosen._base = config.base if path is not None else Path.cwd()
    return chosen


def check_task(task: str | None) -> None:
    """Raises ConfigError unless the option names a task, or nothing."""
    if task not in (None, *TASKS):
        raise ConfigError(f"--task is {' or '.join(TASKS)}, not {task!r}{did_you_mean(str(task), TASKS)}")


def shape_of(text: str) -> dict[str, Any]:
    """`model_type=llama,hidden_size=4096` as a mapping. Raises ConfigError."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, sign, value = part.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"--shape: {part!r} is not of the form key=value")
        found[key.strip()] = _number(value.strip())
    if not isinstance(found.get("model_type"), str):
        near = did_you_mean("model_type", found)
        raise ConfigError(f"--shape needs model_type, as llama, gpt2 or bert{near}")
    return found


def _number(text: str) -> int | float | bool | str:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool) else text
