"""The command line. Imports late, so that `fedtrio --help` needs no torch."""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import ConfigError, FedtrioError

if TYPE_CHECKING:
    from rich.console import Console

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
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Compare FedLLM, KD-FedLLM and Split-FedLLM, and two yardsticks, on the same model and data."""
    from rich.console import Console

    console = Console(stderr=as_json, highlight=False)
    out = out or Path("runs") / f"{config.stem if config else 'demo'}-{time.strftime('%Y%m%d-%H%M%S')}"
    if console.is_terminal:
        console.print("[dim]loading torch, transformers and peft[/]")
    from .compare import compare as run_comparison
    from .config import load_config

    progress = _Progress(console)
    results = run_comparison(load_config(config, settings or []), out, progress.round, progress.start, record_frames)
    progress.stop()
    if as_json:
        import json

        typer.echo(json.dumps(results, ensure_ascii=False))
        return
    from .report.tables import next_command, plain, print_table, reading

    console.print()
    print_table(results, console)
    for sentence in reading(results):
        console.print(plain(sentence, console), markup=False)
    console.print(plain(f"\nReport:  {out / 'report.html'}", console), soft_wrap=True, markup=False)
    console.print(plain(f"Next:    {next_command(results)}", console), soft_wrap=True, markup=False)


class _Progress:
    """A bar on a terminal, one line a round elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Any = None
        self._task: Any = None

    def start(self, bench: Any) -> None:
        """Say what is about to run."""
        config, encoded = bench.config, bench.encoded
        sites = len(bench.shares(config.seeds[0]))
        self._console.print(
            f"{config.model}, {config.task}: {len(encoded['train'])} training examples on {sites} sites, "
            f"{len(encoded['test'])} test, {len(encoded['public'])} public; "
            f"{config.rounds} rounds, {config.train.precision} on {config.device}, {config.threads} threads",
            markup=False,
        )
        if self._console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("…", total=config.rounds * len(config.frameworks) * len(config.seeds))
            self._bar.start()

    def round(self, framework: str, seed: int, entry: Any) -> None:
        """One round of one framework is over."""
        shown = "trained" if entry["accuracy"] is None else f"accuracy {entry['accuracy']:.3f}"
        if entry.get("perplexity"):
            shown = f"perplexity {entry['perplexity']:.2f}"
        line = f"{framework:<12} seed {seed}  round {entry['round']}  {shown}"
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=line)
        else:
            self._console.print(line, markup=False)

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def main() -> None:
    """Entry point: runs the command and turns every error into one or two lines and an exit code.

    Codes: 2 usage or configuration, 3 data, 4 model, 5 message, 70 our bug, 130 interrupted.
    """
    debug = "--debug" in sys.argv
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        if app(standalone_mode=False) == 130:  # how typer says that it was interrupted
            raise KeyboardInterrupt
        sys.stdout.flush()
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except FedtrioError as error:
        _fail(str(error), error.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort):
        _fail(
            "interrupted; finished runs are in the run folder, and the same command with --out goes on",
            130,
            debug,
        )
    except BrokenPipeError:  # the reader of our output has gone; nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "exit_code"):
            said = getattr(error, "format_message", error.__str__)()
            _fail(said, ConfigError.exit_code, debug)
        _fail(
            f"a bug in fedtrio: {type(error).__name__}: {error}\n--debug shows where; please report it",
            70,
            debug,
        )


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    try:
        if message:
            print(f"fedtrio: {message}", file=sys.stderr)
    except UnicodeEncodeError:
        print(f"fedtrio: {message}".encode("ascii", "replace").decode(), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
