"""One run: configuration → data on sites → rounds → evaluation → run folder. Start reading here."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .bench import Bench, memory_at, place_of
from .checkpoint import Journal, append_line, write_whole
from .config import Config, usable_cores
from .errors import MessageError, QuorumError, WireError
from .evaluate import Scores
from .frameworks.lab import Framework, Lab, ServerProgram, State
from .ledger import Ledger
from .meter import Meter
from .program import ACCOUNT, CONCLUDE, Site, Wire, ask, drive
from .result import answered, costs, mean_of, save, shown, spent
from .wires.loopback import Loopback
from .wires.process import Process
from .wires.ray import Ray

OnRound = Callable[[str, int, Mapping[str, Any]], None]  # framework, seed, entry of the curve


def run(
    config: Config,
    framework: str,
    seed: int = 0,
    out: Path | None = None,
    bench: Bench | None = None,
    on_round: OnRound = lambda framework, seed, entry: None,
    record_frames: Path | None = None,
    remote: Wire | None = None,
) -> dict[str, Any]:
    """Train with one framework and one seed; the entry of `runs` in results.json.

    With `out`, the folder `out/<framework>-<seed>` gets the adapter and the ledger, and each round is committed there:
    the same call goes on after the last one that was. `bench` holds what runs of one configuration share, `remote` is
    a wire to sites elsewhere, which stays open. Raises ConfigError, DataError, ModelError, MessageError, QuorumError.
    """
    bench = bench or Bench(config)
    config, method, name = bench.config, bench.config.framework(framework), f"{framework}-{seed}"
    folder = out / name if out is not None else None
    meter = Meter(bench.costs)
    lab = bench.lab(method, seed, meter)
    wire = remote or _wire(bench, framework, lab, meter, folder)
    lab.abreast = wire.abreast
    try:
        done = Progress.of(method, lab, folder, record_frames)
        _meet(config, method, lab, wire, done, name)
        for entry in done.curve:
            on_round(framework, seed, entry)
        for lab.round in range(done.round + 1, config.rounds + 1):
            start = time.perf_counter()
            lost = _round(bench, method, lab, wire, done, name)
            done.round_seconds += time.perf_counter() - start
            adapter = method.adapter(lab, done.state)
            scores = bench.evaluate(lab, adapter) if adapter is not None else None
            done.right = answered(scores)
            if config.deadline is not None:  # the round's may have passed, and questions come after it
                wire.start_round(name, lab.round, config.deadline)
            done.efforts |= ask(wire, ACCOUNT, sorted(set(wire.sites) - set(lost)), lab.round)
            told = {name: float(value) for name, value in done.state.get("diagnostics", {}).items()}
            counted = spent(method, done.ledger, done.efforts)
            counted["server_seconds"] = round(done.server_seconds, 3)
            done.commit(lab.round, {**shown(scores, config.task), **counted, **told})
            if lab.round < config.rounds or adapter is not None:
                on_round(framework, seed, done.curve[-1])
        return _entry(bench, method, lab, wire, done, out, name, on_round)
    finally:
        if remote is None:
            wire.close()


def _meet(config: Config, method: Framework, lab: Lab, wire: Wire, done: Progress, name: str) -> None:
    """What a server knows of its sites before the first round. Raises ConfigError where they don't suit the method."""
    lab.sites = wire.sites
    method.check_sites(lab.sites, cohort_size(len(lab.sites), config.participation))
    lab.ranks = config.lora.ranks(lab.sites) if method.federated else {}
    if method.wants_weights:
        wire.start_round(name, done.round, config.deadline)
        accounts = ask(wire, ACCOUNT, lab.sites, done.round)
        if silent := sorted(set(lab.sites) - accounts.keys()):
            raise QuorumError(f"fedllm.unbiased needs the weights of all sites; {', '.join(silent)} did not answer")
        lab.weights = {site: float(facts["weight"]) for site, facts in accounts.items()}


def _round(bench: Bench, method: Framework, lab: Lab, wire: Wire, done: Progress, name: str) -> list[str]:
    """One round, again where too few sites were left in the end; sites elsewhere may need time to come back.

    Gives the sites that fell silent.
    """
    config = bench.config
    cohort = sample(wire.sites, config.participation, lab.seed, lab.round)
    check, refuse = partial(method.check, lab), partial(done.refused, lab.round)
    while True:
        state = dict(done.state)  # a round that fails leaves no trace
        wire.start_round(name, lab.round, config.deadline)
        try:
            program = done.timed(method.server(lab, state, cohort))
            coding = config.wire.coding(lab.seed)
            lost = drive(program, wire, lab.round, done.ledger, check, refuse, config.min_sites, coding, len(cohort))
        except QuorumError as error:
            if isinstance(wire, Loopback | Process | Ray):
                raise QuorumError(f"{name}: {error}") from error
            with contextlib.suppress(WireError):
                wire.wait_for(min(config.min_sites, len(cohort)), config.deadline)
                continue
            raise
        done.state = state
        done.lost(lab.round, lost, getattr(wire, "reasons", {}))
        return lost


def _entry(
    bench: Bench, method: Framework, lab: Lab, wire: Wire, done: Progress, out: Path | None, name: str,
    on_round: OnRound,
) -> dict[str, Any]:  # fmt: skip
    """The run is over: ask the sites for their last accounts, save what was learnt, add up what it cost."""
    task, rounds, framework = bench.config.task, bench.config.rounds, name.rpartition("-")[0]
    wire.start_round(name, rounds, bench.config.deadline)  # who was lost in the last round may speak again
    done.efforts |= ask(wire, ACCOUNT, wire.sites, rounds)
    of_sites = ask(wire, CONCLUDE, wire.sites, rounds)
    own = {site: Scores.of(facts) for site, facts in of_sites.items() if "accuracy" in facts}
    last, adapter = done.curve[-1], method.adapter(lab, done.state)
    if adapter is None:  # each site has its own model: the mean over sites stands for the run
        last |= shown(mean_of(list(own.values())) if own else None, task)
        on_round(framework, lab.seed, last)
        common = None
    else:
        common = last["accuracy"] if last["accuracy"] is not None else bench.evaluate(lab, adapter).accuracy
    examples = {site: int(effort.get("examples", 0)) for site, effort in sorted(done.efforts.items())}
    unlike = {site: held for site in examples if (held := method.adapter_of(done.state, site)) is not None}
    for site, held in unlike.items():
        own[site] = bench.at(method, site).evaluate(lab.of_site(site), held)
    accuracies = {site: own[site].accuracy if site in own else common for site in examples}
    reached = {key: last[key] for key in ("accuracy", "loss", "perplexity") if key in last}
    result = {"framework": framework, "seed": lab.seed, "rounds": rounds, **reached}
    result |= {"right": bench.answers(done.right)} if done.right else {}
    accounts = {site: {**done.efforts[site], **of_sites.get(site, {})} for site in examples}
    result |= costs(method, examples, accuracies, done.ledger, accounts)
    result |= {name: round(getattr(done, name), 3) for name in ("server_seconds", "round_seconds")}
    result |= {"curve": done.curve, "events": done.events}
    if out is not None:
        shipped = method.shipped(lab, done.state) if adapter is not None else None
        if isinstance(wire, Ray):
            _save_own(bench, method, lab, out / name)
        result |= save(lab, shipped, unlike, list(examples), out, name)
        lines = done.ledger.lines(framework=framework, seed=lab.seed) if method.federated else []
        write_whole(out / name / "ledger.jsonl", "".join(line + "\n" for line in lines).encode())
    return result


def _save_own(bench: Bench, method: Framework, lab: Lab, folder: Path) -> None:
    """Workers elsewhere have no run folder: what sites keep to themselves is written from their memories here."""
    for number, share in enumerate(bench.roster(method, lab.seed)):
        place = folder / "sites" / str(number)
        memory, _ = memory_at(place).before(lab.rounds + 1)
        site = SimpleNamespace(memory=memory)
        bench.at(method, share.name).save_own(method, lab.of_site(share.name), site, place)


def _wire(bench: Bench, framework: str, lab: Lab, meter: Meter, folder: Path | None) -> Wire:
    """The sites, in this process or in others."""
    config, method = bench.config, bench.config.framework(framework)
    if config.wire.name == "loopback":
        return Loopback(bench.sites(method, lab, meter, folder))
    names = [share.name for share in bench.roster(method, lab.seed)]
    if config.wire.name == "process":
        make = partial(sites_of_worker, config, framework, lab.seed, folder)
        return Process(make, names, config.wire.workers or config.room, preload=("fedtrio.run", "peft"))
    memories = {name: memory_at(place_of(folder, number)) for number, name in enumerate(names)}
    make = partial(sites_of_worker, config, framework, lab.seed, None)
    asked = config.wire.asks(config.threads)
    return Ray(make, memories, config.wire.workers, asked, config.wire.address, usable_cores())


def sites_of_worker(
    config: Config, framework: str, seed: int, folder: Path | None, names: Sequence[str]
) -> dict[str, Site]:
    """Some of a run's sites, in a process of their own; one that has a process to itself tells its peak memory."""
    bench, method = Bench(config), config.framework(framework)
    meter = Meter(bench.costs)
    bench.alone = len(names) == 1
    return bench.sites(method, bench.lab(method, seed, meter), meter, folder, names)


@dataclass
class Progress:
    """How far a run has come: all that the next round depends on, and all that was counted."""

    state: State
    ledger: Ledger
    journal: Journal | None
    round: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)  # answers refused, sites lost
    efforts: dict[str, Any] = field(default_factory=dict)  # what each site last said that it had spent
    right: str = ""  # test texts that the last round's adapter answered right
    server_seconds: float = 0.0
    round_seconds: float = 0.0  # from the first message of a round to its last
    folder: Path | None = None

    @classmethod
    def of(cls, method: Framework, lab: Lab, folder: Path | None, record_frames: Path | None = None) -> Progress:
        """The last committed round of the folder, or the start."""
        journal = Journal(folder / "rounds") if folder else None
        start = cls(method.setup(lab), Ledger(record_frames), journal, folder=folder)
        found = journal.latest() if journal else None
        if found is not None:
            start.round, groups, facts = found
            start.state = {
                group: groups.get(group, {}) for group in {**start.state, **groups}
            }  # an empty one left no trace
            start.ledger.restore(facts["ledger"])
            start.curve, start.events, start.efforts = facts["curve"], facts["events"], facts["efforts"]
            start.right, start.server_seconds = facts.get("right", ""), facts["server_seconds"]
            start.round_seconds = facts.get("round_seconds", 0.0)
        return start

    def commit(self, round: int, entry: Mapping[str, Any]) -> None:
        """The round is over, and will not be run again. Raises ConfigError where the folder can't be written."""
        self.round = round
        self.curve.append({"round": round, **entry})
        if self.journal:
            counted = {"curve": self.curve, "events": self.events, "efforts": self.efforts}
            counted |= {"server_seconds": self.server_seconds, "round_seconds": self.round_seconds}
            counted |= {"right": self.right}
            counted["ledger"] = self.ledger.saved()
            self.journal.commit(round, self.state, counted)

    def timed(self, program: ServerProgram) -> ServerProgram:
        """The same program, whose own time is counted, without that in which it waits for sites."""
        inbox: Any = None
        while True:
            start = time.perf_counter()
            try:
                outbox = program.send(inbox)
            except StopIteration:
                return
            finally:
                self.server_seconds += time.perf_counter() - start
            inbox = yield outbox

    def refused(self, round: int, site: str, error: MessageError) -> None:
        """An answer that does not count."""
        self._note({"event": "refused", "round": round, "site": site, "reason": str(error)})

    def lost(self, round: int, sites: Iterable[str], reasons: Mapping[str, str]) -> None:
        """Sites that did not end the round, and why where the wire knows."""
        known = {event["site"] for event in self.events if event["round"] == round}
        for site in sites:
            if site not in known:
                why = {"reason": reasons[site]} if reasons.get(site) else {}
                self._note({"event": "lost", "round": round, "site": site, **why})

    def _note(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if self.folder:
            said = {"time": round(time.time(), 3), "run": self.folder.name, **event}
            append_line(self.folder.parent / "events.jsonl", json.dumps(said))


def cohort_size(sites: int, participation: float) -> int:
    """How many sites take part in a round."""
    return max(1, int(participation * sites + 0.5))


def sample(sites: Sequence[str], participation: float, seed: int, round: int) -> list[str]:
    """The sites that take part in a round, sorted; a pure function of its arguments."""
    number = cohort_size(len(sites), participation)
    return sorted(random.Random(f"cohort {seed} {round}").sample(sorted(sites), number))
