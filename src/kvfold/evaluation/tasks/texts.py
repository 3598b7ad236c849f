"""Running text for haystacks: the user's own, or the public-domain stories that ship."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import accumulate
from pathlib import Path

from kvfold.evaluation.tasks.base import Setting

_PARAGRAPHS = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"""(?<=[.!?])["')\]\u201d\u2019]*\s+(?=["'(\[\u201c\u2018]*[A-Z0-9])""")
_TITLES = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|Col|Capt|No|[A-Z])\.$")  # a period that ends no sentence


def documents(setting: Setting) -> list[tuple[str, str]]:
    """(title, text) of every file: `setting.texts`, a folder's .txt in the order of their names, or what ships.

    Raises ValueError where there is no such file or no word in it.
    """
    return list(_documents(setting.texts))


@cache
def _documents(path: Path | None) -> tuple[tuple[str, str], ...]:
    if path is None:
        shipped = files("kvfold.evaluation").joinpath("texts").iterdir()
        found = sorted((each.name, each.read_text("utf-8")) for each in shipped if each.name.endswith(".txt"))
    elif path.is_dir():
        found = [(each.name, _text(each)) for each in sorted(path.glob("*.txt"))]
    elif path.is_file():
        found = [(path.name, _text(path))]
    else:
        found = []
    made = tuple((name.removesuffix(".txt"), text) for name, text in found if text.strip())
    if not made:
        raise ValueError(f"texts={str(path)!r} must be a text file, or a folder with .txt files that have words")
    return made


def bundled_text() -> str:
    """All stories that come with kvfold, one after the other."""
    return "\n\n".join(text for _, text in _documents(None))


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"texts={str(path)!r}, line {line}, is not UTF-8 text ({error})") from None


def sentences(text: str) -> list[str]:
    """The sentences of a text, blanks collapsed; a paragraph's end ends one too."""
    return [sentence for paragraph in _PARAGRAPHS.split(text) for sentence in _split(" ".join(paragraph.split()))]


def _split(paragraph: str) -> Iterator[str]:
    start = 0
    for end in _SENTENCE_END.finditer(paragraph):
        sentence = paragraph[start : end.end()].rstrip()
        if not _TITLES.search(sentence):
            yield sentence
            start = end.end()
    if start < len(paragraph):
        yield paragraph[start:]


@dataclass(frozen=True)
class RunningText:
    """Sentences, and how many words there are up to the end of each."""

    sentences: tuple[str, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, sentences: Sequence[str]) -> "RunningText":
        return cls(tuple(sentences), tuple(accumulate(len(sentence.split(" ")) for sentence in sentences)))

    def first(self, words: int) -> list[str]:
        """The sentences of the first `words` words, the last one cut short; the text repeats where it ends."""
        rounds, rest = divmod(words, self.ends[-1])
        whole = bisect_right(self.ends, rest)
        before = self.ends[whole - 1] if whole else 0
        part = self.sentences[whole].split(" ")[: rest - before] if rest > before else []
        return [*self.sentences * rounds, *self.sentences[:whole], *([" ".join(part)] if part else [])]

    def turned(self, start: int) -> "RunningText":
        """The same text, beginning at another sentence."""
        return RunningText.of((*self.sentences[start:], *self.sentences[:start]))


@cache
def _running(path: Path | None) -> RunningText:
    return RunningText.of([sentence for _, text in _documents(path) for sentence in sentences(text)])


def running_text(setting: Setting) -> RunningText:
    """All documents, one behind the other."""
    return _running(setting.texts)


def plant(haystack: Sequence[str], needles: Sequence[tuple[float, str]], joint: str = " ") -> str:
    """Sentences with needles between them: each (depth, needle) before sentence `int(len(haystack) * depth)`."""
    pieces, last = list[str](), 0
    for depth, needle in sorted(needles, key=lambda each: each[0]):
        place = int(len(haystack) * depth)
        pieces += [*haystack[last:place], needle]
        last = place
    return joint.join([*pieces, *haystack[last:]])


def check_once(setting: Setting, context: str, *needles: str) -> None:
    """Raises ValueError where a needle does not stand in the context exactly once."""
    for needle in needles:
        if (found := context.count(needle)) != 1:
            raise ValueError(f"texts={str(setting.texts)!r}: {needle!r} stands {found} times in the haystack, not once")
