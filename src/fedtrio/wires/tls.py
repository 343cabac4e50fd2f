"""TLS for both ends of the HTTPS wire, and what went wrong in words.

A folder holds `ca.pem`, `cert.pem` and `key.pem`, as `fedtrio certs` writes them. Each end shows its certificate, and
accepts the other's only if the authority in `ca.pem` signed it.
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError


class _Telling(ssl.SSLObject):
    """A server's end of TLS that tells why it refuses.

    When a handshake fails, asyncio drops the connection before the alert is sent, and the other side sees no cause. So
    the failure is kept back: the alert goes out, and what else comes is thrown away until the other side closes, or the
    handshake's time is up.
    """

    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO
    failed = False

    def do_handshake(self) -> None:
        if not self.failed:
            try:
                return super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError:
                self.failed = True
                if not self.outgoing.pending:  # no alert: the other side doesn't speak TLS
                    raise
        self.incoming.read()
        raise ssl.SSLWantReadError


class _ServerContext(ssl.SSLContext):
    sslobject_class = _Telling

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *rest: Any, **more: Any) -> ssl.SSLObject:
        end = super().wrap_bio(incoming, outgoing, *rest, **more)
        end.incoming, end.outgoing = incoming, outgoing  # type: ignore[attr-defined]
        return end


def server_context(folder: Path) -> ssl.SSLContext:
    """TLS 1.2 or later; a client without a certificate of our authority gets no further. ConfigError: see `_load`."""
    context = _ServerContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # connections are kept open; nothing is resumed
    return _load(context, Path(folder))


def site_context(folder: Path) -> ssl.SSLContext:
    """TLS 1.2 or later; the server must hold a certificate of our authority for the host dialled. ConfigError."""
    return _load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), Path(folder))


def _load(context: ssl.SSLContext, folder: Path) -> ssl.SSLContext:
    """ConfigError where a file is missing, is no PEM, or the key belongs to another certificate."""
    missing = [name for name in ("ca.pem", "cert.pem", "key.pem") if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder} lacks {', '.join(missing)}; `fedtrio certs` makes the folders of certificates")
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(folder / "ca.pem")
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            why = "key.pem is not the key of cert.pem; bring back the two that belong together"
        else:
            why = "a file in it is broken or not in PEM format; copy the folder again, or make it by `fedtrio certs`"
        raise ConfigError(f"the certificates in {folder} cannot be used: {why}") from error
    except OSError as error:
        raise ConfigError(f"cannot read the certificates in {folder}: {error.strerror}") from error
    return context


def name_of(peercert: dict[str, Any] | None) -> str:
    """The one common name of a peer's verified certificate; empty where there is none, or more than one."""
    names = [value for part in (peercert or {}).get("subject", ()) for key, value in part if key == "commonName"]
    return names[0] if len(names) == 1 else ""


# What went wrong ------------------------------------------------------------------------------------------------------

# OpenSSL's reasons: alerts are what the server said of us, the rest is what we found.
_REASONS = {
    "CERTIFICATE_REQUIRED": "the server asks for a certificate and this site showed none; "
    "dial with the site's folder that `fedtrio certs` made",
    "UNKNOWN_CA": "the server does not know the authority that signed this site's certificate; "
    "use the folder that was made with the server's certificates",
    "CERTIFICATE_EXPIRED": "this site's certificate has expired; make it anew by `fedtrio certs`",
    "BAD_CERTIFICATE": "the server finds this site's certificate not yet valid or broken; "
    "check the clocks of both machines, then make it anew by `fedtrio certs`",
    "CERTIFICATE_REVOKED": "this site's certificate was revoked; ask for a new one",
    "UNSUPPORTED_CERTIFICATE": "this certificate is not one for a site; use a site's folder, not the server's",
    "CERTIFICATE_UNKNOWN": "the server cannot use this site's certificate; make it anew by `fedtrio certs`",
    "HANDSHAKE_FAILURE": "the server broke off the TLS handshake, perhaps for want of a certificate; "
    "dial with the site's folder that `fedtrio certs` made",
    "ALERT_PROTOCOL_VERSION": "the other side speaks an older or newer TLS than 1.2 and 1.3; update it",
    "UNSUPPORTED_PROTOCOL": "the other side speaks an older TLS than 1.2; update it",
}
_PLAIN = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG"}

# X509_V_ERR_…: what is wrong with the certificate that the server showed.
_VERIFY = {
    9: "the server's certificate is not yet valid; check the clocks of both machines",
    10: "the server's certificate has expired; make a new one by `fedtrio certs`",
    62: "the server's certificate is for other hosts than the one dialled; "
    "dial a host it names, or make one for this host by `fedtrio certs --host`",
    64: "the server's certificate is for other addresses than the one dialled; "
    "dial a host it names, or make one for this address by `fedtrio certs --host`",
}
_UNKNOWN_ISSUER = {2, 7, 18, 19, 20, 21}
_WRONG_PURPOSE = {26}

_ERRNO = {
    errno.ECONNREFUSED: "nothing listens there (connection refused); check host and port, and that the server runs",
    errno.ECONNRESET: "the other side broke the connection off (connection reset); check that it still runs",
    errno.EPIPE: "the other side closed the connection; check that it still runs",
    errno.EHOSTUNREACH: "there is no route to that host; check the address, the network and the firewall",
    errno.ENETUNREACH: "the network cannot be reached; check this machine's connection",
    errno.ETIMEDOUT: "the host did not answer in time; check the address and the firewall",
    errno.EADDRNOTAVAIL: "that address cannot be used on this machine; check it",
    errno.EMFILE: "this process has too many open files; raise `ulimit -n`",
}


def explain(error: BaseException) -> str:
    """One sentence on an error of TLS, connection or proxy: where, the cause, and what to do."""
    return f"{_where(error)}: {_why(error)}"


def is_final(error: BaseException) -> bool:
    """Whether trying again can't help: a matter of certificates, protocol or proxy settings."""
    for each in _chain(error):
        if type(each).__name__ == "ProxyError" and str(each)[:3] in ("401", "403", "407"):
            return True
        if type(each).__name__ == "UnsupportedProtocol" or _is_tls_record(each):
            return True
        if isinstance(each, ssl.SSLCertVerificationError):
            return True
        if isinstance(each, ssl.SSLError) and (_reason(each) in _PLAIN or _alert(each)):
            return True
    return False


def _why(error: BaseException) -> str:
    for each in reversed(list(_chain(error))):  # the innermost knows best
        if isinstance(each, ssl.SSLCertVerificationError):
            return _unverified(each)
        if isinstance(each, ssl.SSLError):
            if _reason(each) in _PLAIN:
                return (
                    "what answers there does not speak TLS; check the port, and dial https only where https is served"
                )
            if _alert(each):
                return _alert(each)
            if isinstance(each, ssl.SSLEOFError | ssl.SSLZeroReturnError) or "EOF" in str(each):
                return "the other side closed the connection during TLS; check that it runs, and what stands between"
            return f"TLS failed ({_reason(each) or each}); check that host and port are the server's"
        if isinstance(each, socket.gaierror):
            return "this host name is not known (it did not resolve); check its spelling and the name server"
        if isinstance(each, TimeoutError) or type(each).__name__.endswith(("ReadTimeout", "WriteTimeout")):
            return _ERRNO[errno.ETIMEDOUT]
        if isinstance(each, OSError) and each.errno in _ERRNO:
            return _ERRNO[each.errno]
        if _is_tls_record(each):
            return "a TLS server answers there, and it was asked without TLS; dial https:// in place of http://"
    return _of_http(error)


def _of_http(error: BaseException) -> str:
    kind, text = type(error).__name__, str(error)
    if kind == "ProxyError":
        return f"the proxy would not connect ({text}); check HTTPS_PROXY and NO_PROXY, and what the proxy allows"
    if kind == "UnsupportedProtocol":
        return "the address must begin with https://"
    if kind.endswith("Timeout"):
        return _ERRNO[errno.ETIMEDOUT]
    if "disconnected" in text:
        return "the other side closed the connection without a word; check that it runs, and that both ends speak TLS"
    if kind == "RemoteProtocolError":
        return "what answers there does not speak HTTP; check host and port"
    return f"{text or kind}; check host and port"


def _unverified(error: ssl.SSLCertVerificationError) -> str:
    code = error.verify_code
    if code in _VERIFY:
        return _VERIFY[code]
    if code in _UNKNOWN_ISSUER:
        return (
            "the server's certificate is signed by an authority that this site does not know; "
            "use the ca.pem that was made with the server's certificates, and check that no one stands between"
        )
    if code in _WRONG_PURPOSE:
        return "that certificate is not one for a server; start the server with the server's folder"
    return f"the server's certificate is not accepted ({error.verify_message}); make a new one by `fedtrio certs`"


def _alert(error: ssl.SSLError) -> str:
    return next((text for key, text in _REASONS.items() if _reason(error).endswith(key)), "")


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "").upper().replace(" ", "_")


def _is_tls_record(error: BaseException) -> bool:
    """HTTP was expected and a TLS alert came."""
    return "\\x15\\x03" in str(error)


def _where(error: BaseException) -> str:
    """The URL of the request, where the error knows it."""
    try:
        url = error.request.url  # type: ignore[attr-defined]  # httpx.RequestError
    except (AttributeError, RuntimeError):
        return "cannot connect"
    return f"cannot reach {url.scheme}://{url.netloc.decode('ascii', 'replace')}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """From the outermost to the first. httpcore says `from None`, which hides the cause and keeps the context."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
