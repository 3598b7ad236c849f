"""SentenceKV against its card: sentences, their slots and means, what is read when, and who says where they end."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold.formats import POSITION, Chunk, Dense, Indexed, Spec
from kvfold.hf.words import sentence_ends
from kvfold.methods.sentencekv import SentenceKV
from kvfold.selectors import SENTENCE, Selection, Sentences
from kvfold.testing import steps as forced
from kvfold.views import NewWords
from models import build, dynamic, feed, follow, grow, reference, subject, tokens

MARKS = (5, 9, 17, 33, 41)
SMALL = {"budget": 16, "sinks": 2, "recent": 4, "window": 8, "marks": MARKS}


def labels(ids: list[list[int]], newest: int = -1, valid: list[list[int]] | None = None) -> list[list[int]]:
    given = torch.tensor(ids)
    real = torch.ones_like(given, dtype=torch.bool) if valid is None else torch.tensor(valid).bool()
    words = NewWords(given, real, lambda name: torch.full((len(ids),), newest), lambda: None)
    return SentenceKV(marks=MARKS).label(words)[SENTENCE].tolist()


def test_oracle_1_a_mark_belongs_to_the_sentence_that_it_ends():
    text = [1, 2, 3, 5, 6, 7, 9, 10, 11, 12]
    assert [n // 2 for n in labels([text])[0]] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [n % 2 for n in labels([text])[0]] == [0, 0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert max(labels([[*text[:-1], 5]])[0]) // 2 == 2  # a mark at the end makes no empty sentence


def test_oracle_1_what_comes_later_goes_on_where_the_text_ended():
    text = [1, 5, 2, 3, 9, 4]
    whole, first = labels([text])[0], labels([text[:2]])[0]
    assert whole == [0, 1, 2, 2, 3, 4]
    for cut in range(1, 6):
        before = labels([text[:cut]])[0]
        assert before + labels([text[cut:]], max(before))[0] == whole
    assert first == [0, 1]
    # Padding ends no sentence, whatever its id.
    assert labels([[5, 5, 1, 5, 2]], valid=[[0, 0, 1, 1, 1]])[0][2:] == [0, 1, 2]


def held(keys: list[list[float]], sentences: list[int]) -> tuple[Indexed, object]:
    """A segment of one head with these keys, each of a sentence."""
    t, d = len(keys), len(keys[0])
    form = Indexed(Dense(), Selection(Sentences(), 2))
    segment = form.open(Spec(1, 1, d, d, torch.float32, torch.device("cpu")))
    given = torch.tensor(keys)[None, None]
    columns = {
        POSITION: torch.arange(t, dtype=torch.int32)[None, None],
        SENTENCE: torch.tensor(sentences)[None, None] * 2,
    }
    segment.append(Chunk(given, given, torch.ones(1, 1, t, dtype=torch.bool), columns), even=True)
    return form, segment


def test_oracle_2_sentences_are_walked_from_the_best_and_the_last_one_is_cut():
    """Slots 0 ... 4 of sentences {0, 1}, {2}, {3, 4}; s1 is worth most, then s0: slots {2, 0}."""
    _, segment = held([[1.0, 0], [1, 0], [2, 0], [0, 0], [0, 0]], [0, 0, 1, 2, 2])
    scores = segment.index.scores(torch.tensor([[[[1.0, 0]]]]), np.array([[5]]))
    assert scores.flatten().tolist() == [1, 1, 2, 0, 0]
    order = torch.argsort(scores.flatten(), descending=True, stable=True)
    assert order[:2].tolist() == [2, 0]


def test_oracle_3_means():
    _, segment = held([[1.0, 0], [0, 2], [2, 2]], [0, 0, 0])
    index = segment.index
    for query in ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0)):
        asked = index.asks(torch.tensor(query)[None, None, None], np.array([3]))
    assert_close(asked.flatten(), torch.tensor([4 / 3, 4 / 3]))
    assert_close(index.scores(asked, np.array([[3]])).flatten(), torch.full((3,), 28 / 9))


@pytest.mark.parametrize("options", [{"budget": 100}, {"budget": 1.0}, {"budget": 0.5, "factor": 2.0, "sinks": 100}])
def test_oracle_4_a_budget_of_all_there_is_is_full_attention(options):
    prompt, said = tokens(40, 23), forced(2, 8)
    dense = follow(reference("llama"), dynamic(reference("llama")), *prompt.values(), said)
    cache = kvfold.Cache(subject("llama"), SentenceKV(**{**SMALL, **options}))
    got = follow(subject("llama"), cache, *prompt.values(), said)
    if options["budget"] == 0.5:
        assert cache.kept_tokens == 31.5 + 8 and not torch.allclose(got, dense, atol=1e-3)
        return
    assert_close(got, dense, atol=1e-4, rtol=0)


def test_oracle_5_everything_is_read_at_the_end_of_a_sentence_and_at_the_first_token_behind_it():
    """From the second token of a sentence on it is the budget; by what each step is told to read, in each layer."""
    from kvfold.formats.indexed import choices_seen

    model, prompt, seen = subject("llama"), tokens(60, 60), []
    cache = kvfold.Cache(model, SentenceKV(**{**SMALL, "factor": 0.0}))
    feed(model, cache, *prompt.values())
    mask, said = prompt["attention_mask"], [[1, 2], [2, 3], [5, 4], [7, 6], [8, 9], [10, 10], [11, 11], [12, 12]]
    with choices_seen(lambda segment, q, scale, chosen: seen.append((segment, chosen))):
        for ids in said:
            mask = grow(mask)
            feed(model, cache, torch.tensor(ids)[:, None], mask)
    layers = model.config.num_hidden_layers
    whole = np.zeros((len(said), 2), dtype=bool)
    for number in range(len(said)):
        for _, chosen in seen[number * layers : (number + 1) * layers]:
            counts = np.full((2, 1, 1), 61 + number) if chosen is None else chosen.counts
            whole[number] = [bool((counts[row] == 61 + number).all()) for row in range(2)]
            assert ((counts == 16) | (counts == 61 + number)).all()
    # Row 0 ends a sentence with its third token (5), row 1 with its fifth (9).
    assert whole[:, 0].tolist() == [True, False, True, True, False, False, False, False]
    assert whole[:, 1].tolist() == [True, False, False, False, True, True, False, False]


def test_rows_one_by_one_and_chunks_give_the_same():
    model, said = subject("llama"), forced(2, 10)
    prompt = tokens(60, 45)
    both = follow(model, kvfold.Cache(model, SentenceKV(**SMALL)), *prompt.values(), said)
    for row, length in enumerate((60, 45)):
        ids = prompt["input_ids"][row : row + 1, -length:]
        alone = follow(model, kvfold.Cache(model, SentenceKV(**SMALL)), ids, torch.ones_like(ids), said[row : row + 1])
        assert_close(both[row : row + 1], alone, atol=1e-4, rtol=0)


def test_a_crop_begins_another_sentence():
    model, prompt = subject("llama"), tokens(60)
    cache = kvfold.Cache(model, SentenceKV(**{**SMALL, "factor": 0.0}))
    feed(model, cache, *prompt.values())
    mask = prompt["attention_mask"]
    twin = cache.fork()
    for ids in (1, 2, 3):
        mask = grow(mask)
        feed(model, cache, torch.tensor([[ids]]), mask)
    cache.crop(60)
    mask = grow(prompt["attention_mask"])
    one, two = (feed(model, each, torch.tensor([[4]]), mask) for each in (cache, twin))
    assert_close(one, two, atol=1e-5, rtol=0)


def test_it_goes_on_from_a_file(tmp_path):
    model, prompt, said = subject("llama"), tokens(60, 44), forced(2, 6)
    cache = kvfold.Cache(model, SentenceKV(**SMALL))
    mask = prompt["attention_mask"]
    feed(model, cache, *prompt.values())
    for step in said[:, :3].T:
        mask = grow(mask)
        feed(model, cache, step[:, None], mask)
    cache.save(tmp_path / "c.kvfold")
    other = kvfold.Cache.load(tmp_path / "c.kvfold", model)
    for step in said[:, 3:].T:
        mask = grow(mask)
        one, two = (feed(model, each, step[:, None], mask) for each in (cache, other))
        assert torch.equal(one, two)


def test_what_it_must_know(tmp_path):
    elsewhere = build("llama")
    elsewhere.name_or_path = str(tmp_path)  # where no tokenizer is
    with pytest.raises(ValueError, match=r"must know which tokens end a sentence.*give marks="):
        kvfold.Cache(elsewhere, "sentencekv")
    cache = kvfold.Cache(subject("llama"), SentenceKV(**SMALL))
    states = subject("llama").get_input_embeddings()(tokens(20)["input_ids"])
    with pytest.raises(ValueError, match="must know the tokens of a text: give input_ids"):
        subject("llama")(inputs_embeds=states, past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.slow
def test_a_real_tokenizer_says_where_sentences_end():
    model, tokenizer = kvfold.load("smollm2-135m-instruct", progress=False)
    ends = sentence_ends(model.name_or_path)
    assert ends is not None
    text = 'He said: "Stop!" Then (at 3.5 km) he left. Why?\n\nNobody knows'
    ids = tokenizer(text).input_ids
    said = [tokenizer.decode([i]) for i in ids if ends[i]]
    assert [piece.strip()[:1] for piece in said] == ["!", ".", ".", "?"]  # that of 3.5 too: a token has no neighbours
    cache = kvfold.Cache(model, "sentencekv")
    model(**tokenizer(text, return_tensors="pt"), past_key_values=cache)
    assert cache.get_seq_length() == len(ids)
