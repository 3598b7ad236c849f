"""Methods side by side on one document and one question: answer, memory, time, agreement with the full cache."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvfold.evaluation.agreement import Agreement, agreement
from kvfold.evaluation.decoding import GreedyAnswer, decode, prefill, teacher_forced
from kvfold.hf.cache import Cache
from kvfold.hf.shared_prefill import prefill_many
from kvfold.methods import Method, MethodInfo, get_method, list_methods, parse
from kvfold.methods.base import stages_of
from kvfold.methods.registry import read_stages


@dataclass(frozen=True)
class CompareRow:
    """One method at one budget (None: it takes none, or several of its stages have their own).

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
    """A method from its text, with this budget where it takes one and the text gives none.

    In a composition one stage alone may take a budget, or the text gives it to each that does; else ValueError.
    """
    silent = [slug for slug, given in read_stages(text) if takes_budget(get_method(slug)) and "budget" not in given]
    return parse(text, budget=budget) if silent else parse(text)


def budget_of(method: Method) -> float | int | None:
    """The budget of a method, or of the only stage that has one; None: of none, or of several."""
    found = [budget for stage in stages_of(method) if (budget := getattr(stage, "budget", None)) is not None]
    return found[0] if len(found) == 1 else None


Wanted = tuple[str, Method, Any]
"""A method's text, the method, and its budget, where it has one."""


def _raise(name: str, budget: Any, error: Exception) -> None:
    raise error


def compare(
    model: PreTrainedModel,
    tokenizer: Any,
    ids: Tensor,
    methods: Sequence[str],
    budgets: Sequence[float | int],
    *,
    max_new_tokens: int = 64,
    tick: Callable[[str], None] = lambda _: None,
    made_row: Callable[[CompareRow], None] = lambda _: None,
    failed: Callable[[str, Any, Exception], None] = _raise,
    progress: Callable[[float], None] = lambda _: None,
) -> list[CompareRow]:
    """Every method at every budget on one prompt (1, T); the first row is `full`. `made_row` gets each as it comes.

    `failed` gets the name, the budget and the error of each that fails, and the others go on; methods that do not fit
    the model come first, before anything is read. Without it the error is raised. `progress` gets the share of a long
    prompt that the one in hand has read.

    At the first budget each method reads the prompt itself and is timed. At further budgets one exact prefill
    serves all that it can (their times are None): the same tokens are stored, see `prefill_many`.
    """

    def tried(work: Callable[[Wanted], object], each: Wanted) -> bool:
        try:
            work(each)
        except Exception as error:
            failed(each[0], each[2], error)
            return False
        return True

    def wants(budget: float | int) -> list[Wanted]:
        made = [(name, with_budget(name, budget)) for name in methods if name != "full"]
        found = [(name, method, budget_of(method)) for name, method in made]
        return [each for each in found if tried(lambda one: Cache(model, one[1]), each)]

    wanted, later = wants(budgets[0]), [each for b in budgets[1:] for each in wants(b)]
    tick("warm-up")
    decode(model, warm := Cache(model, "full"), prefill(model, ids[:, :64], warm).logits, 4)
    tick("full")
    whole = Cache(model, "full")
    read = prefill(model, ids, whole, progress=progress)
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
    ) -> None:
        text = tokenizer.decode(made.tokens, skip_special_tokens=True).strip()
        rate = made.rate if prefill_s is not None else None
        rows.append(CompareRow(name, budget, text, *held, full_nbytes, prefill_s, rate, found.top1, found.kl))
        made_row(rows[-1])

    rows: list[CompareRow] = []
    row("full", None, answer, sizes, read.seconds, agree(truth))
    del whole

    def measure(each: Wanted, cache: Cache, first: Tensor | None = None, timed: bool = True) -> None:
        """`first`: the logits of a prefill that others have had, too; None: the cache reads the prompt itself."""
        name, method, budget = each
        tick(f"{name} at {budget}")
        seconds = None
        if first is None:
            own = prefill(model, ids, cache, progress=progress)
            first, seconds = own.logits, own.seconds if timed else None
        held = (cache.kept_tokens, cache.nbytes, cache.dense_nbytes)
        logits = _forced(model, cache, first, answer.tokens)
        made = decode(model, cache, first, max_new_tokens)
        row(name, budget, made, held, seconds, agree(logits, method))

    for each in wanted:
        tried(lambda one: measure(one, Cache(model, one[1])), each)
    if later:
        tick("further budgets")
        caches = [Cache(model, method) for _, method, _ in later]
        shared = _read_together(model, ids, caches)
        for each, cache in zip(later, caches, strict=True):
            mine = shared if cache.shares_prefill else None
            ours = cache if shared is not None else Cache(model, each[1])
            tried(lambda one, own=ours, first=mine: measure(one, own, first, timed=False), each)  # type: ignore[misc]
            ours.reset()
    return rows


def _read_together(model: PreTrainedModel, ids: Tensor, caches: Sequence[Cache]) -> Tensor | None:
    """One exact prefill for all that can share it: its last logits. None where it fails: whose fault it is shows then,
    when each reads the prompt itself."""
    sharing = [cache for cache in caches if cache.shares_prefill]
    try:
        return prefill_many(model, {"input_ids": ids.to(model.device)}, sharing, logits_to_keep=1)[0, -1].float()
    except Exception:
        return None


def _forced(model: PreTrainedModel, cache: Cache, first: Tensor, tokens: list[int]) -> Tensor:
    """Teacher-forced logits on a fork, so that the cache itself can still answer."""
    fork = cache.fork()
    logits = teacher_forced(model, fork, first, tokens)
    fork.reset()
    return logits
