"""Methods side by side on one document and one question: answer, memory, time, agreement with the full cache."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvfold.evaluation.agreement import Agreement, agreement
from kvfold.evaluation.decoding import GreedyAnswer, decode, prefill, teacher_forced
from kvfold.hf.cache import Cache
from kvfold.hf.shared_prefill import prefill_many
from kvfold.methods import Method, MethodInfo, list_methods, parse


@dataclass(frozen=True)
class CompareRow:
    """One method at one budget (None: a composition, which has none of its own).

    Sizes are those right after the prompt; `full_nbytes` is method `full`'s.
    """

    method: str
    budget: float | int | None
    answer: str
    kept_tokens: float
    nbytes: int
    dense_nbytes: int
    full_nbytes: int
    prefill_seconds: float | None
    decode_tokens_per_second: float | None
    top1: float
    kl: float

    @property
    def ratio(self) -> float:
        """Bytes held over those of the full cache."""
        return self.nbytes / self.full_nbytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "ratio": self.ratio}


def split_names(text: str) -> list[str]:
    """Methods separated by commas; commas inside parentheses belong to options. Raises ValueError for none."""
    names, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            names.append("")
        else:
            names[-1] += character
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ValueError(f"methods={text!r} names no method")
    return names


def method_names(text: str) -> list[str]:
    """As `split_names`; "all" is every registered method. Raises ValueError for none."""
    return [info.slug for info in list_methods()] if text.strip() == "all" else split_names(text)


def takes_budget(info: MethodInfo) -> bool:
    """Whether a method has an option `budget`."""
    return "budget" in info.options


def with_budget(text: str, budget: float | int) -> Method:
    """A method from its text; a single stage that takes a budget, and whose text sets none, gets this one."""
    made = parse(text)
    if "budget=" in text or not any(option.name == "budget" for option in fields(made)):  # type: ignore[arg-type]
        return made
    return replace(made, budget=budget)  # type: ignore[type-var]


def compare(
    model: PreTrainedModel,
    tokenizer: Any,
    ids: Tensor,
    methods: Sequence[str],
    budgets: Sequence[float | int],
    *,
    max_new_tokens: int = 64,
    tick: Callable[[str], None] = lambda _: None,
) -> list[CompareRow]:
    """Every method at every budget on one prompt (1, T); the first row is `full`.

    At the first budget each method reads the prompt itself and is timed. At further budgets one exact prefill
    serves all that it can (their times are None): the same tokens are stored, see `prefill_many`.
    """

    def wants(budget: float | int) -> list[tuple[str, Method, Any]]:
        made = [(name, with_budget(name, budget)) for name in methods if name != "full"]
        return [(name, method, getattr(method, "budget", None)) for name, method in made]

    wanted, later = wants(budgets[0]), [each for b in budgets[1:] for each in wants(b)]
    tick("warm-up")
    decode(model, warm := Cache(model, "full"), prefill(model, ids[:, :64], warm).logits, 4)
    tick("full")
    whole = Cache(model, "full")
    read = prefill(model, ids, whole)
    sizes = (whole.kept_tokens, whole.nbytes, whole.dense_nbytes)
    with whole.tentative():
        answer = decode(model, whole, read.logits, max_new_tokens)
    truth = teacher_forced(model, whole, read.logits, answer.tokens)
    full_nbytes = sizes[1]

    def agree(logits: Tensor, method: Method | None = None) -> Agreement:
        # The first token comes out of the prompt's own pass, which is exact for every method that leaves it alone.
        start = 0 if len(truth) == 1 or (method is not None and method.own_prefill) else 1
        return agreement(truth[start:], logits[start:])

    def row(
        name: str, budget: Any, made: GreedyAnswer, held: tuple[float, int, int], prefill_s: Any, found: Agreement
    ) -> CompareRow:
        text = tokenizer.decode(made.tokens, skip_special_tokens=True).strip()
        rate = made.rate if prefill_s is not None else None
        return CompareRow(name, budget, text, *held, full_nbytes, prefill_s, rate, found.top1, found.kl)

    rows = [row("full", None, answer, sizes, read.seconds, agree(truth))]
    del whole
    for name, method, budget in wanted:
        tick(f"{name} at {budget}")
        cache = Cache(model, method)
        own = prefill(model, ids, cache)
        held = (cache.kept_tokens, cache.nbytes, cache.dense_nbytes)
        logits = _forced(model, cache, own.logits, answer.tokens)
        made = decode(model, cache, own.logits, max_new_tokens)
        rows.append(row(name, budget, made, held, own.seconds, agree(logits, method)))
    if later:
        tick("further budgets")
        caches = [Cache(model, method) for _, method, _ in later]
        sharing = [cache for cache in caches if cache.shares_prefill]
        first = prefill_many(model, {"input_ids": ids.to(model.device)}, sharing, logits_to_keep=1)[0, -1].float()
        for (name, method, budget), cache in zip(later, caches, strict=True):
            tick(f"{name} at {budget}")
            begin = first if cache.shares_prefill else prefill(model, ids, cache).logits
            held = (cache.kept_tokens, cache.nbytes, cache.dense_nbytes)
            logits = _forced(model, cache, begin, answer.tokens)
            made = decode(model, cache, begin, max_new_tokens)
            rows.append(row(name, budget, made, held, None, agree(logits, method)))
            cache.reset()
    return rows


def _forced(model: PreTrainedModel, cache: Cache, first: Tensor, tokens: list[int]) -> Tensor:
    """Teacher-forced logits on a fork, so that the cache itself can still answer."""
    fork = cache.fork()
    logits = teacher_forced(model, fork, first, tokens)
    fork.reset()
    return logits
