"""Where a step's time goes: functions count for the room that they lie in, and nothing is lost."""

import time

import pytest

from kvfold.bench import parts
from kvfold.bench.parts import PARTS, Profile, part_of


@pytest.mark.parametrize(
    ("path", "function", "part"),
    [
        ("/x/site-packages/torch/nn/modules/linear.py", "forward", "linears"),
        ("/x/site-packages/torch/nn/modules/module.py", "_call_impl", "model"),
        ("/x/site-packages/transformers/integrations/sdpa_attention.py", "sdpa_attention_forward", "attention"),
        ("/x/site-packages/transformers/models/llama/modeling_llama.py", "forward", "model"),
        ("/x/kvfold/src/kvfold/ops/paged/cpu.py", "_attend", "attention"),
        ("/x/kvfold/src/kvfold/ops/paged/cpu.py", "keep_pages", "methods"),
        ("/x/kvfold/src/kvfold/ops/codes/cpu.py", "attend_codes", "attention"),
        ("/x/kvfold/src/kvfold/ops/choose/cpu.py", "top_mask", "methods"),
        ("/x/kvfold/src/kvfold/ops/dispatch.py", "select", "attention"),
        ("/x/kvfold/src/kvfold/methods/h2o.py", "after_decode", "methods"),
        ("/x/kvfold/src/kvfold/layer/deciding.py", "decide", "methods"),
        ("/x/kvfold/src/kvfold/layer/layer.py", "_step", "cache"),
        ("/x/kvfold/.venv/lib/site-packages/torch/nn/functional.py", "silu", "model"),
        ("/x/kvfold/.venv/lib/site-packages/torch/nn/modules/linear.py", "forward", "linears"),
        ("<frozen os>", "__getitem__", "model"),
    ],
)
def test_a_function_counts_for_its_room(path: str, function: str, part: str):
    assert part_of(path, function) == part


def test_every_room_counts_for_a_part():
    assert {part for _, part in parts.ROOMS} == set(PARTS) - {"model"}


def test_what_a_function_calls_in_c_is_its_own():
    spaces: dict[str, object] = {"sleep": time.sleep}
    for name, file in (("attend", "kvfold/ops/paged/cpu.py"), ("product", "torch/nn/modules/linear.py")):
        exec(compile(f"def {name}(seconds): sleep(seconds)", f"/x/{file}", "exec"), spaces)
    profile = Profile()
    for _ in range(2):
        with profile.steps(1):
            spaces["attend"](0.02)  # type: ignore[operator]
            spaces["product"](0.01)  # type: ignore[operator]
    found = profile.parts()
    assert found.attention >= 0.02 and found.linears >= 0.01 and profile.count == 2
    assert found.step_seconds == sum(getattr(found, part) for part in PARTS)
    assert sum(found.share(part) for part in PARTS) == pytest.approx(1.0)


def test_a_failed_step_stops_the_profiler():
    profile = Profile()
    with pytest.raises(KeyError), profile.steps(1):
        raise KeyError
    with profile.steps(1):  # another one could not start if the first went on
        pass
    assert profile.count == 1
