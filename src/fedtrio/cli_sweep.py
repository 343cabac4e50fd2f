"""The command `fedtrio sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_show import stopped, terminal


def sweep(
    study: Annotated[Path, typer.Argument(help="YAML file: base, set, points, grid.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key in all points. Repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the study; default runs/<name of the file>.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Points at a time; default: as many as the cores allow.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print study.json to standard output and nothing else.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Compare over a grid or list of settings; what is finished is kept, and the same command goes on."""
    console, folder = terminal(as_json), out or Path("runs") / study.stem
    if console.is_terminal:
        console.print("[dim]loading torch, transformers and peft[/]")
    from .errors import FedtrioError
    from .report.study import markdown
    from .sweep import sweep as run_study

    def tell(name: str, done: int, of: int, runs: list[dict[str, Any]] | FedtrioError) -> None:
        if isinstance(runs, FedtrioError):
            return console.print(f"{name} failed: {runs}", markup=False)
        best = max((run["accuracy"] for run in runs if run.get("accuracy") is not None), default=None)
        shown = "" if best is None else f", best accuracy {best:.3f}"
        console.print(f"{done} of {of}: {name}{shown}", markup=False)

    stopped.again = "the same command goes on after what is finished"
    found = run_study(study, folder, jobs, tell, settings or [])
    if as_json:
        import json

        typer.echo(json.dumps(found))
        return
    console.print(f"\n{markdown(found)}", markup=False, soft_wrap=True)
    console.print(f"Report: {folder / 'report.html'}", markup=False, soft_wrap=True)
