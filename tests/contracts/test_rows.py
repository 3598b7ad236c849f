"""Rows that join and leave a batch: whatever methods, budgets and formats the others have, each goes on as alone."""

import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from joining import METHODS, Batch, requests

import kvfold
from kvfold import Keep, Rewrite
from kvfold.formats import POSITION, Chunk
from models import feed, grow, subject, tokens


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "qwen3-next"])
def test_rows_of_different_methods_come_and_go(name):
    """Token for token what each gives alone: logits, and which tokens are held."""
    chosen = [m for m in METHODS if name != "qwen3-next" or "compact" not in m]
    model, all_of_them = requests(name, chosen)
    batch = Batch(model)
    for request in all_of_them[:3]:
        batch.join(request)
    batch.decode()
    batch.decode()
    batch.leave(1)
    batch.join(all_of_them[3])
    batch.decode()
    for request in all_of_them[4:7]:
        batch.join(request)
        batch.decode()
    batch.leave(0, 2)
    batch.decode()
    for request in all_of_them[7:]:
        batch.join(request)
    batch.decode()
    while len(batch.rows) > 1:
        batch.leave(len(batch.rows) // 2)
        batch.decode()
    batch.leave(0)
    assert batch.cache.rows.batch == 0 and batch.cache.get_seq_length() == 0
    batch.join(all_of_them[0])
    batch.decode()


def test_rows_of_one_method_are_one_group():
    model, (one, two) = requests("llama", ["h2o(budget=0.4)"] * 2)
    batch = Batch(model, "h2o(budget=0.4)")
    batch.join(one)
    batch.join(two)
    assert len(batch.cache.rows.groups) == 1 and batch.cache.rows.groups[0].rows is None
    batch.decode()


def test_what_a_row_leaves_is_free():
    model, (long, short) = requests("llama", ["full", "streamingllm(budget=4)"])
    batch = Batch(model)
    batch.join(short)
    alone = sum(batch.cache.row_nbytes())
    batch.join(long)
    own = batch.cache.row_nbytes()
    assert len(own) == 2 and own[0] < own[1] and sum(own) <= batch.cache.nbytes
    before = batch.cache.nbytes
    batch.leave(1)
    assert batch.cache.nbytes < before / 2 and sum(batch.cache.row_nbytes()) == alone
    batch.decode()


def test_a_row_is_taken_out_saved_and_joined_again(tmp_path):
    """Preemption: a row goes to a file and comes back while others went on."""
    model, (one, two, three) = requests("gemma3", ["h2o(budget=0.4)", "full", "kvfold(budget=0.5)"])
    batch = Batch(model)
    for request in (one, two, three):
        batch.join(request)
    batch.decode()
    batch.cache.take([0]).save(tmp_path / "row")
    step = batch.step[0]
    batch.leave(0)
    batch.decode()
    batch.cache.join(kvfold.Cache.load(tmp_path / "row", model))
    batch.rows.append(one)
    batch.step.append(step)
    batch.decode()
    batch.cache.save(tmp_path / "all")
    batch.cache = kvfold.Cache.load(tmp_path / "all", model)
    batch.decode()


def test_prompts_and_generated_tokens_in_one_pass():
    """Some rows read a part of their prompt while the others read a generated token, with padding before it."""
    model, (one, two) = requests("llama", ["h2o(budget=0.4)", "snapkv(budget=30, window=8)"])
    further = tokens(7, seed=9)["input_ids"]
    alone, _ = two.read()
    truth = feed(model, alone, further, torch.ones(1, alone.get_seq_length() + 7).long())[:, -1]
    batch = Batch(model)
    batch.join(one)
    batch.join(two)
    token = one.truth[0].argmax(-1)[:, -1:]
    ids = torch.cat([torch.nn.functional.pad(token, (6, 0)), further])
    width = batch.cache.get_seq_length()
    seen = torch.tensor(batch.cache.rows.seen)[:, None]
    mask = (torch.arange(width) >= width - seen).long()
    mask = torch.cat([mask, torch.tensor([[0] * 6 + [1], [1] * 7])], 1)
    with batch.cache.prefilling(rows=(1,)):
        logits = feed(model, batch.cache, ids, mask)
    torch.testing.assert_close(logits[:1, -1:], one.truth[1], atol=2e-4, rtol=0)
    torch.testing.assert_close(logits[1:, -1], truth, atol=2e-4, rtol=0)
    for core, ours in zip(alone.paged, batch.cache.paged, strict=True):
        assert ours.kept()[1] == core.kept()[0] and ours.kept()[0] == one.held[0][core.ordinal]
    assert batch.cache.rows.prompt.tolist() == [len(one.ids[0]), len(two.ids[0]) + 7]


@pytest.mark.parametrize("case", ["itself", "model", "minicache", "specpc", "rows"])
def test_what_cannot_join_is_refused_before_anything_changes(case):
    model = subject("llama")
    cache = kvfold.Cache(model, "full")
    feed(model, cache, *tokens(20).values())
    other, message = {
        "itself": lambda: (cache, "must be another cache"),
        "model": lambda: (kvfold.Cache(subject("qwen3"), "full"), "must be another cache of this LlamaForCausalLM"),
        "minicache": lambda: (kvfold.Cache(model, "minicache"), "lets layers share memory"),
        "specpc": lambda: (kvfold.Cache(model, "specpc"), "chose what of its text was read"),
        "rows": lambda: (None, r"rows=\[0, 0\] must be different rows of the batch, 0 to 0"),
    }[case]()
    if case in ("minicache", "specpc"):
        feed(model, other, *tokens(40).values())
    before = cache.kept(0), cache.nbytes, cache.rows.batch
    with pytest.raises(ValueError, match=message):
        cache.retire([0, 0]) if other is None else cache.join(other)
    assert (cache.kept(0), cache.nbytes, cache.rows.batch) == before


@pytest.mark.parametrize(("name", "method", "message"), [
    ("gemma3", "full", "has windows or recurrent states"), ("qwen3-next", "full", "has windows or recurrent states"),
    ("llama", "kvzip(budget=0.5)", "reads a prompt in its own way"), ("llama", "cake(budget=0.5)", "in its own way"),
])  # fmt: skip
def test_prompts_beside_generated_tokens_are_refused_where_they_would_be_wrong(name, method, message):
    model, (one, two) = requests(name, [method] * 2, steps=1)
    batch = Batch(model, method)
    batch.join(one)
    batch.join(two)
    width = batch.cache.get_seq_length()
    before = [batch.cache.kept(core.layer) for core in batch.cache.paged]
    with batch.cache.prefilling(rows=(1,)), pytest.raises(ValueError, match=message):
        feed(model, batch.cache, torch.ones(2, 3).long(), torch.ones(2, width + 3).long())
    assert [batch.cache.kept(core.layer) for core in batch.cache.paged] == before
    batch.decode()


def test_a_cache_keeps_its_own_method_whoever_joins():
    model, (one, two) = requests("llama", ["h2o(budget=0.4)", "full"], steps=1)
    batch = Batch(model)
    batch.join(one)
    batch.join(two)
    assert "h2o" in batch.cache.report().method and "full" in batch.cache.report().method
    batch.cache.retire([0, 1])
    assert str(batch.cache.method) == "full()"
    with pytest.raises(ValueError, match=r"rows=\[\] must name at least one row"):
        kvfold.Cache(model).take([])


def test_a_crop_that_a_window_refuses_changes_nothing():
    model = subject("gemma3")
    cache = kvfold.Cache(model, "full")
    feed(model, cache, *tokens(30).values())
    before = cache.rows.seen.tolist(), [cache.kept(core.layer) for core in cache.paged], cache.get_seq_length()
    with pytest.raises(RuntimeError, match="crop"):
        cache.crop(-5)
    assert (cache.rows.seen.tolist(), [cache.kept(c.layer) for c in cache.paged], cache.get_seq_length()) == before


def test_a_row_goes_to_a_file_and_comes_back_into_the_arena(tmp_path):
    model, (one,) = requests("llama", ["h2o(budget=0.4)"], steps=2)
    arena = kvfold.Arena(1 << 20)
    batch = Batch(model)
    batch.cache = kvfold.Cache(model, arena=arena)
    cache = kvfold.Cache(model, one.method, arena=arena)
    feed(model, cache, one.ids, torch.ones_like(one.ids))
    cache.save(tmp_path / "row")
    cache.reset()
    assert arena.used_nbytes == 0
    batch.cache.join(kvfold.Cache.load(tmp_path / "row", model, arena=arena))
    batch.rows, batch.step = [one], [0]
    batch.decode()
    assert arena.used_nbytes > 0


def test_two_threads_give_what_they_give_one_after_the_other():
    """One model, two caches, two threads: what a call knows belongs to its cache."""
    model = subject("llama")
    prompts = [tokens(40, 30, seed=1), tokens(25, 50, seed=2)]
    texts = ["h2o(budget=0.4)", "kvfold(budget=0.5)"]

    def run(index: int) -> tuple[list, torch.Tensor]:
        cache, logits = kvfold.Cache(model, texts[index]), []
        ids, mask = prompts[index].values()
        logits.append(feed(model, cache, ids, mask)[:, -1])
        for _ in range(8):
            mask = grow(mask)
            logits.append(feed(model, cache, logits[-1].argmax(-1)[:, None], mask)[:, -1])
        return [cache.kept(i) for i in range(3)], torch.stack(logits)

    alone, together = [run(0), run(1)], [None, None]

    def work(index: int) -> None:
        for _ in range(3):
            together[index] = run(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (kept, logits), found in zip(alone, together, strict=True):
        assert found is not None and found[0] == kept
        np.testing.assert_allclose(found[1].numpy(), logits.numpy(), atol=1e-5)


# -- a bound on the bytes of all ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        "full", "h2o(budget=0.5)", "full | fp8", "full | kivi(group=8, channels=8, residual=8)",
        "full | mustafar(residual=8, group=8)", "full | think(recent=8)",
    ],
)  # fmt: skip
def test_an_arena_gives_what_a_cache_of_its_own_gives(method):
    model, prompt = subject("llama"), tokens(40, 23)
    arena = kvfold.Arena(1 << 22)
    own, pooled = kvfold.Cache(model, method), kvfold.Cache(model, method, arena=arena)
    mask = prompt["attention_mask"]
    one, two = (feed(model, cache, *prompt.values()) for cache in (own, pooled))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0)
    for step in range(12):
        mask = grow(mask)
        token = torch.tensor([[5 + step], [7 + step]])
        one, two = (feed(model, cache, token, mask) for cache in (own, pooled))
        torch.testing.assert_close(two, one, atol=1e-4, rtol=0)
    assert [own.kept(i) for i in range(3)] == [pooled.kept(i) for i in range(3)]
    assert 0 < arena.used_nbytes <= arena.nbytes <= arena.capacity
    pooled.reset()
    assert arena.used_nbytes == 0


def test_no_room_for_a_token_is_said_before_any_layer_has_read_it():
    """Rows share an arena; when it is full a row leaves, and the others go on as alone."""
    model, (one, two, three) = requests("gemma3", ["full", "h2o(budget=0.4)", "full"])
    arena = kvfold.Arena(90_000)
    batch = Batch(model)
    batch.cache = kvfold.Cache(model, "full", arena=arena)
    for request in (one, two, three):
        cache = kvfold.Cache(model, request.method, arena=arena)
        feed(model, cache, request.ids, torch.ones_like(request.ids))
        batch.cache.join(cache)
        batch.rows.append(request)
        batch.step.append(0)
    steps = 0
    with pytest.raises(kvfold.OutOfPages, match=r"out of pages: \d+ more need \d+ bytes; \d+ of the arena's 90000"):
        while True:
            batch.decode()
            steps += 1
            assert arena.nbytes <= arena.capacity and steps < 40
    held = [batch.cache.kept(core.layer) for core in batch.cache.paged]
    assert batch.cache.rows.seen.tolist() == [len(r.ids[0]) + steps for r in batch.rows] and steps > 2
    batch.leave(2)
    batch.decode()
    assert [batch.cache.kept(core.layer)[0][0][: len(one.ids[0])] for core in batch.cache.paged] == [
        rows[0][0][: len(one.ids[0])] for rows in held
    ]


def test_caches_of_different_arenas_do_not_join():
    model, prompt = subject("llama"), tokens(20)
    caches = [kvfold.Cache(model, "full", arena=arena) for arena in (None, kvfold.Arena(1 << 20))]
    for cache in caches:
        feed(model, cache, *prompt.values())
    with pytest.raises(ValueError, match="come out of another arena"):
        caches[0].join(caches[1])
    assert [cache.rows.batch for cache in caches] == [1, 1]


@pytest.mark.usefixtures("scratch_methods")
def test_a_rewrite_sets_the_columns_that_it_gives_alone_beside_other_rows():
    @kvfold.method("forgetful", title="Forgets its marks", kind="merge")
    @dataclass(frozen=True)
    class Forgetful(kvfold.Method):
        def after_prefill(self, view):
            return Keep(view.valid, {"mark": torch.ones(view.valid.shape)})

        def after_decode(self, view):
            return Rewrite(Chunk(view.keys, view.values, view.valid, {POSITION: view.positions}))

    model, pair = requests("llama", ["forgetful", "full"], steps=1)
    batch = Batch(model)
    for request in pair:
        batch.join(request)
    _, columns = batch.cache.paged[0].segments[0][1].columns()
    assert bool((columns["mark"][0] > 0).any())
    batch.decode()
    _, columns = batch.cache.paged[0].segments[0][1].columns()
    assert not bool(columns["mark"].any())
