"""The commands of those who run fedtrio across machines: certificates, the server, a site, and a check of all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_show import Progress, show, stopped
from .errors import ConfigError


def certs(
    sites: Annotated[list[str], typer.Argument(help="Names of the sites.")],
    out: Annotated[Path, typer.Option(help="Folder for the authority, the server and the sites.")] = Path("certs"),
    host: Annotated[
        list[str] | None, typer.Option(help="Names and addresses by which sites reach the server. Repeatable.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the certificates are valid.")] = 365,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Make an authority, and certificates and keys for the server and each site."""
    from .certs import HOSTS, make_certs

    for name, folder in make_certs(sites, out, host or HOSTS, days).items():
        typer.echo(f"{name:<12} {folder}")
    typer.echo(f"Give each site its own folder alone, and keep {out / 'authority'} away from all of them.")


def serve(
    config: Annotated[Path, typer.Argument(help="YAML file; wire.sites lists the sites.")],
    certs: Annotated[Path, typer.Option(help="The server's folder of certificates.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key. Repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/<name>; an unfinished one goes on.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print results.json to standard output and nothing else.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Run a comparison with sites that dial in over HTTPS."""
    from rich.console import Console

    from .certs import check_server
    from .config_file import load_config

    check_server(certs)
    console = Console(stderr=as_json, highlight=False)
    out = out or Path("runs") / config.stem
    from .serve import serve as run_server

    progress = Progress(console)
    stopped.folder, stopped.again = out, "start the same command again to go on"

    def start(results: Any, wire: Any) -> None:
        progress.start(results)
        console.print(f"waiting on port {wire.port} for {', '.join(wire.sites)}", markup=False)

    def tell(event: Any) -> None:
        reason = f": {event['reason']}" if event.get("reason") else ""
        console.print(f"{event['site']} {event['event']}{reason}", markup=False, style="dim")

    results = run_server(load_config(config, settings or []), certs, out, progress.round, start, tell)
    progress.stop()
    show(results, out, console, as_json)


def site(
    config: Annotated[Path, typer.Argument(help="YAML file of this site: its data file and columns.")],
    server: Annotated[str | None, typer.Option(help="Address of the server: https://host:8443.")] = None,
    certs: Annotated[Path | None, typer.Option(help="This site's folder of certificates.")] = None,
    local: Annotated[
        Path | None, typer.Option(metavar="SOCKET", help="In place of both: serve the Flower SuperNode beside it.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="With --local: the name that the SuperNode is registered by.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key. Repeatable.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="For memory and models; default site-<name>.")] = None,
    show_outgoing: Annotated[
        bool, typer.Option("--show-outgoing", help="Print what is about to leave; ask the first time.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    patience: Annotated[float, typer.Option(min=1, help="Seconds to wait for a server that is away.")] = 3600,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Take part as a site: dial out to a server, train on this machine's own data."""
    from .config_file import load_site_config

    name = _site_name(name, server, certs, local)
    own = load_site_config(config, settings or [])
    from .checkpoint import make_folder
    from .remote import Host

    asked: set[str] = set()

    def leaving(run: str, round: int, message: Any, size: int) -> None:
        if not show_outgoing or message.kind in ("account", "conclude"):
            return
        shapes = ", ".join(f"{n} {tuple(t.shape)} {str(t.dtype)[6:]}" for n, t in list(message.tensors.items())[:4])
        more = f" and {len(message.tensors) - 4} more" if len(message.tensors) > 4 else ""
        typer.echo(
            f"{run} round {round}: {message.kind!r}, {size:,} bytes: {shapes}{more}; facts {dict(message.facts)}"
        )
        if message.kind not in asked and not yes and not typer.confirm("Send messages of this kind?"):
            raise ConfigError(f"{message.kind!r} was not sent; the server goes on without {name}")
        asked.add(message.kind)

    def tell(event: Any) -> None:
        typer.echo(f"{event['event']}{': ' + event['reason'] if event.get('reason') else ''}", err=True)

    stopped.again = "start the same command again to go on"
    folder = folder or Path(f"site-{name}")
    host = Host(name, own, folder, leaving, lambda text: typer.echo(text, err=True))
    make_folder(folder, "--folder")  # rather now than when the first round comes
    if server and certs:
        from .wires.dial import dial

        dial(server, certs, host, patience=patience, on_event=tell)
        typer.echo("all is over", err=True)
    elif local:
        from .wires.local import serve as serve_local

        serve_local(local, name, host, folder, on_event=tell)


def _site_name(name: str | None, server: str | None, certs: Path | None, local: Path | None) -> str:
    """That of the certificate, or beside a SuperNode the one given."""
    if local is not None:
        if server or certs or not name:
            raise ConfigError("--local goes with --name, and without --server and --certs: Flower reaches the server")
        return name
    if server is None or certs is None or name:
        raise ConfigError("say --server and --certs to dial a server, or --local and --name to serve a SuperNode")
    from .certs import check_site, describe

    check_site(certs)
    return describe(certs).subject


def doctor(
    config: Annotated[Path | None, typer.Argument(help="YAML file of a comparison, a server, or a site.")] = None,
    certs: Annotated[Path | None, typer.Option(help="The server's, or this site's, folder of certificates.")] = None,
    server: Annotated[str | None, typer.Option(help="Address of the server, for a site.")] = None,
    is_site: Annotated[bool, typer.Option("--site", help="The file is a site's; implied by --server.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key. Repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the run or the site's memory will be kept.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON and nothing else.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Check configuration, data, model, room, certificates and the way to the server, before anything runs."""
    from . import doctor as doctors

    patient = doctors.Patient(config, settings or [], certs, server, is_site or server is not None, out)
    found = []
    for finding in doctors.examine(patient):
        found.append(finding)
        if not as_json:
            typer.echo(finding.line())
    typer.echo(doctors.as_json(found) if as_json else doctors.summary(found))
    if code := doctors.exit_code(found):
        sys.exit(code)
