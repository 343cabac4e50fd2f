"""KD-FedLLM: sites share logits on a public set; knowledge moves by distillation, and no parameter does.

After "FedMD: Heterogenous Federated Learning via Model Distillation" (arXiv:1910.03581) with a student at the server:
each site trains on its own data, then sends its logits on the public texts; the server aggregates them, distils its
student from the aggregate and sends the aggregate back; each site distils its own model from it.

`protocol: dsfl` is the same round with averaged probabilities made sharper and public texts drawn anew in each round
("Distillation-Based Semi-Supervised Federated Learning", DS-FL, arXiv:2008.06180); the other protocols have files of
their own (kd_fedmd, kd_feddf, kd_fedmkt).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from ..aggregation.logits import ERA, SHARPENED, Logits, absent, aggregate, reduced
from ..codecs import Codec, Crossing, Spec
from ..errors import ConfigError, MessageError, QuorumError
from ..message import Fact, Message, Reply
from ..models.lora import LoraConfig
from ..models.train import Adapter
from .kd_logits import Unread, check_names, codec_of, fitted, of_site, top_k
from .lab import ClientProgram, Framework, Lab, ServerProgram, Site, State, weights_of

Protocol = Literal["standard", "fedmd", "dsfl", "feddf", "fedmkt"]
Rule = Literal["logits", "probabilities", "era", "power", "confidence", "union", "median", "trimmed"]
NEED_ALL = ("logits", "median", "trimmed")  # rules that a class which was not sent would carry off
CONSENSUS = 0.3  # where era makes this less, it flattens more texts than it sharpens
Bytes = Annotated[float, Field(gt=0)]


class KD(Framework):
    """Federated distillation. The public set bears no labels, so the cross-entropy part is the private training."""

    protocol: Protocol = Field(
        default="standard",
        description="standard; fedmd (digest, then revisit); dsfl; feddf (adapters up, an ensemble at the server); "
        "fedmkt (only what the other knows better; causal-lm)",
    )
    temperature: float = Field(default=2.0, gt=0, description="T of the softmax in distillation")
    aggregation: Rule = Field(
        default="logits",
        description="how sites' logits become one: their mean; the mean of probabilities, also sharpened by era or "
        "power, or weighted by confidence; the mean over the union of what was sent; median; trimmed mean",
    )
    sharpening: float | None = Field(
        default=None, gt=0, description="temperature of era (null: 0.1), power (0.5) and confidence (1)"
    )
    trim: int = Field(default=1, ge=0, description="trimmed: how many of the least and of the greatest are left out")
    distill_weight: float = Field(default=1.0, ge=0, description="λ of λ·T²·KL; 0: sites don't distil")
    public_weight: float = Field(
        default=0.0, ge=0, description="fedmkt: weight of the cross-entropy on the public texts themselves"
    )
    selection: Literal["greatest", "weighted"] = Field(
        default="greatest",
        description="fedmkt: on each text who knows it best, where that is better; or all by the softmax of e^-loss",
    )
    distill_epochs: int = Field(default=1, ge=0, description="passes of a site over the public set in a round")
    server_epochs: int = Field(
        default=1,
        ge=0,
        description="passes of the server's student over the public set in a round; fedmd with 0: there is no student",
    )
    distill_learning_rate: float | None = Field(default=None, ge=0, description="null: those of train")
    public_per_round: int | None = Field(
        default=None, ge=1, description="public texts that a round uses, drawn anew each time; null: all"
    )
    logits: str = Field(
        default="auto",
        description="codec of what sites send, as topk:8:logits+fp16; auto: none in classification, in causal-lm "
        "topk:32:logits+fp16",
    )
    logits_down: str | None = Field(default=None, description="codec of the aggregate; null: as kd.logits")
    upload_bytes: Bytes | dict[str, Bytes] | None = Field(
        default=None, description="bytes of logits in a round, for all sites or by name or pattern: k of topk follows"
    )
    upload_rate: Bytes | dict[str, Bytes] | None = Field(
        default=None, description="bytes a second that a site can send; with upload_seconds another bound for k"
    )
    upload_seconds: float | None = Field(default=None, gt=0, description="how long sending the logits may take")
    models: dict[str, str] = Field(
        default={}, description="sites with a model of their own, by name or pattern; the others and the student: model"
    )
    lora: LoraConfig | None = Field(default=None, description="adapters of kd.models; null: as for model")

    @model_validator(mode="after")
    def _goes_together(self) -> KD:
        try:
            codecs = [codec_of(text) for text in (self.logits, self.logits_down or "none")]
        except ConfigError as error:
            raise ValueError(str(error)) from error
        top = top_k(codecs[0])
        if top and top.rest == "absent" and self.aggregation in NEED_ALL:
            raise ValueError(f"topk:…:absent leaves classes out: not with aggregation {self.aggregation}, but union")
        if self.protocol == "dsfl" and self.aggregation not in ("era", "power", "probabilities"):
            raise ValueError("dsfl averages probabilities: choose aggregation era (its own), power or probabilities")
        if (self.upload_rate is None) != (self.upload_seconds is None):
            raise ValueError("upload_rate and upload_seconds go together: their product is what a site may send")
        if (self.upload_bytes or self.upload_rate) and not top and self.logits != "auto":
            raise ValueError(f"a budget chooses k: it needs logits topk:…, not {self.logits}")
        if self.protocol == "feddf" and (self.logits not in ("auto", "none") or self.upload_bytes or self.upload_rate):
            raise ValueError("feddf sends adapters and no logits: leave out logits and budgets; wire.up has codecs")
        if self.lora and self.lora.by_site:
            raise ValueError(f"{self.lora.by_site} is for fedllm: kd.lora has one rank for all of models")
        if self.sharpening and self.aggregation not in SHARPENED:
            raise ValueError(f"sharpening is of {', '.join(SHARPENED)}, not of aggregation {self.aggregation}")
        if self.selection != "greatest" and self.protocol != "fedmkt":
            raise ValueError(f"selection is of protocol fedmkt, not of {self.protocol}")
        if self.public_weight and self.protocol != "fedmkt":
            raise ValueError(f"public_weight is of protocol fedmkt, not of {self.protocol}")
        return self

    def resolved(self, wired: bool, causal: bool) -> KD:
        """The same settings with the codec decided; `wired`: the wire encodes logits. ConfigError where both do."""
        budget = self.upload_bytes or self.upload_rate
        if wired and (budget or {self.logits, self.logits_down or "none"} - {"auto", "none"}):
            raise ConfigError("logits would be encoded twice: write their codec into kd.logits or into wire, not both")
        if self.logits != "auto":
            return self
        rest, kept = "absent" if self.aggregation == "union" else "logits", "32" if causal else "1.0"
        sparse = (causal or budget) and not wired and self.protocol != "feddf"  # 1.0: as many as there is room for
        return self.model_copy(update={"logits": f"topk:{kept}:{rest}+fp16" if sparse else "none"})

    def check_task(self, task: str) -> None:
        """Raises ConfigError for a protocol that is not for this task."""
        if self.protocol == "fedmkt" and task != "causal-lm":
            raise ConfigError(
                "kd.protocol fedmkt weighs a model by its own loss on the public texts, which bear no labels in "
                "classification: choose standard, fedmd, dsfl or feddf, or task: causal-lm"
            )

    @property
    def needed(self) -> int:
        """How many sites the aggregation needs."""
        return {"median": 3, "trimmed": 2 * self.trim + 1}.get(self.aggregation, 1)

    # The round -----------------------------------------------------------------------------------------------------

    def setup(self, lab: Lab) -> State:
        """The student starts from the same adapter as the sites."""
        return {"student": lab.model.initial}

    def server(self, lab: Lab, state: State, cohort: Sequence[str]) -> ServerProgram:
        """Ask for logits, aggregate, distil the student, send the aggregate."""
        inbox = yield dict.fromkeys(cohort, Message("start"))
        lab = self.of_round(lab, lab.round)
        if not len(lab.public):
            return
        rows = Unread(inbox, lambda site, reply: self.read(lab, reply, site, site))
        teacher = self.aggregate(lab, rows, weights_of(inbox))
        state["student"] = self.distil(lab, state["student"], teacher, lab.round, "server", self.server_epochs)
        yield dict.fromkeys(inbox, self.message(lab, "aggregated logits", teacher, lab.round))

    def client(self, lab: Lab, site: Site, first: Reply) -> ClientProgram:
        """Train on private data, send logits, distil from their aggregate. The adapter stays in the site's memory."""
        adapter = lab.fit(site.memory.get("adapter", lab.model.initial), site)
        site.memory["adapter"] = adapter
        facts = {"weight": site.data.weight}
        lab = self.of_round(lab, site.round)
        if not len(lab.public):
            return Message("done", {}, facts)
        answer = yield self.message(lab, "logits", lab.predict(adapter), site.round, site.name, facts)
        site.memory["adapter"] = self.digest(lab, site, adapter, self.read(lab, answer, "the server"))
        return Message("done")

    def aggregate(self, lab: Lab, logits: Logits, weights: Mapping[str, float]) -> Tensor:
        """The sites' logits as one. Raises QuorumError where the rule needs more sites than are left."""
        if len(logits) < self.needed:
            rule = f"kd.aggregation {self.aggregation} needs {self.needed} sites"
            raise QuorumError(f"round {lab.round}: {rule}, and {len(logits)} are left")
        return aggregate(self.aggregation, logits, weights, self.sharpening, self.trim)

    def digest(self, lab: Lab, site: Site, adapter: Adapter, teacher: Tensor) -> Adapter:
        """A site's adapter, distilled from the aggregate."""
        if not (self.distill_weight and self.distill_epochs):
            return adapter
        return self.distil(
            lab, adapter, teacher, site.round, site.name, self.distill_epochs, weight=self.distill_weight
        )

    def distil(
        self,
        lab: Lab,
        adapter: Adapter,
        teacher: Tensor,
        round: int,
        who: str,
        epochs: int,
        weight: float | Tensor = 1.0,
    ) -> Adapter:
        """An adapter that has learnt from the teacher's logits, as the settings say."""
        return lab.distil(
            adapter, teacher, round, who, epochs, self.temperature, weight, self.distill_learning_rate,
            self.public_weight, self._lumps(lab),
        )  # fmt: skip

    def _lumps(self, lab: Lab) -> bool:
        """Whether of some classes nothing but their mass may be known."""
        budget = self.upload_bytes is not None or self.upload_rate is not None
        tops = [top for text in (self.logits, self.logits_down or "none") if (top := top_k(codec_of(text)))]
        return any(top.rest == "mass" and (budget or top.kept(lab.model.classes) < lab.model.classes) for top in tops)

    def of_round(self, lab: Lab, round: int) -> Lab:
        """The lab with the public texts of a round, which are a pure function of (seed, round)."""
        if self.public_per_round is None or self.public_per_round >= len(lab.public):
            return lab
        drawn = np.random.default_rng([lab.seed, round, 0x7075]).permutation(len(lab.public))[: self.public_per_round]
        return replace(lab, public=lab.public.take(np.sort(drawn)))

    def check(self, lab: Lab, site: str, sent: Message, reply: Reply) -> None:
        """A row of logits for each row of the public set, then nothing more."""
        if sent.kind != "start" or not len(lab.public):
            lab.guards.kind(site, reply, "done")
            return lab.guards.names(site, reply)
        lab, plain = self.of_round(lab, lab.round), not self.codec(lab, site).stages
        lab.guards.kind(site, reply, "logits")
        if plain:
            lab.guards.names(site, reply, "logits")
        if reply.done:
            raise MessageError(f"{site} sent 'logits'; expected that they are not its last word")
        logits = self.read(lab, reply, site, site)
        lab.guards.form(site, "logits", logits, logits.shape, lab.model.dtype)
        lab.guards.values(site, "logits", logits if plain else logits.masked_fill(absent(logits), 0.0))
        lab.guards.weight(site, reply)

    def adapter(self, lab: Lab, state: State) -> Adapter | None:
        """The server's student."""
        return state["student"]

    def own_adapter(self, lab: Lab, site: Site) -> Adapter | None:
        """The site's own; one that never took part still has the common start."""
        return site.memory.get("adapter", lab.model.initial)

    def model_of(self, site: str) -> tuple[str, LoraConfig | None] | None:
        """The model of a site that has one of its own, and the adapter that is put into it."""
        model = of_site(self.models, site)
        return None if model is None else (model, self.lora)

    # What travels --------------------------------------------------------------------------------------------------

    def codec(self, lab: Lab, site: str | None = None) -> Codec:
        """That of a site's logits, or of the aggregate that goes to all."""
        if site is None:
            return codec_of(self.logits if self.logits_down is None else self.logits_down)
        return fitted(codec_of(self.logits), logits_spec(lab), self.budget(site), site)

    def budget(self, site: str) -> float | None:
        """Bytes of logits that a site may send in a round: the least of what is set; None: any number."""
        nbytes, rate = of_site(self.upload_bytes, site), of_site(self.upload_rate, site)
        known = [nbytes] if nbytes is not None else []
        known += [rate * self.upload_seconds] if rate is not None and self.upload_seconds else []
        return min(known, default=None)

    def message(
        self, lab: Lab, kind: str, logits: Tensor, round: int, site: str | None = None,
        facts: Mapping[str, Fact] | None = None,
    ) -> Message:  # fmt: skip
        """Logits on their way: a site's, or the server's to all. Raises MessageError for what the codec can't hold."""
        codec, tensors = self.codec(lab, site), {"logits": logits}
        if codec.stages:
            lost = absent(logits)
            if bool(lost.any()):  # no number format holds these; e⁻³⁰ of the least that is there is as good
                low = logits.masked_fill(lost, float("inf")).amin(-1, keepdim=True)
                tensors = {"logits": logits.where(~lost, low - 30)}
            tensors = {"logits": tensors["logits"] / self._heat(codec)}
            tensors = codec.encode(tensors, Crossing(lab.seed, round, site or "", "up" if site else "down"))
        return Message(kind, tensors, facts or {})

    def read(self, lab: Lab, message: Message, who: str, site: str | None = None) -> Tensor:
        """The logits of a message, [M, C]. Raises MessageError where they are not those of this public set."""
        codec = self.codec(lab, site)
        if not codec.stages:
            lab.check_public(message.tensor("logits"), who)
            return message.tensor("logits")
        try:
            return codec.decode(message.tensors, {"logits": logits_spec(lab)})["logits"] * self._heat(codec)
        except MessageError as error:
            raise MessageError(f"{who} sent {error}") from error

    def _heat(self, codec: Codec) -> float:
        """By what logits are divided on their way: the rest's mass is exact at the temperature that is learnt at.

        At another it would not be: spread evenly over 500 words, a tenth of the mass becomes most of it at T = 2.
        """
        top = top_k(codec)
        return self.temperature if top is not None and top.rest == "mass" else 1.0

    # Before the run ------------------------------------------------------------------------------------------------

    def check_sites(self, sites: Sequence[str], cohort: int) -> None:
        """Raises ConfigError where settings name a site that is none, or the aggregation needs more than take part."""
        named = ("models", "upload_bytes", "upload_rate")
        check_names({f"kd.{name}": getattr(self, name) for name in named}, sites)
        if cohort < self.needed:
            raise ConfigError(
                f"kd.aggregation {self.aggregation} needs {self.needed} sites, and {cohort} take part in a round"
            )

    def foresee(self, lab: Lab, sites: Sequence[str]) -> list[str]:
        """What should be known before: what logits cost, and where era flattens. ConfigError for too small a budget."""
        found = []
        classes = lab.model.classes
        temperature = ERA if self.sharpening is None else self.sharpening
        if self.aggregation == "era" and (left := reduced(CONSENSUS, classes, temperature)) < CONSENSUS:
            found.append(
                f"kd.aggregation era flattens over {classes} classes: at T = {temperature:g} a consensus of "
                f"{CONSENSUS:.0%} becomes {left:.0%} at most; power does not"
            )
        lab = self.of_round(lab, 1)
        if not len(lab.public) or self.protocol == "feddf":
            return found
        spec = logits_spec(lab)
        sizes = [self.codec(lab, site).payload_bytes({"logits": spec}) for site in sites]
        rows = f"({spec.shape[0]} {'tokens' if lab.model.task == 'causal-lm' else 'texts'} x {classes} {_unit(lab)})"
        if max(sizes, default=0) < spec.bytes:
            share = f"{max(sizes) / 1e6:,.2f} MB of logits a site and round"
            found.append(f"kd sends at most {share}; in full they would be {spec.bytes / 1e6:,.2f} MB {rows}")
        elif spec.bytes > 100_000_000:
            found.append(f"kd sends {spec.bytes / 1e6:,.0f} MB of logits a site and round {rows}")
        return found


def logits_spec(lab: Lab) -> Spec:
    """What the logits on the public set are."""
    return Spec("logits", lab.model.dtype, (lab.public.target_tokens(), lab.model.classes))


def _unit(lab: Lab) -> str:
    return "words" if lab.model.task == "causal-lm" else "classes"
