"""The command line. Imports late, so that `fedtrio --help` needs no torch."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from . import cli_advise, cli_export, cli_flower, cli_plan, cli_report, cli_sites, cli_sweep
from .cli_show import Progress, prepare_environment, show, silence, stopped, terminal
from .errors import ConfigError, FedtrioError

if TYPE_CHECKING:
    from .config import Config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune language models on data that must not leave its owners, in three ways, side by side.",
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from . import __version__

        typer.echo(f"fedtrio {__version__}")
        raise typer.Exit()


@app.command()
def compare(
    config: Annotated[Path | None, typer.Argument(help="YAML file; without it, the embedded default.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set lora.r=16. Repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<name>-<time>.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print results.json to standard output and nothing else.")
    ] = False,
    record_frames: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep every frame as it crossed the wire.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default: as many as the cores allow. Changes no result.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what each run would cost, to the byte, and train nothing.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Compare FedLLM, KD-FedLLM and Split-FedLLM, and two yardsticks, on the same model and data."""
    from .config_file import load_config

    if dry_run:
        return cli_plan.dry_run(load_config(config, settings or []), as_json)
    out = out or Path("runs") / f"{config.stem if config else 'demo'}-{time.strftime('%Y%m%d-%H%M%S')}"
    _compare(lambda: load_config(config, settings or []), out, as_json, record_frames, jobs)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="Run folder of a comparison that was broken off.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print results.json to standard output and nothing else.")
    ] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time, as in compare.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Go on with a comparison after the last round that was committed, to the same results."""
    from .config_file import load_config

    if not os.path.isfile(folder / "config.yaml"):
        raise ConfigError(f"{folder} is no run folder: it holds no config.yaml")
    _compare(lambda: load_config(folder / "config.yaml"), folder, as_json, None, jobs)


_COMMANDS = (
    cli_plan.plan,
    cli_advise.advise,
    cli_sweep.sweep,
    cli_report.report,
    cli_export.export,
    cli_sites.certs,
    cli_sites.serve,
    cli_sites.site,
    cli_sites.doctor,
)
for _command in _COMMANDS:
    app.command()(_command)
app.add_typer(cli_flower.app, name="flower")


def _compare(
    config: Callable[[], Config], out: Path, as_json: bool, record_frames: Path | None, jobs: int | None
) -> None:
    try:
        out.exists()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--out {out} can't be written: {why}; choose another --out") from error
    console = terminal(as_json)
    if console.is_terminal:
        console.print("[dim]loading torch, transformers and peft[/]")
    from .compare import compare as run_comparison

    progress = Progress(console)
    stopped.folder = out
    results = run_comparison(config(), out, progress.round, progress.start, record_frames, jobs)
    progress.stop()
    show(results, out, console, as_json)


def main() -> None:
    """Entry point: runs the command and turns every error into one or two lines and an exit code.

    Codes: 2 usage, configuration, or an output that can't be written, 3 data, 4 model, 5 message, 6 network, 7 too few
    sites, 70 our bug, 130 and 143 interrupted. A reader that goes (`| head`) is no error: the command goes on to its
    end, and the code is 0.
    """
    _open_streams()
    signal.signal(signal.SIGTERM, stopped.catch)
    debug = "--debug" in sys.argv
    prepare_environment()
    try:
        code = app(standalone_mode=False)
        if code == 130:  # how typer says that it was interrupted
            raise KeyboardInterrupt
        sys.stdout.flush()
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except FedtrioError as error:
        _fail(str(error), error.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort):
        _fail(stopped.say(), 128 + stopped.by, debug)
    except BrokenPipeError:  # the reader of our output has gone; nothing is left to say
        silence(sys.stdout)
        sys.exit(0)
    except SystemExit as stop:
        if not isinstance(stop.__context__, BrokenPipeError):  # for which typer exits with 1
            raise
        sys.exit(0)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _UNWRITABLE and _full(sys.stdout, "\n"):
            _fail(f"standard output can't be written: {error.strerror}", ConfigError.exit_code, debug)
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "exit_code"):
            said = getattr(error, "format_message", error.__str__)()
            _fail(said, ConfigError.exit_code, debug)
        _fail(
            f"a bug in fedtrio: {type(error).__name__}: {error}\n--debug shows where; please report it",
            70,
            debug,
        )


def _fail(message: str, code: int, debug: bool) -> None:
    from .report.svg import printable

    try:
        if debug:
            traceback.print_exc()
        if message:
            print(f"fedtrio: {_LONG.sub(_shortened, printable(message))}", file=sys.stderr)
    except OSError:  # nobody can be told
        silence(sys.stderr)
    if _full(sys.stdout):
        silence(sys.stdout)  # or Python would say so once more, and end with a code of its own
    sys.exit(code)


_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
_LONG = re.compile(r"\S{400,}")  # a path or value that would fill the terminal


def _shortened(word: re.Match[str]) -> str:
    return f"{word[0][:60]}…{word[0][-60:]} ({len(word[0]):,} characters)"


def _full(stream: TextIO, more: str = "") -> bool:
    """Whether what has been said, and `more`, can't be written."""
    try:
        stream.write(more)
        stream.flush()
    except OSError:
        return True
    return False


def _open_streams() -> None:
    """Streams that were closed (`>&-`) lead nowhere; letters that a terminal does not know are spelled out."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
