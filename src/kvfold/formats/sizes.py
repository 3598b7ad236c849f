"""What a segment takes that holds so many tokens, as it counts that itself; no token has to be there."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from kvfold.formats.segment import Format, Segment, Spec, Supposing
from kvfold.formats.tokens import POSITION, Chunk

Columns = tuple[tuple[str, torch.dtype], ...]
"""Names and dtypes of columns."""


def empty_segment(form: Format, spec: Spec, columns: Columns = ()) -> Segment:
    """A segment without a token, with these columns. Raises ValueError where a format refuses the layer."""
    if isinstance(form, Supposing):
        spec = replace(spec, artefact={**form.supposed(spec), **spec.artefact})
    segment, device = form.open(spec), spec.device
    shape = (spec.rows, spec.heads, 0)
    keys, values = (torch.zeros(*shape, n, dtype=spec.dtype, device=device) for n in (spec.key_size, spec.value_size))
    none = {name: torch.zeros(shape, dtype=dtype, device=device) for name, dtype in columns}
    none[POSITION] = torch.zeros(shape, dtype=torch.int32, device=device)
    segment.append(Chunk(keys, values, torch.zeros(shape, dtype=torch.bool, device=device), none))
    return segment


@lru_cache(maxsize=16384)
def segment_bytes(form: Format, spec: Spec, tokens: tuple[int, ...], columns: Columns = ()) -> int:
    """Bytes of a segment that holds so many tokens of each head, with these columns; `spec` is of one row.

    What was measured is no part of a spec that equals another: a format's key stands for it, or it has no say in sizes.
    Raises ValueError where a format refuses the layer.
    """
    return empty_segment(form, spec, columns).nbytes_with(np.array([tokens], dtype=np.int64))


@lru_cache(maxsize=16384)
def shared_bytes(form: Format, spec: Spec, columns: Columns = ()) -> int:
    """Bytes of a segment that all of its rows share, such as a basis; `spec` is of one row.

    What two rows take more than one is a row's own. Raises ValueError where a format refuses the layer.
    """
    one, two = (
        empty_segment(form, replace(spec, rows=rows), columns).nbytes_with(np.zeros((rows, spec.heads), dtype=np.int64))
        for rows in (1, 2)
    )
    return max(0, 2 * one - two)
