"""Between this recipe's model and the Hugging Face checkpoint: names, bf16, and DeepSeek's FP8 of 128×128 blocks."""

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Model

BLOCK = 128
LARGEST = 448.0  # of e4m3fn
QUANTISED = re.compile(
    r"\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|gate_proj|up_proj|down_proj)\.weight$"
)


def checkpoint_name(name: str) -> str:
    return "model." + name


def to_checkpoint(model: Model) -> dict[str, Tensor]:
    """Tensors by their checkpoint names, f32. The MTP module's embedding and head are the trunk's and are left out."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        stacked = re.fullmatch(r"(.*\.experts)\.(\w+)", name)
        if stacked:
            for expert, matrix in enumerate(tensor):
                tensors[checkpoint_name(f"{stacked[1]}.{expert}.{stacked[2]}.weight")] = matrix
        else:
            tensors[checkpoint_name(name)] = tensor
    return tensors


def load_checkpoint(model: Model, tensors: dict[str, Tensor]) -> None:
    """Fills the model from tensors by their checkpoint names, as `to_checkpoint` gives them; all must be there."""
    expected = to_checkpoint(model)
    if tensors.keys() != expected.keys():
        missing, foreign = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise SystemExit(f"checkpoint does not fit config.json: missing {missing[:3]}, unexpected {foreign[:3]}")
    with torch.no_grad():
        for name, target in expected.items():  # views of the model's own parameters
            target.copy_(tensors[name])


def to_bf16(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All in bf16 but the routers' biases, which decide and stay f32."""
    return {
        name: tensor.contiguous().clone()
        if name.endswith("e_score_correction_bias")
        else tensor.bfloat16().contiguous()
        for name, tensor in tensors.items()
    }


def to_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As DeepSeek stores it: projections in e4m3 with `weight_scale_inv`, multipliers of blocks; all else in bf16."""
    packed = {}
    for name, tensor in to_bf16(tensors).items():
        if QUANTISED.search(name):
            packed[name], packed[name + "_scale_inv"] = quantise(tensor.float())
        else:
            packed[name] = tensor
    return packed


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[R, C] f32 → codes [R, C] e4m3fn and multipliers [⌈R/128⌉, ⌈C/128⌉] f32; the largest of a block becomes 448."""
    rows, columns = matrix.shape
    padded = F.pad(matrix, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scales = (blocks.abs().amax((1, 3)) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (blocks / scales[:, None, :, None]).view_as(padded)[:rows, :columns]
    return codes.contiguous().to(torch.float8_e4m3fn), scales


def dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    """The matrix that codes and multipliers stand for, f32."""
    rows, columns = codes.shape
    expanded = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return codes.float() * expanded
