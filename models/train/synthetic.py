"""Generated text: sums, JSON records and chats. A checksum decides what is held out, for `evaluate.py` to ask.

Choices are drawn from a `Dice`, which adds up their information: no model can have less loss on what they make.
"""

import json
import math
import random
import re
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
USER, ASSISTANT, END = "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"

FIRST_NAMES = """
Ada Alan Grace Linus Margaret Edsger Barbara Donald Radia Dennis Frances Ken Hedy Claude Katherine John Mary Emma Jane
Anne Elizabeth Maria Carlos Lucia Diego Elena Pablo Sofia Hugo Clara Oscar Iris Felix Nora Leo Vera
""".split()
LAST_NAMES = """
Lovelace Turing Hopper Moreno Silva Keller Novak Rossi Weber Larsen Costa Patel Okafor Tanaka Bennet Dashwood Woodhouse
Elliot Darcy Price Knight Garcia Reyes Vargas Molina Ortega Fischer Lindgren Dubois Marchetti
""".split()
ROLES = "engineer designer manager analyst writer operator researcher tester".split()
COUNTRIES = {
    "Lisbon": "PT", "Madrid": "ES", "Oslo": "NO", "Berlin": "DE", "Paris": "FR", "Rome": "IT", "London": "GB",
    "Dublin": "IE", "Prague": "CZ", "Vienna": "AT", "Boston": "US", "Toronto": "CA", "Lima": "PE", "Tokyo": "JP",
}  # fmt: skip
TOPICS = "gpu vulkan cache async shader tensor router expert memory kernel latency stream".split()
LEVEL_CODES = {"debug": 100, "info": 200, "warn": 300, "error": 500}


class Dice:
    """A seeded source of choices that counts their information, in nats."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.nats = 0.0

    def choice(self, items: Sequence[T]) -> T:
        self.nats += math.log(len(items))
        return self.random.choice(items)

    def number(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        self.nats += math.log(high - low + 1)
        return self.random.randint(low, high)

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items, in an order that matters."""
        self.nats += math.log(math.perm(len(items), count))
        return self.random.sample(items, count)

    def kind(self, weights: dict[T, float]) -> T:
        """A key, drawn by its weight; weights add up to 1."""
        (key,) = self.random.choices(list(weights), list(weights.values()))
        self.nats -= math.log(weights[key])
        return key


def held_out(a: int, b: int) -> bool:
    """Whether the sum a+b is kept from training: one in ten with two or three digits each, but no two round numbers."""
    return min(a, b) >= 10 and (a % 10 or b % 10) != 0 and zlib.crc32(f"{a}+{b}".encode()) % 10 == 0


def held_out_person(name: str, role: str) -> bool:
    """Whether no chat asks for a record of this name with this role: one in twenty."""
    return zlib.crc32(f"{name}, {role}".encode()) % 20 == 0


def addition(dice: Dice, low: int, high: int) -> str:
    """`a+b=c` with a and b from `low` to `high`, not one that is held out."""
    while True:
        before = dice.nats
        a, b = dice.number(low, high), dice.number(low, high)
        if not held_out(a, b):
            return f"{a}+{b}={a + b}"
        dice.nats = before


def drill(dice: Dice) -> str:
    """One line: a sum, a difference or a product."""
    kind = dice.kind({"three": 0.45, "two": 0.27, "one": 0.04, "minus": 0.14, "times": 0.10})
    if kind == "minus":
        a, b = sorted((dice.number(0, 99), dice.number(0, 99)), reverse=True)
        return f"{a}-{b}={a - b}"
    if kind == "times":
        a, b = dice.number(2, 12), dice.number(2, 12)
        return f"{a}*{b}={a * b}"
    return addition(dice, *{"three": (100, 999), "two": (10, 99), "one": (0, 9)}[kind])


def place_values(dice: Dice) -> str:
    """A sum of three-digit numbers behind the sums of its hundreds, tens and ones, so that carries can be seen."""
    line = addition(dice, 100, 999)
    a, b = (int(number) for number in line.split("=")[0].split("+"))
    parts = [(a // unit % 10 * unit, b // unit % 10 * unit) for unit in (100, 10, 1)]
    return "\n".join([f"{x}+{y}={x + y}" for x, y in parts] + [line])


def math_document(dice: Dice) -> str:
    if dice.kind({"drills": 0.8, "places": 0.2}) == "places":
        return "\n".join(place_values(dice) for _ in range(dice.number(6, 10))) + "\n"
    return "\n".join(drill(dice) for _ in range(dice.number(20, 40))) + "\n"


def email(name: str) -> str:
    return name.lower().replace(" ", ".") + "@example.com"


def full_name(dice: Dice) -> str:
    return f"{dice.choice(FIRST_NAMES)} {dice.choice(LAST_NAMES)}"


def person(dice: Dice, number: int) -> dict:
    name, city = full_name(dice), dice.choice(list(COUNTRIES))
    return {
        "id": 1000 + number,
        "name": name,
        "email": email(name),
        "role": dice.choice(ROLES),
        "age": dice.number(21, 69),
        "active": dice.kind({True: 0.7, False: 0.3}),
        "address": {"city": city, "country": COUNTRIES[city]},
        "tags": dice.sample(TOPICS, dice.number(1, 3)),
    }


def order(dice: Dice, number: int) -> dict:
    items = []
    for _ in range(dice.number(1, 3)):
        count, price = dice.number(1, 9), dice.number(1, 9)
        sku = f"{dice.choice('ABCDEF')}{dice.number(10, 99)}"
        items.append({"sku": sku, "qty": count, "price": price, "total": count * price})
    return {
        "order": 10000 + number,
        "customer": full_name(dice),
        "status": dice.choice(("new", "paid", "shipped", "returned")),
        "items": items,
    }


def event(dice: Dice, number: int) -> dict:
    level = dice.choice(list(LEVEL_CODES))
    days, seconds = divmod(10 * number, 86_400)
    return {
        "ts": f"2026-11-{1 + days:02d}T{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}Z",
        "level": level,
        "service": dice.choice(("viewer", "runtime", "router", "loader")),
        "code": LEVEL_CODES[level],
        "msg": f"{dice.choice(TOPICS)} {dice.choice(('ready', 'missed', 'loaded', 'evicted', 'full'))}",
    }


def json_document(dice: Dice) -> str:
    """Records of one kind, a pretty array or one a line. Numbers, or times, follow one another from a drawn one on."""
    record: Callable[[Dice, int], dict] = dice.choice((person, order, event))
    first = dice.number(0, 8_980)
    if dice.kind({"array": 0.4, "lines": 0.6}) == "array":
        return json.dumps([record(dice, first + i) for i in range(dice.number(2, 4))], indent=2) + "\n"
    return "".join(json.dumps(record(dice, first + i)) + "\n" for i in range(dice.number(4, 10)))


def record_request(dice: Dice, name: str, role: str) -> tuple[str, str]:
    """A question for a record and its one right answer."""
    record = {"name": name, "email": email(name), "role": role}
    where = ""
    if dice.kind({"place": 0.3, "no place": 0.7}) == "place":
        city = dice.choice(list(COUNTRIES))
        where = f" in {city}"
        record["address"] = {"city": city, "country": COUNTRIES[city]}
    form = dice.choice(("Write a JSON record for {}.", "JSON for {}, please."))
    return form.format(f"{name}, {role}{where}"), json.dumps(record)


def sentences(documents: list[str]) -> list[str]:
    parts = (part.strip() for text in documents for part in re.split(r"(?<=[.!?])\s+", text.replace("\n", " ")))
    return [part for part in parts if 40 < len(part) < 220]


def functions(documents: list[str]) -> list[tuple[str, str]]:
    """Name and text of short functions in Rust sources, indentation removed."""
    found = []
    for text in documents:
        for match in re.finditer(r"^( *)(?:pub )?fn (\w+)[^\n]*\{\n(?:.*\n){1,10}?\1\}\n", text, re.M):
            body = re.sub("^" + match.group(1), "", match.group(0), flags=re.M)
            if len(body) < 500:
                found.append((match.group(2), body.strip()))
    return found


def chats(dice: Dice, count: int, english: list[str], spanish: list[str], rust: list[str]) -> list[str]:
    """`count` chats of one question and one answer, from documents of one split alone."""
    prose = {"English": sentences(english), "Spanish": sentences(spanish)}
    bodies = functions(rust)
    documents = []
    for _ in range(count):
        kind = dice.kind({"record": 0.35, "sum": 0.23, "English": 0.13, "Spanish": 0.13, "rust": 0.16})
        if kind == "record":
            name, role = full_name(dice), dice.choice(ROLES)
            while held_out_person(name, role):
                name, role = full_name(dice), dice.choice(ROLES)
            question, answer = record_request(dice, name, role)
        elif kind == "sum":
            answer = drill(dice)
            form = dice.choice(("What is {}?", "{}=?", "Compute {}.", "How much is {}?"))
            question = form.format(answer.split("=")[0])
        elif kind == "rust":
            name, body = dice.choice(bodies)
            question, answer = f"Write a Rust function named {name}.", f"```rust\n{body}\n```"
        else:
            start = dice.number(0, len(prose[kind]) - 3)
            asked = "Continúa en español: " if kind == "Spanish" and dice.number(0, 1) else f"Continue in {kind}: "
            question, answer = asked + prose[kind][start], " ".join(prose[kind][start + 1 : start + 3])
        documents.append(USER + question + ASSISTANT + answer + END)
    return documents
