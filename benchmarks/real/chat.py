"""Short questions to a chat model, with answers that can be checked.

Rows are {"id", "prompt", "answer"}: the prompt a list of messages, for the model's own chat
template. One question in eight is held out, by its words.

    python -m benchmarks.real.chat build/smollm2
"""

import argparse
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import TypeVar

CAPITALS = """
Argentina: Buenos Aires; Australia: Canberra; Austria: Vienna; Belgium: Brussels; Brazil: Brasilia;
Canada: Ottawa; Chile: Santiago; China: Beijing; Cuba: Havana; Denmark: Copenhagen; Egypt: Cairo;
England: London; Finland: Helsinki; France: Paris; Germany: Berlin; Greece: Athens;
Hungary: Budapest; India: New Delhi; Indonesia: Jakarta; Iran: Tehran; Iraq: Baghdad;
Ireland: Dublin; Italy: Rome; Japan: Tokyo; Kenya: Nairobi; Mexico: Mexico City; Norway: Oslo;
Peru: Lima; Poland: Warsaw; Portugal: Lisbon; Russia: Moscow; South Korea: Seoul; Spain: Madrid;
Sweden: Stockholm; Switzerland: Bern; Thailand: Bangkok; Turkey: Ankara; Vietnam: Hanoi
"""
OPPOSITES = """
hot: cold; big: small; up: down; day: night; left: right; black: white; good: bad; fast: slow;
old: young; open: closed; rich: poor; happy: sad; hard: soft; high: low; long: short; early: late;
full: empty; light: dark; loud: quiet; strong: weak; true: false; wet: dry; win: lose; love: hate;
north: south; east: west; inside: outside; first: last; buy: sell
"""
THINGS = """
apple banana beach bear bee bird boat book bridge cake car castle cat chair city cloud
computer cow dog door dragon duck farmer fish flower forest fox friend garden guitar
hat horse house island king lake lamp lion moon mother mountain mouse ocean painter piano pirate
queen rabbit river road robot rose school sea ship shoe soldier spider star storm student
table teacher tiger ttree village window wolf writer
"""
T = TypeVar("T")
RATE = 8  # of the questions one is held out
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def pairs(text: str) -> list[list[str]]:
    """Read `left: right` pairs between semicolons."""
    return [pair.split(": ") for pair in " ".join(text.split()).split("; ")]


def questions() -> Iterator[tuple[str, str, str]]:
    """List the kind of every question, the question and its answer."""
    for a, b in itertools.product(range(1, 21), repeat=2):
        yield "sum", f"What is {a} + {b}?", f"{a + b}"
        if a != b:
            yield "larger", f"Which number is larger, {a} or {b}?", f"{max(a, b)}"
        if a > b:
            yield "difference", f"What is {a} - {b}?", f"{a - b}"
    for country, city in pairs(CAPITALS):
        yield "capital", f"What is the capital of {country}?", city
        yield "capital", f"Name the capital city of {country}.", city
        yield "country", f"{city} is the capital of which country?", country
    for pair in pairs(OPPOSITES):
        for one, other in (pair, pair[::-1]):
            yield "opposite", f"What is the opposite of {one}?", other
            yield "antonym", f'Give me an antonym of the word "{one}".', other
    for thing in THINGS.split():
        one = f"an {thing}" if thing[0] in "aeiou" else f"a {thing}"
        yield "definition", f"What is {one}? Answer in one sentence.", thing
        yield "sentence", f"Write one short sentence about {one}.", thing
        yield "story", f"Write the first line of a story about {one}.", thing
        yield "title", f"Give me a title for a poem about {one}.", thing


def rows(part: str) -> list[dict]:
    """List the rows of "train" or "heldout", kinds of questions in turns; the same every time."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for kind, question, answer in questions():
        if (zlib.crc32(question.encode()) % RATE == 0) == (part == "heldout"):
            kinds.setdefault(kind, []).append((question, answer))
    rng = Random(part)
    for each in kinds.values():
        rng.shuffle(each)
    return [
        {
            "id": f"{part}-{index:04d}",
            "prompt": [{"role": "user", "content": question}],
            "answer": answer,
        }
        for index, (question, answer) in enumerate(in_turns(kinds.values()))
    ]


def in_turns(lists: Iterable[list[T]]) -> list[T]:
    """Take one of each list, then another of each, until all are empty."""
    return [each for turn in itertools.zip_longest(*lists) for each in turn if each is not None]


def says(response: str, answer: str) -> bool:
    """Check a response: its last number is the answer, or the answer stands in it as a word."""
    if NUMBER.fullmatch(answer):
        return NUMBER.findall(response)[-1:] == [answer]
    return re.search(rf"\b{re.escape(answer)}s?\b", response, re.IGNORECASE) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the two files")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "heldout"):
        lines = [json.dumps(row) for row in rows(part)]
        (folder / f"chat_{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{folder / f'chat_{part}.jsonl'}: {len(lines)} rows")


if __name__ == "__main__":
    main()
