"""How a peer takes turns with others: what it is asked comes as a line of JSON, and so does each answer."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO


def answers() -> TextIO:
    """Standard output for the answers alone: what anything else prints goes to stderr from now on."""
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def serve(work: Mapping[str, Callable[..., dict[str, Any]]], out: TextIO) -> None:
    """Answer until nobody asks any more: `{"do": name, ...}` calls that name of `work` with the rest."""
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            found = work[asked.pop("do")](**asked)
        except Exception as error:  # whoever asks says it, and goes on without us
            found = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        out.write(json.dumps(found) + "\n")
        out.flush()
