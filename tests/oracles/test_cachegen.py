"""CacheGen's codec against its card: the quantiser, the tables, the coder, and a plane by a loop over its tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.codecs import CacheGen, codec_from, codec_to, coder, naive, parse_codec
from kvfold.codecs.planes import MOST_GROWTH, PlaneCoding
from kvfold.codecs.quantiser import dequantise, largest, maxima_of, quantise

pytest.importorskip("constriction")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("bins", "symbols", "values"),
    [(32, [30, 8, 17, 15], [3.0, -1.4, 0.4, 0.0]), (16, [14, 4, 8, 7], [3.0, -9 / 7, 3 / 7, 0.0])],
)
def test_the_cards_vectors(bins, symbols, values):
    x, one = torch.tensor([[3.0, -1.5, 0.4, 0.0]]), torch.zeros(1, dtype=torch.long)
    maxima = maxima_of(x, one, 1)
    found = quantise(x, maxima, one, bins)
    assert found.tolist() == [symbols]  # the first has a tie: -7.5 + 15 goes to the even 8
    torch.testing.assert_close(dequantise(found, maxima, one, bins), torch.tensor([values]))


def test_the_cards_table():
    counts = np.array([[1, 0, 3, 0], [0, 0, 0, 0]])
    found = coder.table_of(counts)
    assert found.tolist() == [[0, 16383, 16384, 65534, 65535], [0, 1, 2, 3, 4]]
    coder.check_tables(found[:, :-1])


# -- the coder -----------------------------------------------------------------------------------------------


@given(data=st.data())
def test_any_symbols_come_back_as_the_integers_say(data):
    n = data.draw(st.integers(2, 31))
    lengths = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    streams = [rng.integers(0, n, length) // data.draw(st.integers(1, 4)) for length in lengths]
    shared = data.draw(st.booleans())  # a table of others' symbols: what never came there can be coded, too
    told = [rng.integers(0, n, 3) if shared else stream for stream in streams]
    tables = coder.table_of(np.stack([np.bincount(stream, minlength=n) for stream in told]))[:, :-1]
    words = coder.encode(streams, tables)
    assert words.tolist() == naive.encode([stream.tolist() for stream in streams], tables.tolist())
    found = [stream.tolist() for stream in coder.decode(words, tables, lengths)]
    assert found == [stream.tolist() for stream in streams]
    assert found == naive.decode(words.tolist(), tables.tolist(), lengths)


def test_bytes_are_those_of_the_entropy():
    rng = np.random.default_rng(0)
    streams = [np.clip(rng.normal(15, width, 3000).round(), 0, 30).astype(int) for width in (1, 4, 9)]
    streams.append(np.full(3000, 7))
    counts = np.stack([np.bincount(stream, minlength=31) for stream in streams])
    shares = counts / 3000
    entropy = -(counts * np.log2(np.where(shares > 0, shares, 1))).sum() / 8
    tables = coder.table_of(counts)[:, :-1]
    assert entropy <= coder.encode(streams, tables).nbytes <= entropy * 1.001 + 12
    assert coder.encode(streams[3:], tables[3:]).nbytes <= 8  # a constant channel


@pytest.mark.parametrize(
    ("words", "tables", "message"),
    [
        ([1, 0], [[0, 5]], "never ends in a zero word"),
        ([1, 2, 3, 4, 5, 6, 7], [[0, 5]], "7 words are not those of 2 symbols"),
        ([1], [[0, 0]], "must grow from 0"),
        ([1], [[1, 5]], "must grow from 0"),
        ([1], [[0, 65536]], "below 65536"),
        ([1], [[0]], "must have 2 to 256 symbols"),
        ([1], [list(range(257))], "must have 2 to 256 symbols"),
    ],
)
def test_words_and_tables_that_nobody_wrote(words, tables, message):
    with pytest.raises(ValueError, match=message):
        coder.decode(np.array(words, dtype=np.uint32), np.array(tables), [2])


# -- planes --------------------------------------------------------------------------------------------------


def plane(counts, dtype=torch.float32, size=6):
    """Tokens with a channel of outliers, a constant one, a row of zeros, and some to stay as they are."""
    x = torch.randn(int(np.sum(counts)), size).to(dtype)
    x[:, 1] *= 20
    x[:, 4] = 0.5
    x[len(x) // 2] = 0
    raw = torch.zeros(len(x), dtype=torch.bool)
    starts = np.cumsum(counts) - np.ravel(counts)
    raw[torch.from_numpy(starts)] = True
    return x, np.array(counts), raw


def by_hand(x, counts, raw, bins, joint):
    """A token after the other: the maximum of the heads that hold one at this place, and numbers in steps of it."""
    q, found = largest(bins), x.clone()
    starts = (counts.ravel().cumsum() - counts.ravel()).reshape(counts.shape)
    for row, heads in enumerate(counts):
        for head, length in enumerate(heads):
            for t in range(length):
                at = starts[row, head] + t
                beside = [starts[row, h] + t for h in range(len(heads))] if joint else [at]
                m = float(x[beside].abs().max())
                if m and not raw[at]:
                    for d, number in enumerate(x[at].tolist()):
                        found[at, d] = (round(number * q / m + q) - q) / q * m  # Python's round goes to the even, too
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("joint", [True, False], ids=["joint", "per-head"])
def test_a_plane_is_what_a_loop_makes_of_it_and_is_coded_so_again(dtype, joint):
    x, counts, raw = plane([[40, 40], [31, 31]], dtype)
    coding = PlaneCoding(counts, 6, dtype, 16, joint, 0)
    tensors = coding.encode(x, raw)
    found = coding.decode(tensors)
    assert found.dtype == dtype and torch.equal(found, by_hand(x, counts, raw, 16, joint))
    assert torch.equal(found[raw], x[raw])
    again = coding.encode(found, raw)
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def test_heads_of_different_lengths_have_maxima_of_their_own():
    x, counts, raw = plane([[40, 35], [0, 9]])
    raw[:] = False
    coding, tensors = CacheGen(per_head=False).encode(x, counts, raw, 32)
    assert not coding.joint and torch.equal(coding.decode(tensors), by_hand(x, counts, raw, 32, False))
    raw[:5] = True  # what stays as it is does not count
    assert CacheGen().encode(x[:75], np.array([[40, 35]]), raw[:75], 32)[0].joint


def test_anchors():
    x, counts, raw = plane([[400, 400]])
    raw[:] = False
    alone = PlaneCoding(counts, 6, torch.float32, 16, True, 1)  # every token is an anchor: 8 bits, whatever the bins
    assert torch.equal(alone.decode(alone.encode(x, raw)), by_hand(x, counts, raw, 256, True))
    coding = PlaneCoding(counts, 6, torch.float32, 16, True, 10)
    found, exact = coding.decode(coding.encode(x, raw)), by_hand(x, counts, raw, 256, True)
    anchor = torch.arange(800) // 10 * 10
    deltas = x - exact[anchor]
    coarse = by_hand(deltas, counts, raw, 16, True)
    anchors = anchor == torch.arange(800)
    assert torch.equal(found[anchors], exact[anchors])
    torch.testing.assert_close(found[~anchors], (exact[anchor] + coarse)[~anchors])


def test_levels():
    large = [CacheGen(level).bins(what, layer, 32) for level in (1, 2, 3) for what in ("keys", "values")
             for layer in (0, 2, 12, 31)]  # fmt: skip
    assert large == [16, 16, 16, 12, 16, 12, 12, 12, 32, 32, 16, 16, 32, 16, 16, 16, *[32] * 8]
    assert {CacheGen(2).bins(what, 8, 9) for what in ("keys", "values")} == {32}
    x, counts, raw = plane([[300, 300]])
    sizes, errors = [], []
    for level in CacheGen.levels:
        coding, tensors = CacheGen(level).encode(x, counts, raw, CacheGen(level).bins("keys", 31, 32))
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        errors.append(float((coding.decode(tensors) - x).norm()))
    assert sorted(sizes) == sizes and sorted(errors, reverse=True) == errors


def test_what_is_not_worth_a_code_has_none():
    x, counts, raw = plane([[400, 400]])
    assert CacheGen().encode(x, counts, raw, 32)
    x[3, 2] = float("nan")
    assert CacheGen().encode(x, counts, raw, 32) is None
    assert CacheGen().encode(x[:20], np.array([[10, 10]]), raw[:20], 32) is None  # the tables alone are larger
    zeros, even = torch.zeros(4000, 512), np.array([[2000, 2000]])
    assert CacheGen().encode(zeros, even, torch.zeros(4000, dtype=torch.bool), 32) is None
    coding = PlaneCoding(np.array([[40_000, 40_000]]) * MOST_GROWTH, 6, torch.float32, 32, True, 0)
    with pytest.raises(ValueError, match=r"122880000 bytes in a code of .*, of which at most 64 times are read"):
        coding.decode(PlaneCoding(np.array([[40, 40]]), 6, torch.float32, 32, True, 0).encode(x[-80:], raw[-80:]))


# -- texts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["cachegen", "cachegen()", "cachegen(level=3, per_head=True, first=0, group=10)"])
def test_texts(text):
    codec = parse_codec(text)
    assert codec == codec_from(codec_to(codec)) == parse_codec(codec)
    assert codec.group == (10 if "group" in text else 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zip", "codec='zip' must be one of cachegen"),
        ("cachegen(2)", "codec='cachegen.2.' must be a text such as"),
        ("cachegen(level=open('x'))", "must be a text such as"),
        ("cachegen(levle=2)", "options={'levle': 2} of cachegen must be level, per_head, first, group"),
        ("cachegen(level=4)", "level=4 must be an int >= 1 and <= 3"),
        ("cachegen(level=True)", "level=True must be an int"),
        ("cachegen(per_head=3)", "per_head=3 must be one of False, True"),
        ("cachegen(first=-1)", "first=-1 must be an int >= 0"),
        ("cachegen(group='x')", "group='x' must be an int >= 0"),
        ("", "codec='' must be a text such as"),
        (7, "codec=7 must be a text such as"),
    ],
)
def test_texts_that_say_nothing(text, message, unchecked):
    with pytest.raises(ValueError, match=message):
        parse_codec(text)
