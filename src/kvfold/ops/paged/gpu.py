"""Operations on pages with Triton kernels on CUDA, where they fit; the definition for the rest.

Lengths live on the device too, where the kernel that appends moves them on: with `full` and methods that act on prompts
alone a step waits for nothing. Methods that drop tokens while decoding do: `keep_pages` on CUDA is the definition.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from kvfold.ops.cpu import FLOATS
from kvfold.ops.dispatch import register
from kvfold.ops.paged import naive

WIDEST = 256
"""The largest head size whose tiles fit."""


def fits(x: Tensor) -> bool:
    """Whether the kernels can take it: on CUDA, with Triton installed, no gradient wanted."""
    return x.device.type == "cuda" and x.dtype in FLOATS and not x.requires_grad and find_spec("triton") is not None


@register("attend_pages", "triton", rank=20, fits=fits)
def attend_pages(
    q: Tensor, table: Any, scale: float, *,
    mass: str | None, read: Tensor | None, compact: Any, position: str, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    (b, h, g, n, d), planes = q.shape, table.pool.planes
    dv = planes["values"].shape[-1]
    if read is not None or compact is not None or g * n > 64 or max(d, dv) > WIDEST or not table.longest:
        return naive.attend_pages(
            q, table, scale, mass=mass, read=read, compact=compact, position=position, weights=weights
        )
    from kvfold.ops.paged import triton_kernels

    pages, lengths, holes, hole_count = table.on_device()
    holed = {"holes": holes, "hole_count": hole_count} if table.holed else {}
    out, lse, probabilities = triton_kernels.attend(
        q.reshape(b * h, g * n, d), planes["keys"], planes["values"], pages, lengths, scale,
        mass=None if mass is None else planes[mass], probabilities=weights, **holed,
    )  # fmt: skip
    if probabilities is not None:
        probabilities = probabilities[..., : table.longest].reshape(b, h, g, n, table.longest)
    return out.view(b, h, g, n, dv), lse.view(b, h, g, n), probabilities


@register("step_pages", "triton", rank=20, fits=fits)
def step_pages(
    q: Tensor, table: Any, planes: Mapping[str, Tensor], scale: float, *, mass: str | None, weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    pool = table.pool
    if pool.shared:  # they are copied first
        return naive.step_pages(q, table, planes, scale, mass=mass, weights=weights)
    from kvfold.ops.paged import triton_kernels

    pages, lengths, *_ = table.step()
    new = {name: plane[:, 0].to(table.pool.planes[name].dtype) for name, plane in planes.items()}
    fills = {name: spec.fill for name, spec in table.pool.specs.items()}
    triton_kernels.append(table.pool.planes, new, pages, lengths, fills=fills)
    return attend_pages(
        q, table, scale, mass=mass, read=None, compact=None, position="position", weights=weights
    )  # fmt: skip
