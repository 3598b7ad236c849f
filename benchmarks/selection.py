"""What a step costs that reads few of its tokens: a layer's append, index, choice and attention beside dense pages.

    python benchmarks/selection.py --methods "quest(budget=1024);quest(budget=1024,group='max')" --contexts 16384,65536

Random keys and values in the segments of some layers (the heads are SmolLM2's unless told), one token appended and
attended at a time, as a decode step does it; dense pages and methods take turns in one run, and the ratio is the median
over rounds of dense time over the method's. `bound` is dense bytes over the bytes that the method must read (index and
units), each query head's own where those have units of their own: no ratio can be above it for that. Everything is
counted; nothing is left out of a step. `index`, `choice` and `reading` are the parts of a further step that is done one
part after the other, where one operation may do all of them at once: what it remembers of the new token and what each
unit is worth, which are the best, and all the rest. So they add up to more than `ms`.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvfold.bench.machine import describe
from kvfold.evaluation.compare import split_names
from kvfold.formats import POSITION, Chooser, Chunk, IndexedSegment, Segment, Spec
from kvfold.formats.indexed import choices_seen
from kvfold.hf.rope import find_ropes
from kvfold.layer.layer import DENSE, format_of
from kvfold.methods import parse
from kvfold.rotation import Rope
from kvfold.views import Site

LAYER = 5


def rope(size: int) -> Rope:
    """How a Llama turns keys of so many numbers."""
    config = LlamaConfig(
        hidden_size=size, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1, intermediate_size=size,
        vocab_size=8, max_position_embeddings=1 << 17,
    )  # fmt: skip
    return find_ropes(LlamaForCausalLM(config))[0]


def filled(form: Any, spec: Spec, tokens: int) -> Segment:
    """A segment with so many random tokens."""
    rng = torch.Generator().manual_seed(0)
    shape = spec.rows, spec.heads, tokens
    keys, values = (torch.randn(*shape, spec.key_size, generator=rng).to(spec.dtype) for _ in range(2))
    places = torch.arange(tokens, dtype=torch.int32).expand(shape)
    segment: Segment = form.open(spec)
    segment.append(Chunk(keys, values, torch.ones(shape, dtype=torch.bool), {POSITION: places}), even=True)
    return segment


def step(segments: list[Segment], spec: Spec, group: int, place: int) -> float:
    """Seconds of one decode step of a layer, the mean of these."""
    b, h, d = spec.rows, spec.heads, spec.key_size
    asked = torch.randn(len(segments), b, h, group, 1, d, dtype=spec.dtype)
    new = torch.randn(2, len(segments), b, h, 1, d, dtype=spec.dtype)
    positions = torch.full((b, 1), place, dtype=torch.int32)
    start = perf_counter()
    for segment, q, k, v in zip(segments, asked, *new, strict=True):
        segment.step(q, k, v, positions, 0.125, weights=False)
    return (perf_counter() - start) / len(segments)


class Parts:
    """Seconds that a layer's index and choice took since they were last asked for, the mean of all segments."""

    def __init__(self, segments: list[IndexedSegment]):
        self.seconds, self.layers = {"index": 0.0, "scores": 0.0, "choice": 0.0}, len(segments)
        for segment in segments:
            for name, part in (("extend", "index"), ("asks", "scores"), ("scores", "scores")):
                setattr(segment.index, name, partial(self._timed, getattr(segment.index, name), part))
        chooser = segments[0].form.selection  # that of all of them
        object.__setattr__(chooser, "choose", partial(self._timed, chooser.choose, "choice"))

    def _timed(self, run: Any, part: str, *given: Any, **more: Any) -> Any:
        start = perf_counter()
        found = run(*given, **more)
        self.seconds[part] += perf_counter() - start
        return found

    def taken(self) -> dict[str, float]:
        """By part; the choice asks the index, whose time is not its own."""
        found = {part: seconds / self.layers for part, seconds in self.seconds.items()}
        scores = found.pop("scores")
        found["index"], found["choice"] = found["index"] + scores, found["choice"] - scores
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="quest(budget=1024);quest(budget=1024,group='max')", help="by semicolons")
    parser.add_argument("--contexts", default="16384,65536")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=3, help="KV heads")
    parser.add_argument("--group", type=int, default=3, help="query heads of each")
    parser.add_argument("--size", type=int, default=64, help="numbers of a head")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--layers", type=int, default=4, help="of a step, which turn the same positions")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dtype: torch.dtype = getattr(torch, args.dtype)
    device = torch.device("cpu")
    spec = Spec(
        args.batch, args.heads, args.size, args.size, dtype, device, LAYER, rope=rope(args.size), group=args.group
    )
    site = Site(LAYER, LAYER, tuple(range(30)), 30)
    methods = [name for text in args.methods.split(";") for name in split_names(text)]
    machine = describe(spec.device)
    heads = f"{args.batch} rows, {args.heads} x {args.group} heads of {args.size}"
    print(f"{machine['cpu']}, {machine['threads']} threads; {heads}, {args.dtype}\n")
    print("| tokens | method | ms | dense ms | dense over it | bound | index | choice | reading | index bytes |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = []
    for context in map(int, args.contexts.split(",")):
        dense = [filled(DENSE, spec, context) for _ in range(args.layers)]
        for name in methods:
            form = format_of(parse(name), site)
            segments = [filled(form, spec, context) for _ in range(args.layers)]
            segment = segments[0]
            if not isinstance(segment, IndexedSegment) or not isinstance(segment.form.selection, Chooser):
                parser.error(f"methods={name!r} has no index in layer {LAYER}")
            parts, times = Parts(segments), []
            for number in range(args.rounds):
                place = context + 2 * number
                pair = step(dense, spec, args.group, place), step(segments, spec, args.group, place)
                parts.taken()
                with choices_seen(lambda *given: None):
                    apart = step(segments, spec, args.group, place + 1)
                times.append((*pair, {**parts.taken(), "apart": apart}))
            times = times[1:]  # the first makes room
            mine, other = median(x[1] for x in times), median(x[0] for x in times)
            index, choice, apart = (median(x[2][part] for x in times) for part in ("index", "choice", "apart"))
            read = segment.form.selection.room(segment.seen)[0] * segment.form.selection.unit
            chooser = segment.form.selection
            vote = getattr(chooser, "selection", chooser).vote  # of the heads that choose, where some do
            lists = vote.lists(args.group)
            token = 2 * args.size * dtype.itemsize
            held = args.batch * args.heads * token
            bound = held * context / (segment.index.nbytes + held * read * lists)
            row = {
                "tokens": context, "method": name, "ms": 1e3 * mine, "dense_ms": 1e3 * other,
                "ratio": median(x[0] / x[1] for x in times), "bound": bound, "index_ms": 1e3 * index,
                "choice_ms": 1e3 * choice, "reading_ms": 1e3 * (apart - index - choice),
                "index_bytes": segment.index.nbytes,
            }  # fmt: skip
            rows.append(row)
            print(
                f"| {context:,} | `{name}` | {row['ms']:.3f} | {row['dense_ms']:.3f} | {row['ratio']:.2f} | "
                f"{bound:.2f} | "
                f"{row['index_ms']:.3f} | {row['choice_ms']:.3f} | {row['reading_ms']:.3f} | {row['index_bytes']:,} |",
                flush=True,
            )
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
