"""A site in a process of its own: what stands behind its end of the HTTPS wire.

The server sends the settings (data, never code), the class names and the public set; the site adds its own examples.
Every frame of the round is journalled before it is answered, so that a site that was killed plays the round again from
the journal, to the same bits, and goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import struct
import zlib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from .bench import Bench
from .checkpoint import unwritable, write_whole
from .config import Config, SiteConfig
from .data.load import Rows, load_site_corpus
from .errors import ConfigError, MessageError, ModelError
from .message import PROTOCOL, Reply, decode
from .meter import Meter
from .models.adapter import AdaptedModel
from .models.load import pick_device
from .program import Site

OnFrame = Callable[[str, int, Reply, int], None]  # run, round, message and its bytes, about to leave


class Settings(BaseModel):
    """What a server tells each site; closed, so that nothing else can be told."""

    model_config = ConfigDict(extra="forbid")

    protocol: int
    run_id: str
    config: dict[str, Any]
    labels: list[str]
    public: list[str]
    public_completions: list[str] | None
    fingerprint: str
    unlike: dict[str, str]  # the fingerprint of a site's own model, where the server holds it too
    vocabulary: str


def settings_of(bench: Bench, run_id: str) -> dict[str, Any]:
    """The server's side of `Settings`: the resolved configuration without its data and addresses."""
    own = {"data", "wire", "device", "clients", "partition", "report_to"}
    config = bench.config.model_dump(mode="json", exclude=own)
    config["wire"] = bench.config.wire.model_dump(mode="json", include={"up", "down"})
    if ":" in bench.config.fedllm.aggregation:  # a rule of the server's own is nothing to its sites
        config["fedllm"]["aggregation"] = "fedavg"
    public, seed = bench.corpus.public, bench.config.seeds[0]
    methods = [bench.config.framework(name) for name in bench.config.frameworks]
    needed = {s: bench.at(m, s) for m in methods if m.needs_models for s in bench.config.wire.sites or ()}
    told = Settings(
        protocol=PROTOCOL,
        run_id=run_id,
        config=config,
        labels=list(bench.corpus.labels),
        public=public.prompts,
        public_completions=public.completions,
        fingerprint=fingerprint(bench.model(seed)),
        unlike={site: fingerprint(its.model(seed)) for site, its in needed.items() if its is not bench},
        vocabulary=bench.vocabulary,
    )
    return told.model_dump(mode="json")


def fingerprint(model: AdaptedModel) -> str:
    """Names, shapes and sums of all weights, and the adapter that all start from: equal where the models are."""
    digest = hashlib.sha256()
    for name, tensor in sorted({**dict(model.module.named_parameters()), **model.initial}.items()):
        sums = tensor.double().sum().item(), tensor.double().square().sum().item()
        digest.update(f"{name} {tuple(tensor.shape)} {sums[0]:.6e} {sums[1]:.6e}\n".encode())
    return digest.hexdigest()[:16]


class Host:
    """The door of a site (see `wires.dial.Door`). `folder` keeps its memory, journal and models."""

    def __init__(
        self,
        name: str,
        own: SiteConfig,
        folder: Path,
        on_frame: OnFrame | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        if own.data.train is None:
            raise ConfigError("data.train is missing: name the file with this site's own examples")
        self.name, self._own, self._folder = name, own, folder
        self._on_frame, self._say = on_frame, say
        self._bench: Bench | None = None
        self._settings: Settings | None = None
        self._sites: dict[str, Site] = {}

    def greeting(self) -> dict[str, Any]:
        """Versions, by which a server can tell what will not work together."""
        return {"protocol": PROTOCOL, **{name: metadata.version(name) for name in ("fedtrio", "torch")}}

    def welcome(self, settings: dict[str, Any]) -> None:
        """Load what the server's settings ask for. Raises ConfigError, DataError, ModelError."""
        try:
            told = Settings.model_validate(settings)
            if told.protocol != PROTOCOL:
                raise ConfigError(f"the server speaks protocol {told.protocol}, this site {PROTOCOL}: update the older")
            if not re.fullmatch(r"[0-9a-f]{8,64}", told.run_id):
                raise ConfigError(f"the server's run has the name {told.run_id!r:.80}, which is none")
            if self._settings == told:
                return  # the server was started anew
            config = self._config(told)
        except ValidationError as error:
            fault = error.errors()[0]
            what = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
            raise ConfigError(f"the server sent settings that this version doesn't know: {what}") from None
        public = Rows(told.public, told.public_completions)
        corpus = load_site_corpus(self._own.data, config.task, self._own.base, tuple(told.labels), public)
        bench = Bench(config, corpus)
        bench.vocabulary = told.vocabulary
        wanted: dict[Bench, str] = {}
        for method in map(config.framework, config.frameworks):
            its = bench.at(method, self.name)
            if its is bench:
                wanted[its] = told.fingerprint
            elif method.needs_models:  # of another model of its own the server knows nothing
                wanted[its] = told.unlike.get(self.name, "no such model: name it in kd.models")
        for its, there in wanted.items():
            self._check_model(its, there)
        self._settings, self._bench, self._sites = told, bench, {}
        self._say(f"{self.name}: {len(corpus.train)} examples, {config.model}, {', '.join(config.frameworks)}")

    def _check_model(self, bench: Bench, there: str) -> None:
        mine = fingerprint(bench.model(bench.config.seeds[0]))
        if mine != there:
            raise ModelError(
                f"the model {bench.config.model} differs from the server's ({mine} here, {there} there): "
                "use the same weights and versions on both sides"
            )

    def _config(self, told: Settings) -> Config:
        own = {"device": self._own.device, "threads": self._own.threads or told.config.get("threads")}
        model = {"model": self._own.model} if self._own.model else {}
        config = Config.model_validate({**told.config, **own, **model})
        if self._own.kd_model:
            models = {self.name: self._own.kd_model, **config.kd.models}
            config = config.model_copy(update={"kd": config.kd.model_copy(update={"models": models})})
        config._base = self._own.base
        precision = config.train.precision
        if pick_device(config.device).type == "cpu" and precision == "auto":
            raise ConfigError("the server did not say at which precision to train")
        return config.resolved()

    def regain(self, session: str) -> tuple[int, bytes] | None:
        """Play the journalled round again: the last turn and its answer; None where there is no such round."""
        found = self._journal.read(session)
        if found is None:
            return None
        run, round, frames = found
        answers = [self._advance(run, index == 0, frame) for index, (_, frame) in enumerate(frames)]
        self._show(run, round, answers[-1])
        self._say(f"{self.name}: regained its place in round {round} of {run}, messages: {len(frames)}")
        return frames[-1][0], answers[-1]

    def answer(self, session: str, run: str, round: int, turn: int, start: bool, frame: bytes) -> bytes:
        """One turn: journal the frame, and go on with the site's program."""
        if start:
            self._journal.begin(session, run, round)
        self._journal.add(turn, frame)
        answer = self._advance(run, start, frame)
        self._show(run, round, answer)
        return answer

    def _show(self, run: str, round: int, answer: bytes) -> None:
        if self._on_frame is not None:
            self._on_frame(run, round, decode(answer), len(answer))

    def _advance(self, run: str, start: bool, frame: bytes) -> bytes:
        site = self._site(run)
        if start:
            site.reset()
        return site.answer(frame)

    def _site(self, run: str) -> Site:
        """This site in a run `<framework>-<seed>` of the server's configuration. Raises MessageError for another."""
        bench, told = self._bench, self._settings
        assert bench is not None and told is not None
        if run not in self._sites:
            runs = {f"{name}-{seed}": (name, seed) for seed in bench.config.seeds for name in bench.config.frameworks}
            if run not in runs:
                raise MessageError(f"the server asks for the run {run!r:.60}, which its settings do not have")
            framework, seed = runs[run]
            method, meter = bench.config.framework(framework), Meter(bench.costs)
            bench = bench.at(method, self.name)
            lab = bench.lab(method, seed, meter)
            examples = bench.encoded["train"].take(np.arange(len(bench.corpus.train)))
            place = self._folder / told.run_id / run
            bench.alone = True
            self._sites = {run: bench.site(self.name, examples, method, lab, meter, place)}  # one run at a time
            if bench.config.split.noise:
                self._sites[run].secret = self._secret()
        return self._sites[run]

    def _secret(self) -> bytes:
        """Drawn once, and kept so that a site that was killed goes on to the same bits."""
        path = self._folder / "secret"
        if not path.is_file():
            write_whole(path, secrets.token_hex(32).encode())
            path.chmod(0o600)
        return path.read_bytes()

    @property
    def _journal(self) -> Turns:
        assert self._settings is not None
        return Turns(self._folder / self._settings.run_id / "turns")


class Turns:
    """The frames of the round that is under way, as they came; read again by a process that takes the place."""

    HEAD = struct.Struct("<qqI")  # turn, length and checksum

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, session: str, run: str, round: int) -> None:
        """Forget the round before."""
        self._write("wb", json.dumps({"session": session, "run": run, "round": round}).encode() + b"\n")

    def add(self, turn: int, frame: bytes) -> None:
        """Keep a frame before it is answered."""
        self._write("ab", self.HEAD.pack(turn, len(frame), zlib.crc32(frame)) + frame)

    def _write(self, mode: str, data: bytes) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, mode, opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(data)
        except OSError as error:
            raise unwritable(self._path, error, "--folder") from error

    def read(self, session: str) -> tuple[str, int, list[tuple[int, bytes]]] | None:
        """Run, round and frames, or None where they are of another session, or there are none."""
        try:
            with self._path.open("r+b") as file:
                head = json.loads(file.readline())
                if head["session"] != session:
                    return None
                run, round = str(head["run"]), int(head["round"])
                frames = list(self._frames(file))
            return (run, round, frames) if frames else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _frames(self, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """All whole ones; a torn one was never answered and will be sent again, so it is cut off."""
        left = os.fstat(file.fileno()).st_size - file.tell()
        while left:
            head = file.read(self.HEAD.size)
            turn, length, checksum = self.HEAD.unpack(head) if len(head) == self.HEAD.size else (0, -1, 0)
            frame = file.read(length) if 0 <= length <= left - len(head) else b""
            if len(frame) != length or zlib.crc32(frame) != checksum:
                file.truncate(file.seek(-left, os.SEEK_END))
                return
            left -= len(head) + length
            yield turn, frame
