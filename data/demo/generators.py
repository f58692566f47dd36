"""The demo's small world: four kinds of question, drawn from a seeded random generator.

Training text and benchmarks come from the same functions, so that a model of two million parameters can really learn
what it is asked. Questions need several steps (keep a tally, follow a variable, follow a person and what she carries,
find a rule and apply it), because a question that one layer can answer would not show what removing layers costs.

Standard library only; the same seed gives the same rows on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

N_CHOICES = 4


@dataclass(frozen=True)
class Question:
    """A multiple-choice question. The scored text is `query + " " + choice`; `gold` indexes the right choice.

    lesson: further (question, answer) pairs on the same scene, for training texts alone.
    """

    query: str
    choices: tuple[str, ...]
    gold: int
    lesson: tuple[tuple[str, str], ...] = ()

    @property
    def answer(self) -> str:
        return self.choices[self.gold]

    @property
    def pieces(self) -> Iterator[tuple[str, bool]]:
        """The training text in pieces, each with whether it is an answer."""
        yield self.query, False
        yield f" {self.answer}", True
        for ask, answer in self.lesson:
            yield f" ; {ask}", False
            yield f" {answer}", True


def question(
    rng: random.Random, query: str, answer: str, others: Iterable[str], lesson: Iterable[tuple[str, str]] = ()
) -> Question:
    """A question with three different wrong choices out of `others`, the right one at a uniform place."""
    choices = rng.sample(sorted(set(others) - {answer}), N_CHOICES - 1)
    gold = rng.randrange(N_CHOICES)
    choices.insert(gold, answer)
    return Question(query, tuple(choices), gold, tuple(lesson))


def _ask_one(rng: random.Random, scene: str, pairs: list[tuple[str, str]], others: Iterable[str]) -> Question:
    """Ask one of `pairs` about the scene; the rest becomes the lesson."""
    (ask, answer), *rest = rng.sample(pairs, len(pairs))
    return question(rng, f"{scene} {ask}".strip(), answer, others, rest)


# --- sums: keep a tally -------------------------------------------------------------------------------------------

NAMES = ["Anna", "Bob", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Jola", "Kim", "Leo"]
FRUITS = ["pears", "plums", "figs", "nuts", "eggs", "limes"]
HIGHEST = 20


def _steps(rng: random.Random, count: int) -> tuple[list[int], list[int]]:
    """Changes (first entry: the start) and the running totals; every total is within 0..HIGHEST."""
    totals = [rng.randint(1, HIGHEST)]
    changes = [totals[0]]
    for _ in range(count):
        change = rng.choice([n for n in range(-9, 10) if n and 0 <= totals[-1] + n <= HIGHEST])
        changes.append(change)
        totals.append(totals[-1] + change)
    return changes, totals


def _near(total: int, totals: list[int]) -> list[str]:
    close = {total + d for d in (-3, -2, -1, 1, 2, 3)} | set(totals[-2:])
    return [str(n) for n in close if n >= 0]


def _tally(rng: random.Random) -> Question:
    changes, totals = _steps(rng, rng.randint(1, 3))
    told = ", ".join(f"gets {n}" if n > 0 else f"loses {-n}" for n in changes[1:])
    query = f"{rng.choice(NAMES)} has {changes[0]} {rng.choice(FRUITS)}, {told}. Left:"
    return question(rng, query, str(totals[-1]), _near(totals[-1], totals))


def _expression(rng: random.Random) -> Question:
    changes, totals = _steps(rng, rng.randint(1, 4))
    told = " ".join([str(changes[0]), *(f"+ {n}" if n > 0 else f"- {-n}" for n in changes[1:])])
    return question(rng, f"{told} =", str(totals[-1]), _near(totals[-1], totals))


def _extreme(rng: random.Random) -> Question:
    numbers = rng.sample(range(HIGHEST + 1), rng.randint(4, 6))
    pairs = [("the largest is", str(max(numbers))), ("the smallest is", str(min(numbers)))]
    return _ask_one(rng, f"Of {' '.join(map(str, numbers))}", pairs, map(str, numbers))


# --- code: follow values ------------------------------------------------------------------------------------------

LETTERS = list("abcdefgh")
PAIRS = {"(": ")", "[": "]", "{": "}"}


def _variables(rng: random.Random) -> Question:
    names, numbers = rng.sample(LETTERS, 4), rng.sample(range(HIGHEST + 1), 4)
    values: dict[str, int] = {}
    lines = []
    for name, number in zip(names, numbers, strict=True):
        values[name] = number
        lines.append(f"{name} = {number}")
    for _ in range(rng.randint(0, 2)):
        target, origin = rng.sample(names, 2)
        values[target] = values[origin]
        lines.append(f"{target} = {origin}")
    pairs = [(f"print {name} :", str(values[name])) for name in names]
    return _ask_one(rng, f"{' ; '.join(lines)} ;", pairs, map(str, numbers))


def _lists(rng: random.Random) -> Question:
    letters = rng.sample(LETTERS, rng.randint(4, 5))
    pairs = [("first x :", letters[0]), ("last x :", letters[-1]), ("max x :", max(letters)), ("min x :", min(letters))]
    pairs += [(f"x [ {i} ] :", letters[i]) for i in rng.sample(range(len(letters)), 2)]
    pairs += [(f"next {letters[i - 1]} :", letters[i]) for i in rng.sample(range(1, len(letters)), 2)]
    return _ask_one(rng, f"x = [ {' '.join(letters)} ] ;", rng.sample(pairs, 4), letters)


def _brackets(rng: random.Random) -> Question:
    opened: list[str] = []
    shown: list[str] = []
    while len(opened) < 3:
        if opened and rng.random() < 0.35:
            shown.append(PAIRS[opened.pop()])
        else:
            opened.append(rng.choice(list(PAIRS)))
            shown.append(opened[-1])
    closing = [PAIRS[b] for b in reversed(opened)]
    closers = list(PAIRS.values())
    others = [" ".join(c) for c in ([rng.choice(closers) for _ in closing] for _ in range(12))]
    others.append(" ".join(reversed(closing)))
    return question(rng, f"close {' '.join(shown)} :", " ".join(closing), others)


# --- prose: follow people, know the world -------------------------------------------------------------------------

PLACES = ["barn", "mill", "tower", "garden", "kitchen", "harbour", "cellar", "market"]
THINGS = ["lamp", "book", "key", "drum", "rope", "bell"]
TRADES = ["baker", "smith", "weaver", "sailor", "potter", "scribe", "miller", "tailor"]
PETS = ["cat", "dog", "goat", "owl", "hen", "fox", "mule", "duck"]
TOWNS = ["Velm", "Orra", "Tisk", "Brod", "Luma", "Sarn", "Keld", "Pava"]
LANDS = ["Norland", "Esteria", "Sudmark", "Wesland"]
WORLD_SEED = 7


@dataclass(frozen=True)
class Person:
    """One inhabitant of the made-up world and what is true of her."""

    name: str
    trade: str
    pet: str
    town: str

    @property
    def land(self) -> str:
        return LANDS[TOWNS.index(self.town) % len(LANDS)]


def _population() -> list[Person]:
    rng = random.Random(WORLD_SEED)
    heads, tails = (
        ["Ka", "Mi", "Ro", "Te", "Lu", "Sa", "Ve", "Do"],
        ["ra", "lin", "mo", "dek", "sa", "ven", "ti", "bor"],
    )
    names = [head + tail for head in heads for tail in tails]
    return [Person(name, rng.choice(TRADES), rng.choice(PETS), rng.choice(TOWNS)) for name in names]


PEOPLE = _population()


ASKED = {
    "trade": ("{} works as a", "The trade of {} is", "By trade {} is a", "Every day {} works as a"),
    "pet": ("{} keeps a", "The pet of {} is a", "At home {} has a", "{} walks with a"),
    "town": ("{} lives in", "The town of {} is", "The house of {} is in", "You find {} in"),
    "land": ("The land of {} is", "{} comes from the land of", "{} pays tax in", "The home land of {} is"),
}
KNOWN = {"trade": TRADES, "pet": PETS, "town": TOWNS, "land": LANDS}


def _fact(rng: random.Random) -> Question:
    person = rng.choice(PEOPLE)
    kind, *rest = rng.sample(list(ASKED), len(ASKED))
    lesson = [(f"{person.name} {other}", getattr(person, other)) for other in rest]  # told in words never asked
    query = rng.choice(ASKED[kind]).format(person.name)
    return question(rng, query, getattr(person, kind), KNOWN[kind], lesson)


def _story(rng: random.Random) -> Question:
    people, places = rng.sample(NAMES, 2), rng.sample(PLACES, 4)
    thing = rng.choice(THINGS)
    where = dict(zip(people, places, strict=False))
    told = [f"{name} is in the {place}." for name, place in where.items()]
    keeper = rng.choice(people)
    told.append(f"{keeper} has the {thing}.")
    for _ in range(rng.randint(0, 2)):
        name = rng.choice(people)
        where[name] = rng.choice([place for place in places if place != where[name]])
        told.append(f"{name} goes to the {where[name]}.")
    pairs = [(f"The {thing} is in the", where[keeper]), *((f"{name} is in the", where[name]) for name in people)]
    return _ask_one(rng, " ".join(told), pairs, places)


# --- series: find the rule, go on ---------------------------------------------------------------------------------

COLOURS = ["red", "blue", "green", "white", "black", "pink", "gold", "grey"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def _numbers(rng: random.Random) -> Question:
    step = rng.choice([1, 2, 3, 4, 5, -1, -2, -3])
    length = rng.randint(3, 4)
    start = rng.randint(max(0, -step * length), HIGHEST + 10 - max(0, step * length))
    shown = [start + step * i for i in range(length)]
    answer = start + step * length
    return question(rng, f"Go on: {' '.join(map(str, shown))}", str(answer), _near(answer, shown))


def _pattern(rng: random.Random) -> Question:
    words = rng.sample(COLOURS, N_CHOICES)
    period = [rng.choice(words) for _ in range(rng.randint(2, 5))]
    if len(set(period)) == 1:
        period[0] = next(word for word in words if word != period[0])
    length = 2 * len(period) + rng.randrange(len(period))
    shown = [period[i % len(period)] for i in range(length)]
    return question(rng, f"Go on: {' '.join(shown)}", period[length % len(period)], words)


def _days(rng: random.Random) -> Question:
    start, step, length = rng.randrange(7), rng.choice([1, 2, 3, -1, -2]), rng.randint(2, 3)
    shown = [DAYS[(start + step * i) % 7] for i in range(length)]
    return question(rng, f"Go on: {' '.join(shown)}", DAYS[(start + step * length) % 7], DAYS)


def _two_rows(rng: random.Random) -> Question:
    first, second = rng.sample(range(4, HIGHEST + 1), 2)
    up, down = rng.choice([1, 2]), rng.choice([-2, -1, 1, 2])
    shown = [first, second, first + up, second + down, first + 2 * up]
    answer = second + 2 * down
    query = f"Go on: {' '.join(map(str, shown))}"
    return question(rng, query, str(answer), _near(answer, [first + 3 * up, shown[-1]]))


Generator = Callable[[random.Random], Question]

DOMAINS: dict[str, tuple[Generator, ...]] = {
    "sums": (_tally, _expression, _extreme),
    "code": (_variables, _lists, _brackets),
    "prose": (_story, _story, _story, _fact),
    "series": (_numbers, _pattern, _days, _two_rows),
}
"""Name of each domain with its kinds of question, all equally likely."""


def draw(domain: str, rng: random.Random) -> Question:
    return rng.choice(DOMAINS[domain])(rng)


def draw_new(domain: str, rng: random.Random, seen: set[str]) -> Iterator[Question]:
    """Questions without end whose query is not in `seen`; every query given is added to it."""
    while True:
        candidate = draw(domain, rng)
        if candidate.query not in seen:
            seen.add(candidate.query)
            yield candidate


# --- benchmarks ---------------------------------------------------------------------------------------------------

CALIBRATION_ROWS, TEST_ROWS = 600, 800


def benchmark(domain: str) -> dict[str, list[Question]]:
    """The rows of the domain's benchmark: `calibration` for the search, `test` for judging; no query in both.

    In each split every place of the right choice is equally frequent, so that a model that always prefers one place
    is exactly at chance.
    """
    rng = random.Random(f"benchmark {domain}")
    fresh = draw_new(domain, rng, seen=set())
    splits = {}
    for name, rows in (("calibration", CALIBRATION_ROWS), ("test", TEST_ROWS)):
        places = [row % N_CHOICES for row in range(rows)]
        rng.shuffle(places)
        splits[name] = [_moved(next(fresh), gold) for gold in places]
    return splits


def _moved(asked: Question, gold: int) -> Question:
    wrong = [choice for choice in asked.choices if choice != asked.answer]
    return Question(asked.query, (*wrong[:gold], asked.answer, *wrong[gold:]), gold)
