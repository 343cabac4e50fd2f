"""The command `fedtrio export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="Run folder of a comparison.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist, or be empty.")],
    framework: Annotated[str | None, typer.Option(help="Which; may be left out where the folder holds one.")] = None,
    seed: Annotated[int | None, typer.Option(help="Which; default: the first.")] = None,
    site: Annotated[str | None, typer.Option(help="Whose model, where each site has its own, as with local.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Base and adapter as one model, for transformers.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write the adapter of a finished run, or a merged model, with tokenizer and model card."""
    from .export import export as write

    done = write(run, out, framework, seed, site, merge)
    said = f"{'merged model' if merge else 'adapter'} of {done.parameters:,} parameters"
    if done.difference is not None:
        said += f", whose logits are those of base and adapter (largest difference {done.difference:.1g})"
    typer.echo(f"{done.folder}: {said}.\n{done.folder / 'README.md'} says what it is and how to load it.")
