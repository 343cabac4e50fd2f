"""One frozen base model, and as many adapters beside it as there are sites.

An adapter is a mapping from parameter names to tensors: the LoRA tensors, the classification head and whatever
`modules_to_save` names. Everything that trains is in it, and nothing in it is ever shared by two sites.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import ModelError
from .cut import WHOLE, Gates, Reached, Span, find_blocks, pack, positions_of, unpack, within
from .load import Task
from .lora import LoraConfig
from .targets import check_saved, check_targets, has_experts, layers, no_target
from .train import Adapter

_HEADS = r".*(classifier|score)(\..*)?"  # trained whole by PEFT in sequence classification, so never given LoRA too

Observe = Callable[[tuple[Hashable, ...], Callable[[], set[int]]], AbstractContextManager[None]]


def adapt(base: nn.Module, lora: LoraConfig, task: Task) -> Any:
    """The base with LoRA from PEFT in it; A is drawn from torch's global generator, B is zero.

    Experts that transformers keeps as one tensor are no layers and stay as they are. Raises ModelError where
    `target_modules` name them, or match nothing, as `modules_to_save` may, with the names that would match.
    """
    import peft

    check_targets(base, lora.target_modules)
    names = layers(base) if has_experts(base) else []  # else PEFT's all-linear would mean the experts too
    check_saved(base, lora.modules_to_save or [])
    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS if task == "classification" else peft.TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]  # PEFT annotates int and divides
        target_modules=names if names and lora.target_modules == "all-linear" else lora.target_modules,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        modules_to_save=lora.modules_to_save,
        exclude_modules=_HEADS if task == "classification" else None,
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # PEFT sets it right for Conv1D itself
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT still asks for it
            made = peft.get_peft_model(base, config)  # type: ignore[arg-type]
    except ValueError as error:
        raise no_target(base, lora.target_modules) from error
    if names and config.target_parameters:
        raise ModelError(
            f"lora.target_modules {lora.target_modules!r} reach experts or their router, which are no layers: write "
            f"all-linear, or some of {names}"
        )
    return made


def _cast_once(module: nn.Module) -> None:
    """Keep the frozen weights of matrix products in bf16, as autocast would cast them in every forward pass.

    Not one bit of any result changes. Embeddings stay fp32 (autocast doesn't touch them), and so does a head tied to
    them; PEFT's own cast of the input to the adapter's dtype and back is left out.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, inner in module.named_modules():
        if hasattr(inner, "cast_input_dtype_enabled"):
            setattr(inner, "cast_input_dtype_enabled", False)  # noqa: B010
        is_product = isinstance(inner, nn.Linear) or type(inner).__name__ == "Conv1D"
        trains = "lora_" in name or "modules_to_save" in name
        if is_product and not trains and id(inner.weight) not in embeddings:
            inner.to(torch.bfloat16)


class AdaptedModel:
    """Runs the base with any adapter, whole or over a span of its blocks; many autograd graphs may be open at once.

    Attributes: `initial`, the adapter all start from; `depth`, the number of blocks; `classes`, the width of its
    logits; `width`, that of its hidden states; `observe`, a hook around each forward and backward pass, by which a
    meter counts.
    """

    def __init__(
        self,
        peft_model: Any,
        task: Task,
        precision: str = "fp32",
        device: torch.device | None = None,
        pad_to_multiple_of: int = 1,
    ) -> None:
        self.peft, self.task, self.precision = peft_model, task, precision
        self.pad_to_multiple_of = pad_to_multiple_of
        self.device = device or torch.device("cpu")
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        peft_model.to(self.device, self.dtype)
        self.module: nn.Module = peft_model.get_base_model()
        self.module.eval()
        if precision == "fp64" and has_experts(self.module):
            raise ModelError("train.precision fp64: products of a mixture of experts are there in fp32 and bf16 alone")
        self.initial = {n: p.detach().clone() for n, p in self.module.named_parameters() if p.requires_grad}
        self.module.requires_grad_(False)
        if precision == "bf16":
            _cast_once(self.module)
        self.has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.module.modules())
        self.observe: Observe = lambda key, weights: nullcontext()
        self._variant: tuple[Hashable, ...] = ()  # of the adapter that ran last, see `_variant_of`
        self._dtype_at: dict[int, torch.dtype] = {}  # of hidden states at a cut; bf16 in some models under autocast
        blocks = find_blocks(self.module)
        self._gates = Gates(blocks)
        self.depth = self._gates.depth
        config: Any = self.module.config
        self.width = int(config.hidden_size)
        self._real_id = 0 if config.pad_token_id != 0 else 1  # any token that is no padding
        self._pad_id = config.pad_token_id
        self._widest: float = getattr(config, "max_position_embeddings", math.inf)
        self._places: dict[str, tuple[dict[str, Any], str]] = {
            f"{path}.{key}".lstrip("."): (held, key)
            for path, m in self.module.named_modules(remove_duplicate=False)
            for held in (m._parameters, m._buffers)
            for key in held
        }
        self._positions = positions_of(self.module, self._gates, self._probe)
        self._owner = self._owners()

    # Running ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        adapter: Adapter,
        lengths_B: Tensor,
        ids_BT: Tensor | None = None,
        h_ND: Tensor | None = None,
        span: Span = WHOLE,
        dropout_seed: int | None = None,
    ) -> Tensor:
        """Logits ([B, C], or [B, T, V] for causal-lm) where the span ends in the head, else hidden states [N, D].

        Spans that start at -1 take `ids_BT`, all others the packed `h_ND` of the cut. `dropout_seed` switches dropout
        on. What leaves and enters a span is fp32 (fp64 at that precision), whatever autocast does inside.
        """
        lengths_B = lengths_B.to(self.device)
        longest = int(lengths_B.max())
        width = self._widened(longest if ids_BT is None else ids_BT.shape[1])
        mask_BT = torch.arange(width, device=self.device) < lengths_B[:, None]
        if ids_BT is None:
            ids_BT = self._placeholder_ids(mask_BT)
        else:
            ids_BT = F.pad(ids_BT.to(self.device), (0, width - ids_BT.shape[1]), value=self._pad_id)
        start, stop = span
        h_BTD = None
        if h_ND is not None:
            h_ND = h_ND.to(self.device, self._dtype_at.get(start, self.dtype))
            h_BTD = unpack(h_ND, lengths_B, width)
        training = dropout_seed is not None and self.has_dropout
        if self.module.training != training:
            self.module.train(training)
        self._variant = self._variant_of(adapter)
        shape = (len(lengths_B), longest)  # as `backward` names the batch
        key = ("forward", span, shape, torch.is_grad_enabled(), *self._variant)
        with (
            self.observe(key, lambda: self._addresses(adapter)),
            self._gates.open(span, h_BTD, dropout_seed if training else None),
        ):
            try:
                output = self._call(adapter, ids_BT, mask_BT)
            except Reached as reached:
                assert stop is not None
                self._dtype_at[stop] = reached.h_BTD.dtype
                return pack(reached.h_BTD, lengths_B).to(self.dtype)
        logits = output.logits if self.task == "classification" else output.logits[:, :longest]
        return logits.to(self.dtype)

    def backward(
        self, output: Tensor, shape: tuple[int, int], gradient: Tensor | None = None, span: Span = WHOLE
    ) -> None:
        """Backward through what `forward` gave for a batch of `shape` (B, T) over `span`."""
        with self.observe(("backward", span, shape, True, *self._variant), set):
            output.backward(gradient)

    def work(self, shape: tuple[int, int], span: Span) -> tuple[int, int]:
        """FLOPs of a forward and backward pass over a span, and the bytes that autograd keeps in between.

        Of a batch of `shape` (B, T) without padding, run once; it is nobody's work, so `observe` sees nothing of it.
        """
        adapter = {name: t.detach().requires_grad_() for name, t in self.part(self.initial, span).items()}
        h_ND = None
        if span[0] >= 0:
            h_ND = torch.zeros(shape[0] * shape[1], self.width, dtype=self.dtype, device=self.device)
            h_ND.requires_grad_(bool(self.part(self.initial, (-1, span[0]))))
        weights, kept = self._addresses(adapter), dict[int, int]()

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if tensor.is_floating_point() and storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        observe, self.observe = self.observe, lambda key, weights: hooks
        try:
            with FlopCounterMode(display=False) as counter:
                output = self.forward(adapter, torch.full((shape[0],), shape[1]), h_ND=h_ND, span=span)
                if output.requires_grad:
                    output.sum().backward()
        finally:
            self.observe = observe
        return counter.get_total_flops(), sum(kept.values())

    def _variant_of(self, adapter: Adapter) -> tuple[Hashable, ...]:
        """What makes a pass with this adapter cost another number of FLOPs: other ranks, frozen factors."""
        training = torch.is_grad_enabled()
        found = []
        for name, tensor in adapter.items():
            usual = self.initial.get(name)
            if usual is not None and (tensor.shape != usual.shape or (training and not tensor.requires_grad)):
                found.append((name, tuple(tensor.shape), tensor.requires_grad))
        return tuple(found)

    def _call(self, adapter: Adapter, ids_BT: Tensor, mask_BT: Tensor) -> Any:
        """The module's output, with the adapter's tensors for the while where its own of these names are.

        As `torch.func.functional_call`, which looks each name up again, in a tree of modules, every time.
        """
        places = [self._places[name] for name in adapter]
        own = [held[key] for held, key in places]
        try:
            for (held, key), tensor in zip(places, adapter.values(), strict=True):
                held[key] = tensor.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                return self.module(input_ids=ids_BT, attention_mask=mask_BT.long())
        finally:
            for (held, key), tensor in zip(reversed(places), reversed(own), strict=True):  # a module may have two names
                held[key] = tensor

    def _placeholder_ids(self, mask_BT: Tensor) -> Tensor:
        """Ids for a half that never sees the text: they tell padding from tokens, and nothing else."""
        return torch.where(mask_BT, self._real_id, self._pad_id)

    def _widened(self, width: int) -> int:
        """With more padding, up to the next multiple: few shapes of batch, for which libraries keep less memory."""
        wider = width + -width % self.pad_to_multiple_of
        return int(max(width, min(wider, self._widest)))

    def _probe(self) -> None:
        with torch.no_grad(), self._gates.open(WHOLE, None, None):
            mask_BT = torch.tensor([[True, True], [True, False]], device=self.device)
            self.classes = self._call({}, self._placeholder_ids(mask_BT), mask_BT).logits.shape[-1]

    # The two sides of a cut --------------------------------------------------------------------------------------

    def _owners(self) -> dict[str, list[int]]:
        """Positions at which each trainable tensor is used; one that never runs counts as the head's."""
        places = {id(p): [] for p in self.module.parameters()}
        for module, positions in self._positions.items():
            for parameter in module.parameters(recurse=False):
                places[id(parameter)] += positions
        named = dict(self.module.named_parameters())
        return {name: places[id(named[name])] or [self.depth] for name in self.initial}

    def part(self, adapter: Adapter, *spans: Span) -> dict[str, Tensor]:
        """The tensors of an adapter that the spans use.

        Raises ModelError where a trainable tensor is used both inside and outside: tied weights across the cut.
        """
        inside: dict[str, Tensor] = {}
        for name, tensor in adapter.items():
            held = {any(within(position, span, self.depth) for span in spans) for position in self._owner[name]}
            if len(held) > 1:
                raise ModelError(
                    f"{name} trains on both sides of the cut (tied weights): leave it out of lora or move the cut"
                )
            if held == {True}:
                inside[name] = tensor
        return inside

    def held_bytes(self, *spans: Span) -> int:
        """Bytes of the frozen weights that run within the spans."""
        return sum(p.numel() * p.element_size() for p in self.frozen(*spans))

    def frozen(self, *spans: Span) -> list[nn.Parameter]:
        """The frozen weights that run within the spans, each once."""
        weights: dict[int, nn.Parameter] = {}
        for module, positions in self._positions.items():
            if any(within(position, span, self.depth) for position in positions for span in spans):
                weights |= {id(p): p for p in module.parameters(recurse=False)}
        trainable = {id(p) for n, p in self.module.named_parameters() if n in self.initial}
        return [p for which, p in weights.items() if which not in trainable]

    def verify_cut(self, stops: Sequence[int]) -> None:
        """Raises ModelError unless the model cut at `stops` gives the logits of the whole model, to the last bit."""
        generator = torch.Generator().manual_seed(0)
        config: Any = self.module.config
        lengths_B = torch.tensor([5, 3, 7])
        ids_BT = torch.randint(0, config.vocab_size, (3, 7), generator=generator)
        mask_BT = torch.arange(7) < lengths_B[:, None]
        ids_BT = ids_BT.masked_fill(ids_BT == self._pad_id, self._real_id).masked_fill(~mask_BT, self._pad_id)
        with torch.no_grad():
            whole = self.forward(self.initial, lengths_B, ids_BT)
            ends = [-1, *stops]
            joined = None
            for start, stop in zip(ends, [*stops, None], strict=True):
                first = ids_BT if start == -1 else None
                joined = self.forward(self.initial, lengths_B, first, joined, (start, stop))
        if self.task == "causal-lm":
            whole, joined = whole[mask_BT], joined[mask_BT]  # type: ignore[index]
        difference = float((whole - joined).abs().max())  # type: ignore[operator]
        if difference != 0.0:
            name = type(self.module).__name__
            raise ModelError(
                f"{name} can't be cut at {list(stops)}: its halves differ from the whole by {difference:.2g}"
            )

    # What the adapter is to the base --------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """The rank of `initial`."""
        return self.peft.peft_config["default"].r

    def scale(self, rank: int | None = None) -> float:
        """s of W + s·B·A at that rank (default: the rank of `initial`): lora_alpha / r, or / √r with rslora."""
        config, rank = self.peft.peft_config["default"], rank or self.rank
        return config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank)

    def base_weight(self, layer: str) -> tuple[str, Tensor, bool]:
        """Name and frozen weight of a layer with LoRA, and whether it lies as [in, out] (`Conv1D`, embeddings)."""
        module: Any = self.module.get_submodule(layer)
        turned = isinstance(module.base_layer, nn.Embedding) or bool(getattr(module, "fan_in_fan_out", False))
        return f"{layer}.base_layer.weight", module.base_layer.weight, turned

    # Files ------------------------------------------------------------------------------------------------------

    def save(self, adapter: Adapter, folder: Path) -> None:
        """Write an ordinary PEFT folder, which `PeftModel.from_pretrained` opens, head included.

        An adapter of another rank than `initial` is written with that rank; its scale stays `scale()`.
        """
        named, config = dict(self.module.named_parameters()), self.peft.peft_config["default"]
        kept, scale = (config.r, config.lora_alpha), self.scale()
        rank = next((tensor.shape[0] for name, tensor in adapter.items() if ".lora_A." in name), config.r)
        weights = {name: named[name].data for name in adapter}
        try:
            for name, tensor in adapter.items():
                named[name].data = tensor.detach().to(weights[name])
            if rank != config.r:
                config.r, config.lora_alpha = rank, scale * (math.sqrt(rank) if config.use_rslora else rank)
            self.peft.save_pretrained(str(folder))
        finally:
            config.r, config.lora_alpha = kept
            for name, weight in weights.items():
                named[name].data = weight

    def _addresses(self, adapter: Adapter) -> set[int]:
        tensors = [*self.module.parameters(), *self.module.buffers(), *adapter.values()]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}
