"""A batch of examples put to many caches: one exact prefill serves them all, then each answers by itself.

Three protocols. `aware`: each query is read together with the context, and the method decides with the query in view.
`agnostic`: the context is read and compressed alone, then every query is answered from a fork of that same cache
(SCBench's multi-request mode). `turns`: context and first query are read together, then the right answer and the next
query follow in the same cache, as a conversation (SCBench's multi-turn mode, arXiv:2412.10319).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.evaluation.agreement import divergence
from kvfold.evaluation.decoding import sync
from kvfold.evaluation.examples import Example, Query, check_texts
from kvfold.evaluation.kept import kept_share
from kvfold.evaluation.metrics import get_metric
from kvfold.evaluation.prompting import EncodedPrompt, Prompter
from kvfold.evaluation.rows import Decoded, ReadRows, decode_rows, force_rows, inputs, pad, read
from kvfold.hf.cache import Cache
from kvfold.hf.greedy import end_tokens
from kvfold.hf.shared_prefill import prefill_many

PROTOCOLS = ("aware", "agnostic", "turns")


@dataclass(frozen=True)
class AskedContender:
    """A method at a budget (None: it has none of its own), and how to make its cache."""

    method: str
    budget: float | int | None
    make: Callable[[], Cache]


@dataclass
class Outcome:
    """What one contender made of one example; `error` where it failed."""

    example: int
    contender: int
    measured: dict[str, Any] = field(default_factory=dict)
    queries: list[dict[str, Any]] = field(default_factory=list)
    timing: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The part of a record that is not its key."""
        if self.error is not None:
            return {"error": self.error}
        scores = [value for query in self.queries for value in query["scores"].values()]
        if not all(map(math.isfinite, scores)):
            return {"error": f"a score is not finite: {scores}"}
        return {**self.measured, "queries": self.queries, "timing": self.timing}


class Asker:
    """Puts examples to caches of one model. `compress="prefill"`: methods decide about prompts alone."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, *, window: int, chat: bool = True, compress: str = "both"
    ):
        self.model, self.tokenizer, self.compress = model, tokenizer, compress
        self.prompter = Prompter(tokenizer, window, chat)
        self.ends = end_tokens(model)
        self.fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def ask(self, batch: Sequence[Example], protocol: str, contenders: Sequence[AskedContender]) -> list[Outcome]:
        """An outcome for each contender (outer) and example (inner), in order. `contenders[0]` must be `full`.

        What fails is an outcome with an error, and the others go on; an example that can't be encoded fails alone.
        """
        outcomes = [Outcome(e, c) for c in range(len(contenders)) for e in range(len(batch))]
        prompts: dict[int, EncodedPrompt] = {}
        for e, example in enumerate(batch):
            try:
                check_texts(example)
                prompts[e] = self.prompter.prompt(example, turns=protocol == "turns")
            except Exception as error:
                for outcome in outcomes[e :: len(batch)]:
                    _failed(outcome, error)
        if prompts:
            mine = [outcome for outcome in outcomes if outcome.example in prompts]
            self._ask([batch[e] for e in prompts], list(prompts.values()), protocol, contenders, mine)
        return outcomes

    def _ask(
        self, batch: Sequence[Example], prompts: Sequence[EncodedPrompt], protocol: str,
        contenders: Sequence[AskedContender], outcomes: list[Outcome],
    ) -> None:  # fmt: skip
        """Fill the outcomes, [contender][example], of examples with their prompts."""
        try:
            rounds = list(_rounds(batch, prompts, protocol))
        except Exception as error:
            for outcome in outcomes:
                _failed(outcome, error)
            return
        for number, asked in enumerate(rounds):
            self._round(batch, asked, number, contenders, outcomes)
        for i, outcome in enumerate(outcomes):
            if cut := prompts[i % len(prompts)].cut:
                outcome.measured["cut_tokens"] = cut

    def _round(
        self, batch: Sequence[Example], asked: "Round", number: int, contenders: Sequence[AskedContender],
        outcomes: list[Outcome],
    ) -> None:  # fmt: skip
        """One shared prefill, and all that is answered from it.

        A cache that reads in its own way, or in chunks, reads by itself, and so does each where the shared pass
        failed: whose fault it was shows then.
        """
        ids, new = pad(asked.prompts, self.fill)
        made = [self._made(contender) for contender in contenders]
        sharing = [cache for cache in made if isinstance(cache, Cache) and cache.shares_prefill]
        start, truth, logits = self._now(), Truth(), None
        try:
            if sharing:
                given = inputs(self.model, ids, new)
                logits = prefill_many(self.model, given, sharing, logits_to_keep=1)[:, -1].float()
        except Exception:
            made = [self._made(contender) for contender in contenders]
        shared = (self._now() - start) / len(new)
        for c, cache in enumerate(made):
            mine = [outcomes[c * len(batch) + e] for e in asked.examples]
            if any(outcome.error for outcome in mine):
                continue
            try:
                if not isinstance(cache, Cache):
                    raise cache
                if c and any(outcomes[e].error for e in asked.examples):
                    raise RuntimeError(f"the full cache failed: {outcomes[asked.examples[0]].error}")
                start = self._now()
                if cache.shares_prefill and logits is not None:
                    at, seconds = ReadRows(new.to(self.model.device), logits), {"shared_prefill_seconds": shared}
                else:
                    at = read(self.model, cache, ids, new)
                    seconds = {"prefill_seconds": (self._now() - start) / len(new)}
                if number == 0:
                    self._measure(cache, [outcomes[e] for e in asked.examples], new, mine, seconds)
                self._answer(batch, asked, cache, at, truth, mine)
            except Exception as error:
                for outcome in mine:
                    _failed(outcome, error)
            if c and isinstance(cache, Cache):  # the first is what the others are measured against
                cache.reset()

    def _made(self, contender: AskedContender) -> Cache | Exception:
        """Its cache, or why there is none: a method may not fit the model."""
        try:
            return contender.make()
        except Exception as error:
            return error

    def _now(self) -> float:
        sync(self.model.device)
        return time.perf_counter()

    def _measure(
        self, cache: Cache, full: Sequence[Outcome], new: Tensor, mine: Sequence[Outcome], seconds: dict[str, float]
    ) -> None:
        """What the cache holds right after the prompt; bytes are a row's share of the batch.

        `full`: the full cache's outcomes, measured before the others' (it may have answered since, and grown).
        """
        rows, shares = len(new), kept_share(cache, new.sum(1).numpy())
        counts = np.mean([core.counts().mean(1) for core in cache.paged], axis=0) if cache.paged else np.zeros(rows)
        nbytes = cache.nbytes // rows
        for row, (outcome, whole) in enumerate(zip(mine, full, strict=True)):
            outcome.measured = {
                "prompt_tokens": int(new[row].sum()), "kept_tokens": round(float(counts[row]), 3),
                "nbytes": nbytes, "full_nbytes": whole.measured.get("nbytes", nbytes), "kept": shares[row],
            }  # fmt: skip
            outcome.timing = {"prefill_seconds": None, **seconds, "decode_seconds": 0.0, "decode_tokens": 0}

    def _answer(
        self,
        batch: Sequence[Example],
        asked: "Round",
        cache: Cache,
        at: ReadRows,
        truth: "Truth",
        mine: Sequence[Outcome],
    ) -> None:
        for turn in asked.turns:
            rows = [row for row, _ in turn.queries]
            queries = [batch[asked.examples[row]].queries[j] for row, j in turn.queries]
            branch, here = cache, at
            if turn.tails is not None and turn.lasting:
                at = here = read(self.model, cache, *pad(turn.tails, self.fill), at.mask)
            if turn.branches:
                branch = cache.fork()
                if rows != list(range(len(at.logits))):
                    branch.batch_select_indices(torch.tensor(rows, dtype=torch.int64))
                    here = at.pick(rows)
            if turn.tails is not None and not turn.lasting and turn.tails[0]:
                with branch.undecided():  # the method has decided about the context, before any question
                    here = read(self.model, branch, *pad(turn.tails, self.fill), here.mask)
            with self._deciding(branch):
                if queries[0].target is not None:
                    found = self._forced(branch, here, queries, truth)
                else:
                    found = self._generated(branch, here, queries, [mine[row] for row in rows])
            for (row, _), each in zip(turn.queries, found, strict=True):  # j comes in order, whatever the length
                mine[row].queries.append(each)
            if branch is not cache:
                branch.reset()

    def _deciding(self, cache: Cache) -> AbstractContextManager[None]:
        return cache.undecided() if self.compress == "prefill" else nullcontext()

    def _generated(
        self, cache: Cache, at: ReadRows, queries: Sequence[Query], mine: Sequence[Outcome]
    ) -> list[dict[str, Any]]:
        said: list[list[int]] = [[] for _ in queries]

        def ended(row: int, token: int) -> bool:
            said[row].append(token)
            stop = queries[row].stop
            return token in self.ends or (bool(stop) and any(text in self.tokenizer.decode(said[row]) for text in stop))

        made: Decoded = decode_rows(
            self.model, cache, at, [query.max_new_tokens for query in queries], ended,
            minima=[query.min_new_tokens for query in queries], end_tokens=self.ends | self._tokens(queries),
        )  # fmt: skip
        found = []
        for query, tokens, outcome in zip(queries, made.tokens, mine, strict=True):
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            for stop in query.stop:
                text = text.split(stop)[0]
            scores = {name: round(value, 6) for name, value in get_metric(query.metric)(text, query).items()}
            found.append({"prediction": text, "scores": scores, "tokens": len(tokens)})
            outcome.timing["decode_seconds"] += made.seconds  # of a step with all rows
            outcome.timing["decode_tokens"] += made.steps
        return found

    def _tokens(self, queries: Sequence[Query]) -> set[int]:
        """The stop texts that are a token by themselves."""
        ids = [self.tokenizer(stop, add_special_tokens=False).input_ids for query in queries for stop in query.stop]
        return {each[0] for each in ids if len(each) == 1}

    def _forced(self, cache: Cache, at: ReadRows, queries: Sequence[Query], truth: "Truth") -> list[dict[str, Any]]:
        ids = [self.prompter.tokenizer(query.target, add_special_tokens=False).input_ids for query in queries]
        counts = [len(row) for row in ids]
        targets = torch.tensor([row + [self.fill] * (max(counts) - len(row)) for row in ids], dtype=torch.int64).to(
            self.model.device
        )
        found = truth.compare(targets, counts, lambda look: force_rows(self.model, cache, at, targets, look))
        return [{"prediction": "", "scores": scores, "tokens": n} for scores, n in zip(found, counts, strict=True)]


class Truth:
    """The full cache's distributions over the forced texts: the first that comes sets them, others are compared."""

    def __init__(self) -> None:
        self._logs: list[Tensor] = []

    def compare(
        self, targets: Tensor, counts: Sequence[int], run: Callable[[Callable[[int, Tensor], None]], None]
    ) -> list[dict[str, float]]:
        """Scores of each row: mean KL(full || this), share of equal greedy tokens, nats a token of both.

        The first token comes out of the prompt's own pass, which is exact for every method: it does not count, unless
        it is the only one.
        """
        first, sums = not self._logs, torch.zeros(4, len(targets), dtype=torch.float64)

        def look(i: int, logits: Tensor) -> None:
            log = torch.log_softmax(logits.float(), -1)
            if first:
                self._logs.append(log)
            true = self._logs[i]
            here = torch.tensor([i < n and (i > 0 or n == 1) for n in counts], device=log.device, dtype=torch.bool)
            kl, same = divergence(true, log)
            nll, nll_full = (-each.gather(1, targets[:, i : i + 1])[:, 0] for each in (log, true))
            sums.add_(torch.where(here, torch.stack([kl, same, nll, nll_full]), 0.0).double().cpu())

        run(look)
        scores = []
        for row, n in enumerate(counts):
            counted = max(n - 1, 1)
            named = zip(("kl", "top1", "nll", "nll_full"), (sums[:, row] / counted).tolist(), strict=True)
            scores.append({name: float(f"{value:.6g}") for name, value in named} | {"tokens": counted})
        return scores


@dataclass(frozen=True)
class AnswerTurn:
    """Queries answered side by side: `queries` are (row, index of the query), one for each row that answers.

    `tails`: what is read before they answer (None: nothing), in the cache itself (`lasting`) or in the branch that
    answers. `branches`: whether the cache goes on without what is answered here.
    """

    queries: list[tuple[int, int]]
    tails: list[list[int]] | None = None
    lasting: bool = False
    branches: bool = True


@dataclass(frozen=True)
class Round:
    """A prefill of `prompts`, one row for each of `examples` (indices of the batch), and the turns after it."""

    examples: list[int]
    prompts: list[list[int]]
    turns: list[AnswerTurn]


def _rounds(batch: Sequence[Example], prompts: Sequence[EncodedPrompt], protocol: str) -> Iterator[Round]:
    """What is read and asked, in order, for one protocol. Raises ValueError where it does not fit the examples."""
    everyone = list(range(len(batch)))
    if protocol == "agnostic":
        # Tails of one length are read together: padding within a text would count in a sliding window.
        sizes = sorted({(j, len(tail)) for prompt in prompts for j, tail in enumerate(prompt.tails)})
        turns = []
        for j, size in sizes:
            rows = [row for row in everyone if j < len(prompts[row].tails) and len(prompts[row].tails[j]) == size]
            turns.append(AnswerTurn([(row, j) for row in rows], [prompts[row].tails[j] for row in rows]))
        yield Round(everyone, [prompt.head for prompt in prompts], turns)
    elif protocol == "turns":
        count = len(prompts[0].tails)
        if any(len(prompt.tails) != count for prompt in prompts):
            raise ValueError("protocol='turns': the examples of a batch must have the same number of queries")
        turns = [AnswerTurn([(row, 0) for row in everyone], branches=count > 1)]
        turns += [
            AnswerTurn([(row, j) for row in everyone], [prompt.turns[j] for prompt in prompts], lasting=True,
                 branches=j + 1 < count)
            for j in range(1, count)
        ]  # fmt: skip
        yield Round(everyone, [prompt.whole[0] for prompt in prompts], turns)
    else:
        for j in range(max(len(prompt.tails) for prompt in prompts)):
            rows = [row for row in everyone if j < len(prompts[row].tails)]
            here = AnswerTurn([(row, j) for row in range(len(rows))], branches=False)
            yield Round(rows, [prompts[row].whole[j] for row in rows], [here])


def _failed(outcome: Outcome, error: Exception) -> Outcome:
    outcome.error = f"{type(error).__name__}: {error}"
    return outcome
