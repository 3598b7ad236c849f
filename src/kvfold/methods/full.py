"""Full: keep every token; the yardstick."""

from dataclasses import dataclass

from kvfold.methods.base import Method, method


@method("full", title="Full cache", kind="none")
@dataclass(frozen=True)
class Full(Method):
    """Every token, on pages: what all other methods are measured against."""
