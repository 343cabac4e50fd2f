"""What the HTTPS wire adds to a split round: the same round over loopback and over mutual TLS, in turn.

    python benchmarks/split_over_https.py --pairs 3

Three sites of the demo, in threads of this process, so that both wires share the same cores and the difference is the
wire alone. Both end in the same weights, which is checked.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from fedtrio import load_config
from fedtrio.bench import Bench
from fedtrio.certs import make_certs
from fedtrio.ledger import Ledger
from fedtrio.meter import Meter
from fedtrio.program import drive
from fedtrio.wires.dial import dial
from fedtrio.wires.https import Https
from fedtrio.wires.loopback import Loopback


class Door:
    """A site behind the wire, without journal."""

    def __init__(self, site: Any) -> None:
        self._site = site

    def greeting(self) -> dict:
        return {}

    def welcome(self, settings: dict) -> None:
        pass

    def regain(self, session: str) -> None:
        return None

    def answer(self, session: str, run: str, round: int, turn: int, start: bool, frame: bytes) -> bytes:
        if start:
            self._site.reset()
        return self._site.answer(frame)


def a_round(bench: Bench, wire_of: Any) -> tuple[float, int, dict[str, torch.Tensor]]:
    """Seconds of one round, its messages, and the adapter it ends with."""
    method, meter = bench.config.framework("split"), Meter(bench.costs)
    lab = bench.lab(method, 0, meter)
    lab.abreast, lab.round = 1, 1  # one site at a time on both wires: they share one model and its hooks
    state, ledger = method.setup(lab), Ledger()
    wire = wire_of(bench.sites(method, lab, meter))
    begin = time.perf_counter()
    wire.start_round("split-0", 1, None)
    drive(method.server(lab, state, wire.sites), wire, 1, ledger)
    return time.perf_counter() - begin, ledger.total("messages"), dict(method.adapter(lab, state) or {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--max-train", type=int, default=600)
    args = parser.parse_args()
    settings = ["threads=1", f"data.max_train={args.max_train}", "data.max_test=20", "train.precision=fp32"]
    bench = Bench(load_config(settings=[*settings, "clients=3", "partition={name: iid}"]))
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        certs = make_certs(["site-0", "site-1", "site-2"], Path(folder))
        a_round(bench, Loopback)  # shapes are counted once
        for _ in range(args.pairs):
            plain, messages, wanted = a_round(bench, Loopback)
            started: list[Any] = []

            def over_https(sites: dict[str, Any], started: list[Any] = started) -> Https:
                wire = Https(certs["server"], list(sites), lambda site, greeting: {}, host="127.0.0.1", port=0)
                url = f"https://127.0.0.1:{wire.port}"
                for name, site in sites.items():
                    thread = threading.Thread(target=dial, args=(url, certs[name], Door(site)), daemon=True)
                    thread.start()
                    started.append(thread)
                wire.wait_for(len(sites), 30)
                started.append(wire)
                return wire

            secured, _, found = a_round(bench, over_https)
            started[-1].finish()
            assert all(torch.equal(wanted[name], found[name]) for name in wanted)
            ratios.append(secured / plain)
            print(f"loopback {plain:.2f} s, https {secured:.2f} s, {messages} messages: {ratios[-1]:.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
