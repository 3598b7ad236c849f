"""Values of few tokens, of every format that can be read in parts."""

import pytest
import torch
from format_cases import FORMATS, G, chunk, query, spec_of
from torch.testing import assert_close

from kvfold.formats import Indexed
from kvfold.selectors import Heaviest, Unremembered, Vote

TOLD = {"balanced", "separable", "thin", "uneven"}
"""Formats that are told of their rows; an index takes none of them."""


@pytest.mark.parametrize("name", sorted(n for n, f in FORMATS.items() if n not in TOLD and not isinstance(f, Indexed)))
@pytest.mark.parametrize("mass", [False, True])
def test_what_is_read_is_what_the_format_gives(name, mass):
    """Codes, floats of 8 bits, bases: by the weights that the format gives, masses in them."""
    form, given = FORMATS[name], chunk([[41, 17], [9, 30], [9, 40]], mass=mass)
    held = Indexed(form, Heaviest(Unremembered(1), 8, Vote("sum"))).open(spec_of(given, group=G))
    held.append(given)
    out, lse, left = held.attend_few(query(), 0.3, weights=True)
    _, norm, weights = held.attend(query(), 0.3, weights=True)
    worth = weights.sum((2, 3)).masked_fill(~held.columns()[0], -torch.inf)
    best = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, worth.topk(8).indices, True)[:, :, None, None]
    assert_close(left, weights * best)
    assert_close(lse, norm)
    want = (weights * best) @ held.dense().values.float()[:, :, None]
    assert_close(out.float(), want, atol=2e-2 if name == "bf16" else 1e-5, rtol=0)
