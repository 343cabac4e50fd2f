"""`fedtrio doctor`: of each check one that is fine and the faults it is for, each with its cause, fix and exit code."""

from __future__ import annotations

import csv
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

from fedtrio import cli
from fedtrio.certs import issue, load_authority, make_certs
from fedtrio.models.load import BUILT_IN
from fedtrio.wires.https import Https

NOW, DAY = datetime.now(UTC), timedelta(days=1)
DEMO = Path(cli.__file__).parent / "data" / "demo"
SITE = "data: {train: own.csv}\n"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@dataclass
class Said:
    """How doctor ended, its lines by check, and the last one."""

    code: int | str | None
    found: dict[str, list[tuple[str, str]]]  # check: (state, text)
    last: str
    err: str

    def of(self, check: str) -> tuple[str, str]:
        """The only finding of that check."""
        assert len(self.found[check]) == 1, self.found[check]
        return self.found[check][0]

    def fault(self, check: str, code: int, *words: str) -> None:
        """That check alone has a fault, which says these words; the command ends with the code."""
        faults = {name: text for name, all in self.found.items() for state, text in all if state == "fault"}
        assert faults.keys() == {check}, faults
        assert self.code == code
        for word in words:
            assert word in faults[check], f"{word!r} not in {faults[check]!r}"
        assert self.last.startswith("1 fault")

    def warning(self, check: str, *words: str) -> None:
        """The check warns in these words, and nothing is a fault."""
        assert self.code == 0, self.found
        texts = [text for state, text in self.found[check] if state == "warning"]
        assert any(all(word in text for word in words) for text in texts), self.found[check]


Doctor = Callable[..., Said]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Doctor:
    """`fedtrio doctor …` in this process and in an empty folder, without proxies, through the very entry point."""
    monkeypatch.chdir(tmp_path)
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["fedtrio", "doctor", *map(str, words)])
        capsys.readouterr()
        code: int | str | None = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        *lines, last = out.splitlines() or [""]
        found: dict[str, list[tuple[str, str]]] = {}
        for line in [] if "--json" in words else lines:
            state, check, text = line.split(None, 2)
            found.setdefault(check, []).append((state, text))
        return Said(code, found, out if "--json" in words else last, err)

    return call


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("certs")
    make_certs(["bank", "stranger"], out, ["127.0.0.1", "fed.example.org"])
    make_certs(["bank"], out / "other")
    authority = load_authority(out / "authority")
    for name, start, end in (("old", -2, -1), ("soon", -2, 9), ("young", 1, 2)):
        issue(authority, out / name, "bank", NOW + start * DAY, NOW + end * DAY)
    issue(authority, out / "elsewhere", "server", NOW - DAY, NOW + DAY, ["example.org"])
    issue(authority, out / "young-server", "server", NOW + DAY, NOW + 2 * DAY, ["127.0.0.1"])
    issue(authority, out / "local", "server", NOW - DAY, NOW + 90 * DAY, ["localhost"])
    return out


@pytest.fixture(scope="module")
def serve(certs: Path) -> Iterator[Callable[[str], str]]:
    """The address of a server that uses that folder of certificates and knows the bank."""
    wires: dict[str, Https] = {}

    def start(folder: str = "server") -> str:
        if folder not in wires:
            wires[folder] = Https(certs / folder, ["bank"], lambda site, said: {}, host="127.0.0.1", port=0)
        return f"https://127.0.0.1:{wires[folder].port}"

    yield start
    for wire in wires.values():
        wire.close()


@pytest.fixture
def rows() -> list[list[str]]:
    with (DEMO / "train.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[:30]


def write(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture
def site(tmp_path: Path, rows: list[list[str]]) -> Path:
    """A site's configuration, beside its data in `own.csv`."""
    write(tmp_path / "own.csv", rows)
    (tmp_path / "bank.yaml").write_text(SITE)
    return tmp_path / "bank.yaml"


def server_yaml(folder: Path, **changed: Any) -> Path:
    settings: dict[str, Any] = {
        "data": {"test": str(DEMO / "test.csv"), "public": str(DEMO / "public.csv")},
        "wire": {"sites": ["bank", "council"], "host": "127.0.0.1", "port": 0},
        "deadline": 60,
    }
    (folder / "server.yaml").write_text(json.dumps(settings | changed))
    return folder / "server.yaml"


# All at once ----------------------------------------------------------------------------------------------------------


def test_the_demo_is_well(doctor: Doctor) -> None:
    said = doctor()
    assert said.code == 0 and said.last == "all is well", said.found
    assert list(said.found) == ["versions", "configuration", "wire", "data", "model", "disk", "memory"]
    assert {state for all in said.found.values() for state, _ in all} == {"ok"}
    assert "loopback: all sites in one process" in said.of("wire")[1]
    assert "3509 training, 480 test, 160 public texts, 20 classes; 6 sites by column" in said.of("data")[1]
    assert "nano: 2,594,688 weights in 4 blocks, 59,136 train; cut before block 2" in said.of("model")[1]


def test_all_faults_are_shown_and_the_first_gives_the_code(doctor: Doctor, tmp_path: Path) -> None:
    said = doctor("--set", "data.train=nothing.csv", "--set", "model=./nowhere", "--set", "rounds=1")
    assert said.of("data")[0] == said.of("model")[0] == "fault"
    assert said.code == 3 and said.last == "2 faults"
    told = json.loads(doctor("--json", "--set", "data.train=nothing.csv").last)
    assert told["exit_code"] == 3
    assert {"check", "state", "text", "code"} == told["findings"][0].keys()
    assert [f["code"] for f in told["findings"] if f["state"] == "fault"] == [3]


def test_certificates_and_network_need_no_torch(certs: Path, serve: Callable[[str], str], tmp_path: Path) -> None:
    words = ["doctor", "--certs", str(certs / "bank"), "--server", serve("server")]
    code = f"import sys; from fedtrio.cli import main; sys.argv = ['fedtrio', *{words}]\n"
    code += "try:\n    main()\nfinally:\n    print('torch' in sys.modules, 'httpx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False True", done.stdout + done.stderr
    assert "warning  configuration no file was named" in done.stdout


# Versions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "words"),
    [("0.1", ("peft is 0.1, needed is >=", "pip install 'peft>=")), (None, ("peft is not installed", "pip install"))],
)
def test_versions(
    found: str | None, words: tuple[str, ...], doctor: Doctor, certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "peft" and found is None:
            raise metadata.PackageNotFoundError(name)
        return found if name == "peft" and found else real(name)

    monkeypatch.setattr(metadata, "version", version)
    doctor("--certs", certs / "server").fault("versions", 2, *words)


# Certificates ---------------------------------------------------------------------------------------------------------


def test_certificates(doctor: Doctor, certs: Path, tmp_path: Path) -> None:
    state, text = doctor("--certs", certs / "bank", "--site").found["certificates"][0]
    assert state == "ok" and "bank, signed by fedtrio authority, valid till" in text
    assert "reached as 127.0.0.1, fed.example.org" in doctor("--certs", certs / "server").of("certificates")[1]
    doctor("--certs", certs / "local").warning("certificates", "other machines can't reach it", "--host")
    doctor("--certs", certs / "bank").fault("certificates", 2, "is that of the site bank; add --site")
    doctor("--certs", tmp_path / "none").fault("certificates", 2, "no folder", "fedtrio certs")


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("server", "is a server's; a site needs the folder of its own name"),
        ("old", "expired on"),
        ("young", "is valid only from"),
    ],
)
def test_certificates_of_no_use_to_a_site(folder: str, words: str, doctor: Doctor, certs: Path, site: Path) -> None:
    doctor(site, "--site", "--certs", certs / folder).fault("certificates", 2, words)


def test_a_certificate_that_ends_soon(doctor: Doctor, certs: Path, site: Path) -> None:
    doctor(site, "--site", "--certs", certs / "soon").warning("certificates", "8 days from now; make a new one")


def test_a_key_that_others_can_read(doctor: Doctor, certs: Path, site: Path, tmp_path: Path) -> None:
    shutil.copytree(certs / "bank", tmp_path / "bank")
    (tmp_path / "bank/key.pem").chmod(0o644)
    doctor(site, "--site", "--certs", "bank").fault("certificates", 2, "can be read by others (mode 644); chmod 600")


# The way to the server ------------------------------------------------------------------------------------------------


def dial(doctor: Doctor, certs: Path, url: str, folder: str = "bank") -> Said:
    return doctor("--certs", certs / folder, "--server", url)


def test_a_server_that_knows_the_site(doctor: Doctor, certs: Path, serve: Callable[[str], str]) -> None:
    said = dial(doctor, certs, serve("server"))
    assert said.code == 0
    assert said.of("server")[0] == "ok" and "knows this site" in said.of("server")[1]
    assert said.of("network")[1].startswith("127.0.0.1 is 127.0.0.1, and something listens at")
    doctor("--server", serve("server")).warning("server", "add --certs")


def test_a_server_that_does_not(doctor: Doctor, certs: Path, serve: Callable[[str], str]) -> None:
    dial(doctor, certs, serve("server"), "stranger").fault(
        "server", 6, "stranger is not on the server's list of sites; ask for 'stranger' to be added"
    )


@pytest.mark.parametrize(
    ("server", "site", "words"),
    [
        ("server", "other/bank", "signed by an authority that this site does not know"),
        ("elsewhere", "bank", "for other addresses than the one dialled"),
        ("young-server", "bank", "not yet valid; check the clocks of both machines (this machine's clock says"),
    ],
)
def test_tls(server: str, site: str, words: str, doctor: Doctor, certs: Path, serve: Callable[[str], str]) -> None:
    dial(doctor, certs, serve(server), site).fault("server", 6, words)


def test_an_address_that_leads_nowhere(doctor: Doctor, certs: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{unused.getsockname()[1]}"
        dial(doctor, certs, url).fault("server", 6, "nothing listens there (connection refused)")
    dial(doctor, certs, "https://no-such-host.invalid:8443").fault("server", 6, "host name is not known")
    for url in ("http://127.0.0.1:8443", "127.0.0.1:8443", "https://host:port", "https://"):
        dial(doctor, certs, url).fault("server", 2, "is no address of a server; write https://host:8443")


class _Other(BaseHTTPRequestHandler):
    """Some other server, as a proxy that answers in the server's place; and its clock is wrong."""

    said = b"<html>Please log in</html>"

    def do_GET(self) -> None:
        self.send_response_only(404)
        self.send_header("Date", "Sun, 06 Nov 1994 08:49:37 GMT")
        self.send_header("Content-Length", str(len(self.said)))
        self.end_headers()
        self.wfile.write(self.said)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.mark.parametrize("tls", [False, True])
def test_something_else_answers(tls: bool, doctor: Doctor, certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtrio.wires.tls import server_context

    with HTTPServer(("127.0.0.1", 0), _Other) as other:
        if tls:
            other.socket = server_context(certs / "server").wrap_socket(other.socket, server_side=True)
        Thread(target=other.serve_forever, daemon=True).start()
        url = f"https://127.0.0.1:{other.server_address[1]}"
        words = "status 404 and not as a fedtrio server does" if tls else "what answers there does not speak TLS"
        dial(doctor, certs, url).fault("server", 6, words)
        if tls:
            monkeypatch.setattr(_Other, "said", b'{"error": "no such path", "reason": ""}')
            dial(doctor, certs, url).warning("clock", "differ by", "NTP")
        other.shutdown()


def test_proxies(doctor: Doctor, certs: Path, serve: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@127.0.0.1:9")
    said = dial(doctor, certs, serve("server"))
    said.fault("server", 6, "connection refused")
    assert "127.0.0.1 is reached through http://127.0.0.1:9" in said.of("proxy")[1] and "network" not in said.found
    assert "secret" not in str(said.found) + said.err
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    said = dial(doctor, certs, serve("server"))
    assert said.code == 0 and "HTTPS_PROXY, NO_PROXY set, and not for this host" in said.of("proxy")[1]


# Wire -----------------------------------------------------------------------------------------------------------------


def test_a_wire_whose_package_is_missing(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    doctor("--set", "wire.name=ray").fault("wire", 2, "ray is missing: pip install 'fedtrio[ray]'")


# Configuration --------------------------------------------------------------------------------------------------------


def test_configuration_of_a_server(doctor: Doctor, certs: Path, tmp_path: Path) -> None:
    said = doctor(server_yaml(tmp_path), "--certs", certs / "server")
    assert said.code == 0 and "sites bank, council at port any" in said.of("configuration")[1]
    assert "https: sites dial in" in said.of("wire")[1]
    doctor(server_yaml(tmp_path, deadline=None)).warning("configuration", "one slow site holds up every round")
    doctor(server_yaml(tmp_path, min_sites=3)).fault("configuration", 2, "min_sites is 3, but wire.sites lists 2")
    doctor(server_yaml(tmp_path, wire={"port": 0}), "--certs", certs / "server").fault(
        "configuration", 2, "wire.sites is missing"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wire = {"sites": ["bank"], "host": "127.0.0.1", "port": taken.getsockname()[1]}
        doctor(server_yaml(tmp_path, wire=wire)).fault("configuration", 2, "Address already in use; stop what holds it")


def test_configuration_that_cannot_be_read(doctor: Doctor, site: Path, tmp_path: Path) -> None:
    said = doctor(site, "--site", "--set", "data.tekst=text")
    said.fault("configuration", 2, "data.tekst is no setting; did you mean 'test'?")
    doctor("bnak.yaml", "--site").fault("configuration", 2, "No such file or directory; did you mean 'bank.yaml'?")
    doctor("--site").fault("configuration", 2, "name the site's YAML file")
    doctor("--set", "device=abacus").fault("configuration", 4, "device 'abacus' is unknown")


# Data -----------------------------------------------------------------------------------------------------------------


def test_data_of_a_site(doctor: Doctor, site: Path, rows: list[list[str]], tmp_path: Path) -> None:
    said = doctor(site, "--site")
    classes = len({row[1] for row in rows[1:]})
    assert said.code == 0 and f"29 examples for classification, {classes} classes" in said.of("data")[1]
    write(tmp_path / "own.csv", [*rows, rows[1], rows[1]])
    doctor(site, "--site").warning("data", "2 of 31 examples occur more than once")
    doctor(site, "--site", "--set", "data.label=intent").fault(
        "data", 3, "no column 'intent'; found: text, label, site"
    )
    doctor(site, "--site", "--set", "data.train=ow.csv").fault("data", 3, "no such file; did you mean 'own.csv'?")
    doctor(site, "--site", "--set", "data.labels=[a, b]").fault("data", 3, "are not in the server's data.labels")
    doctor(site, "--site", "--set", "data.train=null").fault("data", 2, "data.train is missing")
    write(tmp_path / "own.csv", [[row[0]] for row in rows])
    assert "29 examples for causal-lm" in doctor(site, "--site").of("data")[1]


def test_data_of_a_server(doctor: Doctor, tmp_path: Path, rows: list[list[str]]) -> None:
    assert "480 test and 551 public texts, 20 classes" in doctor(server_yaml(tmp_path)).of("data")[1]
    test = str(DEMO / "test.csv")
    twice = {"test": test, "public": test, "max_public": 7}
    doctor(server_yaml(tmp_path, data=twice)).warning("data", "7 of 7 public texts also occur in the test set")
    missing = {"test": "test.csv", "public": test}
    doctor(server_yaml(tmp_path, data=missing)).fault("data", 3, "test.csv: no such file")


def test_data_of_a_comparison(doctor: Doctor, tmp_path: Path, rows: list[list[str]]) -> None:
    write(tmp_path / "all.csv", [*rows, *rows[1:]])
    (tmp_path / "mine.yaml").write_text("data: {train: all.csv}\nclients: 2\npartition: {name: iid}\n")
    doctor("mine.yaml").warning("data", "test texts also occur in the training set")
    doctor("mine.yaml", "--set", "clients=90").fault("data", 3, "90 clients with 1 or more examples", "feasible")


# Model, disk and memory -----------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUILT_IN["nano"], tmp_path / "model"))


def with_model(doctor: Doctor, site: Path, *more: object) -> Said:
    return doctor(site, "--site", "--set", "model=./model", *more)


def test_a_model_of_a_site(doctor: Doctor, site: Path, model: Path) -> None:
    said = with_model(doctor, site)
    assert said.code == 0 and "weights in 4 blocks" in said.of("model")[1]
    assert f"5 MB of weights are whole in {model}" in said.of("hub")[1]
    assert "the server names it" in doctor(site, "--site").of("model")[1]


def test_a_model_that_is_not_whole(doctor: Doctor, site: Path, model: Path) -> None:
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with_model(doctor, site).fault(
        "model", 4, f"cut short or broken ({len(whole) - 100:,} bytes, {len(whole):,} expected"
    )
    weights.write_bytes(b"\xff" * 64)
    with_model(doctor, site).fault("model", 4, "cut short or broken")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with_model(doctor, site).fault("model", 4, "pointer of Git LFS", "git lfs pull")
    weights.unlink()
    with_model(doctor, site).fault("model", 4, "holds no weights (model.safetensors)")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    with_model(doctor, site).fault("model", 4, "lacks 1.safetensors, 2.safetensors of 2 files")
    (model / "config.json").unlink()
    with_model(doctor, site).fault("model", 4, "is a folder without config.json")


def test_a_model_that_may_not_be_read(doctor: Doctor, site: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def opens(path: Path, *rest: Any, **more: Any) -> Any:
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(Path, "open", opens)
    with_model(doctor, site).fault("model", 4, f"{model / 'model.safetensors'}: Permission denied")


def test_a_model_without_its_tokenizer(doctor: Doctor, site: Path, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with_model(doctor, site).fault("model", 4, "tokenizer")


def test_a_model_that_cannot_be_adapted_or_cut(doctor: Doctor, model: Path) -> None:
    doctor("--set", "split.cut=9").fault("model", 4, "split.cut is 9, but the model has 4 blocks: choose 0 to 4")
    doctor("--set", "lora.target_modules=[q_proj]").fault("model", 4, "['q_proj'] match nothing; there are")
    said = doctor("--set", "split.cut=9", "--set", "frameworks=[fedllm]")
    assert said.code == 0 and "cut" not in said.of("model")[1]


def test_a_model_of_the_hub(doctor: Doctor, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtrio.checks.model.HUB_TIMEOUT_SECONDS", 0.001)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = doctor(site, "--site", "--set", "model=someone/nothing")
    said.fault("model", 4, "not in the Hub's cache, and HF_HUB_OFFLINE is set")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    said = doctor(site, "--site", "--set", "model=someone/nothing")
    said.fault("model", 4, "neither a folder nor in the Hub's cache, and the Hub does not give it")


def test_room_on_the_disk(doctor: Doctor, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"free at {tmp_path}, about" in doctor(site, "--site", "--set", "model=nano", "--out", "a/b").of("disk")[1]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000_000))
    said = doctor(site, "--site", "--set", "model=nano")
    said.warning("disk", "20 MB free", "scarce")
    doctor().fault("disk", 2, "20 MB free", "make room, or choose another --out")
    (tmp_path / "file").write_text("")
    doctor(site, "--site", "--out", "file/below").fault("disk", 2, "can't be written", "choose another --out")


def test_memory(doctor: Doctor, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = psutil.virtual_memory()
    words = (site, "--site", "--set", "model=nano")
    for total, available in ((4e9, 1e8), (1e8, 1e8)):
        found = real._replace(total=int(total), available=int(available))
        monkeypatch.setattr(psutil, "virtual_memory", lambda found=found: found)
        if total > 1e9:
            doctor(*words).warning("memory", "100 MB of 4 GB memory available, about 5", "train.batch_size")
        else:
            doctor(*words).fault("memory", 4, "choose a smaller model")
