"""memory=: the most that a cache may hold, in bytes, of prompt, generation and all else."""

import pytest
import torch

import kvfold
from kvfold.hf.memory import parse_memory
from models import subject, tokens
from saying import read

WHO = [
    "kvfold", "h2o", "tova", "streamingllm", "decoding(snapkv)", "decoding(adakv)",
    "decoding(kvmerger)", "decoding(keepkv)", "keepkv", "adakv(h2o)", "lacache", "scissorhands", "keyformer",
    "kvfold | turboquant(bits=4)", "kvfold | fp8", "streamingllm | fp8", "decoding(adakv) | mustafar",
    "kvfold | kivi(bits=4, requantise=True)",
    "h2o | kivi(bits=2, requantise=True)", "decoding(h2o, interval=5) | turboquant(bits=2)",
]  # fmt: skip
WINDOWS = ["kvfold", "kvfold | windows(form='kivi(bits=4)')", "h2o | fp8 | windows(form='fp8')"]


def most_held(model, cache, prompt, steps):
    """The most bytes that a cache holds after a prompt (B, T) and after each of some tokens (B, N) behind it."""
    read(model, cache, prompt)
    most = cache.nbytes
    for step in steps.T:
        read(model, cache, step[:, None])
        most = max(most, cache.nbytes)
    return most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text"), [*(("llama", w) for w in WHO), *(("gemma3", w) for w in WINDOWS), ("qwen3", "kvfold")]
)
def test_the_limit_holds(name, text):
    """Three long prompts, each with tokens behind it, of two rows, and of one."""
    model = subject(name)
    for batch, limit in ((2, 400_000), (1, 250_000)):
        cache = kvfold.Cache(model, text, memory=limit, batch=batch)
        for _ in range(3):
            held = most_held(model, cache, tokens(*[500] * batch)["input_ids"], tokens(*[70] * batch)["input_ids"])
            assert held <= limit, f"{held} bytes of {limit}, {batch} rows"


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_more_rows_than_the_limit_is_for_are_refused(name):
    """They would exceed it: a pass, beams, and rows of another cache, before anything is read or changed."""
    model, text = subject(name), tokens(40, 40)
    cache = kvfold.Cache(model, "kvfold", memory=200_000)
    with pytest.raises(ValueError, match="2 rows, and memory= was given for batch=1"):
        read(model, cache, text["input_ids"])
    assert cache.get_seq_length() == 0 and cache.nbytes == kvfold.Cache(model, "kvfold", memory=200_000).nbytes
    with pytest.raises(ValueError, match="3 rows, and memory="):
        model.generate(**tokens(20), past_key_values=cache, num_beams=3, max_new_tokens=4)
    read(model, cache, text["input_ids"][:1])
    held, other = cache.kept_tokens, kvfold.Cache(model, "full")
    read(model, other, text["input_ids"][1:])
    for change in (lambda: cache.join(other), lambda: cache.batch_repeat_interleave(2),
                   lambda: cache.fork().batch_select_indices(torch.tensor([0, 0]))):  # fmt: skip
        with pytest.raises(ValueError, match="2 rows, and memory= was given for batch=1"):
            change()
    assert cache.kept_tokens == held and other.rows.batch == 1
    two = kvfold.Cache(model, "kvfold", memory=200_000, batch=2)
    read(model, two, text["input_ids"])
    assert two.nbytes <= 200_000


def test_a_large_limit_is_used():
    """Pages that are not full matter less, the more there are: four fifths of the limit are held."""
    model, limit = subject("llama"), 2_000_000
    for text in ("kvfold", "h2o", "decoding(snapkv)"):
        cache = kvfold.Cache(model, text, memory=limit)
        assert 0.8 * limit < most_held(model, cache, tokens(2500)["input_ids"], tokens(90)["input_ids"]) <= limit


@pytest.mark.parametrize("text", ["kvfold", "h2o", "decoding(snapkv)", "cake", "kvfold | turboquant(bits=4)"])
def test_the_limit_holds_while_a_prompt_is_read(text, monkeypatch):
    """Looked at after each layer, not after the pass alone: no layer waits for the others with all of its tokens."""
    from kvfold.hf.layers import PagedLayer

    model, most, own = subject("llama"), [0], PagedLayer.attend
    cache = kvfold.Cache(model, text, memory=150_000)

    def attend(self, *given):
        out = own(self, *given)
        most.append(cache.nbytes)
        return out

    monkeypatch.setattr(PagedLayer, "attend", attend)
    read(model, cache, tokens(500)["input_ids"])
    assert len(most) == 4 and max(most) <= 150_000


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_share_is_of_a_dense_float16_cache(name):
    """A tenth of what transformers' own cache holds for so many tokens, at two bytes a number."""
    from transformers import DynamicCache

    model, context = subject(name), 3000
    dense = DynamicCache(config=model.config)
    model(tokens(context)["input_ids"], past_key_values=dense)
    held = [tensor for layer in dense.layers for tensor in (layer.keys, layer.values)]
    own = sum(tensor.numel() for tensor in held) * 2
    shared = kvfold.Cache(model, "kvfold", memory=0.5, context=context, batch=3, quantize=False)
    assert shared.method == kvfold.Cache(model, "kvfold", memory=int(0.5 * own * 3), batch=3).method


def test_a_limit_under_which_nothing_fits_is_refused_with_the_least():
    model = subject("gemma3")
    with pytest.raises(
        ValueError, match=r"memory=1000 .*too little for batch=1 of .*: (\d+) bytes is the least"
    ) as error:
        kvfold.Cache(model, "kvfold", memory=1000)
    least = int(str(error.value).split(": ")[1].split()[0])
    assert kvfold.Cache(model, "kvfold", memory=least).method.budget >= 1
    with pytest.raises(ValueError, match="too little"):
        kvfold.Cache(model, "kvfold", memory=least - 1)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("kvfold", {"memory": 0}, "memory=0 must be"), ("kvfold", {"memory": -5}, "memory=-5"),
        ("kvfold", {"memory": True}, "memory=True"), ("kvfold", {"memory": 1.5}, r"memory=1.5"),
        ("kvfold", {"memory": float("nan")}, "memory=nan"), ("kvfold", {"memory": "12 parsecs"}, "parsecs"),
        ("kvfold", {"memory": "1.5"}, "1.5"), ("kvfold", {"memory": "0MB"}, "0MB"),
        ("kvfold", {"memory": []}, r"memory=\[\]"),
        ("kvfold", {"memory": 0.1}, "say of how many tokens"), ("kvfold", {"memory": 0.1, "context": 0}, "context=0"),
        ("kvfold", {"memory": 10**6, "batch": 0}, "batch=0"), ("full", {"memory": 10**6}, "none has one"),
        ("snapkv", {"memory": 10**6}, r"try decoding\(snapkv\)"), 
        ("kvfold | kivi", {"memory": 10**6}, "drops no single tokens"),
        ("kvfold", {"context": 10}, "memory= is for"), ("kvfold", {"batch": 2}, "memory= is for"),
        ("kvfold(budget=9)", {"memory": 10**6}, "budget=9 is given, too"),
        ("kvfold", {"memory": 10**6, "budget": 9}, "budget=9 is given, too"),
        ("decoding(snapkv) | keydiff", {"memory": 10**6}, "decoding and keydiff has one"),
        ("kvfold(quality='best')", {"memory": 10**6}, "holds all of it until after_prompt"),
        ("d2o", {"memory": 10**6}, "holds all of it until after_forward"),
        ("kvfold(interval=0)", {"memory": 10**6}, "its interval is 0"),
        ("snapkv | kivi", {"memory": 10**6}, "drops no single tokens"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused(text, options, said):
    with pytest.raises(ValueError, match=said):
        kvfold.Cache(subject("llama"), text, **options)


def test_what_memory_can_be():
    given = {
        512: 512,
        "512": 512,
        "1KB": 1000,
        "1 KiB": 1024,
        "1.5mib": 1572864,
        "2GB": 2 * 10**9,
        "3b": 3,
        1.0: 1.0,
        0.25: 0.25,
    }
    assert {text: parse_memory(text) for text in given} == given


def test_the_model_keeps_no_trace_of_the_few_tokens_that_it_read():
    model = subject("llama")
    before = torch.get_rng_state()
    cache = kvfold.Cache(model, "kvfold", memory=200_000)
    assert torch.equal(torch.get_rng_state(), before) and cache.get_seq_length() == 0 and model.training is False
