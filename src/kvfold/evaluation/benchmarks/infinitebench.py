"""InfiniteBench: twelve tasks of 44 thousand to 2 million tokens (arXiv:2402.13718), as published.

The prompts are those for open models, which take no chat template and end in a cue that begins the answer.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from kvfold.evaluation.benchmarks._files import Source, records
from kvfold.evaluation.benchmarks._infinitebench_prompts import PROMPTS
from kvfold.evaluation.benchmarks._records import PublishedRecord, letter_of
from kvfold.evaluation.benchmarks._sets import register_sets
from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks.base import Setting


@dataclass(frozen=True)
class InfiniteBenchSet:
    metric: str
    max_new_tokens: int


SETS = {
    "passkey": InfiniteBenchSet("first_int", 6),
    "number_string": InfiniteBenchSet("first_int", 12),
    "kv_retrieval": InfiniteBenchSet("kv", 50),
    "longbook_sum_eng": InfiniteBenchSet("summary", 1200),
    "longbook_choice_eng": InfiniteBenchSet("choice", 40),
    "longbook_qa_eng": InfiniteBenchSet("qa", 40),
    "longbook_qa_chn": InfiniteBenchSet("qa_zh", 40),
    "longdialogue_qa_eng": InfiniteBenchSet("dialogue", 40),
    "math_find": InfiniteBenchSet("math_find", 3),
    "math_calc": InfiniteBenchSet("math_calc", 30000),
    "code_run": InfiniteBenchSet("code_run", 5),
    "code_debug": InfiniteBenchSet("code_debug", 5),
}
WITH_OPTIONS = ("longbook_choice_eng", "code_debug")


def _examples(setting: Setting, name: str, entry: InfiniteBenchSet) -> Iterator[Example]:
    source = Source((f"{name}.jsonl", f"data/{name}.jsonl"), "xinrongzhang2022/InfiniteBench", file=f"{name}.jsonl")
    for index, record in enumerate(records(setting, source)):
        before, _, after = PROMPTS[name].partition("{context}")
        slots = _slots(record, name)
        query = Query(
            after.format(**slots),
            _answers(record, name),
            metric=f"infinitebench/{entry.metric}",
            max_new_tokens=entry.max_new_tokens,
        )
        yield Example(str(index), before.format(**slots) + record.text("context"), (query,), chat=False)


def _slots(record: PublishedRecord, name: str) -> dict[str, str]:
    """What the prompt of a set has blanks for, besides its context."""
    question = str(record.fields.get("input") or "")  # some sets ask nothing but what the prompt says
    slots = {"input": question, "question": question}
    if name == "math_find":
        target = _search(r"The .+ of", record)[:-3].lower()  # "the largest number"
        slots["prefix"] = f"What is {target} in the following list?"
    if name == "code_run":
        call = _search(r"func_[0-9]+\(-?[0-9]+\)", record)
        slots |= {"func_call": call, "func": call.partition("(")[0]}
    if name in WITH_OPTIONS:
        slots |= {f"OPTION_{letter}": text for letter, text in zip("ABCD", record.options("options"), strict=True)}
    return slots


def _search(pattern: str, record: PublishedRecord) -> str:
    found = re.search(pattern, record.text("input"))
    if found is None:
        raise record.wrong("input", f"has no {pattern!r}, which the prompt is made from")
    return found[0]


def _answers(record: PublishedRecord, name: str) -> tuple[str, ...]:
    """The gold answers; of a choice its text and its letter."""
    answers = record.strings("answer")
    if name not in WITH_OPTIONS:
        return answers
    if len(answers) == 2 and answers[1] in tuple("ABCD"):
        return answers
    return answers[0], letter_of(record, record.options("options"), answers[0])


register_sets("infinitebench", SETS, _examples, title="InfiniteBench {}", paper="2402.13718")
