"""KVzip against its card: what a replay of the prompt looks at, and one choice over all heads and layers."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold.methods._repeated import repeated
from kvfold.methods.kvzip import SCORE, TINY, KVzip
from kvfold.views import answered
from models import build, feed, follow, grow, reference, subject, tokens
from views import asked_view, prompt_view, random_view, top


def scored(scores: list[float], **options):
    """A stored layer of one head with these scores to choose from."""
    view = random_view(T=len(scores), **options)
    return view, torch.tensor(scores)[None, None]


def chosen(method: KVzip, *layers: list[float]) -> list[list[int]]:
    paged = tuple(range(len(layers)))
    made = [scored(scores, ordinal=i, layer=i, paged=paged) for i, scores in enumerate(layers)]
    masks = method.choose([view for view, _ in made], [found for _, found in made])
    return [mask[0, 0].nonzero()[:, 0].tolist() for mask in masks]


class Replay:
    """A prompt view over one layer without a model: every replay is a view that the test made."""

    step, prefill = {}, True

    def __init__(self, views, ids, valid=None, words=()):
        self.views, self.ids, self.words, self.asked = views, ids, list(words), []
        self.valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid

    def __len__(self):
        return 1

    def __getitem__(self, ordinal):
        stored = self.views[0]
        size = self.ids.shape[1]
        here = torch.arange(size)
        return prompt_view(stored.queries.states[:, :, here], stored.keys[:, :, here], stored.values[:, :, here])

    def encode(self, text):
        return self.words

    def answer(self):
        return [5] if self.words else []

    def look_ahead(self, count, draft=None):
        raise NotImplementedError

    def read(self, ids, valid, observe):
        self.asked.append(ids[valid].tolist())
        view = self.views[len(self.asked) - 1]
        observe(replace(view, queries=view.queries.pick(torch.arange(self.ids.shape[1], view.keys.shape[2]))))


def test_oracle_1_the_exact_count():
    scores = [0.9, 0.8, 0.7, 0.6, 0.5]
    assert chosen(KVzip(budget=0.4, prefix=0), [*scores[::-1]]) == [[3, 4]]
    assert chosen(KVzip(budget=2, prefix=0), scores) == [[0, 4]]  # the newest stays, whatever its score
    assert chosen(KVzip(budget=4, prefix=2), [0.1, 0.2, 0.9, 0.3, 0.8, 0.4]) == [[0, 1, 2, 5]]


@pytest.mark.parametrize("budget", [1.0, 60])
def test_oracle_2_everything_is_the_full_cache(budget):
    prompt, steps = tokens(40, 25), torch.arange(5, 15).view(2, 5)
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), "kvzip", budget=budget)
    got = follow(model, cache, *prompt.values(), steps)
    full = kvfold.Cache(model, "full")
    assert_close(got, follow(model, full, *prompt.values(), steps), atol=1e-5, rtol=0)
    assert [core.kept() for core in cache.paged] == [core.kept() for core in full.paged]


def columns(cache, row: int) -> torch.Tensor:
    """The scores of a row's tokens (L, H, T), where none was dropped."""
    planes = [core.stored.tokens()[0].columns[SCORE][row] for core in cache.paged]
    return torch.stack(planes)


def read(prompt, **options) -> kvfold.Cache:
    cache = kvfold.Cache(subject("llama"), KVzip(**{"budget": 400, **options}))
    feed(subject("llama"), cache, *prompt.values())
    return cache


def judged(method: KVzip, view, start: int, stop: int) -> torch.Tensor:
    """The scores of the tokens from `start` to `stop` of a view whose last slots repeat them."""
    part = view.valid & (view.positions >= start) & (view.positions < stop)
    return method.judge(view, part)[..., start:stop]


def test_oracle_3_scores_are_attention_and_chunks_do_not_meet():
    scores = columns(read(tokens(50), chunk=16), 0)
    assert (scores >= TINY).all() and (scores <= 1 + 1e-6).all()
    view = random_view(H=2, G=2, T=40)
    view = replace(view, queries=view.queries.pick(torch.arange(30, 40)))
    keys = view.keys.clone()
    keys[:, :, 4:10], keys[:, :, 20:30] = 9.0, -9.0  # of other chunks
    found = [
        judged(KVzip(), replace(view, tokens=replace(view.tokens, keys=states)), 10, 20) for states in (view.keys, keys)
    ]
    assert torch.equal(found[0], found[1]) and (found[0] > 0).all()


def test_oracle_4_nothing_of_the_replay_stays():
    prompt = tokens(40, 25)
    cache, full = read(prompt, chunk=16), kvfold.Cache(subject("llama"), "full")
    feed(subject("llama"), full, *prompt.values())
    for mine, theirs in zip(cache.paged, full.paged, strict=True):
        one, two = mine.stored.tokens()[0], theirs.stored.tokens()[0]
        assert torch.equal(one.keys[one.valid], two.keys[two.valid]) and mine.width == theirs.width == 40
        assert torch.equal(one.values[one.valid], two.values[two.valid])
        assert mine.seen.tolist() == mine.prompt.tolist() == [40, 25]


def test_oracle_5_a_copying_head_beats_a_local_one():
    copying, local = torch.full((1, 1, 1, 8, 16), -30.0), torch.full((1, 1, 1, 8, 16), -30.0)
    for i in range(8):
        copying[..., i, i] = 0.0
        local[..., i, 8 + i] = 0.0
    scores = []
    for logits in (copying, local):
        replay = Replay([asked_view(logits, 8)], torch.arange(8)[None])
        scores.append(answered(repeated(replay, [replay[0]], KVzip(prefix=0).judge, 2000, 8), replay)[0][0, 0])
    assert (scores[0] >= 0.99).all() and (scores[1] < 0.01).all()
    assert chosen(KVzip(budget=0.5, prefix=0), *(s.tolist() for s in scores)) == [[0, 1, 2, 3, 4, 5, 7], [7]]


def test_oracle_6_one_replay_is_the_models_attention():
    """A short prompt: no instruction without a tokenizer, so the replay is the prompt once more."""
    ids = tokens(20)["input_ids"]
    own = columns(read(tokens(20)), 0)
    views = []
    plain = kvfold.Cache(subject("llama"), "full")
    with plain.observed(views.append):
        feed(subject("llama"), plain, ids.repeat(1, 2), torch.ones(1, 40, dtype=torch.long))
    for layer, view in enumerate(views):
        probs = view.attention(40)[0, :, :, 20:, :20]  # H G 20 20
        assert_close(own[layer], probs.amax((1, 2)).clamp(min=TINY), atol=1e-5, rtol=0)


def test_oracle_7_levels():
    layers = ([0.9, 0.8, 0.7, 0.1], [0.2, 0.3, 0.4, 0.1])
    assert chosen(KVzip(budget=0.5, prefix=0), *layers) == [[0, 1, 3], [3]]
    assert chosen(KVzip(budget=0.5, prefix=0, level="uniform"), *layers) == [[0, 3], [2, 3]]


def test_what_is_asked():
    """Words, the end of the chunk before, the template's turn, the chunk: padding left out, rows on their own."""
    ids = torch.tensor([[9, 10, 11, 12, 13], [0, 0, 20, 21, 22]])
    valid = torch.tensor([[True] * 5, [False, False, True, True, True]])
    views = [random_view(B=2, T=30)] * 3
    replay = Replay(views, ids, valid, words=[1, 2])
    seen = replace(replay[0], place=replace(replay[0].place, seen=valid.sum(1)))
    answered(repeated(replay, [seen], KVzip().judge, chunk=2, overlap=3), replay)
    assert replay.asked == [
        [1, 2, 5, 9, 10, 1, 2, 5, 20, 21],
        [1, 2, 9, 10, 5, 11, 12, 1, 2, 20, 21, 5, 22],
        [1, 2, 10, 11, 12, 5, 13],
    ]


def slow_scores(view, stored: int, start: int, stop: int, prefix: int, head: int) -> list[float]:
    """The card's steps 4 and 5 for one KV head: keys of the prefix, the chunk and the replay, causal in the replay."""
    group = view.queries.states.shape[1] // view.heads
    total = view.keys.shape[2]
    best = [0.0] * stored
    for member in range(head * group, (head + 1) * group):
        for i in range(stored, total):
            seen = [j for j in range(i + 1) if j < prefix or start <= j < stop or j >= stored]
            query = view.queries.states[0, member, i - stored]
            weights = (view.keys[0, head, seen] @ query * view.place.scale).softmax(0)
            for j, weight in zip(seen, weights.tolist(), strict=True):
                if start <= j < stop:
                    best[j] = max(best[j], weight)
    return best


@pytest.mark.parametrize(("start", "stop", "prefix"), [(0, 9, 4), (9, 18, 4), (18, 20, 0), (2, 6, 4)])
def test_scores_against_a_loop(start, stop, prefix):
    view = random_view(H=2, G=3, T=33, D=16, seed=start)
    view = replace(view, queries=view.queries.pick(torch.arange(20, 33)))
    found = judged(KVzip(prefix=prefix), view, start, stop)
    for head in range(2):
        slow = slow_scores(view, 20, start, stop, prefix, head)
        assert_close(found[0, head], torch.tensor(slow[start:stop]))


def test_the_choice_against_a_sort():
    cache = read(tokens(40, 31), budget=0.35)
    scores = read(tokens(40, 31))
    for row, length in enumerate((40, 31)):
        judged = columns(scores, row)[:, :, :length].clone()
        judged[:, :, [0, 1, 2, 3, length - 1]] = 2.0
        kept = top(judged.flatten().tolist(), int(0.35 * length * 6 + 1e-9))
        left = [i for layer in range(3) for head in range(2) for i in (
            p + length * (2 * layer + head) for p in cache.kept(layer)[row][head])]  # fmt: skip
        assert left == kept


def test_rows_and_chunks_on_their_own():
    """A short row ends in an earlier chunk than its neighbour."""
    prompt = tokens(50, 13)
    both = read(prompt, budget=0.4, chunk=8)
    alone = read({name: x[1:, 37:] for name, x in prompt.items()}, budget=0.4, chunk=8)
    assert [core.kept()[1] for core in both.paged] == [core.kept()[0] for core in alone.paged]


def test_a_second_turn_competes_by_score():
    prompt = tokens(60)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), "kvzip", budget=20)
    feed(model, cache, ids[:, :30], mask[:, :30])
    first = [core.kept()[0] for core in cache.paged]
    feed(model, cache, ids[:, 30:31], mask[:, :31])
    assert [[head[:-1] for head in core.kept()[0]] for core in cache.paged] == first  # appended
    feed(model, cache, ids[:, 31:], mask)
    assert sum(int(core.counts().sum()) for core in cache.paged) == 20 * 6
    for core, before in zip(cache.paged, first, strict=True):
        for head, old in zip(core.kept()[0], before, strict=True):
            assert {p for p in head if p < 30} <= set(old) and 30 in head and 59 in head


def test_a_model_that_was_given_embeddings():
    model = build("llama")
    cache = kvfold.Cache(model, "kvzip", budget=5)
    with (
        pytest.raises(ValueError, match=r"kvzip.*reads a prompt again: call the model with input_ids"),
        torch.no_grad(),
    ):
        model(inputs_embeds=model.get_input_embeddings()(tokens(12)["input_ids"]), past_key_values=cache)


def test_a_window_model_keeps_its_windows():
    prompt = tokens(40, 25)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model, cache = subject("gemma3"), kvfold.Cache(subject("gemma3"), "kvzip", budget=400, chunk=16)
    got = follow(model, cache, ids, mask, torch.arange(5, 15).view(2, 5))
    longer = torch.cat([ids, torch.arange(5, 15).view(2, 5)], 1)
    expected = feed(reference("gemma3"), None, longer, grow(mask, 5))[:, 39:]
    assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": -1}, "budget=-1 must be"),
        ({"chunk": 0}, "chunk=0 must be an int >= 1"),
        ({"overlap": -1}, "overlap=-1 must be an int >= 0"),
        ({"prefix": -1}, "prefix=-1 must be an int >= 0"),
        ({"level": "head"}, "level='head' must be one of 'pair', 'uniform'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        KVzip(**options)
