"""The short training loop that every framework shares: losses, optimizer, learning-rate schedule, clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Adapter = Mapping[str, Tensor]


class TrainConfig(BaseModel):
    """How any side trains. Names are those of Hugging Face's `TrainingArguments` where the thing is the same."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    learning_rate: float = Field(default=1e-3, ge=0, description="of the LoRA tensors")
    head_learning_rate: float = Field(
        default=1e-2, ge=0, description="of everything else that trains, the head above all"
    )
    batch_size: int = Field(default=16, ge=1, description="examples in a mini-batch")
    epochs: int = Field(default=1, ge=0, description="passes over a site's data in one round")
    max_length: int = Field(default=64, ge=2, description="tokens of a text at most; the rest is cut off and counted")
    group_by_length: bool = Field(default=False, description="texts of like length meet in a batch: less padding")
    pad_to_multiple_of: int = Field(
        default=1, ge=1, description="pad each batch to such a width: fewer shapes, so less memory in bf16 on a CPU"
    )
    optimizer: Literal["adamw", "sgd"] = Field(
        default="adamw", description="fresh in every round, unless fedllm.keep_optimizer"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled for adamw, L2 for sgd")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="of sgd")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="course of the learning rates over the whole run, from round 1 to the last"
    )
    warmup_ratio: float = Field(
        default=0.0, ge=0, le=1, description="share of the whole run in which the rates rise to full"
    )
    max_grad_norm: float | None = Field(
        default=None, gt=0, description="clip the norm of all gradients together; null: don't"
    )
    precision: Literal["auto", "fp32", "bf16", "fp64"] = Field(
        default="auto", description="bf16 is autocast over fp32 weights; auto takes it where the hardware has it"
    )

    def rate(self, name: str) -> float:
        """The full learning rate of the tensor of that name."""
        return self.learning_rate if "lora_" in name else self.head_learning_rate

    @property
    def copies(self) -> int:
        """Numbers that are held for each that trains: itself, its gradient, and the optimizer's state."""
        return {"adamw": 4, "sgd": 3 if self.momentum else 2}[self.optimizer]

    def state_bytes(self, tensors: Adapter) -> int:
        """Bytes of tensors that train, their gradients and the optimizer's state."""
        return self.copies * sum(t.numel() * t.element_size() for t in tensors.values())

    def rate_factor(self, progress: float) -> float:
        """By what the learning rates are multiplied when `progress` (0 to 1) of the whole run is done."""
        if progress < self.warmup_ratio:
            return progress / self.warmup_ratio
        left = 1 - (progress - self.warmup_ratio) / max(1e-12, 1 - self.warmup_ratio)
        match self.lr_scheduler_type:
            case "linear":
                return max(0.0, left)
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * (1 - left)))
            case _:
                return 1.0


class Learner:
    """Trainable tensors with their optimizer: what one site, or one server half, changes in a round.

    `tensors` are leaves with gradients; `step` applies and clears them.
    """

    def __init__(self, tensors: Adapter, config: TrainConfig, learning_rate: float | None = None) -> None:
        self.config = config
        self.tensors = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
        rate = config.learning_rate if learning_rate is None else learning_rate
        groups = [
            {"params": [t for name, t in self.tensors.items() if "lora_" in name], "full_rate": rate},
            {
                "params": [t for name, t in self.tensors.items() if "lora_" not in name],
                "full_rate": config.head_learning_rate if learning_rate is None else learning_rate,
            },
        ]
        groups = [group for group in groups if group["params"]]
        self._optimizer = _optimizer(groups, config) if groups else None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, their gradients and the optimizer's state."""
        return self.config.state_bytes(self.tensors)

    def squared_norms(self) -> Tensor:
        """Squared norm of each gradient, fp64 [tensors]. Without gradients: one zero."""
        norms = [t.grad.double().square().sum() for t in self.tensors.values() if t.grad is not None]
        return torch.stack(norms).cpu() if norms else torch.zeros(1, dtype=torch.float64)

    def step(self, progress: float, elsewhere: Tensor | None = None) -> None:
        """Clip, apply and clear the gradients.

        `progress` is the share of the whole run done. `elsewhere` holds the squared norms of gradients that the other
        side of a cut holds, so that clipping by the global norm is the same as in one piece; the sum is correctly
        rounded (`math.fsum`) and thus does not depend on where the cut lies.
        """
        if self.config.max_grad_norm is not None:
            squares = self.squared_norms().tolist() + ([] if elsewhere is None else elsewhere.tolist())
            scale = min(1.0, self.config.max_grad_norm / (math.sqrt(math.fsum(squares)) + 1e-6))
            for tensor in self.tensors.values():
                if tensor.grad is not None:
                    tensor.grad.mul_(scale)
        if self._optimizer is None:
            return
        factor = self.config.rate_factor(progress)
        for group in self._optimizer.param_groups:
            group["lr"] = group["full_rate"] * factor
        self._optimizer.step()
        self.drop()

    def drop(self) -> None:
        """Forget the gradients: they were applied, or will not be."""
        for tensor in self.tensors.values():
            tensor.grad = None

    def memory(self) -> dict[str, dict[str, Tensor]]:
        """What the optimizer remembers, by tensor: moments and steps; nothing for plain SGD."""
        state = self._optimizer.state if self._optimizer is not None else {}
        kept = {name: state.get(tensor, {}) for name, tensor in self.tensors.items()}
        return {
            name: {key: value.detach().clone() for key, value in held.items() if isinstance(value, Tensor)}
            for name, held in kept.items()
            if held
        }

    def recall(self, memory: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on with what an earlier optimizer of the same kind remembered."""
        for name, held in memory.items():
            if self._optimizer is not None and name in self.tensors:
                tensor = self.tensors[name]
                self._optimizer.state[tensor] = {key: value.clone().to(tensor.device) for key, value in held.items()}

    def values(self) -> dict[str, Tensor]:
        """The tensors as they are now, detached."""
        return {name: tensor.detach() for name, tensor in self.tensors.items()}


def _optimizer(groups: list[dict[str, object]], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=1.0, weight_decay=config.weight_decay, fused=True)
    return torch.optim.SGD(groups, lr=1.0, weight_decay=config.weight_decay, momentum=config.momentum)


def task_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy.

    Classification: logits [B, C], targets [B]. Language modelling: logits [B, T, V], targets [B, T], shifted here so
    that position t predicts token t+1; targets of -100 don't count, and the mean is over those that do.
    """
    if logits.dim() == 2:
        return F.cross_entropy(logits, targets)
    counted = targets[:, 1:]
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), counted.flatten(), ignore_index=-100, reduction="sum")
    return total / (counted != -100).sum().clamp(min=1)


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float, weights_N: Tensor | None = None, rest: bool = False
) -> Tensor:
    """T²·KL(softmax(teacher/T) ‖ softmax(student/T)), mean over rows; both are logits [N, C].

    With weights each row's part is multiplied by its own. With `rest` the classes that share the least of the teacher's
    logits in a row count as one: of them only the mass is known, and how the student parts it is its own affair.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531): the factor T² keeps the
    gradient's size independent of T.
    """
    log_q = F.log_softmax(teacher / temperature, dim=-1)
    log_p = F.log_softmax(student / temperature, dim=-1)
    if rest:
        log_q, log_p = _with_rest(log_q, log_p)
    if weights_N is not None:
        rows_N = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
        return temperature**2 * (weights_N * rows_N).mean()
    return temperature**2 * F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def _with_rest(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Both [N, C + 1]: the classes at log_q's least give their mass to a last one, and have none themselves."""
    least = log_q == log_q.amin(-1, keepdim=True)
    none = torch.tensor(-1e4, dtype=log_q.dtype, device=log_q.device)  # e to it is 0 in every dtype

    def lumped(log: Tensor) -> Tensor:
        mass = log.masked_fill(~least, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat((torch.where(least, none, log), mass), dim=-1)

    return lumped(log_q), lumped(log_p)
