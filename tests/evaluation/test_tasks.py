"""What every task that is made here promises: its length, the same examples again, a right answer that scores."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.metrics import get_metric
from kvfold.evaluation.tasks import Setting, list_tasks, make_examples
from kvfold.evaluation.tasks.texts import documents

NAMES = [
    info.name
    for info in list_tasks()
    if info.make.__module__.startswith("kvfold.evaluation.tasks") and info.name not in ("agreement", "perplexity")
]
LENGTHS = {"bytes": (9000, 12_000), "pieces": (2400, 5000), "words": (1500, 2500)}


def pieces() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the text that ships."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([text for _, text in documents(Setting(None))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def words() -> PreTrainedTokenizerFast:
    """One token a word or run of punctuation; all of them unknown."""
    made = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


Tokenizers = dict[str, PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def tokenizers(tokenizer: PreTrainedTokenizerFast) -> Tokenizers:
    return {"bytes": tokenizer, "pieces": pieces(), "words": words()}


@pytest.fixture(scope="session")
def articles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of SQuAD's form with paragraphs of the text that ships."""
    paragraphs = [each for _, text in documents(Setting(None)) for each in text.split("\n\n") if 80 < len(each) < 400]
    made = [
        {"context": text, "qas": [{"question": f"Which text has number {i}?", "answers": [{"text": text[:30]}]}]}
        for i, text in enumerate(paragraphs)
    ]
    data = {"data": [{"paragraphs": made[i : i + 5]} for i in range(0, len(made), 5)]}
    path = tmp_path_factory.mktemp("data") / "squad.json"
    path.write_text(json.dumps(data), "utf-8")
    return path


def needed(setting: Setting, example: Example, query: Query) -> int:
    return setting.count(example.context + query.text + query.prefix) + query.max_new_tokens


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_no_query_is_longer_than_the_length_and_the_whole_is_close_to_it(
    name: str, kind: str, articles: Path, tokenizers: Tokenizers
) -> None:
    """At most 5 % are left over; of several queries, over what all of them and their right answers take."""
    for length in LENGTHS[kind]:
        setting = Setting(tokenizers[kind], length, 2, data=articles)
        for example in make_examples(name, setting):
            assert example.info["length"] == length
            assert max(needed(setting, example, query) for query in example.queries) <= length
            talk = sum(setting.count(f"{q.text}{q.prefix} {', '.join(q.answers)}") for q in example.queries)
            new = max(query.max_new_tokens for query in example.queries)
            assert setting.count(example.context) + talk + new >= 0.95 * length


@pytest.mark.parametrize("name", NAMES)
def test_examples_depend_on_seed_tokenizer_and_index_alone(name: str, articles: Path, tokenizers: Tokenizers) -> None:
    setting = Setting(tokenizers["pieces"], 2400, 3, data=articles)
    made = make_examples(name, setting)
    assert make_examples(name, setting) == made
    assert make_examples(name, Setting(pieces(), 2400, 2, data=articles)) == made[:2]
    other = make_examples(name, Setting(tokenizers["pieces"], 2400, 3, seed=1, data=articles))
    assert name == "niah/sentence" or other != made
    assert name == "niah/sentence" or len({example.context for example in made}) == 3


@pytest.mark.parametrize("name", NAMES)
def test_the_right_answer_scores_whole_and_the_question_does_not_hold_it(
    name: str, articles: Path, tokenizers: Tokenizers
) -> None:
    for example in make_examples(name, Setting(tokenizers["pieces"], 6000, 4, data=articles)):
        for query in example.queries:
            gold = ", ".join(query.answers)
            assert get_metric(query.metric)(f" {gold}\n", query)["score"] == pytest.approx(1.0)
            assert get_metric(query.metric)("", query)["score"] == 0.0
            if name not in ("conversation", "infinitebench/code_run_made"):
                assert not any(answer in query.text + query.prefix for answer in query.answers)


@pytest.mark.parametrize("name", NAMES)
def test_a_length_is_needed_and_one_that_is_too_short_is_refused(
    name: str, articles: Path, tokenizers: Tokenizers
) -> None:
    with pytest.raises(ValueError, match=f"length=20 is too short for task {name}: its smallest example needs"):
        make_examples(name, Setting(tokenizers["words"], 20, 1, data=articles))
    with pytest.raises(ValueError, match=r"lengths= must name at least one"):
        make_examples(name, Setting(tokenizers["words"], None, 1, data=articles))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("niah(keys=2, queries=3)", "keys=2 must be from queries=3"),
        ("niah(kind='letters')", "kind='letters' must be one of 'numbers'"),
        ("niah(depths=(0.5, 2))", r"depths=\(0.5, 2\) must be numbers in \[0, 1\]"),
        ("niah(values=0)", "values=0 must be an integer of at least 1"),
        ("kv_retrieval(pairs=1)", "pairs=1 must be"),
        ("scbench/multihop(turns=6)", "chains=5 must be an integer of at least 6"),
        ("scbench/math_find(turns=8)", "turns=8 must be 1 to 7"),
        ("fewshot(ask='old')", "ask='old' must be one of 'seen', 'new'"),
        ("conversation(queries=50)", "queries=50 must be at most 12"),
        ("infinitebench/code_run_made(levels=(2, 0))", "levels=0 must be an integer of at least 1"),
        ("ruler/vt(hops=0)", "hops=0 must be"),
        ("sort_made(items=1)", "items=1 must be"),
    ],
)
def test_bad_options_are_named(text: str, told: str, tokenizers: Tokenizers) -> None:
    with pytest.raises(ValueError, match=told):
        make_examples(text, Setting(tokenizers["words"], 4000, 1))


def test_default_numbers_of_samples(tokenizers: Tokenizers) -> None:
    def count(name: str) -> int:
        return len(make_examples(name, Setting(tokenizers["words"], 1500)))

    wanted: dict[str, Any] = {"ruler/vt": 20, "niah": 20, "niah/sentence": 10, "longctx/passkey": 30, "passkey": 22}
    assert {name: count(name) for name in wanted} == wanted
