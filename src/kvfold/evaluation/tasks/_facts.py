"""What two persons tell each other, who asks about it later, and what they say besides."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.evaluation.tasks._words import CITIES

ANIMALS = ("dog", "cat", "parrot", "rabbit", "hamster", "pony")
PETS = ("Biscuit", "Pixel", "Mocha", "Ziggy", "Pumpkin", "Comet", "Pickle", "Nutmeg", "Waffles", "Domino")
HOBBIES = ("pottery", "fencing", "archery", "woodcarving", "beekeeping", "calligraphy", "juggling", "sailing")
EVENTS = (
    ("I ran my first marathon today!", "run the first marathon"),
    ("I got my driving licence today!", "get the driving licence"),
    ("I sold my first painting today!", "sell the first painting"),
    ("I gave my first concert today!", "give the first concert"),
)
JOBS = ("bakery", "library", "hospital", "museum", "brewery", "school", "bookshop", "theatre", "airport", "zoo")
UNSAID = (
    "What is the name of {}'s boat?", "Which instrument does {}'s uncle play?", "What is the colour of {}'s bicycle?",
    "Which language does {}'s neighbour teach?",
)  # fmt: skip
FILLERS = (
    (
        "How have you been?", "It rained all morning here.", "I slept badly last night.", "The train was late again.",
        "I finally cleaned the kitchen.", "That soup you told me about was great.", "The garden looks lovely now.",
        "My phone keeps losing its charge.", "I watched an old film yesterday.", "The shop was closed, of course.",
        "I have been reading a lot.", "The neighbours are building something.", "I made pancakes this morning.",
        "The lift is broken again.", "I forgot my umbrella twice this week.", "The meeting took for ever.",
    ),
    (
        "What about you?", "Anyway, it will get better.", "You would have laughed.", "I can hardly believe it.",
        "We should talk more often.", "Tell me everything.", "That is life, I suppose.", "It made my day.",
        "I will try again tomorrow.", "Nobody knows why.", "Let us see what comes of it.", "It could be worse.",
        "I needed that.", "Remind me next time.", "I am still tired from it.", "Do you remember the last time?",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    session: int
    speaker: str
    text: str


@dataclass(frozen=True)
class Fact:
    """A question with its category, and the turns that answer it (none: it is never mentioned).

    Category 2 has no `answers`: its answer is the date of the turn's session.
    """

    category: int
    kind: str
    question: str
    answers: tuple[str, ...]
    turns: tuple[Said, ...]


def facts_of(rng: random.Random, people: Sequence[str], sessions: int) -> list[Fact]:
    """Two facts of each kind, one about each person; the first five are of different kinds."""
    cities = iter(rng.sample(CITIES, 8))
    animals, pets, hobbies = rng.sample(ANIMALS, 2), rng.sample(PETS, 2), rng.sample(HOBBIES, 2)
    events, jobs, unsaid = rng.sample(EVENTS, 2), rng.sample(JOBS, 2), rng.sample(UNSAID, 2)
    made = []
    for k, (one, other) in enumerate([(people[0], people[1]), (people[1], people[0])]):
        made += [
            _pet(rng, one, sessions, animals[k], pets[k]),
            _visits(rng, other, sessions, next(cities), next(cities)),
            _event(rng, one, sessions, events[k]),
            _home(rng, other, sessions, next(cities), next(cities)),
            _never(one, unsaid[k]),
            _work(rng, other, sessions, jobs[k], hobbies[k]),
        ]
    return made


def _two(rng: random.Random, sessions: int) -> list[int]:
    """Two different sessions, in order."""
    return sorted(rng.sample(range(sessions), 2))


def _pet(rng: random.Random, who: str, sessions: int, animal: str, name: str) -> Fact:
    turn = Said(rng.randrange(sessions), who, f"Big news: I adopted a {animal} and named it {name}.")
    return Fact(4, "one", f"What is the name of {who}'s {animal}?", (name,), (turn,))


def _work(rng: random.Random, who: str, sessions: int, job: str, hobby: str) -> Fact:
    turn = Said(rng.randrange(sessions), who, f"I started to work at the {job}, and in the evenings I learn {hobby}.")
    return Fact(4, "one", f"What does {who} learn in the evenings?", (hobby,), (turn,))


def _visits(rng: random.Random, who: str, sessions: int, first: str, second: str) -> Fact:
    early, late = _two(rng, sessions)
    turns = (
        Said(early, who, f"I spent the weekend in {first} and walked for hours."),
        Said(late, who, f"I just came back from a short holiday in {second}."),
    )
    return Fact(1, "two", f"Which two cities did {who} travel to?", (f"{first}, {second}",), turns)


def _home(rng: random.Random, who: str, sessions: int, first: str, second: str) -> Fact:
    early, late = _two(rng, sessions)
    turns = (
        Said(early, who, f"I moved into a flat in {first}, near the station."),
        Said(late, who, f"I moved again: I now live in {second}, in a small house."),
    )
    return Fact(4, "update", f"In which city does {who} live now?", (second,), turns)


def _event(rng: random.Random, who: str, sessions: int, event: tuple[str, str]) -> Fact:
    turn = Said(rng.randrange(sessions), who, event[0])
    return Fact(2, "date", f"When did {who} {event[1]}?", (), (turn,))


def _never(who: str, question: str) -> Fact:
    return Fact(5, "never", question.format(who), ("not mentioned",), ())
