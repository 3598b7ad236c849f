"""One published record, whose fields are checked where they are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PublishedRecord:
    """Fields of a record, and where it stands. Every method raises ValueError that names file, line and field."""

    where: str
    fields: Mapping[str, Any]

    def wrong(self, name: str, what: str) -> ValueError:
        """The error for a field: `what` is said about its value."""
        return ValueError(f"{self.where}: field {name!r} {what}")

    def need(self, name: str) -> Any:
        """A field that must be there and not null."""
        if self.fields.get(name) is None:
            raise self.wrong(name, f"is missing; there are {', '.join(map(repr, self.fields)) or 'none'}")
        return self.fields[name]

    def text(self, name: str) -> str:
        value = self.need(name)
        if not isinstance(value, str):
            raise self.wrong(name, f"is {_short(value)}; it must be a string")
        return value

    def number(self, name: str) -> int:
        value = self.need(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(name, f"is {_short(value)}; it must be a whole number")
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        """A string or a number, or a list of them with at least one: as strings, since JSON answers may be numbers."""
        value = self.need(name)
        items = list(value) if isinstance(value, list | tuple) else [value]
        if not items or not all(isinstance(item, str | int | float) for item in items):
            raise self.wrong(name, f"is {_short(value)}; it must be a string, a number, or a list of them")
        return tuple(map(str, items))

    def options(self, name: str, count: int = 4) -> tuple[str, ...]:
        """The choices of a question, `count` of them."""
        found = self.strings(name)
        if len(found) != count:
            raise self.wrong(name, f"is {_short(found)}; it must have {count} choices")
        return found

    def records(self, name: str) -> list["PublishedRecord"]:
        """A list of objects with at least one."""
        value = self.need(name)
        if not isinstance(value, list | tuple) or not value or not all(isinstance(each, Mapping) for each in value):
            raise self.wrong(name, f"is {_short(value)}; it must be a list of objects")
        return [PublishedRecord(f"{self.where}, {name}[{index}]", each) for index, each in enumerate(value)]


def letter_of(record: PublishedRecord, choices: tuple[str, ...], answer: str) -> str:
    """The letter of the choice that is the answer."""
    if answer not in choices:
        raise record.wrong("answer", f"is {_short(answer)}; it must be one of the options")
    return "ABCD"[choices.index(answer)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
