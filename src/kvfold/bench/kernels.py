"""Decode attention over pages, beside torch's SDPA on the same tokens and beside a plain read of memory; also over
other formats of the same tokens.

A model's layers follow each other, so that a layer's keys and values have left every cache before they are read again.
Here as many copies of the same shape take their place: a pass goes through all of them, and its seconds are divided
by their number.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvfold.bench.machine import ReadRate, Spread, spread, timed
from kvfold.formats import POSITION, Chunk, Dense, Format, Segment, Spec

NAMES = {"kvfold": "kvfold", "sdpa": "torch SDPA"}
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
    """One contender on one case. Seconds are those of one call; rates count the bytes of the tokens kept alone.

    `of_bandwidth` is the rate over the plain read's, `cost_per_token` a ragged case's seconds for each token kept
    over the full-length case's (1.0: cost in proportion to the tokens kept), `max_error` the largest difference
    from SDPA's answer. A format's bytes are all that it holds for the tokens, and its error is from SDPA over that.
    """

    case: Case
    contender: str
    ragged: bool
    tokens: int
    kv_bytes: int
    copies: int
    seconds: Spread
    bytes_per_second: float
    bound_seconds: float
    of_bandwidth: float
    of_sdpa: float
    cost_per_token: float | None
    max_error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self) | self.case.to_dict()


@dataclass(frozen=True)
class _Layer:
    """One copy: the segment, the dense tensors, and which of their tokens are kept (None: all)."""

    q: Tensor
    segment: Segment
    keys: Tensor
    values: Tensor
    mask: Tensor | None
    formats: Mapping[str, Segment] = field(default_factory=dict)

    def ask(self, contender: str) -> Tensor:
        """(B, H * G, 1, D)."""
        if contender == "sdpa":
            return self.sdpa()
        return self.kvfold(self.formats.get(contender, self.segment))

    def kvfold(self, segment: Segment) -> Tensor:
        """As the library asks."""
        b, h = self.keys.shape[:2]
        q, scale = self.q.view(b, h, -1, 1, self.q.shape[-1]), self.q.shape[-1] ** -0.5
        return segment.attend(q, scale, read=None, compact=None, weights=False)[0].view(self.q.shape)

    def sdpa(self) -> Tensor:
        """The same by torch, which has no lengths: a mask leaves tokens out, and they are read all the same."""
        return scaled_dot_product_attention(self.q, self.keys, self.values, attn_mask=self.mask, enable_gqa=True)


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

    def opened(form: Format) -> Segment:
        segment = form.open(Spec.of(chunk))
        segment.append(chunk, even=lengths is None)
        return segment

    mask = None if lengths is None else valid.repeat_interleave(case.group, 1)[:, :, None]
    return _Layer(q, opened(Dense()), keys, values, mask, {name: opened(form) for name, form in formats.items()})


def _sdpa_over(segment: Segment, q: Tensor) -> Tensor:
    """SDPA over what a segment holds."""
    tokens = segment.dense()
    mask = tokens.valid.repeat_interleave(q.shape[1] // tokens.keys.shape[1], 1)[:, :, None]
    return scaled_dot_product_attention(q, tokens.keys, tokens.values, attn_mask=mask, enable_gqa=True)


class _Contest:
    """The copies of one case, full-length or ragged, and what its contenders took."""

    def __init__(
        self, case: Case, ragged: bool, device: torch.device, working_set: int, seed: int, formats: Mapping[str, Format]
    ):
        self.case, self.ragged, self.device = case, ragged, device
        lengths = draw_lengths(case, seed) if ragged else None
        self.tokens = case.batch * case.kv_heads * case.context if lengths is None else int(lengths.sum())
        self.kv_bytes = self.tokens * case.token_bytes
        self.copies = max(1, ceil(working_set / self.kv_bytes))
        first = _layer(case, lengths, device, seed, formats)
        # Copies hold the same numbers: what differs is where they lie.
        self.layers = [first, *(self._twin(first, formats) for _ in range(self.copies - 1))]
        dense = self._check(first, "kvfold", first.sdpa())
        self.errors = {"kvfold": dense, "sdpa": dense}
        self.nbytes = {"kvfold": self.kv_bytes, "sdpa": self.kv_bytes}
        for name, segment in first.formats.items():
            self.errors[name] = self._check(first, name, _sdpa_over(segment, first.q))
            self.nbytes[name] = int(segment.row_nbytes().sum())
        self.taken: dict[str, list[float]] = {name: [] for name in self.nbytes}

    @staticmethod
    def _twin(layer: _Layer, formats: Mapping[str, Format]) -> _Layer:
        table = layer.segment.dense()
        segment = Dense().open(Spec.of(table))
        segment.append(table, even=layer.mask is None)
        copied = {name: form.restore(Spec.of(table), *layer.formats[name].state()) for name, form in formats.items()}
        return _Layer(layer.q, segment, layer.keys.clone(), layer.values.clone(), layer.mask, copied)

    def _check(self, layer: _Layer, contender: str, answer: Tensor) -> float:
        truth = answer.float()
        error = float((layer.ask(contender).float() - truth).abs().max())
        limit = TOLERANCE[getattr(torch, self.case.dtype)] * max(1.0, float(truth.abs().max()))
        if not error <= limit:
            raise RuntimeError(
                f"{self.case}: {contender}'s answer lies {error:.2g} from SDPA's, more than {limit:.2g}; not timed"
            )
        return error

    def play(self, contender: str, keep: bool = True) -> None:
        def work() -> None:
            for layer in self.layers:
                layer.ask(contender)

        seconds = timed(work, self.device) / self.copies
        if keep:
            self.taken[contender].append(seconds)


def measure_kernels(
    cases: Sequence[Case], *, formats: Mapping[str, Format] | None = None, ragged: bool = False,
    device: torch.device | None = None, rounds: int = 15, rate: ReadRate | None = None,
    working_set: int | None = None, seed: int = 0, tick: Callable[[str], None] = lambda _: None,
) -> tuple[list[KernelRow], ReadRate]:  # fmt: skip
    """Rows for every case, two contenders and `formats` by name, and the read bandwidth between the rounds of all.

    In a round every contender has one turn (kvfold, SDPA, formats, and all once more on ragged lengths). Raises
    RuntimeError where one and SDPA disagree, before they are timed.
    """
    on = device or torch.device("cpu")
    rate = rate or ReadRate(on)
    size = WORKING_SET if working_set is None else working_set
    done: list[list[_Contest]] = []
    for case in cases:
        what = f"{case.dtype}, {case.context} tokens, batch {case.batch}"
        tick(f"{what}: filling pages")
        contests = [
            _Contest(case, kind, on, size, seed, formats or {}) for kind in ((False, True) if ragged else (False,))
        ]
        for turn in range(rounds + 1):  # the first warms up
            tick(f"{what}: round {turn} of {rounds}")
            for contest in contests:
                for name in contest.taken:
                    contest.play(name, keep=turn > 0)
            if turn:
                rate.sample()
        for contest in contests:
            contest.layers = []  # the numbers stay, the pages go
        done.append(contests)
    bandwidth = rate.bytes_per_second
    return [row for contests in done for each in contests for row in _rows(each, contests[0], bandwidth)], rate


def _rows(contest: _Contest, full: _Contest, bandwidth: float) -> list[KernelRow]:
    medians = {name: spread(seconds) for name, seconds in contest.taken.items()}
    rows = []
    for name, seconds in medians.items():
        whole = spread(full.taken[name]).median / full.tokens
        nbytes = contest.nbytes[name]
        rate = nbytes / seconds.median
        rows.append(
            KernelRow(
                case=contest.case, contender=name, ragged=contest.ragged, tokens=contest.tokens,
                kv_bytes=nbytes, copies=contest.copies, seconds=seconds, bytes_per_second=rate,
                bound_seconds=nbytes / bandwidth, of_bandwidth=rate / bandwidth,
                of_sdpa=medians["sdpa"].median / seconds.median,
                cost_per_token=seconds.median / contest.tokens / whole if contest.ragged else None,
                max_error=contest.errors[name],
            )
        )  # fmt: skip
    return rows
