"""NOSA against its card: what windows see, what a block is worth, which are forced, and what importance does."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import kvfold
from kvfold import artefacts, testing
from kvfold.formats import LOG_MASS, POSITION, Chunk, Dense, Indexed, Spec
from kvfold.methods.nosa import NOSA, Importance, heads_of
from kvfold.pages import Residency
from kvfold.selectors import Lasting, Selection, WindowMeans
from kvfold.selectors.windows import best_over_blocks, over_windows
from kvfold.testing import steps as forced
from kvfold.views import Site
from models import dynamic, feed, follow, grow, reference, subject, tokens

H, G, D = 2, 3, 8
SITE = Site(0, 0, (0,), 1)
SMALL = "nosa(budget=60, block=8, window=4, stride=2, sinks=8, local=16)"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spec(rows: int = 1) -> Spec:
    return Spec(rows, H, D, D, torch.float32, torch.device("cpu"), group=G)


def chunk(keys: torch.Tensor, e: torch.Tensor | None = None, start: int = 0) -> Chunk:
    b, h, t, _ = keys.shape
    places = torch.arange(start, start + t, dtype=torch.int32).expand(b, h, t)
    columns = {POSITION: places} | ({} if e is None else {LOG_MASS: e})
    return Chunk(keys, keys, torch.ones(b, h, t, dtype=torch.bool), columns)


def remembered(recipe: WindowMeans, keys: torch.Tensor, e: torch.Tensor | None = None):
    index = recipe.open(spec(len(keys)))
    index.extend(chunk(keys, e), np.zeros(keys.shape[:2], dtype=np.int64))
    return index


def full(value: int, b: int = 1) -> np.ndarray:
    return np.full((b, H), value)


def artefact(model, folder: Path, scale: float, seed: int = 0) -> str:
    """Heads of a tiny model, in a file."""
    layers = len(kvfold.Cache(model, "full").paged)
    data = {"delta": random(layers, 2, 32, seed=seed), "scale": torch.full((layers, 2), scale)}
    about = {"fingerprint": artefacts.fingerprint(model), "name": "tiny"}
    path = folder / f"heads-{scale}.safetensors"
    artefacts.save(artefacts.Artefact("nosa", about, data, {}), path)
    return str(path)


def slow_scores(keys: torch.Tensor, q: torch.Tensor, block: int, window: int, stride: int) -> torch.Tensor:
    """S of one row and KV head (N,), by the card's steps 1 to 4: keys (T, D), the queries of the group (G, D)."""
    t = len(keys)
    starts = [s for s in range(0, t, stride) if s + window <= t]
    s = torch.zeros(len(starts))
    for query in q:
        logits = torch.stack([query @ keys[a : a + window].mean(0) for a in starts]) / D**0.5
        s += logits.softmax(-1)
    return slow_blocks(s, starts, t, block, window)


def slow_blocks(s: torch.Tensor, starts: list[int], t: int, block: int, window: int) -> torch.Tensor:
    """Of each block the largest number of a window that has a token in it, or one that would have."""
    number = -(-t // block)
    found = torch.zeros(number)
    for b in range(number):
        over = [float(s[j]) for j, a in enumerate(starts) if a < (b + 1) * block and a + window > b * block]
        found[b] = max(over, default=0.0)
    return found


def test_oracle_1_a_block_is_worth_the_best_of_five_windows():
    s = torch.tensor([0.1, 0.9, 0.2, 0.0, 0.3, 0.05, 0.6, 0.1, 0.0, 0.2, 0.4])
    assert_close(best_over_blocks(s, 4, 2), torch.tensor([0.9, 0.6, 0.4]))


@pytest.mark.parametrize(("place", "windows"), [(30, 0), (31, 1), (46, 1), (47, 2), (63, 3)])
def test_oracle_2_which_windows_a_query_sees(place, windows):
    """The query's own token is stored when it asks, so that 31 is the last of the first window."""
    keys = random(1, H, place + 1, D)
    index = remembered(WindowMeans(), keys)
    means = over_windows(index.held[:, :, :4, :D], 2)
    seen = index._whole(means.shape[2])
    assert seen.sum(-1).eq(windows).all()
    for j in range(windows):
        assert_close(means[:, :, j], keys[:, :, 16 * j : 16 * j + 32].mean(2), atol=1e-6, rtol=0)
    q = random(1, H, G, D, seed=1)
    given = torch.einsum("bhgd,bhjd->bhgj", q, means[:, :, :windows]) * D**-0.5
    want = given.softmax(-1).sum(2).amax(-1) if windows else torch.zeros(1, H)  # nothing is to be seen
    assert_close(index.scores(q, full(1))[:, :, :, 0], want[:, :, None].expand(-1, -1, G))


def test_oracle_3_eighteen_blocks_are_forced():
    method = NOSA(4096)
    always = method.selection(SITE).always.units(64, np.array([[41]]), np.array([64]))[0, 0]
    assert always.nonzero()[0].tolist() == [0, *range(24, 41)]
    # Fewer where the budget is small, and never more than half of it with the newest.
    for room, forced_blocks in ((64, 18), (36, 18), (16, 8), (3, 2), (1, 1)):
        always = method.selection(SITE).always.units(64, np.array([[1000]]), np.array([room]))[0, 0]
        assert always.sum() == forced_blocks and always[-1] and always[0] == (room >= 3)


def selected(index, selection: Selection, q: torch.Tensor, t: int) -> list[set[int]]:
    read = selection.choose(index, q, full(t), np.array([t]))[0].mask
    assert read.shape[2] == 1
    return [set(read[0, head, 0].nonzero()[0].tolist()) for head in range(H)]


@pytest.fixture
def trained(tmp_path) -> NOSA:
    """Of the card's numbers, as if somebody had trained it."""
    return NOSA(4096, calibration=str(tmp_path / "unread.safetensors"))


def test_oracle_4_what_lasts_is_read_whoever_asks(trained):
    """18 forced, 15 by the query, 31 by importance; two steps share at least 49 whatever is asked."""
    t, selection = 64 * 100 - 5, trained.selection(SITE)
    keys, e = random(1, H, t, D), random(1, H, t, seed=3).abs()
    index = remembered(selection.index, keys, e)
    starts = [a for a in range(0, t, 16) if a + 32 <= t]
    reads = [selected(index, selection, 4 * random(1, H, G, D, seed=seed), t) for seed in range(4, 8)]
    for head in range(H):
        worth = slow_blocks(torch.stack([e[0, head, a : a + 32].mean() for a in starts]), starts, t, 64, 32)
        always = {0, *range(83, 100)}
        order = [b for b in worth.argsort(descending=True, stable=True).tolist() if b not in always]
        for seed, read in zip(range(4, 8), reads, strict=True):
            assert len(read[head]) == 64 and always | set(order[:31]) <= read[head]
            s = slow_scores(keys[0, head], 4 * random(1, H, G, D, seed=seed)[0, head], 64, 32, 16)
            asked = [b for b in s.argsort(descending=True, stable=True).tolist() if b not in always][:15]
            left = [b for b in order if b not in asked][:31]
            assert read[head] == always | set(asked) | set(left)
        assert all(len(a[head] & b[head]) >= 49 for a, b in pairwise(reads))
        assert reads[0][head] != reads[1][head]


def test_without_heads_the_query_chooses_all_that_is_free():
    """InfLLM-V2: 18 forced and 46 by the query."""
    t, selection = 64 * 100 - 5, NOSA(4096, query=1.0).selection(SITE)
    assert selection == NOSA(4096).selection(SITE) and selection.lasting is None and not selection.index.weighed
    keys, q = random(1, H, t, D), 4 * random(1, H, G, D, seed=4)
    read, always = selected(remembered(selection.index, keys), selection, q, t), {0, *range(83, 100)}
    for head in range(H):
        s = slow_scores(keys[0, head], q[0, head], 64, 32, 16)
        free = [b for b in s.argsort(descending=True, stable=True).tolist() if b not in always]
        assert read[head] == always | set(free[:46])


@pytest.mark.parametrize(("block", "window", "stride"), [(64, 32, 16), (8, 4, 2), (6, 6, 2), (4, 4, 4), (6, 9, 3)])
@pytest.mark.parametrize("t", [1, 31, 32, 130, 200])
def test_the_scores_of_blocks_by_a_slow_loop(block, window, stride, t):
    keys, q, e = random(1, H, t, D), 3 * random(1, H, G, D, seed=1), random(1, H, t, seed=2)
    number = -(-t // block)
    index = remembered(WindowMeans(block, window, stride, True), keys, e)
    scores, lasts = index.scores(q, full(number)), index.lasting(number)
    starts = [a for a in range(0, t, stride) if a + window <= t]
    for head in range(H):
        want = slow_scores(keys[0, head], q[0, head], block, window, stride) if starts else torch.zeros(number)
        assert_close(scores[0, head], want.expand(G, number), atol=1e-5, rtol=0)
        means = [float(e[0, head, a : a + window].mean()) for a in starts]
        for b in range(number):
            over = [m for m, a in zip(means, starts, strict=True) if a < (b + 1) * block and a + window > b * block]
            assert float(lasts[0, head, b]) == pytest.approx(max(over, default=-torch.inf), abs=1e-5)


def test_one_by_one_is_all_at_once():
    keys, e = random(2, H, 90, D), random(2, H, 90, seed=1)
    whole = remembered(WindowMeans(weighed=True), keys, e)
    grown = remembered(WindowMeans(weighed=True), keys[:, :, :0], e[..., :0])
    for t in range(90):
        grown.extend(chunk(keys[:, :, t : t + 1], e[..., t : t + 1], t), full(t, 2))
    assert torch.equal(grown.held[:, :, :5], whole.held[:, :, :5]) and torch.equal(grown.still, whole.still)


def test_the_share_of_the_query():
    lasting = Lasting(0.25)
    for room, always, want in ((64, 18, 15), (128, 18, 31), (16, 8, 3), (6, 3, 1), (3, 2, 1), (1, 1, 0)):
        assert lasting.asked(np.array([room]), full(room - always)).tolist() == [[want] * H]


def test_importance_is_of_the_values_of_all_heads():
    heads, v = Importance(random(H, H * D), torch.tensor([0.5, -2.0])), random(1, H, 5, D, seed=1)
    got = heads(v)
    for t in range(5):
        side = torch.cat([v[0, head, t] for head in range(H)])
        for head in range(H):
            assert_close(got[0, head, t], heads.scale[head] * F.softplus(heads.delta[head] @ side), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize("text", ["nosa(budget=1.0)", "nosa(budget=4096)", "nosa(budget=1.0, query=1.0)"])
def test_oracle_5_without_importance_all_that_is_read_is_full_attention(family, text, tmp_path):
    prompt, said = tokens(150, 90), forced(2, 6)
    dense = follow(reference(family), dynamic(reference(family)), *prompt.values(), said)
    for calibration in (None, artefact(subject(family), tmp_path, 0.0)):
        cache = kvfold.Cache(subject(family), text, calibration=calibration)
        assert_close(follow(subject(family), cache, *prompt.values(), said), dense, atol=1e-4, rtol=0)


def test_oracle_5_with_a_of_zero_it_is_plain_sparse_attention(tmp_path):
    """Nothing tells blocks apart then, so that what importance adds are the earliest."""
    model, prompt, said = subject("llama"), tokens(150), forced(1, 6)
    cache = kvfold.Cache(model, SMALL, calibration=artefact(model, tmp_path, 0.0), query=1.0)
    plain = kvfold.Cache(model, SMALL)
    got, want = (follow(model, each, *prompt.values(), said) for each in (cache, plain))
    assert_close(got, want, atol=1e-5, rtol=0)
    assert plain.method.query == 1.0 and plain.method.calibration is None


def test_oracle_6_of_two_steps_only_what_is_missing_is_moved():
    """Old slots 5, 9, 2, 7 and wanted 2, 11, 5, 8: two copies."""
    memory = Residency(4, 1)
    old, new = np.array([5, 9, 2, 7]), np.array([2, 11, 5, 8])
    memory.use(old, written=old)
    memory.clean(old)  # all lie elsewhere, too
    memory.use(new, written=new)
    memory.clean(new)
    memory.use(old)
    moves = memory.use(new)
    assert moves.come.tolist() == [8, 11] and moves.go.tolist() == [7, 9] and not len(moves.back)


def test_a_change_within_a_block_renews_the_block():
    segment = Indexed(Dense(), Selection(WindowMeans(8, 4, 2), 64)).open(spec())
    segment.append(chunk(random(1, H, 200, D)))
    assert segment.index.begins(full(77)).tolist() == [[72] * H]


@pytest.mark.parametrize("before", ["", "h2o(budget=0.9) | "])
def test_what_tokens_got_adds_up_though_they_have_an_importance(before, tmp_path):
    """A prompt attends without it; whoever looks sees attention with the masses that the view shows."""
    model, seen, prompt = subject("llama"), [], tokens(80)
    cache = kvfold.Cache(model, f"{before}nosa(budget=1.0, calibration={artefact(model, tmp_path, 0.7)!r})")
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    mask = prompt["attention_mask"]
    with cache.observed(lambda view: seen.append((view.column_sums().sum(-1), view.new))):
        feed(model, cache, *prompt.values())
        feed(model, cache, forced(1, 9), grow(mask, 9))
    for sums, new in seen:
        assert_close(sums, torch.full_like(sums, new * group), atol=1e-2, rtol=0)


def test_a_step_attends_with_the_importance_of_its_own_token_too(tmp_path):
    """What a generated token reads, by definition: the bias is e as it is, of every token, its own among them."""
    model, prompt = subject("llama"), tokens(120)
    cache = kvfold.Cache(model, "nosa(budget=1.0)", calibration=artefact(model, tmp_path, 0.7))
    feed(model, cache, *prompt.values())
    seen = []
    with cache.observed(lambda view: seen.append(view)):
        feed(model, cache, forced(1, 1), grow(prompt["attention_mask"]))
    heads = heads_of(artefacts.load(cache.method.calibration).data)
    for view, layer in zip(seen, heads, strict=True):
        q = view.queries.states.unflatten(1, (2, -1))[..., 0, :]
        e = layer(view.values)
        assert_close(view.columns[LOG_MASS], e, atol=1e-6, rtol=0)
        logits = torch.einsum("bhgd,bhtd->bhgt", q, view.keys) * view.place.scale + e[:, :, None]
        want = torch.einsum("bhgt,bhtd->bhgd", logits.softmax(-1), view.values).flatten(1, 2)
        assert e.shape[-1] == 121 and e.std() > 0.1
        assert_close(view.queries.read[:, :, 0], want, atol=1e-4, rtol=0)


def test_a_prompt_is_exact_and_a_further_turn_gets_its_own_importance(tmp_path):
    model, prompt, path = subject("llama"), tokens(120, 70), artefact(subject("llama"), tmp_path, 0.7)
    cache, plain = kvfold.Cache(model, SMALL, calibration=path), kvfold.Cache(model, "full")
    one, two = (feed(model, each, *prompt.values()) for each in (cache, plain))
    assert_close(one, two, atol=1e-5, rtol=0)
    more = torch.ones(2, 130, dtype=torch.long)
    more[1, :50] = 0
    feed(model, cache, tokens(10, 10, seed=5)["input_ids"], more)
    for core, layer in zip(cache.paged, heads_of(artefacts.load(path).data), strict=True):
        held = core.stored.tokens()[0]
        e = layer(held.values.masked_fill(~held.valid[..., None], 0.0))
        assert_close(held.columns[LOG_MASS][held.valid], e[held.valid], atol=1e-5, rtol=0)


NOT_ITS = ("a_whole_budget_is_the_full_cache", "a_budget_is_memory", "the_budget_holds")
CONTRACTS = [contract for contract in testing.CONTRACTS if contract.__name__ not in NOT_ITS]
"""With e a whole budget is not the full cache, and its budget is not about what is stored."""


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize("text", [SMALL, f"kvfold(budget=0.5) | {SMALL}", f"{SMALL} | kivi(bits=8, residual=16)"])
def test_with_heads_it_promises_what_methods_do(contract, text, tmp_path, monkeypatch):
    monkeypatch.setenv("KVFOLD_ARTEFACTS", str(tmp_path))  # files may name what lies there
    (tmp_path / "nosa").mkdir()
    path = artefact(testing.tiny_model(), tmp_path / "nosa", 0.3)
    contract(text.replace("local=16", f"local=16, calibration={path!r}"))


def test_behind_an_eviction_each_token_has_its_own(tmp_path):
    """Heads hold other tokens then: e is that of the values with which a token came, of all heads."""
    model, prompt, said = subject("llama"), tokens(300), forced(1, 20)
    path = artefact(model, tmp_path, 0.5)
    plain, got = (
        kvfold.Cache(model, text.replace(")", f", calibration={path!r})")) for text in ("nosa(budget=1.0)", SMALL)
    )
    cut = kvfold.Cache(model, f"h2o(budget=0.5) | {got.method}")
    feed(model, plain, *prompt.values())
    assert follow(model, cut, *prompt.values(), said).isfinite().all()
    whole, held = plain.paged[0].stored.tokens()[0], cut.paged[0].stored.tokens()[0]
    assert len({tuple(x[:9].tolist()) for x in held.positions[0]}) == 2
    for head in range(2):
        mine = held.valid[0, head] & (held.positions[0, head] < 300)
        want = whole.columns[LOG_MASS][0, head][held.positions[0, head][mine].long()]
        assert_close(held.columns[LOG_MASS][0, head][mine], want, atol=1e-6, rtol=0)
        assert 100 < int(mine.sum()) < 160 and want.std() > 0.05


def test_from_a_disk_it_reads_the_same(tmp_path):
    model, prompt, said = subject("llama"), tokens(900, 860), forced(2, 12)
    path = artefact(model, tmp_path, 0.5)
    text = f"nosa(budget=64, block=16, window=8, stride=4, sinks=16, local=16, calibration={path!r})"
    near = follow(model, kvfold.Cache(model, text), *prompt.values(), said)
    (tmp_path / "spill").mkdir()
    far = kvfold.Cache(model, text, fast_memory="1400KiB", spill=tmp_path / "spill")
    assert_close(follow(model, far, *prompt.values(), said), near, atol=1e-4, rtol=0)
    assert far.fast.residency.brought_nbytes > 0 and far.resident_nbytes <= 1400 << 10


def test_rows_of_other_methods_get_nothing(tmp_path):
    model, said = subject("llama"), forced(2, 10)
    caches = [kvfold.Cache(model, SMALL, calibration=artefact(model, tmp_path, 0.5)), kvfold.Cache(model, "full")]
    for cache, text in zip(caches, (tokens(120, seed=3), tokens(120, seed=4)), strict=True):
        feed(model, cache, *text.values())
    apart = [cache.fork() for cache in caches]
    caches[0].join(caches[1])
    mask, own = torch.ones(2, 120, dtype=torch.long), [torch.ones(1, 120, dtype=torch.long) for _ in apart]
    for step in said.T:
        mask, own = grow(mask), [grow(each) for each in own]
        both = feed(model, caches[0], step[:, None], mask)
        for row in range(2):
            alone = feed(model, apart[row], step[row : row + 1, None], own[row])
            assert_close(both[row : row + 1], alone, atol=1e-4, rtol=0)


def test_what_was_not_trained_is_refused():
    for data in ({}, {"delta": torch.zeros(1, 2, 32), "scale": torch.zeros(1, 3)},
                 {"delta": torch.full((1, 2, 32), torch.nan), "scale": torch.zeros(1, 2)}):  # fmt: skip
        with pytest.raises(ValueError, match=r"must have finite delta \(L, H, H Dv\) and scale"):
            heads_of(data)
    with pytest.raises(ValueError, match="nosa needs trained heads"):
        _ = NOSA().heads
    with pytest.raises(ValueError, match=r"calibration='nowhere\.safetensors'"):
        kvfold.Cache(subject("llama"), NOSA(calibration="nowhere.safetensors"))


@pytest.mark.parametrize(
    ("options", "said"), [({"budget": 0}, "budget=0"), ({"query": 2.0}, "query=2"), ({"block": 0}, "block=0"),
                          ({"stride": 48}, "stride=48 must divide block=64"), ({"sinks": -1}, "sinks=-1"),
                          ({"local": -1}, "local=-1")]
)  # fmt: skip
def test_bad_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        NOSA(**options)
