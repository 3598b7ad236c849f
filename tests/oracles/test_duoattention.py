"""DuoAttention against its card: the quantile of the gates, sinks and recent tokens, chunks, the published file."""

import pytest
import torch

from kvfold.methods.duoattention import DuoAttention, published, retrieval_heads
from views import kept, random_view, run

HALF = ((0.9, 0.1),)
"""One layer: head 0 retrieves, head 1 streams."""


def test_oracle_1_the_quantile():
    gates = ((0.9, 0.1), (0.5, 0.3))
    assert retrieval_heads(gates, 0.5) == ((True, False), (True, False))
    assert retrieval_heads(gates, 0.0) == ((True, True), (True, True))
    assert retrieval_heads(gates, 1.0) == ((False, False), (False, False))


def test_gates_that_tie_go_to_the_earlier_head_and_those_outside_are_clipped():
    assert retrieval_heads(((1.0, 1.0), (1.0, 1.0)), 0.5) == ((True, True), (False, False))
    assert retrieval_heads(((7.0, 1.0), (-3.0, 0.0)), 0.75) == ((True, False), (False, False))


def test_the_roles_are_put_in_place_once_for_all_layers(monkeypatch):
    calls, step, gates = [], {}, ((0.9, 0.1), (0.2, 0.8))
    monkeypatch.setattr(
        "kvfold.methods.duoattention.retrieval_heads", lambda *args: calls.append(args) or retrieval_heads(*args)
    )
    for ordinal in range(2):
        view = random_view(H=2, T=20, ordinal=ordinal, paged=(0, 1), step=step)
        left = kept(DuoAttention(sinks=2, recent=3, gates=gates), view)[0]
        assert len(left[ordinal]) == 20 and len(left[1 - ordinal]) == 5
    assert len(calls) == 1


def test_oracle_2_sparsity_0_keeps_all():
    view = random_view(B=2, H=2, T=30, left_pad=(0, 7))
    assert kept(DuoAttention(sparsity=0.0, gates=HALF), view) == [[list(range(30))] * 2, [list(range(23))] * 2]


def test_oracle_3_a_prompt_in_one_chunk():
    view = random_view(B=2, H=2, T=400, left_pad=(0, 50))
    for row, total in zip(kept(DuoAttention(gates=HALF), view), (400, 350), strict=True):
        assert row == [list(range(total)), [*range(64), *range(total - 256, total)]]


def test_oracle_4_a_step_sees_sinks_recent_and_itself():
    view, method = random_view(H=2, G=2, T=40, D=16), DuoAttention(sinks=3, recent=5, gates=HALF)
    q, k, v = view.queries.states, view.keys, view.values
    cache, outs = run(method, q, k, v, [30, *[1] * 10])
    assert cache.kept() == [[list(range(40)), [0, 1, 2, *range(35, 40)]]]
    for t in range(30, 40):
        for head in range(4):
            seen = list(range(t + 1)) if head < 2 else [0, 1, 2, *range(t - 5, t + 1)]
            expected = attended(q[0, head, t], k[0, head // 2, seen], v[0, head // 2, seen])
            torch.testing.assert_close(outs[t - 29][0, head, 0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunks", [[40], [16, 16, 8], [8, 2, 30], [1] * 40])
def test_oracle_5_chunks_see_what_was_left_and_themselves(chunks):
    view, method = random_view(H=2, G=2, T=40, D=16, seed=3), DuoAttention(sinks=3, recent=5, gates=HALF)
    q, k, v = view.queries.states, view.keys, view.values
    _, outs = run(method, q, k, v, chunks)
    start = 0
    for size, out in zip(chunks, outs, strict=True):
        for i in range(start, start + size):
            left = sorted({*range(min(3, start)), *range(max(0, start - 5), start)})
            for head in range(4):
                seen = list(range(i + 1)) if head < 2 else [*left, *range(start, i + 1)]
                expected = attended(q[0, head, i], k[0, head // 2, seen], v[0, head // 2, seen])
                torch.testing.assert_close(out[0, head, i - start], expected, atol=1e-5, rtol=1e-4)
        start += size


def attended(q, k, v):
    """One query over its keys."""
    return ((k @ q) * q.shape[-1] ** -0.5).softmax(0) @ v


def test_the_published_file(tmp_path):
    path = tmp_path / "full_attention_heads.tsv"
    path.write_text("9.0e-01\t1.0e-01\n5.0e-01\t3.0e-01\n")
    assert published(str(path)) == ((0.9, 0.1), (0.5, 0.3))
    bound = DuoAttention(calibration=str(path)).bind(None)
    assert bound == DuoAttention(gates=((0.9, 0.1), (0.5, 0.3)))
    path.write_text("a\tb\n")
    with pytest.raises(ValueError, match="is not a table of gates"):
        published(str(path))


def test_without_gates_it_names_the_command():
    with pytest.raises(ValueError, match="kvfold calibrate duoattention --model"):
        DuoAttention().after_prefill(random_view(H=2))


@pytest.mark.parametrize("gates", [((0.5,),), ((0.5, 0.5), (0.5, 0.5))])
def test_gates_of_another_model(gates):
    with pytest.raises(ValueError, match="the model has 1 layers on pages, of 2"):
        DuoAttention(gates=gates).after_prefill(random_view(H=2))


@pytest.mark.parametrize("options", [{"sparsity": 1.5}, {"sinks": -1}, {"recent": 0}, {"gates": ((0.1,), (0.1, 0.2))}])
def test_bad_options(options, unchecked):
    ((name, _),) = options.items()
    with pytest.raises(ValueError, match=f"{name}="):
        DuoAttention(**options)
