"""Sites in processes of their own, over mutual TLS: the same bits as in one process, and nothing crosses but frames."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.torch
import torch
from remotes import (
    SETTINGS,
    Launch,
    World,
    fedtrio,
    readable,
    sha256,
    sound,
    write_yaml,
)
from same import timeless

from fedtrio.bench import Bench
from fedtrio.certs import issue, load_authority, make_certs
from fedtrio.checkpoint import unwritable
from fedtrio.compare import compare
from fedtrio.config_file import load_config, load_site_config
from fedtrio.data.batches import epoch_batches
from fedtrio.data.load import load_server_corpus
from fedtrio.errors import ConfigError, DataError, MessageError, ModelError, WireError
from fedtrio.message import Message, encode
from fedtrio.models.load import BUILT_IN, resolve
from fedtrio.program import ACCOUNT, CONCLUDE
from fedtrio.remote import Host, Turns, settings_of
from fedtrio.wires import tls
from fedtrio.wires.dial import dial

CANARY = "zq-canary-4711"
LABEL = "zq-label-0815"
SITES = ("ada", "bob", "cyd")


def secret(site: str, index: int, row: dict[str, str]) -> dict[str, str]:
    """Ada's first rows tell what must not leave."""
    if site == "ada" and index < 6:
        return row | {"text": f"{CANARY} {index} {row['text']}", "label": LABEL}
    return row


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("remote") / "world", SITES, (22, 17, 9), secret)
    make_certs(["stranger"], world.folder / "certs")
    return world


def in_process(world: World, *settings: str) -> Path:
    out = world.folder / f"loop-{len(list(world.folder.glob('loop-*')))}"
    compare(load_config(world.folder / "loop.yaml", settings), out, jobs=1)
    return out


@pytest.fixture(scope="module")
def run(world: World) -> Iterator[Launch]:
    """All three frameworks: real commands, each site behind a proxy that records."""
    with Launch(world, ["frameworks=[fedllm,kd,split]"], proxied=True) as run:
        run.start("server", fork=False)
        run.until(lambda: "waiting on port" in run.log("server"))
        with pytest.raises(WireError, match="'stranger'"):
            knock(run, "stranger")
        run.start("ada", "cyd", fork=False)
        run.start("bob", more=["--show-outgoing", "--yes"], fork=False)
        run.finish()
        yield run


@pytest.fixture(scope="module")
def whole(world: World) -> Path:
    return in_process(world, "frameworks=[fedllm,kd,split]")


@pytest.fixture(scope="module")
def u_shape(world: World) -> Iterator[Launch]:
    """Split with the head at the site."""
    with Launch(world, ["frameworks=[split]", "split.labels=client"], proxied=True, name="u") as run:
        run.start()
        run.finish()
        yield run


def knock(run: Launch, name: str) -> None:
    own = load_site_config(run.world.folder / "ada.yaml")
    dial(f"https://127.0.0.1:{run.port}", run.world.certs(name), Host(name, own, run.folder / "none"), patience=5)


# The same bits --------------------------------------------------------------------------------------------------------


def test_the_same_bits_as_in_process(run: Launch, whole: Path) -> None:
    there, here = run.results(), json.loads((whole / "results.json").read_text(encoding="utf-8"))
    hashes = [entry["adapter_sha256"] for entry in there["runs"]]
    assert len(hashes) == 3 and None not in hashes and hashes[0] != hashes[1]
    sound(run, whole, codes=(0,))
    assert there.keys() == here.keys()
    for ours, theirs in zip(there["runs"], here["runs"], strict=True):
        assert ours.keys() == theirs.keys() and ours["curve"][0].keys() == theirs["curve"][0].keys()
        assert ours["right"] == theirs["right"] and ours["right"]["texts"] == 12
    assert there["data"]["test"] == 12 and there["data"]["train"] == 0  # the server holds no training data
    assert timeless(there["runs"][0]["curve"]) == timeless(here["runs"][0]["curve"])


def test_the_u_shape_gives_the_same_bits(u_shape: Launch, world: World, run: Launch) -> None:
    sound(u_shape, in_process(world, "frameworks=[split]", "split.labels=client"), codes=(0,))
    assert sha256(u_shape.out / "ledger.jsonl") != sha256(run.out / "ledger.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["fedllm.aggregation=flora", "lora.r={ada: 2, bob: 4, cyd: 3}", "participation=0.7", "rounds=3"],
        ["fedllm.aggregation=rolora", "fedllm.upload=delta", "wire.up=int8", "participation=0.7", "rounds=3"],
        ["fedllm.aggregation=RULE", "participation=0.7", "fedllm.unbiased=true"],
        ["fedllm.local_heads=true", "fedllm.keep_optimizer=true"],
    ],
)
def test_ways_of_fedllm_give_the_same_bits(world: World, settings: list[str], tmp_path: Path) -> None:
    rule = "def least(adapters, weights):\n    return adapters[min(adapters)]\n"
    (tmp_path / "own.py").write_text(rule, encoding="utf-8")
    settings = [word.replace("RULE", f"{tmp_path / 'own.py'}:least") for word in settings]
    with Launch(world, ["frameworks=[fedllm]", *settings], name=tmp_path.name) as run:
        run.start()
        run.finish()
    here = in_process(world, "frameworks=[fedllm]", *settings)
    theirs, ours = run.results()["runs"][0], json.loads((here / "results.json").read_text(encoding="utf-8"))["runs"][0]
    assert sha256(run.out / "ledger.jsonl") == sha256(here / "ledger.jsonl")
    assert timeless(theirs["curve"]) == timeless(ours["curve"]) and theirs["client_accuracy"] == ours["client_accuracy"]
    assert theirs["adapter_sha256"] in (ours["adapter_sha256"], None)  # None: each site keeps its own


def test_the_run_folder_is_whole(run: Launch) -> None:
    names = {path.name for path in run.out.iterdir()}
    folders = {"fedllm-0", "kd-0", "split-0"}
    assert names == {"config.yaml", "results.json", "report.html", "ledger.jsonl", "events.jsonl", "run_id", *folders}
    report = (run.out / "report.html").read_text(encoding="utf-8")
    assert all(site in report for site in SITES) and "As measured between these machines" in report
    assert not list(run.out.rglob("rounds"))  # no longer needed
    run_id = (run.out / "run_id").read_text()
    for site in SITES:
        kept = {str(path.relative_to(run.home(site))) for path in run.home(site).rglob("*") if path.is_file()}
        for name in folders:
            assert f"{run_id}/{name}/memory/round-00002.safetensors" in kept
        assert not [name for name in kept if name.endswith(".csv")]
        assert (run.home(site) / run_id / "turns").stat().st_mode & 0o077 == 0
    readable(run)
    assert {(e["event"], e["site"]) for e in run.events()} >= {("joined", site) for site in SITES}


def test_who_is_not_on_the_list_is_refused(run: Launch) -> None:
    assert "stranger is not on the server's list of sites" in run.heard("refused", "stranger")[0]
    assert not (run.folder / "none").exists()


def test_outgoing_messages_are_shown(run: Launch) -> None:
    shown = [line for line in run.log("bob").splitlines() if " bytes: " in line]
    kinds = {kind for kind in ("'adapter'", "'logits'", "'activations and labels'") for line in shown if kind in line}
    assert len(kinds) == 3 and all(line.split()[0] in ("fedllm-0", "kd-0", "split-0") for line in shown)
    said = sum(int(line.split(" bytes: ")[0].split()[-1].replace(",", "")) for line in shown)
    bob = [site for entry in run.results()["runs"] for site in entry["sites"] if site["name"] == "bob"]
    assert said == sum(site["bytes_up"] for site in bob)
    assert " bytes: " not in run.log("ada")


# What crosses ---------------------------------------------------------------------------------------------------------


def test_the_ledger_counts_what_crossed(run: Launch, u_shape: Launch) -> None:
    """The bytes of each direction, as the proxies saw them, without what is asked of a site itself."""
    for launch in (run, u_shape):
        counted = {"up": 0, "down": 0}
        for proxy in launch.proxies.values():
            for turn in proxy.turns():
                for way, frame, size in (("up", turn.up, len(turn.body)), ("down", turn.down, len(turn.answer))):
                    counted[way] += size if frame and frame.kind not in (ACCOUNT, CONCLUDE) else 0
        for way in ("up", "down"):
            assert counted[way] == sum(entry[f"bytes_{way}"] for entry in launch.results()["runs"]) > 10_000


def needles(world: World) -> dict[str, list[bytes]]:
    """What would betray Ada's first texts and the labels of her batches: as text, and as integers of any width."""
    bench = Bench(load_config(world.folder / "loop.yaml"))
    mine = [i for i, site in enumerate(bench.corpus.train.sites or []) if site == "ada"]
    ada = bench.encoded["train"].take(mine)
    secrets = [ids for ids, i in zip(ada.input_ids, mine, strict=True) if CANARY in bench.corpus.train.prompts[i]]
    assert len(secrets) == 6 and all(len(ids) > 8 for ids in secrets)
    assert isinstance(ada.targets, np.ndarray)
    order = {"batch_size": SETTINGS["train"]["batch_size"], "seed": 0, "site": "ada", "epoch": 0}
    batches = [batch for round in (1, 2) for batch in epoch_batches(len(ada), round=round, **order)]
    labels = [ada.targets[batch] for batch in batches if len(batch) == 8]
    assert len(labels) == 4 and all(len(set(batch)) > 2 for batch in labels)
    return {
        "text": [CANARY.encode(), "canary".encode("utf-16-le"), b"zq-canary"],
        "token ids": [form for ids in secrets for form in integers(ids[:8])],
        "labels": [form for batch in labels for form in integers(batch)],
        "label name": [LABEL.encode()],
    }


def integers(values: Iterable[int]) -> list[bytes]:
    values = [int(value) for value in values]
    kinds = [k for k in ("u1", "<u2", "<u4", "<u8", ">u2", "<f4", "<f2", "<f8") if max(values) < 256 or k != "u1"]
    words = [sign.join(map(str, values)).encode() for sign in (" ", ",", ", ")]
    return [np.array(values).astype(kind).tobytes() for kind in kinds] + words


def found(stream: bytes, wanted: Iterable[bytes]) -> bool:
    return any(needle in stream for needle in wanted)


def of_framework(launch: Launch, name: str) -> tuple[bytes, bytes]:
    """All that Ada's proxy saw of the frames of one framework: up, down."""
    up, down, run = [], [], ""
    for turn in launch.proxies["ada"].turns():
        if turn.body and run == name and turn.path == "/v1/turn":
            up.append(turn.body)
        run = turn.told.get("fedtrio-run", run)
        if run == name and turn.path == "/v1/turn":
            down.append(turn.answer)
    return b"".join(up), b"".join(down)


def test_no_canary_leaves(world: World, run: Launch, u_shape: Launch) -> None:
    wanted = needles(world)
    for launch, name in ((run, "fedllm-0"), (run, "kd-0"), (u_shape, "split-0")):
        for stream in of_framework(launch, name):
            assert len(stream) > 1000, name
            assert not any(found(stream, forms) for forms in wanted.values()), name
    for proxy in (*run.proxies.values(), *u_shape.proxies.values()):  # all bytes there were, headers and greetings too
        assert not found(proxy.bytes("up"), wanted["text"] + wanted["token ids"] + wanted["label name"])
        assert not found(proxy.bytes("down"), wanted["text"] + wanted["token ids"])
        assert LABEL.encode() in proxy.bytes("down")  # the server knows the names of the classes, and tells them
    assert not found(u_shape.proxies["ada"].bytes("up"), wanted["labels"])
    # The search finds labels where they do leave, as documented: to a server that has the head.
    assert found(of_framework(run, "split-0")[0], wanted["labels"])
    assert not found(of_framework(run, "split-0")[0], wanted["token ids"])


def test_nothing_but_what_is_documented_leaves(run: Launch, u_shape: Launch) -> None:
    """Kinds, facts and types of all that a site says in the three that keep labels at home."""
    seen: dict[str, set[str]] = {}
    for launch in (run, u_shape):
        for turn in launch.proxies["ada"].turns():
            if (up := turn.up) is not None and up.kind != "activations and labels":
                seen.setdefault(up.kind, set()).update(up.facts)
                assert all(tensor.dtype == torch.float32 for tensor in up.tensors.values()), up.kind
    accounts = {"flops", "seconds", "peak_bytes", "examples"}
    step = {"step", "steps", "lengths"}
    scores = {"accuracy", "loss", "counted", "process_peak_bytes"}  # on its own test set, of the model that it keeps
    assert seen.pop(ACCOUNT) == accounts and seen.pop(CONCLUDE) == scores
    done = {"adapter": {"weight"}, "logits": {"weight"}, "done": set()}
    assert seen == {**done, "activations": step, "activation gradients": step}


def test_the_recorder_sees_what_is_sent(world: World) -> None:
    """A site that tells: the same proxy and the same search find each canary in each form."""
    wanted = needles(world)
    with Launch(world, ["frameworks=[fedllm]"], proxied=True, name="leak") as run:
        run.start("server")
        run.until(lambda: "waiting on port" in run.log("server"))
        proxy, context = run.proxies["ada"], tls.site_context(world.certs("ada"))
        with httpx.Client(base_url=f"https://127.0.0.1:{proxy.port}", verify=context, trust_env=False) as site:
            said = site.post("/v1/hello", json={"site_id": "a" * 32, "greeting": {"protocol": 1, "text": CANARY}})
            headers = {"Fedtrio-Session": said.json()["session"], "Fedtrio-Site-Id": "a" * 32, "Fedtrio-Turn": "-1"}
            assert found(proxy.bytes("up"), wanted["text"]) and not found(proxy.bytes("up"), wanted["token ids"])
            for name in ("token ids", "labels"):
                ids = torch.from_numpy(np.frombuffer(wanted[name][2], dtype="<u4").astype(np.int32))
                site.post("/v1/beat", headers=headers, content=encode(Message("leak", {"ids": ids}), 1))
                run.until(lambda name=name: found(proxy.bytes("up"), wanted[name]))  # answered before it is read


# What a site is told, and refuses -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(world: World) -> dict[str, Any]:
    config = load_config(world.folder / "server.yaml", ["frameworks=[fedllm]"]).resolved()
    return settings_of(Bench(config, load_server_corpus(config.data, config.task, config.base)), "0123456789abcdef")


def host(world: World, tmp_path: Path, *settings: str) -> Host:
    return Host("ada", load_site_config(world.folder / "ada.yaml", settings), tmp_path)


def test_settings_are_data_and_hold_no_paths_of_the_server(told: dict[str, Any], world: World, tmp_path: Path) -> None:
    assert told["config"].keys().isdisjoint({"data", "device", "clients", "partition"})
    assert told["config"].get("wire", {}).keys() <= {"up", "down"}
    assert str(world.folder) not in json.dumps(told)
    host(world, tmp_path).welcome(told)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": 2}, "the server speaks protocol 2, this site 1"),
        ({"run_id": "../../etc"}, "has the name '../../etc', which is none"),
        ({"code": "import os"}, "settings that this version doesn't know: code"),
        ({"labels": "abc"}, "settings that this version doesn't know: labels"),
        ({"config": {"rounds": 2, "ruonds": 3}}, "settings that this version doesn't know: ruonds"),
        ({"config": {"rounds": 2}}, "did not say at which precision"),
    ],
)
def test_settings_that_are_refused(
    told: dict[str, Any], world: World, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace("..", r"\.\.")):
        host(world, tmp_path).welcome(told | change)


def test_a_class_that_the_server_does_not_know(told: dict[str, Any], world: World, tmp_path: Path) -> None:
    known = [label for label in told["labels"] if label != LABEL]
    with pytest.raises(DataError, match=f"{LABEL!r} .6 rows"):
        host(world, tmp_path).welcome(told | {"labels": known})


def test_another_model_is_refused(told: dict[str, Any], world: World, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(resolve(next(iter(BUILT_IN)), Path()), other)
    weights = safetensors.torch.load_file(other / "model.safetensors")
    name = next(name for name, tensor in sorted(weights.items()) if tensor.is_floating_point())
    safetensors.torch.save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    host(world, tmp_path, f"model={other}").welcome(told)  # a copy is the same model
    weights[name].view(-1)[0] += 0.5
    safetensors.torch.save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"differs from the server's \(\w{16} here, \w{16} there\): use the same weights"
    ):
        host(world, tmp_path, f"model={other}").welcome(told)


def test_a_run_that_was_not_announced(told: dict[str, Any], world: World, tmp_path: Path) -> None:
    site = host(world, tmp_path)
    site.welcome(told)
    with pytest.raises(MessageError, match=r"the run '\.\./x-0', which its settings do not have"):
        site.answer("session", "../x-0", 1, 0, True, encode(Message("start"), 1))


def test_faults_of_a_site_s_own_files(world: World, tmp_path: Path) -> None:
    ada, certs = world.folder / "ada.csv", world.certs("ada")
    old = tmp_path / "old"
    now, day = datetime.now(UTC), timedelta(days=1)
    issue(load_authority(world.certs("authority")), old, "ada", now - 2 * day, now - day)
    typo = write_yaml(tmp_path / "typo.yaml", {"data": {"trian": str(ada)}})
    empty = write_yaml(tmp_path / "empty.yaml", {"threads": 1})
    good = write_yaml(tmp_path / "good.yaml", {"data": {"train": str(ada)}})
    for number, (file, folder, code, said) in enumerate(
        [
            (typo, certs, 2, ("typo.yaml:2", "data.trian is no setting; did you mean 'train'?")),
            (empty, certs, 2, ("data.train is missing",)),
            (tmp_path / "goood.yaml", certs, 2, ("did you mean 'good.yaml'?",)),
            (good, old, 2, ("expired",)),
            (good, tmp_path / "nowhere", 2, ("nowhere",)),
        ]
    ):
        server = ["--server=https://127.0.0.1:1", "--patience=1"]
        got, text = fedtrio("site", file, f"--certs={folder}", *server, log=tmp_path / f"{number}.log")
        assert got == code and all(word in text for word in said), text
        assert len(text.splitlines()) <= 2 and "Traceback" not in text
    assert not list(tmp_path.glob("site-*"))


def test_faults_of_a_server_s_own_files(world: World, tmp_path: Path) -> None:
    server = f"--certs={world.certs('server')}"
    for number, (settings, code, said) in enumerate(
        [
            (["wire.sites=null"], 2, "wire.sites is missing"),
            (["frameworks=[centralized]"], 2, "centralized needs all data in one place"),
            (["data.public=0.1"], 3, "needs files in data.test and data.public"),
        ]
    ):
        words = [f"--set={word}" for word in [*settings, "wire.port=0"]]
        out = tmp_path / f"out-{number}"
        log = tmp_path / f"{number}.log"
        got, text = fedtrio("serve", world.folder / "server.yaml", server, f"--out={out}", *words, log=log)
        assert got == code and said in text and len(text.splitlines()) <= 2, text
        assert not out.exists()
    site_s = [f"--certs={world.certs('ada')}", f"--out={tmp_path / 'out'}"]
    got, text = fedtrio("serve", world.folder / "server.yaml", *site_s, log=tmp_path / "site.log")
    assert got == 2 and "is that of the site ada; the server needs" in text


def test_a_folder_that_can_t_be_written(world: World, tmp_path: Path) -> None:
    """It is said before the site joins, and a full disk sends nobody to a folder without what was kept."""
    good = write_yaml(tmp_path / "good.yaml", {"data": {"train": str(world.folder / "ada.csv")}})
    words = ["--server=https://127.0.0.1:1", f"--certs={world.certs('ada')}", f"--folder={good}/x", "--patience=1"]
    got, text = fedtrio("site", good, *words, log=tmp_path / "site.log")
    assert got == 2 and text.endswith("can't be written: Not a directory; choose another --folder\n")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(unwritable(tmp_path, full)).endswith("make room, then give the same command again")


# The journal of turns -------------------------------------------------------------------------------------------------


def test_frames_of_a_round_come_back(tmp_path: Path) -> None:
    turns = Turns(tmp_path / "x" / "turns")
    assert turns.read("s") is None
    turns.begin("s", "kd-0", 3)
    assert turns.read("s") is None  # nothing was asked yet
    turns.add(4, b"one")
    turns.add(5, b"")
    assert turns.read("s") == ("kd-0", 3, [(4, b"one"), (5, b"")]) and turns.read("other") is None
    turns.begin("s", "kd-0", 4)
    turns.add(6, b"two")
    assert turns.read("s") == ("kd-0", 4, [(6, b"two")])


@pytest.mark.parametrize("torn", [1, 15, 16, 20, 30])
def test_a_torn_frame_was_never_answered(tmp_path: Path, torn: int) -> None:
    """It is sent again, and what is written then is read again, though the process was killed twice."""
    turns = Turns(tmp_path / "turns")
    turns.begin("s", "kd-0", 1)
    turns.add(0, b"first")
    whole = (tmp_path / "turns").read_bytes()
    turns.add(1, b"second, which is longer")
    (tmp_path / "turns").write_bytes((tmp_path / "turns").read_bytes()[: len(whole) + torn])
    assert turns.read("s") == ("kd-0", 1, [(0, b"first")])
    turns.add(1, b"second, again")
    assert turns.read("s") == ("kd-0", 1, [(0, b"first"), (1, b"second, again")])


def test_rubbish_is_no_journal(tmp_path: Path) -> None:
    for content in (
        b"",
        b"\xff\n",
        b"[]\n",
        b'{"session": "s"}\n',
        b'{"session": "s", "run": "r", "round": "x"}\n' + 20 * b"a",
    ):
        (tmp_path / "turns").write_bytes(content)
        assert Turns(tmp_path / "turns").read("s") is None
