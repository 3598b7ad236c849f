"""Decode attention over pages, beside torch's SDPA on the same tokens and beside a plain read of memory.

A model's layers follow each other, so that a layer's keys and values have left every cache before they are read again.
Here as many copies of the same shape take their place: a pass goes through all of them, and its seconds are divided
by their number.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvfold.bench.machine import ReadRate, Spread, spread, timed
from kvfold.formats import POSITION, Chunk, Dense, Segment, Spec

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
    from SDPA's answer.
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

    def kvfold(self) -> Tensor:
        """(B, H * G, 1, D), as the library asks."""
        b, h = self.keys.shape[:2]
        q, scale = self.q.view(b, h, -1, 1, self.q.shape[-1]), self.q.shape[-1] ** -0.5
        return self.segment.attend(q, scale, read=None, compact=None, weights=False)[0].view(self.q.shape)

    def sdpa(self) -> Tensor:
        """The same by torch, which has no lengths: a mask leaves tokens out, and they are read all the same."""
        return scaled_dot_product_attention(self.q, self.keys, self.values, attn_mask=self.mask, enable_gqa=True)


def draw_lengths(case: Case, seed: int = 0) -> Tensor:
    """Tokens that each (row, KV head) keeps, (B, H): uniformly between 10 % and 100 % of the context."""
    shape, generator = (case.batch, case.kv_heads), torch.Generator().manual_seed(seed)
    return torch.randint(max(1, ceil(case.context / 10)), case.context + 1, shape, generator=generator)


def _layer(case: Case, lengths: Tensor | None, device: torch.device, seed: int) -> _Layer:
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
    segment = Dense().open(Spec.of(chunk))
    segment.append(chunk, even=lengths is None)
    mask = None if lengths is None else valid.repeat_interleave(case.group, 1)[:, :, None]
    return _Layer(q, segment, keys, values, mask)


class _Contest:
    """The copies of one case, full-length or ragged, and what its two contenders took."""

    def __init__(self, case: Case, ragged: bool, device: torch.device, working_set: int, seed: int):
        self.case, self.ragged, self.device = case, ragged, device
        lengths = draw_lengths(case, seed) if ragged else None
        self.tokens = case.batch * case.kv_heads * case.context if lengths is None else int(lengths.sum())
        self.kv_bytes = self.tokens * case.token_bytes
        self.copies = max(1, ceil(working_set / self.kv_bytes))
        first = _layer(case, lengths, device, seed)
        # Copies hold the same numbers: what differs is where they lie.
        self.layers = [first, *(self._twin(first) for _ in range(self.copies - 1))]
        self.error = self._check(first)
        self.taken: dict[str, list[float]] = {"kvfold": [], "sdpa": []}

    @staticmethod
    def _twin(layer: _Layer) -> _Layer:
        table = layer.segment.dense()
        segment = Dense().open(Spec.of(table))
        segment.append(table, even=layer.mask is None)
        return _Layer(layer.q, segment, layer.keys.clone(), layer.values.clone(), layer.mask)

    def _check(self, layer: _Layer) -> float:
        truth = layer.sdpa().float()
        error = float((layer.kvfold().float() - truth).abs().max())
        limit = TOLERANCE[getattr(torch, self.case.dtype)] * max(1.0, float(truth.abs().max()))
        if not error <= limit:
            raise RuntimeError(
                f"{self.case}: kvfold's answer lies {error:.2g} from SDPA's, which is more than {limit:.2g}; not timed"
            )
        return error

    def play(self, contender: str, keep: bool = True) -> None:
        calls: list[Callable[[], Tensor]] = [getattr(layer, contender) for layer in self.layers]

        def work() -> None:
            for call in calls:
                call()

        seconds = timed(work, self.device) / self.copies
        if keep:
            self.taken[contender].append(seconds)


def measure_kernels(
    cases: Sequence[Case], *, ragged: bool = False, device: torch.device | None = None, rounds: int = 15,
    rate: ReadRate | None = None, working_set: int | None = None, seed: int = 0,
    tick: Callable[[str], None] = lambda _: None,
) -> tuple[list[KernelRow], ReadRate]:  # fmt: skip
    """Rows for every case, two contenders each, and the read bandwidth between the rounds of all of them.

    In a round every contender has one turn (kvfold, SDPA, and both once more on ragged lengths). Raises RuntimeError
    where the two disagree, before they are timed.
    """
    on = device or torch.device("cpu")
    rate = rate or ReadRate(on)
    size = WORKING_SET if working_set is None else working_set
    done: list[list[_Contest]] = []
    for case in cases:
        what = f"{case.dtype}, {case.context} tokens, batch {case.batch}"
        tick(f"{what}: filling pages")
        contests = [_Contest(case, kind, on, size, seed) for kind in ((False, True) if ragged else (False,))]
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
        rate = contest.kv_bytes / seconds.median
        rows.append(
            KernelRow(
                case=contest.case, contender=name, ragged=contest.ragged, tokens=contest.tokens,
                kv_bytes=contest.kv_bytes, copies=contest.copies, seconds=seconds, bytes_per_second=rate,
                bound_seconds=contest.kv_bytes / bandwidth, of_bandwidth=rate / bandwidth,
                of_sdpa=medians["sdpa"].median / seconds.median,
                cost_per_token=seconds.median / contest.tokens / whole if contest.ragged else None,
                max_error=contest.error,
            )
        )  # fmt: skip
    return rows
