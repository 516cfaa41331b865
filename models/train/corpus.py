"""Builds the corpus: `<domain>.<train|val>.jsonl`, one JSON string a document, and `report.json`.

The same sources give the same bytes.
"""

import argparse
import hashlib
import json
from pathlib import Path

import sources
import synthetic

DOMAINS = ("english", "spanish", "rust", "wgsl", "math", "json", "chat")
SPLITS = ("train", "val")
VALIDATION = Path(__file__).with_name("validation.json")
MADE = {"math": (36_000, 600), "json": (6_000, 200), "chat": (24_000, 800)}


def split(domain: str, documents: list[str]) -> tuple[list[str], list[str]]:
    """Training and validation documents; `validation.json` names the latter by the first 16 digits of their SHA-256."""
    expected = set(json.loads(VALIDATION.read_text())[domain])
    named = {hashlib.sha256(document.encode()).hexdigest()[:16]: document for document in documents}
    if not expected <= named.keys():
        missing = len(expected - named.keys())
        raise SystemExit(f"{VALIDATION}: {missing} of {len(expected)} documents of {domain} are not in the sources")
    training = [document for name, document in named.items() if name not in expected]
    return training, [named[name] for name in sorted(expected)]


def build(downloads: Path) -> tuple[dict[tuple[str, str], list[str]], dict[tuple[str, str], float], dict[str, str]]:
    """Documents by (domain, split), information in nats of those that are drawn, and licences by source."""
    natural, licences = sources.read_all(downloads)
    documents: dict[tuple[str, str], list[str]] = {}
    nats = {}
    for domain, found in natural.items():
        documents[domain, "train"], documents[domain, "val"] = split(domain, found)
    for seed, side in enumerate(SPLITS):
        for domain, make in (("math", synthetic.math_document), ("json", synthetic.json_document)):
            dice = synthetic.Dice(seed)
            documents[domain, side] = [make(dice) for _ in range(MADE[domain][seed])]
            nats[domain, side] = dice.nats
        texts = (documents[domain, side] for domain in ("english", "spanish", "rust"))
        documents["chat", side] = synthetic.chats(synthetic.Dice(seed), MADE["chat"][seed], *texts)
    return documents, nats, licences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("corpus"), help="folder for the corpus (default: %(default)s)")
    parser.add_argument(
        "--downloads", type=Path, default=Path("downloads"), help="folder for packages (default: %(default)s)"
    )
    arguments = parser.parse_args()
    for folder in (arguments.out, arguments.downloads):
        folder.mkdir(parents=True, exist_ok=True)

    documents, nats, licences = build(arguments.downloads.resolve())
    report: dict = {"licences": licences, "files": {}}
    for (domain, side), texts in sorted(documents.items()):
        packed = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts).encode()
        path = arguments.out / f"{domain}.{side}.jsonl"
        path.write_bytes(packed)
        facts = {
            "documents": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "sha256": hashlib.sha256(packed).hexdigest(),
        }
        if (domain, side) in nats:
            facts["nats"] = round(nats[domain, side], 1)
        report["files"][path.name] = facts
        print(f"{path.name:20} {facts['documents']:6} documents {facts['bytes'] / 1e6:7.2f} MB")
    (arguments.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
