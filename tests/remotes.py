"""A server and its sites as processes that can be killed at a named point, and a proxy that records what crosses.

>>> world = World(tmp_path / "world")                  # certificates, data and YAML files of two sites and a server
>>> with Launch(world, ["frameworks=[kd]"]) as run:    # `fedtrio serve` and a `fedtrio site` for each
...     run.start("a", die=("fedtrio.remote:Turns.add", "before", 3))
...     run.died("a"); run.start("a"); run.finish()

Processes are forked from one that has imported torch already; they run the command line all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml
from same import timeless

from fedtrio.certs import make_certs
from fedtrio.checkpoint import Journal
from fedtrio.message import Reply, decode
from fedtrio.wires import tls

CONTEXT: Any = multiprocessing.get_context("forkserver")
PRELOAD = ["fedtrio.run", "peft", "fedtrio.serve", "fedtrio.remote", "fedtrio.cli", "fedtrio.wires.dial"]
DEMO = Path(__import__("fedtrio").__file__).parent / "data" / "demo"
SETTINGS = {
    "model": "nano",
    "rounds": 2,
    "threads": 1,
    "train": {"precision": "fp32", "batch_size": 8, "max_length": 24},
    "lora": {"r": 4, "target_modules": ["c_attn"]},
    "kd": {"temperature": 1.0},
}
Die = tuple[str, str, int]  # what is called, what happens to it (see `arm`), and at which call


# Files ----------------------------------------------------------------------------------------------------------------


def demo_rows(name: str) -> list[dict[str, str]]:
    with (DEMO / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_yaml(path: Path, tree: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(tree), sort_keys=False), encoding="utf-8")
    return path


class World:
    """A folder with `certs/`, for each site `<name>.csv` and `<name>.yaml`, and `server.yaml` and `loop.yaml`."""

    def __init__(
        self,
        folder: Path,
        sites: Sequence[str] = ("ada", "bob"),
        sizes: Sequence[int] = (22, 17),
        edit: Callable[[str, int, dict[str, str]], Mapping[str, str]] = lambda site, index, row: row,
    ) -> None:
        self.folder, self.sites = folder, list(sites)
        folder.mkdir(parents=True)
        make_certs(self.sites, folder / "certs")
        rows, owned = iter(demo_rows("train")), []
        for site, size in zip(sites, sizes, strict=True):
            taken = [edit(site, i, row) for i, row in enumerate(itertools.islice(rows, size))]
            mine = [{"text": row["text"], "label": row["label"], "site": site} for row in taken]
            write_rows(folder / f"{site}.csv", mine)
            write_yaml(folder / f"{site}.yaml", {"data": {"train": f"{site}.csv", "test": "test.csv"}, "threads": 1})
            owned += mine
        write_rows(folder / "all.csv", owned)
        write_rows(folder / "test.csv", demo_rows("test")[:12])
        write_rows(folder / "public.csv", demo_rows("public")[:10])
        labels = sorted({row["label"] for row in [*demo_rows("train"), *owned]})
        data: dict[str, Any] = {"test": "test.csv", "public": "public.csv", "labels": labels}
        wire = {"sites": self.sites, "host": "127.0.0.1"}
        write_yaml(folder / "server.yaml", {**SETTINGS, "data": data, "wire": wire})
        train = {"train": "all.csv", "site": "site"}
        write_yaml(folder / "loop.yaml", {**SETTINGS, "data": data | train, "partition": {"name": "column"}})

    def certs(self, name: str) -> Path:
        return self.folder / "certs" / name


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


# Processes ------------------------------------------------------------------------------------------------------------


def command_line(words: Sequence[str], log: str, dies: Sequence[Die]) -> None:
    """In a process of its own: the command `fedtrio …`, all that it says to one file, harmed as `dies` say."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for die in dies:
        arm(*die)
    from fedtrio.cli import main

    sys.argv = ["fedtrio", *words]
    main()


def arm(what: str, how: str, count: int) -> None:
    """At the `count`th call of `module:attribute`: kill -9 of this process "before", "after", with its "first" answer
    (of a generator) or "torn" (half of a frame is in the journal); "stop" it, or let it sleep "5" seconds.
    """
    module, _, path = what.partition(":")
    home: Any = importlib.import_module(module)
    *owners, name = path.split(".")
    for owner in owners:
        home = getattr(home, owner)
    real, seen = getattr(home, name), 0

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def armed(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen != count:
            return real(*args, **kwargs)
        if how == "before":
            kill()
        if how == "torn":
            turns, _, frame = args
            size = turns._path.stat().st_size
            real(*args)
            os.truncate(turns._path, size + len(frame) // 2)
            kill()
        if how == "first":
            return first(real(*args, **kwargs))
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how.isdigit():
            time.sleep(float(how))
        result = real(*args, **kwargs)
        if how == "after":
            kill()
        return result

    def first(answers: Iterator[Any]) -> Iterator[Any]:
        next(answers)
        kill()
        yield

    setattr(home, name, armed)


class Command(subprocess.Popen):
    """`python -m fedtrio.cli`, with the manners of a forked process."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        with log.open("ab") as file:
            super().__init__([sys.executable, "-m", "fedtrio.cli", *words], stdout=file, stderr=file)

    @property
    def exitcode(self) -> int | None:
        return self.returncode

    def is_alive(self) -> bool:
        return self.poll() is None

    def join(self, timeout: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout)


def forked(words: Sequence[str], log: Path, *dies: Die) -> Any:
    CONTEXT.set_forkserver_preload(PRELOAD)
    child = CONTEXT.Process(target=command_line, args=(list(words), str(log), dies))
    child.start()
    return child


def fedtrio(*words: object, log: Path, timeout: float = 60.0) -> tuple[int, str]:
    """Exit code and all that is said."""
    child = forked([str(word) for word in words], log)
    child.join(timeout)
    if child.is_alive():
        child.kill()
    return child.exitcode, log.read_text(encoding="utf-8")


class Launch:
    """One comparison across processes: the server and the sites, started, killed and started again by name."""

    def __init__(self, world: World, settings: Sequence[str] = (), proxied: bool = False, name: str = "run") -> None:
        self.world, self.folder, self.port = world, world.folder / name, free_port()
        self.out = self.folder / "out"
        self.folder.mkdir()
        self._settings = [f"--set={word}" for word in (*settings, f"wire.port={self.port}")]
        self._children: dict[str, Any] = {}
        self.codes: dict[str, list[int]] = {}
        self.peaks: dict[str, int] = {}
        self.proxies = {s: Proxy(world, s, self.port) for s in world.sites} if proxied else {}

    def words(self, name: str) -> list[str]:
        """The command line of the server or a site."""
        world = self.world
        if name == "server":
            yaml_file, certs = world.folder / "server.yaml", world.certs("server")
            return ["serve", str(yaml_file), f"--certs={certs}", f"--out={self.out}", *self._settings]
        port = self.proxies[name].port if name in self.proxies else self.port
        words = [f"--server=https://127.0.0.1:{port}", f"--certs={world.certs(name)}", f"--folder={self.home(name)}"]
        return ["site", str(world.folder / f"{name}.yaml"), *words, "--patience=60"]

    def home(self, name: str) -> Path:
        return self.folder / f"site-{name}"

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def start(self, *names: str, die: Die | Sequence[Die] = (), more: Sequence[str] = (), fork: bool = True) -> None:
        """Start the server or sites; all of them where none is named."""
        for name in names or ("server", *self.world.sites):
            words, log = [*self.words(name), *more], self.folder / f"{name}.log"
            dies = [die] if die and isinstance(die[0], str) else die
            self._children[name] = forked(words, log, *dies) if fork else Command(words, log)

    def pid(self, name: str) -> int:
        return self._children[name].pid

    def running(self, name: str) -> bool:
        return self._children[name].is_alive()

    def wait(self, name: str, timeout: float = 60.0) -> int:
        """Its exit code; -9 where it was killed."""
        child, end = self._children[name], time.monotonic() + timeout
        while child.is_alive() and time.monotonic() < end:
            self._note_peak(name)
            child.join(0.1)
        assert not child.is_alive(), f"{name} still runs\n{self.said()}"
        self.codes.setdefault(name, []).append(child.exitcode)
        return child.exitcode

    def died(self, name: str) -> None:
        """Wait until the process was killed where it was to be."""
        assert self.wait(name) == -signal.SIGKILL, self.said()

    def finish(self, *names: str) -> None:
        """Wait until all is over, and well."""
        for name in names or ("server", *self.world.sites):
            code = self.wait(name)
            assert code == 0, f"{name} ended with {code}\n{self.said()}"

    def until(self, true: Callable[[], Any], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"it did not come true\n{self.said()}"
            time.sleep(0.02)

    def said(self) -> str:
        return "\n".join(f"--- {name}\n{self.log(name)[-1500:]}" for name in ("server", *self.world.sites))

    def events(self) -> list[dict[str, Any]]:
        path = self.out / "events.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def heard(self, event: str, site: str) -> list[str]:
        return [e["reason"] for e in self.events() if (e["event"], e["site"]) == (event, site)]

    def results(self) -> dict[str, Any]:
        return json.loads((self.out / "results.json").read_text(encoding="utf-8"))

    def _note_peak(self, name: str) -> None:
        with contextlib.suppress(psutil.Error, OSError):
            rss = psutil.Process(self.pid(name)).memory_info().rss
            self.peaks[name] = max(self.peaks.get(name, 0), rss)

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children.values():
            if child.is_alive():
                child.kill()
            child.join(10)
        for proxy in self.proxies.values():
            proxy.close()


# What must hold -------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def readable(run: Launch) -> None:
    """Invariant 1, at any time: each last committed round, of the server and of each site, can be read."""
    for lines in run.folder.rglob("journal.jsonl"):
        journal = Journal(lines.parent)
        assert journal.latest() is not None and not journal.damaged, (lines, journal.damaged)


def sound(run: Launch, whole: Path | None, codes: Sequence[int] = (0, -signal.SIGKILL)) -> None:
    """The invariants of a run that has ended; `whole` is the run folder of one that nothing befell."""
    readable(run)  # 1
    if whole is not None:
        ours, theirs = run.results()["runs"], json.loads((whole / "results.json").read_text())["runs"]
        assert [r["adapter_sha256"] for r in ours] == [r["adapter_sha256"] for r in theirs]  # 2, and so 4
        assert sha256(run.out / "ledger.jsonl") == sha256(whole / "ledger.jsonl")  # 3: its bytes were counted on frames
        assert timeless(ours) == timeless(theirs)
    for entry in run.results()["runs"] if (run.out / "results.json").exists() else []:
        assert sha256(run.out / entry["adapter"] / "adapter_model.safetensors") == entry["adapter_sha256"]
    for name, seen in run.codes.items():  # 5
        assert all(code in codes for code in seen), (name, seen, run.said())
        assert "Traceback" not in run.log(name) and "Error" not in run.log(name), run.log(name)
    known = {"out", *(f"site-{site}" for site in run.world.sites), *(f"{n}.log" for n in ("server", *run.world.sites))}
    assert {path.name for path in run.folder.iterdir()} <= known  # 6
    assert not [*run.world.folder.rglob("*.tmp")]
    assert not any(child.is_alive() for child in run._children.values())
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", run.port)) != 0
    assert all(peak < 2e9 for peak in run.peaks.values()), run.peaks  # 7


# What crosses ---------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """One request and its answer, as they stood in HTTP."""

    path: str
    asked: dict[str, str]
    body: bytes
    status: int
    told: dict[str, str]
    answer: bytes

    @property
    def up(self) -> Reply | None:
        """The site's frame, where there is one."""
        return decode(self.body) if self.path == "/v1/turn" and self.body else None

    @property
    def down(self) -> Reply | None:
        """The server's frame, where there is one."""
        return decode(self.answer) if self.path == "/v1/turn" and self.status == 200 else None


class Proxy:
    """Between one site and the server, with their certificates: keeps every byte that was inside of TLS.

    `cuts` break connections off, one after the other, once so many bytes have gone one way.
    """

    def __init__(self, world: World, site: str, port: int, cuts: Sequence[int] = ()) -> None:
        self._cuts = list(cuts)
        self._upstream, self._context = port, tls.site_context(world.certs(site))
        self._streams: list[tuple[bytearray, bytearray]] = []  # of each connection: up, down
        self._loop, ready = asyncio.new_event_loop(), threading.Event()
        context, self.port = tls.server_context(world.certs("server")), free_port()

        def serve() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(asyncio.start_server(self._carry, "127.0.0.1", self.port, ssl=context))
            ready.set()
            self._loop.run_forever()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        assert ready.wait(10)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kept = (bytearray(), bytearray())
        self._streams.append(kept)
        try:
            there = await asyncio.open_connection("127.0.0.1", self._upstream, ssl=self._context)
        except OSError:
            writer.transport.abort()
            return
        ways = [self._pump(reader, there[1], kept[0]), self._pump(there[0], writer, kept[1])]
        await asyncio.wait([asyncio.ensure_future(way) for way in ways], return_when=asyncio.FIRST_COMPLETED)
        for each in (writer, there[1]):
            each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(1 << 16):
                kept += piece
                if self._cuts and len(kept) > self._cuts[0]:
                    self._cuts.pop(0)
                    return  # in the middle of a message
                writer.write(piece)
                await writer.drain()

    def bytes(self, way: str) -> bytes:
        """All that went "up", or "down"."""
        return b"".join(bytes(stream[way == "down"]) for stream in self._streams)

    def turns(self) -> list[Turn]:
        """All whole requests with their answers."""
        found = []
        for up, down in self._streams:
            answers = _parsed(bytes(down))
            for first, asked, body in _parsed(bytes(up)):
                status, told, answer = next(answers, ("HTTP/1.1 0", {}, b""))
                found.append(Turn(first.split()[1], asked, body, int(status.split()[1]), told, answer))
        return found

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


def _parsed(stream: bytes) -> Iterator[tuple[str, dict[str, str], bytes]]:
    """First line, headers and body of each message of an HTTP/1.1 stream; all of ours say their length."""
    while b"\r\n\r\n" in stream:
        head, _, stream = stream.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", "0"))
        if len(stream) < length:
            return  # broken off
        yield first, headers, stream[:length]
        stream = stream[length:]
