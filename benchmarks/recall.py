"""Recall in generation: a fact stated early, thousands of tokens of other text fed one by one, then the question.

    python benchmarks/recall.py --model gemma3-270m --data ../shared/data --fast-linears --facts 32 \\
        --methods 'full;kvfold;h2o;decoding(score="snapkv")' --budgets 256,128 --out build/recall-gemma3

Protocol: `--prompt` tokens of a document are read at once, with a sentence in it after `--before` of them that gives a
person a number of five to seven digits (names, numbers and wordings by `--seed`). The next `--tokens` of the document
are fed one by one through `model(...)`, and so is the question, which ends where the number would stand. The model then
goes on greedily: found is a number that is right as a whole. Facts differ in length, and so do questions: the document
fills in (question and what fills are 64 tokens), so that all rows of a batch have one length and no padding.

The table has the share found, with a bootstrap interval over the facts, the share of those that `full` finds (which is
the ceiling; it is measured where --methods names it), and the share of leading digits that are right. `--out` holds
results.jsonl, to go on in, summary.json and table.md over this run's facts.
"""

import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean
from typing import Any

import torch
from long_runs import Contender, RunFolder, arguments, contenders, load, long_documents, names_in, told, write_table
from torch import Tensor

import kvfold
from kvfold.evaluation.decoding import prefill
from kvfold.evaluation.escaping import code_cell
from kvfold.evaluation.forced import fed, swallowed
from kvfold.evaluation.statistics import bootstrap_interval
from kvfold.hf.tables import as_long_as

FIRST = ("Amara", "Bruno", "Celia", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Keiko", "Lorenzo")
LAST = ("Abbott", "Bergman", "Castillo", "Dalton", "Eriksen", "Fontaine", "Grimaldi", "Hawthorne", "Ivanov", "Jensen")
WORDINGS = (
    ("Please remember this: {name}'s locker code is {code}.", "What is {name}'s locker code? {name}'s locker code is"),
    (
        "A note for later: the account number of {name} is {code}.",
        "Which account number does {name} have? The account number of {name} is",
    ),
    (
        "{name} was given the membership number {code} when the club was founded.",
        "Which membership number was {name} given? {name} was given the membership number",
    ),
    (
        "The safe of {name} opens with the combination {code}.",
        "How does the safe of {name} open? The safe of {name} opens with the combination",
    ),
    (
        "In the register {name} is listed under the reference {code}.",
        "Where is {name} listed in the register? In the register {name} is listed under the reference",
    ),
)
ROOM = 64
"""Tokens of a question, and what the document fills in before it."""
ANSWER = 12
"""Tokens of an answer: seven digits, one a token, and what may stand around them."""


@dataclass(frozen=True)
class Stated:
    """A fact by its name, the number, and the ids (T,) of prompt, other text and question, in this order."""

    name: str
    code: str
    ids: Tensor


def words(seed: int, number: int) -> tuple[str, str, str]:
    """Statement, question and number of a fact; the same for the same seed. Names come up once in 120 facts."""
    people = [" ".join(pair) for pair in product(FIRST, LAST)]
    random.Random(f"{seed}").shuffle(people)
    draw, name = random.Random(f"{seed}:{number}"), people[number % len(people)]
    digits = draw.randint(5, 7)
    code = f"{draw.randint(10 ** (digits - 1), 10**digits - 1)}"
    statement, question = WORDINGS[number % len(WORDINGS)]
    return statement.format(name=name, code=code), question.format(name=name), code


def stated(
    tokenizer: Any, docs: Sequence[Tensor], count: int, *, prompt: int, before: int, tokens: int, seed: int = 0
) -> list[Stated]:
    """So many facts in texts of one length, each in a document of its own as long as there are any.

    Documents (T,) have `prompt + tokens + ROOM` tokens. Raises ValueError where the prompt has no room for a statement.
    """

    def ids_of(text: str) -> Tensor:
        ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        return ids

    texts = [words(seed, number) for number in range(count)]
    facts = [ids_of(f"\n\n{statement}\n\n") for statement, _, _ in texts]
    questions = [ids_of(f"\n\n{question}") for _, question, _ in texts]
    if (longest := before + max(map(len, facts))) > prompt:
        raise ValueError(f"prompt={prompt} must be at least {longest}: {before} tokens and the longest statement")
    whole, found = prompt + tokens + ROOM, []
    for number, (fact, question, text) in enumerate(zip(facts, questions, texts, strict=True)):
        if len(question) > ROOM:
            raise ValueError(f"number={number}: the question has {len(question)} tokens, there is room for {ROOM}")
        doc = docs[number % len(docs)][: whole - len(fact) - len(question)]
        ids = torch.cat([doc[:before], fact, doc[before:], question])
        if len(ids) < whole:
            raise ValueError(f"docs[{number % len(docs)}] must have {whole - len(fact) - len(question)} tokens or more")
        found.append(Stated(f"{seed}:{number}", text[2], ids))
    return found


def right(answer: str, code: str) -> tuple[bool, float]:
    """Whether the first number of an answer is the code, and the share of the code's digits that it begins with."""
    said = re.search(r"\d+", answer)
    if said is None:
        return False, 0.0
    same = 0
    for mine, theirs in zip(said[0], code, strict=False):
        if mine != theirs:
            break
        same += 1
    return said[0] == code, same / len(code)


@torch.no_grad()
def answers(model: Any, tokenizer: Any, cache: kvfold.Cache, ids: Tensor, prompt: int) -> list[str]:
    """What the model says after ids (B, T), of which it reads `prompt` at once and the others one by one."""
    with as_long_as(model, ids.shape[1] + ANSWER):
        prefill(model, ids[:, :prompt], cache)
        swallowed(model, cache, ids[:, prompt:-1])
        (step,) = fed(model, cache, ids[:, -1:])
        said = [step.logits.argmax(-1, keepdim=True)]
        while len(said) < ANSWER:
            (step,) = fed(model, cache, said[-1])
            said.append(step.logits.argmax(-1, keepdim=True))
    found: list[str] = tokenizer.batch_decode(torch.cat(said, 1))
    return found


def measure(model: Any, tokenizer: Any, one: Contender, facts: Sequence[Stated], prompt: int) -> list[dict[str, Any]]:
    """A record for each of some facts, which are one batch."""
    cache, started = kvfold.Cache(model, one.method), time.perf_counter()
    said = answers(model, tokenizer, cache, torch.stack([fact.ids for fact in facts]), prompt)
    seconds, records = time.perf_counter() - started, []
    for fact, answer in zip(facts, said, strict=True):
        found, digits = right(answer, fact.code)
        records.append({
            "fact": fact.name, "found": found, "digits": digits, "code": fact.code, "answer": answer,
            "rows": len(facts), "seconds": seconds / len(facts), "nbytes": cache.nbytes // len(facts),
        })  # fmt: skip
    return records


def report(kept: RunFolder, ran: Sequence[Contender], facts: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Summary by contender, and the table, over these facts."""
    lines = [
        "| budget | method | facts | found [95 %] | of those that `full` finds | leading digits | MB at the end |",
        "| ---: | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    summary: dict[str, Any] = {}
    ceiling = {one["fact"] for each in ran if each.name == "full" for one in kept.of(each, facts) if one["found"]}
    for one in ran:
        if not (found := kept.of(one, facts)):
            continue
        flags = [float(each["found"]) for each in found]
        low, high = bootstrap_interval(flags)
        known = [float(each["found"]) for each in found if each["fact"] in ceiling]
        s = summary[one.key] = {
            "facts": len(found), "found": mean(flags), "found_low": low, "found_high": high,
            "of_full": mean(known) if known else None, "digits": mean(each["digits"] for each in found),
            "nbytes": mean(each["nbytes"] for each in found),
        }  # fmt: skip
        cells = [
            "-" if one.budget is None else f"{one.budget}", code_cell(one.name), f"{s['facts']}",
            f"{s['found']:.2f} [{low:.2f}, {high:.2f}]", "-" if s["of_full"] is None else f"{s['of_full']:.2f}",
            f"{s['digits']:.2f}", f"{s['nbytes'] / 1e6:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return summary, "\n".join(lines) + "\n"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--methods", default="full;kvfold;h2o;tova;streamingllm")
    parser.add_argument("--facts", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--before", type=int, default=64, help="tokens of the document before the statement")
    parser.add_argument("--tokens", type=int, default=2000, help="fed between prompt and question")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(batch=8)
    args = parser.parse_args()
    model, tokenizer = load(args)
    docs = [
        ids for _, ids in long_documents(tokenizer, args.data, args.prompt + args.tokens + ROOM, min(args.facts, 40))
    ]
    facts = stated(
        tokenizer, docs, args.facts, prompt=args.prompt, before=args.before, tokens=args.tokens, seed=args.seed
    )
    about = {name: getattr(args, name) for name in ("model", "dtype", "prompt", "before", "tokens", "device")}
    kept, names = RunFolder(args.out, about, "fact"), [fact.name for fact in facts]
    ran, again, started = contenders(args.methods, args.budgets), names_in(args.again), time.perf_counter()
    for number, one in enumerate(ran, 1):
        missing = kept.missing(one, names, one.name in again)
        left = [fact for fact in facts if fact.name in missing]
        for first in range(0, len(left), args.batch):
            kept.add(one, measure(model, tokenizer, one, left[first : first + args.batch], args.prompt))
            told(f"{number}/{len(ran)} {one.key}: to fact {first + args.batch} ({time.perf_counter() - started:.0f} s)")
    summary, table = report(kept, ran, names)
    write_table(args.out, summary, table)
    print(
        f"{args.model}, {args.dtype}, {args.prompt} tokens read, {args.tokens} fed, then the question\n\n{table}",
        end="",
    )


if __name__ == "__main__":
    main()
