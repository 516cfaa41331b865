"""Trains the tokenizer, or takes one that exists, and encodes the corpus into `<domain>.<split>.bin`, ids as u16.

Byte-level BPE with DeepSeek's special tokens and pattern; digits stand alone. A begin token opens each document and an
end token closes it; chats bring their own.
"""

import argparse
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from corpus import DOMAINS, SPLITS

SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>"]
BEGIN, END = 0, 1
WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHARACTERS = {"english": 2.5e6, "spanish": 2.5e6, "rust": 2.5e6, "wgsl": 1e6, "math": 1e5, "json": 6e5}


def read(corpus: Path, domain: str, split: str) -> list[str]:
    path = corpus / f"{domain}.{split}.jsonl"
    if not path.exists():
        raise SystemExit(f"{path}: no such file; run corpus.py first")
    return [json.loads(line) for line in path.open()]


def sample(corpus: Path) -> Iterator[str]:
    """Training documents, as many of each domain as `CHARACTERS` says."""
    rng = random.Random(0)
    for domain, limit in CHARACTERS.items():
        documents, taken = read(corpus, domain, "train"), 0
        rng.shuffle(documents)
        for document in documents:
            if taken > limit:
                break
            taken += len(document)
            yield document


def train(corpus: Path, vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(corpus), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, domain: str, documents: list[str]) -> np.ndarray:
    """Ids of all documents in a row, [tokens] u16."""
    end = [] if domain == "chat" else [END]
    return np.array([i for e in tokenizer.encode_batch(documents) for i in (BEGIN, *e.ids, *end)], dtype="<u2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--corpus", type=Path, default=Path("corpus"), help="folder of corpus.py (default: %(default)s)"
    )
    parser.add_argument("--use", type=Path, metavar="FILE", help="take this tokenizer.json instead of training one")
    parser.add_argument(
        "--vocabulary", type=int, default=2048, help="entries of a tokenizer to train (default: %(default)s)"
    )
    arguments = parser.parse_args()

    target = arguments.corpus / "tokenizer.json"
    if arguments.use:
        shutil.copyfile(arguments.use, target)
    else:
        train(arguments.corpus, arguments.vocabulary).save(str(target))
    tokenizer = Tokenizer.from_file(str(target))
    print(f"{target}: {tokenizer.get_vocab_size()} entries")

    report_path = arguments.corpus / "report.json"
    report = json.loads(report_path.read_text())
    for domain in DOMAINS:
        for split in SPLITS:
            ids = encode(tokenizer, domain, read(arguments.corpus, domain, split))
            ids.tofile(arguments.corpus / f"{domain}.{split}.bin")
            facts = report["files"][f"{domain}.{split}.jsonl"]
            facts["tokens"] = len(ids)
            floor = f", drawn choices {facts['nats'] / len(ids):.3f} nats a token" if "nats" in facts else ""
            print(f"{domain:8} {split:5} {len(ids):9} tokens, {facts['bytes'] / len(ids):.2f} bytes a token{floor}")
    report_path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
