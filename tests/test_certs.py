"""Certificates: what is written and for whom, what is never overwritten, and each fault of a folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedtrio import certs
from fedtrio.certs import check, check_server, check_site, describe, issue, load_authority, make_certs
from fedtrio.errors import ConfigError

NOW, DAY = datetime.now(UTC), timedelta(days=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("certs")
    make_certs(["hospital-a", "hospital-b"], out, hosts=["localhost", "127.0.0.1", "fed.example.org"])
    return out


@pytest.fixture
def site(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "hospital-a", tmp_path / "hospital-a"))


def test_what_is_written(made: Path) -> None:
    files = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    folders = ("server", "hospital-a", "hospital-b")
    assert files == {"authority/ca.pem", "authority/key.pem"} | {f"{d}/{f}" for d in folders for f in certs.FILES}
    for path in made.rglob("key.pem"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len({path.read_bytes() for path in made.rglob("ca.pem")}) == 1
    assert len({path.read_bytes() for path in made.rglob("key.pem")}) == 4
    for folder in folders:
        check(made / folder)


def test_names_uses_and_dates(made: Path) -> None:
    def extension(folder: str, kind: type) -> object:
        cert = x509.load_pem_x509_certificate((made / folder / "cert.pem").read_bytes())
        return cert.extensions.get_extension_for_class(kind).value

    assert list(extension("server", x509.ExtendedKeyUsage)) == [ExtendedKeyUsageOID.SERVER_AUTH]  # type: ignore[call-overload]
    assert list(extension("hospital-a", x509.ExtendedKeyUsage)) == [ExtendedKeyUsageOID.CLIENT_AUTH]  # type: ignore[call-overload]
    found = describe(made / "server")
    assert found.hosts == ("localhost", "127.0.0.1", "fed.example.org")
    assert (found.subject, found.issuer, found.issuer_ok) == ("server", "fedtrio authority", True)
    assert found.not_before < NOW + DAY and timedelta(364) < found.not_after - NOW < timedelta(366)
    assert describe(made / "hospital-a").subject == "hospital-a"


def test_strict_verification_accepts_them(made: Path) -> None:
    """Newer Pythons check RFC 5280 to the letter."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context, mine in ((server, "server"), (client, "hospital-a")):
        context.load_verify_locations(made / "authority/ca.pem")
        context.load_cert_chain(made / mine / "cert.pem", made / mine / "key.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        server.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server, server_hostname="localhost"),
    ]
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    assert all(end.getpeercert() for end in ends)


def test_a_site_added_later_has_the_same_authority(tmp_path: Path) -> None:
    made = make_certs(["a"], tmp_path)
    assert set(made) == {"authority", "server", "a"}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pem")}
    assert set(make_certs(["b"], tmp_path)) == {"b"}
    assert {path: path.read_bytes() for path in before} == before
    assert (tmp_path / "b/ca.pem").read_bytes() == (tmp_path / "a/ca.pem").read_bytes()
    check(tmp_path / "b")


def test_nothing_is_overwritten_and_nothing_half_made(tmp_path: Path) -> None:
    make_certs(["a"], tmp_path)
    key = (tmp_path / "a/key.pem").read_bytes()
    with pytest.raises(ConfigError, match=r"a exists and is not overwritten; leave a out"):
        make_certs(["b", "a"], tmp_path)
    assert (tmp_path / "a/key.pem").read_bytes() == key and not (tmp_path / "b").exists()
    with pytest.raises(ConfigError, match=r"server is for localhost, 127.0.0.1 and not for other.org; remove"):
        make_certs(["b"], tmp_path, hosts=["other.org"])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "name", ["", ".hidden", "-x", "a/b", "../a", "a b", "ä", "a\n", "x" * 65, "server", "authority"]
)
def test_names_that_cannot_be(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"choose another name|use 1 to 64 of"):
        make_certs([name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_other_side_s_folder(tmp_path: Path) -> None:
    made = make_certs(["a"], tmp_path)
    check_server(made["server"])
    check_site(made["a"])
    with pytest.raises(ConfigError, match="is that of the site a; the server needs the folder named server"):
        check_server(made["a"])
    with pytest.raises(ConfigError, match="server is a server's; a site needs the folder of its own name"):
        check_site(made["server"])


def test_other_arguments_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must differ"):
        make_certs(["a", "A"], tmp_path)
    with pytest.raises(ConfigError, match="at least 1 day, not 0"):
        make_certs(["a"], tmp_path, days=0)
    with pytest.raises(ConfigError, match="at least one host"):
        make_certs(["a"], tmp_path, hosts=[])
    for host in ("übel.example", "https://fed.example.org:8443", "fed.example.org:8443", "fed example", ""):
        with pytest.raises(ConfigError, match="neither a host name nor an address"):
            make_certs(["a"], tmp_path, hosts=["192.0.2.1", "*.example.org", "::1", host])
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        make_certs(["a"], tmp_path / "file" / "below")


def test_a_key_is_never_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even between creation and a chmod, and whatever the umask."""
    modes, real = {}, os.open

    def spy(path: os.PathLike, flags: int, mode: int = 0o777, **more: int) -> int:
        file = real(path, flags, mode, **more)
        if Path(path).name == "key.pem":
            modes[str(path)] = stat.S_IMODE(os.fstat(file).st_mode)
        return file

    monkeypatch.setattr(os, "open", spy)
    mask = os.umask(0)
    try:
        make_certs(["a"], tmp_path)
    finally:
        os.umask(mask)
    assert len(modes) == 3 and set(modes.values()) == {0o600}


def test_faults_of_a_folder(site: Path, made: Path, tmp_path: Path) -> None:
    other, strange = made / "hospital-b", tmp_path / "strange"
    make_certs(["hospital-a"], strange)
    with pytest.raises(ConfigError, match="no folder"):
        check(tmp_path / "nowhere")
    (site / "key.pem").chmod(0o640)
    with pytest.raises(ConfigError, match=r"can be read by others \(mode 640\); chmod 600"):
        check(site)
    (site / "key.pem").write_bytes((other / "key.pem").read_bytes())
    (site / "key.pem").chmod(0o600)
    with pytest.raises(ConfigError, match=r"is not the key of .*cert.pem"):
        check(site)
    (site / "key.pem").write_text("-----BEGIN nonsense")
    with pytest.raises(ConfigError, match="not a plain private key"):
        check(site)
    (site / "ca.pem").write_bytes((strange / "hospital-a/ca.pem").read_bytes())
    assert not describe(site).issuer_ok
    (site / "key.pem").write_bytes((made / "hospital-a/key.pem").read_bytes())
    with pytest.raises(ConfigError, match=r"cert.pem is not signed by .*ca.pem"):
        check(site)
    (site / "cert.pem").write_text("hello")
    with pytest.raises(ConfigError, match="not a certificate in PEM format"):
        check(site)
    (site / "cert.pem").unlink()
    with pytest.raises(ConfigError, match=r"lacks cert.pem; copy the whole folder"):
        check(site)


def test_dates(made: Path, tmp_path: Path) -> None:
    authority = load_authority(made / "authority")
    check(issue(authority, tmp_path / "fine", "x", NOW - DAY, NOW + DAY))
    issue(authority, tmp_path / "old", "x", NOW - 2 * DAY, NOW - DAY)
    issue(authority, tmp_path / "young", "x", NOW + DAY, NOW + 2 * DAY)
    with pytest.raises(ConfigError, match=r"expired on .* make it anew"):
        check(tmp_path / "old")
    with pytest.raises(ConfigError, match=r"valid only from .* clock"):
        check(tmp_path / "young")


def test_an_authority_with_another_key_signs_nothing(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "authority", tmp_path / "authority")
    (tmp_path / "authority/key.pem").write_bytes((made / "server/key.pem").read_bytes())
    with pytest.raises(ConfigError, match="is not the key of"):
        make_certs(["c"], tmp_path)
    assert not (tmp_path / "c").exists()
