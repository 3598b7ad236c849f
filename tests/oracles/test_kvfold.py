"""The library's own method: a slow loop, exactness where tokens are alike, fading queries."""

import copy
import math
from dataclasses import replace

import pytest
import torch

import kvfold
from kvfold import artefacts
from kvfold.formats import LOG_MASS
from kvfold.merges import fold_by_attention
from kvfold.methods.kvfold import AGAIN, QUERIES, SCORE, KVFold
from kvfold.scores.reach import reach
from kvfold.views.decisions import Keep
from models import feed, follow, subject, tokens
from views import after_all, prompt_view, random_view, row_of


def answers(view, decisions, queries):
    """What queries (B, H, G, N, D) read of the view after the decisions."""
    for decision in decisions or ():
        view = view.apply(decision)
    logits = torch.einsum("bhgnd,bhtd->bhgnt", queries, view.keys) * view.place.scale
    if LOG_MASS in view.columns:
        logits = logits + view.columns[LOG_MASS][:, :, None, None]
    weights = logits.masked_fill(~view.valid[:, :, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bhgnt,bhtd->bhgnd", weights, view.values)


@pytest.mark.parametrize("fade", [0.25, None])
@pytest.mark.parametrize(("norm", "window"), [("square", 3), ("norm", 0), ("none", 3)])
def test_against_a_slow_loop(fade, norm, window):
    view = random_view(B=2, H=2, G=2, T=24, D=4, left_pad=(0, 5), seed=3)
    options = {"recent": 0.5, "sinks": 1, "window": window, "kernel": 3, "votes": 2.0, "refit": 0}
    method = KVFold(budget=8, fade=fade, norm=norm, threshold=0.4, **options)
    after = view
    for decision in method.after_prefill(view):
        after = after.apply(decision)
    attention = view.attention(24)
    for row, pad in enumerate((0, 5)):
        n = 24 - pad
        for head in range(2):
            k, v = view.keys[row, head, pad:], view.values[row, head, pad:]
            apart = k - k.mean(0)
            a = torch.zeros(n)
            reach = torch.zeros(n)
            for i in range(n):
                share = 1.0 if fade is None else math.exp(-(n - 1 - i) / (fade * n))
                a += share * attention[row, head, :, pad + i, pad:].sum(0)
                reach[: i + 1] += share
            weight = v.norm(dim=-1) ** {"square": 2, "norm": 1, "none": 0}[norm]
            always = {0, *range(n - 4, n)}
            compete = [t for t in range(n) if t not in always]
            score = a * weight / (a * weight)[compete].sum()
            if window:
                most = attention[row, head, :, -window:, pad:].amax((0, 1)) * weight
                most[[t for t in range(n) if t in always or t >= n - window]] = 0.0
                spread = torch.stack([most[max(0, t - 1) : t + 2].max() for t in range(n)])
                spread[[t for t in range(n) if t in always or t >= n - window]] = 0.0
                score = score + 2.0 * spread / spread.sum()
            others = sorted(compete, key=lambda t: -score[t])
            kept = sorted(always | set(others[:3]))
            assert view.positions[row, head][after.valid[row, head]].tolist() == kept
            w = a / reach
            sets = {c: [c] for c in kept}
            for e in range(n):
                if e in kept:
                    continue
                cosines = [float(torch.cosine_similarity(apart[e], apart[c], dim=0)) for c in kept]
                best = max(range(8), key=lambda i: (cosines[i], -i))
                if cosines[best] >= 0.4 and (w[kept[best]] >= w[e] or cosines[best] >= 0.95):
                    sets[kept[best]].append(e)
            assert any(len(members) > 1 for members in sets.values())
            for c, members in sets.items():
                total = sum(w[t] for t in members)
                mean = sum(w[t] * v[t] for t in members) / total
                torch.testing.assert_close(after.values[row, head, pad + c], mean)
                assert torch.equal(after.keys[row, head, pad + c], k[c])
                mass = after.columns[LOG_MASS][row, head, pad + c]
                torch.testing.assert_close(mass, (total / w[c]).log(), atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(after.columns[SCORE][row, head, pad + c], total * reach[c])


def test_twins_fold_without_loss():
    """Of neighbours with equal keys and values one stays: what evicting the others loses, folding nearly keeps."""
    generator = torch.Generator().manual_seed(5)
    times = torch.tensor([1, 3] * 20)
    k, v = (torch.randn(1, 1, 40, 8, generator=generator).repeat_interleave(times, 2) for _ in range(2))
    view = prompt_view(torch.randn(1, 1, 80, 8, generator=generator), k, v)
    later = torch.randn(1, 1, 1, 30, 8, generator=generator)
    truth, first = answers(view, None, later), (times.cumsum(0) - times).tolist()

    class Firsts(KVFold):  # the first of each set of equal tokens stays
        def worth(self, view, attention):
            return torch.isin(view.positions, torch.tensor(first)).float()

    def error(threshold):
        method = Firsts(budget=40, recent=0.0, sinks=0, threshold=threshold, refit=0, interval=0)
        return float((answers(view, method.after_prefill(view), later) - truth).norm())

    assert error(0.99) < 0.2 * error(2.0)


def test_the_kernel_leaves_what_the_view_works_out():
    """Also for a padded batch, whose rows each fade from their own end."""
    model, prompt, found = subject("llama"), tokens(70, 43), []
    for asking in ("kvfold(fade=0.3)", "full"):
        cache, views = kvfold.Cache(model, asking), []
        with cache.observed(views.append):
            feed(model, cache, *prompt.values())
        assert all(("column_sums 0.3" in view.memo) == (asking != "full") for view in views)
        found.append([view.column_sums(0.3) for view in views])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("generated", [0, 10])
def test_old_scores_fade_on_a_further_turn(generated):
    """By all of the text that came since, generated or not, though only prompts' queries are counted."""
    model, ids = subject("llama"), tokens(60 + generated)["input_ids"]
    cache, scores = kvfold.Cache(model, "kvfold(budget=0.9, fade=0.25, threshold=2.0, heads='even', refit=0)"), []
    mask = torch.ones_like(ids)
    feed(model, cache, ids[:, :40], mask[:, :40])
    old = {name: by_position(cache, name) for name in (SCORE, QUERIES)}
    for at in range(40, 40 + generated):
        feed(model, cache, ids[:, at : at + 1], mask[:, : at + 1])
    with cache.observed(lambda view: scores.append((view.positions, view.column_sums(0.25)))):
        feed(model, cache, ids[:, -20:], mask)
    sums = dict(zip(scores[0][0][0, 0].tolist(), scores[0][1][0, 0].tolist(), strict=True))
    far = 0.25 * (60 + generated)
    past = math.exp(-(20 + generated) / far)
    found, queries = by_position(cache, SCORE), by_position(cache, QUERIES)
    for position in found:
        assert found[position] == pytest.approx(sums[position] + old[SCORE].get(position, 0.0) * past, rel=1e-3)
        came = sum(math.exp(-i / far) for i in range(20) if 60 + generated - 1 - i >= position)
        assert queries[position] == pytest.approx(came + old[QUERIES].get(position, 0.0) * past, rel=1e-3)


def by_position(cache, name: str) -> dict[int, float]:
    """A column of the first head, by text position."""
    stored = cache.paged[0].stored.tokens()[0]
    here = stored.valid[0, 0]
    return dict(zip(stored.positions[0, 0][here].tolist(), stored.columns[name][0, 0][here].tolist(), strict=True))


@pytest.mark.parametrize("first", [0, 6])
@pytest.mark.parametrize("fade", [0.25, math.inf])
def test_queries_that_never_came_are_not_counted(fade, first):
    """Behind a layer where some of a prompt ended, and those of earlier passes."""
    view = random_view(B=2, H=2, T=24, left_pad=(0, 5), seed=3)
    asked_at = view.queries.positions
    came = view.queries.valid & (asked_at >= first) & ((asked_at % 3 == 0) | (asked_at == asked_at[:, -1:]))
    found = reach(replace(view, queries=replace(view.queries, valid=came)), fade)
    for row, pad in enumerate((0, 5)):
        n = 24 - pad
        for t in range(n):
            asking = [i for i in range(max(t, first), n) if i % 3 == 0 or i == n - 1]
            shares = [math.exp(-(n - 1 - i) / (fade * n)) for i in asking]
            assert found[row, :, pad + t].tolist() == pytest.approx([sum(shares)] * 2, rel=1e-5)


def test_the_best_quality_reads_the_prompt_again():
    """A short prompt and no tokenizer: the second reading is the prompt once more, and nothing of it stays."""
    model, prompt = subject("llama"), tokens(40)
    method = KVFold(budget=12, quality="best", threshold=2.0, heads="even")
    cache, once, twice = kvfold.Cache(model, method), [], []
    feed(model, cache, *prompt.values())
    for times, views in ((1, once), (2, twice)):
        plain = kvfold.Cache(model, "full")
        with plain.observed(views.append):
            feed(model, plain, prompt["input_ids"].repeat(1, times), torch.ones(1, 40 * times, dtype=torch.long))
    fast = kvfold.Cache(model, replace(method, quality="fast"))
    feed(model, fast, *prompt.values())
    assert [core.kept() for core in cache.paged] != [core.kept() for core in fast.paged]
    for core, first, both in zip(cache.paged, once, twice, strict=True):
        norms = first.values.norm(dim=-1)[0].square()
        again = both.attention(80)[0, :, :, 40:, :40].sum((1, 2)) * norms
        compete = range(4, 37)  # four sinks and a quarter of 12 stay anyway
        worth = method.worth(first, first.column_sums(0.5))[0] + again / again[:, 4:37].sum(-1, keepdim=True)
        for head, kept in enumerate(core.kept()[0]):
            best = sorted(compete, key=lambda t, own=worth[head]: -own[t])[:5]
            assert kept == sorted({0, 1, 2, 3, 37, 38, 39, *best})
        assert core.width == 40 and core.seen.tolist() == [40]


def test_a_second_prompt_competes_with_what_was_read_twice_before():
    model, prompt = subject("llama"), tokens(60)
    cache = kvfold.Cache(model, KVFold(budget=20, quality="best", heads="even", interval=0))
    for stop in (40, 60):
        feed(model, cache, prompt["input_ids"][:, 0 if stop == 40 else 40 : stop], torch.ones(1, stop).long())
    again = by_position(cache, AGAIN)
    assert len(again) == 20 and any(value > 0 for position, value in again.items() if position < 40)


def test_heads_share_the_budget_by_their_scores():
    """Four fifths go by scores, a fifth to all alike: of 20 a head, 4 and its share of a layer's 2 x 16."""
    model, prompt = subject("llama"), tokens(60, 50)
    layers, group = model.config.num_hidden_layers, model.config.num_attention_heads // 2
    table = ((3.0,) * group + (1.0,) * group,) * layers
    cache = kvfold.Cache(model, KVFold(budget=20, heads=table, interval=0))
    feed(model, cache, *prompt.values())
    for core in cache.paged:
        assert core.counts().tolist() == [[28, 12], [28, 12]]
        assert all(
            set(range(4)) | {end} <= set(head) for row, end in zip(core.kept(), (59, 49), strict=True) for head in row
        )
    with pytest.raises(ValueError, match="heads of kvfold has 1 layers"):
        feed(model, kvfold.Cache(model, KVFold(budget=12, heads=table[:1])), *prompt.values())


def test_calibrated_heads_are_found(tmp_path, monkeypatch):
    model = subject("llama")
    monkeypatch.setenv("KVFOLD_ARTEFACTS", str(tmp_path))
    with pytest.raises(ValueError, match="kvfold calibrate headkv"):
        kvfold.Cache(model, "kvfold(heads='calibrated')")
    scores = [[float(layer + head) for head in range(4)] for layer in range(model.config.num_hidden_layers)]
    about = {"fingerprint": artefacts.fingerprint(model), "name": "tiny"}
    artefacts.save(artefacts.Artefact("headkv", about, {"reason": scores}, {}))
    found = kvfold.Cache(model, "kvfold(heads='calibrated')").method
    assert found.heads == tuple(map(tuple, scores)) and kvfold.parse(str(found)) == found
    assert kvfold.Cache(model, "kvfold(heads='even')").method.heads == "even"


def test_padding_changes_nothing_whatever_it_holds():
    """A row that is shorter than the window of the fit, beside a longer one."""
    view = random_view(B=2, H=2, G=2, T=40, D=4, left_pad=(0, 17), seed=3)
    holes = ~view.valid[..., None]
    poisoned = replace(view.tokens, values=view.values.masked_fill(holes, torch.nan))
    method = KVFold(budget=8, heads="even", refit=30)
    both, alone = after_all(replace(view, tokens=poisoned), method), after_all(row_of(view, 1), method)
    assert both.values[both.valid].isfinite().all() and not torch.equal(both.values[0, :, -1], both.values[0, :, -2])
    for head in range(2):
        here, there = both.valid[1, head], alone.valid[0, head]
        assert torch.equal(both.positions[1, head][here], alone.positions[0, head][there])
        torch.testing.assert_close(both.values[1, head][here], alone.values[0, head][there], atol=1e-5, rtol=1e-4)


def test_a_model_under_autocast():
    model, prompt = subject("llama"), tokens(50, 31)
    found = []
    for enabled in (False, True):
        cache = kvfold.Cache(model, "kvfold(budget=12)")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(follow(model, cache, *prompt.values(), torch.arange(5, 13).view(2, 4)).float())
    assert (found[1] - found[0]).abs().mean() < 0.1 * found[0].std()


def test_a_model_that_cannot_be_probed():
    model = copy.deepcopy(subject("llama"))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite: say heads='even'"):
        kvfold.Cache(model, "kvfold")
    with pytest.raises(ValueError, match="'meta': say heads='even'"):
        kvfold.Cache(model.to("meta"), "kvfold")


def test_nothing_folds_above_the_threshold():
    view = random_view(T=30, seed=2)
    decisions = KVFold(budget=10, threshold=2.0).after_prefill(view)
    masks = [d for d in decisions if isinstance(d, Keep)]
    assert masks[0].mask.sum() == 10 and not masks[0].columns[LOG_MASS].any()


def test_mass_is_carried_through_turns():
    model, prompt = subject("llama"), tokens(50, 31)
    cache = kvfold.Cache(model, "kvfold(budget=12, threshold=-1.0)")
    ids, mask = prompt.values()
    feed(model, cache, ids[:, :30], mask[:, :30])
    before = [core.stored.tokens()[0] for core in cache.paged]
    before = [(tokens.positions.clone(), tokens.columns[LOG_MASS].clone(), tokens.valid.clone()) for tokens in before]
    feed(model, cache, ids[:, 30:], mask)
    grew = 0
    for core, (places, mass, valid) in zip(cache.paged, before, strict=True):
        stored = core.stored.tokens()[0]
        for row, head, slot in stored.valid.nonzero().tolist():
            same = valid[row, head] & (places[row, head] == stored.positions[row, head, slot])
            if same.any():
                was, now = mass[row, head][same].item(), stored.columns[LOG_MASS][row, head, slot].item()
                assert now >= was - 1e-6  # it stands for no less than after the first turn
                grew += was > 0.1
    assert grew > 3


def test_options(unchecked):
    for options, message in (
        ({"budget": 0}, "budget=0"), ({"recent": 1.5}, "recent=1.5"), ({"sinks": -1}, "sinks=-1"),
        ({"fade": 0.0}, "fade=0.0"), ({"threshold": 3.0}, "threshold=3.0"), ({"norm": "max"}, "norm='max'"),
        ({"window": -1}, "window=-1"), ({"kernel": 4}, "kernel=4"), ({"votes": -1.0}, "votes=-1.0"),
        ({"heads": "all"}, "heads='all'"), ({"heads": ((),)}, "heads="), ({"heads": None}, "heads="),
        ({"quality": "good"}, "quality='good'"), ({"refit": -1}, "refit=-1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            KVFold(**options)
    assert kvfold.parse(str(kvfold.parse("kvfold", fade=None))) == KVFold(fade=None)


@pytest.mark.parametrize("count", range(1, 12))
def test_sinks_and_the_newest_at_tiny_budgets(count):
    """One token at least is recent, a quarter of them in all; sinks come next, up to 4."""
    last = min(max(1, count // 4), count)
    sinks = min(4, count - 1)
    view = random_view(T=30, seed=1)
    always = KVFold(budget=count, heads="even").always(view)[0, 0].nonzero()[:, 0].tolist()
    assert always == [*range(sinks), *range(30 - last, 30)] and len(always) <= count


def test_a_window_that_is_all_of_the_text_has_no_votes():
    """What the last queries say of their own tokens does not count; the sum over all queries still ranks them."""
    view = random_view(H=2, T=12, seed=2)
    wide, none = (KVFold(budget=6, window=w, heads="even") for w in (12, 0))
    attention, _ = wide.attention(view)
    assert torch.equal(*(m.worth(view, attention) for m in (wide, none)))


def test_a_fold_of_two_turns_stands_for_all_of_them():
    """The mass that a token had before stays when another one folds into it: both ratios multiply."""
    view = random_view(T=9, D=8, seed=4)
    k, v = view.keys.clone(), view.values.clone()
    k[:, :, 1] = k[:, :, 2] = k[:, :, 6] = k[:, :, 1]
    q = view.queries.states
    first = prompt_view(q, k, v)
    earlier = torch.zeros(1, 1, 9)
    earlier[..., 2] = math.log(2.0)  # slot 1 went into it
    here = torch.ones(1, 1, 9, dtype=torch.bool)
    here[..., 1] = False
    view = replace(first, tokens=first.tokens.but(here, {**first.columns, LOG_MASS: earlier}))
    kept = here.clone()
    kept[..., 6] = False
    even = torch.ones(1, 1, 9)
    _, _, columns = fold_by_attention(view, kept, even, even, threshold=0.99)
    assert columns[LOG_MASS][0, 0, 2].item() == pytest.approx(math.log(2.0) + math.log(2.0))
    assert columns[LOG_MASS][0, 0, 0].item() == 0.0
