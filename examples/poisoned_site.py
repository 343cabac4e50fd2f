"""What one hostile site can do, and what bears it: each robust mean of FedLLM with and without a poisoned update.

The hostile site trains as the others do, and then sends its update with the sign turned and `--scale` times as large.
Nothing of fedtrio knows of it: the wire between the site and the server changes the frame.

python examples/poisoned_site.py [FOLDER] [--rules none median …] [--scale 8] [--rounds 4] [--sites 7] [--train 700]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from fedtrio.bench import Bench
from fedtrio.config import Config
from fedtrio.config_file import load_config
from fedtrio.message import Message, decode, encode
from fedtrio.meter import Meter
from fedtrio.program import Site
from fedtrio.run import run
from fedtrio.wires.loopback import Loopback

RULES = {
    "none": "robust=none", "clipping": "clip_norm=1.0", "median": "robust=median",
    "trimmed mean": "robust=trimmed_mean", "krum": "robust=krum", "multi-krum": "robust=multi_krum",
}  # fmt: skip


class Poisoned(Loopback):
    """A wire on which one site's updates are turned round and enlarged."""

    def __init__(self, sites: Mapping[str, Site], hostile: str | None, scale: float) -> None:
        super().__init__(sites)
        self._hostile, self._scale = hostile, scale

    def exchange(self, frames: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
        """Deliver each frame and yield each answer, one of them poisoned."""
        for site, answer in super().exchange(frames):
            reply = decode(answer)
            if site == self._hostile and reply.kind == "update":
                turned = {name: -self._scale * tensor for name, tensor in reply.tensors.items()}
                answer = encode(Message("update", turned, reply.facts), reply.round, reply.done)
            yield site, answer


def accuracy(config: Config, bench: Bench, hostile: bool, scale: float, out: Path) -> float:
    """Of the common model after the last round."""
    method, meter = config.fedllm, Meter()
    sites = bench.sites(method, bench.lab(method, 0, meter), meter)
    wire = Poisoned(sites, min(sites) if hostile else None, scale)
    return run(config, "fedllm", out=out, bench=bench, remote=wire)["accuracy"]


def main() -> None:
    """A table: a line for each rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--scale", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sites", type=int, default=7)
    parser.add_argument("--train", type=int, default=700, help="examples in all")
    given = parser.parse_args()
    print(f"one of {given.sites} sites sends its update x {-given.scale:g}; accuracy after {given.rounds} rounds\n")
    print(f"{'rule':<14}{'honest':>10}{'poisoned':>10}")
    with tempfile.TemporaryDirectory() as temporary:
        for rule in given.rules:
            settings = [f"data.max_train={given.train}", "data.max_test=200", f"clients={given.sites}", "threads=1"]
            settings += ["partition={name: iid}", f"rounds={given.rounds}", "frameworks=[fedllm]"]
            config = load_config(settings=[*settings, "fedllm.upload=delta", f"fedllm.{RULES[rule]}"])
            bench = Bench(config)
            places = [(given.folder or Path(temporary)) / f"{rule}-{word}" for word in ("honest", "poisoned")]
            both = [
                accuracy(bench.config, bench, word, given.scale, p)
                for word, p in zip((False, True), places, strict=True)
            ]
            print(f"{rule:<14}{both[0]:>10.3f}{both[1]:>10.3f}", flush=True)


if __name__ == "__main__":
    main()
