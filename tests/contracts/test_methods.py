"""What every method promises, from the registry: rows stay apart, budgets hold, bytes are true."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvfold
from calibrated import SMALL
from families import ANYWHERE, FREE, LIMITED, METHODS, each
from kvfold import testing
from kvfold.formats import IndexedSegment
from kvfold.methods.base import Method
from models import VOCAB, dynamic, feed, follow, greedy, grow, reference, subject, tokens

IN_DECODE = [slug for slug in LIMITED if kvfold.parse(slug).listens("after_decode")]
ALL, WITH_BUDGET = each(METHODS), each(LIMITED)
BUDGETS = st.one_of(st.floats(0.02, 0.99), st.integers(1, 40))


def make(slug: str, name: str = "llama", dtype=torch.float32, **options):
    """A model and a cache; methods that take a budget keep half unless told."""
    if slug in LIMITED:
        options = {"budget": 0.5, **options}
    options = {**SMALL.get(slug, {}), **options}
    return subject(name, dtype), kvfold.Cache(subject(name, dtype), slug, **options)


def forced(rows: int, count: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, count), generator=torch.Generator().manual_seed(9))


def held(cache, row: int) -> int:
    """Tokens of one row, summed over heads and layers."""
    return sum(int(core.counts()[row].sum()) for core in cache.paged)


def limit(cache, budget, prompt: int) -> float:
    """What a budget allows for one row, summed over heads and layers."""
    each = budget * prompt if isinstance(budget, float) else budget
    return each * len(cache.paged) * cache.paged[0].shape[0]


def snapshot(core) -> dict[str, torch.Tensor]:
    """Copies of what a layer stores: keys, values and columns of its tokens."""
    tokens = core.stored.tokens()[0]
    planes = {"keys": tokens.keys, "values": tokens.values, **tokens.columns}
    return {name: plane[tokens.valid].clone() for name, plane in planes.items()}


def reachable_bytes(cache) -> int:
    """Every tensor's storage and every array's buffer that can be reached from the cache, each once."""
    stores, seen, todo = {}, set(), [cache.layers]
    while todo:
        value = todo.pop()
        # A method's own tensors are the model's calibration; a segment that reads them counts them.
        if id(value) in seen or isinstance(value, torch.nn.Module | kvfold.Cache | Method):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            stores[("tensor", storage.data_ptr())] = storage.nbytes() if storage.data_ptr() else 0
        elif isinstance(value, np.ndarray):
            base = value
            while isinstance(base.base, np.ndarray):
                base = base.base
            stores[("array", id(base))] = base.nbytes if base.flags.owndata else 0  # else it looks at a tensor
        elif isinstance(value, dict):
            todo.extend(value.values())
        elif isinstance(value, list | tuple | set):
            todo.extend(value)
        elif type(value).__module__.startswith(("kvfold", "transformers")) and hasattr(value, "__dict__"):
            todo.extend(vars(value).values())
    return sum(stores.values())


@pytest.mark.parametrize("contract", testing.CONTRACTS, ids=lambda contract: contract.__name__)
@each(METHODS, name=["llama", "gemma3"])
def test_the_contracts_that_third_parties_run(slug, name, contract):
    if slug in FREE and contract is testing.the_newest_token_stays:
        pytest.skip("its paper lets the newest token compete")
    if slug not in LIMITED and "budget" in kvfold.parse(slug).info.options and "budget" in contract.__name__:
        pytest.skip("its budget is not about what is stored of a text")
    model, cache = make(slug, name)
    contract(cache.rows.own, model)


# -- rows ----------------------------------------------------------------------------------------------------


@ALL
@given(lengths=st.lists(st.integers(1, 48), min_size=2, max_size=3), seed=st.integers(0, 3))
def test_a_batch_is_its_rows(slug, lengths, seed):
    prompt = tokens(*lengths, seed=seed)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model, cache = make(slug)
    steps = forced(len(lengths), 3)
    logits = follow(model, cache, ids, mask, steps)
    for row, length in enumerate(lengths):
        _, alone = make(slug)
        own = ids[row : row + 1, -length:]
        got = follow(model, alone, own, torch.ones_like(own), steps[row : row + 1])
        for layer in range(len(cache.layers)):
            assert alone.kept(layer)[0] == cache.kept(layer)[row]
        torch.testing.assert_close(got[0], logits[row], atol=1e-4, rtol=0)


@ALL
@given(length=st.integers(1, 40), pad=st.integers(1, 30))
def test_left_padding_changes_nothing(slug, length, pad):
    own = tokens(length)
    model, cache = make(slug)
    feed(model, cache, *own.values())
    ids = torch.nn.functional.pad(own["input_ids"], (pad, 0))
    mask = torch.nn.functional.pad(own["attention_mask"], (pad, 0))
    _, padded = make(slug)
    feed(model, padded, ids, mask)
    assert [padded.kept(i) for i in range(3)] == [cache.kept(i) for i in range(3)]
    read = cache.paged[0].prompt.tolist()
    assert padded.paged[0].prompt.tolist() == read and (cache.reading is not None or read == [length])


# -- budgets -------------------------------------------------------------------------------------------------


@WITH_BUDGET
@given(budget=BUDGETS, lengths=st.lists(st.integers(1, 63), min_size=1, max_size=2))
def test_the_budget_holds_after_the_prompt(slug, budget, lengths):
    model, cache = make(slug, budget=budget)
    feed(model, cache, *tokens(*lengths).values())
    for row, length in enumerate(lengths):
        allowed = limit(cache, budget, length)
        assert held(cache, row) <= allowed + 1e-6
        if slug == "streamingllm" and allowed <= length * 6:
            assert held(cache, row) == int(allowed + 1e-6)  # nothing of the budget is left unused
        for layer in range(3):
            for kept in cache.kept(layer)[row]:
                assert kept == sorted(set(kept)) and all(0 <= position < length for position in kept)


@pytest.mark.parametrize("slug", IN_DECODE)
@given(budget=st.one_of(st.floats(0.1, 0.99), st.integers(1, 24)), length=st.integers(1, 33))
def test_the_budget_holds_at_every_step(slug, budget, length):
    prompt = tokens(length, max(1, length - 3))
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model, cache = make(slug, budget=budget)
    feed(model, cache, ids, mask)
    for step in forced(2, 6).T:
        mask = grow(mask)
        feed(model, cache, step[:, None], mask)
        for row, prompt_length in enumerate((length, max(1, length - 3))):
            assert held(cache, row) <= limit(cache, budget, prompt_length) + 1e-6


@WITH_BUDGET
@pytest.mark.parametrize("budget", [0.75, 12], ids=["fraction", "tokens"])
def test_the_budget_holds_after_a_second_turn(slug, budget):
    prompt = tokens(64, 50)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model, cache = make(slug, budget=budget)
    feed(model, cache, ids[:, :31], mask[:, :31])
    feed(model, cache, ids[:, 31:], mask)
    for row, length in enumerate((64, 50)):
        assert held(cache, row) <= limit(cache, budget, length)
        kept = [position for head in cache.kept(2)[row] for position in head]
        assert max(kept) == length - 1 or slug in FREE
        assert min(kept) < length - 33 or budget == 12


@ALL
@pytest.mark.parametrize("length", [1, 2, 7])
def test_short_prompts(slug, length):
    """Shorter than every window, down to one token, with budgets that keep next to nothing."""
    for budget in (0.01, 0.3, 1, 64):
        options = {"budget": budget} if slug in LIMITED else {}
        model, cache = make(slug, **options)
        logits = follow(model, cache, *tokens(length, 1).values(), forced(2, 3))
        assert logits.isfinite().all()
        if options and budget == 0.01 and slug in IN_DECODE:
            assert cache.kept_tokens == 0  # an empty keep-set: every step attends to itself alone


# -- bytes ---------------------------------------------------------------------------------------------------


@each(METHODS, name=["llama", "gemma3"])
def test_nbytes_is_what_is_allocated(slug, name):
    prompt = tokens(70, 33)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model, cache = make(slug, name)
    assert cache.nbytes == reachable_bytes(cache)
    feed(model, cache, ids, mask)
    assert cache.nbytes == reachable_bytes(cache)
    for step in forced(2, 20).T:
        mask = grow(mask)
        feed(model, cache, step[:, None], mask)
    assert cache.nbytes == reachable_bytes(cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    feed(model, cache, forced(2, 1), grow(mask[[1, 1]]))
    assert cache.nbytes == reachable_bytes(cache)
    beams = kvfold.Cache(model, cache.method)
    model.generate(**prompt, past_key_values=beams, num_beams=3, max_new_tokens=5, do_sample=False)
    assert beams.nbytes == reachable_bytes(beams)
    cache.reset()
    assert cache.nbytes == reachable_bytes(cache)


@WITH_BUDGET
def test_nbytes_falls_as_promised(slug):
    prompt = tokens(320, 320)
    sizes = {}
    for budget in (1.0, 0.5, 0.25):
        model, cache = make(slug, budget=budget)
        feed(model, cache, *prompt.values())
        sizes[budget] = cache.nbytes
        assert cache.dense_nbytes == 2 * 320 * 2 * 32 * 4 * 3
        for core in cache.paged:
            pool = getattr(core.segments[0][1], "inner", core.segments[0][1]).pool
            needed = int((-(-core.counts() // pool.page_size)).sum())
            assert pool.used <= pool.pages
            assert pool.pages <= 1.02 * needed  # memory is given back
    # Columns, tables and half-empty last pages are all that comes on top.
    half = 0.59 if slug == "kvfold" else 0.58  # kvfold has four columns beside heads of 32
    assert sizes[0.5] < half * sizes[1.0] and sizes[0.25] < 0.33 * sizes[1.0]


# -- quality -------------------------------------------------------------------------------------------------


@WITH_BUDGET
def test_the_error_falls_as_the_budget_grows(slug):
    steps, errors = forced(4, 12), []
    prompt = tokens(48, 48, 40, 33, seed=2)
    truth = follow(reference("llama"), dynamic(reference("llama")), *prompt.values(), steps).log_softmax(-1)
    for budget in (0.1, 0.45, 0.85, 1.0):
        model, cache = make(slug, budget=budget)
        got = follow(model, cache, *prompt.values(), steps).log_softmax(-1)
        errors.append(float((truth.exp() * (truth - got)).sum(-1).mean()))
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-6


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_narrow_dtypes(slug, dtype):
    prompt = tokens(40, 29)
    _, wide = make(slug)
    probed = {"heads": wide.method.heads} if slug == "kvfold" else {}  # else each probes its own model
    model, cache = make(slug, dtype=dtype, **probed)
    logits = follow(model, cache, *prompt.values(), forced(2, 6))
    assert logits.dtype == dtype and logits.isfinite().all()
    follow(subject("llama"), wide, *prompt.values(), forced(2, 6))
    assert sum(core.counts().sum() for core in cache.paged) == sum(core.counts().sum() for core in wide.paged)
    for narrow, exact in zip(cache.paged, wide.paged, strict=True):
        assert (narrow.counts() == exact.counts()).all() or slug in ANYWHERE
        if cache.method.format is not None:
            continue
        held = narrow.segments[0][1]
        planes = (held.inner if isinstance(held, IndexedSegment) else held).pool.planes
        assert planes["keys"].dtype == planes["values"].dtype == dtype
        assert all(plane.dtype in (torch.float32, torch.int32) for name, plane in planes.items()
                   if name not in ("keys", "values"))  # fmt: skip


# -- state ---------------------------------------------------------------------------------------------------


@each(METHODS, name=["llama", "gemma3"])
def test_save_and_load(slug, name, tmp_path):
    prompt = tokens(40, 30)
    model, cache = make(slug, name)
    mask = grow(prompt["attention_mask"], 4)
    follow(model, cache, *prompt.values(), forced(2, 4))
    cache.save(tmp_path / "cache.safetensors")
    loaded = kvfold.Cache.load(tmp_path / "cache.safetensors", model)
    assert str(loaded.method) == str(cache.method)
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]
    for mine, theirs in zip(cache.paged, loaded.paged, strict=True):
        one, two = snapshot(mine), snapshot(theirs)
        assert one.keys() == two.keys() and all(torch.equal(one[plane], two[plane]) for plane in one)
    assert loaded.nbytes == reachable_bytes(loaded)
    token = forced(2, 1)
    for _ in range(5):
        mask = grow(mask)
        expected, got = feed(model, cache, token, mask), feed(model, loaded, token, mask)
        assert torch.equal(got, expected)
        token = expected.argmax(-1)
    assert cache.kept(1) == loaded.kept(1)
    assert loaded.get_seq_length() == cache.get_seq_length()


@each(METHODS, name=["llama", "gemma3", "qwen3-next"])
def test_a_tentative_pass_leaves_no_trace(slug, name):
    prompt = tokens(40, 30)
    mask = grow(prompt["attention_mask"], 3)
    model, cache = make(slug, name)
    follow(model, cache, *prompt.values(), forced(2, 3))
    before = [(core.kept(), snapshot(core), core.rows.mark()) for core in cache.paged]
    nbytes, seen = cache.nbytes, []
    with cache.tentative(lambda view: seen.append(view.place.ordinal)):
        feed(model, cache, forced(2, 20), grow(mask, 20))
        feed(model, cache, forced(2, 1), grow(mask, 21))
    assert seen == [core.ordinal for core in cache.paged] * 2
    assert cache.nbytes == reachable_bytes(cache) <= nbytes  # room that steps had made may be given back
    for core, (kept, stored, mark) in zip(cache.paged, before, strict=True):
        assert core.kept() == kept and core.width == mark.width
        assert (core.seen == mark.seen).all() and (core.prompt == mark.prompt).all()
        now = snapshot(core)
        assert now.keys() == stored.keys()
        assert all(torch.equal(now[plane], stored[plane]) for plane in now)
    _, untouched = make(slug, name)
    follow(model, untouched, *prompt.values(), forced(2, 3))
    token, mask = forced(2, 1), grow(mask)
    assert torch.equal(feed(model, cache, token, mask), feed(model, untouched, token, mask))


def test_composition_from_text():
    text = "snapkv(budget=0.5) | streamingllm(budget=0.5)"
    prompt = tokens(40, 30)
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), text)
    assert isinstance(cache.method, kvfold.Pipeline) and len(cache.method.stages) == 2
    feed(model, cache, *prompt.values())
    # The second stage finds nothing over its budget: together they keep what SnapKV alone keeps.
    _, alone = make("snapkv")
    feed(model, alone, *prompt.values())
    assert cache.kept(2) == alone.kept(2)
    got = model.generate(**prompt, past_key_values=kvfold.Cache(model, text), max_new_tokens=12, do_sample=False)
    assert got.shape == (2, 52)
    tighter = kvfold.Cache(model, "snapkv(budget=0.5) | streamingllm(budget=0.2, sinks=2)")
    feed(model, tighter, *prompt.values())
    for row, length in enumerate((40, 30)):
        for few, many in zip(tighter.kept(2)[row], alone.kept(2)[row], strict=True):
            assert few == many[:2] + many[len(many) - (length // 5 - 2) :]


@each([slug for slug in METHODS if slug not in ("jrt-prompt", "specpc")], name=["llama", "gemma3"])
def test_who_takes_all_back_begins_anew(slug, name):
    """Nothing of a text that was taken back, a balancer or a set of channels, is left for the next one.

    (What chose which tokens the model reads takes none of them back: they were read as a whole.)
    """
    model, cache = make(slug, name)
    other = make(slug, name)[1]
    text, new = tokens(7, 5), tokens(40, 32)
    feed(model, cache, *text.values())
    cache.crop(-text["input_ids"].shape[1])
    for one in (cache, other):
        one.said = greedy(model, one, *new.values(), 4)
    torch.testing.assert_close(cache.said[1], other.said[1], rtol=1e-4, atol=1e-4)
    assert [core.kept() for core in cache.paged] == [core.kept() for core in other.paged]
