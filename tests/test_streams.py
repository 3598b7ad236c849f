"""Prompts of which some heads see a window and the first tokens alone (LServe): against one masked softmax."""

import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold import ops
from kvfold.layer import attending
from kvfold.layer.attending import Asking
from kvfold.methods.lserve import LServe
from kvfold.testing import steps as forced
from kvfold.views.decisions import Streams
from models import feed, follow, subject, tokens

GATES = ((0.9, 0.1), (0.2, 0.8), (0.3, 0.4))


def masked(q, k, v, heads, sinks, recent, scale, past=None):
    """One row (H G Q D) by one softmax: queries are of the last tokens, `past` (keys, values) is seen whole."""
    t, n = k.shape[1], q.shape[2]
    at = torch.arange(t - n, t)[:, None] - torch.arange(t)
    causal = at >= 0
    near = causal & ((at < recent) | (torch.arange(t) < sinks))
    seen = torch.stack([near if head else causal for head in heads])[:, None]
    logits = (q @ k.mT[:, None] * scale).masked_fill(~seen, -torch.inf)
    if past is not None:
        logits, v = torch.cat([q @ past[0].mT[:, None] * scale, logits], -1), torch.cat([past[1], v], 1)
    return logits.softmax(-1) @ v[:, None], logits.logsumexp(-1)


@pytest.mark.parametrize("heads", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize(("sinks", "recent"), [(3, 7), (0, 5), (9, 1), (40, 40)])
@pytest.mark.parametrize("n", [30, 11, 1])
def test_a_prompt_by_heads_that_stream(heads, sinks, recent, n, monkeypatch):
    """Rows with padding among them; the last `n` of 30 tokens ask, as where a prompt is read in parts."""
    monkeypatch.setattr(attending, "QUERIES", 8)
    q, k, v = torch.randn(2, 6, n, 8), torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 12)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[1, [0, 1, 2, 3, 12, 25]] = False
    for mask in (None, valid):
        asking = Asking(q, torch.zeros(2, 1, dtype=torch.int32), 0.3)
        out, lse, sums = asking.prompt(None, k, v, mask, None, streams=Streams(heads, sinks, recent))
        for row in range(2):
            here = torch.arange(30) if mask is None else mask[row].nonzero()[:, 0]
            asks = here[here >= 30 - n] - (30 - n)
            grouped = q[row].view(2, 3, n, 8)[:, :, asks]
            want = masked(grouped, k[row][:, here], v[row][:, here], heads, sinks, recent, 0.3)
            assert_close(out[row].view(2, 3, n, 12)[:, :, asks], want[0], atol=1e-5, rtol=0)
            assert_close(lse[row].view(2, 3, n)[:, :, asks], want[1], atol=1e-5, rtol=0)
        assert sums is None


def long_and_short(sinks: int, recent: int) -> LServe:
    return LServe(1.0, page=4, logical=2, static_sparsity=0.5, gates=GATES, sinks=sinks, recent=8, prompt_recent=recent)


def test_prompts_that_no_head_streams_over_are_read_as_ever():
    prompt = tokens(40, 23)
    wide, full = (
        feed(subject("llama"), kvfold.Cache(subject("llama"), method), *prompt.values())
        for method in (long_and_short(8, 40), "full")
    )
    assert_close(wide, full, atol=1e-5, rtol=0)
    narrow = feed(subject("llama"), kvfold.Cache(subject("llama"), long_and_short(4, 12)), *prompt.values())
    mask = prompt["attention_mask"]
    early = mask.cumsum(1) <= 12
    assert_close(narrow[early & (mask > 0)], full[early & (mask > 0)], atol=1e-5, rtol=0)
    assert (narrow[:, -1] - full[:, -1]).abs().max() > 1e-3


def test_a_prompt_in_parts_streams_as_one_does():
    prompt = tokens(60, 41)
    whole, parts = (kvfold.Cache(subject("llama"), long_and_short(4, 12), part_size=size) for size in (0, 7))
    one, two = (feed(subject("llama"), cache, *prompt.values()) for cache in (whole, parts))
    assert_close(one, two, atol=1e-5, rtol=0)
    said = forced(2, 5)
    model, method = subject("llama"), long_and_short(4, 12)
    one, two = (follow(model, kvfold.Cache(model, method, part_size=n), *prompt.values(), said) for n in (0, 7))
    assert_close(one, two, atol=1e-5, rtol=0)


def test_two_methods_whose_heads_stream_are_refused():
    with pytest.raises(ValueError, match="whose heads stream"):
        kvfold.parse("lserve(static_sparsity=0.5) | lserve(static_sparsity=0.5)")


def test_a_head_of_a_prompt_that_streams_is_asked_less(monkeypatch):
    """What the mask is for: a streaming head's logits are those of the window and of the sinks."""
    asked = []
    plain, few = ops.causal, ops.attend
    monkeypatch.setattr(
        ops, "causal", lambda q, *given, **more: asked.append((q.shape, more)) or plain(q, *given, **more)
    )
    monkeypatch.setattr(ops, "attend", lambda q, k, *given: asked.append((k.shape,)) or few(q, k, *given))
    q, k = torch.randn(1, 6, 90, 8), torch.randn(1, 2, 90, 8)
    asking = Asking(q, torch.zeros(1, 1, dtype=torch.int32), 0.3)
    asking.prompt(None, k, k, None, None, streams=Streams((True, False), 4, 16))
    assert asked == [((1, 3, 90, 8), {"window": 0}), ((1, 3, 90, 8), {"window": 16}), ((1, 1, 4, 8),)]


@pytest.mark.parametrize("text", ["{}", "h2o(budget=0.9) | {}"])
def test_what_tokens_got_of_heads_that_stream_adds_up(text):
    """Whoever looks at such a prompt sees attention over all that the view shows, a share of 1 for each query."""
    method = kvfold.parse(text.format(str(long_and_short(4, 12))))
    cache, seen, prompt = kvfold.Cache(subject("llama"), method), [], tokens(60)
    with cache.observed(lambda view: seen.append(view.column_sums().sum(-1))):
        feed(subject("llama"), cache, *prompt.values())
    group = 60 * subject("llama").config.num_attention_heads // subject("llama").config.num_key_value_heads
    for sums in seen:
        assert_close(sums, torch.full_like(sums, group), atol=1e-2, rtol=0)


def test_heads_that_stream_and_tokens_that_are_let_in_are_refused_together():
    with pytest.raises(ValueError, match="that say what a prompt's tokens see of it"):
        kvfold.parse("attention-gate | lserve(static_sparsity=0.5)")
