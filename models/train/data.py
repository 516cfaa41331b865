"""Windows of tokens from the encoded corpus.

Which ones is a function of seed, batch number and process: there is no state to save.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from corpus import DOMAINS

WEIGHTS = {"english": 0.26, "spanish": 0.20, "rust": 0.20, "wgsl": 0.08, "math": 0.09, "json": 0.05, "chat": 0.12}


def read(corpus: Path, domain: str, split: str) -> np.ndarray:
    """All token ids of a domain, [tokens] u16."""
    path = corpus / f"{domain}.{split}.bin"
    if not path.exists():
        raise SystemExit(f"{path}: no such file; run corpus.py and tokenizer.py first")
    return np.fromfile(path, dtype="<u2")


class Batches:
    """Training batches: each row's domain is drawn by weight, then its place in the domain's tokens."""

    def __init__(self, corpus: Path, sequences: int, length: int, seed: int) -> None:
        self.tokens = [read(corpus, domain, "train") for domain in DOMAINS]
        self.weights = [WEIGHTS[domain] for domain in DOMAINS]
        self.sequences, self.length, self.seed = sequences, length, seed

    def at(self, number: int, process: int) -> Tensor:
        """[B, T+2]: a window and the two tokens behind it that it has to predict."""
        rng = np.random.default_rng((self.seed, number, process))
        rows = []
        for domain in rng.choice(len(DOMAINS), self.sequences, p=self.weights):
            tokens = self.tokens[domain]
            start = rng.integers(len(tokens) - self.length - 1)
            rows.append(tokens[start : start + self.length + 2])
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def windows(corpus: Path, domain: str, length: int, most: int) -> Tensor:
    """Up to `most` windows [W, T] of validation tokens that do not overlap, evenly spread."""
    tokens = read(corpus, domain, "val")
    whole = len(tokens) // length
    picked = np.linspace(0, whole - 1, min(most, whole)).astype(int)
    return torch.from_numpy(tokens[: whole * length].reshape(whole, length)[picked].astype(np.int64))
