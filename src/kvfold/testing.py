"""What every method promises, as functions to run on one of your own: each raises AssertionError where it is not kept.

    import pytest
    from kvfold import testing

    @pytest.mark.parametrize("contract", testing.CONTRACTS, ids=lambda contract: contract.__name__)
    def test_contract(contract):
        contract("mymethod(budget=0.5)")

A contract takes a method, as text or object, and a model (None: `tiny_model()`). Those about budgets say nothing of
methods without a `budget`.
"""

import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvfold.hf.argument import with_cache
from kvfold.hf.cache import Cache
from kvfold.methods import Method, parse
from kvfold.methods.base import keeping

VOCAB = 97


@cache
def tiny_model() -> PreTrainedModel:
    """A random Llama of three layers, two KV heads with two query heads each, whose attention is peaked; float32."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        initializer_range=0.25,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).float().eval()


# -- feeding a model -----------------------------------------------------------------------------------------


def tokens(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """Random prompts of these lengths as one left-padded batch: input_ids and attention_mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        if length:
            ids[row, -length:] = torch.randint(3, VOCAB, (length,), generator=generator)
            mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def pair(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The two tensors of `tokens`."""
    prompt = tokens(*lengths, seed=seed)
    return prompt["input_ids"], prompt["attention_mask"]


def positions(mask: Tensor, new: int) -> Tensor:
    """position_ids of the last `new` columns, as `generate` makes them: padding not counted."""
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]


@torch.no_grad()
def feed(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """One forward pass over `ids`, the last columns of the text that `mask` covers: their logits."""
    logits: Tensor = model(
        ids, attention_mask=mask, position_ids=positions(mask, ids.shape[1]), **with_cache(model, cache)
    ).logits
    return logits


def grow(mask: Tensor, columns: int = 1) -> Tensor:
    """The mask with `columns` more tokens in every row."""
    return torch.cat([mask, mask.new_ones(len(mask), columns)], 1)


def follow(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor, forced: Tensor) -> Tensor:
    """The logits of a prompt's last token and of `forced` (B, N) fed one by one after it: (B, N + 1, V)."""
    logits = [feed(model, cache, ids, mask)[:, -1:]]
    for column in range(forced.shape[1]):
        mask = grow(mask)
        logits.append(feed(model, cache, forced[:, column : column + 1], mask))
    return torch.cat(logits, 1)


def steps(rows: int, count: int, seed: int = 9) -> Tensor:
    """Random tokens (rows, count) to force behind a prompt."""
    return torch.randint(3, VOCAB, (rows, count), generator=torch.Generator().manual_seed(seed))


# -- contracts -----------------------------------------------------------------------------------------------

Contract = Callable[[Method | str, PreTrainedModel | None], None]


def budgeted(method: Method | str, *budgets: float | int) -> list[Method]:
    """The method at these budgets; none where it has no option `budget`."""
    made = parse(method)
    has = any(option.name == "budget" for option in fields(made))  # type: ignore[arg-type]
    return [replace(made, budget=budget) for budget in budgets] if has else []  # type: ignore[type-var]


def keeping_to(method: Method | str, *budgets: float | int) -> list[Method]:
    """The method at these budgets; none where they are not of the tokens that it keeps."""
    return [made for made in budgeted(method, *budgets) if keeping([made])]


def held(cache: Cache, row: int) -> int:
    """Tokens of one row, summed over heads and layers."""
    return sum(int(core.counts()[row].sum()) for core in cache.paged)


def allowed(cache: Cache, budget: float | int, prompt: int) -> float | int:
    """What a budget allows one row for a prompt of so many tokens, summed over heads and layers."""
    heads = sum(core.shape[0] for core in cache.paged if core.shape is not None)
    return heads * (budget * prompt if isinstance(budget, float) else budget)


def close(got: Tensor, expected: Tensor, what: str) -> None:
    """Within 1e-4 of each other."""
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0, msg=lambda said: f"{what}: {said}")


def a_whole_budget_is_the_full_cache(method: Method | str, model: PreTrainedModel | None = None) -> None:
    """At a budget of 1.0 the prompt and every generated token get the full cache's logits."""
    model = model or tiny_model()
    for made in budgeted(method, 1.0):
        prompt, said = pair(40, 29), steps(2, 6)
        dense = follow(model, DynamicCache(config=model.config), *prompt, said)
        close(follow(model, Cache(model, made), *prompt, said), dense, f"{made}")


def the_prompt_is_exact(method: Method | str, model: PreTrainedModel | None = None) -> None:
    """A prompt read at once is attended in full and then compressed, unless the method's prefill is its own."""
    model, made, prompt = model or tiny_model(), parse(method), pair(40, 29)
    if not made.own_prefill:
        dense = feed(model, DynamicCache(config=model.config), *prompt)[:, -1]
        close(feed(model, Cache(model, made), *prompt)[:, -1], dense, f"{made}")


def parts_are_one_pass(method: Method | str, model: PreTrainedModel | None = None) -> None:
    """A long prompt, which layers read in parts, keeps the tokens and gives the logits of one pass over it."""
    model, prompt, said, found = model or tiny_model(), pair(41, 23), steps(2, 3), []
    for size in (0, 8):
        cache = Cache(model, method, part_size=size)
        logits = follow(model, cache, *prompt, said)
        found.append((logits, [cache.kept(core.layer) for core in cache.paged]))
    close(found[1][0], found[0][0], f"{method} in parts")
    assert found[1][1] == found[0][1], "in parts other tokens are kept"


def a_batch_is_its_rows(method: Method | str, model: PreTrainedModel | None = None) -> None:
    """A row of a padded batch keeps the tokens, and gives the logits, that it does alone."""
    model, lengths, said = model or tiny_model(), (40, 11, 1), steps(3, 3)
    cache, prompt = Cache(model, method), pair(*lengths)
    logits = follow(model, cache, *prompt, said)
    for row, length in enumerate(lengths):
        alone, own = Cache(model, method), prompt[0][row : row + 1, -length:]
        got = follow(model, alone, own, torch.ones_like(own), said[row : row + 1])
        close(got[0], logits[row], f"row {row}")
        for core in cache.paged:
            assert alone.kept(core.layer)[0] == cache.kept(core.layer)[row], f"row {row}, layer {core.layer}"


def the_budget_holds(method: Method | str, model: PreTrainedModel | None = None) -> None:
    """No row holds more than its budget after a prompt, after a further turn, and, if the method acts there, a step."""
    model = model or tiny_model()
    for made in keeping_to(method, 0.02, 0.4, 0.75, 3, 12):
        cache, prompt, lengths = Cache(model, made), pair(64, 50), (64, 50)
        ids, mask = prompt
        feed(model, cache, ids[:, :31], mask[:, :31])
        for row, length in enumerate((31, 17)):
            assert held(cache, row) <= allowed(cache, made.budget, length) + 1e-6, f"{made} after a prompt"  # type: ignore[attr-defined]
        feed(model, cache, ids[:, 31:], mask)
        for step in (*steps(2, 5).T, None):
            for row, length in enumerate(lengths):
                most = allowed(cache, made.budget, length)  # type: ignore[attr-defined]
                assert held(cache, row) <= most + 1e-6, f"{made} holds {held(cache, row)} of {most} in row {row}"
            if step is None or not made.listens("after_decode"):
                break
            mask = grow(mask)
            feed(model, cache, step[:, None], mask)
        if made.period:
            _an_interval_holds(model, cache, made, mask)


def _an_interval_holds(model: PreTrainedModel, cache: Cache, made: Method, mask: Tensor) -> None:
    """Budgets in tokens hold at every generated token; of a fraction of all that was read the interval is on top."""
    heads = sum(core.shape[0] for core in cache.paged if core.shape is not None)
    for step in steps(2, 2 * made.period + 2).T:
        mask = grow(mask)
        feed(model, cache, step[:, None], mask)
        for row, length in enumerate(cache.rows.seen.tolist()):
            tail = 0 if isinstance(made.budget, int) else heads * made.period  # type: ignore[attr-defined]
            most = allowed(cache, made.budget, length) + tail  # type: ignore[attr-defined]
            assert held(cache, row) <= most + 1e-6, f"{made} holds {held(cache, row)} of {most} at {length} tokens"


def the_newest_token_stays(method: Method | str, model: PreTrainedModel | None = None) -> None:
    """In every layer some head holds the prompt's last token, which generated tokens lean on.

    Where a paper lets the newest token compete like the others (TOVA, Expected Attention), leave this contract out.
    """
    model = model or tiny_model()
    for made in keeping_to(method, 0.25, 0.75, 12):
        cache = Cache(model, made)
        feed(model, cache, *pair(64, 50))
        for core in cache.paged:
            for row, length in enumerate((64, 50)):
                found = max((at for head in cache.kept(core.layer)[row] for at in head), default=-1)
                assert found == length - 1, f"{made}, layer {core.layer}, row {row}: the newest kept is {found}"


def short_prompts_work(method: Method | str, model: PreTrainedModel | None = None) -> None:
    """Prompts of one, two and seven tokens, with budgets that keep next to nothing and more than there is."""
    model = model or tiny_model()
    for made in budgeted(method, 0.01, 0.3, 1, 64) or [parse(method)]:
        for length in (1, 2, 7):
            logits = follow(model, Cache(model, made), *pair(length, 1), steps(2, 3))
            assert logits.isfinite().all(), f"{made} at {length} tokens"


def a_budget_is_memory(method: Method | str, model: PreTrainedModel | None = None) -> None:
    """A quarter of the tokens takes at most two fifths of the bytes."""
    model, sizes = model or tiny_model(), []
    for made in keeping_to(method, 1.0, 0.25):
        cache = Cache(model, made)
        feed(model, cache, *pair(320))
        sizes.append(sum(sum(core.stored.row_nbytes()) for core in cache.paged))
    assert not sizes or sizes[1] < 0.4 * sizes[0], f"{sizes[1]:,} bytes of {sizes[0]:,}"


def nothing_lives_outside_the_cache(method: Method | str, model: PreTrainedModel | None = None) -> None:
    """A method object that has read one text reads the next as a new one would."""
    model, second, said = model or tiny_model(), pair(33, 21, seed=5), steps(2, 5)
    used = Cache(model, method)
    follow(model, used, *pair(40, 30), said)
    again = follow(model, Cache(model, used.method), *second, said)
    fresh = follow(model, Cache(model, method), *second, said)
    assert torch.equal(again, fresh), "what was read before changes what is read now"


def a_fork_is_independent(method: Method | str, model: PreTrainedModel | None = None) -> None:
    """Two branches of a cache go on, turn by turn, as two caches that never met."""
    model, prompt = model or tiny_model(), pair(40, 30)
    cache, mask = Cache(model, method), grow(prompt[1])
    feed(model, cache, *prompt)
    branches, ways = (cache, cache.fork()), (steps(2, 8), steps(2, 8, seed=10))
    got: tuple[list[Tensor], ...] = ([], [])
    for column in range(8):  # in turns, so that each could disturb the other
        for branch, way, to in zip(branches, ways, got, strict=True):
            to.append(feed(model, branch, way[:, column : column + 1], grow(mask, column)))
    for branch, way, logits in zip(branches, ways, got, strict=True):
        separate = Cache(model, method)
        expected = follow(model, separate, *prompt, way)[:, 1:]
        close(torch.cat(logits, 1), expected, "a branch")
        assert [core.kept() for core in branch.paged] == [core.kept() for core in separate.paged]


def a_file_goes_on(method: Method | str, model: PreTrainedModel | None = None) -> None:
    """A cache that was saved and loaded goes on bit for bit."""
    model, prompt = model or tiny_model(), pair(40, 30)
    cache, mask = Cache(model, method), grow(prompt[1], 4)
    follow(model, cache, *prompt, steps(2, 4))
    with tempfile.TemporaryDirectory() as folder:
        cache.save(path := Path(folder) / "cache.safetensors")
        loaded = Cache.load(path, model)
    assert str(loaded.method) == str(cache.method)
    for step in steps(2, 5).T:
        mask = grow(mask)
        expected, got = (feed(model, each, step[:, None], mask) for each in (cache, loaded))
        assert torch.equal(got, expected), "a loaded cache gives other logits"
    assert [core.kept() for core in loaded.paged] == [core.kept() for core in cache.paged]


CONTRACTS: tuple[Contract, ...] = (
    a_whole_budget_is_the_full_cache, the_prompt_is_exact, parts_are_one_pass, a_batch_is_its_rows,
    the_budget_holds, the_newest_token_stays, short_prompts_work, a_budget_is_memory,
    nothing_lives_outside_the_cache, a_fork_is_independent, a_file_goes_on,
)  # fmt: skip
"""All of them."""
