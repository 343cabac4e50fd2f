"""The command `fedtrio advise`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_show import terminal

if TYPE_CHECKING:
    from rich.console import Console

    from .plan.predict import Assumed

NOTHING_FITS = 8
LIMITS = "Limits, of one site and one round"
STAYS = "What must stay, and what there is not"
WHERE = "Where"
SHAPE = "In place of data: one of these, and none are read"


def advise(
    source: Annotated[
        Path | None, typer.Argument(help="YAML file of a comparison, or the folder of a finished one or of a study.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key. Repeatable.")
    ] = None,
    constraints: Annotated[
        Path | None, typer.Option(help="YAML file of constraints, as max_up: 5MB; options stand above it.")
    ] = None,
    max_up: Annotated[
        str | None, typer.Option(metavar="BYTES", help="What a site may send, as 5MB.", rich_help_panel=LIMITS)
    ] = None,
    max_down: Annotated[
        str | None, typer.Option(metavar="BYTES", help="What a site may be sent.", rich_help_panel=LIMITS)
    ] = None,
    client_memory: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Memory of a site, as 2GiB.", rich_help_panel=LIMITS)
    ] = None,
    client_flops: Annotated[
        str | None, typer.Option(metavar="FLOPS", help="Operations of a site, as 1TFLOP.", rich_help_panel=LIMITS)
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(metavar="TIME", help="Time for the round, as 10min.", rich_help_panel=LIMITS)
    ] = None,
    server_memory: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Memory of the server, as 24GiB.", rich_help_panel=LIMITS)
    ] = None,
    labels_stay: Annotated[
        bool, typer.Option("--labels-stay", help="Labels must not leave a site.", rich_help_panel=STAYS)
    ] = False,
    activations_stay: Annotated[
        bool, typer.Option("--activations-stay", help="Activations must not.", rich_help_panel=STAYS)
    ] = False,
    logits_stay: Annotated[bool, typer.Option("--logits-stay", help="Logits must not.", rich_help_panel=STAYS)] = False,
    parameters_stay: Annotated[
        bool, typer.Option("--parameters-stay", help="Adapters must not.", rich_help_panel=STAYS)
    ] = False,
    unlike_models: Annotated[
        bool, typer.Option("--unlike-models", help="Sites hold different models.", rich_help_panel=STAYS)
    ] = False,
    no_public_set: Annotated[
        bool, typer.Option("--no-public-set", help="No texts that all may see.", rich_help_panel=STAYS)
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Built-in name, local folder, or Hub id.", rich_help_panel=SHAPE)
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(metavar="KEY=VALUE,…", help="A model by shape alone, as in plan.", rich_help_panel=SHAPE),
    ] = None,
    task: Annotated[str | None, typer.Option(help="classification or causal-lm.", rich_help_panel=SHAPE)] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Examples at each site; 1000.", rich_help_panel=SHAPE)
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each example; 64.", rich_help_panel=SHAPE)
    ] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="Classes; 77.", rich_help_panel=SHAPE)] = None,
    public: Annotated[int | None, typer.Option(min=0, help="Public texts; 1000.", rich_help_panel=SHAPE)] = None,
    device: Annotated[str, typer.Option(help="What a site computes on.", rich_help_panel=WHERE)] = "laptop",
    link: Annotated[str, typer.Option(help="A site's line.", rich_help_panel=WHERE)] = "4g",
    server: Annotated[str, typer.Option(help="What the server computes on.", rich_help_panel=WHERE)] = "datacenter-gpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the advice as JSON and nothing else.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Which framework suits your constraints, with which settings, and what would change the answer.

    Ends with 8 where nothing fits.
    """
    keys = (
        "max_up",
        "max_down",
        "client_memory",
        "client_flops",
        "deadline",
        "server_memory",
        "labels_stay",
        "activations_stay",
    )
    keys += ("logits_stay", "parameters_stay", "unlike_models", "no_public_set")
    given = {key: value for key, value in locals().items() if key in keys}
    console = terminal(as_json)
    from .plan.advise_limits import load_limits

    limits = load_limits(constraints, given)
    if console.is_terminal:
        console.print("[dim]loading torch, transformers and peft[/]")
    from .plan.advise import advise as advise_on
    from .plan.advise_measured import load_source
    from .plan.advise_price import Where

    sizes = {"examples": examples, "tokens": tokens, "classes": classes, "public": public}
    assumed, described = _assumed(sizes, shape)
    named = {"model": model, "task": task, "train.max_length": tokens}
    over = [f"{key}={value}" for key, value in named.items() if value is not None]
    where = Where(device, link, server)
    config, measured, notes = load_source(source, [*over, *(settings or [])], plain=assumed is not None)
    found = advise_on(config, limits, where, measured, assumed, described)
    found["notes"] += notes
    if as_json:
        import json

        typer.echo(json.dumps(found))
    else:
        _show(found, console)
    if found["answer"] is None:
        sys.exit(NOTHING_FITS)


def _assumed(sizes: dict[str, int | None], shape: str | None) -> tuple[Assumed | None, dict[str, Any] | None]:
    """What is assumed of the data, and the model by its shape alone; nothing where neither was given."""
    from .cli_plan import shape_of
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
