"""Training loss: cross-entropy of the trunk's and the MTP module's predictions under one tied head, less focus."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Model

MTP_WEIGHT = 0.3
# DeepSeek-V3 adds its sequence-wise loss with a tiny weight, so that a text uses all experts. Here it is subtracted: a
# text keeps to some experts, the bias balances over texts, and topics are told apart by their experts.
FOCUS_WEIGHT = 0.003
ROWS = 1024


class HeadLoss(torch.autograd.Function):
    """−Σ scaleᵢ ln p(targetᵢ), and each row's −ln p, with gradients computed on the way forward, `ROWS` rows at a time.

    The logits of all rows would be the largest tensor of a step by far; like this they stay in the cache.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [N, D], head [V, D], targets [N], scales [N] → scalar, [N]"""
        dtype = (
            torch.get_autocast_dtype(hidden.device.type)
            if torch.is_autocast_enabled(hidden.device.type)
            else head.dtype
        )
        weight = head.to(dtype)
        hidden_gradients, losses = [], []
        head_gradient = torch.zeros_like(head)
        for x, target, scale in zip(hidden.to(dtype).split(ROWS), targets.split(ROWS), scales.split(ROWS), strict=True):
            logits = F.linear(x, weight).float()
            log_sum = logits.logsumexp(-1)
            losses.append(log_sum - logits.gather(1, target[:, None]).squeeze(1))
            gradient = (logits - log_sum[:, None]).exp()
            wanted = torch.arange(head.shape[0], device=head.device) == target[:, None]
            gradient = ((gradient - wanted.float()) * scale[:, None]).to(dtype)
            hidden_gradients.append(gradient @ weight)
            head_gradient += (gradient.mT @ x).float()
        losses = torch.cat(losses)
        ctx.save_for_backward(torch.cat(hidden_gradients).to(hidden.dtype), head_gradient)
        ctx.mark_non_differentiable(losses)
        return (losses * scales).sum(), losses

    @staticmethod
    def backward(ctx, outer: Tensor, _: Tensor):
        hidden_gradient, head_gradient = ctx.saved_tensors
        return outer * hidden_gradient, outer * head_gradient, None, None


def training_loss(model: Model, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ids [B, T+2] → loss, mean nats of trunk and module [2], and loads [MoE layers, E]."""
    hidden, routings = model.trunk(ids[:, :-2])
    drafted, routing = model.draft(hidden, ids[:, 1:-1])
    routings.append(routing)
    count = hidden.shape[0] * hidden.shape[1]
    scales = torch.full((2 * count,), 1 / count, device=ids.device)
    scales[count:] *= MTP_WEIGHT
    states = torch.cat([hidden.flatten(0, 1), drafted.flatten(0, 1)])
    targets = torch.cat([ids[:, 1:-1].flatten(), ids[:, 2:].flatten()])
    loss, losses = HeadLoss.apply(states, model.embed_tokens.weight, targets, scales)
    loss = loss - FOCUS_WEIGHT * torch.stack([routing.focus for routing in routings]).sum()
    return loss, losses.view(2, -1).mean(1), torch.stack([routing.load for routing in routings])
