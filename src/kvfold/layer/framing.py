"""Methods whose queries and keys attend elsewhere than where the model's rotation put them (`Method.own_frame`)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.layer.plan import Group
from kvfold.methods.base import Method
from kvfold.views import Site


def entered(
    states: Sequence[Float[Tensor, "B _ Q D"]], positions: Int[Tensor, "B Q"], groups: Sequence[Group], site: Site
) -> list[Float[Tensor, "B _ Q D"]]:
    """Queries and keys at these positions of the text as they attend: each row's as its own method has it."""
    found = list(states)
    for group in groups:
        frame = group.method.own_frame
        if frame is None:
            continue
        if group.rows is None:
            return [frame.enter(x, positions, site.ordinal, site.rope) for x in found]
        rows = torch.from_numpy(group.rows).to(positions.device)
        own = [frame.enter(x[rows], positions[rows], site.ordinal, site.rope) for x in found]
        found = [x.index_copy(0, rows, mine) for x, mine in zip(found, own, strict=True)]
    return found


def measured(methods: Iterable[Method], site: Site) -> dict[str, Any]:
    """What formats need of what was measured for a layer (`Spec.artefact`). ValueError where that does not fit it."""
    every = [one for method in methods for one in method.needs]
    return {one.key: one.of_layer(site.ordinal, site.rope) for one in every}
