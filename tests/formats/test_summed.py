"""Summed: what a file says of a state is checked, and whose states can lie side by side."""

import numpy as np
import pytest
import torch

from folding import DV, B, D, H, maps_by_name, random_chunk, segment_of
from kvfold.formats import Spec, Summed


@pytest.mark.parametrize(("options", "message"), [
    ({"maps": "shipped:x", "layer": 0}, r"maps='shipped:x' must be 16 hex digits"),
    ({"maps": "0" * 16, "layer": -1}, r"layer=-1 must be an int >= 0"),
])  # fmt: skip
def test_bad_options_of_the_format_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Summed(**options)


@pytest.mark.parametrize(("change", "message"), [
    (lambda said, x: said.update(counts=[[1, 0], [0, 0]]), "must be 0: no token is held"),
    (lambda said, x: said.update(upto=[[31, 0], [0, 0]]), r"must be no more than the tokens read, \[30, 30\]"),
    (lambda said, x: said.update(upto=[[-1, 0], [0, 0]]), r"must be 2 x 2 ints >= 0"),
    (lambda said, x: x.pop("mass"), "mass=None must be"),
    (lambda said, x: x.update(sums=x["sums"][:, :1]), "sums=.* must be"),
    (lambda said, x: x.update(sums=x["sums"].half()), "sums=.* must be"),
    (lambda said, x: x.update(sums=x["sums"] / 0), "must be finite"),
    (lambda said, x: x.update(mass=x["mass"] - 99), "mass must be no less than 0"),
    (lambda said, x: x.update(more=x["mass"]), "more=.* must be"),
])  # fmt: skip
def test_what_a_file_says_is_checked(change, message):
    segment = segment_of(maps_by_name())
    segment.append(random_chunk(30))
    spec = Spec(B, H, D, DV, torch.float32, torch.device("cpu"))
    said, state = segment.state()
    again = segment.form.restore(spec, said, dict(state))
    assert torch.equal(again.sums, segment.sums) and again.upto.tolist() == segment.upto.tolist()
    change(said, state)
    with pytest.raises(ValueError, match=message):
        segment.form.check(spec, said, state, np.array([30, 30]))


def test_segments_of_other_maps_do_not_join_and_layers_of_others_are_refused():
    one, other = segment_of(maps_by_name()), segment_of(maps_by_name(seed=1))
    with pytest.raises(ValueError, match="must be of format Summed"):
        one.join(other)
    with pytest.raises(ValueError, match=r"are of 2 KV heads with keys of 16; layer 0 has 1 with keys of 16"):
        one.form.open(Spec(1, 1, D, DV, torch.float32, torch.device("cpu")))
    with pytest.raises(ValueError, match=r"layer=4 must be one of the 1 that maps="):
        Summed(one.form.maps, 4).open(Spec(1, H, D, DV, torch.float32, torch.device("cpu")))
    with pytest.raises(NotImplementedError, match="graphs=False"):
        one.reserve()
    with pytest.raises(ValueError, match=r"slots=.* must be -1"):
        one.amend(torch.zeros(B, H, 1, dtype=torch.int64), None, None)
