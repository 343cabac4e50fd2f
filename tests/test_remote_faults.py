"""Server and sites killed, stopped, doubled and cut off at named points: the run ends in the same bits, or says why."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from remotes import Die, Launch, Proxy, World, fedtrio, readable, sha256, sound
from torch import Tensor

from fedtrio.checkpoint import Journal
from fedtrio.compare import compare
from fedtrio.config_file import load_config
from fedtrio.message import Reply
from fedtrio.wires import tls

FRAMEWORKS = ("fedllm", "kd", "split")
FRAMES = {"fedllm": 2, "kd": 3, "split": 5}  # to a site in a round, with the account that it is asked for
STEPS = {"fedllm": 3, "kd": 5, "split": 3}  # of Ada's optimizer in a round
TURNS, HOST, SITE, LEARNER = (
    "fedtrio.remote:Turns",
    "fedtrio.remote:Host",
    "fedtrio.program:Site",
    "fedtrio.models.train:Learner",
)
MEMORY, JOURNAL, FOLDER = "fedtrio.checkpoint:Memory", "fedtrio.checkpoint:Journal", "fedtrio.compare:Folder"
WIRE, RUN = "fedtrio.wires.https:Https", "fedtrio.run"

# Each point by name: what is called, what happens then, and at which call; f frames and s steps make a round.
AT_SITE: dict[str, Callable[[int, int], Die]] = {
    "before the round is begun": lambda f, s: (f"{TURNS}.begin", "before", 2),
    "after the round is begun": lambda f, s: (f"{TURNS}.begin", "after", 2),
    "before a frame is kept": lambda f, s: (f"{TURNS}.add", "before", 2 * f - 1),
    "while a frame is written": lambda f, s: (f"{TURNS}.add", "torn", f + 1),
    "after a frame is kept": lambda f, s: (f"{TURNS}.add", "after", 2 * f - 1),
    "while it trains": lambda f, s: (f"{LEARNER}.step", "before", s + 2),
    "before it keeps its memory": lambda f, s: (f"{MEMORY}.commit", "before", 2),
    "after it has kept its memory": lambda f, s: (f"{MEMORY}.commit", "after", 2),
    "before its answer leaves": lambda f, s: (f"{HOST}.answer", "after", 2 * f - 1),
    "between the rounds": lambda f, s: (f"{HOST}.answer", "after", f),
    "when asked for its account": lambda f, s: (f"{SITE}._own_account", "before", 2),
    "in the conclusion": lambda f, s: (f"{SITE}._own_account", "before", 4),
}
AT_SERVER: dict[str, Callable[[int, int], Die]] = {
    "before the first round": lambda f, s: (f"{WIRE}.start_round", "before", 1),
    "between the rounds": lambda f, s: (f"{WIRE}.start_round", "before", 2),
    "before a message": lambda f, s: (f"{WIRE}.exchange", "before", f + 1),
    "when the first has answered": lambda f, s: (f"{WIRE}.exchange", "first", 2 * f - 1),
    "after the round": lambda f, s: (f"{RUN}:drive", "after", 2),
    "before it evaluates": lambda f, s: ("fedtrio.bench:Bench.evaluate", "before", 2),
    "before it commits": lambda f, s: (f"{JOURNAL}.commit", "before", 2),
    "before the line of the journal": lambda f, s: ("fedtrio.checkpoint:append_line", "before", 2),
    "after it has committed": lambda f, s: (f"{JOURNAL}.commit", "after", 1),
    "in the conclusion": lambda f, s: (f"{RUN}:ask", "before", 4),
    "when the adapter is saved": lambda f, s: (f"{RUN}:save", "after", 1),
    "before the results": lambda f, s: (f"{FOLDER}.add", "before", 1),
    "when all is written": lambda f, s: (f"{FOLDER}.add", "after", 1),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("faults") / "world")


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("faults") / "trio", ("ada", "bob", "cyd"), (22, 17, 9))


@pytest.fixture(scope="module")
def whole(world: World) -> Callable[..., Path]:
    """The folder of a run in one process that nothing befell."""
    made: dict[tuple[str, ...], Path] = {}

    def of(*settings: str) -> Path:
        if settings not in made:
            made[settings] = world.folder / f"loop-{len(made)}"
            compare(load_config(world.folder / "loop.yaml", settings), made[settings], jobs=1)
        return made[settings]

    return of


@pytest.fixture
def launch(request: pytest.FixtureRequest) -> Iterator[Callable[..., Launch]]:
    runs: list[Launch] = []

    def make(world: World, *settings: str, **options: Any) -> Launch:
        runs.append(Launch(world, settings, name=f"run-{len(list(world.folder.glob('run-*')))}", **options))
        return runs[-1]

    yield make
    for run in runs:
        run.__exit__()


def waiting(run: Launch) -> None:
    run.until(lambda: "waiting on port" in run.log("server"))


# kill -9 --------------------------------------------------------------------------------------------------------------


def killed(run: Launch, name: str, *dies: Die) -> None:
    """All start, one process is killed again and again, and at last left to end."""
    others = [other for other in ("server", *run.world.sites) if other != name]
    run.start(name, die=dies[0])
    run.start(*others)
    for die in [*dies[1:], ()]:
        run.died(name)
        readable(run)
        run.start(name, die=die)
    run.finish()


@pytest.mark.parametrize(
    ("framework", "name", "point"),
    [
        ("kd", "ada", "while a frame is written"),
        ("split", "ada", "while it trains"),
        ("kd", "server", "before it commits"),
    ],
)
def test_killed(
    world: World, whole: Callable[..., Path], launch: Callable[..., Launch], framework: str, name: str, point: str
) -> None:
    run = launch(world, f"frameworks=[{framework}]")
    points = AT_SERVER if name == "server" else AT_SITE
    killed(run, name, points[point](FRAMES[framework], STEPS[framework]))
    sound(run, whole(f"frameworks=[{framework}]"))


@pytest.mark.faults
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("point", AT_SITE)
def test_a_site_killed(
    world: World, whole: Callable[..., Path], launch: Callable[..., Launch], framework: str, point: str
) -> None:
    run = launch(world, f"frameworks=[{framework}]")
    killed(run, "ada", AT_SITE[point](FRAMES[framework], STEPS[framework]))
    sound(run, whole(f"frameworks=[{framework}]"))


@pytest.mark.faults
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("point", AT_SERVER)
def test_a_server_killed(
    world: World, whole: Callable[..., Path], launch: Callable[..., Launch], framework: str, point: str
) -> None:
    run = launch(world, f"frameworks=[{framework}]")
    killed(run, "server", AT_SERVER[point](FRAMES[framework], STEPS[framework]))
    sound(run, whole(f"frameworks=[{framework}]"))


@pytest.mark.faults
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", ["ada", "server"])
def test_killed_twice_and_while_it_comes_back(
    world: World, whole: Callable[..., Path], launch: Callable[..., Launch], framework: str, name: str
) -> None:
    f = FRAMES[framework]
    dies: list[Die] = [
        (f"{TURNS}.add", "torn", f + 1),  # in the second round …
        (f"{HOST}.regain", "before", 1),
        (f"{HOST}.regain", "after", 1),
        (f"{LEARNER}.step", "before", 2),  # … again in the same
    ]
    if name == "server":
        dies = [
            (f"{WIRE}.exchange", "first", f + 1),
            (f"{JOURNAL}.latest", "after", 1),
            (f"{WIRE}.wait_for", "before", 1),
            (f"{WIRE}.exchange", "first", 1),
        ]
    run = launch(world, f"frameworks=[{framework}]")
    killed(run, name, *dies)
    sound(run, whole(f"frameworks=[{framework}]"))


@pytest.mark.faults
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_all_killed(world: World, whole: Callable[..., Path], launch: Callable[..., Launch], framework: str) -> None:
    """Server and sites, the power was out."""
    run = launch(world, f"frameworks=[{framework}]", "rounds=3")
    run.start("server", die=(f"{JOURNAL}.commit", "before", 3))
    run.start("ada", "bob")
    run.died("server")
    for site in ("ada", "bob"):
        os.kill(run.pid(site), signal.SIGKILL)
        run.died(site)
    run.start()
    run.finish()
    sound(run, whole(f"frameworks=[{framework}]", "rounds=3"))


@pytest.mark.faults
def test_killed_between_two_runs(world: World, whole: Callable[..., Path], launch: Callable[..., Launch]) -> None:
    run = launch(world, "frameworks=[kd,split]")
    killed(run, "server", (f"{FOLDER}.add", "after", 1))
    sound(run, whole("frameworks=[kd,split]"))


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("name", ["server", "ada"])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_cleanly(
    world: World, whole: Callable[..., Path], launch: Callable[..., Launch], name: str, sent: signal.Signals, code: int
) -> None:
    run = launch(world, "frameworks=[kd]", "rounds=3")
    run.start("server", die=("fedtrio.bench:Bench.evaluate", "2", 2))
    run.start("ada", "bob")
    run.until(lambda: "round 1" in run.log("server"))
    os.kill(run.pid(name), sent)
    assert run.wait(name) == code and "interrupted; start the same command again to go on" in run.log(name)
    readable(run)
    run.start(name)
    run.finish()
    sound(run, whole("frameworks=[kd]", "rounds=3"), codes=(0, code))


# Away, and back -------------------------------------------------------------------------------------------------------


def accepted(run: Launch, name: str = "fedllm-0") -> dict[int, dict[str, Reply]]:
    """By round and site, the adapters that the server took, as the proxies saw it."""
    taken: dict[int, dict[str, Reply]] = {}
    for site, proxy in run.proxies.items():
        for turn in proxy.turns():
            if (up := turn.up) is not None and up.kind == "adapter" and turn.status in (200, 204):
                assert site not in taken.setdefault(up.round, {}), f"{site} was taken twice in round {up.round}"
                taken[up.round][site] = up
    return taken


def mean(replies: dict[str, Reply]) -> dict[str, Tensor]:
    """Σ n_k θ_k / Σ n_k, written down once more."""
    total = sum(int(reply.fact("weight")) for reply in replies.values())
    names = next(iter(replies.values())).tensors
    return {n: sum(r.tensors[n].double() * (int(r.fact("weight")) / total) for r in replies.values()) for n in names}  # type: ignore[misc]


def aggregates_are_those_of_accepted_updates(run: Launch) -> None:
    """Invariant 4: each round's model, as the server sent it in the next one and saved it in the end."""
    taken = accepted(run)
    told = {d.round: d for p in run.proxies.values() for t in p.turns() if (d := t.down) and d.kind == "adapter"}
    for round, replies in taken.items():
        wanted = mean(replies)
        if round + 1 in told:
            for name, tensor in wanted.items():
                torch.testing.assert_close(told[round + 1].tensors[name].double(), tensor, rtol=0, atol=1e-7)
    saved = safetensors.torch.load_file(run.out / "fedllm-0" / "adapter" / "adapter_model.safetensors")
    sums = sorted(float(tensor.double().sum()) for tensor in mean(taken[max(taken)]).values())
    torch.testing.assert_close(sums, sorted(float(t.double().sum()) for t in saved.values()), rtol=0, atol=1e-4)


def rounds_of(run: Launch, site: str, kind: str = "adapter") -> Counter[int]:
    """In which rounds a site's answers stand in the ledger."""
    lines = [line for line in map(__import__("json").loads, (run.out / "ledger.jsonl").read_text().splitlines())]
    return Counter(
        {e["round"]: e["messages"] for e in lines if (e["site"], e["direction"], e["kind"]) == (site, "up", kind)}
    )


def events_of(run: Launch) -> list[tuple[str, int, str]]:
    return [(e["event"], e["round"], e["site"]) for entry in run.results()["runs"] for e in entry["events"]]


@pytest.mark.faults
def test_a_site_vanishes_in_the_middle_of_a_split_round(trio: World, launch: Callable[..., Launch]) -> None:
    """The round ends with the others, and in the next it is there again."""
    run = launch(trio, "frameworks=[split]", "rounds=3", "deadline=10")
    run.start("server", die=("fedtrio.bench:Bench.evaluate", "5", 1))
    run.start("ada", "bob")
    run.start("cyd", die=(f"{LEARNER}.step", "before", 2))
    run.died("cyd")
    run.until(lambda: run.heard("vanished", "cyd"))
    run.start("cyd")
    run.finish()
    assert events_of(run) == [("lost", 1, "cyd")]
    assert rounds_of(run, "cyd") == {2: 1, 3: 1} and rounds_of(run, "ada") == {1: 1, 2: 1, 3: 1}
    assert rounds_of(run, "cyd", "activations and labels")[1] == 2
    assert [entry["round"] for entry in run.results()["runs"][0]["curve"]] == [1, 2, 3]
    sound(run, None)


@pytest.mark.faults
@pytest.mark.parametrize("how", ["stop", "6"])
def test_a_straggler_is_never_averaged(trio: World, launch: Callable[..., Launch], how: str) -> None:
    """Stopped and woken after the round, or at work beyond the deadline: told "round closed", there in the next."""
    run = launch(trio, "frameworks=[fedllm]", "rounds=3", "deadline=4", proxied=True)
    run.start("server", die=("fedtrio.bench:Bench.evaluate", "3", 1))
    run.start("ada", "bob")
    run.start("cyd", die=(f"{LEARNER}.step", how, 1))
    run.until(lambda: run.heard("vanished" if how == "stop" else "late", "cyd"))
    if how == "stop":
        run.until(lambda: run.log("server").count("round 1") or len(accepted(run).get(1, {})) == 2)
        os.kill(run.pid("cyd"), signal.SIGCONT)
    run.finish()
    assert "round closed" in run.log("cyd")
    assert any("came when that turn was closed" in reason for reason in run.heard("late", "cyd"))
    assert ("lost", 1, "cyd") in events_of(run) and rounds_of(run, "cyd")[3] == 1 and 1 not in rounds_of(run, "cyd")
    assert accepted(run)[1].keys() == {"ada", "bob"} and accepted(run)[3].keys() == {"ada", "bob", "cyd"}
    aggregates_are_those_of_accepted_updates(run)
    sound(run, None)


@pytest.mark.faults
@pytest.mark.parametrize("min_sites", [1, 2])
def test_who_is_late_leaves_the_accounts_of_the_others_right(
    trio: World, launch: Callable[..., Launch], min_sites: int
) -> None:
    """A round that ended by its deadline still counts what the others have spent in it."""
    run = launch(trio, "frameworks=[fedllm]", "rounds=2", "deadline=3", f"min_sites={min_sites}")
    run.start("server", "ada", "bob")
    run.start("cyd", die=(f"{LEARNER}.step", "5", 1))
    run.finish()
    assert not run.heard("late", "ada") and not run.heard("late", "bob")
    first, second = run.results()["runs"][0]["curve"]
    assert 0 < first["client_flops"] < second["client_flops"]
    sound(run, None)


# Too few --------------------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_too_few_sites_come(trio: World, launch: Callable[..., Launch]) -> None:
    run = launch(trio, "frameworks=[kd]", "min_sites=3", "deadline=6")
    run.start("server", "ada", "bob")
    assert run.wait("server") == 6
    assert "2 of 3 sites connected within 6 s; missing: cyd; start them by `fedtrio site`" in run.log("server")
    for site in ("ada", "bob"):
        assert run.wait(site) == 6 and "the server ended with an error: 2 of 3 sites" in run.log(site)
    run.start()  # and with all three it goes on
    run.finish()
    sound(run, None, codes=(0, 6))


@pytest.mark.faults
@pytest.mark.parametrize("back", [True, False])
def test_fewer_than_the_quorum_are_left(
    world: World, whole: Callable[..., Path], launch: Callable[..., Launch], back: bool
) -> None:
    """The round is waited for and run again, and leaves no trace in the model; or the server gives up and says why."""
    run = launch(world, "frameworks=[kd]", "min_sites=2", "deadline=8")
    run.start("server", "ada")
    run.start("bob", die=(f"{MEMORY}.commit", "before", 2))
    run.died("bob")
    if back:
        run.until(lambda: run.heard("vanished", "bob"))
        run.start("bob")
        run.finish()
        ours, theirs = (
            run.results()["runs"][0],
            sha256(whole("frameworks=[kd]") / "kd-0/adapter/adapter_model.safetensors"),
        )
        assert ours["adapter_sha256"] == theirs
        return sound(run, None)
    assert run.wait("server") == 7 and "missing: bob" in run.log("server")
    assert run.wait("ada") == 6 and "the server ended with an error" in run.log("ada")
    found = Journal(run.out / "kd-0" / "rounds").latest()
    assert found is not None and found[0] == 1  # the round that was whole
    return sound(run, None, codes=(6, 7, -signal.SIGKILL))


# Poison ---------------------------------------------------------------------------------------------------------------

POISON = """
import fedtrio.frameworks.fedllm as home
real = home.FedLLM.client
def client(self, lab, site, first):
    message = real(self, lab, site, first)
    return home.Message(message.kind, {name: tensor * 1e9 for name, tensor in message.tensors.items()}, message.facts)
home.FedLLM.client = client
"""


# Again and twice ------------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_an_update_sent_again_is_not_counted_twice(
    world: World, whole: Callable[..., Path], launch: Callable[..., Launch]
) -> None:
    """At once, in the next round, and after a restart of the server."""
    run = launch(world, "frameworks=[fedllm]", "rounds=3", proxied=True)
    slow = "fedtrio.bench:Bench.evaluate", "2"
    run.start("server", die=[(*slow, 1), (*slow, 2), (f"{JOURNAL}.commit", "before", 3)])
    run.start("ada", "bob")
    context = tls.site_context(world.certs("ada"))

    def again() -> httpx.Response:
        turn = next(t for t in run.proxies["ada"].turns() if t.up is not None and t.up.kind == "adapter")
        headers = {key: value for key, value in turn.asked.items() if key.startswith("fedtrio")}
        with httpx.Client(base_url=f"https://127.0.0.1:{run.port}", verify=context, trust_env=False) as site:
            return site.post("/v1/turn", headers=headers, content=turn.body, timeout=30)

    run.until(lambda: len(accepted(run).get(1, {})) == 2)
    assert again().status_code in (200, 204, 409)
    run.until(lambda: "round 1" in run.log("server") and len(accepted(run).get(2, {})) == 2)
    answer = again()
    assert answer.status_code == 409 and answer.json()["error"] == "round closed"
    run.died("server")
    run.start("server", die=(*slow, 1))
    run.until(lambda: run.log("server").count("waiting on port") == 2)
    answer = again()
    assert answer.status_code == 409 and answer.json()["error"] == "new session"
    run.finish()
    sound(run, whole("frameworks=[fedllm]", "rounds=3"))


@pytest.mark.faults
def test_two_processes_with_one_certificate(
    world: World, whole: Callable[..., Path], launch: Callable[..., Launch]
) -> None:
    """The newer takes the place over, in the middle of a round."""
    run = launch(world, "frameworks=[split]", "rounds=3")
    run.start("server", "bob")
    run.start("ada", die=(f"{LEARNER}.step", "3", 5))
    run.until(lambda: "round 1" in run.log("server"))
    older = run.pid("ada"), run._children["ada"]
    run.start("ada", die=(f"{LEARNER}.step", "6", 2))  # slow too, so that the run lasts till the older is awake
    older[1].join(60)
    assert older[1].exitcode == 6 and "another process uses the certificate of ada; stop one of the two" in run.log(
        "ada"
    )
    run.finish()
    assert run.heard("replaced", "ada")
    sound(run, whole("frameworks=[split]", "rounds=3"))


@pytest.mark.faults
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_connections_that_break_in_the_middle_of_a_message(
    world: World, whole: Callable[..., Path], launch: Callable[..., Launch], framework: str
) -> None:
    run = launch(world, f"frameworks=[{framework}]")
    run.proxies["ada"] = Proxy(world, "ada", run.port, cuts=[300, 1500, 900, 4_000, 700, 2_500, 600])
    run.start()
    run.finish()
    assert not run.proxies["ada"]._cuts, "nothing broke"
    sound(run, whole(f"frameworks=[{framework}]"))


# Disks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_a_site_whose_folder_can_t_be_written(
    world: World, whole: Callable[..., Path], launch: Callable[..., Launch]
) -> None:
    run = launch(world, "frameworks=[kd]")
    run.home("ada").write_text("in the way")
    run.start()
    assert run.wait("ada") == 2 and "can't be written" in run.log("ada") and "--folder" in run.log("ada")
    run.home("ada").unlink()
    run.start("ada")
    run.finish()
    sound(run, whole("frameworks=[kd]"), codes=(0, 2))


@pytest.mark.faults
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_damaged_round_of_the_server(
    world: World, whole: Callable[..., Path], launch: Callable[..., Launch], framework: str
) -> None:
    """It falls back to the round before, for which the sites still have their memory."""
    settings = (f"frameworks=[{framework}]", "rounds=4")
    run = launch(world, *settings)
    run.start("server", die=(f"{WIRE}.start_round", "before", 4))
    run.start("ada", "bob")
    run.died("server")
    last = run.out / f"{framework}-0" / "rounds" / "round-00003.safetensors"
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    run.start("server")
    run.finish()
    sound(run, whole(*settings))


@pytest.mark.faults
def test_two_servers_in_one_folder_or_on_one_port(world: World, launch: Callable[..., Launch], tmp_path: Path) -> None:
    run = launch(world, "frameworks=[kd]", "rounds=3")
    run.start("server", die=("fedtrio.bench:Bench.evaluate", "4", 1))
    run.start("ada", "bob")
    waiting(run)
    code, text = fedtrio(*run.words("server"), log=tmp_path / "second.log")
    assert (
        code == 2
        and f"cannot listen on 127.0.0.1:{run.port}: the port is in use" in text
        and len(text.splitlines()) <= 2
    )
    run.finish()
    sound(run, None)
