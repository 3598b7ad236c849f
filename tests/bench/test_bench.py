"""The benchmarks measure what they say: their numbers agree with each other and with what caches hold."""

from dataclasses import replace
from math import log2
from pathlib import Path

import numpy as np
import pytest
import torch

from kvfold.bench import contenders as c
from kvfold.bench import kernels, tables
from kvfold.bench.arithmetic import ArithmeticRate
from kvfold.bench.chart import growth_chart, kernels_chart, run_chart
from kvfold.bench.endtoend import RunRow, measure_prefill, measure_run
from kvfold.bench.growth import exponents, flat_lines, measure_growth
from kvfold.bench.kernels import KINDS, Case, draw_lengths, measure_kernels, scatter
from kvfold.bench.machine import Elsewhere, ReadRate, describe, spread
from kvfold.bench.parts import PARTS
from kvfold.evaluation.chart import save_chart
from kvfold.evaluation.compare import with_budget
from kvfold.files import write_json
from kvfold.formats import POSITION, Chunk, Dense, Spec
from kvfold.hf.cache import Cache
from kvfold.methods.registry import parse
from kvfold.ops import _cpu
from kvfold.ops.cpu import bits, threads
from models import build, dynamic, feed, reference, subject, tokens

CPU = torch.device("cpu")
SETS = _cpu.names()


@pytest.fixture(scope="module")
def rate() -> ReadRate:
    return ReadRate(CPU, nbytes=2**20)


def entrants(model, *methods: str, budget: float | int = 0.25) -> list[c.BenchContender]:
    own = c.kvfold_contenders(model, [(name, with_budget(name, budget)) for name in methods])
    return [*c.transformers_contenders(model)[0], *own]


# -- the machine ---------------------------------------------------------------------------------------------


def test_a_spread_is_median_and_extremes():
    assert spread([3.0, 1.0, 2.0]).to_dict() == {"median": 2.0, "min": 1.0, "max": 3.0, "count": 3}


def test_the_plain_read_reads_everything():
    data = torch.arange(3 * 2**14 + 77, dtype=torch.float32) % 7
    for workers in (1, 2, 5):
        assert _cpu.read(data.numpy(), workers) == float(data.double().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_read_of_pages_reads_each_once(dtype: torch.dtype):
    pages, size, d, dv = 37, 4, 12, 20
    planes = [torch.randn(pages * size, width).to(dtype) for width in (d, dv)]
    table = torch.randperm(pages)[:34].view(2, 17).numpy().astype(np.int32)
    lengths = np.array([65, 30], dtype=np.int32)
    held = [page for row, used in zip(table, (17, 8), strict=True) for page in row[:used]]
    words = [int(bits(plane).reshape(pages, -1)[held].copy().view(np.uint32).sum(dtype=np.uint64)) for plane in planes]
    for name in SETS:
        _cpu.use(name)
        for workers in (1, 3):
            assert _cpu.read_pages(*map(bits, planes), table, lengths, size, workers) == sum(words) % 2**32
    _cpu.use(SETS[0])
    with pytest.raises(ValueError, match="a page that the pool does not have"):
        _cpu.read_pages(*map(bits, planes), table + 1000, lengths, size, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_is_done(dtype: torch.dtype):
    x = torch.randn(_cpu.FEW).to(dtype)
    for name in SETS:
        _cpu.use(name)
        for group in range(1, _cpu.GROUP + 1):
            found = _cpu.multiply_add(bits(x), 0.5, group, 2, 3, 2)
            assert found == pytest.approx(3 * 2 * group * 0.5 * float(x.double().sum()), abs=0.05)
    _cpu.use(SETS[0])
    for wrong in (0, _cpu.GROUP + 1):
        with pytest.raises(ValueError, match="group lie between"):
            _cpu.multiply_add(bits(x), 0.5, wrong, 1, 1, 1)
    assert _cpu.chain(16) == 1 and _cpu.chain(8) == 1  # a number that is turned over an even number of times


def test_what_cores_can_do_is_per_number():
    cores = ArithmeticRate([("float32", 3), ("bfloat16", 2 * _cpu.GROUP)])
    for _ in range(2):
        cores.sample()
    few, many = cores.found()
    assert (few.dtype, few.group, many.group) == ("float32", 3, 16) and few.seconds.count == 2
    assert few.numbers_per_second == pytest.approx(1 / few.seconds.median)
    assert few.per_cycle * few.hertz * threads() == pytest.approx(few.numbers_per_second)
    line = tables.sum_of(few, 1.0)
    assert "memory binds before arithmetic" in line and "widened" not in line
    assert "arithmetic binds before memory" in tables.sum_of(many, 1e15) and "widened" in tables.sum_of(many, 1.0)


def test_the_faster_reader_is_the_bandwidth(rate: ReadRate):
    rate.sample()
    found = rate.to_dict()
    assert set(found["readers"]) == {"torch sum", "kvfold's plain read"}
    assert found["bytes"] == 2**20
    assert found["bytes_per_second"] == max(reader["bytes_per_second"] for reader in found["readers"].values())
    for reader in found["readers"].values():
        assert reader["bytes_per_second"] == pytest.approx(2**20 / reader["median"])


def test_the_machine_is_described():
    found = describe(CPU)
    assert found["threads"] == torch.get_num_threads() and found["cpu"] and found["gpu"] is None
    assert {"kvfold", "torch", "transformers"} <= set(found["versions"])
    assert found["command"].startswith("kvfold")
    assert (Elsewhere().cores() is None) == (not Path("/proc/stat").exists())


def test_json_is_written_whole_or_not_at_all(tmp_path: Path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert not list(tmp_path.iterdir())


# -- kernels -------------------------------------------------------------------------------------------------


def test_kernel_rows_are_consistent(rate: ReadRate):
    cases = [Case(100, 2, 3, 2, 32, dtype) for dtype in ("float32", "bfloat16")]
    rows, _, cores = measure_kernels(cases, kinds=KINDS, rounds=2, rate=rate, working_set=400_000)
    assert [(r.case.dtype, r.contender, r.kind) for r in rows] == [
        (dtype, name, kind)
        for dtype in ("float32", "bfloat16") for kind in KINDS for name in ("kvfold", "read", "sdpa")
        if (name, kind) != ("sdpa", "scattered")
    ]  # fmt: skip
    for row in rows:
        assert row.kv_bytes == row.tokens * 2 * 32 * (4 if row.case.dtype == "float32" else 2)
        assert (row.copies - 1) * row.kv_bytes < 400_000 <= row.copies * row.kv_bytes
        assert row.bytes_per_second == pytest.approx(row.kv_bytes / row.seconds.median)
        assert row.of_bandwidth == pytest.approx(row.bound_seconds / row.seconds.median)
        assert row.seconds.min <= row.seconds.median <= row.seconds.max and row.seconds.count == 2
        read = next(r for r in rows if (r.case, r.kind, r.contender) == (row.case, row.kind, "read"))
        assert row.of_read == pytest.approx(read.seconds.median / row.seconds.median)
        done = cores.of(row.case.dtype, 2).numbers_per_second
        assert row.arithmetic_seconds == (None if row is read else pytest.approx(row.tokens * 2 * 32 / done))
    full, scattered, ragged = (next(r for r in rows if r.kind == kind) for kind in KINDS)
    assert scattered.of_sdpa == pytest.approx(rows[2].seconds.median / scattered.seconds.median)
    assert [row.label for row in rows[:4]] == [
        "kvfold, pages in order", "plain read, pages in order", "torch SDPA", "kvfold, pages scattered",
    ]  # fmt: skip
    assert full.tokens == 2 * 3 * 100 and ragged.tokens == int(draw_lengths(cases[0]).sum())
    assert full.cost_per_token is None and scattered.cost_per_token is None
    per_token = ragged.seconds.median / ragged.tokens
    assert ragged.cost_per_token == pytest.approx(per_token / (full.seconds.median / full.tokens))
    assert rows[2].of_sdpa == 1.0 and full.of_sdpa == pytest.approx(rows[2].seconds.median / full.seconds.median)


def test_scattered_pages_hold_what_they_held():
    states = torch.randn(2, 3, 100, 16)
    positions = torch.arange(100, dtype=torch.int32).expand(2, 3, 100)
    chunk = Chunk(states, states + 1, torch.ones(2, 3, 100, dtype=torch.bool), {POSITION: positions})
    segment = Dense().open(Spec.of(chunk))
    segment.append(chunk, even=True)
    before = segment.table.table.copy()
    scatter(segment, 3)
    after, held = segment.table.table, segment.dense()
    assert sorted(after.ravel()) == sorted(before.ravel()) and (after != before).mean() > 0.5
    assert torch.equal(held.keys, states) and torch.equal(held.values, states + 1) and bool(held.valid.all())
    assert torch.equal(held.columns[POSITION], positions)


def test_formats_have_rows_of_their_own(rate: ReadRate):
    stored = {name: parse(name).format for name in ("kivi(bits=4, residual=0)", "kivi(bits=2)", "fp8")}
    case = Case(320, 2, 3, 2, 64, "bfloat16")
    kinds = ("in order", "ragged")
    rows, _, _ = measure_kernels([case], kinds=kinds, formats=stored, rounds=1, rate=rate, working_set=1_000_000)
    assert [row.contender for row in rows] == 2 * ["kvfold", "read", "sdpa", *stored]
    dense, four, eight = rows[0], rows[3], rows[5]
    assert 0.25 < four.kv_bytes / dense.kv_bytes < 0.35 and 0.5 < eight.kv_bytes / dense.kv_bytes < 0.6
    for row in rows:
        assert row.bytes_per_second == pytest.approx(row.kv_bytes / row.seconds.median)
        assert (row.max_error or 0) < 0.05
    table = tables.kernels_table(rows, 1e9, "title")
    assert list(table.columns[2].cells)[3] == "kivi(bits=4, residual=0)"
    assert "kivi(bits=2), ragged" in str(kernels_chart(rows, 1e9, "title").to_dict())


def test_lengths_are_drawn_between_a_tenth_and_all():
    drawn = draw_lengths(Case(1000, 64, 8, 1, 16, "float32"))
    assert drawn.shape == (64, 8) and 100 <= int(drawn.min()) < 130 and 970 < int(drawn.max()) <= 1000
    assert torch.equal(drawn, draw_lengths(Case(1000, 64, 8, 1, 16, "float32")))


def test_a_wrong_kernel_is_not_timed(rate: ReadRate, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels._Layer, "sdpa", lambda self: self.q)
    with pytest.raises(RuntimeError, match="not timed"):
        measure_kernels([Case(20, 1, 1, 1, 16, "float32")], rounds=1, rate=rate, working_set=1)


# -- end to end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-next"])
def test_one_prefill_fills_every_cache(family: str):
    """What each then decodes is what it decodes after a prefill of its own."""
    model, ids = build(family), tokens(60, 60)["input_ids"]
    made = [one.make() for one in entrants(model, "snapkv", "full", "h2o") if "Quantized" not in one.name]
    first = c.fill_all(model, made, ids)
    for cache in made:
        own = Cache(model, cache.method) if isinstance(cache, Cache) else dynamic(model)
        token, _ = c.read_prompt(model, own, ids)
        assert torch.equal(token, first)
        assert c.held_bytes(cache) == c.held_bytes(own) or not isinstance(cache, Cache)  # windows: see held_bytes
        assert torch.equal(c.decode_steps(model, cache, first, 4)[0], c.decode_steps(model, own, token, 4)[0])


def test_bytes_are_those_of_the_caches():
    model, text = subject("llama"), tokens(50)
    cache, plain = Cache(model, "snapkv", budget=16), dynamic(reference("llama"))
    feed(model, cache, text["input_ids"], text["attention_mask"])
    feed(reference("llama"), plain, text["input_ids"], text["attention_mask"])
    assert c.held_bytes(cache) == cache.nbytes
    assert c.held_bytes(plain) == 3 * 2 * 2 * 50 * 16 * 4  # layers, keys and values, heads, tokens, numbers, bytes


def test_weights_count_once():
    model = build("llama")  # its tables are two: the input's is looked up
    every = sum(p.nbytes for p in model.parameters())
    assert c.weight_bytes(model) == every - model.get_input_embeddings().weight.nbytes
    experts = build("qwen3-next")  # one expert of two for a token
    routed = sum(p.nbytes for name, p in experts.named_parameters() if ".experts." in name)
    unread = experts.get_input_embeddings().weight.nbytes + routed // 2
    assert c.weight_bytes(experts) == sum(p.nbytes for p in experts.parameters()) - unread


def test_prompts_are_the_peers():
    ids = c.draw_prompts(build("llama"), 2, 8)
    assert torch.equal(ids, torch.randint(10, 97, (2, 8), generator=torch.Generator().manual_seed(0)))


def test_run_rows_are_consistent(rate: ReadRate):
    model = build("llama")
    wanted = entrants(model, "full", "snapkv", "kvmerger(budget=0.5)")
    rows, _ = measure_run(model, wanted, context=64, batch=2, steps=2, rounds=2, rate=rate)
    dense, full = rows[0], next(row for row in rows if row.contender == "full")
    assert dense.contender == c.DYNAMIC
    assert [row.budget for row in rows[-3:]] == [None, 0.25, 0.5]
    for row in rows:
        decode, prefill = row.decode, row.prefill
        assert decode.step_seconds.count == 4 and len(decode.round_seconds) == 2
        assert decode.tokens_per_second == pytest.approx(2 / decode.step_seconds.median)
        assert decode.kv_ratio == decode.kv_bytes / dense.decode.kv_bytes
        assert decode.bound_seconds == pytest.approx((c.weight_bytes(model) + decode.kv_bytes) / rate.bytes_per_second)
        assert decode.of_bound == pytest.approx(decode.bound_seconds / decode.step_seconds.median)
        ratios = [a / b for a, b in zip(dense.decode.round_seconds, decode.round_seconds, strict=True)]
        assert decode.speedup.to_dict() == spread(ratios).to_dict() and decode.times_peers == {}
        assert decode.floor_seconds > 0 and decode.floor_bound_seconds < decode.bound_seconds
        assert sum(getattr(decode.parts, part) for part in PARTS) == pytest.approx(decode.parts.step_seconds)
        assert decode.parts.share("attention") > 0 and decode.parts.share("linears") > 0
        assert decode.bound_speedup == pytest.approx(dense.decode.bound_seconds / decode.bound_seconds)
        assert prefill.ratio_dynamic == pytest.approx(prefill.seconds.median / dense.prefill.seconds.median)
        assert prefill.ratio_full == pytest.approx(prefill.seconds.median / full.prefill.seconds.median)
    own = Cache(model, "snapkv", budget=0.25)
    c.read_prompt(model, own, c.draw_prompts(model, 2, 64))
    assert (rows[-2].decode.kv_bytes, rows[-2].decode.kept_tokens) == (own.nbytes, 16.0)
    assert dense.decode.kept_tokens is None
    assert dense.decode.floor_seconds != full.decode.floor_seconds == rows[-1].decode.floor_seconds
    table = tables.parts_table(rows, 1e9, "where")
    assert len(table.rows) == len(rows) and "kvfold's Python" in [column.header for column in table.columns]
    without = [replace(row, decode=replace(row.decode, parts=None)) for row in rows]
    assert not tables.parts_table(without, 1e9, "where").rows


def test_without_full_and_without_dynamic(rate: ReadRate):
    model = build("llama")
    found = measure_prefill(model, entrants(model, "snapkv"), c.draw_prompts(model, 1, 20), rounds=1)
    assert found["snapkv"].ratio_full is None and found["snapkv"].peak_cuda_bytes is None
    with pytest.raises(ValueError, match="must hold DynamicCache"):
        measure_run(model, entrants(model, "full")[-1:], context=8, batch=1, steps=1, rounds=1, rate=rate)


def test_what_is_left_out_has_its_reason():
    found, skipped = c.transformers_contenders(build("gemma3"))
    assert [one.name for one in found] == [c.DYNAMIC]
    assert len(skipped) == 3 and all("sliding_attention" in each["reason"] for each in skipped)
    assert c.transformers_contenders(build("llama"), quantized=False)[1] == []


# -- growth --------------------------------------------------------------------------------------------------


def test_growth_exponents(rate: ReadRate):
    model = build("llama")
    wanted = entrants(model, "full", "streamingllm", budget=16)
    rows, _ = measure_growth(model, wanted, [32, 64, 128], steps=1, rounds=2, prefills=3, rate=rate)
    assert [row.context for row in rows] == [t for t in (32, 64, 128) for _ in range(len(rows) // 3)]
    found = {(each.contender, each.measure, each.start): each.exponent for each in exponents(rows)}
    assert len(found) == len(rows) // 3 * 3 * 2
    assert found[c.DYNAMIC, "kv_bytes", 32] == found[c.DYNAMIC, "kv_bytes", 64] == 1.0
    assert found["streamingllm", "kv_bytes", 64] == 0.0
    of_full = {row.context: row.step_seconds.median for row in rows if row.contender == "full"}
    assert found["full", "step_seconds", 32] == pytest.approx(log2(of_full[64] / of_full[32]))
    for row in rows:
        assert row.of_bound == pytest.approx(row.bound_seconds / row.step_seconds.median)
        assert (row.step_seconds.count, row.of_first.count, row.prefill_seconds.count) == (2, 2, 3)
        if row.context == 32:
            assert row.of_first.min == row.of_first.max == 1.0
    lines = flat_lines(rows)
    middle, last = (row for row in rows if row.contender == "streamingllm" and row.context > 32)
    assert len(lines) == len(rows) // 3
    assert f" to {max(1.0, last.of_first.median, middle.of_first.median):.2f} of the first" in lines[-1]
    assert lines[-1].endswith("holds 1.00 to 1.00 of its bytes") and "holds 1.00 to 4.00 of its bytes" in lines[0]


def test_a_prompt_in_chunks_is_what_a_cache_reads_in_chunks(rate: ReadRate):
    model = build("llama")
    wanted = c.kvfold_contenders(model, [("snapkv", with_budget("snapkv", 16))], chunk=20)
    rows, _ = measure_growth(model, wanted, [32, 64], steps=1, rounds=1, rate=rate)
    cache = Cache(model, "snapkv", budget=16, prefill_chunk=20)
    c.read_prompt(model, cache, c.draw_prompts(model, 1, 64))
    assert rows[-1].kv_bytes == cache.nbytes and [row.contender for row in rows] == ["snapkv"] * 2


# -- tables and charts ---------------------------------------------------------------------------------------


def test_durations_have_three_digits():
    assert [tables.duration(s) for s in (2.0, 0.01234, 1.5e-5)] == ["2 s", "12.3 ms", "15 µs"]


def test_charts_stand_alone(rate: ReadRate, tmp_path: Path):
    model = build("llama")
    case = Case(16, 1, 1, 1, 16, "float32")
    shapes, _, _ = measure_kernels([case], kinds=KINDS, rounds=1, rate=rate, working_set=1)
    rows, _ = measure_run(model, entrants(model, "full", "tova"), context=20, batch=1, steps=1, rounds=1, rate=rate)
    rows.append(RunRow("tova", "kvpress", 0.25, separate_process=True, decode=rows[0].decode))
    grown, _ = measure_growth(model, entrants(model, "h2o", budget=8), [16, 32], steps=1, rounds=1, rate=rate)
    bandwidth = rate.bytes_per_second
    for name, chart, words in (
        (
            "kernels",
            kernels_chart(shapes, bandwidth, "K"),
            ("torch SDPA, ragged", "kvfold, pages scattered", "plain read: "),
        ),
        ("run", run_chart(rows, "R"), ("tova 0.25 (kvpress, own process)", "DynamicCache")),
        ("growth", growth_chart(grown, "G"), ("h2o 8", "DynamicCache")),
    ):
        save_chart(chart, tmp_path / f"{name}.html")
        page = (tmp_path / f"{name}.html").read_text()
        assert "vega" in page and "https://cdn" not in page and all(word in page for word in words)
