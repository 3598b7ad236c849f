"""The bundled models on real text: needles, memory that the process gives back, and the README's claims."""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

import kvfold
from kvfold.evaluation.asking import AskedContender, Asker
from kvfold.evaluation.tasks import Setting, make_examples

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STORY = ROOT / "examples/documents/blue-carbuncle.txt"


@lru_cache(maxsize=1)
def model(name: str) -> tuple[Any, Any]:
    return kvfold.load(name, progress=False)


def needles(name: str, tokens: int, methods: list[tuple[str, dict[str, Any]]]) -> list[int]:
    """How many of five needles each method finds, the question in the prompt (task `niah`); the first is `full`."""
    lm, tokenizer = model(name)
    made = [AskedContender(slug, None, lambda s=slug, o=options: kvfold.Cache(lm, s, **o)) for slug, options in methods]
    asker, found = Asker(lm, tokenizer, window=8192), [0] * len(methods)
    for example in make_examples("niah", Setting(tokenizer, tokens, samples=5)):
        for outcome in asker.ask([example], "aware", made):
            assert outcome.error is None
            found[outcome.contender] += outcome.queries[0]["scores"]["score"] == 1.0
    return found


def test_gemma_finds_every_needle() -> None:
    """5 of 5 with the full cache at 1,500 tokens, 3 at half of it: sliding-window layers are left alone."""
    full, half = needles("gemma3-270m", 1500, [("full", {}), ("snapkv", {"budget": 0.5})])
    assert full == 5
    assert half >= 3


def test_smollm_finds_needles() -> None:
    """What methods find with the question in the prompt, as `kvfold eval --tasks niah` measures it."""
    methods = [
        ("full", {}),
        ("tova", {"budget": 0.5}),
        ("kvmerger", {"budget": 0.9}),
        ("streamingllm", {"budget": 0.35}),
    ]
    full, tova, merger, streaming = needles("smollm2-135m-instruct", 1800, methods)
    assert full == 5
    assert tova >= 3  # 4
    assert merger >= 3  # 4; the recent tail that it leaves alone holds two
    assert streaming <= 3  # of the five depths the last 35 % of the text holds two


def test_run_frees_what_kvmerger_drops() -> None:
    """Right after the prompt the cache holds at most 0.37 of a dense one, and the process is smaller by the rest."""
    held = {}
    for method in (["full"], ["kvmerger", "--budget", "0.35"]):
        words = ["run", "--model", "smollm2-135m-instruct", "--file", str(STORY), "--ask", "Who stole the stone?"]
        words += ["--context", "3000", "--json", "--max-new-tokens", "2", "--method", *method]
        command = [sys.executable, "-m", "kvfold", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        held[method[0]] = json.loads(done.stdout)
    merger, full = held["kvmerger"], held["full"]
    assert merger["prompt_tokens"] > 2900
    assert merger["nbytes"] <= 0.37 * merger["dense_nbytes"]
    assert full["nbytes"] >= full["dense_nbytes"]
    saved = full["nbytes"] - merger["nbytes"]
    shrunk = full["resident_bytes_after_prefill"] - merger["resident_bytes_after_prefill"]
    assert shrunk > 0.8 * saved


def test_a_prompt_of_8k_tokens_in_chunks_never_holds_more_than_1100() -> None:
    """Budget 512, chunks of 512: stored tokens and the chunk in hand, and the bytes between two chunks."""
    lm, tokenizer = model("smollm2-135m-instruct")
    ids = tokenizer(STORY.read_text() * 2, return_tensors="pt").input_ids[:, :8000]
    assert ids.shape[1] == 8000
    # With its exempt layers, KVMerger would hold more than an even share in those.
    cache = kvfold.Cache(lm, "kvmerger(skip=())", budget=512, prefill_chunk=512)
    held: list[int] = []
    between: list[int] = []

    def look(view: Any) -> None:
        held.append(int(view.count.max()))
        between.append(cache.nbytes)

    with torch.no_grad(), cache.observed(look):
        lm(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    assert len(held) == 30 * 16 and 512 < max(held) <= 1100
    assert max(between) < 1.1 * 512 * cache.dense_nbytes / 8000  # pages hold the budget alone
    assert cache.kept_tokens <= 512
