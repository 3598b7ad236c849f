"""How well methods that read few of their tokens choose them: one table for all, on real documents.

    python benchmarks/reading.py --model smollm2-135m-instruct --data ../shared/data --docs 10 \\
        --methods 'quest(budget=0.12);tokenselect(budget=0.12)' --out build/reading-smollm2

Protocol: a document's first `--context` tokens are read by all methods in one exact pass; its next `--tokens` are fed
one by one, and every next-token distribution is compared with the full cache's: mean KL(full || method) in nats, and
the share of equal greedy tokens. At the first `--watched` of these steps each choice is compared with the truth: of the
tokens that a query head reads in a layer, `recall` is the share that is among as many with the largest exact attention,
and `attention` what share of it they have; means over heads, layers that choose, and steps.

`read` is what a step reads of those layers, the index and the units that each KV head's lists name (those of several
query heads each for itself), over what is stored there; `index` what the index takes of it. Milliseconds are of a step
of one row, over those that nobody watches, and `of full` those of the full cache in the same run over them.
Intervals: bootstrap over documents. `--out` is a folder to go on in.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import mean, median
from typing import Any

import torch
from long_runs import Contender, RunFolder, arguments, contenders, load, long_documents, told, write_table
from torch import Tensor

import kvfold
from kvfold.evaluation.agreement import agreement
from kvfold.evaluation.escaping import code_cell
from kvfold.evaluation.forced import fed
from kvfold.evaluation.statistics import bootstrap_interval
from kvfold.formats import LOG_MASS, IndexedSegment
from kvfold.hf.shared_prefill import prefill_many

FULL = "full"


class Watch:
    """What choices were worth: recall and share of attention of each (layer, step), and bytes read of those stored."""

    def __init__(self) -> None:
        self.recall, self.attention, self.read, self.stored = list[float](), list[float](), 0, 0

    def see(self, segment: IndexedSegment, q: Tensor, scale: float) -> None:
        """A query that is about to attend: what is chosen for it, beside what it would attend to."""
        selection, tokens = segment.form.selection, segment.inner.dense()
        chosen, _ = selection.choose(segment.index, q[:, :, :, 0], segment.counts(), segment.seen, segment.choice)
        logits = (q[:, :, :, 0].float() @ tokens.keys.float().mT) * scale
        if LOG_MASS in tokens.columns:
            logits = logits + tokens.columns[LOG_MASS][:, :, None]
        true = logits.masked_fill(~tokens.valid[:, :, None], -torch.inf).softmax(-1)
        if chosen is None:
            read = tokens.valid[:, :, None].expand(*true.shape[:2], 1, -1)
        else:
            number = ((tokens.valid.cumsum(-1) - 1).clamp(min=0) // selection.unit).clamp(max=chosen.shape[-1] - 1)
            units = torch.from_numpy(chosen).to(true.device)
            wide = number[:, :, None].expand(*units.shape[:3], -1)
            read = units.gather(-1, wide) & tokens.valid[:, :, None]
        each = tokens.keys.shape[-1] * tokens.keys.itemsize + tokens.values.shape[-1] * tokens.values.itemsize
        self.read += int(read.sum()) * each + segment.index.nbytes
        self.stored += int(tokens.valid.sum()) * each
        mine = read.expand(true.shape) if read.shape[2] == 1 else read
        count = mine.sum(-1)
        order = torch.argsort(true, dim=-1, descending=True, stable=True)
        first = torch.arange(true.shape[-1], device=true.device) < count[..., None]
        found = (mine.gather(-1, order) & first).sum(-1) / count.clamp(min=1)
        self.recall.append(float(found.mean()))
        self.attention.append(float((true * mine).sum(-1).mean()))


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Every choice of any cache is looked at."""
    plain = IndexedSegment.attend_few

    def seen(self: IndexedSegment, q: Tensor, scale: float, *, weights: bool = False) -> Any:
        watch.see(self, q, scale)
        return plain(self, q, scale, weights=weights)

    IndexedSegment.attend_few = seen  # type: ignore[method-assign]
    try:
        yield
    finally:
        IndexedSegment.attend_few = plain  # type: ignore[method-assign]


def index_bytes(cache: kvfold.Cache) -> tuple[int, int]:
    """Bytes of all indexes, and of all that the layers hold which have one."""
    found = [segment for core in cache.paged for _, segment in core.segments if isinstance(segment, IndexedSegment)]
    return sum(segment.index.nbytes for segment in found), sum(segment.nbytes for segment in found)


def measure(model: Any, ran: Sequence[Contender], ids: Tensor, context: int, looked: int) -> dict[str, dict[str, Any]]:
    """A record for each contender, over one document (T,), in one prefill."""
    caches = [kvfold.Cache(model, one.method) for one in ran]
    prefill_many(model, {"input_ids": ids[None, :context].to(model.device)}, caches, logits_to_keep=1)
    records, rest = dict[str, dict[str, Any]](), ids[None, context:]
    full: Tensor | None = None
    for one, cache in zip(ran, caches, strict=True):
        watch, logits, seconds = Watch(), [], list[float]()
        with watched(watch):
            logits += [step.logits[0] for step in fed(model, cache, rest[:, :looked])]
        for step in fed(model, cache, rest[:, looked:]):
            logits.append(step.logits[0])
            seconds.append(step.seconds)
        said = torch.stack(logits).float()
        full = said if full is None else full
        found = agreement(full, said)
        index, held = index_bytes(cache)
        records[one.key] = {
            "kl": found.kl, "top1": found.top1, "ms": 1e3 * median(seconds), "index": index, "held": held,
            "recall": mean(watch.recall) if watch.recall else None,
            "attention": mean(watch.attention) if watch.attention else None,
            "read": watch.read / watch.stored if watch.stored else 1.0, "nbytes": cache.nbytes,
        }  # fmt: skip
        cache.reset()
    return records


def shown(values: Sequence[float], digits: int = 3) -> str:
    """Mean and 95 % interval."""
    low, high = bootstrap_interval(list(values))
    return f"{mean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def report(kept: RunFolder, ran: Sequence[Contender], docs: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Summary by contender, and the table, over these documents."""
    lines = [
        "| method | documents | KL [95 %] | equal greedy tokens | recall | attention | read | index | ms a step "
        "| of full |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    summary: dict[str, Any] = {}
    whole = {one["document"]: one["ms"] for each in ran if each.name == FULL for one in kept.of(each, docs)}
    for one in ran:
        if not (found := kept.of(one, docs)):
            continue
        s = summary[one.key] = {
            name: mean(each[name] for each in found) for name in ("kl", "top1", "ms", "read", "index", "held", "nbytes")
        }
        s["documents"] = len(found)
        s["of_full"] = median(whole[each["document"]] / each["ms"] for each in found) if whole else None
        chose = [each for each in found if each["recall"] is not None]
        for name in ("recall", "attention"):
            s[name] = mean(each[name] for each in chose) if chose else None
        share = s["index"] / (s["held"] - s["index"]) if s["held"] else 0.0
        cells = [
            code_cell(one.name), f"{s['documents']}", shown([each["kl"] for each in found], 4), f"{s['top1']:.3f}",
            *("-" if s[name] is None else f"{s[name]:.3f}" for name in ("recall", "attention")),
            f"{s['read']:.3f}", f"{share:.3f}", f"{s['ms']:.1f}",
            "-" if s["of_full"] is None else f"{s['of_full']:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return summary, "\n".join(lines) + "\n"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--methods", default="quest(budget=0.12);tokenselect(budget=0.12)", help="by semicolons")
    parser.add_argument("--docs", type=int, default=10)
    parser.add_argument("--context", type=int, default=6144)
    parser.add_argument("--tokens", type=int, default=48, help="fed one by one")
    parser.add_argument("--watched", type=int, default=16, help="of them, whose choices are looked at")
    args = parser.parse_args()
    if not 0 < args.watched < args.tokens:
        parser.error(f"--watched={args.watched} must be between 1 and --tokens={args.tokens}, without it")
    model, tokenizer = load(args)
    docs = long_documents(tokenizer, args.data, args.context + args.tokens, args.docs)
    about = {name: getattr(args, name) for name in ("model", "dtype", "context", "tokens", "watched", "device")}
    kept, names = RunFolder(args.out, about, "document"), [name for name, _ in docs]
    ran, started = contenders(f"{FULL};{args.methods}", args.budgets), time.perf_counter()
    for number, (name, ids) in enumerate(docs, 1):
        missing = [one for one in ran if kept.missing(one, [name])]
        if not missing:
            continue
        asked = [ran[0], *(one for one in missing if one is not ran[0])]  # the truth is worked out again
        for key, record in measure(model, asked, ids, args.context, args.watched).items():
            one = next(each for each in asked if each.key == key)
            kept.add(one, [{"document": name, **record}])
        told(f"{number}/{len(docs)} {name} ({time.perf_counter() - started:.0f} s)")
    summary, table = report(kept, ran, names)
    write_table(args.out, summary, table)
    print(f"{args.model}, {args.dtype}, {args.context} tokens read, {args.tokens} fed one by one\n\n{table}", end="")


if __name__ == "__main__":
    main()
