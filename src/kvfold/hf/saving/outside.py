"""What a method in a file would have loaded from elsewhere: nothing, unless the caller says so."""

import os
from collections.abc import Collection, Iterator, Sequence

from kvfold import artefacts
from kvfold.methods.base import Compound, Method
from kvfold.options import shown


def named_outside(method: Method) -> Iterator[tuple[str, str, str]]:
    """Each model or file that a method, or one that it is made of, names: its text, the option and the name.

    What ships with kvfold, or lies in the user's folder of artefacts, is not among them.
    """
    if isinstance(method, Compound):
        for part in method.parts:
            yield from named_outside(part)
    for option in method.outside:
        name = getattr(method, option, None)
        if isinstance(name, str | os.PathLike) and not artefacts.is_ours(method.info.slug, os.fspath(name)):
            yield method.info.slug, option, os.fspath(name)


def check_outside(methods: Sequence[Method], allow: Collection[str]) -> None:
    """Raise ValueError for what is named outside and not in `allow`."""
    if isinstance(allow, str | bytes) or not all(isinstance(name, str) for name in allow):
        raise ValueError(f"allow={shown(allow)} must be a list of names")
    for method in methods:
        for slug, option, name in named_outside(method):
            if name not in allow:
                raise ValueError(
                    f"{slug} has {option}={shown(name)} loaded, which a file can't ask for by itself; if you know it, "
                    f"give Cache.load(..., allow=[{shown(name)}])"
                )
