"""What the rows of a batch have read, once for all layers: tokens, prompts, columns, and whose rows they are."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.layer.plan import Group, Part, Plan
from kvfold.methods.base import Method

EMPTY = np.zeros(0, dtype=np.int64)
Ends = Callable[[], Bool[Tensor, " V"] | None]
"""With which tokens of a model's vocabulary a sentence ends; None: that is not known."""


@dataclass(frozen=True)
class Mark:
    """A point in the reading of a text to which its rows can be taken back."""

    seen: np.ndarray
    prompt: np.ndarray
    width: int


class Rows:
    """The rows of a batch; every layer of a cache holds the same one.

    `seen` (B,): text tokens that each row has read, padding not counted. `prompt` (B,): how many it had read by the end
    of its last prompt. `width`: columns read, padding counted, which transformers calls the sequence length. `number`
    counts passes: a layer that has read as many has read what the rows have.
    """

    def __init__(self, method: Method, most: int | None = None, ends: Ends = lambda: None):
        self.own, self.most, self.ends = method, most, ends
        """The method of rows that no other batch brought; rows that a limit of memory was given for (None: any number);
        with which tokens a sentence ends."""
        self.clear()

    def clear(self) -> None:
        """Forget what was read, and how many rows there were."""
        self.groups: tuple[Group, ...] = (Group(self.own),)
        self.seen, self.prompt = EMPTY, EMPTY
        self.width = self.width_before = self.number = 0
        self._clock: Tensor | None = None  # `seen` on the device, (B, 1)
        self._on_time = False

    @property
    def method(self) -> Method:
        """The method that decides about all rows. Raises ValueError where rows have different ones."""
        if len(self.groups) > 1:
            raise ValueError(f"rows have {len(self.groups)} methods: {', '.join(str(g.method) for g in self.groups)}")
        return self.groups[0].method

    @property
    def batch(self) -> int:
        return len(self.seen)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is counted here."""
        rows = sum(group.rows.nbytes for group in self.groups if group.rows is not None)
        return self.seen.nbytes + self.prompt.nbytes + rows + (0 if self._clock is None else self._clock.nbytes)

    def listens(self, event: str) -> bool:
        """Whether some row's method does anything at `event`."""
        return any(group.method.listens(event) for group in self.groups)

    # -- passes ----------------------------------------------------------------------------------------------

    def begin(
        self, plan: Plan, batch: int, count: int, valid: Bool[Tensor, "B Q"] | None, device: torch.device
    ) -> None:
        """The first layer of a pass attends: from now on its tokens count. Later layers find it in `plan.number`."""
        if not self.batch:
            self.seen, self.prompt = np.zeros(batch, dtype=np.int64), np.zeros(batch, dtype=np.int64)
        plan.ones = valid is None or bool(valid.all())
        plan.valid, plan.before = None if plan.ones else valid, self.seen
        if plan.ones and count == 1:
            plan.positions = self._tick(device)
        else:
            start = torch.from_numpy(self.seen).to(device)[:, None]
            places = torch.arange(count, device=device) if plan.valid is None else _places(plan.valid)
            plan.positions, self._on_time = (start + places).to(torch.int32), False
        counts = count if plan.valid is None else plan.valid.sum(1).cpu().numpy()
        self.seen = self.seen + counts
        self.width_before, self.width = self.width, self.width + count
        if plan.prefill:
            self.prompt = self.seen.copy() if plan.prompts is None else np.where(plan.prompts, self.seen, self.prompt)
        self.number += 1
        plan.number = self.number
        self._allot(plan, count)

    def _allot(self, plan: Plan, count: int) -> None:
        """Whose events come in this pass, and what they ask of the kernels."""
        parts = [part for i, group in enumerate(self.groups) for part in _parts(i, group, plan)]
        heard = [part for part in parts if part.method.listens(part.event)]
        plan.parts = tuple(heard) if plan.listen else ()
        plan.own = bool(plan.parts) and all(part.method.own_steps for part in plan.parts)
        asking = parts if plan.observe is not None else plan.parts
        plan.asks = frozenset().union(*(part.method.asks for part in asking))
        plan.framed = any(group.method.own_frame is not None for group in self.groups)
        plan.recalls = max(group.method.period for group in self.groups) if plan.listen else 0
        if plan.recalls and len(self.groups) == 1:
            since = self.seen - self.prompt
            plan.generated = int(since[0]) if bool((since == since[0]).all()) else None
        plan.late = plan.listen and (self.listens("after_layer") or self.listens("after_forward"))
        moved = any(group.method.compact for group in self.groups)
        busy = plan.prefill or plan.defer or plan.observe is not None or moved
        asked = self.listens("label") or self.listens("stamp") or (plan.listen and self.listens("before_attend"))
        plan.step = count == 1 and plan.ones and not busy and not asked

    def turned(self, plan: Plan) -> None:
        """What looked like a draft was a further prompt."""
        plan.prefill, self.prompt = True, self.seen.copy()
        self._allot(plan, 0)

    # -- the clock -------------------------------------------------------------------------------------------

    def _tick(self, device: torch.device) -> Int[Tensor, "B 1"]:
        """Where each row's next token stands; the clock moves on where it lies, for a captured step must do so too."""
        clock = self.clock(device)
        now = clock.clone()
        clock += 1
        return now

    def clock(self, device: torch.device) -> Int[Tensor, "B 1"]:
        """Where each row's next token stands, int32, on the device."""
        clock = self._clock
        if clock is None or not self._on_time or clock.device != device:
            with torch.inference_mode(False):  # it moves on outside, too
                now = torch.from_numpy(self.seen[:, None].astype(np.int32)).to(device)
            # In its place, where it fits: a CUDA graph reads where it was captured.
            fits = clock is not None and clock.shape == now.shape and clock.device == now.device
            clock = clock.copy_(now) if clock is not None and fits else now
            self._clock, self._on_time = clock, True
        return clock

    def replayed(self) -> None:
        """A captured step ran: count its tokens here, the device has counted them."""
        self.seen = self.seen + 1
        self.width_before, self.width = self.width, self.width + 1
        self.number += 1

    # -- the cache operations --------------------------------------------------------------------------------

    def before(self, columns: int) -> np.ndarray:
        """Text tokens that each row would have read, (B,), without the last `columns`."""
        return np.maximum(self.seen - min(columns, self.width), 0)

    def drop(self, columns: int) -> None:
        """Take back the last `columns` tokens of every row."""
        columns = min(columns, self.width)
        self.seen = self.before(columns)
        self.prompt = np.minimum(self.prompt, self.seen)
        self.width -= columns
        self.width_before, self._on_time = self.width, False

    def mark(self) -> Mark:
        """Where the rows stand, for `rewind`."""
        return Mark(self.seen, self.prompt, self.width)

    def rewind(self, mark: Mark) -> None:
        """Stand there again."""
        self.seen, self.prompt, self.width, self.width_before = mark.seen, mark.prompt, mark.width, mark.width
        self._on_time = False

    def select(self, chosen: np.ndarray) -> None:
        """Row i becomes what row `chosen[i]` was; groups without rows go."""
        if len(self.groups) > 1:
            of = owners(self.groups, self.batch)[chosen]
            left = [(group, np.flatnonzero(of == i)) for i, group in enumerate(self.groups)]
            self.groups = tuple(replace(group, rows=rows) for group, rows in left if len(rows)) or self.groups[:1]
            self._merge_groups()
        self.seen, self.prompt, self._on_time = self.seen[chosen], self.prompt[chosen], False

    def join(self, other: "Rows") -> None:
        """Take the rows of another batch behind ours."""
        mine, theirs = self.batch, other.batch
        groups = [replace(g, rows=np.arange(mine) if g.rows is None else g.rows) for g in self.groups if mine]
        groups += [replace(g, rows=mine + (np.arange(theirs) if g.rows is None else g.rows)) for g in other.groups]
        self.groups = tuple(groups)
        self.seen = np.concatenate([self.seen, other.seen])
        self.prompt = np.concatenate([self.prompt, other.prompt])
        self.width = self.width_before = max(self.width, other.width)
        self._on_time = False
        self._merge_groups()

    def _merge_groups(self) -> None:
        """Groups of equal methods are one; a group that has all rows need not list them."""
        found: list[Group] = []
        for group in self.groups:
            at = next((i for i, other in enumerate(found) if other.method == group.method), None)
            if at is None or group.rows is None:
                found.append(group)
                continue
            twin = found[at]
            rows = group.rows if twin.rows is None else np.sort(np.concatenate([twin.rows, group.rows]))
            found[at] = replace(twin, rows=rows, names=twin.names | group.names)
        self.groups = tuple(found)
        if len(self.groups) == 1:
            self.groups = (replace(self.groups[0], rows=None),)

    def remember(self, group: int, names: frozenset[str]) -> None:
        """A group's method has set columns of these names."""
        known = self.groups[group]
        if not names <= known.names:
            more = replace(known, names=known.names | names)
            self.groups = (*self.groups[:group], more, *self.groups[group + 1 :])

    def fork(self) -> "Rows":
        """The same, by itself."""
        other = Rows(self.own, self.most, self.ends)
        other.groups, other.seen, other.prompt = self.groups, self.seen, self.prompt
        other.width, other.width_before, other.number = self.width, self.width, self.number
        return other


def check_most(rows: Rows, batch: int) -> None:
    """Raise ValueError where `batch` rows are more than a limit of memory was given for."""
    if rows.most is not None and batch > rows.most:
        raise ValueError(
            f"{batch} rows, and memory= was given for batch={rows.most}, which they would exceed: say how many rows "
            "there are, beams and samples counted"
        )


def owners(groups: tuple[Group, ...], batch: int) -> np.ndarray:
    """The group of each row, (B,)."""
    of = np.zeros(batch, dtype=np.int64)
    for i, group in enumerate(groups):
        of[slice(None) if group.rows is None else group.rows] = i
    return of


def _parts(number: int, group: Group, plan: Plan) -> list[Part]:
    """A group's rows by the event that comes for them."""
    if plan.prompts is None or not plan.prefill:
        return [Part(number, group.method, group.rows, "after_prefill" if plan.prefill else "after_decode")]
    rows = np.arange(len(plan.prompts)) if group.rows is None else group.rows
    reading = plan.prompts[rows]
    both = (("after_prefill", rows[reading]), ("after_decode", rows[~reading]))
    return [Part(number, group.method, some, event) for event, some in both if len(some)]


def _places(valid: Bool[Tensor, "B Q"]) -> Int[Tensor, "B Q"]:
    """The how-manieth of its row's new tokens each is; padding counts as what follows it."""
    return (valid.cumsum(1) - 1).clamp(min=0)
