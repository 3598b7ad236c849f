"""Plans against what real caches hold, and the rules that no plan may break."""

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

from kvfold.bench import DEVICES, Device, MemoryPlan, ModelShape, find_device, make_plan, shape_of
from kvfold.bench.devices import quantity
from kvfold.bench.held import StoredTokens, stored, window_tokens
from kvfold.evaluation.compare import with_budget
from kvfold.formats import LOG_MASS, POSITION, Chunk, Dense, Spec
from kvfold.hf.cache import Cache
from kvfold.methods import parse
from models import COMMON, FAMILIES, build, feed, subject, tokens

METHODS = ["full", "snapkv", "streamingllm", "h2o", "tova", "kvmerger"]
GPU = Device("small", 10**9, 1e11, {"float32": 1e13})


@lru_cache(maxsize=16)
def shape(family: str, dtype: torch.dtype = torch.float32) -> ModelShape:
    kind, options = FAMILIES[family]
    with torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**COMMON, **options}), dtype=dtype))


def made(family: str, method: str, budget: float | int = 0.25, context: int = 300, batch: int = 1) -> MemoryPlan:
    return make_plan(
        shape(family), GPU, with_budget(method, budget), dtype="float32", context=context, batch=batch, name=method
    )


@pytest.mark.parametrize(
    ("family", "method"),
    [(family, method) for family in ("llama", "gemma3") for method in METHODS]
    + [("phi3", "h2o"), ("qwen3", "snapkv"), ("ntk", "kvmerger"), ("mistral-sliding", "full"), ("qwen3-next", "tova")],
)
@pytest.mark.filterwarnings("ignore:.*no layer with full attention")
def test_bytes_are_those_of_a_real_cache(family: str, method: str) -> None:
    """Within 0.5 % here, and never more than 5: the rest are the per-layer (not per-row) counters, TOVA's heads that
    all keep the smallest of their budgets, and pages given for rows to lie side by side (2 % at most)."""
    for budget, context, batch in ((0.25, 203, 1), (0.5, 203, 3), (1.0, 203, 1), (64, 481, 1), (300, 481, 3)):
        cache = Cache(subject(family), with_budget(method, budget))
        prompt = tokens(*[context] * batch)
        feed(cache.model, cache, prompt["input_ids"], prompt["attention_mask"])
        plan = made(family, method, budget, context, batch)
        assert plan.kv_bytes == pytest.approx(cache.nbytes, rel=0.005), (budget, context, batch)
        assert plan.dense_kv_bytes == pytest.approx(cache.dense_nbytes, rel=0.005), (budget, context, batch)
        assert plan.kept_tokens == pytest.approx(cache.kept_tokens, abs=1)
        if method == "full" or budget == 1.0:
            break


def test_bytes_follow_the_dtype() -> None:
    cache = Cache(build("llama", dtype=torch.bfloat16), "h2o", budget=0.5)
    prompt = tokens(203)
    feed(cache.model, cache, prompt["input_ids"], prompt["attention_mask"])
    plan = make_plan(shape("llama", torch.bfloat16), DEVICES["L4"], cache.method, dtype="bfloat16", context=203)
    assert plan.kv_bytes == pytest.approx(cache.nbytes, rel=0.005)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3", "gpt2"])
def test_parameters_are_counted(family: str) -> None:
    real, planned = build(family), shape(family)
    assert planned.parameters == planned.active_parameters == sum(p.numel() for p in real.parameters())
    assert planned.weight_bytes == 4 * planned.parameters
    assert planned.tied == bool(real.config.tie_word_embeddings)
    untied = 0 if planned.tied else planned.vocab * planned.hidden
    assert planned.read_bytes(8) == planned.weight_bytes - 4 * untied


def test_experts_that_no_token_picks_are_not_read() -> None:
    planned = shape("qwen3-next")
    real = build("qwen3-next")
    routed = sum(p.numel() for name, p in real.named_parameters() if ".experts." in name)
    assert (planned.experts, planned.experts_used, planned.expert_parameters) == (2, 1, routed)
    assert planned.active_parameters == planned.parameters - routed // 2
    assert planned.read_bytes(1) < planned.read_bytes(2) < planned.read_bytes(64) <= planned.weight_bytes


def test_quantised_weights_by_hand() -> None:
    """Tables stay as they are, and what a step does not read of the experts is as small as the rest."""
    for family in ("llama", "gemma3", "qwen3-next"):
        whole, few = shape(family), replace(shape(family), weight_bits=4.5)
        tables = whole.embedding * (1 if whole.tied else 2)
        assert few.weight_bytes == pytest.approx((whole.parameters - tables) * 4.5 / 8 + 4 * tables, abs=1)
        assert replace(whole, weight_bits=32.0).read_bytes(2) == whole.read_bytes(2)
        unread = whole.expert_parameters * (1 - whole.experts_used / whole.experts) ** 2 if whole.experts else 0
        read = few.weight_bytes - unread * 4.5 / 8 - (0 if whole.tied else 4 * whole.embedding)
        assert few.read_bytes(2) == pytest.approx(read, abs=2) and few.active_parameters == whole.active_parameters


def test_chunks_by_hand() -> None:
    """The activations of a chunk, and a chunk in each layer, in place of the activations of the prompt."""

    def reserve(chunk: int | None) -> int:
        plan = make_plan(shape("llama"), GPU, parse("full"), dtype="float32", context=400, reserve=0.0, chunk=chunk)
        return plan.reserve_bytes

    assert reserve(None) == shape("llama").activation_bytes(400)
    assert reserve(64) == shape("llama").activation_bytes(64) + shape("llama").dense_bytes(64)
    assert reserve(1000) == reserve(400)
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        reserve(0)


def test_a_decode_step_by_hand() -> None:
    """Llama: 3 layers, 2 KV heads of 16 + 16 numbers, 4 bytes each and 4 for the position; 19 pages for 300 tokens."""
    plan, planned = made("llama", "full", batch=2), shape("llama")
    row = 3 * (2 * 19 * (16 * (32 * 4 + 4) + 4) + 2 * (19 + 1) * 4 + 16)
    assert plan.kv_bytes == 2 * row
    assert plan.dense_kv_bytes == 2 * 3 * 2 * 300 * 32 * 4
    read = (planned.parameters - 97 * 64) * 4
    assert plan.step_seconds == pytest.approx((read + 2 * row) / GPU.bandwidth)
    assert plan.tokens_per_second == pytest.approx(2 / plan.step_seconds)
    assert plan.gain == pytest.approx((read + plan.dense_kv_bytes) / (read + 2 * row))


def test_the_first_token_by_hand() -> None:
    """Matrices but the tables for 300 tokens, the output matrix for one, 4 query heads over 300 * 301 / 2 pairs."""
    slow = replace(GPU, flops={"float32": 1e6})
    plan = make_plan(shape("llama"), slow, parse("full"), dtype="float32", context=300)
    body = shape("llama").parameters - 2 * 97 * 64
    assert plan.prefill_seconds == pytest.approx((2 * (body * 300 + 97 * 64) + 3 * 2 * 45150 * 4 * 32) / 1e6)


@given(
    method=st.sampled_from(METHODS), budget=st.one_of(st.floats(0.02, 1.0), st.integers(1, 900)),
    context=st.integers(1, 4000), batch=st.integers(1, 64), memory=st.integers(10**6, 10**9),
)  # fmt: skip
def test_the_largest_batch_is_the_largest(
    method: str, budget: float | int, context: int, batch: int, memory: int
) -> None:
    def on(rows: int) -> MemoryPlan:
        device = replace(GPU, memory=memory)
        return make_plan(
            shape("gemma3"), device, with_budget(method, budget), dtype="float32", context=context, batch=rows
        )

    largest = on(batch).largest_batch
    assert largest == on(batch + 1).largest_batch
    assert not on(largest + 1).fits
    assert largest == 0 or on(largest).fits
    if largest:
        assert on(batch).largest_tokens_per_second == pytest.approx(on(largest).tokens_per_second)


@given(
    family=st.sampled_from(["llama", "gemma3"]), method=st.sampled_from(METHODS),
    budget=st.one_of(st.floats(0.02, 1.0), st.integers(1, 900)), context=st.integers(1, 4000), batch=st.integers(1, 64),
)  # fmt: skip
def test_no_gain_is_above_its_bound(
    family: str, method: str, budget: float | int, context: int, batch: int
) -> None:  # fmt: skip
    plan = made(family, method, budget, context, batch)
    assert 0 < plan.gain <= plan.gain_bound * (1 + 1e-12)
    assert plan.gain_bound >= 1.0
    assert plan.tokens_per_second <= plan.dense_tokens_per_second * plan.gain_bound * (1 + 1e-12)
    if method == "full":
        assert plan.gain_bound == 1.0


@given(
    method=st.sampled_from(METHODS[:5]), part=st.floats(0.02, 0.9), more=st.floats(1.0, 1.1),
    context=st.integers(1, 4000), longer=st.integers(0, 500),
)  # fmt: skip
def test_bytes_grow_with_context_budget_and_batch(
    method: str, part: float, more: float, context: int, longer: int
) -> None:
    small = made("gemma3", method, part, context, 2).kv_bytes
    assert small <= made("gemma3", method, part, context + longer, 2).kv_bytes
    assert small <= made("gemma3", method, part * more, context, 2).kv_bytes
    assert small * 3 == made("gemma3", method, part, context, 6).kv_bytes
    whole = max(1, int(part * context))
    assert made("llama", method, whole, context).kv_bytes <= made("llama", method, whole + longer, context).kv_bytes


def test_kvmerger_says_itself_which_layers_stay_whole() -> None:
    """Layers 0, 1 and 29 of 30 keep all and have no column of masses; the sum is the budget's."""
    paged = tuple(range(30))
    answers = [stored(parse("kvmerger(budget=0.5)"), 1000, i, paged, 30, 2) for i in paged]
    assert [i for i, held in enumerate(answers) if held.tokens == (1000, 1000)] == [0, 1, 29]
    assert {held.columns for held in answers} == {(), ((LOG_MASS, torch.float32),)}
    assert sum(sum(held.tokens) for held in answers) == 30 * 2 * 500


def test_compositions_keep_the_smaller_and_add_their_columns() -> None:
    held = stored(parse("h2o(budget=0.5) | streamingllm(budget=100)"), 1000, 0, (0, 1), 2, 3)
    assert held == StoredTokens(((Dense(), (100, 100, 100)),), (("h2o_score", torch.float32),))


FORMATS = [
    "fp8", "kivi", "kivi(bits=2, residual=32)", "turboquant", "turboquant(bits=2)", "mustafar", "think", "mikv",
    "mikv(ratio=0.5, bits=4)", "mikv | fp8", "zipcache", "zipcache(ratio=0.3, group=32)",
    "snapkv(budget=0.4) | kivi", "snapkv(budget=0.4) | think",
    "h2o(budget=64) | fp8", "snapkv(budget=0.5) | mikv", "kvmerger(budget=0.4) | fp8",
]  # fmt: skip


@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_formats_are_those_of_a_real_cache(method: str, dtype: torch.dtype) -> None:
    """Within 3 %: tokens by two short prompts, and pages given for rows to lie side by side."""
    sizes = {"head_dim": 64, "num_hidden_layers": 2}
    model = build("qwen3", dtype=dtype, **sizes)
    shaped = shape_of(model)
    for context, batch in ((203, 1), (481, 3)):
        cache = Cache(model, method)
        prompt = tokens(*[context] * batch)
        feed(model, cache, prompt["input_ids"], prompt["attention_mask"])
        name = str(dtype).removeprefix("torch.")
        device = Device("small", 10**9, 1e11, {name: 1e13})
        plan = make_plan(shaped, device, parse(method), dtype=name, context=context, batch=batch)
        assert plan.kv_bytes == pytest.approx(cache.nbytes, rel=0.03), (context, batch)
        assert plan.kept_tokens == pytest.approx(cache.kept_tokens, abs=1)
        assert plan.gain <= plan.gain_bound * (1 + 1e-12)


@pytest.mark.parametrize("form", ["kivi(bits=4, residual=0)", "kivi(bits=2, residual=32)", "fp8"])
def test_windows_in_a_format_are_those_of_a_real_cache(form: str) -> None:
    model, method = build("gemma3", sliding_window=96), f"windows(form='{form}')"
    cache = Cache(model, method)
    prompt = tokens(400)
    feed(model, cache, prompt["input_ids"], prompt["attention_mask"])
    plan = make_plan(shape_of(model), GPU, parse(method), dtype="float32", context=400)
    assert plan.kv_bytes == pytest.approx(cache.nbytes, rel=0.03)
    made = parse(method).windows
    assert made is not None
    assert [window_tokens(made, 96, n) for n in (1, 96, 97)] == [1, 96, 97]
    assert 96 <= window_tokens(made, 96, 400) < 96 + 32


def test_a_format_is_a_part_of_the_plan_at_any_length() -> None:
    """What moves grows evenly, with what a stage before leaves: all but 32 tokens, or four fifths."""
    for text, moved in (("think", 100_000 - 32), ("mikv", 80_000), ("snapkv(budget=0.5) | think", 50_000 - 32)):
        held = stored(parse(text), 100_000, 0, (0,), 1, 2)
        assert held.parts[1][1] == pytest.approx((moved, moved), rel=2e-3), text
    high, low = stored(parse("zipcache(ratio=0.6)"), 100_000, 0, (0,), 1, 2).parts[1:]
    assert high[1] == pytest.approx((60_000, 60_000), rel=2e-3) and low[1] == pytest.approx((40_000, 40_000), rel=2e-3)


def test_a_composition_that_a_format_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="channels=12 must divide the value size 16"):
        make_plan(shape("llama"), GPU, parse("kivi(channels=12)"), dtype="float32", context=100)
    with pytest.raises(ValueError, match="lets layers share tokens, which a plan can't size yet"):
        make_plan(shape("llama"), GPU, parse("minicache"), dtype="float32", context=100)


def test_a_segment_says_what_more_tokens_would_take() -> None:
    """As it is, and with tokens already there: what it holds afterwards, without slack."""
    for text in ("full", "fp8", "kivi(residual=16)", "turboquant", "mustafar"):
        form = parse(text).format or Dense()
        for first, more in ((0, 1), (0, 300), (64, 1), (64, 17)):
            segment = form.open(Spec(2, 2, 64, 64, torch.float32, torch.device("cpu")))
            for count in (first, more):
                want = segment.nbytes_with(np.full((2, 2), count, dtype=np.int64))
                states = torch.randn(2, 2, count, 64)
                places = torch.arange(count, dtype=torch.int32).expand(2, 2, count)
                segment.append(Chunk(states, states, torch.ones(2, 2, count, dtype=torch.bool), {POSITION: places}))
                segment.truncate(segment.counts())  # without the room that a growing table takes
                assert want == pytest.approx(segment.nbytes, rel=0.04), (text, first, more)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": 0}, "context=0 must be at least 1"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"reserve": 1.0}, r"reserve=1.0 must be a share of the device's memory, in \[0, 1\)"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' must be one that T4 multiplies fast: float16, float32"),
    ],
)
def test_bad_settings_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_plan(shape("llama"), DEVICES["T4"], parse("full"), **{"dtype": "float32", "context": 9, **options})  # type: ignore[arg-type]


def test_models_that_kvfold_does_not_serve_are_refused() -> None:
    with pytest.raises(ValueError, match="Gemma2ForCausalLM caps its logits"):
        shape("gemma2")


# -- a model stays as it is ----------------------------------------------------------------------------------


def marks(model: PreTrainedModel) -> dict[str, object]:
    """All that could be set on a model: implementations, hooks, attributes, weights and what they are."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        own = vars(module)
        found[f"{name}: attributes"] = {key: id(value) for key, value in own.items()}
        found[f"{name}: hooks"] = {key: list(value) for key, value in own.items() if key.endswith("_hooks")}
        tensors = {**own["_parameters"], **own["_buffers"]}
        found[f"{name}: tensors"] = {
            key: (id(x), x.device, x.requires_grad) for key, x in tensors.items() if x is not None
        }
        if isinstance(module, PreTrainedModel):
            config = module.config
            found[f"{name}: set"] = (
                config._attn_implementation,
                config._experts_implementation,
                config.to_json_string(),
            )
    return found


@pytest.mark.parametrize(
    ("family", "before"), [("llama", ""), ("llama", "kvfold"), ("qwen3-next", "kvfold"), ("gemma3", "eager")]
)
def test_a_model_stays_as_it_is(family: str, before: str) -> None:
    model = build(family)
    if before == "kvfold":  # attention and hooks of a cache that the model serves
        Cache(model, "fastkv" if family == "llama" else "full")
        assert model._kvfold_hooks
    elif before:
        model.set_attn_implementation(before)
    then = marks(model)
    assert shape_of(model) == shape(family)
    assert marks(model) == then
    prompt = tokens(20)
    assert torch.isfinite(model(**prompt).logits).all()


def test_a_model_without_weights_stays_as_it_is() -> None:
    kind, options = FAMILIES["gemma3"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[kind](**{**COMMON, **options}), attn_implementation="eager"
        )
    then = marks(model)
    assert shape_of(model) == shape("gemma3")
    assert marks(model) == then


# -- devices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("memory", "24GB", 24e9), ("memory", "24 GiB", 24 * 2**30), ("memory", "0.5tb", 5e11),
        ("bandwidth", "1TB/s", 1e12), ("bandwidth", "936 GB/s", 936e9),
        ("flops", "165T", 165e12), ("flops", "1.5 PFLOPS", 1.5e15), ("flops", "2e", None), ("flops", "-1T", None),
        ("memory", "24", None), ("memory", "0GB", None), ("memory", "24GB/s", None), ("bandwidth", "1TB", None),
    ],
)  # fmt: skip
def test_quantities(name: str, text: str, value: float | None) -> None:
    if value is None:
        with pytest.raises(ValueError, match=f"{name}='{text}' must be a positive number of"):
            quantity(name, text)
    else:
        assert quantity(name, text) == pytest.approx(value)


def test_presets_by_any_spelling() -> None:
    assert find_device("h100") == DEVICES["H100-SXM"]
    assert find_device("RTX 4090") == DEVICES["RTX4090"]
    assert find_device("a100-40gb").memory == 40 * 10**9
    for device in DEVICES.values():
        # Between a T4 and a B200 nothing computes less than 50 or more than 1,000 operations a byte.
        assert 50 < device.peak("float16") / device.bandwidth < 1000, device.name
        assert device.memory / device.bandwidth < 0.1
        assert math.isclose(device.flops.get("bfloat16", device.peak("float16")), device.peak("float16"))


def test_devices_of_your_own() -> None:
    own = find_device(None, memory="24GB", bandwidth="1TB/s", flops="165T")
    assert (own.name, own.memory, own.bandwidth, own.peak("bfloat16")) == ("custom", 24 * 10**9, 1e12, 165e12)
    changed = find_device("H100", memory="70GB")
    assert (changed.memory, changed.bandwidth) == (70 * 10**9, DEVICES["H100-SXM"].bandwidth)
    assert "changed" in changed.name
    with pytest.raises(ValueError, match="device='H1000' must be one of B200, H200"):
        find_device("H1000")
    with pytest.raises(ValueError, match=r"device=None must be one of .* lacks --bandwidth, --flops"):
        find_device(None, memory="24GB")
