"""What the HTTPS wire costs beside a bare httpx ↔ uvicorn echo, and how much memory 200 sites take at the server.

    python benchmarks/wire.py [--seconds 2] [--pairs 5] [--json]
    python benchmarks/wire.py --fake-sites 200 [--bytes 1000000] [--json]

* **turns**: the server sends a frame and a site in another process answers with the same bytes: over `Https` and
  `dial`, and over a starlette app on uvicorn that echoes what `httpx.Client.post` sends. Both have mutual TLS by the
  same certificates and keep one connection. Runs of the two alternate; the median of the pairs' ratios counts.
* **fake sites**: one round in which each site gets a frame and answers with as many bytes; the server's peak RSS.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import multiprocessing.process
import resource
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fedtrio.certs import make_certs
from fedtrio.wires import tls
from fedtrio.wires.dial import dial
from fedtrio.wires.https import Https

SIZES = (1_000, 250_000, 8_000_000)
LIMIT_RATIO, LIMIT_BYTES = 1.3, 1_000_000_000
SPAWN = multiprocessing.get_context("spawn")


# Turns of one site ----------------------------------------------------------------------------------------------------


class Echo:
    """A door that answers with what it gets."""

    def greeting(self) -> dict:
        return {}

    def welcome(self, settings: dict) -> None: ...

    def regain(self, session: str) -> None: ...

    def answer(self, session: str, run: str, round: int, turn: int, start: bool, frame: bytes) -> bytes:
        return frame


def wire_site(url: str, folder: Path) -> None:
    dial(url, folder, Echo())


def bare_client(url: str, folder: Path, orders: Any) -> None:
    """For each (size, seconds): post that many bytes, time and again; tell the turns per second."""
    with httpx.Client(base_url=url, verify=tls.site_context(folder), timeout=60) as client:
        while order := orders.recv():
            body = bytes(order[0])

            def turn(body: bytes = body) -> None:
                assert len(client.post("/", content=body).content) == len(body)

            orders.send(rate(turn, order[1]))


def bare_server(folder: Path) -> tuple[uvicorn.Server, threading.Thread, int]:
    async def echo(request: Request) -> Response:
        return Response(await request.body())

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    app = Starlette(routes=[Route("/", echo, methods=["POST"])])
    config = uvicorn.Config(app, host="127.0.0.1", port=port, http="h11", log_level="error", access_log=False)
    config.load()
    config.ssl = tls.server_context(folder)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    return server, thread, port


def rate(turn: Callable[[], None], seconds: float) -> float:
    """Turns per second; the first two are not counted."""
    turn()
    turn()
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        turn()
        done += 1
    return done / (time.perf_counter() - start)


def turns(certs: Path, seconds: float, pairs: int) -> list[dict[str, Any]]:
    server, thread, port = bare_server(certs / "server")
    ours, theirs = SPAWN.Pipe()
    bare = SPAWN.Process(target=bare_client, args=(f"https://127.0.0.1:{port}", certs / "site-0", theirs))
    bare.start()
    wire = Https(certs / "server", ["site-0"], lambda site, greeting: {}, host="127.0.0.1", port=0)
    site = SPAWN.Process(target=wire_site, args=(f"https://127.0.0.1:{wire.port}", certs / "site-0"))
    site.start()
    wire.wait_for(1, 60)
    wire.start_round("bench-0", 1, None)

    def over_bare(size: int) -> float:
        ours.send((size, seconds))
        return ours.recv()

    def over_wire(size: int) -> float:
        frame = bytes(size)

        def turn() -> None:
            [(_, answer)] = wire.exchange([("site-0", frame)])
            assert len(answer) == size

        return rate(turn, seconds)

    found = []
    for size in SIZES:
        over_bare(1000), over_wire(1000)
        measured = [(over_bare(size), over_wire(size)) for _ in range(pairs)]
        found.append(
            {
                "bytes": size,
                "bare_turns_per_s": statistics.median(a for a, _ in measured),
                "wire_turns_per_s": statistics.median(b for _, b in measured),
                "wire_mb_per_s": 2 * size * statistics.median(b for _, b in measured) / 1e6,
                "ratio": statistics.median(a / b for a, b in measured),
                "ratios": [round(a / b, 3) for a, b in measured],
            }
        )
    wire.finish()
    site.join()
    ours.send(None)
    bare.join()
    server.should_exit = True
    thread.join()
    return found


# Many sites -----------------------------------------------------------------------------------------------------------


def many_sites(url: str, certs: Path, number: int, size: int) -> None:
    """All sites in one process: each says hello, gets its frame, works a moment, and answers."""

    async def one(name: str) -> None:
        async with httpx.AsyncClient(base_url=url, verify=tls.site_context(certs / name), timeout=120) as client:
            process = name.ljust(8, "-")
            hello = await client.post("/v1/hello", json={"site_id": process, "greeting": {}})
            headers = {"Fedtrio-Session": hello.json()["session"], "Fedtrio-Site-Id": process, "Fedtrio-Turn": "-1"}
            answer = b""
            while True:
                response = await client.post("/v1/turn", headers=headers, content=answer)
                if response.status_code not in (200, 204):
                    assert response.json()["error"] == "finished", response.text
                    return
                answer = b""
                if response.status_code == 200:
                    headers["Fedtrio-Turn"], answer = response.headers["fedtrio-turn"], bytes(size)
                    await asyncio.sleep(0.1)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(f"site-{i}") for i in range(number)))

    asyncio.run(all_of_them())


def fake_sites(certs: Path, number: int, size: int) -> dict[str, Any]:
    names = [f"site-{i}" for i in range(number)]
    wire = Https(certs / "server", names, lambda site, greeting: {}, host="127.0.0.1", port=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sites = SPAWN.Process(target=many_sites, args=(f"https://127.0.0.1:{wire.port}", certs, number, size))
    sites.start()
    wire.wait_for(number, 120)
    frame, start, answered = bytes(size), time.perf_counter(), 0
    wire.start_round("bench-0", 1, None)
    for _, answer in wire.exchange((name, frame) for name in names):
        assert len(answer) == size
        answered += 1
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    wire.finish()
    sites.join()
    assert answered == number, f"{answered} of {number} sites answered"
    return {"sites": number, "bytes": size, "round_s": seconds, "before_bytes": before, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--fake-sites", type=int, default=0, metavar="N")
    parser.add_argument("--bytes", type=int, default=1_000_000, help="of a fake site's frame and answer")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        certs = Path(folder)
        make_certs([f"site-{i}" for i in range(max(1, options.fake_sites))], certs)
        if options.fake_sites:
            found: Any = fake_sites(certs, options.fake_sites, options.bytes)
            met = found["peak_bytes"] < LIMIT_BYTES
            line = "{sites} sites, {bytes:,} bytes each way: round {round_s:.1f} s".format(**found)
            text = f"{line}, server's peak RSS {found['peak_bytes'] / 1e6:,.0f} MB (limit {LIMIT_BYTES / 1e6:,.0f} MB)"
        else:
            found = turns(certs, options.seconds, options.pairs)
            met = all(row["ratio"] <= LIMIT_RATIO for row in found)
            text = f"{'frame bytes':>12} {'bare turns/s':>13} {'wire turns/s':>13} {'wire MB/s':>10} {'ratio':>6}\n"
            row = "{bytes:>12,} {bare_turns_per_s:>13,.1f} {wire_turns_per_s:>13,.1f} {wire_mb_per_s:>10,.1f} "
            text += "\n".join((row + "{ratio:>6.2f}").format(**each) for each in found)
            text += f"\nlimit of the ratio: {LIMIT_RATIO}"
    print(json.dumps(found) if options.json else text)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
