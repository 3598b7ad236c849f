"""Full: nothing is dropped, and attention over pages is plain causal attention."""

import torch
from torch.testing import assert_close

from kvfold.methods.full import Full
from views import full_probabilities, kept, random_view, run


def test_it_decides_nothing():
    view = random_view(B=2, H=2, G=3, T=9, left_pad=(0, 4))
    assert kept(Full(), view) == [[list(range(9))] * 2, [list(range(5))] * 2]
    assert not any(Full().listens(f"after_{event}") for event in ("prefill", "decode", "layer", "forward"))


def test_a_prompt_a_turn_and_single_tokens_attend_like_one_causal_pass():
    view = random_view(B=2, H=2, G=3, T=37, left_pad=(0, 5))
    q, k, v, mask = view.queries.states, view.keys, view.values, view.queries.valid
    cache, outs = run(Full(), q, k, v, [13, 1, 1, 20, 1, 1], mask)
    out = torch.cat(outs, 2)
    for row, pad in enumerate((0, 5)):
        probs = full_probabilities(view, row)
        expected = probs @ v[row, :, pad:].repeat_interleave(3, 0)
        assert_close(out[row, :, pad:], expected, atol=1e-5, rtol=1e-4)
        assert cache.kept()[row] == [list(range(37 - pad))] * 2
