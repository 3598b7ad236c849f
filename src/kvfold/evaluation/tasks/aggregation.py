"""Two of ZeroSCROLLS' tasks, imitated without its data (arXiv:2305.14196): answers that need the whole context.

Prompts are the paper's; reviews and summaries are made from templates, so scores are not comparable with its own.
"""

from collections.abc import Iterator

from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks._draws import at_least
from kvfold.evaluation.tasks._fit import filled
from kvfold.evaluation.tasks.base import Setting, task
from kvfold.evaluation.tasks.texts import running_text

DIGEST, SORT = "space_digest_made", "sort_made"
PAPER = "2305.14196"
OPENINGS = (
    "We stayed for {n} nights in {month}.", "I came here on business in {month}.", "Our family spent {n} days here.",
    "This was my visit number {n} to the town.", "We booked a room for {n} people.",
)  # fmt: skip
POSITIVE = (
    "The room was spotless and the bed wonderful.", "The staff were kind and helped us with everything.",
    "Breakfast was delicious, and we would come back any time.", "A perfect place, quiet and beautifully kept.",
    "We loved every minute and recommend it to everyone.", "Excellent service and a lovely view of the bay.",
)  # fmt: skip
NEGATIVE = (
    "The room was filthy and smelled of smoke.", "The staff were rude and never answered the phone.",
    "Breakfast was cold, and we will never come back.", "A terrible place, noisy and badly kept.",
    "We hated every minute and warn everyone against it.", "Awful service and a view of the rubbish bins.",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


@task(DIGEST, title="Share of positive reviews (imitates ZeroSCROLLS)", paper=PAPER)
def space_digest(setting: Setting) -> Iterator[Example]:
    """Short reviews of a hotel, each plainly positive or negative; the share is drawn from 10 to 90 %."""
    before = (
        "You are given a list of reviews about a specific hotel. Each review is either positive or negative. What is "
        "the percentage of positive reviews (e.g. 60%, 34%, etc.)? Do not provide any explanation.\n\nReviews:\n"
    )

    def build(index: int, units: int) -> Example:
        rng = setting.rng(DIGEST, index)
        share, reviews, positive = rng.uniform(0.1, 0.9), list[str](), 0
        for number in range(1, units + 1):
            good = rng.random() < share
            positive += good
            opening = rng.choice(OPENINGS).format(n=rng.randint(2, 9), month=rng.choice(MONTHS))
            reviews.append(f"Review {number}: {opening} {rng.choice(POSITIVE if good else NEGATIVE)}")
        gold = f"{100 * positive / units:.2f}".rstrip("0").rstrip(".") + "%"
        query = Query("\n\nPercentage of Positive Reviews:", (gold,), "zeroscrolls/exp_similarity", max_new_tokens=36)
        return Example(str(index), before + "\n".join(reviews), (query,), cut="end", info={"reviews": units})

    return filled(setting, DIGEST, build, least=2)


@task(SORT, title="Put dated summaries in order (imitates ZeroSCROLLS)", paper=PAPER)
def sort(setting: Setting, *, items: int = 6) -> Iterator[Example]:
    """`items` summaries in random order, each of which begins with its year; running text fills them up alike."""
    at_least(2, items=items)
    before = (
        f"You are given {items} summaries of chapters or parts of a novel, in a shuffled order, where each summary is "
        "denoted by a numerical ID (e.g. Summary 1, Summary 3, etc.). Reorder the summaries according to the original "
        f"order of chapters/parts in the novel by writing a list of length {items} of the summary IDs (e.g. if you "
        'were given 5 summaries, one possible answer could be "5, 1, 3, 4, 2"). Do not provide any explanation.\n\n'
        "Summaries:\n"
    )

    def build(index: int, units: int) -> Example:
        rng, text = setting.rng(SORT, index), running_text(setting)
        years = rng.sample(range(1501, 1700), items)
        text = text.turned(rng.randrange(len(text.sentences)))
        words = " ".join(text.first(units)).split(" ")
        cuts = [len(words) * place // items for place in range(items + 1)]
        parts = [
            f"Summary {place + 1}: This part of the story is set in the year {year}. "
            f"{' '.join(words[cuts[place] : cuts[place + 1]])}"
            for place, year in enumerate(years)
        ]
        order = sorted(range(items), key=years.__getitem__)
        gold = ", ".join(str(place + 1) for place in order)
        query = Query("\n\nSummary IDs in Correct Order:", (gold,), "zeroscrolls/concordance", max_new_tokens=6 * items)
        return Example(str(index), before + "\n\n".join(parts), (query,), cut="end", info={"items": items})

    return filled(setting, SORT, build, least=items)
