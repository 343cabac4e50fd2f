"""The site's end where a Flower SuperNode carries the frames: a Unix socket, and one question after the other.

Who may open the socket may ask; nothing listens at a port. A question, and its answer, is a head (JSON) and a body:

    {"ask": "hello", "session", "site"}, the settings (JSON)                          → {"greeting"}
    {"ask": "turn", "session", "run", "round", "turn", "start", "beside"}, a frame    → {"beside"}, the next frame
    {"ask": "nothing"}                                                                → {}
    {"ask": "dial", "url", "token"}, certificates (JSON)         → {} once the site is at the server's HTTPS wire

`beside` is another small frame that is answered in the same go, in base64. An error is {"error", "reason"}: "stranger"
(the site has not been told this session's settings) or "refused".
"""

from __future__ import annotations

import base64
import json
import os
import queue
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FedtrioError, WireError
from .dial import Door, dial

HEAD_BYTES = 1 << 20
SPEAK_S = 30.0  # whoever has opened the socket says something within this time
PATIENCE_S = 30.0  # for an HTTPS wire that is away: the server calls again
LONGEST_PATH = 100  # bytes; systems allow 104 to 108

OnEvent = Callable[[dict[str, Any]], None]


def serve(
    path: Path, name: str, door: Door, scratch: Path, *, limit: int = 1 << 30, on_event: OnEvent = lambda event: None
) -> None:
    """Answer at the socket `path` until the process is stopped.

    `name` is that by which the SuperNode is registered, `scratch` is for the certificates of a call, `limit` the
    longest frame in bytes. ConfigError where the socket can't be made. What the door raises at a turn passes, once the
    server has been told.
    """
    counter = _Counter(name, door, scratch, limit, on_event)
    with _listening(path) as listener:
        on_event({"event": "waiting", "reason": f"for a SuperNode at {path}"})
        while True:
            with suppress(OSError, EOFError), listener.accept() as line:  # who asked may have gone
                if line.poll(SPEAK_S):
                    counter.answer(line)


@contextmanager
def _listening(path: Path) -> Iterator[Listener]:
    """The socket, for this user and group alone; one that a dead process left is replaced."""
    name = os.fsencode(os.path.abspath(path))
    if len(name) > LONGEST_PATH:
        raise ConfigError(f"--local {path}: a socket's path has at most {LONGEST_PATH} bytes, this one {len(name)}")
    with suppress(OSError):
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise ConfigError(f"--local {path} exists and is no socket; choose another path")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(name) == 0:
                raise ConfigError(f"--local {path}: another site's process serves there; stop one of the two")
        path.unlink()
    before = os.umask(0o117)
    try:
        listener = Listener(os.fsdecode(name), "AF_UNIX", backlog=16)
    except OSError as error:
        raise ConfigError(f"--local {path} can't be made: {error.strerror}; choose another path") from error
    finally:
        os.umask(before)
    with listener:  # closing removes the file
        yield listener


class _Counter:
    """Where questions are answered."""

    def __init__(self, name: str, door: Door, scratch: Path, limit: int, on_event: OnEvent) -> None:
        self._name, self._door, self._scratch, self._limit, self._on_event = name, door, scratch, limit, on_event
        self._session = ""
        self._line: threading.Thread | None = None  # at an HTTPS wire
        self._fault: BaseException | None = None  # what ended the last line

    def answer(self, line: Connection) -> None:
        """One question. What the door raises at a turn passes."""
        fault: BaseException | None = None
        head, body = line.recv_bytes(HEAD_BYTES), line.recv_bytes(self._limit)
        try:
            said, frame = self._answered(head, body)
        except Exception as error:
            said, frame = {"error": "refused", "reason": str(error) or type(error).__name__}, b""
            if isinstance(error, FedtrioError):
                self._on_event({"event": "refused", "reason": said["reason"]})
            if isinstance(error, _AtTurn):
                fault = error.__cause__
            elif not isinstance(error, FedtrioError):
                fault = error
        with suppress(OSError):  # who asked has gone, and the answer counts for nothing
            line.send_bytes(json.dumps(said).encode())
            line.send_bytes(frame)
        if fault is not None:
            raise fault

    def _answered(self, head: bytes, body: bytes) -> tuple[dict[str, Any], bytes]:
        try:
            asked = json.loads(head)
            if asked["ask"] == "nothing":
                return {}, b""
            self._leave()
            what = {"hello": self._hello, "turn": self._turn, "dial": self._dial}[asked["ask"]]
            if asked.get("notice"):
                self._on_event({"event": "refused", "reason": str(asked["notice"])})
            return what(asked, body)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WireError("the question is not understood; are both sides of the same version?") from error

    def _hello(self, asked: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        self._session = ""
        if asked["site"] != self._name:
            raise WireError(f"this site is {self._name}, and the SuperNode beside it is registered as {asked['site']}")
        self._door.welcome(json.loads(body))
        self._session = str(asked["session"])
        self._on_event({"event": "joined", "reason": ""})
        return {"greeting": self._door.greeting()}, b""

    def _turn(self, asked: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        session, run, round = str(asked["session"]), str(asked["run"]), int(asked["round"])
        turn, start, beside = int(asked["turn"]), bool(asked["start"]), base64.b64decode(asked["beside"])
        if session != self._session:
            return {"error": "stranger", "reason": "the site was started anew"}, b""
        try:
            frame = self._door.answer(session, run, round, turn, start, body)
            account = self._door.answer(session, run, round, turn, False, beside) if beside else b""
        except Exception as error:
            raise _AtTurn(str(error)) from error
        return {"beside": base64.b64encode(account).decode()}, frame

    # Called to an HTTPS wire ------------------------------------------------------------------------------------------

    def _dial(self, asked: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        url, token, files = str(asked["url"]), str(asked["token"]), json.loads(body)
        pem = {name: str(files[name]).encode() for name in ("ca.pem", "cert.pem", "key.pem")}
        heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._line = threading.Thread(target=self._on_line, args=(url, token, pem, heard), daemon=True)
        self._line.start()
        if why := heard.get():
            self._leave()
            raise WireError(why)
        return {}, b""

    def _on_line(self, url: str, token: str, pem: dict[str, bytes], heard: queue.SimpleQueue[str]) -> None:
        def hear(event: dict[str, Any]) -> None:
            if event["event"] == "joined":
                heard.put("")
            self._on_event(event)

        try:
            self._scratch.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._scratch, prefix="call-") as folder:  # of mode 700
                for name, content in pem.items():
                    (Path(folder) / name).write_bytes(content)
                door = _Bearer(self._door, token)
                dial(url, Path(folder), door, limit=self._limit, patience=PATIENCE_S, on_event=hear)
        except WireError as error:  # the line is lost; the server will call again, or not
            heard.put(str(error))
            self._on_event({"event": "left", "reason": str(error)})
        except BaseException as error:
            self._fault = error
            heard.put(str(error) or type(error).__name__)

    def _leave(self) -> None:
        """Another question comes only when the line is no more needed: wait for its end. Raises what ended it."""
        if self._line is not None:
            self._line.join(4 * PATIENCE_S)
            if self._line.is_alive():
                raise WireError("the site is still at work for an HTTPS wire")
            self._line = None
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise _AtTurn(str(fault)) from fault


class _AtTurn(FedtrioError):
    """What the site's program raised, which ends the site."""


class _Bearer:
    """The same door, whose greeting shows a token."""

    def __init__(self, door: Door, token: str) -> None:
        self._door, self._token = door, token
        self.welcome, self.regain, self.answer = door.welcome, door.regain, door.answer

    def greeting(self) -> dict[str, Any]:
        return {**self._door.greeting(), "token": self._token}
