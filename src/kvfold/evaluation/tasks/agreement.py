"""Agreement with the full cache on running text: what a model says next after a long text, forced token by token."""

from collections.abc import Iterator

from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks.base import Setting, task
from kvfold.evaluation.tasks.texts import documents


def _forced(setting: Setting, name: str, metric: str, forced: int, each: int | None = None) -> Iterator[Example]:
    """Stretches of text, at most `each` of one: all but the last `forced` tokens are context, those are forced."""
    length, samples = setting.need(name, 8)
    if forced < 2 or forced >= length:
        raise ValueError(f"forced={forced} must be at least 2 and less than length={length}")
    if each is not None and each < 1:
        raise ValueError(f"each={each} must be at least 1")
    encode, decode = setting.tokenizer, setting.tokenizer.decode
    made = 0
    for title, text in documents(setting):
        ids = encode(text, add_special_tokens=False).input_ids
        for start in range(0, len(ids) - length + 1, length)[:each]:
            if made == samples:
                return
            context = decode(ids[start : start + length - forced])
            target = decode(ids[start + length - forced : start + length])
            info = {"text": title, "start": start}
            yield Example(f"{made}", context, (Query("", (), metric, target=target),), chat=False, info=info)
            made += 1


@task("agreement", title="Agreement with the full cache on running text: KL, top-1, perplexity ratio")
def agreement(setting: Setting, *, forced: int = 64, each: int | None = None) -> Iterator[Example]:
    """Stretches of `length` tokens of running text that don't overlap; fewer than `samples` where the text ends.

    `each`: how many of one document at most, so that few samples come from several.
    """
    return _forced(setting, "agreement", "agreement", forced, each)


@task("perplexity", title="Perplexity of the end of a long text")
def perplexity(setting: Setting, *, forced: int = 128) -> Iterator[Example]:
    """As `agreement`, with the perplexity of the forced tokens as the score."""
    return _forced(setting, "perplexity", "perplexity", forced)
