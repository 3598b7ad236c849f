"""Tokens in codes: one by one, in parts or at once, bit for bit the same."""

from itertools import pairwise

import pytest
import torch
from format_cases import FORMATS, opened

from kvfold.formats import LOG_MASS, POSITION, Chunk, Rotated


@pytest.mark.parametrize(
    "form",
    [
        FORMATS["balanced"], FORMATS["separable"], FORMATS["rotated"], Rotated(3, 2), Rotated(2, 2, "unit"),
        FORMATS["rotated-basis"], Rotated(3, 2, "aligned", key="known"),
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("sizes", [(16, 8), (16, 16)], ids=str)
def test_streaming_gives_the_codes_of_one_shot(form, sizes):
    rng = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(3, 2, 50, size, generator=rng) for size in sizes)
    positions = torch.arange(50, dtype=torch.int32).expand(3, 2, 50)
    found = []
    for parts in ([50], [1] * 50, [7, 20, 1, 22]):
        ends, segment = torch.tensor([0, *parts]).cumsum(0).tolist(), None
        for start, stop in pairwise(ends):
            columns = {POSITION: positions[..., start:stop], LOG_MASS: torch.zeros(3, 2, stop - start)}
            valid = torch.ones(3, 2, stop - start, dtype=torch.bool)
            some = Chunk(keys[:, :, start:stop], values[:, :, start:stop], valid, columns)
            if segment is None:
                segment = opened(form, some)
            else:
                segment.append(some, even=stop - start == 1)
        found.append(segment.state())
    for said, planes in found[1:]:
        assert said == found[0][0] and planes.keys() == found[0][1].keys()
        assert all(
            torch.equal(plane.view(torch.uint8), found[0][1][name].view(torch.uint8)) for name, plane in planes.items()
        )
