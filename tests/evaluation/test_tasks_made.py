"""Many-shot recall, aggregation, running text, and the fit of filler to a length."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.metrics import get_metric
from kvfold.evaluation.tasks import Setting, make_examples
from kvfold.evaluation.tasks._draws import apart, distinct, number, word
from kvfold.evaluation.tasks._fit import Fit, tokens_needed
from kvfold.evaluation.tasks.aggregation import NEGATIVE, POSITIVE
from kvfold.evaluation.tasks.texts import RunningText, documents, plant, running_text, sentences


def test_a_seen_word_has_one_label(tokenizer: Any) -> None:
    for example in make_examples("fewshot", Setting(tokenizer, 4000, 8)):
        shown = re.findall(r"Word: (\w+)\nLabel: (\w+)", example.context)
        (asked,) = re.findall(r"Word: (\w+)\nLabel:$", example.queries[0].text + example.queries[0].prefix)
        assert [name for word, name in shown if word == asked] == list(example.queries[0].answers)
        assert example.context.count(asked) == 1
        counts = Counter(name for _, name in shown).values()
        assert len(counts) == 4 and max(counts) - min(counts) <= 1
        assert not any(name.lower() in word for word, _ in shown for _, name in shown[:4])


def test_a_new_word_follows_the_rule(tokenizer: Any) -> None:
    answers = set()
    for example in make_examples("fewshot(ask='new', labels=3)", Setting(tokenizer, 4000, 12)):
        shown = re.findall(r"Word: (\w+)\nLabel: (\w+)", example.context)
        (asked,) = re.findall(r"Word: (\w+)\nLabel:$", example.queries[0].text + example.queries[0].prefix)
        assert asked not in example.context
        assert {name for word, name in shown if word[-2:] == asked[-2:]} == set(example.queries[0].answers)
        assert all(len({name for word, name in shown if word[-2:] == end}) == 1 for end in {w[-2:] for w, _ in shown})
        answers.add(asked[-2:])
    assert len(answers) > 3


def test_reviews_are_counted(tokenizer: Any) -> None:
    for example in make_examples("space_digest_made", Setting(tokenizer, 5000, 5)):
        reviews = re.findall(r"^Review \d+: (.+)$", example.context, re.MULTILINE)
        good = sum(any(said in review for said in POSITIVE) for review in reviews)
        assert good + sum(any(said in review for said in NEGATIVE) for review in reviews) == len(reviews)
        gold = float(example.queries[0].answers[0].removesuffix("%"))
        assert gold == pytest.approx(100 * good / len(reviews), abs=0.006)
        score = get_metric("zeroscrolls/exp_similarity")
        assert score(f"{gold - 10 if gold > 50 else gold + 10:.2f}%", example.queries[0])["score"] == pytest.approx(0.5)
        assert example.cut == "end"


@pytest.mark.parametrize("items", [4, 6])
def test_summaries_are_sorted_by_year(tokenizer: Any, items: int) -> None:
    for example in make_examples(f"sort_made(items={items})", Setting(tokenizer, 6000, 4)):
        parts = re.findall(r"Summary (\d+): This part of the story is set in the year (\d+)\.", example.context)
        assert len({year for _, year in parts}) == items
        gold = ", ".join(place for place, _ in sorted(parts, key=lambda part: part[1]))
        assert example.queries[0].answers == (gold,)
        reverse = ", ".join(reversed(gold.split(", ")))
        assert get_metric("zeroscrolls/concordance")(reverse, example.queries[0])["score"] == 0.0


def test_sentences_end_where_they_end() -> None:
    text = 'Mr. Holmes came in. "Is it late?" he asked. "Yes!" I said. It cost 3.5 pounds.\n\nIV\n\nNew\nline here'
    assert sentences(text) == [
        "Mr. Holmes came in.", '"Is it late?" he asked.', '"Yes!"', "I said.", "It cost 3.5 pounds.", "IV",
        "New line here",
    ]  # fmt: skip


def test_no_word_of_the_shipped_text_is_lost() -> None:
    made = documents(Setting(None))
    assert [title for title, _ in made] == sorted(title for title, _ in made) and len(made) == 4
    text = running_text(Setting(None))
    assert " ".join(text.sentences).split() == [word for _, each in made for word in each.split()]
    assert len(text.sentences) > 1500 and max(map(len, text.sentences)) < 1000


def test_running_text_is_cut_by_words_and_repeats() -> None:
    text = RunningText.of(["a b c.", "d e.", "f."])
    assert [text.first(n) for n in (0, 2, 3, 4, 6)] == [[], ["a b"], ["a b c."], ["a b c.", "d"], list(text.sentences)]
    assert text.first(14) == [*text.sentences, *text.sentences, "a b"]
    assert text.turned(1).first(4) == ["d e.", "f.", "a"]


def test_needles_stand_at_their_depths() -> None:
    hay = list("abcd")
    assert plant(hay, [(1.0, "Z"), (0.0, "X"), (0.5, "Y")]) == "X a b Y c d Z"
    assert plant(hay, [(0.3, "X")], joint="\n") == "a\nX\nb\nc\nd"


def test_texts_may_be_a_file_or_a_folder(tmp_path: Path) -> None:
    for name, text in (("b.txt", "Second."), ("a.txt", "First."), ("c.md", "Not this.")):
        (tmp_path / name).write_text(text)
    assert documents(Setting(None, texts=tmp_path)) == [("a", "First."), ("b", "Second.")]
    assert documents(Setting(None, texts=tmp_path / "c.md")) == [("c.md", "Not this.")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"texts=.*empty' must be a text file, or a folder with \.txt"):
        documents(Setting(None, texts=tmp_path / "empty"))


@pytest.mark.parametrize("most", [None, 40, 400])
@pytest.mark.parametrize("length", [60, 97, 350, 4001])
@pytest.mark.parametrize("guess", [0, 7, 90, 5000])
def test_fit_is_the_largest_that_fits(tokenizer: Any, most: int | None, length: int, guess: int) -> None:
    """Units of 1 to 13 bytes."""
    made: list[int] = []

    def make(units: int) -> Example:
        made.append(units)
        return Example("x", "".join("y" * (1 + unit * unit % 13) for unit in range(units)), (Query("?", (), "x"),))

    setting = Setting(tokenizer, length)
    fit = Fit(setting, "some", length + 64, guess)
    fit(make, 2, most)
    best = fit.guess
    assert tokens_needed(setting, make(best)) <= length + 64
    assert best == most or tokens_needed(setting, make(best + 1)) > length + 64
    assert len(made) < 16


def test_several_queries_are_counted_as_a_conversation(tokenizer: Any) -> None:
    queries = tuple(Query(f"ask{i}", ("a", "bc"), "x", "pre", max_new_tokens=10 * i) for i in (1, 3, 2))
    assert tokens_needed(Setting(tokenizer), Example("x", "context", queries)) == 7 + 3 * 7 + 2 * len(" a, bc") + 30


def test_draws_are_no_parts_of_one_another() -> None:
    rng = Setting(None).rng("draws")
    drawn = apart(rng, lambda rng: number(rng, rng.randint(2, 4)), 60)
    assert not any(one in other for one in drawn for other in drawn if one is not other)
    assert len(set(distinct(rng, word, 500))) == 500
    with pytest.raises(ValueError, match="there is no other to draw than the 10"):
        distinct(rng, lambda rng: rng.choice("0123456789"), 11)


def test_stretches_of_several_texts(tokenizer: Any) -> None:
    made = make_examples("agreement(forced=8, each=2)", Setting(tokenizer, 200, 5))
    titles = [title for title, _ in documents(Setting(tokenizer))]
    assert [(example.info["text"], example.info["start"]) for example in made] == [
        (titles[0], 0), (titles[0], 200), (titles[1], 0), (titles[1], 200), (titles[2], 0),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="each=0 must be at least 1"):
        make_examples("agreement(each=0)", Setting(tokenizer, 200, 5))
