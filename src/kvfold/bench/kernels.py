"""Decode attention over pages, beside torch's SDPA on the same tokens and beside plain reads of memory; also over
other formats of the same tokens.

A model's layers follow each other, so that a layer's keys and values have left every cache before they are read again.
Here as many copies of the same shape take their place: a pass goes through all of them, and its seconds are divided
by their number.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvfold.bench.arithmetic import ArithmeticRate
from kvfold.bench.beside import BusyLoops
from kvfold.bench.machine import ReadRate, Spread, spread, timed
from kvfold.formats import POSITION, Chunk, Dense, Format, Segment, Spec
from kvfold.formats.dense import DenseSegment
from kvfold.ops.cpu import library, threads

KINDS = ("in order", "scattered", "ragged")
"""How the pages of a case lie, side by side or in any order; ragged rows have theirs side by side, too."""
WORKING_SET = 2**28
"""Bytes of keys and values that a pass goes through at least, so that none of them comes from a cache."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""How far the two answers may lie apart, over the larger of 1 and the largest number; compared before any timing."""


@dataclass(frozen=True)
class Case:
    """A shape: B rows of H KV heads with G query heads each, T tokens of D numbers. `dtype` as torch names it."""

    context: int
    batch: int
    kv_heads: int
    group: int
    head_dim: int
    dtype: str

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one KV head."""
        return 2 * self.head_dim * int(getattr(torch, self.dtype).itemsize)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class KernelRow:
    """One contender (kvfold, read, sdpa) on one case. Seconds are of one call; rates count the tokens' bytes alone.

    `of_bandwidth` is the rate over that of the plain read of a large array, `of_read` over a plain read of the same
    pages in the same order, which the contender "read" is. `arithmetic_seconds` is the time that widening and
    multiplying takes where nothing waits for memory. `cost_per_token` is a ragged case's seconds for each token kept
    over the full-length case's (1.0: cost in proportion to the tokens kept), `max_error` the largest difference from
    SDPA's answer. `beside_seconds` are those beside busy programs, `keeps` the share of its own speed that is left.
    A format's bytes are all that it holds for the tokens, and its error is from SDPA over that.
    """

    case: Case
    contender: str
    kind: str
    tokens: int
    kv_bytes: int
    copies: int
    seconds: Spread
    bytes_per_second: float
    bound_seconds: float
    arithmetic_seconds: float | None
    of_bandwidth: float
    of_read: float | None
    of_sdpa: float
    cost_per_token: float | None
    max_error: float | None
    beside_seconds: Spread | None
    keeps: float | None

    @property
    def label(self) -> str:
        """The contender as tables and charts name it."""
        if self.contender not in ("kvfold", "read"):
            name = "torch SDPA" if self.contender == "sdpa" else self.contender
            return name + (", ragged" if self.kind == "ragged" else "")
        name = "plain read" if self.contender == "read" else "kvfold"
        return f"{name}, {self.kind}" if self.kind == "ragged" else f"{name}, pages {self.kind}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self) | self.case.to_dict()


@dataclass(frozen=True)
class _Layer:
    """One copy: the segment, the dense tensors, and which of their tokens are kept (None: all)."""

    q: Tensor
    segment: DenseSegment
    keys: Tensor
    values: Tensor
    mask: Tensor | None
    formats: Mapping[str, Segment] = field(default_factory=dict)

    def ask(self, contender: str) -> Tensor | int:
        """(B, H * G, 1, D); of a plain read its sum."""
        if contender == "sdpa":
            return self.sdpa()
        if contender == "read":
            return self.read()
        return self.kvfold(self.formats.get(contender, self.segment))

    def kvfold(self, segment: Segment) -> Tensor:
        """As the library asks."""
        b, h = self.keys.shape[:2]
        q, scale = self.q.view(b, h, -1, 1, self.q.shape[-1]), self.q.shape[-1] ** -0.5
        return segment.attend(q, scale, read=None, compact=None, weights=False)[0].view(self.q.shape)

    def sdpa(self) -> Tensor:
        """The same by torch, which has no lengths: a mask leaves tokens out, and they are read all the same."""
        return scaled_dot_product_attention(self.q, self.keys, self.values, attn_mask=self.mask, enable_gqa=True)

    def read(self) -> int:
        """The sum of all that lies on its pages, in the order in which attention reads them: a plain read of those."""
        table, kernels = self.segment.table, library()
        assert kernels is not None
        keys, values = (table.pool.array(name) for name in ("keys", "values"))
        total: int = kernels.read_pages(keys, values, table.table, table.lengths, table.pool.page_size, threads())
        return total


def scatter(segment: DenseSegment, seed: int) -> None:
    """Exchange the pages of all rows at random: none lies behind the one that is read before it, but by chance."""
    table, pool = segment.table, segment.table.pool
    old = table.held.astype(np.int64)
    new = old[torch.randperm(len(old), generator=torch.Generator().manual_seed(seed)).numpy()]
    source, target = (torch.from_numpy(pages).to(pool.device) for pages in (old, new))
    for plane in pool.planes.values():
        plane[target] = plane[source]
    place = np.arange(pool.pages, dtype=np.int32)
    place[old] = new
    table.table = np.where(table.table >= 0, place[table.table], np.int32(-1)).astype(np.int32)
    table.regular = False


def draw_lengths(case: Case, seed: int = 0) -> Tensor:
    """Tokens that each (row, KV head) keeps, (B, H): uniformly between 10 % and 100 % of the context."""
    shape, generator = (case.batch, case.kv_heads), torch.Generator().manual_seed(seed)
    return torch.randint(max(1, ceil(case.context / 10)), case.context + 1, shape, generator=generator)


def _layer(
    case: Case, lengths: Tensor | None, device: torch.device, seed: int, formats: Mapping[str, Format]
) -> _Layer:
    generator = torch.Generator().manual_seed(seed)
    b, h, t, d = case.batch, case.kv_heads, case.context, case.head_dim
    dtype = getattr(torch, case.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(device, dtype)

    q, keys, values = draw(b, h * case.group, 1, d), draw(b, h, t, d), draw(b, h, t, d)
    valid = torch.ones(b, h, t, dtype=torch.bool, device=device)
    if lengths is not None:
        valid = torch.arange(t, device=device) < lengths.to(device)[..., None]
    positions = torch.arange(t, dtype=torch.int32, device=device).expand(b, h, t)
    chunk = Chunk(keys, values, valid, {POSITION: positions})

    dense = Dense().open(Spec.of(chunk))
    others = {name: form.open(Spec.of(chunk)) for name, form in formats.items()}
    for segment in (dense, *others.values()):
        segment.append(chunk, even=lengths is None)
    mask = None if lengths is None else valid.repeat_interleave(case.group, 1)[:, :, None]
    return _Layer(q, dense, keys, values, mask, others)


def _sdpa_over(segment: Segment, q: Tensor) -> Tensor:
    """SDPA over what a segment holds."""
    tokens = segment.dense()
    mask = tokens.valid.repeat_interleave(q.shape[1] // tokens.keys.shape[1], 1)[:, :, None]
    return scaled_dot_product_attention(q, tokens.keys, tokens.values, attn_mask=mask, enable_gqa=True)


class _Contest:
    """The copies of one case, of one of KINDS, and what its contenders took. `formats` lie as they are opened."""

    def __init__(
        self, case: Case, kind: str, device: torch.device, working_set: int, seed: int, formats: Mapping[str, Format]
    ):
        self.case, self.kind, self.device, self.seed = case, kind, device, seed
        lengths = draw_lengths(case, seed) if kind == "ragged" else None
        self.tokens = case.batch * case.kv_heads * case.context if lengths is None else int(lengths.sum())
        self.kv_bytes = self.tokens * case.token_bytes
        self.copies = max(1, ceil(working_set / self.kv_bytes))
        formats = {} if kind == "scattered" else formats
        first = _layer(case, lengths, device, seed, formats)
        if kind == "scattered":
            scatter(first.segment, seed)
        # Copies hold the same numbers: what differs is where they lie.
        self.layers = [first, *(self._twin(first, formats, number) for number in range(1, self.copies))]
        reads = ["read"] if device.type == "cpu" and library() is not None else []
        dense = [] if kind == "scattered" else ["sdpa"]  # it has no pages: how they lie is nothing to it
        error = self._check(first, "kvfold", first.sdpa())
        self.errors: dict[str, float | None] = {"kvfold": error, "read": None, "sdpa": error}
        self.nbytes = dict.fromkeys(["kvfold", *reads, *dense], self.kv_bytes)
        for name, segment in first.formats.items():
            self.errors[name] = self._check(first, name, _sdpa_over(segment, first.q))
            self.nbytes[name] = int(segment.row_nbytes().sum())
        self.taken: dict[str, list[float]] = {name: [] for name in self.nbytes}
        self.beside: dict[str, list[float]] = {name: [] for name in self.taken}

    def _twin(self, layer: _Layer, formats: Mapping[str, Format], number: int) -> _Layer:
        table = layer.segment.dense()
        segment = Dense().open(Spec.of(table))
        segment.append(table, even=layer.mask is None)
        if self.kind == "scattered":
            scatter(segment, self.seed + number)
            return _Layer(layer.q, segment, layer.keys, layer.values, layer.mask)
        copied = {name: form.restore(Spec.of(table), *layer.formats[name].state()) for name, form in formats.items()}
        return _Layer(layer.q, segment, layer.keys.clone(), layer.values.clone(), layer.mask, copied)

    def _check(self, layer: _Layer, contender: str, answer: Tensor) -> float:
        truth = answer.float()
        error = float((layer.kvfold(layer.formats.get(contender, layer.segment)).float() - truth).abs().max())
        limit = TOLERANCE[getattr(torch, self.case.dtype)] * max(1.0, float(truth.abs().max()))
        if not error <= limit:
            raise RuntimeError(
                f"{self.case}: {contender}'s answer lies {error:.2g} from SDPA's, more than {limit:.2g}; not timed"
            )
        return error

    def play(self, contender: str) -> float:
        """Seconds of a call."""

        def work() -> None:
            for layer in self.layers:
                layer.ask(contender)

        return timed(work, self.device) / self.copies


def measure_kernels(
    cases: Sequence[Case], *, kinds: Sequence[str] = KINDS[:2], formats: Mapping[str, Format] | None = None,
    device: torch.device | None = None, rounds: int = 15, rate: ReadRate | None = None,
    working_set: int | None = None, seed: int = 0, loops: BusyLoops | None = None,
    tick: Callable[[str], None] = lambda _: None,
) -> tuple[list[KernelRow], ReadRate, ArithmeticRate]:  # fmt: skip
    """Rows for every case, kind and format by name, and what memory and cores can do between the rounds of all of them.

    In a round every contender has one turn on each of `kinds` (of KINDS, "in order" first), and another one while
    `loops` are busy. Raises RuntimeError where one and SDPA disagree, before they are timed.
    """
    on = device or torch.device("cpu")
    rate = rate or ReadRate(on)
    wanted = list(dict.fromkeys((case.dtype, case.group) for case in cases))
    cores = ArithmeticRate(wanted if on.type == "cpu" else [])
    size = WORKING_SET if working_set is None else working_set
    done: list[list[_Contest]] = []
    for case in cases:
        what = f"{case.dtype}, {case.context} tokens, batch {case.batch}"
        tick(f"{what}: filling pages")
        contests = [_Contest(case, kind, on, size, seed, formats or {}) for kind in kinds]
        for turn in range(rounds + 1):  # the first warms up
            tick(f"{what}: round {turn} of {rounds}")
            turns = [(contest, name) for contest in contests for name in contest.taken]
            for contest, name in turns:
                seconds = contest.play(name)
                if turn:
                    contest.taken[name].append(seconds)
            if turn:
                rate.sample()
                cores.sample()
            if turn and loops is not None:
                with loops.running():
                    for contest, name in turns:
                        contest.beside[name].append(contest.play(name))
        for contest in contests:
            contest.layers = []  # the numbers stay, the pages go
        done.append(contests)
    rows = [row for contests in done for each in contests for row in _rows(each, contests[0], rate, cores)]
    return rows, rate, cores


def _rows(contest: _Contest, full: _Contest, memory: ReadRate, cores: ArithmeticRate) -> list[KernelRow]:
    medians = {name: spread(seconds) for name, seconds in contest.taken.items()}
    sdpa = medians.get("sdpa") or spread(full.taken["sdpa"])
    case, bandwidth, rows = contest.case, memory.bytes_per_second, []
    numbers = 2 * contest.tokens * case.head_dim
    widening = numbers / cores.of(case.dtype, case.group).numbers_per_second if cores.taken else None
    for name, seconds in medians.items():
        whole = spread(full.taken[name]).median / full.tokens
        nbytes = contest.nbytes[name]
        rate = nbytes / seconds.median
        beside = spread(contest.beside[name]) if contest.beside[name] else None
        floats = name in ("kvfold", "sdpa")
        rows.append(
            KernelRow(
                case=case, contender=name, kind=contest.kind, tokens=contest.tokens,
                kv_bytes=nbytes, copies=contest.copies, seconds=seconds, bytes_per_second=rate,
                bound_seconds=nbytes / bandwidth, of_bandwidth=rate / bandwidth,
                arithmetic_seconds=widening if floats else None,
                of_read=medians["read"].median / seconds.median if "read" in medians else None,
                of_sdpa=sdpa.median / seconds.median,
                cost_per_token=seconds.median / contest.tokens / whole if contest.kind == "ragged" else None,
                max_error=contest.errors[name],
                beside_seconds=beside, keeps=None if beside is None else seconds.median / beside.median,
            )
        )  # fmt: skip
    return rows
