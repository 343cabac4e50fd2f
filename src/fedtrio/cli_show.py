"""What the command line shows while it works, at the end, and when it is interrupted."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from .errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


def prepare_environment() -> None:
    """Before torch and tokenizers are imported; what the user has set stays."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "128")  # shapes that torch's bf16 products keep memory for; 1024 is MBs


def terminal(as_json: bool) -> Console:
    """Standard output, or standard error where the former is for JSON alone.

    A reader that has gone (`| head`) silences it and ends nothing. Raises ConfigError where it can't be written.
    """
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            silence(self.file)  # type: ignore[arg-type]  # rich says IO[str]

        def print(self, *objects: Any, **options: Any) -> None:
            try:
                super().print(*objects, **options)
            except OSError as error:
                name = "error" if self.stderr else "output"
                raise ConfigError(f"standard {name} can't be written: {error.strerror}") from error

    return Terminal(stderr=as_json, highlight=False)


def silence(stream: TextIO) -> None:
    """Send to nowhere what a stream holds and what it will be given, so that not even its end complains."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def show(results: dict[str, Any], out: Path, console: Console, as_json: bool) -> None:
    """The table, what to read in it and what to do next; or results.json alone."""
    if as_json:
        import json

        text = json.dumps(results, ensure_ascii=False)
        try:
            text.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:  # a terminal, or a name, that is not UTF-8
            text = json.dumps(results)
        typer.echo(text)
        return
    from .report.tables import plain, print_table
    from .report.verdict import next_command, reading

    console.print()
    print_table(results, console)
    for sentence in reading(results):
        console.print(plain(sentence, console), markup=False)
    console.print(plain(f"\nReport:  {out / 'report.html'}", console), soft_wrap=True, markup=False)
    console.print(plain(f"Next:    {next_command(results)}", console), soft_wrap=True, markup=False)


class Progress:
    """A bar on a terminal, one line a round elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Any = None
        self._task: Any = None

    def start(self, results: Any) -> None:
        """Say what is about to run."""
        from .report.tables import plain

        config, data = results["config"], results["data"]
        rounds = "round" if config["rounds"] == 1 else "rounds"
        sites = len(data["partitions"][0]["sites"]) if data["partitions"] else len(config["wire"]["sites"] or [])
        held = f"{data['train']} training examples on {sites} sites" if data["train"] else f"{sites} sites"
        self._console.print(
            f"{config['model']}, {config['task']}: {held}, {data['test']} test, {data['public']} public; "
            f"{config['rounds']} {rounds}, {config['train']['precision']} on {config['device']}, "
            f"threads: {config['threads']}",
            markup=False,
        )
        for warning in results["warnings"]:
            self._console.print(plain(f"warning: {warning}", self._console), markup=False)
        if self._console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task(
                "…", total=config["rounds"] * len(config["frameworks"]) * len(config["seeds"])
            )
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


class Stopped:
    """What to say when a signal ends the command."""

    by: int = signal.SIGINT
    folder: Path | None = None
    again: str | None = None

    def catch(self, number: int, frame: object) -> None:
        """SIGTERM ends a command as Ctrl-C does."""
        self.by = number
        raise KeyboardInterrupt

    def say(self) -> str:
        """How to go on."""
        if self.again:
            return f"interrupted; {self.again}"
        if self.folder is None or not (self.folder / "config.yaml").is_file():
            return "interrupted; nothing had been computed yet"
        return f"interrupted; all committed rounds are kept, go on with: fedtrio resume {self.folder}"


stopped = Stopped()
