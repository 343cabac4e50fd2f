"""The commands for those who have Flower: write the app, and run it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_show import stopped

app = typer.Typer(no_args_is_help=True, help="Run a comparison over Flower: SuperLink, SuperNodes and their TLS.")


@app.command("app")
def write(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the app.")],
    config: Annotated[Path, typer.Argument(help="The server's YAML file; wire.sites lists the sites.")],
    out: Annotated[Path | None, typer.Option(help="Run folder at the SuperLink; default runs/<name>.")] = None,
    address: Annotated[
        str, typer.Option(help="For split: by which the sites reach this server, https://host:8443.")
    ] = "",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write a Flower app of four small files for a configuration."""
    from .config_file import load_config
    from .flower.app import write_app

    for path in write_app(folder, load_config(config), config, out or Path("runs") / config.stem, address):
        typer.echo(path)
    typer.echo(f"Next: fedtrio flower run {folder} SUPERLINK")


@app.command("run")
def run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The app's folder.")],
    superlink: Annotated[str | None, typer.Argument(help="Its name in Flower's own configuration.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--run-config", metavar="KEY=VALUE", help="Override a key of the app's configuration. Repeatable."
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Run the app by `flwr run`, show its log, and end as the run ends."""
    from .flower.app import run_app

    stopped.again = "a run that was started goes on at the SuperLink, until `flwr stop` ends it"
    run_app(folder, superlink, settings or [])
