"""Which methods the contract tests run for, and what some of them may do that others may not."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import pytest

import kvfold
from kvfold.methods.base import keeping

METHODS = [info.slug for info in kvfold.list_methods()]
LIMITED = [
    info.slug
    for info in kvfold.list_methods()
    if keeping([kvfold.parse(info.slug)])
    and not kvfold.parse(info.slug).listens("read_order")
    and "images" not in kvfold.parse(info.slug).asks
]
"""Those whose budget is about what is stored of any text; of those that choose what is read, `specpc` has one about
that, those with an index about what a query reads, and `look-m` leaves a text without images as it is
(tests/hf/test_vision.py)."""
CORE = {"adakv", "cake", "full", "h2o", "kvmerger", "kvzip", "mpcache", "snapkv", "streamingllm", "tova"}
"""One for each mechanism; the fast tests run for these, all tests for all."""
FREE = {"tova", "expected-attention", "epicache", "keydiff", "knorm"}
"""By their papers the newest token competes like the others."""
ANYWHERE = {"kvzip", "epicache"}
"""One threshold for all heads of a layer, or of all layers: a rounding may move a token from one to another."""


def each(slugs: Iterable[str], cases: int = 1, **axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrise a test by `slug` and by the names of `axes`.

    `cases` combinations of a method are its turn: an axis' values one after the other, so that over the methods, or
    over the cases, each comes up. CORE has all combinations, its turns fast and the others slow; all others have
    their turns, slow.
    """
    params = []
    for i, slug in enumerate(slugs):
        turns = [
            tuple(axis[(case + i * step) % len(axis)] for step, axis in enumerate(axes.values(), 1))
            for case in range(cases)
        ]
        for point in product(*axes.values()) if slug in CORE else turns:
            marks = () if slug in CORE and point in turns else (pytest.mark.slow,)
            params.append(pytest.param(slug, *point, marks=marks, id="-".join(map(str, (slug, *point)))))
    return pytest.mark.parametrize(("slug", *axes), params)
