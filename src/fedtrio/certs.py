"""An authority of one's own and the certificates it signs: who a site is, and that the server is the server.

    certs/authority/{ca.pem, key.pem}       signs; stays with whoever admits sites
    certs/server/{ca.pem, cert.pem, key.pem}
    certs/<site>/{ca.pem, cert.pem, key.pem}    the folder that is handed to a site

Keys are ECDSA P-256 and readable by their owner alone. A site's name is the common name of its certificate.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .errors import ConfigError

RESERVED = ("authority", "server")
FILES = ("ca.pem", "cert.pem", "key.pem")
HOSTS = ("localhost", "127.0.0.1")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_AUTHORITY_DAYS = 3650
_BACKDATED = timedelta(minutes=10)  # the clocks of sites are not all right


@dataclass(frozen=True)
class Authority:
    """What signs: a certificate and its private key."""

    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Certificate:
    """What a folder's certificate says; times are UTC, `hosts` are the names and addresses it may serve."""

    subject: str
    issuer: str
    not_before: datetime
    not_after: datetime
    issuer_ok: bool
    hosts: tuple[str, ...] = ()


def make_certs(sites: Sequence[str], out: Path, hosts: Sequence[str] = HOSTS, days: int = 365) -> dict[str, Path]:
    """Write an authority, a server's and each site's certificate under `out`; gives the new folders by name.

    An authority that is there already signs again, and a server's certificate that is there is kept: so sites can be
    added later. ConfigError for names that cannot be used, folders that exist, or a validity of less than one day.
    """
    out = Path(out)
    _check_names(sites, out)
    if days < 1:
        raise ConfigError(f"certificates must be valid for at least 1 day, not {days}; say for example --days 365")
    if not hosts:
        raise ConfigError("the server needs at least one host name or address in its certificate")
    for host in hosts:
        _host(host)  # before anything is written
    now = datetime.now(UTC) - _BACKDATED
    end = now + timedelta(days=days)
    authority = load_authority(out / "authority") if (out / "authority").exists() else new_authority(now, days)
    made: dict[str, Path] = {}
    if not (out / "authority").exists():
        files = {"ca.pem": _pem(authority.cert), "key.pem": _pem(authority.key)}
        made["authority"] = _write_folder(out / "authority", files)
    if (out / "server").exists():
        _check_hosts(out / "server", hosts)
    else:
        made["server"] = issue(authority, out / "server", "server", now, end, hosts)
    for site in sites:
        made[site] = issue(authority, out / site, site, now, end)
    return made


def new_authority(start: datetime, days: int = _AUTHORITY_DAYS, name: str = "fedtrio authority") -> Authority:
    """A self-signed authority, valid from `start` for ten years, or for `days` where that is longer."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(name)
    end = start + timedelta(days=max(days, _AUTHORITY_DAYS))
    cert = (
        _builder(subject, subject, key.public_key(), start, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(cert, key)


def load_authority(folder: Path) -> Authority:
    """Read an authority's folder. ConfigError where a file is missing or is not what its name says."""
    cert, key = _read_cert(folder / "ca.pem"), _read_key(folder / "key.pem")
    if cert.public_key() != key.public_key():
        raise ConfigError(
            f"{folder}/key.pem is not the key of {folder}/ca.pem; bring back the two that belong together"
        )
    return Authority(cert, key)


def issue(
    authority: Authority, folder: Path, name: str, start: datetime, end: datetime, hosts: Sequence[str] = ()
) -> Path:
    """Write a new folder with a key and a certificate: the server's where `hosts` are given, else a site's."""
    key = ec.generate_private_key(ec.SECP256R1())
    usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    names = [_host(host) for host in hosts] or [x509.UniformResourceIdentifier(f"urn:fedtrio:site:{name}")]
    issuer = authority.cert
    cert = (
        _builder(_subject(name), issuer.subject, key.public_key(), start, min(end, issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return _write_folder(folder, {"ca.pem": _pem(issuer), "cert.pem": _pem(cert), "key.pem": _pem(key)})


def describe(folder: Path) -> Certificate:
    """What the certificate in a server's or site's folder says. ConfigError where a file is missing or broken."""
    cert, issuer = _read_cert(Path(folder) / "cert.pem"), _read_cert(Path(folder) / "ca.pem")
    return Certificate(
        _common_name(cert.subject),
        _common_name(cert.issuer),
        cert.not_valid_before_utc,
        cert.not_valid_after_utc,
        _signed_by(cert, issuer),
        _hosts_of(cert),
    )


def check(folder: Path) -> None:
    """ConfigError with cause and fix where a server's or site's folder would not do: see each message."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}; `fedtrio certs` makes the folders of certificates")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder} lacks {', '.join(missing)}; copy the whole folder that `fedtrio certs` made")
    path, found = folder / "key.pem", describe(folder)
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(f"{path} can be read by others (mode {mode:03o}); chmod 600 {path}")
    if _read_key(path).public_key() != _read_cert(folder / "cert.pem").public_key():
        raise ConfigError(f"{path} is not the key of {folder}/cert.pem; bring back the two that belong together")
    if not found.issuer_ok:
        raise ConfigError(
            f"{folder}/cert.pem is not signed by {folder}/ca.pem; copy the whole folder that `fedtrio certs` made"
        )
    now = datetime.now(UTC)
    if now < found.not_before:
        raise ConfigError(f"{folder}/cert.pem is valid only from {_day(found.not_before)}; check this machine's clock")
    if now > found.not_after:
        raise ConfigError(
            f"{folder}/cert.pem expired on {_day(found.not_after)}; remove {folder} and make it anew by `fedtrio certs`"
        )


def check_server(folder: Path) -> None:
    """`check`, and that the folder is the server's. ConfigError."""
    check(folder)
    if not (found := describe(folder)).hosts:
        raise ConfigError(f"{folder} is that of the site {found.subject}; the server needs the folder named server")


def check_site(folder: Path) -> None:
    """`check`, and that the folder is a site's. ConfigError."""
    check(folder)
    if describe(folder).hosts:
        raise ConfigError(f"{folder} is a server's; a site needs the folder of its own name, made by `fedtrio certs`")


# Checks ---------------------------------------------------------------------------------------------------------------


def _check_names(sites: Sequence[str], out: Path) -> None:
    for site in sites:
        if site in RESERVED:
            raise ConfigError(f"a site cannot be called {site!r}: that folder is the {site}'s own; choose another name")
        if not _NAME.fullmatch(site):
            raise ConfigError(
                f"{site[:80]!r} cannot be a site's name; use 1 to 64 of A-Z a-z 0-9 . _ - and begin with no dot or dash"
            )
        if (out / site).exists():
            raise ConfigError(
                f"{out / site} exists and is not overwritten; leave {site} out, or remove that folder to make it anew"
            )
    # On some systems `A` and `a` are one folder.
    doubled = {site for site in sites if [other.lower() for other in sites].count(site.lower()) > 1}
    if doubled:
        raise ConfigError(f"site names must differ, also without case: {', '.join(sorted(doubled))}")


def _check_hosts(folder: Path, hosts: Sequence[str]) -> None:
    """A kept server certificate must serve the hosts that were asked for."""
    has = describe(folder).hosts
    lacking = [host for host in hosts if host not in has]
    if lacking and tuple(hosts) != HOSTS:
        raise ConfigError(
            f"{folder} is for {', '.join(has)} and not for {', '.join(lacking)}; remove that folder to make it anew"
        )


def _signed_by(cert: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        cert.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


# Files ----------------------------------------------------------------------------------------------------------------


def _write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """All files or none, in a folder that did not exist; keys are never readable by others, not even at first."""
    draft = folder.parent / f".{folder.name}.{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir(mode=0o700)
        for name, content in files.items():
            mode = 0o600 if name == "key.pem" else 0o644
            with os.fdopen(os.open(draft / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
        draft.rename(folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise ConfigError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; `fedtrio certs` makes it") from error


def _read_cert(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not a certificate in PEM format; make it anew by `fedtrio certs`") from error


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not a plain private key in PEM format; make it by `fedtrio certs`") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an ECDSA key; make it by `fedtrio certs`")
    return key


def _pem(thing: x509.Certificate | ec.EllipticCurvePrivateKey) -> bytes:
    if isinstance(thing, x509.Certificate):
        return thing.public_bytes(serialization.Encoding.PEM)
    return thing.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


# X.509 ----------------------------------------------------------------------------------------------------------------


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )


def _key_usage(**uses: bool) -> x509.KeyUsage:
    kinds = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
        *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{kind: uses.get(kind, False) for kind in kinds})


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _common_name(name: x509.Name) -> str:
    return ", ".join(str(part.value) for part in name.get_attributes_for_oid(NameOID.COMMON_NAME))


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _HOST.fullmatch(host):  # an address with https:// or a port would never be the name that sites dial
        raise ConfigError(f"{host!r} is neither a host name nor an address; write example.org or 192.0.2.1")
    return x509.DNSName(host)


def _hosts_of(cert: x509.Certificate) -> tuple[str, ...]:
    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(n.value) for n in names if isinstance(n, x509.DNSName | x509.IPAddress))


def _day(when: datetime) -> str:
    return when.strftime("%Y-%m-%d %H:%M UTC")
