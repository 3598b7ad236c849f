"""Which methods the contract tests run for, and what some of them may do that others may not."""

from collections.abc import Iterable

import pytest

import kvfold

METHODS = [info.slug for info in kvfold.list_methods()]
LIMITED = [
    info.slug
    for info in kvfold.list_methods()
    if "budget" in info.options
    and not kvfold.parse(info.slug).listens("read_order")
    and "images" not in kvfold.parse(info.slug).asks
]
"""Those whose budget is about what is stored of any text; of those that choose what is read, `specpc` has one about
that, and `look-m` leaves a text without images as it is (tests/hf/test_vision.py)."""
CORE = {"adakv", "cake", "full", "h2o", "kvmerger", "kvzip", "mpcache", "snapkv", "streamingllm", "tova"}
"""One for each mechanism; the fast tests run for these, all tests for all."""
FREE = {"tova", "expected-attention", "epicache"}
"""By their papers the newest token competes like the others."""
ANYWHERE = {"kvzip", "epicache"}
"""One threshold for all heads of a layer, or of all layers: a rounding may move a token from one to another."""


def each(slugs: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrise a test by `slug`."""
    marked = [slug if slug in CORE else pytest.param(slug, marks=pytest.mark.slow) for slug in slugs]
    return pytest.mark.parametrize("slug", marked)
