"""The command `fedtrio advise`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_plan import Debug, Settings, check_task, shape_of
from .cli_show import terminal

if TYPE_CHECKING:
    from rich.console import Console

    from .plan.predict import Assumed

NOTHING_FITS = 8
LIMITS = (
    *("max_up", "max_down", "client_memory", "client_flops", "deadline", "server_memory"),
    *("labels_stay", "activations_stay", "logits_stay", "parameters_stay", "unlike_models", "no_public_set"),
)


def _limit(metavar: str, text: str) -> Any:
    return typer.Option(metavar=metavar, help=text, rich_help_panel="Limits, of one round")


def _stays(flag: str, text: str) -> Any:
    return typer.Option(flag, help=text, rich_help_panel="What must stay, and what there is not")


def _size(text: str, **more: Any) -> Any:
    return typer.Option(help=text, rich_help_panel="In place of data: one of these, and none are read", **more)


def _where(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="Where")


def advise(
    source: Annotated[
        Path | None, typer.Argument(help="YAML file of a comparison, or the folder of a finished one or of a study.")
    ] = None,
    settings: Settings = None,
    constraints: Annotated[
        Path | None, typer.Option(help="YAML file of constraints, as max_up: 5MB; options stand above it.")
    ] = None,
    max_up: Annotated[str | None, _limit("BYTES", "What a site may send, as 5MB.")] = None,
    max_down: Annotated[str | None, _limit("BYTES", "What a site may be sent.")] = None,
    client_memory: Annotated[str | None, _limit("BYTES", "Memory of a site, as 2GiB.")] = None,
    client_flops: Annotated[str | None, _limit("FLOPS", "Operations of a site, as 1TFLOP.")] = None,
    deadline: Annotated[str | None, _limit("TIME", "Time for the round, as 10min.")] = None,
    server_memory: Annotated[str | None, _limit("BYTES", "Memory of the server, as 24GiB.")] = None,
    labels_stay: Annotated[bool, _stays("--labels-stay", "Labels must not leave a site.")] = False,
    activations_stay: Annotated[bool, _stays("--activations-stay", "Activations must not.")] = False,
    logits_stay: Annotated[bool, _stays("--logits-stay", "Logits must not.")] = False,
    parameters_stay: Annotated[bool, _stays("--parameters-stay", "Adapters must not.")] = False,
    unlike_models: Annotated[bool, _stays("--unlike-models", "Sites hold different models.")] = False,
    no_public_set: Annotated[bool, _stays("--no-public-set", "No texts that all may see.")] = False,
    model: Annotated[str | None, _size("Built-in name, local folder, or Hub id.")] = None,
    shape: Annotated[str | None, _size("A model by shape alone, as in plan.", metavar="KEY=VALUE,…")] = None,
    task: Annotated[str | None, _size("classification or causal-lm.")] = None,
    examples: Annotated[int | None, _size("Examples at each site; 1000.", min=1)] = None,
    tokens: Annotated[int | None, _size("Tokens of each example; 64.", min=1)] = None,
    classes: Annotated[int | None, _size("Classes; 77.", min=2)] = None,
    public: Annotated[int | None, _size("Public texts; 1000.", min=0)] = None,
    device: Annotated[str, _where("What a site computes on.")] = "laptop",
    link: Annotated[str, _where("A site's line.")] = "4g",
    server: Annotated[str, _where("What the server computes on.")] = "datacenter-gpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the advice as JSON and nothing else.")] = False,
    debug: Debug = False,
) -> None:
    """Which framework suits your constraints, with which settings, and what would change the answer.

    Ends with 8 where nothing fits.
    """
    bounds = {key: value for key, value in locals().items() if key in LIMITS}
    check_task(task)
    sizes = {"examples": examples, "tokens": tokens, "classes": classes, "public": public}
    named = {"model": model, "task": task, "train.max_length": tokens}
    over = [*(f"{key}={value}" for key, value in named.items() if value is not None), *(settings or [])]
    console = terminal(as_json)
    found = _advice(source, over, constraints, bounds, sizes, shape, (device, link, server), console)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        _show(found, console)
    if found["answer"] is None:
        sys.exit(NOTHING_FITS)


def _advice(
    source: Path | None, settings: list[str], constraints: Path | None, bounds: dict[str, Any],
    sizes: dict[str, int | None], shape: str | None, where: tuple[str, str, str], console: Console,
) -> dict[str, Any]:  # fmt: skip
    """As `plan.advise` finds it. Constraints are read first, before what takes seconds to load."""
    from .plan.advise_limits import load_limits

    limits = load_limits(constraints, bounds)
    if console.is_terminal:
        console.print("[dim]loading torch, transformers and peft[/]")
    from .plan.advise import advise as advise_on
    from .plan.advise_measured import load_source
    from .plan.advise_price import Where

    assumed, described = _assumed(sizes, shape)
    place = Where(*where)
    config, measured, notes = load_source(source, settings, plain=assumed is not None)
    found = advise_on(config, limits, place, measured, assumed, described)
    return found | {"notes": found["notes"] + notes}


def _assumed(sizes: dict[str, int | None], shape: str | None) -> tuple[Assumed | None, dict[str, Any] | None]:
    """What is assumed of the data, and the model by its shape alone; nothing where neither was given."""
    from .plan.predict import Assumed

    given = {key: value for key, value in sizes.items() if value is not None}
    described = shape_of(shape) if shape is not None else None
    return Assumed(**given) if given or described else None, described


def _show(found: dict[str, Any], console: Console) -> None:
    """The answer, the ranking with its reasons, what is ruled out, what would flip the answer, what to know."""
    from textwrap import fill

    from .plan.advise_text import lines, table
    from .report.tables import plain

    answer = found["answer"]
    said = answer["sentence"] if answer else "Nothing fits all constraints."
    console.print(plain(said, console), markup=False)
    if found["ranking"]:
        console.print()
        console.print(table(found, lambda text: plain(text, console)))
    for head, body in lines(found):
        console.print(f"\n[bold]{head}[/]")
        for line in body:
            folded = fill(line, console.width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
            console.print(plain(folded, console), soft_wrap=True, markup=False)
    if answer:
        words = " ".join(f'"{word}"' if {*" [{"} & {*word} else word for word in answer["command"])
        console.print(plain(f"\nRun it:  fedtrio compare … {words}", console), soft_wrap=True, markup=False)
