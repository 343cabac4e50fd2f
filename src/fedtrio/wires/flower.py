"""The server's end of the Flower wire, inside a ServerApp: each frame is one Flower message, opaque to Flower.

At a node a ClientApp hands it on to the site's worker (`local`), which tells what heads and bodies hold. A site is the
SuperNode that was registered under its name, so who it is stands in the SuperNode's key and never in a frame.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

from ..errors import WireError

POLL_S = 0.5
LOOK_S = 5.0  # between two looks at who is online
AGAIN_S = 10.0  # before a site that did not answer a hello is asked again
STALE_S = 600.0  # until a message that is of no round is dropped
NUDGE_S = 60.0  # without any answer, before silent nodes are sent another small message

Head = dict[str, Any]
Asked = dict[str, str]  # message and its site


class Post(Protocol):
    """Messages to nodes, of a head and a body."""

    def nodes(self) -> list[tuple[str, int]]:
        """Name and number of all nodes that are online; the name is empty where a node has none."""
        ...

    def push(self, node: int, head: Head, body: bytes, round: int, seconds: float | None) -> str:
        """Send; the message is good for so many seconds. Its name."""
        ...

    def pull(self, messages: Collection[str]) -> list[tuple[str, Head, bytes]]:
        """Which of these messages have been answered, and how."""
        ...


class GridPost:
    """Over the Grid of a ServerApp, whose messages are of type `query`."""

    def __init__(self, grid: Any) -> None:
        from flwr.app import ConfigRecord, Message, RecordDict  # pyright: ignore[reportMissingImports]

        self._grid, self._message, self._record, self._records = grid, Message, ConfigRecord, RecordDict

    def nodes(self) -> list[tuple[str, int]]:
        """As Flower's registry has them."""
        return [(node.name, node.node_id) for node in self._grid.get_nodes()]

    def push(self, node: int, head: Head, body: bytes, round: int, seconds: float | None) -> str:
        """Head and body are records of their own, so that Flower keeps a body sent to many sites once."""
        records = {"head": self._record({"json": json.dumps(head)}), "body": self._record({"bytes": body})}
        message = self._message(self._records(records), node, "query", ttl=seconds, group_id=str(round))
        names = list(self._grid.push_messages([message]))
        if not names or names[0] is None:
            raise WireError("the SuperLink does not take the message; look into its log")
        return names[0]

    def pull(self, messages: Collection[str]) -> list[tuple[str, Head, bytes]]:
        """What a ClientApp could not say itself, Flower says."""
        return [
            (reply.metadata.reply_to_message_id, *self._read(reply)) for reply in self._grid.pull_messages(messages)
        ]

    @staticmethod
    def _read(reply: Any) -> tuple[Head, bytes]:
        if reply.has_error():
            return {"error": "failed", "reason": str(reply.error.reason).strip() or f"code {reply.error.code}"}, b""
        try:
            return dict(json.loads(reply.content["head"]["json"])), bytes(reply.content["body"]["bytes"])
        except (KeyError, TypeError, ValueError):
            return {"error": "refused", "reason": "its ClientApp is not ours; run the app that this server has"}, b""


class Flower:
    """The wire to the sites whose SuperNodes are registered under their names.

    `settings` are sent to each site once. `welcome(site, greeting)` raises ValueError for a site that does not fit.
    `beside(round)` is a frame that will be asked soon after any of that round: it travels along, its answer is kept.
    """

    abreast = None  # sites that work at the same time: all

    def __init__(
        self,
        post: Post,
        sites: Collection[str],
        settings: Mapping[str, Any],
        welcome: Callable[[str, dict], Any] = lambda site, greeting: None,
        *,
        beside: Callable[[int], bytes] = lambda round: b"",
        limit: int = 1 << 30,
        on_event: Callable[[dict], None] = lambda event: None,
    ) -> None:
        self._post, self._names, self._beside = post, sorted(sites), beside
        self._settings = json.dumps(dict(settings)).encode()
        self.welcome, self.limit, self.on_event = welcome, limit, on_event
        self._session = secrets.token_hex(16)
        self._run, self._round, self._turn = "", 0, 0
        self._end: float | None = None  # the round's, in seconds of the monotonic clock
        self._known: set[str] = set()  # who has the settings
        self._again: dict[str, float] = {}  # when to say hello again
        self._begun: set[str] = set()  # who has had a frame in this round
        self._out: set[str] = set()  # who has no part in the rest of this round
        self._notices: dict[str, str] = {}  # refusals that a site has not been told yet
        self._kept: dict[str, tuple[bytes, bytes]] = {}  # the frame beside and its answer
        self._moved = 0.0  # when a message last went, or an answer came
        self._nudges: dict[str, str] = {}  # messages that nudge, and their sites
        self._told: set[tuple[str, str]] = set()

    @property
    def sites(self) -> list[str]:
        """Names of the sites that are admitted, sorted."""
        return list(self._names)

    def start_round(self, run: str, round: int, deadline: float | None) -> None:
        """Let all sites take part again; answers after `deadline` seconds from now (None: no limit) are too late."""
        self._run, self._round = run, round
        self._end = None if deadline is None else time.monotonic() + deadline
        self._begun.clear()
        self._out.clear()

    def exchange(self, frames: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes | None]]:
        """Deliver each frame and yield each answer as it arrives, or None where its frame could not leave.

        Sites that vanish later, or are late, are left out.
        """
        nodes, asked, turns = self._nodes(), Asked(), dict[str, tuple[Head, bytes]]()
        for site, frame in frames:
            kept = self._kept.get(site)
            if kept is not None and kept[0] == frame:
                yield site, kept[1]
            elif site in self._out:
                yield site, None
            elif site not in nodes:
                self._drop(site, "absent", "its SuperNode is not online")
                yield site, None
            else:
                turns[site] = self._turn_of(site), frame
                first = turns[site] if site in self._known else self._hello(site)
                asked[self._push(nodes[site], *first, self._end)] = site
        for site, head, body in self._answers(asked, self._end):
            turn, frame = turns[site]
            if "greeting" in head and self._greets(site, head):
                asked[self._push(nodes[site], turn, frame, self._end)] = site
            elif head.get("error") == "stranger" and turn["start"]:
                asked[self._push(nodes[site], *self._hello(site), self._end)] = site
            elif head.get("error"):
                event = "lost place" if head["error"] == "stranger" else str(head["error"])
                self._drop(site, event, str(head.get("reason")))
            elif len(body) > self.limit:
                self._drop(site, "refused", f"its answer has {len(body):,} bytes, {self.limit:,} are accepted")
            elif site not in self._out:
                self._keep(site, turn, head)
                yield site, body

    def refuse(self, site: str, reason: str) -> None:
        """The site's last answer is not accepted: it is out until the next `start_round`, and then told why."""
        self._notices[site] = reason
        self._drop(site, "refused", reason, gone=False)

    def wait_for(self, number: int, timeout: float | None = None) -> list[str]:
        """Say hello to whoever is online; who answered, once there are so many. WireError after `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        asked = Asked()
        while True:
            nodes, now = self._nodes(), time.monotonic()
            there = [site for site in self._names if site in self._known and site in nodes]
            if len(there) >= number:
                return there
            if end is not None and now >= end:
                missing = ", ".join(site for site in self._names if site not in there)
                raise WireError(
                    f"{len(there)} of {number} sites answered within {timeout:g} s; missing: {missing}; each needs its "
                    "SuperNode online and `fedtrio site --local` beside it"
                )
            for site in nodes.keys() - self._known - set(asked.values()):
                if now >= self._again.get(site, 0.0):
                    asked[self._push(nodes[site], *self._hello(site), now + STALE_S)] = site
            soon = min(end or now + 2 * LOOK_S, now + 2 * LOOK_S)
            for site, head, _ in self._answers(asked, soon, wait=True):
                if self._greets(site, head) and len(self._known) >= number:
                    break
            if not asked:
                time.sleep(POLL_S)

    def call(self, questions: Mapping[str, tuple[Head, bytes]], seconds: float) -> None:
        """Ask these sites for something that is not of a round; who can't do it is told of as an event."""
        nodes, end = self._nodes(), time.monotonic() + seconds
        asked = {self._push(nodes[site], *question, end): site for site, question in questions.items() if site in nodes}
        for site, head, _ in self._answers(asked, end):
            if head.get("error"):
                self._tell(head["error"], site, str(head.get("reason")))

    def finish(self, reason: str = "") -> None:
        """Nobody waits to be told: a site's worker stays for the next run."""

    close = finish

    # Messages ---------------------------------------------------------------------------------------------------------

    def _hello(self, site: str) -> tuple[Head, bytes]:
        return {"ask": "hello", "session": self._session, "site": site}, self._settings

    def _turn_of(self, site: str) -> Head:
        self._turn += 1
        start = site not in self._begun
        self._begun.add(site)
        where = {"session": self._session, "run": self._run, "round": self._round, "turn": self._turn, "start": start}
        notice = {"notice": self._notices.pop(site)} if site in self._notices else {}
        return {"ask": "turn", **where, "beside": base64.b64encode(self._beside(self._round)).decode(), **notice}

    def _push(self, node: int, head: Head, body: bytes, end: float | None) -> str:
        """A message that is good until `end`."""
        self._moved = time.monotonic()
        left = None if end is None else max(1.0, end - self._moved)
        return self._post.push(node, head, body, self._round, left)

    def _answers(self, asked: Asked, end: float | None, wait: bool = False) -> Iterator[tuple[str, Head, bytes]]:
        """Each answer as it comes, and an error for each site whose node goes; at the end, unless all `wait`, for all.

        More may be asked meanwhile.
        """
        looked = time.monotonic()
        while asked:
            for message, head, body in self._post.pull([*asked, *self._nudges]):
                if self._nudges.pop(message, None) is None:
                    yield asked.pop(message), head, body
                    self._moved = time.monotonic()
            now = time.monotonic()
            if end is not None and now >= end:
                if not wait:
                    yield from ((asked.pop(m), _LATE, b"") for m in list(asked))
                return
            if asked and now - looked >= LOOK_S:
                looked, nodes = now, self._nodes()
                for message in [m for m, site in asked.items() if site not in nodes]:
                    yield asked.pop(message), {"error": "vanished", "reason": "its SuperNode went offline"}, b""
                if now - self._moved >= NUDGE_S:
                    self._nudge(nodes, set(asked.values()) - set(self._nudges.values()))
            if asked:
                time.sleep(POLL_S)

    def _nudge(self, nodes: Mapping[str, int], sites: Collection[str]) -> None:
        """A SuperNode whose last run ended while it received holds each answer back until its next message comes."""
        for site in sorted(sites & nodes.keys()):
            end = time.monotonic() + STALE_S
            self._nudges[self._push(nodes[site], {"ask": "nothing"}, b"", end)] = site

    def _greets(self, site: str, head: Head) -> bool:
        """Whether a site's answer to a hello lets it in."""
        try:
            if not head.get("error"):
                self.welcome(site, dict(head["greeting"]))
        except (KeyError, TypeError, ValueError) as error:
            head = {"error": "refused", "reason": str(error)}
        if head.get("error"):
            self._again[site] = time.monotonic() + AGAIN_S
            self._drop(site, head["error"], str(head.get("reason")))
            return False
        self._known.add(site)
        self._told = {told for told in self._told if told[0] != site}
        self.on_event({"event": "joined", "site": site, "reason": ""})
        return True

    def _keep(self, site: str, turn: Head, head: Head) -> None:
        if turn["beside"] and isinstance(head.get("beside"), str):
            self._kept[site] = base64.b64decode(turn["beside"]), base64.b64decode(head["beside"])

    # Sites ------------------------------------------------------------------------------------------------------------

    def _nodes(self) -> dict[str, int]:
        """The sites' nodes that are online. WireError where two have one name."""
        found: dict[str, int] = {}
        for name, node in self._post.nodes():
            if name in found:
                raise WireError(f"two SuperNodes are registered as {name}; unregister one of them")
            if name in self._names:
                found[name] = node
            elif name:
                self._tell("refused", name, f"{name} is not on the server's list of sites")
            else:
                why = "it has no name: register it by `flwr supernode register KEY --name SITE`"
                self._tell("refused", f"SuperNode {node}", why)
        return found

    def _drop(self, site: str, event: str, reason: str, gone: bool = True) -> None:
        """Go on without this site until the next round."""
        self._out.add(site)
        if gone:
            self._known.discard(site)
        self._tell(event, site, reason)

    def _tell(self, event: str, site: str, reason: str) -> None:
        """Once, until the site has joined again or the reason is another."""
        if (site, f"{event} {reason}") not in self._told or event == "late":
            self._told.add((site, f"{event} {reason}"))
            self.on_event({"event": event, "site": site, "reason": reason})


_LATE: Head = {"error": "late", "reason": "no answer before the deadline"}
