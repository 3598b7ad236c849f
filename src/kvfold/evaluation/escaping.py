"""Text that others wrote, put into pages, scripts and tables: it stays text there, whatever it holds."""

import json
import re
from html import escape
from typing import Any

_IN_SCRIPT = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_MARKUP = re.compile(r"([\\|`*_~$\[\]])")
_UNPRINTED = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")


def in_script(data: Any) -> str:
    """JSON for a script element of a page: nothing in it can end the element, open a comment or end a line.

    Raises ValueError for NaN.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_IN_SCRIPT)
    return text.encode("utf-8", "backslashreplace").decode()  # lone surrogates stay JSON


def in_html(text: str) -> str:
    """Text for the content or an attribute of an element; what no page can hold is a replacement character."""
    return escape(_UNPRINTED.sub("\ufffd", text))


def in_markdown(text: str) -> str:
    """Text for a cell or a heading of Markdown: it can't end the cell or the line, nor be markup or HTML."""
    line = " ".join(_UNPRINTED.sub("\ufffd", text).split())
    return _MARKUP.sub(r"\\\1", line).translate(_ENTITIES)


def code_cell(text: str) -> str:
    """Text for a cell of a Markdown table, as code where code can say it."""
    line = " ".join(_UNPRINTED.sub("\ufffd", text).split())
    plain = not line or "`" in line or "\\" in line  # a code span has no way to escape these in a table
    return in_markdown(text) if plain else "`" + line.replace("|", "\\|") + "`"
