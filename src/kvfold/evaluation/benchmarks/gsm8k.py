"""GSM8K: grade-school mathematics with a chain of thought, for compression while decoding (arXiv:2110.14168).

The eight worked examples are those of chain-of-thought prompting (arXiv:2201.11903), in the form and order of
lm-evaluation-harness's gsm8k_cot.
"""

from collections.abc import Iterator
from itertools import islice

from kvfold.evaluation.benchmarks._files import Source, records
from kvfold.evaluation.benchmarks._gsm8k_shots import SHOTS
from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks.base import Setting, task

NAMES = ("test.jsonl", "grade_school_math/data/test.jsonl", "gsm8k.jsonl", "main/test*.parquet", "test*.parquet")


@task("gsm8k", title="GSM8K: word problems with a chain of thought", paper="2110.14168", sized=False)
def gsm8k(setting: Setting, *, shots: int = 8) -> Iterator[Example]:
    """The context is the worked examples, `shots` of them; the query is the problem, whose answer is reasoned out.

    The answer of the data stands behind "####". A base model goes on with problems of its own: "Q:" ends its answer.
    """
    if not 1 <= shots <= len(SHOTS):
        raise ValueError(f"shots={shots} must be in 1..{len(SHOTS)}")
    context = "\n\n".join(f"Q: {question}\nA: {answer}" for question, answer in SHOTS[:shots])
    source = Source(NAMES, "openai/gsm8k", config="main")
    for index, record in enumerate(islice(records(setting, source), setting.samples)):
        steps, mark, answer = record.text("answer").rpartition("####")
        if not mark:
            raise record.wrong("answer", "has no '####' in front of the number")
        query = Query(
            f"\n\nQ: {record.text('question')}\nA:",
            (answer.strip(),),
            metric="gsm8k/answer",
            max_new_tokens=512,
            stop=("Q:",),
            info={"steps": steps.count("\n")},
        )
        yield Example(str(index), context, (query,))
