"""Muon for matrices, AdamW for the rest; warm-up, stable phase and decay with tokens as their clock."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import Model, Moe

MUON_RATE, ADAM_RATE, WEIGHT_DECAY = 0.02, 4e-3, 0.05
MOMENTUM = 0.95
CLIP = 1.0
WARM_UP_TOKENS = 500_000
# The steps of "Polar Express" (Amsel et al. 2025): odd polynomials a·x + b·x³ + c·x⁵ of the singular values.
POLAR = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
BIAS_STEP = 5e-3
BIAS_EVERY = 4  # optimiser steps


@dataclass
class Schedule:
    """Factor of all rates. `decay_from` and `decay_tokens` are set in a run that cools."""

    decay_from: int = 0
    decay_tokens: int = 0

    def factor(self, tokens: int) -> float:
        """Warm-up is linear; cooling is 1 − √ of its progress (Hägele et al. 2024)."""
        warm = min(1.0, (tokens + 1) / WARM_UP_TOKENS)
        if not self.decay_tokens:
            return warm
        return warm * (1 - math.sqrt(min(1.0, max(0, tokens - self.decay_from) / self.decay_tokens)))

    def finished(self, tokens: int) -> bool:
        return self.decay_tokens > 0 and tokens >= self.decay_from + self.decay_tokens


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values near 1, for [..., R, C], in bf16."""
    x = matrix.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in POLAR:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Nesterov momentum, orthogonalised (Jordan et al. 2024); decoupled weight decay. Stacked matrices count singly."""

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        self.weights = list(weights)
        self.momenta = [torch.zeros_like(weight) for weight in self.weights]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        rate = MUON_RATE * factor
        for weight, momentum in zip(self.weights, self.momenta, strict=True):
            momentum.lerp_(weight.grad, 1 - MOMENTUM)
            update = orthogonal(weight.grad.lerp(momentum, MOMENTUM))
            stretch = math.sqrt(max(1, weight.shape[-2] / weight.shape[-1]))
            weight.mul_(1 - rate * WEIGHT_DECAY).add_(update, alpha=-rate * stretch)


class Optimiser:
    """Both optimisers and the balance of experts."""

    def __init__(self, model: Model) -> None:
        matrices, others = [], []
        for name, weight in model.named_parameters():
            plain = weight.dim() < 2 or name.startswith("embed") or name.endswith("gate.weight")
            (others if plain else matrices).append(weight)
        self.muon = Muon(matrices)
        self.others = others
        decayed = [weight for weight in others if weight.dim() >= 2]
        norms = [weight for weight in others if weight.dim() < 2]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=ADAM_RATE, betas=(0.9, 0.95), eps=1e-10, fused=True)
        self.moes: list[Moe] = list(model.moes().values())
        device = model.embed_tokens.weight.device
        self.loads = torch.zeros(len(self.moes), model.shape.n_routed_experts, device=device)

    def step(self, number: int, factor: float, loads: Tensor) -> None:
        """One step from the gradients in place. `loads` [MoE layers, E] are those of this step's whole batch."""
        torch.nn.utils.clip_grad_norm_(self.others, CLIP)
        for group in self.adam.param_groups:
            group["lr"] = ADAM_RATE * factor
        self.adam.step()
        self.muon.step(factor)
        self.loads += loads
        if number % BIAS_EVERY == 0:
            self.balance(BIAS_STEP * factor)
            self.loads.zero_()

    @torch.no_grad()
    def balance(self, step: float) -> None:
        """Moves the biases of busy experts down and of idle ones up: DeepSeek-V3's way, without an auxiliary loss.

        By the tokens of some steps together: a batch has few topics, and balancing it would force experts off theirs.
        """
        for moe, load in zip(self.moes, self.loads, strict=True):
            moe.gate.e_score_correction_bias += step * torch.sign(load.mean() - load)

    def state(self) -> dict:
        return {"muon": self.muon.momenta, "adam": self.adam.state_dict(), "loads": self.loads}

    def load(self, state: dict) -> None:
        for momentum, saved in zip(self.muon.momenta, state["muon"], strict=True):
            momentum.copy_(saved)
        self.adam.load_state_dict(state["adam"])
        self.loads.copy_(state["loads"])
