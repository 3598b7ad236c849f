"""The compiled kernels (cpp/module.cpp). R rows (one sequence and KV head each), N likewise; arrays C-contiguous.

bfloat16 comes as uint16, float16 as int16. Raises ValueError where shapes or page numbers don't fit, before anything is
read or written, and TypeError for arrays of another dtype.
"""

import numpy as np

SHARES: int
BLOCK: int
PART: int
FEW: int
GROUP: int

def names() -> list[str]:
    """The instruction sets in use, the widest first."""

def use(name: str) -> None:
    """Use none that is wider than this one. Raises ValueError where the processor has it not."""

def workers() -> int:
    """Threads that were started in this process, beside its own."""

def attend(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    mass: np.ndarray | None,
    read: np.ndarray | None,
    table: np.ndarray,
    lengths: np.ndarray,
    holes: np.ndarray,
    hole_count: np.ndarray,
    page_size: int,
    scale: float,
    threads: int,
    out: np.ndarray,
    lse: np.ndarray,
    weights: np.ndarray | None,
) -> None:
    """q (R, G, D) over each row's tokens: out (R, G, Dv), lse (R, G), weights (R, G, T)."""

def attend_turned(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    places: np.ndarray,
    angles: np.ndarray,
    first: int,
    neighbours: bool,
    least: np.ndarray | None,
    mass: np.ndarray | None,
    table: np.ndarray,
    lengths: np.ndarray,
    holes: np.ndarray,
    hole_count: np.ndarray,
    scale: float,
    threads: int,
    out: np.ndarray,
    lse: np.ndarray,
) -> None:
    """As `attend` with pages of one token: keys stand at slots 0, 1, ... of their row, not at `places` (slots, 1); or
    there, but no further in front than least (N,) where that is no -1."""

def turn(
    x: np.ndarray, steps: np.ndarray, angles: np.ndarray, first: int, neighbours: bool, threads: int, out: np.ndarray
) -> None:
    """out, float32, as x (R, H, T, D) with channels i and half + i from `first` on, or those that are `neighbours`,
    turned by steps (R, T) times angles (half,)."""

def attend_float8(
    q: np.ndarray,
    e5m2: bool,
    keys: np.ndarray,
    values: np.ndarray,
    key_factor: np.ndarray,
    value_factor: np.ndarray,
    mass: np.ndarray | None,
    read: np.ndarray | None,
    table: np.ndarray,
    lengths: np.ndarray,
    holes: np.ndarray,
    hole_count: np.ndarray,
    page_size: int,
    scale: float,
    threads: int,
    out: np.ndarray,
    lse: np.ndarray,
    weights: np.ndarray | None,
) -> None:
    """`attend` over bytes (slots, D) that are e5m2 or e4m3, each token's times a factor (slots, 1)."""

def attend_codes(
    q: np.ndarray,
    bits: int,
    keys: np.ndarray,
    key_scale: np.ndarray,
    key_zero: np.ndarray,
    values: np.ndarray,
    value_scale: np.ndarray,
    value_zero: np.ndarray,
    mass: np.ndarray | None,
    read: np.ndarray | None,
    table: np.ndarray,
    lengths: np.ndarray,
    holes: np.ndarray,
    hole_count: np.ndarray,
    page_size: int,
    scale: float,
    threads: int,
    out: np.ndarray,
    lse: np.ndarray,
    weights: np.ndarray | None,
) -> None:
    """`attend` over codes of 2 to 8 bits (slots, W); scales and zeros of keys (pages, D), of values (slots, C)."""

def attend_sparse(
    q: np.ndarray,
    keys: np.ndarray,
    key_map: np.ndarray,
    values: np.ndarray,
    value_map: np.ndarray,
    mass: np.ndarray | None,
    read: np.ndarray | None,
    table: np.ndarray,
    lengths: np.ndarray,
    holes: np.ndarray,
    hole_count: np.ndarray,
    page_size: int,
    scale: float,
    threads: int,
    out: np.ndarray,
    lse: np.ndarray,
    weights: np.ndarray | None,
) -> None:
    """`attend` over the kept numbers of each vector (slots, K), and the bits of their channels (slots, (D + 7) / 8)."""

def attend_tokens(
    q: np.ndarray,
    key_bits: int,
    keys: np.ndarray,
    key_levels: np.ndarray | None,
    key_scale: np.ndarray,
    key_zero: np.ndarray | None,
    value_bits: int,
    values: np.ndarray,
    value_levels: np.ndarray | None,
    value_scale: np.ndarray,
    value_zero: np.ndarray | None,
    mass: np.ndarray | None,
    read: np.ndarray | None,
    table: np.ndarray,
    lengths: np.ndarray,
    holes: np.ndarray,
    hole_count: np.ndarray,
    page_size: int,
    scale: float,
    threads: int,
    out: np.ndarray,
    lse: np.ndarray,
    weights: np.ndarray | None,
) -> None:
    """`attend` over codes (slots, W) with scales of their own (slots, C): levels (2^bits,) times a scale (C = 1), or
    codes times a scale and a zero (slots, C)."""

def write(
    plane: np.ndarray, new: np.ndarray, table: np.ndarray, first: np.ndarray, stop: np.ndarray, page_size: int
) -> None:
    """Slots first[r] to stop[r] of each row become new[r, 0:]; plane (pages * page_size, W), new (R, T, W)."""

def close_gaps(
    plane: np.ndarray, mask: np.ndarray, table: np.ndarray, lengths: np.ndarray, page_size: int, threads: int
) -> None:
    """The slots that mask (R, T) marks move to the front of each row, in order."""

def punch_holes(mask: np.ndarray, lengths: np.ndarray, holes: np.ndarray, hole_count: np.ndarray) -> bool:
    """Slots that mask (R, T) does not mark become holes, where every row has room for its own; else nothing changes."""

def top_mask(scores: np.ndarray, count: np.ndarray, chosen: np.ndarray, threads: int) -> None:
    """chosen[r] marks the count[r] highest of scores[r] (R, T); ties go to the earlier one, -inf is never chosen."""

def attend_units(
    q: np.ndarray,
    held: np.ndarray,
    room: np.ndarray,
    heads: str,
    sinks: int,
    recent: int,
    keys: np.ndarray,
    values: np.ndarray,
    mass: np.ndarray | None,
    table: np.ndarray,
    lengths: np.ndarray,
    page_size: int,
    each: int,
    scale: float,
    threads: int,
    out: np.ndarray,
    lse: np.ndarray,
) -> None:
    """`bound_scores`, `choose_units`, `list_pages` and `attend` at once, over rows that begin on their first page.

    q (N, G, D), held (N, M, 2 D), room (N,) units of `each` pages that are read at most: out (N, G, Dv), lse (N, G).
    """

def step_keys(
    q: np.ndarray,
    rounds: bool,
    k: np.ndarray,
    v: np.ndarray,
    place: np.ndarray,
    held: np.ndarray,
    steps: float,
    distance: int,
    seen: np.ndarray,
    room: np.ndarray,
    first: np.ndarray,
    before: np.ndarray,
    chooses: np.ndarray,
    heads: str,
    layer: bool,
    vote_scale: float,
    slots: bool,
    angles: np.ndarray,
    channel: int,
    neighbours: bool,
    keys: np.ndarray,
    values: np.ndarray,
    places: np.ndarray,
    table: np.ndarray,
    lengths: np.ndarray,
    page_size: int,
    scale: float,
    threads: int,
    out: np.ndarray,
    lse: np.ndarray,
) -> None:
    """k, v (N, 1, D) and place (N, 1, 1) become the last token of each row, which `lengths` count already.

    held (N, room, D), bfloat16, gets its key before it turns; heads vote, those of all N / B rows of a batch row where
    `layer`, and what they choose is read: out (N, G, Dv), lse (N, G). seen, room, first, before, chooses are (B,)."""

def step_units(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    place: np.ndarray,
    held: np.ndarray,
    room: np.ndarray,
    heads: str,
    sinks: int,
    recent: int,
    keys: np.ndarray,
    values: np.ndarray,
    places: np.ndarray,
    table: np.ndarray,
    lengths: np.ndarray,
    page_size: int,
    each: int,
    scale: float,
    threads: int,
    out: np.ndarray,
    lse: np.ndarray,
) -> None:
    """k, v (N, 1, D) and place (N, 1, 1) become the last token of each row, which `lengths` count already.

    They are written to the planes and raise the bounds `held`; then `attend_units`.
    """

def raise_bounds(
    held: np.ndarray, keys: np.ndarray, valid: np.ndarray, start: np.ndarray, unit: int, threads: int
) -> None:
    """Bounds of units (N, room, 2 D) rise to hold keys (N, T, D) too; valid token i of row r is number start[r] + i."""

def bound_scores(
    q: np.ndarray, held: np.ndarray, units: np.ndarray, plain: bool, steps: float, threads: int, scores: np.ndarray
) -> None:
    """What each unit is worth by its bounds, scores (N, G, width); -inf behind the units[r] of a row.

    `plain`: by keys, held (N, M, D). In whole steps of 1 / `steps`, 0: as it is.
    """

def choose_units(
    scores: np.ndarray,
    units: np.ndarray,
    room: np.ndarray,
    heads: str,
    sinks: int,
    recent: int,
    threads: int,
    numbers: np.ndarray,
    counts: np.ndarray,
) -> None:
    """The room[r] best of units[r] units by scores (N, G, width) of each list, ascending and then -1, and how many.

    numbers (N * S, K) and counts (N * S,), where S is G for heads="each" and else 1.
    """

def vote_units(
    scores: np.ndarray,
    units: np.ndarray,
    room: np.ndarray,
    first: np.ndarray,
    before: np.ndarray,
    heads: str,
    scale: float,
    threads: int,
    numbers: np.ndarray,
    counts: np.ndarray,
) -> None:
    """As `choose_units` of scores (L, heads, N), by the "sum" or "max" of each head's softmax of `scale` times them.

    That is over the units that are not read anyhow: first[l] of them, the newest, and before[l] before it. numbers
    (L, K), counts (L,).
    """

def list_pages(
    numbers: np.ndarray,
    table: np.ndarray,
    lengths: np.ndarray,
    page_size: int,
    slots: bool,
    each: int,
    before: np.ndarray,
    listed: np.ndarray,
    list_lengths: np.ndarray,
) -> None:
    """The pages of units of `each` of them, or their slots among all of the pool, and how many slots those are.

    numbers (R * S, K) ascend, and then are -1; before[r] pages or slots lie before a row; listed (R * S, M).
    """

def causal(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    window: int,
    shares: np.ndarray,
    threads: int,
    out: np.ndarray,
    lse: np.ndarray,
    sums: np.ndarray | None,
) -> None:
    """q (N, G, Q, D) over k (N, T, D), v (N, T, Dv): query i is that of key T - Q + i, sees `window` tokens (0: all
    before it), and counts shares[i] in sums (N, SHARES, T)."""

def column_sums(
    q: np.ndarray,
    k: np.ndarray,
    lse: np.ndarray,
    bias: np.ndarray | None,
    first: np.ndarray,
    scale: float,
    threads: int,
    sums: np.ndarray,
) -> None:
    """sums (N, SHARES, T) += exp(logit - lse) of each query and key; query i sees keys 0 to first[n] + i.

    An infinite `lse` leaves its query out."""

def most_alike(
    left: np.ndarray,
    right: np.ndarray,
    left2: np.ndarray | None,
    right2: np.ndarray | None,
    asks: np.ndarray,
    there: np.ndarray,
    threads: int,
    best: np.ndarray,
    first: np.ndarray,
) -> None:
    """The highest product of each row of left (N, n, D) with one of right (N, m, D), and which; best, first (N, n)."""

def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, threads: int, out: np.ndarray) -> None:
    """out (R, N) = x (R, K) weight (N, K)' + bias (N,), for a few rows; N a multiple of 4."""

def read(x: np.ndarray, threads: int) -> float:
    """The sum of a flat array: as fast as memory can be read."""

def read_pages(
    keys: np.ndarray, values: np.ndarray, table: np.ndarray, lengths: np.ndarray, page_size: int, threads: int
) -> int:
    """The sum, modulo 2**32, of the 32-bit words of rows' pages in their order: as fast as those can be read."""

def multiply_add(x: np.ndarray, factor: float, group: int, passes: int, tasks: int, threads: int) -> float:
    """`tasks` x `passes` times x (FEW,) is widened and added times `factor` to `group` (1 to GROUP) sums; their sum."""

def chain(count: int) -> int:
    """As many operations (in eights), each of which waits for the one before: one a cycle."""

def exponential(x: np.ndarray, out: np.ndarray) -> None:
    """exp(x) for x <= 0, as the kernels work it out."""

def widen(x: np.ndarray, out: np.ndarray) -> None:
    """Floats of any kind as float32, as the kernels read them."""
