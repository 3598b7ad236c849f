"""Operations: each folder has `naive.py` (the definition, in float32) and faster versions, chosen by `dispatch`."""

from kvfold.ops.alike import most_alike
from kvfold.ops.attend import attend, merge
from kvfold.ops.choose import top_lists, top_mask
from kvfold.ops.codes import attend_codes
from kvfold.ops.float8 import attend_float8
from kvfold.ops.linear import linear
from kvfold.ops.paged import append_pages, attend_pages, keep_pages, step_pages
from kvfold.ops.prefill import causal, causal_admitted, causal_rows
from kvfold.ops.scores import column_sums, window_attention
from kvfold.ops.sparse import attend_sparse
from kvfold.ops.tokens import attend_tokens
from kvfold.ops.turn import turn
from kvfold.ops.units import (
    attend_units,
    bound_scores,
    choose_units,
    key_scores,
    list_pages,
    list_slots,
    raise_bounds,
    step_keys,
    step_units,
    steps_keys,
    vote_units,
)

__all__ = [
    "append_pages",
    "attend",
    "attend_codes",
    "attend_float8",
    "attend_pages",
    "attend_sparse",
    "attend_tokens",
    "attend_units",
    "bound_scores",
    "causal",
    "causal_admitted",
    "causal_rows",
    "choose_units",
    "column_sums",
    "keep_pages",
    "key_scores",
    "linear",
    "list_pages",
    "list_slots",
    "merge",
    "most_alike",
    "raise_bounds",
    "step_keys",
    "step_pages",
    "step_units",
    "steps_keys",
    "top_lists",
    "top_mask",
    "turn",
    "vote_units",
    "window_attention",
]
