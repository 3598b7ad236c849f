"""Contexts in parts: what is chosen for each, what lies in a folder, and a server that is slow or lies."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvfold
from kvfold.codecs import CacheGen
from kvfold.pages import Arena
from kvfold.streaming import load_adaptive, save_context
from kvfold.streaming.choosing import TEXT, choose, seconds
from kvfold.streaming.manifest import NAME
from models import build, feed, subject, tokens

pytest.importorskip("constriction")
T, CHUNK = 150, 48


class Clock:
    """Time that passes when somebody says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """A folder, its digest, and the text."""
    folder, ids = tmp_path_factory.mktemp("context"), tokens(T)["input_ids"]
    return folder, save_context(folder, subject("llama"), ids, chunk=CHUNK), ids


def said(folder):
    return json.loads((folder / NAME).read_text())


@contextmanager
def reading_takes(model, clock, rate):
    """The model reads `rate` tokens a second."""

    def count(module, args, kwargs):
        clock.now += kwargs["input_ids"].shape[1] / rate

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def serving(folder, clock=None, bandwidth=lambda name: 1e6, head=None, change=lambda name, body: body):
    """A server of a folder's files: each takes its bytes' time by the clock; the address, and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/")
            asked.append(name)
            body = change(name, (folder / name).read_bytes())
            if clock is not None:
                clock.now += len(body) / bandwidth(name)
            status, headers = head(name, body) if head else (200, {"Content-Length": str(len(body))})
            self.send_response(status)
            for each in headers.items():
                self.send_header(*each)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def layers(cache):
    """Keys and values of all layers."""
    return [(chunk.keys, chunk.values) for core in cache.paged for chunk in [core.stored.tokens()[0]]]


def assert_same(one, two):
    for layer, (mine, theirs) in enumerate(zip(layers(one), layers(two), strict=True)):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b), layer


# -- what is chosen ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("costs", "remaining", "stored", "level"),
    [
        ([{1: 1, 2: 2, 3: 3}] * 2, 6, (), 3),
        ([{1: 1, 2: 2, 3: 3}] * 2, 5, (), 2),  # the same for all, as good as it can be
        ([{0: 3, 1: 1, 2: 2, 3: 3}] * 2, 6, (), TEXT),
        ([{0: 9, 1: 1, 2: 2}, {0: 1, 1: 5, 2: 9}], 3, (), 2),  # no level for both: the next one is read
        ([{1: 1, 2: 2, 3: 3}] * 2, 1, (), 1),  # too late anyway
        ([{0: 1, 1: 2}] * 2, 1, (), TEXT),
        ([{}], 1, (), TEXT),
        ([{}, {}], 1, (1, 2, 3), 2),
        ([{0: 1}, {0: 1}], 1, (1, 2, 3), 2),
        ([{0: 1}, {0: 1}], 2, (1, 2, 3), TEXT),
    ],
)
def test_the_level_of_a_part(costs, remaining, stored, level):
    costs = [{known: float(each) for known, each in part.items()} for part in costs]
    assert choose(costs, float(remaining), stored) == level


@given(data=st.data())
def test_the_budget_is_met_whenever_it_can_be(data):
    count = st.integers(0, 50).map(float)
    part = st.fixed_dictionaries({TEXT: count}, optional={1: count, 2: count, 3: count})
    parts = data.draw(st.lists(part, min_size=1, max_size=8))
    budget = sum(min(each.values()) for each in parts) + data.draw(count)
    left = budget
    for number in range(len(parts)):
        left -= parts[number][choose(parts[number:], left)]
    assert left >= 0


def test_what_is_not_known_is_no_choice():
    assert seconds({1: 100, 2: 200}, 50, 10.0, None) == {1: 10.0, 2: 20.0}
    assert seconds({1: 100}, 50, None, 5.0) == {TEXT: 10.0} and seconds({1: 100}, 50, None, None) == {}


# -- a context that is loaded --------------------------------------------------------------------------------


def test_parts_at_mixed_levels_are_each_alone_side_by_side(context):
    folder, _, _ = context
    model, files = subject("llama"), said(folder)["parts"]
    assert [(part["start"], part["end"]) for part in files] == [(0, 48), (48, 96), (96, 144), (144, 150)]
    clock = Clock()
    nbytes = [{int(level): blob["nbytes"] for level, blob in part["levels"].items()} for part in files]
    budget = sum(each[3] for each in nbytes) / 1000 * 1.02
    rates = {NAME: 1e12, "0000-3.safetensors": 1000}  # from the second on it is slower: the third makes up for it
    with serving(folder, clock, lambda name: rates.get(name, 850)) as (url, asked):
        found = load_adaptive(url, model, slo=budget, bandwidth=1e3, clock=clock)
    assert found.levels == (3, 3, 1, 3) and found.seconds <= budget
    assert asked == [NAME, *(files[i]["levels"][str(level)]["file"] for i, level in enumerate(found.levels))]
    assert found.nbytes == sum(each[level] for each, level in zip(nbytes, found.levels, strict=True))
    pieces = [kvfold.Cache.load(folder / name, model) for name in asked[1:]]
    for layer, (keys, values) in enumerate(layers(found.cache)):
        assert torch.equal(keys, torch.cat([layers(piece)[layer][0] for piece in pieces], 2))
        assert torch.equal(values, torch.cat([layers(piece)[layer][1] for piece in pieces], 2))


def test_goes_on_as_the_text_does(context):
    """All by text: the model's own cache, bit for bit; at the best level nearly that; both answer and generate."""
    folder, digest, ids = context
    model, clock = subject("llama"), Clock()
    with reading_takes(model, clock, rate=1000):
        text = load_adaptive(folder, model, slo=1.0, prefill_rate=1e3, bandwidth=1.0, sha256=digest, clock=clock)
    assert text.levels == (0, 0, 0, 0) and text.seconds == pytest.approx(0.15)
    best = load_adaptive(folder, model, slo=1e9, bandwidth=1e9, clock=Clock())
    assert best.levels == (3, 3, 3, 3) and torch.equal(best.ids, ids)
    full = kvfold.Cache(model)
    for start in range(0, T, CHUNK):
        feed(model, full, ids[:, start : start + CHUNK], torch.ones(1, min(T, start + CHUNK), dtype=torch.long))
    assert_same(text.cache, full)
    step, mask = torch.tensor([[7]]), torch.ones(1, T + 1, dtype=torch.long)
    truth = feed(model, full.fork(), step, mask)
    assert torch.equal(feed(model, text.cache.fork(), step, mask), truth)
    assert torch.nn.functional.cosine_similarity(feed(model, best.cache.fork(), step, mask), truth, dim=-1).min() > 0.8
    more = torch.cat([ids, step], 1)
    for loaded in (text, best):
        said = model.generate(more, past_key_values=loaded.cache.fork(), max_new_tokens=3, do_sample=False)
        assert said.shape == (1, T + 4) and loaded.cache.kept(0) == full.kept(0)


def test_text_is_read_on_top_of_what_was_loaded(context):
    """A level first, then text, then a level: the text sees the loaded part, and the last part is what is stored."""
    folder, _, ids = context
    model, clock = subject("llama"), Clock()
    rates = {"0000": 1e4, "0001": 1e2}
    with serving(folder, clock, lambda name: rates.get(name[:4], 1e2)) as (url, _), reading_takes(model, clock, 40):
        found = load_adaptive(url, model, slo=5.0, bandwidth=1e5, prefill_rate=30.0, clock=clock)
    assert found.levels[0] and found.levels[1] == TEXT
    mixed = kvfold.Cache.load(folder / f"0000-{found.levels[0]}.safetensors", model)
    feed(model, mixed, ids[:, 48:96], torch.ones(1, 96, dtype=torch.long))
    for layer, (keys, values) in enumerate(layers(mixed)):
        assert torch.equal(layers(found.cache)[layer][0][:, :, :96], keys)
        assert torch.equal(layers(found.cache)[layer][1][:, :, :96], values)


@pytest.mark.parametrize("slack", [1.0, 1.3, 4.0])
def test_a_server_of_one_speed_is_in_time(slack, context):
    folder, digest, _ = context
    model, clock, parts = subject("llama"), Clock(), said(context[0])["parts"]
    bandwidth, rate = 2e4, 60.0
    fastest = [min(*(blob["nbytes"] / bandwidth for blob in p["levels"].values()), (p["end"] - p["start"]) / rate)
               for p in parts]  # fmt: skip
    budget = sum(fastest) * slack * (1 + 1e-6)
    known = {"bandwidth": bandwidth, "prefill_rate": rate, "sha256": digest}
    server = serving(folder, clock, lambda name: 1e15 if name == NAME else bandwidth)
    with server as (url, _), reading_takes(model, clock, rate):
        found = load_adaptive(url, model, slo=budget, clock=clock, **known)
    assert found.seconds <= budget and found.cache.get_seq_length() == T


def test_the_first_part_comes_at_the_medium_level(context):
    folder, _, _ = context
    clock = Clock()
    with serving(folder, clock) as (url, _):
        found = load_adaptive(url, subject("llama"), slo=1e3, clock=clock)
    assert found.levels == (2, 3, 3, 3)


def test_an_arena(context):
    folder, _, _ = context
    room = Arena(1 << 22)
    found = load_adaptive(folder, subject("llama"), slo=1e3, arena=room)
    assert found.cache.arena is room and room.pools
    with pytest.raises(kvfold.OutOfPages):
        load_adaptive(folder, subject("llama"), slo=1e3, arena=Arena(1 << 12))


# -- what is refused -----------------------------------------------------------------------------------------


def test_options_that_are_none(context, tmp_path, unchecked):
    folder, _, ids = context
    model = subject("llama")
    for options, message in (
        ({"slo": -1}, "slo=-1 must be a number"), ({"slo": 1, "bandwidth": 0}, "bandwidth=0 must be a number"),
        ({"slo": 1, "prefill_rate": float("nan")}, "prefill_rate=nan must be a number"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_adaptive(folder, model, **options)
    for options, message in (
        ({"chunk": 0}, "chunk=0 must be an int"), ({"levels": (1, 4)}, r"levels=\(1, 4\) must be some of \(1, 2, 3\)"),
        ({"levels": ()}, "levels="), ({"levels": (1, 1)}, "levels="), ({"codec": "zip"}, "codec='zip'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            save_context(tmp_path, model, ids, **options)
    with pytest.raises(ValueError, match=r"folder=.*must be a folder that is there"):
        save_context(tmp_path / "nowhere", model, ids)
    with pytest.raises(ValueError, match=r"ids=\(2, 9\) must be the tokens of one text"):
        save_context(tmp_path, model, tokens(9, 9)["input_ids"])
    with pytest.raises(ValueError, match="has layers with windows or states"):
        save_context(tmp_path, subject("gemma3"), ids)
    with pytest.raises(ValueError, match="source='ftp://x' must be a folder or an http"):
        load_adaptive("ftp://x", model, slo=1)
    assert not list(tmp_path.iterdir())


def changed(**change):
    def apply(name, body):
        return json.dumps(json.loads(body) | change).encode() if name == NAME else body

    return apply


BLOB = {"file": "0000-1.safetensors", "nbytes": 9, "sha256": "0" * 64}


def one(**change):
    return changed(parts=[{"start": 0, "end": T, "levels": {"1": BLOB | change}}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, body: body[:-20] if name == NAME else body, "context.json is not JSON"),
        (lambda name, body: b"[]" if name == NAME else body, r"context.json has \[\] where an object"),
        (changed(format=2), "context.json was written by format 2"),
        (changed(ids=[1.5]), "ids=.*must be ids of tokens"),
        (changed(ids=[97] * T), "ids up to 97, and the model knows 97"),
        (changed(parts=3), "parts=3, which must be a list"),
        (changed(parts=[]), "parts of 0 tokens, which must be all 150"),
        (changed(parts=[{"start": 1, "end": T, "levels": {}}]), "a part 1 to 150, which must go on from 0"),
        (changed(parts=[{"start": 0, "end": "x", "levels": {}}]), "a part with end='x'"),
        (changed(parts=[{"start": 0, "end": T + 1, "levels": {}}]), "a part 0 to 151"),
        (one(file="../x"), r"which must have file, nbytes and sha256"),
        (one(file="/etc/passwd"), r"which must have file, nbytes and sha256"),
        (one(nbytes=1 << 50), r"which must have file, nbytes and sha256"),
        (one(sha256=3), r"which must have file, nbytes and sha256"),
        (one(more=1), r"which must have file, nbytes and sha256"),
        (one(), r"0000-1.safetensors: the server says '\d+' bytes, of which at most 9 are read"),
        (lambda name, body: body if name == NAME else body[:-1], "safetensors is damaged: its SHA-256 is another"),
        (lambda name, body: body if name == NAME else b"x" + body[1:], "safetensors is damaged: its SHA-256 is"),
    ],
)  # fmt: skip
def test_a_server_that_lies(change, message, context):
    room = Arena(1 << 30)
    with serving(context[0], change=change) as (url, _), pytest.raises(ValueError, match=message):
        load_adaptive(url, subject("llama"), slo=1e3, arena=room)
    assert not room.pools


def test_a_part_of_another_text_or_model(context, tmp_path):
    """What a digest in the manifest vouches for is looked at all the same."""
    folder, _, _ = context
    model = subject("llama")
    wrong = [(folder / "0001-2.safetensors").read_bytes()]
    cache = kvfold.Cache(model, "streamingllm", budget=48)
    feed(model, cache, *tokens(T).values())
    cache.save(tmp_path / "c")
    wrong.append((tmp_path / "c").read_bytes())
    for body in wrong:
        blob = {"file": "x", "nbytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
        parts = [{"start": 0, "end": 48, "levels": {"2": blob}}, {"start": 48, "end": T, "levels": {}}]

        def lie(name, old, body=body, parts=parts):
            return changed(parts=parts)(name, old) if name == NAME else body

        (folder / "x").touch()
        with serving(folder, change=lie) as (url, _), pytest.raises(ValueError, match="x holds other tokens than 0 to"):
            load_adaptive(url, model, slo=1e3)
    with pytest.raises(ValueError, match="with other weights than this one's"):
        load_adaptive(folder, build("llama", seed=1), slo=1e3)
    with pytest.raises(ValueError, match=r"context\.json is damaged: its SHA-256"):
        load_adaptive(folder, model, slo=1e3, sha256="0" * 64)


def test_answers_that_are_none(context):
    folder, _, _ = context
    model = subject("llama")
    heads = (
        (lambda name, body: (302, {"Location": "file:///etc/passwd", "Content-Length": "0"}), OSError, "302"),
        (lambda name, body: (404, {"Content-Length": "0"}), OSError, "404"),
        (lambda name, body: (200, {"Content-Length": "-5"}), ValueError, "the server says '-5' bytes"),
        (lambda name, body: (200, {"Content-Length": str(10**12)}), ValueError, "the server says '10{12}' bytes"),
    )  # fmt: skip
    for head, error, message in heads:
        with serving(folder, head=head) as (url, _), pytest.raises(error, match=message):
            load_adaptive(url, model, slo=1e3)

    def endless(name, body):
        return body if name == NAME else body + b"\0" * 10**5

    server = serving(folder, head=lambda name, body: (200, {}), change=endless)
    with server as (url, _), pytest.raises(ValueError, match=r"has more than the \d+ bytes that are read"):
        load_adaptive(url, model, slo=1e3)
    with pytest.raises(OSError, match="refused"):
        load_adaptive(url, model, slo=1e3)


def test_other_options_of_the_codec(tmp_path):
    model, ids = subject("llama"), tokens(60)["input_ids"]
    save_context(tmp_path, model, ids, levels=(1,), codec=CacheGen(first=0, per_head=True))
    assert load_adaptive(tmp_path, model, slo=1e3).levels == (1,)
