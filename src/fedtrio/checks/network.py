"""Certificates, and the way to the server; needs no torch."""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from ..certs import check, check_site, describe
from ..errors import ConfigError, WireError
from ..wires import tls
from .finding import Finding, Found

SOON = timedelta(days=30)  # a certificate that ends within this time is warned of
SKEW = timedelta(minutes=5)
PATIENCE_S = 10.0
PROXIES = ("https_proxy", "all_proxy", "no_proxy")
HERE = {"localhost", "127.0.0.1", "::1"}


def certificates(folder: Path, site: bool) -> Found:
    """The folder, whose it is and how long it is valid. ConfigError: see `certs.check`."""
    check_site(folder) if site else check(folder)
    found = describe(folder)
    if not site and not found.hosts:
        raise ConfigError(f"{folder} is that of the site {found.subject}; add --site, or name the server's folder")
    left = found.not_after - datetime.now(UTC)
    hosts = f", reached as {', '.join(found.hosts)}" if found.hosts else ""
    text = f"{found.subject}{hosts}, signed by {found.issuer}, valid till {found.not_after:%Y-%m-%d}"
    if left < SOON:
        yield Finding("certificates", "warning", f"{text}, {left.days} days from now; make a new one (docs/deploy.md)")
    elif found.hosts and set(found.hosts) <= HERE:
        text += "; other machines can't reach it by these names: `fedtrio certs --host` takes others"
        yield Finding("certificates", "warning", text)
    else:
        yield Finding("certificates", "ok", text)


def server(url: str, certs: Path | None) -> Found:
    """Proxy, name, port, TLS, and whether this site is on the server's list. ConfigError, WireError."""
    try:
        target = httpx.URL(url)
    except httpx.InvalidURL:
        target = httpx.URL()
    if target.scheme != "https" or not target.host:
        raise ConfigError(f"{url!r} is no address of a server; write https://host:8443")
    proxy = _proxy(target.host, target.port)
    yield Finding("proxy", "ok", _proxies(target.host, proxy))
    if proxy is None:
        addresses = _connect(target.host, target.port or 443)
        yield Finding("network", "ok", f"{target.host} is {addresses}, and something listens at {target.port or 443}")
    if certs is None:
        yield Finding("server", "warning", "add --certs with this site's folder to check TLS and the list of sites")
        return
    context = tls.site_context(certs)
    began = datetime.now(UTC)
    try:
        with httpx.Client(verify=context, timeout=PATIENCE_S, headers={"Accept-Encoding": "identity"}) as client:
            answer = client.get(f"{url.rstrip('/')}/v1/doctor")  # a path that no server has: it says so to its sites
    except httpx.TransportError as error:
        why = tls.explain(error)
        clock = f" (this machine's clock says {began:%Y-%m-%d %H:%M} UTC)" if "clocks" in why else ""
        raise WireError(why + clock) from error
    yield from _reply(url, answer)


def _reply(url: str, answer: Any) -> Found:
    """What stands behind an address, by its reply. WireError."""
    try:
        said = answer.json()
        error, reason = str(said["error"]), str(said["reason"])
    except (ValueError, KeyError, TypeError):
        raise WireError(
            f"{url} answers with status {answer.status_code} and not as a fedtrio server does; check host and port, "
            "and that no proxy answers in its place"
        ) from None
    if error != "no such path":
        raise WireError(f"{url} refuses this site: {reason}")
    yield Finding("server", "ok", f"{url} knows this site ({answer.elapsed.total_seconds() * 1000:.0f} ms)")
    when = answer.headers.get("date")
    if when and (skew := abs(datetime.now(UTC) - _http_date(when))) > SKEW:
        yield Finding("clock", "warning", f"this clock and the server's differ by {skew}; set both by NTP")


def _http_date(text: str) -> datetime:
    try:
        return parsedate_to_datetime(text).astimezone(UTC)
    except ValueError:
        return datetime.now(UTC)


def _connect(host: str, port: int) -> str:
    """The host's addresses, once one of them took a connection. WireError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        socket.create_connection((host, port), PATIENCE_S).close()
    except OSError as error:
        raise WireError(f"{host}:{port}: {tls.explain(error).partition(': ')[2]}") from error
    return ", ".join(dict.fromkeys(str(each[4][0]) for each in found))


def _proxy(host: str, port: int | None) -> str | None:
    """The proxy that a connection to that host goes through, as httpx chooses it."""
    if urllib.request.proxy_bypass(f"{host}:{port or 443}") or urllib.request.proxy_bypass(host):
        return None
    found = urllib.request.getproxies()
    return found.get("https") or found.get("all")


def _proxies(host: str, proxy: str | None) -> str:
    if proxy is not None:
        return f"{host} is reached through {_without_password(proxy)}; it must let CONNECT through and not open TLS"
    names = [name for name in os.environ if name.lower() in PROXIES]
    given = f" ({', '.join(sorted(names))} set, and not for this host)" if names else ""
    return f"none for {host}{given}"


def _without_password(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
