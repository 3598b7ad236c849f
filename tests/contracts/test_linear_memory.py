"""What a method makes at the end of a prompt, layer by layer, grows as the prompt does: no tensor is tokens by tokens.

Tensors of torch are seen; buffers inside the compiled kernels are not.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kvfold
from calibrated import SMALL
from families import LIMITED, each
from kvfold.methods.base import decided
from kvfold.ops import dispatch
from kvfold.ops.alike import naive
from kvfold.views import fade_of
from views import random_view

AFTER = [
    info.slug
    for info in kvfold.list_methods()
    if info.slug in LIMITED and info.cls().listens("after_prefill") and "calibration" not in info.options
]


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.most = max([self.most, *found])
        return out


@each(AFTER)
def test_no_tensor_is_tokens_by_tokens(slug):
    assert_linear(slug)


@each([info.slug for info in kvfold.list_methods() if info.slug in AFTER and info.kind == "merge"])
def test_nor_without_the_kernels_of_the_cpu(slug, monkeypatch):
    monkeypatch.setattr(naive, "BLOCK_ELEMENTS", 1 << 14)
    with dispatch.use("blocked"):  # as devices without kernels run: column sums in blocks, the rest by its definition
        assert_linear(slug)


def assert_linear(slug: str) -> None:
    most = []
    for total in (512, 2048):
        view = random_view(B=1, H=2, G=2, T=total, D=8, seed=1)
        method = kvfold.parse(slug, **SMALL.get(slug, {}))
        fade = fade_of(method.asks)
        if fade is not None:
            with dispatch.use("cpu"):  # the pass leaves them; their definition is tokens by tokens
                view.column_sums(fade)
        with Largest() as seen:
            for decision in decided(method.after_prefill(view)):
                view = view.apply(decision)
            view.keys, view.values  # noqa: B018  (made when somebody looks)
        most.append(seen.most)
    assert most[1] <= 4.5 * most[0], most
