"""A model that several threads run at once: what is measured on it, and prompts in chunks."""

import threading
from contextlib import contextmanager

import pytest
import torch

import kvfold
from kvfold.hf.rope import find_ropes
from kvfold.hf.tables import as_long_as, by_length
from models import build, feed, tokens


def meanwhile(work):
    """Do something in another thread, and wait for it; its error is ours."""
    found = []

    def run():
        try:
            with torch.no_grad():
                found.append((work(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    made, error = found[0]
    if error is not None:
        raise error
    return made


@contextmanager
def beside(module, work, times=1):
    """Before the first passes of this thread over a module, `work` runs in another one."""
    here, found = threading.get_ident(), []

    def before(module, args):
        if threading.get_ident() == here and len(found) < times:
            found.append(None)
            found[-1] = meanwhile(work)

    handle = module.register_forward_pre_hook(before)
    try:
        yield found
    finally:
        handle.remove()


@pytest.mark.parametrize("rows", [1, 20], ids=["a text", "as many rows as are measured"])
def test_a_model_is_measured_while_another_thread_runs_it(rows):
    model, plain = build("llama"), build("llama")
    ids = torch.arange(rows)[:, None] + 5 if rows > 1 else tokens(8)["input_ids"]
    with torch.no_grad():
        want = plain(ids).logits
    with beside(model.model.layers[0], lambda: model(ids).logits) as found:
        ropes = find_ropes(model)
    torch.testing.assert_close(found[0], want)
    assert len(ropes) == 3 and find_ropes(model) is ropes
    kvfold.Cache(model, "streamingllm", budget=16, positions="compact")


def test_a_model_is_measured_once_however_many_threads_ask():
    model, passes, found, start = build("llama"), [], [], threading.Barrier(4)
    model.model.register_forward_hook(lambda *_: passes.append(1))

    def ask():
        start.wait(60)
        found.append(find_ropes(model))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(passes) == 1 and len(found) == 4 and all(ropes is found[0] and len(ropes) == 3 for ropes in found)


def test_a_failed_measurement_is_not_kept():
    model = build("llama")

    def fail(module, args):
        raise RuntimeError("not now")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    assert find_ropes(model) == {}
    handle.remove()
    assert len(find_ropes(model)) == 3


# -- angles that depend on the length ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ntk", "llama"])
def test_a_pass_beside_chunks_turns_as_ever(name):
    model, plain, prompt, short = build(name), build(name), tokens(2000), tokens(8)["input_ids"]
    with torch.no_grad():
        want, whole = plain(short).logits, plain(**prompt).logits[:, -1]
        cache = kvfold.Cache(model, prefill_chunk=500)
        with beside(model.model.layers[0], lambda: model(short).logits, times=4) as found:
            got = model(**prompt, past_key_values=cache).logits[:, -1]
    assert len(found) == 4
    for logits in found:
        torch.testing.assert_close(logits, want)
    torch.testing.assert_close(got, whole, atol=2e-4, rtol=0)


def test_hooks_that_torch_calls_when_they_are_gone():
    """It has listed them for one thread's pass, and another thread ends its block."""
    model, found, listed, gone = build("ntk"), [], threading.Event(), threading.Event()
    rotary, x, places = by_length(model)[0], torch.zeros(1, 8, 64), torch.arange(8)[None]
    want = rotary(x, places)

    def wait(*_):
        listed.set()
        gone.wait(60)

    rotary.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: found.append(meanwhile(lambda: rotary(x, places))))
    with as_long_as(model, 2000):
        thread.start()
        listed.wait(60)
    gone.set()
    thread.join(60)
    torch.testing.assert_close(found[0], want)


def test_a_longer_text_between_two_chunks_is_refused():
    """It has set the model's table; the chunks would not be one text."""
    model, prompt, long = build("ntk"), tokens(900), tokens(1500)["input_ids"]
    cache, passes = kvfold.Cache(model, prefill_chunk=300), []

    def before(module, args):
        passes.append(1)
        if len(passes) == 2:
            handle.remove()
            meanwhile(lambda: model(long))

    handle = by_length(model)[0].register_forward_pre_hook(before)
    with pytest.raises(RuntimeError, match="another thread read with this LlamaForCausalLM"):
        feed(model, cache, *prompt.values())
    cache.reset()
    assert feed(model, cache, *prompt.values()).isfinite().all()


def test_of_two_threads_with_chunks_one_waits():
    model, order = build("ntk"), []
    inside, asked = threading.Event(), threading.Event()

    def second():
        inside.wait(60)
        asked.set()
        with as_long_as(model, 900):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with as_long_as(model, 2000), as_long_as(model, 2000):  # a thread does not wait for itself
        inside.set()
        asked.wait(60)
        thread.join(0.2)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
