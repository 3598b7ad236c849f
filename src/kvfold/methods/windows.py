"""What sliding-window layers hold, in a format: codes in a ring, read as they lie."""

from dataclasses import dataclass
from functools import cached_property

from kvfold.formats import Format
from kvfold.formats.oldest import unit_of
from kvfold.methods.base import Method, method
from kvfold.methods.events import EVENTS
from kvfold.methods.registry import parse


@method(
    "windows", title="Sliding windows in a format", kind="quantize",
    options={"form": "the method in whose format they hold their tokens, as text"},
)  # fmt: skip
@dataclass(frozen=True)
class Windows(Method):
    """Sliding-window layers, which no method decides about, hold their tokens in a format: "kvfold | windows".

    With a small budget elsewhere they hold most of a hybrid model's bytes. What a call of the model reads is attended
    to as it is and stored when the call is over; codes are made once, and a page of them goes when all its tokens have
    left the window. A model without such layers, or with no others, is left as it is. What assisted decoding may take
    back stays as the model made it until it can't. Of no paper.
    """

    form: str = "kivi(bits=4, residual=32)"

    def __post_init__(self) -> None:
        self.windows  # noqa: B018  (raises for what can't be)

    @cached_property
    def windows(self) -> Format:  # type: ignore[override]
        """The format. Raises ValueError for a method that has none, or does more than hold tokens in one."""
        chosen = parse(self.form)
        if chosen.needs:
            raise ValueError(f"form={self.form!r} needs what is measured on a model, and windows have none of that")
        if chosen.format is None or any(chosen.listens(event) for event in EVENTS):
            raise ValueError(f"form={self.form!r} must be a method that only says how tokens lie, such as 'kivi'")
        unit_of(chosen.format)
        return chosen.format
