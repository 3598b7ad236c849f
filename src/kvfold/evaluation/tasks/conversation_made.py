"""Questions about a long chat of two persons over several sessions, made from templates (after LoCoMo,
arXiv:2402.17753, and EpiCache, arXiv:2509.17396).

Categories are LoCoMo's: 1 two facts of different sessions, 2 a date that only a session's head gives, 4 one fact (of
those that were updated, the last), 5 never mentioned. `info` of a query has category, kind and the sessions that count.
"""

import random
from collections.abc import Iterator
from datetime import date, timedelta

from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks._draws import at_least
from kvfold.evaluation.tasks._facts import FILLERS, Fact, facts_of
from kvfold.evaluation.tasks._fit import filled
from kvfold.evaluation.tasks.aggregation import MONTHS
from kvfold.evaluation.tasks.base import Setting, task

NAME = "conversation"
PEOPLE = ("Maria", "Peter", "Sofia", "James", "Elena", "Victor", "Nadia", "Oscar", "Clara", "Martin", "Ines", "Robert")
BEFORE = (
    "Below is a conversation between two people: {} and {}. It takes place over several days; the date of each session "
    "stands before it.\n"
)
ASK = "\n\nAnswer in a few words, where possible with the exact words of the conversation. {hint}Question: {question}\n"
HINTS = {
    2: "Use the DATE lines for dates. ",
    5: 'If the conversation does not say, answer "not mentioned". ',
}


@task(NAME, title="Questions about a long chat over several sessions", paper="2402.17753")
def conversation(setting: Setting, *, sessions: int = 5, queries: int = 6) -> Iterator[Example]:
    """`queries` questions about each chat, of all categories in turn; ten chats."""
    at_least(3, sessions=sessions)
    at_least(1, queries=queries)

    def build(index: int, units: int) -> Example:
        rng = setting.rng(NAME, index)
        people = rng.sample(PEOPLE, 2)
        days = _days(rng, sessions)
        facts = facts_of(rng, people, sessions)
        if queries > len(facts):
            raise ValueError(f"queries={queries} must be at most {len(facts)}, as many as a chat has facts")
        filler = setting.rng(NAME, index, "filler")
        turns = [[turn for fact in facts for turn in fact.turns if turn.session == k] for k in range(sessions)]
        said = [[(turn.speaker, turn.text) for turn in session] for session in turns]
        for unit in range(units):
            lines = said[unit % sessions]
            lines.insert(filler.randint(0, len(lines)), (filler.choice(people), _small_talk(filler)))
        heads = [f"\nDATE: {_printed(day)}\nCONVERSATION:\n" for day in days]
        bodies = ["".join(f'{speaker} said, "{text}"\n' for speaker, text in session) for session in said]
        context = BEFORE.format(*people) + "".join(head + body for head, body in zip(heads, bodies, strict=True))
        asked = tuple(_query(fact, days) for fact in facts[:queries])
        return Example(str(index), context, asked, info={"sessions": sessions})

    return filled(setting, NAME, build, samples=10, least=0)


def _query(fact: Fact, days: list[date]) -> Query:
    answers = fact.answers if fact.category != 2 else (_printed(days[fact.turns[0].session]),)
    info = {"category": fact.category, "kind": fact.kind, "sessions": [turn.session for turn in fact.turns]}
    text = ASK.format(hint=HINTS.get(fact.category, ""), question=fact.question)
    return Query(text, answers, "convqa/f1", "Answer:", max_new_tokens=24, stop=("\n",), info=info)


def _days(rng: random.Random, sessions: int) -> list[date]:
    day, days = date(2023, 1, 1) + timedelta(days=rng.randrange(300)), list[date]()
    for _ in range(sessions):
        day += timedelta(days=rng.randint(2, 20))
        days.append(day)
    return days


def _printed(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def _small_talk(rng: random.Random) -> str:
    first, second = rng.choice(FILLERS[0]), rng.choice(FILLERS[1])
    return f"{first} {second}"
