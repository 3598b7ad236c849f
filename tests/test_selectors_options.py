"""What parts of a selection are given is checked where they are made, and named."""

import pytest

from kvfold.selectors import (
    Alike,
    Always,
    Bounds,
    Corners,
    Every,
    Gives,
    Hierarchical,
    Keys,
    Lasting,
    Means,
    Odd,
    Places,
    Products,
    Proportions,
    Representatives,
    Selection,
    SomeHeads,
    Stretches,
    Unremembered,
    Vote,
    WindowMeans,
)
from test_selectors import FORM, FORMS


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 0}, "budget=0"), ({"least": 0}, "least=0"),
        ({"far": -1}, "far=-1"), ({"far": 4, "slots": True}, "far=4 says where keys stand"),
        ({"lasting": Lasting()}, r"lasting=Lasting\(.* needs an index that knows what lasts"),
        ({"odd": Odd(1)}, r"odd=Odd\(.* needs an index that knows which units it stands for badly"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        Selection(Bounds(4), **{"budget": 4, **options})


@pytest.mark.parametrize(
    ("part", "options", "said"),
    [
        (Vote, {"heads": "all"}, "heads='all'"), (Vote, {"pool": 0}, "pool=0"),
        (Vote, {"layer": True}, "layer=True lets all heads read the same"), (Always, {"sinks": -1}, "sinks=-1"),
        (Always, {"recent": -5}, "recent=-5"), (Always, {"share": 1.5}, "share=1.5"),
        (Every, {"steps": 0}, "steps=0"),
        (Alike, {"cosine": -2.0}, "cosine=-2"), (Keys, {"distance": -1}, "distance=-1"),
        (Bounds, {"unit": 0}, "unit=0"), (Means, {"unit": 0}, "unit=0"), (Odd, {"units": -1}, "units=-1"),
        (Odd, {"share": 2.0}, "share=2"), (Representatives, {"unit": 0}, "unit=0"),
        (Representatives, {"number": 0}, "number=0"), (Representatives, {"distance": -1}, "distance=-1"),
        (Hierarchical, {"unit": 0}, "unit=0"),
        (Hierarchical, {"logical": 24}, "logical=24 must divide unit=64"),
        (WindowMeans, {"unit": 0}, "unit=0"),
        (WindowMeans, {"stride": 24}, "stride=24 must divide unit=64 and window=32"),
        (WindowMeans, {"window": 24}, "stride=16 must divide unit=64 and window=24"),
        (Lasting, {"query": 1.5}, "query=1.5"),
        (Unremembered, {"unit": 0}, "unit=0"),
        (SomeHeads, {"selection": FORM.selection, "heads": ()}, "a bool for each KV head"),
        (SomeHeads, {"selection": FORMS["keys"].selection, "heads": (True,)}, "is of all heads together"),
        (Gives, {"layer": 0, "selection": FORM.selection}, "must go by nothing that is remembered"),
        (Gives, {"layer": -1, "selection": Selection(Unremembered(4), 8)}, "layer=-1"),
        (Corners, {"unit": 0}, "unit=0"), (Corners, {"parts": 0}, "parts=0"), (Corners, {"alpha": 1.5}, "alpha=1.5"),
        (Places, {"unit": 0}, "unit=0"), (Stretches, {"layer": -1, "corners": Corners()}, "layer=-1"),
        (Stretches, {"layer": 0, "corners": Corners(), "ratio": 2.0}, "ratio=2.0"),
        (Stretches, {"layer": 0, "corners": Corners(), "coarse": -1.0}, "coarse=-1.0"),
        (Products, {"parts": 0}, "parts=0"), (Products, {"bits": 9}, "bits=9"), (Products, {"sinks": -1}, "sinks=-1"),
        (Products, {"iterations": 0}, "iterations=0"), (Products, {"seed": -1}, "seed=-1"),
        (Proportions, {"recent": 1.5}, "recent=1.5"),
        (Proportions, {"sinks": -1}, "sinks=-1"),
        (Proportions, {"most": 2.0}, "most=2"),
    ],
)  # fmt: skip
def test_bad_options_of_parts_are_named(part, options, said):
    with pytest.raises(ValueError, match=said):
        part(**options)
