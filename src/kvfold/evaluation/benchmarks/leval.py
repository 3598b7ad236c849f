"""L-Eval: sets of long documents with several instructions each (arXiv:2307.11088).

All instructions of a document are queries of one example. Prompts say what those of the official baselines say, in our
own words (its repository is under the GPL), so figures are not comparable to the letter. Left out, as in the official
script without a judge: documents marked "LLM" or "human"; and codeU, whose answers need rules of their own. Of sci_fi
the answer by the document is asked and scored, not the second one by knowledge of the real world.
"""

from collections.abc import Iterator

from kvfold.evaluation.benchmarks._files import Source, records
from kvfold.evaluation.benchmarks._records import PublishedRecord
from kvfold.evaluation.benchmarks._sets import register_sets
from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks.base import Setting

EXAM = ("coursera", "quality", "tpo", "gsm100", "topic_retrieval_longchat", "sci_fi")
SETS = {
    **dict.fromkeys(EXAM, "exam"),
    **dict.fromkeys(("financial_qa", "legal_contract_qa", "multidoc_qa", "narrative_qa"), "f1"),
    **dict.fromkeys(("natural_question", "scientific_qa"), "f1"),
    **dict.fromkeys(("gov_report_summ", "meeting_summ", "news_summ", "paper_assistant", "patent_summ"), "rouge"),
    **dict.fromkeys(("review_summ", "tv_show_summ"), "rouge"),
}

SYSTEM = {
    "gsm100": "Solved questions come first, then a new one. Solve it in the same way, and end with "
    "'The answer is' and the number.",
    "topic_retrieval_longchat": "What follows is the record of a conversation between USER and ASSISTANT in which the "
    "user names one topic after another. Remember the topics in their order: you will be asked for one of them.",
    "coursera": "Read this long document, then answer a multiple-choice question about it. One or several options may "
    "be right. Give their letters alone, such as A or AB.",
    "sci_fi": "Read this science-fiction story, then judge a statement about it by what the story says and not by "
    "what you know. Answer True or False.",
}
SYSTEM_EXAM = (
    "Read this long document, then answer a question about it. Of several options exactly one is right: give its "
    "letter alone, such as A or B. Answer any other question in as few words as it needs."
)
SYSTEM_OPEN = "Read this long document, then follow the instruction after it."
BRIEFLY = "Give the answer alone."
WHOLE = ("gsm100", "topic_retrieval_longchat")
"""Sets whose document and instruction stand by themselves, a blank line between them."""


def _examples(setting: Setting, name: str, kind: str) -> Iterator[Example]:
    folder = "Exam" if kind == "exam" else "Generation"
    part = "Closed-ended-tasks" if kind == "exam" else "Open-ended-tasks"
    names = (
        f"{name}.jsonl",
        f"LEval/{folder}/{name}.jsonl",
        f"{folder}/{name}.jsonl",
        f"LEval-data/{part}/{name}.jsonl",
    )
    source = Source((*names, f"{part}/{name}.jsonl"), "L4NLP/LEval", file=f"LEval/{folder}/{name}.jsonl")
    for index, record in enumerate(records(setting, source)):
        if record.text("evaluation") not in ("human", "LLM"):
            yield _example(record, index, name, kind)


def _example(record: PublishedRecord, index: int, name: str, kind: str) -> Example:
    instructions, outputs = record.strings("instructions"), record.strings("outputs")
    if len(instructions) != len(outputs):
        raise record.wrong("outputs", f"has {len(outputs)} entries for {len(instructions)} of 'instructions'")
    system = SYSTEM.get(name, SYSTEM_EXAM if kind == "exam" else SYSTEM_OPEN)
    lead = "" if name in WHOLE else "Document:\n"
    queries = tuple(_query(*pair, name, kind) for pair in zip(instructions, outputs, strict=True))
    info = {"published_source": str(record.fields.get("source", ""))}
    return Example(str(index), f"{system}\n\n{lead}{record.text('input')}", queries, cut="end", info=info)


def _query(instruction: str, output: str, name: str, kind: str) -> Query:
    prefix = ""
    if name in WHOLE:
        text = f"\n\n{instruction}"
    elif kind == "exam":
        text = f"\n\nQuestion: {instruction}\n{BRIEFLY}"
        prefix = "Answer:"
    else:
        text = f"\n\nInstruction: {instruction}\nUse about {len(output.split())} words."
    metric, answer = f"leval/{kind}", output
    if name == "sci_fi":  # "True [fact: False]"
        metric, answer = "contains_any", output.partition("[fact:")[0].strip()
    return Query(text, (answer,), metric, prefix, max_new_tokens=512, info={"set": name})


register_sets("leval", SETS, _examples, title="L-Eval {}", paper="2307.11088")
