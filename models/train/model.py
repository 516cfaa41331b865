"""The architecture of DeepSeek-V3 in plain PyTorch: latent attention, sigmoid-routed experts in groups, one MTP module.

B sequences of T tokens, N = B·T, D hidden, E experts of which k are chosen, H heads. Modules are named as in the
Hugging Face checkpoint, except that a layer's experts are stacked into one tensor each for gate, up and down;
`weights.py` converts.
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 64


@dataclass(frozen=True)
class Shape:
    """The fields of `config.json` that the model depends on."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_shared_experts: int
    n_routed_experts: int
    routed_scaling_factor: float
    kv_lora_rank: int
    q_lora_rank: int
    qk_rope_head_dim: int
    v_head_dim: int
    qk_nope_head_dim: int
    n_group: int
    topk_group: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int

    @staticmethod
    def read(path: Path) -> "Shape":
        """Reads a config.json; what this code has no other way of doing must be as DeepSeek-V3 has it."""
        config = json.loads(path.read_text())
        fixed = {
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            "num_nextn_predict_layers": 1,
            "rope_scaling": None,
            "rope_interleave": True,
        }
        for name, expected in fixed.items():
            if config.get(name) != expected:
                raise SystemExit(f"{path}: {name} is {config.get(name)!r}, this recipe can only train {expected!r}")
        return Shape(**{field.name: config[field.name] for field in fields(Shape)})


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of adjacent pairs of [..., T, R]; first members come out before second ones, which changes no score."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """Multi-head latent attention, keys and values expanded."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        s, self.shape = shape, shape
        query = s.qk_nope_head_dim + s.qk_rope_head_dim
        self.q_a_proj = linear(s.hidden_size, s.q_lora_rank)
        self.q_a_layernorm = RmsNorm(s.q_lora_rank, s.rms_norm_eps)
        self.q_b_proj = linear(s.q_lora_rank, s.num_attention_heads * query)
        self.kv_a_proj_with_mqa = linear(s.hidden_size, s.kv_lora_rank + s.qk_rope_head_dim)
        self.kv_a_layernorm = RmsNorm(s.kv_lora_rank, s.rms_norm_eps)
        self.kv_b_proj = linear(s.kv_lora_rank, s.num_attention_heads * (s.qk_nope_head_dim + s.v_head_dim))
        self.o_proj = linear(s.num_attention_heads * s.v_head_dim, s.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]"""
        s = self.shape
        batch, tokens, _ = x.shape
        heads = s.num_attention_heads
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(batch, tokens, heads, -1).transpose(1, 2)
        q_nope, q_rope = q.split([s.qk_nope_head_dim, s.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([s.kv_lora_rank, s.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(batch, tokens, heads, -1).transpose(1, 2)
        k_nope, v = kv.split([s.qk_nope_head_dim, s.v_head_dim], -1)
        k_rope = rotate(k_rope.unsqueeze(1), cos, sin).expand(-1, heads, -1, -1)
        q = torch.cat([q_nope, rotate(q_rope, cos, sin)], -1)
        k = torch.cat([k_nope, k_rope], -1)
        out = attend(q, k, v)
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [B, H, T, ·]. In two halves of queries, since the first needs only half of the keys.

    Written out because on a CPU this, compiled, is faster than `scaled_dot_product_attention` for heads this narrow.
    """
    tokens, scale = q.shape[-2], q.shape[-1] ** -0.5
    half = tokens // 2
    outputs = []
    for begin, end in ((0, half), (half, tokens)):
        scores = (q[..., begin:end, :] @ k[..., :end, :].mT).float() * scale
        hidden = torch.arange(begin, end, device=q.device)[:, None] < torch.arange(end, device=q.device)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1).to(v.dtype)
        outputs.append(weights @ v[..., :end, :])
    return torch.cat(outputs, -2)


class Mlp(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(hidden, inner),
            linear(hidden, inner),
            linear(inner, hidden),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Dispatch(torch.autograd.Function):
    """Rows of tokens, gathered for the experts: [N, D] → [S, D], one for each slot. The gradient is a gather too.

    `token` [S] is the token of each slot, `slot` [N, k] the slot of each choice. What is in slots without a choice is
    never read.
    """

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (slot,) = ctx.saved_tensors
        return gradient.index_select(0, slot.flatten()).view(*slot.shape, -1).sum(1), None, None


class Combine(torch.autograd.Function):
    """What the experts made of each choice: [S, D] → [N, k, D]."""

    @staticmethod
    def forward(ctx, y: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.slots = len(y)
        return y.index_select(0, slot.flatten()).view(*slot.shape, -1)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (slot,) = ctx.saved_tensors
        rows = gradient.new_zeros(ctx.slots, gradient.shape[-1])
        return rows.index_copy(0, slot.flatten(), gradient.flatten(0, 1)), None


class Gate(nn.Module):
    """The router. Its bias chooses and is never learned by gradient: `balance` moves it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(shape.n_routed_experts, shape.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(shape.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, D] → ids and weights of the chosen experts, [N, k] each, and scores of all, [N, E].

        In f32: rounded scores would choose others.
        """
        s = self.shape
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(F.linear(x.float(), self.weight))
        with torch.no_grad():
            biased = scores + self.e_score_correction_bias
            groups = biased.view(-1, s.n_group, s.n_routed_experts // s.n_group)
            best = groups.topk(2, -1).values.sum(-1).topk(s.topk_group, -1).indices
            kept = torch.zeros(groups.shape[:2], dtype=torch.bool, device=x.device).scatter(1, best, True)
            ids = groups.masked_fill(~kept.unsqueeze(-1), -math.inf).flatten(1).topk(s.num_experts_per_tok, -1).indices
        weights = scores.gather(1, ids)
        return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * s.routed_scaling_factor, scores


class Experts(nn.Module):
    """All routed experts of a layer; `gate_proj[e]` is what the checkpoint has as `experts.e.gate_proj.weight`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        count, hidden, inner = shape.n_routed_experts, shape.hidden_size, shape.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(count, inner, hidden))
        self.up_proj = nn.Parameter(torch.empty(count, inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, inner))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Slots [S, D] sorted by expert; expert e has those before `ends[e]` and from `ends[e - 1]` on."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        x = x.to(dtype)
        gate, up, down = (w.to(dtype).mT for w in (self.gate_proj, self.up_proj, self.down_proj))
        inner = F.silu(F.grouped_mm(x, gate, offs=ends)) * F.grouped_mm(x, up, offs=ends)
        return F.grouped_mm(inner, down, offs=ends)


class Routing(NamedTuple):
    """How a batch used the experts of one layer."""

    load: Tensor  # [E] f32, tokens that chose each expert
    focus: Tensor  # scalar, see `focus`


def focus(ids: Tensor, scores: Tensor) -> Tensor:
    """Σ fₑ Pₑ of a window, mean over windows: 1 if it uses all experts alike, E/k if k alone, at scores of 0 or 1.

    ids [B, T, k], scores [B, T, E]; fₑ is the share of choices times E, Pₑ the mean share of scores. This is the
    sequence-wise loss of DeepSeek-V3 (equations 17 to 20) without its weight. Gradients go through P.
    """
    shares = scores / scores.sum(-1, keepdim=True)
    experts = scores.shape[-1]
    chosen = F.one_hot(ids.flatten(1), experts).float().mean(1) * experts
    return (chosen * shares.mean(1)).sum(-1).mean()


class Moe(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = Gate(shape)
        self.experts = Experts(shape)
        self.shared_experts = Mlp(shape.hidden_size, shape.moe_intermediate_size * shape.n_shared_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """[B, T, D] → its output, and how the experts were used."""
        rows = x.flatten(0, 1)
        ids, weights, scores = self.gate(rows)
        load = F.one_hot(ids.flatten(), self.shape.n_routed_experts).sum(0)
        token, slot, ends = slots(ids, load)
        grouped = Dispatch.apply(rows, token, slot)
        outputs = Combine.apply(self.experts(grouped, ends), slot)
        mixed = (outputs * weights.unsqueeze(-1)).sum(1)
        routing = Routing(load.float(), focus(ids.unflatten(0, x.shape[:2]), scores.unflatten(0, x.shape[:2])))
        return (mixed + self.shared_experts(rows)).view_as(x), routing


def slots(ids: Tensor, load: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the choices `ids` [N, k] go, for `load` [E] choices of each expert: three tensors.

    The token of each slot [S], the slot of each choice [N, k], and where the slots of each expert end [E]. An expert
    has a multiple of `TILE` slots, so that its products come in few shapes: oneDNN prepares each shape anew.
    """
    chosen, experts = ids.flatten(), len(load)
    padded = (load + TILE - 1) // TILE * TILE
    ends = padded.cumsum(0)
    order = chosen.argsort(stable=True)
    sorted_ids = chosen[order]
    rank = torch.arange(len(order), device=ids.device) - (load.cumsum(0) - load)[sorted_ids]
    sorted_slots = (ends - padded)[sorted_ids] + rank
    slot = torch.empty_like(order).scatter(0, order, sorted_slots)
    token = torch.zeros(len(order) + experts * (TILE - 1), dtype=torch.long, device=ids.device)
    token = token.scatter(0, sorted_slots, order // ids.shape[1])
    return token, slot.view_as(ids), ends.to(torch.int32)


class Layer(nn.Module):
    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        dense = index < shape.first_k_dense_replace
        self.self_attn = Attention(shape)
        self.mlp = Mlp(shape.hidden_size, shape.intermediate_size) if dense else Moe(shape)
        self.input_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Routing | None]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out = self.mlp(self.post_attention_layernorm(x))
        out, routing = out if isinstance(out, tuple) else (out, None)
        return x + out, routing


class MtpLayer(Layer):
    """The multi-token module: a layer over the join of the trunk's output and the next token's embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, shape.num_hidden_layers)
        self.enorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.hnorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.eh_proj = linear(2 * shape.hidden_size, shape.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RmsNorm(shape.hidden_size, shape.rms_norm_eps)})


class Model(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        layers = [Layer(shape, index) for index in range(shape.num_hidden_layers)]
        self.layers = nn.ModuleList([*layers, MtpLayer(shape)])
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        powers = torch.arange(0, shape.qk_rope_head_dim, 2).double() / shape.qk_rope_head_dim
        angles = torch.arange(shape.max_position_embeddings).double()[:, None] / shape.rope_theta**powers
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def initialise(self, seed: int) -> None:
        """Embeddings and routers N(0, 0.02²), matrices N(0, 0.25 / inputs); smaller by √(2L) where they end a block."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            deviation = (
                0.02 if name.startswith("embed") or name.endswith("gate.weight") else 0.5 / math.sqrt(weight.shape[-1])
            )
            if "o_proj" in name or "down_proj" in name:
                deviation /= math.sqrt(2 * self.shape.num_hidden_layers)
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)

    def moes(self) -> dict[int, Moe]:
        """The mixture-of-experts layers by index, the multi-token module last."""
        return {index: layer.mlp for index, layer in enumerate(self.layers) if isinstance(layer.mlp, Moe)}

    def trunk(self, ids: Tensor) -> tuple[Tensor, list[Routing]]:
        """[B, T] → hidden states behind the last norm [B, T, D], and how each MoE layer used its experts."""
        x, routings = self.embed_tokens(ids), []
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers[:-1]:
            x, routing = layer(x, cos, sin)
            routings += [] if routing is None else [routing]
        return self.norm(x), routings

    def draft(self, hidden: Tensor, following: Tensor) -> tuple[Tensor, Routing]:
        """Hidden states [B, T, D] of tokens i, ids [B, T] of tokens i+1 → states that predict tokens i+2."""
        layer = self.layers[-1]
        joined = layer.eh_proj(torch.cat([layer.enorm(self.embed_tokens(following)), layer.hnorm(hidden)], -1))
        x, routing = layer(joined, self.cos[: following.shape[1]], self.sin[: following.shape[1]])
        return layer.shared_head["norm"](x), routing

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight)
