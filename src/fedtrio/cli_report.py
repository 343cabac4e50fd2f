"""The command `fedtrio report`. It needs neither torch nor the data: all that the page shows lies in the folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_show import terminal
from .errors import ConfigError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of comparisons or of a study.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; default RUN/report.html, of several compared.html.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write the report anew from run folders; of several folders, one page that compares them."""
    from .report.folders import together, written_anew

    if len(runs) > 1:
        pages = {out or Path("compared.html"): together(runs)}
    else:
        pages = written_anew(runs[0])
        if out is not None:
            pages = {out: pages[runs[0] / "report.html"]}
    for path, text in pages.items():
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} can't be written: {error.strerror}; choose another --out") from error
    console = terminal(False)
    shown = out or (Path("compared.html") if len(runs) > 1 else runs[0] / "report.html")
    console.print(f"Report:  {shown}", soft_wrap=True, markup=False)
