"""A SuperLink and SuperNodes with TLS and registered keys on loopback, and a site's worker beside each SuperNode.

>>> with Garden(world, ["frameworks=[fedllm]"]) as garden:     # of `remotes.World`
...     garden.plant(); garden.run()
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from remotes import World, free_port, write_yaml

from fedtrio.flower.app import QUIET

BIN = Path(sys.executable).parent


class Garden:
    """Processes by name: `link`, for each site its SuperNode (`ada`) and worker (`ada worker`), and `run`."""

    def __init__(self, world: World, settings: Sequence[str] = (), name: str = "garden") -> None:
        self.world, self.folder, self.port, self.https = world, world.folder / name, free_port(), free_port()
        self.out = self.folder / "out"
        self.folder.mkdir()
        (self.folder / "home").mkdir()
        self.env = {**os.environ, **QUIET, "FLWR_HOME": str(self.folder / "home"), "OMP_NUM_THREADS": "1"}
        self.env["PATH"] = f"{BIN}{os.pathsep}{self.env['PATH']}"
        self.children: dict[str, subprocess.Popen] = {}
        connection = {"address": f"127.0.0.1:{self.port}", "root-certificates": str(world.certs("server") / "ca.pem")}
        lines = ["[superlink]", 'default = "here"', "[superlink.here]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in connection.items()]
        (self.folder / "home" / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        tree = yaml.safe_load((world.folder / "server.yaml").read_text(encoding="utf-8"))
        for setting in (*settings, f"wire.port={self.https}"):
            path, _, value = setting.partition("=")
            node = tree
            for part in path.split(".")[:-1]:
                node = node.setdefault(part, {})
            node[path.split(".")[-1]] = yaml.safe_load(value)
        self.yaml = write_yaml(world.folder / f"{name}.yaml", tree)

    def link(self) -> None:
        """Start the SuperLink, and register the keys of all sites."""
        certs = self.world.certs("server")
        words = ["flower-superlink", "--host=127.0.0.1", f"--port={self.port}", "--enable-supernode-auth"]
        words += [f"--database={self.folder / 'link.db'}"]
        words += [
            f"--ssl-{a}={certs / b}.pem" for a, b in (("ca-certfile", "ca"), ("certfile", "cert"), ("keyfile", "key"))
        ]
        self.start("link", *words, "--disable-runtime-dependency-installation")
        self.until(lambda: "Uvicorn running" in self.log("link"))
        for site in self.world.sites:
            key = self.folder / f"{site}.key"
            if key.exists():  # the database remembers it
                continue
            self.key(site)
            said = self.command(
                "flwr", "supernode", "register", f"{key}.pub", "here", f"--name={site}", "--format=json"
            )
            assert '"success": true' in said, said

    def key(self, site: str) -> None:
        path = self.folder / f"{site}.key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(path)], check=True)

    def node(self, site: str) -> None:
        """Start a site's SuperNode."""
        root = self.world.certs("server") / "ca.pem"
        words = ["flower-supernode", f"--superlink=127.0.0.1:{self.port}", f"--root-certificates={root}"]
        words += [f"--auth-supernode-private-key={self.folder / site}.key", f"--port={free_port()}"]
        self.start(site, *words, "--node-config", f'fedtrio="{self.socket(site)}"')

    def node_again(self, site: str) -> None:
        """As systemd would: a SuperLink takes a killed SuperNode for online for a minute, and refuses it so long."""

        def joined() -> bool:
            if self.log(site).count("SuperNode ID:") > before:
                return True
            if site not in self.children or self.children[site].poll() is not None:
                if site in self.children:
                    self.kill(site)
                time.sleep(5)
                self.node(site)
            return False

        before = self.log(site).count("SuperNode ID:")
        self.until(joined, 240)

    def worker(self, site: str, *more: str) -> None:
        """Start a site's worker."""
        words = [sys.executable, "-m", "fedtrio.cli", "site", str(self.world.folder / f"{site}.yaml"), *more]
        words += [f"--local={self.socket(site)}", f"--name={site}", f"--folder={self.folder / f'site-{site}'}"]
        self.start(f"{site} worker", *words)

    def socket(self, site: str) -> Path:
        return Path(os.path.relpath(self.folder / f"{site}.sock"))

    def plant(self) -> None:
        """Start all."""
        for site in self.world.sites:
            self.worker(site)
        self.link()
        for site in self.world.sites:
            self.node(site)

    def app(self) -> Path:
        """The app for this configuration, written by the command line."""
        folder = self.folder / "app"
        words = [f"--out={self.out}", f"--address=https://127.0.0.1:{self.https}"]
        self.command(sys.executable, "-m", "fedtrio.cli", "flower", "app", str(folder), str(self.yaml), *words)
        return folder

    def begin(self) -> None:
        """Start the run, and what shows its log."""
        self.start("run", sys.executable, "-m", "fedtrio.cli", "flower", "run", str(self.app()), "here")

    def run(self, seconds: float = 240.0) -> dict[str, Any]:
        """The whole run; its results.json."""
        self.begin()
        assert self.ended("run", seconds) == 0, self.said()
        return self.results()

    def results(self) -> dict[str, Any]:
        return json.loads((self.out / "results.json").read_text(encoding="utf-8"))

    def events(self) -> list[dict[str, Any]]:
        lines = (self.out / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    # Processes --------------------------------------------------------------------------------------------------------

    def start(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as file:
            self.children[name] = subprocess.Popen(
                words, stdout=file, stderr=file, env=self.env, start_new_session=True
            )

    def command(self, *words: str) -> str:
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        return re.sub(r"\x1b\[\d+m", "", text)

    def said(self) -> str:
        return "\n".join(f"--- {path.stem}\n{self.log(path.stem)[-3000:]}" for path in self.folder.glob("*.log"))

    def until(self, true: Callable[[], Any], seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"it did not come true\n{self.said()}"
            time.sleep(0.05)

    def ended(self, name: str, seconds: float) -> int:
        try:
            return self.children[name].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} still runs\n{self.said()}") from None

    def kill(self, name: str, signal_number: int = signal.SIGKILL) -> None:
        """A process and all that it has started."""
        child = self.children.pop(name)
        for number in (signal_number, signal.SIGKILL):
            try:
                os.killpg(child.pid, number)
            except ProcessLookupError:
                break
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                continue
        child.wait(10)

    def __enter__(self) -> Garden:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.children):
            self.kill(name)
