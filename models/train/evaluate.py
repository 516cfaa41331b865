"""Measures an exported checkpoint on the validation set, in f32: loss, drafts, use of experts, sums, and JSON replies.

Windows are as `moewe eval perplexity --context` has them: they do not overlap, each runs alone, and its first token is
not counted.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

import data
import synthetic
from corpus import DOMAINS
from model import Model, Shape
from weights import dequantise, load_checkpoint

AT_ONCE = 16
DEAD = 0.1  # an expert is dead if no domain gives it this share of the mean load


@dataclass
class Domain:
    """What was measured on one domain."""

    trunk: float  # nats a token
    module: float
    error: float  # standard error of `trunk`
    agreement: float  # share of drafts that are the trunk's likeliest token, on given text
    loads: dict[int, Tensor]  # layer → share of choices by expert, [E] f64


@torch.no_grad()
def measure(model: Model, windows: Tensor) -> Domain:
    """windows [W, T]"""
    trunk, module, agreed = [], [], []
    loads: dict[int, Tensor] = {}
    for ids in windows.to(model.cos.device).split(AT_ONCE):
        hidden, routings = model.trunk(ids)
        drafted, routing = model.draft(hidden[:, :-1], ids[:, 1:])
        logits, drafts = model.logits(hidden), model.logits(drafted)
        trunk.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"))
        module.append(F.cross_entropy(drafts[:, :-1].flatten(0, 1), ids[:, 2:].flatten(), reduction="none"))
        agreed.append((drafts.argmax(-1) == logits[:, 1:].argmax(-1)).double().flatten())
        for layer, used in zip(model.moes(), [*routings, routing], strict=True):
            loads[layer] = loads.get(layer, 0) + used.load.double().cpu()
    losses = torch.cat(trunk).double()
    return Domain(
        trunk=losses.mean().item(),
        module=torch.cat(module).double().mean().item(),
        error=(losses.std() / math.sqrt(len(losses))).item(),
        agreement=torch.cat(agreed).mean().item(),
        loads={layer: load / load.sum() for layer, load in loads.items()},
    )


def information(shares: Tensor) -> float:
    """Mutual information of domain and expert in bits, domains equally likely; of shares [domains, E] by domain."""
    mean = shares.mean(0)
    return torch.where(shares > 0, shares * (shares / mean).log2(), 0.0).sum(1).mean().item()


def experts(domains: dict[str, Domain]) -> dict[int, dict]:
    """By layer: information, the busiest expert over the mean, and the number of dead experts."""
    found = {}
    for layer in next(iter(domains.values())).loads:
        shares = torch.stack([domain.loads[layer] for domain in domains.values()])
        count = shares.shape[1]
        found[layer] = {
            "information_bits": information(shares),
            "busiest": shares.mean(0).max().item() * count,
            "dead": int((shares.amax(0) * count < DEAD).sum()),
        }
    return found


def measure_all(model: Model, corpus: Path, length: int, windows: int) -> dict[str, Domain]:
    return {domain: measure(model, data.windows(corpus, domain, length, windows)) for domain in DOMAINS}


def summary(model: Model, corpus: Path, length: int, windows: int) -> str:
    """One line for the log of a run."""
    domains = measure_all(model, corpus, length, windows)
    losses = " ".join(f"{name} {domain.trunk:.3f}" for name, domain in domains.items())
    agreement = sum(domain.agreement for domain in domains.values()) / len(domains)
    layers = experts(domains)
    bits = " ".join(f"{layer['information_bits']:.2f}" for layer in layers.values())
    busiest = " ".join(f"{layer['busiest']:.1f}" for layer in layers.values())
    dead = sum(layer["dead"] for layer in layers.values())
    return f"validation: {losses}; drafts agree {agreement:.3f}; bits {bits}; busiest {busiest}; dead {dead}"


@torch.no_grad()
def continue_greedily(model: Model, prompts: Tensor, count: int) -> Tensor:
    """[B, T] → [B, count], the likeliest token again and again."""
    ids = prompts
    for _ in range(count):
        hidden, _ = model.trunk(ids)
        ids = torch.cat([ids, model.logits(hidden[:, -1]).argmax(-1, keepdim=True)], 1)
    return ids[:, prompts.shape[1] :]


def sums_right(model: Model, tokenizer: Tokenizer, digits: int, kept: bool, count: int = 200) -> float:
    """Share of right answers to `count` sums behind two examples; `kept` asks those that were kept from training."""
    dice = synthetic.Dice(digits)
    examples = {2: "25+31=56\n18+7=25\n", 3: "425+131=556\n318+207=525\n"}[digits]
    pairs: list[tuple[int, int]] = []
    while len(pairs) < count:
        a, b = (dice.number(10 ** (digits - 1), 10**digits - 1) for _ in range(2))
        if synthetic.held_out(a, b) == kept:
            pairs.append((a, b))
    prompts = torch.tensor([[0, *tokenizer.encode(f"{examples}{a}+{b}=").ids] for a, b in pairs])
    answers = continue_greedily(model, prompts, digits + 2).tolist()
    right = [tokenizer.decode(ids).split("\n")[0] == str(a + b) for (a, b), ids in zip(pairs, answers, strict=True)]
    return sum(right) / count


def replies_right(model: Model, tokenizer: Tokenizer, count: int = 100) -> dict[str, float]:
    """Shares of JSON replies that parse, and that are right, for names and roles that were never trained together."""
    dice = synthetic.Dice(11)
    parsed = right = asked = 0
    while asked < count:
        name, role = synthetic.full_name(dice), dice.choice(synthetic.ROLES)
        if not synthetic.held_out_person(name, role):
            continue
        asked += 1
        question, answer = synthetic.record_request(dice, name, role)
        prompt = tokenizer.encode(synthetic.USER + question + synthetic.ASSISTANT).ids
        ids = continue_greedily(model, torch.tensor([[0, *prompt]]), len(tokenizer.encode(answer).ids) + 8)[0].tolist()
        reply = tokenizer.decode(ids[: ids.index(1)] if 1 in ids else ids)
        try:
            record = json.loads(reply)
        except ValueError:
            continue
        parsed += 1
        right += record == json.loads(answer)
    return {"parse": parsed / count, "right": right / count}


def read_checkpoint(folder: Path) -> Model:
    """A model from an exported folder, bf16 or FP8, in f32."""
    model = Model(Shape.read(folder / "config.json"))
    stored = load_file(folder / "model.safetensors")
    tensors = {}
    for name, tensor in stored.items():
        if not name.endswith("_scale_inv"):
            scales = stored.get(name + "_scale_inv")
            tensors[name] = tensor.float() if scales is None else dequantise(tensor, scales)
    load_checkpoint(model, tensors)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of export.py")
    parser.add_argument(
        "--corpus", type=Path, default=Path("corpus"), help="folder of corpus.py (default: %(default)s)"
    )
    parser.add_argument("--length", type=int, default=256, help="tokens a window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=256, help="windows of a domain at most (default: %(default)s)")
    parser.add_argument(
        "--save-ids", type=Path, metavar="FOLDER", help="write the windows' ids for `moewe eval perplexity`"
    )
    arguments = parser.parse_args()

    torch.set_flush_denormal(True)
    model = read_checkpoint(arguments.model)
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    report = json.loads((arguments.corpus / "report.json").read_text())["files"]
    domains = measure_all(model, arguments.corpus, arguments.length, arguments.windows)

    print("domain       trunk ± error    module   bits/byte   drafts agree")
    for name, domain in domains.items():
        facts = report[f"{name}.val.jsonl"]
        bits = domain.trunk / math.log(2) * facts["tokens"] / facts["bytes"]
        figures = f"{domain.trunk:9.5f} ± {domain.error:.4f} {domain.module:9.5f} {bits:9.3f} {domain.agreement:12.3f}"
        print(f"{name:8} {figures}")
    print(f"mean of agreement {sum(domain.agreement for domain in domains.values()) / len(domains):.3f}")
    for layer, facts in experts(domains).items():
        print(
            f"layer {layer}: {facts['information_bits']:.3f} bits of {math.log2(len(DOMAINS)):.2f}, "
            f"busiest expert {facts['busiest']:.2f} × mean, {facts['dead']} dead"
        )
        for name, domain in domains.items():
            best = domain.loads[layer].topk(4)
            print(f"    {name:8}", *(f"e{e}:{share:.0%}" for share, e in zip(*map(Tensor.tolist, best), strict=True)))
    for digits in (2, 3):
        seen, kept = (sums_right(model, tokenizer, digits, kept) for kept in (False, True))
        print(
            f"sums of {digits}-digit numbers: {seen:.1%} of those that may be in training, {kept:.1%} of those held out"
        )
    replies = replies_right(model, tokenizer)
    print(f"JSON replies: {replies['parse']:.0%} parse, {replies['right']:.0%} are all right")
    if arguments.save_ids:
        arguments.save_ids.mkdir(parents=True, exist_ok=True)
        for name in DOMAINS:
            ids = data.windows(arguments.corpus, name, arguments.length, arguments.windows).flatten().tolist()
            (arguments.save_ids / f"{name}.json").write_text(json.dumps(ids))


if __name__ == "__main__":
    main()
