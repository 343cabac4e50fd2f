"""The temporal cache: a text's activations travel only where they have moved since they last did.

After SplitCom (arXiv:2602.10564): both sides keep h̃ᵢ, what last travelled of text i. A site sends hᵢ where
cos(hᵢ, h̃ᵢ) < θ, and otherwise the server goes on with h̃ᵢ; the gradient that comes back is that at h̃ᵢ. With `fixed` θ
stays; with `adaptive` it rises by a step after a round in which the mean training loss rose, and falls by one otherwise
(bang-bang). Both sides' copies are committed with the round, each with its round's number; where the two numbers
differ, because one side was lost in mid-round, the site starts with an empty one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from urllib.parse import quote

import torch
from torch import Tensor

from ..errors import MessageError
from ..message import Fact, Message, Reply
from ..models.adapter import AdaptedModel
from ..models.train import Adapter
from .lab import Inbox, Lab, Site, State
from .split_server import lengths_of
from .split_settings import SplitSettings

GROUP, ROUND = "cache", "round"


class SiteCache:
    """A site's side, for one round; `kept` is the next round's memory."""

    def __init__(self, site: Site, first: Reply) -> None:
        known: Mapping[str, Tensor] = site.memory.get(GROUP, {})
        same = ROUND in known and int(known[ROUND]) == int(first.fact("cached"))
        self.threshold = float(first.fact("threshold"))
        self.kept = {**(known if same else {}), ROUND: torch.tensor(site.round)}

    def nbytes(self, site: Site, model: AdaptedModel) -> int:
        """Bytes of all texts' activations."""
        element = torch.empty((), dtype=model.dtype).element_size()
        return int(site.data.encoded.lengths.sum()) * model.width * element

    def only_moved(
        self, h_ND: Tensor, leaving_ND: Tensor, lengths: Iterable[int], texts: Iterable[int]
    ) -> tuple[dict[str, Tensor], dict[str, Fact]]:
        """The tensors and facts that travel for a batch.

        `h_ND` is compared, and `leaving_ND` is what leaves of it: the same, or clipped and noised.
        """
        sizes, names = list(lengths), [str(text) for text in texts]
        fresh, rows = "", []
        for name, h_TD, out_TD in zip(names, h_ND.detach().split(sizes), leaving_ND.split(sizes), strict=True):
            moved = name not in self.kept or cosine(h_TD, self.kept[name]) < self.threshold
            fresh += "01"[moved]
            if moved:
                self.kept[name] = h_TD.clone()
                rows.append(out_TD)
        return {"h": torch.cat(rows)} if rows else {}, {"texts": " ".join(names), "fresh": fresh}


class ServerCache:
    """The server's side, for one round: what each site has sent, kept only for those that end the round."""

    def __init__(self, split: SplitSettings, lab: Lab, state: State) -> None:
        self._split, self._lab = split, lab
        self._state: Adapter = state.get(GROUP, {})
        self._sent: dict[str, dict[str, Tensor]] = {}

    @staticmethod
    def setup(split: SplitSettings) -> State:
        """Nothing is known yet, and θ is that of the settings."""
        return {GROUP: {"threshold": torch.tensor(split.cache_threshold, dtype=torch.float64)}}

    def start(self, site: str) -> dict[str, Fact]:
        """What a site is told with its half: θ, and of which round this copy is."""
        if self._split.cache == "none":
            return {}
        known = self._state.get(self._name(site, ROUND))
        return {"cached": 0 if known is None else int(known), "threshold": float(self._state["threshold"])}

    def filled(self, inbox: Inbox) -> Inbox:
        """The same messages with all rows; a site that points to what it never sent is out for the round."""
        if self._split.cache == "none":
            return inbox
        whole = {s: self._whole(s, reply) if "fresh" in reply.facts else reply for s, reply in inbox.items()}
        return {site: reply for site, reply in whole.items() if reply is not None}

    def commit(self, state: State, sites: Iterable[str], loss: float | None) -> None:
        """Keep what those sites sent, whose own copies are kept too, and move θ."""
        if self._split.cache == "none":
            return
        kept = dict(self._state)
        for site in sites:
            named = {self._name(site, text): tensor for text, tensor in self._sent.get(site, {}).items()}
            kept |= named | {self._name(site, ROUND): torch.tensor(self._lab.round)}
        if loss is not None:
            before = kept.get("loss")
            if before is not None:
                moved = next_threshold(float(kept["threshold"]), loss, float(before), self._split.cache_step)
                kept["threshold"] = torch.tensor(moved, dtype=torch.float64)
            kept["loss"] = torch.tensor(loss, dtype=torch.float64)
        state[GROUP] = kept

    def _whole(self, site: str, reply: Reply) -> Reply | None:
        texts, lengths = str(reply.fact("texts")).split(), lengths_of(site, reply).tolist()
        fresh = str(reply.fact("fresh"))
        sizes = [length for length, flag in zip(lengths, fresh, strict=True) if flag == "1"]
        rows = iter(reply.tensor("h").split(sizes) if sizes else ())
        sent, pieces = self._sent.setdefault(site, {}), []
        known = int(self.start(site)["cached"]) > 0
        for text, length, flag in zip(texts, lengths, fresh, strict=True):
            if flag == "1":
                sent[text] = next(rows).clone()
            h_TD = sent.get(text, self._state.get(self._name(site, text)) if known else None)
            if h_TD is None or len(h_TD) != length:
                return None
            pieces.append(self._lab.to_device(h_TD))
        return replace(reply, tensors={**reply.tensors, "h": torch.cat(pieces)})

    def _name(self, site: str, text: str) -> str:
        return f"{quote(site, safe='')} {text}"  # a slash would open a group


def cosine(a_TD: Tensor, b_TD: Tensor) -> float:
    """Of two texts' activations, all tokens together, in fp64; 0 where one is nothing."""
    a, b = a_TD.double().flatten(), b_TD.to(a_TD.device).double().flatten()
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms else 0.0


def next_threshold(threshold: float, loss: float, before: float, step: float) -> float:
    """θ + step where the loss rose, else θ − step; within −1 … 1, where all cosines lie."""
    return min(1.0, max(-1.0, threshold + step if loss > before else threshold - step))


def check_texts(site: str, reply: Message, lengths_B: Tensor, texts: int) -> int:
    """How many rows must have travelled. Raises MessageError where texts or flags don't fit the batch."""
    words, fresh = str(reply.fact("texts")).split(), str(reply.fact("fresh"))
    known = all(word.isascii() and word.isdigit() and len(word) < 10 and int(word) < texts for word in words)
    if not known or len(set(words)) != len(lengths_B):
        raise MessageError(f"{site} sent texts {reply.fact('texts')!r:.80}; expected {len(lengths_B)} below {texts}")
    if len(fresh) != len(lengths_B) or set(fresh) - {"0", "1"}:
        raise MessageError(f"{site} sent fresh {fresh!r:.80}; expected a 0 or 1 for each of {len(lengths_B)} texts")
    return sum(n for n, flag in zip(lengths_B.tolist(), fresh, strict=True) if flag == "1")
