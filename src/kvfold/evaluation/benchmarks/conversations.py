"""Questions on long chats: LoCoMo (arXiv:2402.17753), REALTALK (arXiv:2502.13270), LongMemEval (arXiv:2410.10813).

All questions on a chat are queries of one example, as EpiCache (arXiv:2509.17396) asks them; the layout of the
context is its, the sentences around it are ours. LoCoMo and REALTALK are on GitHub, not on the hub.
"""

import re
from collections.abc import Iterator
from itertools import islice

from kvfold.evaluation.benchmarks._files import Source, records
from kvfold.evaluation.benchmarks._records import PublishedRecord
from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks.base import Setting, task

METRICS = ("convqa/f1", "convqa/locomo")
ADVERSARIAL = 5
TEMPORAL = 2

OPENING = (
    "Here is what {} and {} said to each other over many days. It has several sessions, and the date stands before "
    "each of them.\n"
)
ASK = (
    "\n\nAnswer the question below about these conversations. Give a short answer of a few words, no sentence, and use "
    "the exact words of the conversations where you can.{}\n\nQuestion: {}\n"
)
BY_DATE = " Take the DATE lines to give an approximate date."
NOT_THERE = ' If the conversations do not say, answer "not mentioned".'

_SESSION = re.compile(r"session_(\d+)")


@task("locomo", title="LoCoMo: questions on ten long chats", paper="2402.17753", sized=False)
def locomo(setting: Setting, *, adversarial: bool = False, metric: str = METRICS[0]) -> Iterator[Example]:
    """`adversarial`: also category 5, whose questions the chat does not answer. `metric`: "convqa/locomo" is theirs."""
    names = ("locomo10.json", "data/locomo10.json", "*.json")
    source = Source(names, "github.com/snap-research/locomo", hub=False)
    for index, record in enumerate(islice(records(setting, source), setting.samples)):
        chat = PublishedRecord(f"{record.where}, conversation", record.need("conversation"))
        speakers = chat.text("speaker_a"), chat.text("speaker_b")
        yield _chat(str(index), chat, speakers, "text", record.records("qa"), adversarial, metric)


@task("realtalk", title="REALTALK: questions on ten chats of real people", paper="2502.13270", sized=False)
def realtalk(setting: Setting, *, metric: str = METRICS[0]) -> Iterator[Example]:
    """One file a chat, as in the repository's folder `data`."""
    names = ("Chat_*.json", "data/Chat_*.json", "realtalk*.json")
    source = Source(names, "github.com/danny911kr/REALTALK", hub=False)
    for index, record in enumerate(islice(records(setting, source), setting.samples)):
        people = PublishedRecord(f"{record.where}, name", record.need("name"))
        speakers = people.text("speaker_1"), people.text("speaker_2")
        yield _chat(str(index), record, speakers, "clean_text", record.records("qa"), False, metric)


def _chat(
    name: str,
    chat: PublishedRecord,
    speakers: tuple[str, str],
    said: str,
    questions: list[PublishedRecord],
    adversarial: bool,
    metric: str,
) -> Example:
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} must be one of {', '.join(map(repr, METRICS))}")
    # By number, for as strings session_10 stands before session_2; "events_session_1" and the dates do not match.
    numbers = sorted(int(found[1]) for key in chat.fields if (found := _SESSION.fullmatch(key)) and chat.fields[key])
    if not numbers:
        raise chat.wrong("session_1", "is missing, and so are all other sessions")
    sessions = [_session(chat, number, said) for number in numbers]
    asked = [each for each in questions if adversarial or each.number("category") != ADVERSARIAL]
    queries = tuple(_question(each, adversarial, metric) for each in asked)
    return Example(name, OPENING.format(*speakers) + "".join(sessions), queries, info={"sessions": len(sessions)})


def _session(chat: PublishedRecord, number: int, said: str) -> str:
    lines = [f"\nDATE: {chat.text(f'session_{number}_date_time')}", "CONVERSATION:"]
    for turn in chat.records(f"session_{number}"):
        caption = turn.fields.get("blip_caption")
        shared = f" and shared {caption}." if caption else ""
        lines.append(f'{turn.text("speaker")} said, "{turn.text(said)}"{shared}')
    return "\n".join(lines) + "\n"


def _question(record: PublishedRecord, adversarial: bool, metric: str) -> Query:
    category = record.number("category")
    answers = ("not mentioned",) if category == ADVERSARIAL else record.strings("answer")
    hints = (BY_DATE if category == TEMPORAL else "") + (NOT_THERE if adversarial else "")
    text = ASK.format(hints, record.text("question"))
    return Query(text, answers, metric, max_new_tokens=50, info={"category": category})


@task("longmemeval", title="LongMemEval: one question on many chats", paper="2410.10813", sized=False)
def longmemeval(setting: Setting, *, variant: str = "s", abstention: bool = False) -> Iterator[Example]:
    """One history per question, with the official prompt for turns in plain text.

    `variant`: "s" (some 115 thousand tokens), "m" (1.5 million) or "oracle" (the evidence alone). `abstention`: also
    questions that cannot be answered. Differs from the paper: no model judges the answers, `convqa/f1` scores them.
    """
    if variant not in ("s", "m", "oracle"):
        raise ValueError(f"variant={variant!r} must be one of 's', 'm', 'oracle'")
    cleaned = "longmemeval_oracle.json" if variant == "oracle" else f"longmemeval_{variant}_cleaned.json"
    names = tuple(f"{folder}{name}" for folder in ("", "data/") for name in (cleaned, f"longmemeval_{variant}.json"))
    source = Source(names, "xiaowu0162/longmemeval-cleaned", file=cleaned)
    kept = (r for r in records(setting, source) if abstention or not r.text("question_id").endswith("_abs"))
    for record in islice(kept, setting.samples):
        yield _memory(record)


def _memory(record: PublishedRecord) -> Example:
    dates, sessions = record.strings("haystack_dates"), record.need("haystack_sessions")
    if len(dates) != len(sessions):
        raise record.wrong("haystack_dates", f"has {len(dates)} entries for {len(sessions)} of 'haystack_sessions'")
    history = ""
    for number, (date, session) in enumerate(sorted(zip(dates, sessions, strict=True), key=lambda pair: pair[0]), 1):
        turns = PublishedRecord(record.where, {"haystack_sessions": session}).records("haystack_sessions")
        said = "".join(f"\n\n{turn.text('role')}: {turn.text('content').strip()}" for turn in turns)
        history += f"\n### Session {number}:\nSession Date: {date}\nSession Content:\n{said}\n"
    text = f"\n\nCurrent Date: {record.text('question_date')}\nQuestion: {record.text('question')}\nAnswer:"
    kind = record.text("question_type")
    query = Query(text, record.strings("answer"), METRICS[0], max_new_tokens=500, info={"category": kind})
    lead = (
        "I will give you several history chats between you and a user. Please answer the question based on the "
        "relevant chat history.\n\n\nHistory Chats:\n\n"
    )
    return Example(record.text("question_id"), lead + history, (query,), info={"sessions": len(sessions)})
