"""What runs as it is written, inside a compiled forward too: a graph breaks there."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def eager(run: F) -> F:
    """A function that torch.compile does not look into. Uncompiled it costs a question, as `disable` would not."""
    outside = torch.compiler.disable(run)  # type: ignore[no-untyped-call]

    @wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return outside(*args, **kwargs) if torch.compiler.is_compiling() else run(*args, **kwargs)

    # Dynamo knows frames by their code: one that all of these share would be compiled anew for each, up to a limit.
    named: Any = wrapped
    named.__code__ = named.__code__.replace(co_name=f"eager_{run.__name__}")
    return wrapped  # type: ignore[return-value]
