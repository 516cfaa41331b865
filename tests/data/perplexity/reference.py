"""Perplexity of the demo model on text.txt by PyTorch and transformers, written to reference.json beside this file.

    python3 -m venv venv
    venv/bin/pip install torch transformers safetensors tokenizers
    venv/bin/python tests/data/perplexity/reference.py models/demo

No file is fetched. The model is transformers' DeepseekV3ForCausalLM in float64 (and in float32, to see what rounding
does), its weights are those of the checkpoint, and the MTP layer is left out. Windows are cut as in the usual recipe: a window
begins every `stride` tokens, and only those of its tokens count that no window before it held. The first token of a window has
no prediction.
"""

import json
import math
import sys
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import load_file

WINDOWS = [{"context": 2048, "stride": 2048}, {"context": 256, "stride": 256}, {"context": 256, "stride": 96}]


def tokens(model: Path, text: str) -> list[int]:
    """The begin token, as tokenizer_config.json asks for it, and the text."""
    config = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    begin = [tokenizer.token_to_id(config["bos_token"])] if config["add_bos_token"] else []
    return begin + tokenizer.encode(text, add_special_tokens=False).ids


def load(model: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(model)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the grouped products know no float64
    built = transformers.DeepseekV3ForCausalLM.from_pretrained(model, config=config, dtype=dtype)
    stored = load_file(model / "model.safetensors")
    # What was read is what is stored: no tensor was left at random.
    named = dict(built.named_parameters())
    for name in ["model.embed_tokens.weight", "model.layers.3.self_attn.kv_b_proj.weight"]:
        assert torch.equal(named[name], stored[name].to(dtype)), name
    return built.eval()


@torch.no_grad()
def measure(model: transformers.PreTrainedModel, ids: list[int], context: int, stride: int) -> dict:
    nats, hits, predicted, windows, seen = 0.0, 0, 0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        first = max(seen, begin + 1)
        if first < end:
            logits = model(torch.tensor([ids[begin:end]])).logits[0].double()
            probabilities = torch.log_softmax(logits, dim=-1)
            for index in range(first, end):
                row = probabilities[index - 1 - begin]
                nats -= row[ids[index]].item()
                hits += int(row.argmax().item() == ids[index])
            predicted += end - first
            windows += 1
        seen = end
        if end == len(ids):
            break
    mean = nats / predicted
    return {
        "windows": windows,
        "predicted_tokens": predicted,
        "nats_per_token": mean,
        "perplexity": math.exp(mean),
        "top1_accuracy": hits / predicted,
    }


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: reference.py MODEL")
    model, here = Path(sys.argv[1]), Path(__file__).parent
    text = (here / "text.txt").read_text(encoding="utf-8")
    ids = tokens(model, text)
    runs = [dict(run) for run in WINDOWS]
    for name, dtype in [("float64", torch.float64), ("float32", torch.float32)]:
        built = load(model, dtype)
        for run in runs:
            run[name] = measure(built, ids, run["context"], run["stride"])
    versions = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
    result = {
        "model": "models/demo",
        "text": "text.txt",
        "tokens": len(ids),
        "bytes": len(text.encode()),
        "versions": {"python": sys.version.split()[0], **versions},
        "runs": runs,
    }
    (here / "reference.json").write_text(json.dumps(result, indent=2) + "\n")
    for run in runs:
        print(run["context"], run["stride"], run["float64"]["perplexity"], run["float32"]["perplexity"])


if __name__ == "__main__":
    main()
