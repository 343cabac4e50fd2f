"""A codec: named tensors in, named tensors of fewer bytes out, and back.

What it encodes is what travels, so its bytes are counted with every other byte. A tensor `h`, fp32 [330, 192], becomes
under `int8` the tensors `h|F32:330x192|q` and `h|F32:330x192|step`: the name says what it was, so a receiver needs
nothing else. Tensors of whole numbers, and those of `small` elements or fewer, pass as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigError, MessageError
from ..message import LABELS
from .parts import Crossing, Spec, is_finite, working
from .ranks import Rank
from .stages import ALL, Parts, Stage

SMALL = 64
LIMIT_BYTES = 2 << 30
FLOATS = {label: dtype for dtype, label in LABELS.items() if dtype.is_floating_point}
ENCODED = re.compile(rf"([^|]*)\|({'|'.join(FLOATS)}):((?:[1-9][0-9]{{0,9}}(?:x[1-9][0-9]{{0,9}}){{0,7}})?)\|([a-z.]+)")


@dataclass(frozen=True)
class Codec:
    """At most one stage that keeps less (topk, rank, lowrank), then at most one number format.

    `small`: tensors of up to so many elements pass unchanged; `skip`: names that always do. `limit_bytes`: a message
    that would decode to more is refused before any of it is decoded. Raises ConfigError for stages that make no sense
    together.
    """

    stages: tuple[Stage, ...] = ()
    small: int = SMALL
    skip: frozenset[str] = frozenset()
    limit_bytes: int = LIMIT_BYTES
    text: str = "none"

    def __post_init__(self) -> None:
        if [stage.reduces for stage in self.stages] not in ([], [True], [False], [True, False]):
            raise ConfigError(
                f"codec {self.text!r}: at most one of topk, rank, lowrank, then at most one of fp16, bf16, int8, int4, "
                "qsgd, in this order"
            )
        if any(isinstance(stage, Rank) for stage in self.stages) and self.on_delta:
            raise ConfigError(f"codec {self.text!r}: rank works on factors, the rest of it on updates")
        if self.feedback and any(stage.on_delta and not stage.feedback for stage in self.stages[1:]):
            raise ConfigError(
                f"codec {self.text!r}: the noise of qsgd would pile up in error feedback; use topk:…:plain"
            )
        if not self.uses:
            raise ConfigError(f"codec {self.text!r}: its stages are for different things")

    @property
    def on_delta(self) -> bool:
        """Whether adapters must be encoded as updates (`difference`), never as values."""
        return any(stage.on_delta for stage in self.stages)

    @property
    def feedback(self) -> bool:
        """Whether what is lost is kept and added to the next update; then `encode` needs a `state`."""
        return any(stage.feedback for stage in self.stages)

    @property
    def uses(self) -> frozenset[str]:
        """What it can encode: of `adapter`, `activations`, `gradients`, `logits`."""
        return ALL.intersection(*(stage.uses for stage in self.stages))

    def encodes(self, spec: Spec) -> bool:
        """Whether a tensor is encoded or passes unchanged."""
        wanted = spec.dtype.is_floating_point and spec.size > max(self.small, 0) and spec.name not in self.skip
        return bool(self.stages) and wanted

    def layout(self, specs: Mapping[str, Spec | Tensor]) -> dict[str, Spec]:
        """Names, dtypes and shapes of what is sent for tensors of these specs; no values are needed."""
        sent: dict[str, Spec] = {}
        for name, spec in specs.items():
            spec = Spec.of(name, spec) if isinstance(spec, Tensor) else spec
            parts = self._layout(spec, self.stages) if self.encodes(spec) else None
            sent |= {_wire_name(spec, part): leaf for part, leaf in parts.items()} if parts else {name: spec}
        return sent

    def payload_bytes(self, specs: Mapping[str, Spec | Tensor]) -> int:
        """Bytes of the values that are sent for tensors of these specs."""
        return sum(spec.bytes for spec in self.layout(specs).values())

    def encode(
        self, tensors: Mapping[str, Tensor], at: Crossing, state: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What travels in place of `tensors`.

        With error feedback `state` holds for each name what was not yet sent, in fp32 or fp64: c = x + e is encoded as
        s and e ← c − s. Tensors in `state` are replaced, never changed, so `dict(state)` is a copy to go back to.
        Raises MessageError for NaN, infinity, numbers too large for the format, and names with `|`.
        """
        if self.feedback and state is None:
            raise TypeError(f"codec {self.text!r} keeps what it loses; encode needs a state")
        plain = {name: tensor.detach() for name, tensor in tensors.items()}
        for stage in self.stages:
            plain |= stage.before({name: x for name, x in plain.items() if name not in self.skip})
        sent: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        for name, x in plain.items():
            spec = Spec.of(name, x)
            if "|" in name:
                raise MessageError(f"tensor {name!r}: a name must not contain '|'")
            if not self.encodes(spec):
                sent[name] = x
                continue
            wide = _plus(x, state.get(name) if state and self.feedback else None, spec)
            parts = self._encode(wide.to(x.dtype), spec, at, self.stages)
            for part, leaf in parts.items():
                if leaf.is_floating_point() and not is_finite(leaf):
                    raise spec.wrong(f"numbers that {self.text} can hold", "NaN, infinity or a larger one")
                sent[_wire_name(spec, part)] = leaf
            if self.feedback:
                kept[name] = wide - self._decode(parts, spec, self.stages).to(wide.dtype)
        if state is not None:
            state |= kept
        return sent

    def decode(
        self, tensors: Mapping[str, Tensor], like: Mapping[str, Spec | Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The tensors that were encoded, as far as they were kept.

        Give `like` wherever it is known what must come: names, dtypes and shapes are then held to it. Raises
        MessageError for everything that `encode` of the same codec does not give, before memory is taken for it.
        """
        groups, plain = self._grouped(tensors)
        specs = {name: spec for name, (spec, _) in groups.items()}
        specs |= {name: Spec.of(name, tensor) for name, tensor in plain.items()}
        if (total := sum(spec.bytes for spec in specs.values())) > self.limit_bytes:
            raise MessageError(f"a message that decodes to {total} bytes; at most {self.limit_bytes} are allowed")
        if like is not None:
            _check(specs, {name: Spec.of(name, t) if isinstance(t, Tensor) else t for name, t in like.items()})
        for name, (spec, parts) in groups.items():
            expected = self._layout(spec, self.stages) if self.encodes(spec) else {}
            _check({part: Spec.of(f"{name}.{part}", leaf) for part, leaf in parts.items()}, expected, of=name)
        decoded = dict(plain)
        for name, (spec, parts) in groups.items():
            decoded[name] = self._decode(parts, spec, self.stages)
            if not is_finite(decoded[name]):
                raise spec.wrong("finite numbers", "NaN, infinity, or a step that is too large")
        return {name: decoded[name] for name in sorted(decoded)}

    def _grouped(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Spec, Parts]], dict[str, Tensor]]:
        """The parts of each encoded tensor, and those that came as they are."""
        groups: dict[str, tuple[Spec, Parts]] = {}
        plain: dict[str, Tensor] = {}
        for wire_name, tensor in tensors.items():
            if "|" not in wire_name:
                if self.encodes(spec := Spec.of(wire_name, tensor)):
                    raise spec.wrong(f"it encoded by {self.text}", f"{spec} as it is")
                plain[wire_name] = tensor
                continue
            found = ENCODED.fullmatch(wire_name)
            if not found:
                raise MessageError(f"tensor {wire_name!r}: expected name|dtype:shape|part, received this name")
            shape = tuple(int(size) for size in found[3].split("x")) if found[3] else ()
            spec, parts = groups.setdefault(found[1], (Spec(found[1], FLOATS[found[2]], shape), {}))
            if (spec.dtype, spec.shape) != (FLOATS[found[2]], shape):
                raise spec.wrong(f"parts of one tensor, {spec}", f"also one of {found[2]} {list(shape)}")
            parts[found[4]] = tensor
        if twice := groups.keys() & plain.keys():
            raise MessageError(f"tensor {min(twice)!r} came both encoded and as it is")
        return groups, plain

    def _layout(self, spec: Spec, stages: tuple[Stage, ...]) -> dict[str, Spec]:
        if not stages or not spec.dtype.is_floating_point:
            return {"": spec}
        return _joined({part: self._layout(leaf, stages[1:]) for part, leaf in stages[0].layout(spec).items()})

    def _encode(self, x: Tensor, spec: Spec, at: Crossing, stages: tuple[Stage, ...]) -> Parts:
        if not stages or not spec.dtype.is_floating_point:
            return {"": x}
        parts, inner = stages[0].encode(x, spec, at), stages[0].layout(spec)
        return _joined({part: self._encode(leaf, inner[part], at, stages[1:]) for part, leaf in parts.items()})

    def _decode(self, parts: Parts, spec: Spec, stages: tuple[Stage, ...]) -> Tensor:
        if not stages or not spec.dtype.is_floating_point:
            return parts[""]
        inner: Parts = {}
        for part, leaf in stages[0].layout(spec).items():
            below = {key.partition(".")[2]: t for key, t in parts.items() if key.partition(".")[0] == part}
            inner[part] = self._decode(below, leaf, stages[1:])
        return stages[0].decode(inner, spec)


def difference(values: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Δ = θ_k − θ for float tensors; others pass. Raises MessageError where the reference lacks a name or its shape."""
    return {name: _moved(name, value, reference, -1) for name, value in values.items()}


def restore(update: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """θ + Δ for float tensors; others pass. Raises MessageError where the reference lacks a name or its shape."""
    return {name: _moved(name, value, reference, 1) for name, value in update.items()}


def _moved(name: str, value: Tensor, reference: Mapping[str, Tensor], sign: int) -> Tensor:
    if not value.is_floating_point():
        return value
    base = reference.get(name)
    if base is None or base.shape != value.shape:
        known = "no reference" if base is None else f"a reference {list(base.shape)}"
        raise MessageError(f"tensor {name!r}: expected {known}, received {list(value.shape)}")
    return value.detach() + sign * base.detach().to(value)


def _plus(x: Tensor, e: Tensor | None, spec: Spec) -> Tensor:
    """x + e in fp32 or fp64."""
    wide = x.to(working(x.dtype))
    if e is None:
        return wide
    if e.shape != x.shape:
        raise spec.wrong(f"the shape of what was kept of it, {list(e.shape)}", list(x.shape))
    return wide + e.to(wide)


def _wire_name(spec: Spec, part: str) -> str:
    return f"{spec.name}|{LABELS[spec.dtype]}:{'x'.join(map(str, spec.shape))}|{part}"


def _joined(nested: Mapping[str, Mapping[str, object]]) -> dict:
    return {f"{part}.{below}" if below else part: t for part, inner in nested.items() for below, t in inner.items()}


def _check(received: Mapping[str, Spec], expected: Mapping[str, Spec], of: str | None = None) -> None:
    """Raises MessageError unless names, dtypes and shapes agree."""
    where = f"tensor {of!r}" if of else "the message"
    if received.keys() != expected.keys():
        lacks, odd = sorted(expected.keys() - received)[:4], sorted(received.keys() - expected)[:4]
        raise MessageError(
            f"{where}: expected {sorted(expected)[:4]}, received {sorted(received)[:4]}; lacks {lacks}, not known {odd}"
        )
    for name, spec in expected.items():
        if (received[name].dtype, received[name].shape) != (spec.dtype, spec.shape):
            whole = f"{of}.{name}" if of else name
            raise MessageError(f"tensor {whole!r}: expected {spec}, received {received[name]}")
