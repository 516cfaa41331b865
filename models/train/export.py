"""Writes a trained model as a Hugging Face checkpoint: bf16, or FP8 in blocks of 128×128 as DeepSeek stores it."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import Model, Shape
from weights import BLOCK, to_bf16, to_checkpoint, to_fp8

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="latest.pt of train.py")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--format", choices=("bf16", "fp8"), default="bf16", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--tokenizer", type=Path, default=Path("corpus/tokenizer.json"), help="default: %(default)s")
    parser.add_argument(
        "--config", type=Path, default=Path(__file__).with_name("config.json"), help="shape of the model"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    model = Model(Shape.read(arguments.config))
    model.load_state_dict(torch.load(arguments.checkpoint, map_location="cpu", weights_only=True)["model"])
    convert = {"bf16": to_bf16, "fp8": to_fp8}[arguments.format]
    tensors = convert(to_checkpoint(model))
    save_file(tensors, arguments.out / "model.safetensors", metadata={"format": "pt"})

    config = json.loads(arguments.config.read_text())
    write_json(
        arguments.out / "config.json", config | ({"quantization_config": FP8} if arguments.format == "fp8" else {})
    )
    shutil.copyfile(arguments.tokenizer, arguments.out / "tokenizer.json")
    write_json(
        arguments.out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<｜begin▁of▁sentence｜>",
            "eos_token": "<｜end▁of▁sentence｜>",
            "pad_token": "<｜▁pad▁｜>",
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "chat_template": TEMPLATE,
        },
    )
    write_json(
        arguments.out / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.7, "top_p": 0.95},
    )
    size = (arguments.out / "model.safetensors").stat().st_size
    print(f"{arguments.out}: {len(tensors)} tensors, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
