"""Conversations in episodes: who belongs together, one bounded cache for each, and answers that leave no trace."""

import re
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold.conversations.episodes import Episodes
from kvfold.conversations.topics import Cluster, OwnStates, cluster, embed, encoder_of, segments
from models import VOCAB, subject

pytestmark = pytest.mark.slow
TOPICS = ("sea", "hill", "cake")
TURNS = [("Ann" if i % 2 else "Bob", f"About the {TOPICS[i // 4 % 3]} I say number {i}.") for i in range(24)]


class Words:
    """A tokenizer of words and punctuation marks, a token each."""

    chat_template = None
    bos_token_id = 1

    def __call__(self, text, **_):
        words = re.findall(r"\w+|[^\w\s]", text)
        return SimpleNamespace(input_ids=[3 + zlib.crc32(word.encode()) % (VOCAB - 3) for word in words])

    def decode(self, ids, **_):
        return " ".join(map(str, ids.tolist()))


def topics(texts: list[str]) -> np.ndarray:
    """How often each topic comes up."""
    return np.array([[text.count(topic) + 0.01 for topic in TOPICS] for text in texts])


def talk(method="epicache(budget=40)", turns=TURNS, **options) -> Episodes:
    options = {"block": 32, "episodes": 3, "medoids": 1, "encoder": topics, **options}
    return Episodes(subject("llama"), Words(), turns, method, **options)


def history(turns=TURNS, opening: str = "") -> torch.Tensor:
    return torch.tensor([[1, *Words()(opening + "".join(segments(turns, 4))).input_ids]])


def kept(cache) -> list:
    return [core.kept() for core in cache.paged]


def test_segments_of_four_turns():
    assert segments([("A", "x"), "DATE", ("B", "y")], 2) == ['A said, "x"\nDATE\n', 'B said, "y"\n']
    assert len(segments(TURNS, 4)) == 6


def test_clusters_and_what_is_typical():
    vectors = embed(topics, segments(TURNS, 4))
    found = cluster(vectors, 3)
    assert [each.members for each in found] == [(0, 3), (1, 4), (2, 5)]
    assert_close(np.linalg.norm(vectors, axis=1), np.ones(6))
    assert len(cluster(vectors, 9)) == 3  # no more than there are different ones
    vectors = np.array([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
    some = Cluster((0, 1, 2), vectors[:3].mean(0))
    assert (
        some.typical(vectors, 1) == [2] and some.typical(vectors, 2) == [1, 2] and some.typical(vectors, 9) == [0, 1, 2]
    )
    assert some.joined(3, vectors).members == (0, 1, 2, 3)
    assert np.allclose(some.joined(3, vectors).centroid, vectors.mean(0))


def test_each_episode_has_its_patch_and_its_budget():
    chat = talk()
    assert [each.cluster.members for each in chat.episodes] == [(0, 3), (1, 4), (2, 5)]
    for topic, episode in zip(TOPICS, chat.episodes, strict=True):
        patch = episode.cache.method.patch
        assert topic in patch and not any(other in patch for other in TOPICS if other != topic)
        assert all(core.counts().sum() == 80 and core.seen[0] == episode.ids.shape[1] for core in episode.cache.paged)
        assert torch.equal(episode.ids, history())
    assert [chat.route(f"Who was at the {topic}?") for topic in TOPICS] == [0, 1, 2]
    assert chat.nbytes == sum(each.cache.nbytes for each in chat.episodes)


@pytest.mark.parametrize(
    "method", ["epicache(budget=40)", "epicache(budget=40, level='pair-uniform')", "snapkv(budget=40)"]
)
def test_the_peak_is_a_budget_and_a_block_and_a_patch(method):
    chat = talk(method)
    patch = 32 if "epicache" in method else 0  # without words the block itself
    assert chat.patch_tokens == patch
    # SnapKV cuts each layer as soon as that is read.
    assert chat.peak_tokens == (40 + 32 + patch if patch else 40)
    full = talk("full", episodes=1)
    assert full.peak_tokens == history().shape[1] > 200
    assert chat.peak_nbytes < full.peak_nbytes * (chat.peak_tokens + 24) / full.peak_tokens


def test_one_episode_is_the_prompt_in_blocks():
    chat, model = talk(episodes=1, opening="Hear this. "), subject("llama")
    cache = kvfold.Cache(model, "epicache", budget=40, prefill_chunk=32)
    with torch.no_grad():
        model(history(opening="Hear this. "), past_key_values=cache)
    assert kept(cache) == kept(chat.episodes[0].cache)


def test_a_large_budget_answers_as_full_attention():
    chat, model = talk("epicache(budget=1000)"), subject("llama")
    ids = torch.cat(
        [history(), torch.tensor([Words()("Who was at the sea?").input_ids + Words()("Answer:").input_ids])], 1
    )
    full = kvfold.Cache(model, "full")
    said = model.generate(ids, past_key_values=full, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert chat.answer("Who was at the sea?", 6) == Words().decode(said)


def test_asking_leaves_no_trace():
    chat = talk()
    before = [kept(each.cache) for each in chat.episodes]
    first = chat.answer("Who was at the sea?", 6)
    chat.answer("What about the sea again, and again?", 9)
    assert chat.answer("Who was at the sea?", 6) == first and len(first.split()) == 6
    assert [kept(each.cache) for each in chat.episodes] == before
    assert all(each.cache.get_seq_length() == each.ids.shape[1] for each in chat.episodes)


def test_routing_is_by_the_centroid_as_it_is():
    chat = talk(encoder=lambda texts: np.array([[1.0, 0.2]] * len(texts)), episodes=1)
    (only,) = chat.episodes
    wide = type(only)(Cluster((0,), np.array([0.5, 0.1])), only.cache, only.ids)  # nearer by cosine, and shorter
    narrow = type(only)(Cluster((1,), np.array([0.8, 0.0])), only.cache, only.ids)
    chat.episodes = [wide, narrow]
    assert chat.route("anything") == 1


def test_a_conversation_goes_on():
    chat = talk(block=64)
    more = [("Ann", f"The hill is high, number {i}.") for i in range(4)]
    before = [each.ids.shape[1] for each in chat.episodes]
    counts = chat.episodes[1].cache.kept_tokens
    new = len(Words()("".join(segments(more, 4))).input_ids)
    assert chat.add(more) == [1] and chat.episodes[1].cluster.members == (1, 4, 6)
    assert [each.ids.shape[1] for each in chat.episodes] == [before[0], before[1] + new, before[2]]
    assert chat.episodes[1].cache.kept_tokens == counts + new <= 40 + 64  # appended whole
    assert chat.answer("Who was at the hill?", 3)
    chat.add([("Bob", "The hill again, and once more, and again, and for the last time, my friend.")] * 3)
    rebuilt = chat.episodes[1]
    assert rebuilt.cache.kept_tokens == 40 and rebuilt.cluster.members == (1, 4, 6, 7)
    assert rebuilt.ids.shape[1] > before[1] + new and len(chat.segments) == 8


def test_a_new_topic_opens_an_episode():
    chat = talk(
        threshold=0.5, encoder=lambda texts: np.array([[t.count(w) + 0.01 for w in (*TOPICS, "war")] for t in texts])
    )
    assert chat.add([("Ann", "No more of the sea.")]) == [0] and len(chat.episodes) == 3
    assert chat.add([("Ann", "There is a war.")]) == [3] and "war" in chat.episodes[3].cache.method.patch
    assert chat.route("Which war?") == 3 and chat.episodes[3].cluster.members == (7,)


def test_own_states_are_centred_means():
    model = subject("llama")
    encoder = OwnStates(model, Words())
    texts = ["the sea", "the hill is high", "the cake"]
    found = encoder(texts)
    assert np.abs(found.mean(0)).max() < 1e-5 and np.array_equal(encoder(texts), found)
    ids = torch.tensor([Words()(texts[1]).input_ids])
    with torch.no_grad():
        states = model.model(ids).last_hidden_state[0].mean(0)
    assert_close(torch.tensor(found[1] + encoder.centre), states, atol=1e-5, rtol=1e-5)
    assert len(talk(encoder=None).episodes) == 3


def test_encoders(monkeypatch):
    class Named:
        def __init__(self, name):
            self.name = name

        def encode(self, texts):
            return topics(texts)

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Named))
    assert (
        encoder_of("some-model", subject("llama"), None)(["sea"]).shape == (1, 3)
        and encoder_of(topics, subject("llama"), None) is topics
    )
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match="encoder='some-model' needs sentence-transformers"):
        encoder_of("some-model", subject("llama"), None)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"pip install .kvfold\[episodes\]"):
        cluster(np.eye(3), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "episodes=0 must be an int >= 1"),
        ({"medoids": 0}, "medoids=0 must be"),
        ({"window": 0}, "window=0 must be"),
        ({"block": 1}, "block=1 must be an int >= 2"),
        ({"threshold": 2.0}, r"threshold=2.0 must be a number in \[-1.0, 1.0\]"),
        ({"turns": []}, "must have at least one turn"),
        ({"encoder": lambda texts: np.zeros(3)}, r"must give a finite array \(N, D\) for N texts, not \(3,\)"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        talk(**options)
