"""What runs inside a ServerApp: the comparison of `serve` over Flower's messages, and split's turns over HTTPS."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from ..certs import FILES, issue, new_authority
from ..cli_show import Progress, prepare_environment, show
from ..config_file import load_config
from ..errors import ConfigError
from ..message import Message, encode
from ..program import ACCOUNT
from ..serve import Greeter, OnEvent, serve_over
from ..wires.flower import Flower, GridPost
from ..wires.invited import Invited
from .app import QUIET, check

GOING_S = 60.0  # in which a ServerApp whose SuperLink has died ends


def serve(grid: Any, run_config: Mapping[str, Any]) -> dict[str, Any]:
    """Run the configuration that the app's `config` names into its folder `out`; what results.json holds.

    All that is said goes to the ServerApp's log. Raises as `fedtrio.serve.serve` does.
    """
    prepare_environment()
    console = Console(highlight=False, force_terminal=False, width=100)
    progress = Progress(console)
    path, out, address = (str(run_config.get(key, "")) for key in ("config", "out", "address"))
    if not path or not out:
        raise ConfigError("the app's pyproject.toml lacks config or out; write it by `fedtrio flower app`")
    config = load_config(Path(path))
    check(config, address)
    for name, quiet in QUIET.items():
        if os.environ.get(name) != quiet:
            console.print(f"Flower may call home from here: start the SuperLink with {name}={quiet}", markup=False)

    def tell(event: Mapping[str, Any]) -> None:
        reason = f": {event['reason']}" if event.get("reason") else ""
        console.print(f"{event['site']} {event['event']}{reason}", markup=False)

    def connect(greeter: Greeter, note: OnEvent) -> Flower:
        limit, beside = config.wire.max_frame_bytes, lambda round: encode(Message(ACCOUNT), round)  # is asked next
        post, names, settings = GridPost(grid), greeter.sites, greeter.settings
        return Flower(post, names, settings, greeter.welcome, beside=beside, limit=limit, on_event=note)

    @contextlib.contextmanager
    def road(wire: Flower, framework: str) -> Iterator[Flower | Invited]:
        if framework != "split":
            yield wire
            return
        with _credentials(urlsplit(address).hostname or "") as (server, credential):
            invited = Invited(wire, address, server, credential, config.wire.host, config.wire.port)
            try:
                yield invited
            finally:
                invited.close()

    with _alone(Path(out)):
        results = serve_over(connect, config, Path(out), progress.round, lambda r, _: progress.start(r), tell, road)
    show(results, Path(out), console, False)
    return results


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """The run folder for this process: a ServerApp outlives its SuperLink for a while. ConfigError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / "lock").open("w", encoding="ascii")
    except OSError as error:
        raise ConfigError(f"{out} can't be written: {error.strerror}; choose another out") from error
    with file:
        end = time.monotonic() + GOING_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= end:
                    raise ConfigError(
                        f"{out}: another run works in this folder; stop it, or choose another out"
                    ) from error
                time.sleep(0.5)
        yield


@contextlib.contextmanager
def _credentials(host: str) -> Iterator[tuple[Path, Callable[[str], Mapping[str, str]]]]:
    """The server's folder of certificates, and what makes a site's: of an authority that lives as long as this."""
    start = datetime.now(UTC) - timedelta(minutes=10)
    end = start + timedelta(days=365)
    authority = new_authority(start)
    with tempfile.TemporaryDirectory(prefix="fedtrio-") as folder:

        def credential(site: str) -> dict[str, str]:
            made = issue(authority, Path(folder) / "site", site, start, end)
            try:
                return {name: (made / name).read_text(encoding="ascii") for name in FILES}
            finally:
                shutil.rmtree(made)

        yield issue(authority, Path(folder) / "server", "server", start, end, [host]), credential
