"""A Flower app of four small files for one's configuration, and its run by the command `flwr`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..config import Config
from ..errors import ConfigError, WireError

TEMPLATE = Path(__file__).parent / "template"
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}  # Flower has both on


def write_app(folder: Path, config: Config, file: Path, out: Path, address: str = "") -> list[Path]:
    """Write the app for the configuration in `file`; `out` is the run folder. The files written.

    Nothing of the configuration is in the app but its path, as Flower sends the app to every node. ConfigError where
    the configuration can't run over Flower, or the folder holds something else.
    """
    check(config, address)
    if folder.is_dir() and not {path.name for path in folder.iterdir()} <= {path.name for path in _files()}:
        raise ConfigError(f"{folder} holds something else than an app of fedtrio; choose another folder")
    said = {"CONFIG": str(file.absolute()), "OUT": str(out.absolute()), "ADDRESS": address}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in _files():
            text = path.read_text(encoding="utf-8")
            for key, value in said.items():
                text = text.replace(f'"@{key}@"', json.dumps(value, ensure_ascii=False))
            (folder / path.name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} can't be written: {error.strerror}; choose another folder") from error
    return [folder / path.name for path in _files()]


def check(config: Config, address: str) -> None:
    """Raises ConfigError where a configuration can't run over Flower."""
    if not config.wire.sites:
        raise ConfigError("wire.sites is missing: list the names under which the SuperNodes are registered")
    parts = urlsplit(address)
    if address and (parts.scheme != "https" or not parts.hostname or parts.path not in ("", "/")):
        raise ConfigError(f"{address!r:.200} is no address of a server; write https://host:8443")
    if "split" in config.frameworks and not address:
        raise ConfigError(
            "split needs an HTTPS address beside Flower, as its turns are many: say by which one the sites reach this "
            "server (--address https://host:8443), or leave split out of frameworks"
        )


def run_app(folder: Path, superlink: str | None, settings: Sequence[str] = ()) -> None:
    """Run the app by `flwr run`, show its log, and wait for its end.

    ConfigError where `flwr` is not installed, WireError where the run does not start or fails. Flower's command may
    end with 0 all the same, so what counts is what it says.
    """
    where = [superlink] if superlink else []
    options = [word for setting in settings for word in ("--run-config", setting)]
    run = str(_flwr("run", str(folder), *where, *options)["run-id"])
    subprocess.run([_command(), "log", run, *where, "--stream"], env=_environment(), check=False)
    found = _flwr("list", "--run-id", run, *where)["runs"][0]
    if found["status"] != "finished:completed":
        raise WireError(f"Flower's run {run} is {found['status']}: {found.get('status-details', '')}")


def _flwr(*words: str) -> dict[str, Any]:
    """What a command of Flower says in JSON. WireError where that is no success."""
    done = subprocess.run(
        [_command(), *words, "--format", "json"], env=_environment(), capture_output=True, text=True, check=False
    )
    try:
        said = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        said = {}
    if said.get("success") is not True:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise WireError(f"flwr {words[0]}: {' '.join((said.get('error-message') or lines[-1]).split())}")
    return said


def _command() -> str:
    beside = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    found = shutil.which("flwr", path=beside)
    if found is None:
        raise ConfigError("Flower is not installed here: pip install 'fedtrio[flower]'")
    return found


def _environment() -> Mapping[str, str]:
    return {**os.environ, **QUIET}


def _files() -> list[Path]:
    return sorted(path for path in TEMPLATE.iterdir() if path.suffix in (".py", ".toml"))
