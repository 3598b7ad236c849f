"""Operations: each folder has `naive.py` (the definition, in float32) and faster versions, chosen by `dispatch`."""

from kvfold.ops.attend import attend, merge
from kvfold.ops.prefill import causal, causal_rows
from kvfold.ops.scores import column_sums, window_attention

__all__ = ["attend", "causal", "causal_rows", "column_sums", "merge", "window_attention"]
