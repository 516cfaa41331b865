"""Natural text and code: Debian packages and crates of `sources.json`, by `apt-get download` and `cargo info`.

Both tools take their registries from their own configuration; nothing here knows an address. Versions are pinned,
packages are checked against a SHA-256, and a licence that is not on the list is an error.
"""

import hashlib
import json
import os
import re
import struct
import subprocess
import zlib
from pathlib import Path

SOURCES = Path(__file__).with_name("sources.json")
LONGEST_FILE = 200_000
LONGEST_LINE = 400


def run(command: list[str], folder: Path) -> None:
    """Runs a program and shows its own message if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"`{' '.join(command)}` failed with code {done.returncode}:\n{done.stderr.strip()}")


def unpack_package(name: str, facts: dict, folder: Path) -> Path:
    """Downloads a Debian package into `folder` unless it is there, checks it, and returns the root of its files."""
    package = folder / f"{name}_{facts['version']}_all.deb"
    if not package.exists():
        run(["apt-get", "download", f"{name}={facts['version']}"], folder)
    found = hashlib.sha256(package.read_bytes()).hexdigest()
    if found != facts["sha256"]:
        raise SystemExit(f"{package}: SHA-256 is {found}, expected {facts['sha256']}; delete it and fetch it again")
    root = folder / name
    run(["dpkg-deb", "-x", str(package), str(root)], folder)
    copyright_file = root / "usr/share/doc" / name / "copyright"
    if facts["copyright_line"] not in copyright_file.read_text().splitlines():
        raise SystemExit(
            f"{copyright_file}: no line `{facts['copyright_line']}`; look at the licence before using {name}"
        )
    return root


def read_austen(root: Path) -> list[str]:
    """The novels in R's lazy-load database: u32 sizes, and behind each a zlib stream of an XDR vector of lines.

    Documents are of 4,000 characters or a little more, lines of a paragraph joined.
    """
    packed = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    documents = []
    while packed:
        stream = zlib.decompressobj()
        lines = read_character_vector(stream.decompress(packed[4:]))
        packed = stream.unused_data
        documents += [re.sub(r"(?<=\S)\n(?=\S)", " ", part) for part in chunks("\n".join(lines), 4000)]
    return documents


def read_character_vector(data: bytes) -> list[str]:
    """Strings of a STRSXP in R's XDR serialisation, version 3."""
    encoding = struct.unpack_from(">I", data, 14)[0]
    at = 18 + encoding
    kind, count = struct.unpack_from(">II", data, at)
    if kind & 0xFF != 16:
        raise SystemExit(f"janeaustenr: an R object of type {kind & 0xFF}, expected a character vector (16)")
    at += 8
    strings = []
    for _ in range(count):
        length = struct.unpack_from(">i", data, at + 4)[0]
        strings.append(data[at + 8 : at + 8 + max(length, 0)].decode("utf-8"))
        at += 8 + max(length, 0)
    return strings


def read_sword(root: Path) -> list[str]:
    """Books of a SWORD zText module. `.bzs`: offset, size, unpacked size as u32; `.bzz`: zlib blocks of OSIS markup."""
    documents = []
    for testament in ("ot", "nt"):
        (blocks,) = root.glob(f"usr/share/sword/modules/texts/ztext/*/{testament}.bzz")
        packed = blocks.read_bytes()
        index = blocks.with_suffix(".bzs").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index[: len(index) // 12 * 12]):
            if size:
                book = plain_text(zlib.decompress(packed[offset : offset + size]).decode("utf-8", "replace"))
                documents += chunks(book, 3000)
    return documents


def plain_text(osis: str) -> str:
    """Text of OSIS markup: no notes and titles, paragraphs and lines kept, quotation marks and dashes in ASCII."""
    text = re.sub(r"<(note|title)\b.*?</\1>", "", osis, flags=re.S)
    text = re.sub(r"<chapter[^>]*>", "\n\n", text)
    text = re.sub(r"<div[^>]*type=\"(x-p|paragraph)\"[^>]*>|<(l|lb|p)\b[^>]*>", "\n", text)
    text = re.sub(r"<[^>]+>", " ", text)
    for old, new in {"¶": "\n", "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"'}.items():
        text = text.replace(old, new)
    text = text.translate(str.maketrans({"“": '"', "”": '"', "’": "'", "‘": "'", "—": "--", "–": "-"}))
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ([,.;:!?])", r"\1", text)
    text = re.sub(r" *\n *", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def chunks(text: str, least: int) -> list[str]:
    """Cuts text at empty lines into documents of at least `least` characters; a shorter end is kept from 200 on."""
    documents, current = [], ""
    for paragraph in re.split(r"\n\n+", text):
        current += paragraph.strip() + "\n\n"
        if len(current) > least:
            documents.append(current.strip())
            current = ""
    if len(current) > 200:
        documents.append(current.strip())
    return documents


def crate_folder(crate: str) -> Path:
    """The unpacked sources of `name@version`; `cargo info` downloads them if they are not in cargo's registry cache."""
    home = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo"))
    pattern = f"registry/src/*/{crate.replace('@', '-')}"
    if not any(home.glob(pattern)):
        run(["cargo", "info", "--quiet", crate], home)
    found = sorted(home.glob(pattern))
    if not found:
        raise SystemExit(
            f"{home}: no {pattern} after `cargo info {crate}`; fetch the crate with a project that depends on it"
        )
    return found[0]


def read_crate(crate: str, suffix: str, allowed: list[str]) -> tuple[str, list[str]]:
    """Licence and source files (`suffix`: rs, wgsl) of a crate; no licence headers, tables of numbers, long lines."""
    folder = crate_folder(crate)
    stated = re.search(r'^license = "([^"]+)"', (folder / "Cargo.toml").read_text(), re.M)
    licence = stated.group(1) if stated else "none"
    if not set(re.split(r" OR |/", licence)) & set(allowed):
        raise SystemExit(f"{folder}/Cargo.toml: licence is {licence}, expected one of {', '.join(allowed)}")
    documents = []
    for path in sorted(folder.rglob(f"*.{suffix}")):
        text = path.read_text(errors="ignore")
        if not 300 <= len(text) <= LONGEST_FILE or max(map(len, text.split("\n"))) > LONGEST_LINE:
            continue
        if sum(character.isdigit() for character in text) > 0.12 * len(text):
            continue
        text = re.sub(r"^(//[^\n]*(copyright|spdx|licen[sc]e)[^\n]*\n)+", "", text, flags=re.I)
        documents.append(text.replace("\t", "    ").strip() + "\n")
    return licence, documents


def read_all(folder: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Documents by domain, and the licence of each source; `folder` keeps downloads."""
    sources = json.loads(SOURCES.read_text())
    documents: dict[str, list[str]] = {"english": [], "spanish": [], "rust": [], "wgsl": []}
    licences = {}
    for name, facts in sources["debian"].items():
        root = unpack_package(name, facts, folder)
        documents[facts["domain"]] += read_austen(root) if name == "r-cran-janeaustenr" else read_sword(root)
        licences[f"{name} {facts['version']}"] = facts["licence"]
    for domain, suffix in (("rust", "rs"), ("wgsl", "wgsl")):
        for crate in sources["crates"][domain]:
            licences[crate], found = read_crate(crate, suffix, sources["licences"])
            documents[domain] += found
    return documents, licences
