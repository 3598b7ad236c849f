"""RULER's variable tracking (arXiv:2404.06654): which names were, over several hops, assigned a value?

Prompt, names and worked example are those of NVIDIA/RULER. Differs from the code: below a length of 2,000 the example
may take a quarter of it instead of 500 tokens.
"""

from collections.abc import Iterator

from kvfold.evaluation.examples import Example
from kvfold.evaluation.tasks._chains import BEFORE, Chain, draw_chains, hide
from kvfold.evaluation.tasks._draws import at_least
from kvfold.evaluation.tasks._fit import filled
from kvfold.evaluation.tasks.base import Setting, task

NAME = "ruler/vt"


@task(NAME, title="RULER vt: follow a variable through its assignments", paper="2404.06654")
def vt(setting: Setting, *, chains: int = 1, hops: int = 4) -> Iterator[Example]:
    """`chains` of `hops` assignments, of which the first is asked for. 500 examples in the paper, 20 here."""
    at_least(1, chains=chains, hops=hops)
    length, _ = setting.need(NAME, 20)
    noise = _noise_of_example(setting, chains, hops, min(500, length // 4))

    def build(index: int, units: int) -> Example:
        rng = setting.rng(NAME, index)
        shown = draw_chains(rng, chains, hops, 3)
        made = draw_chains(rng, chains, hops, 5, apart_from=shown)
        context = f"{_shown(setting, shown, noise, index)}\n{BEFORE}{hide(rng, made, units)}"
        return Example(str(index), context, (made[0].query("contains_all"),))

    return filled(setting, NAME, build, least=hops + 1)


def _shown(setting: Setting, chains: list[Chain], noise: int, index: int) -> str:
    """The worked example, with its answer."""
    text = hide(setting.rng(NAME, index, "shown"), chains, noise)
    return f"{BEFORE}{text}{chains[0].question}{chains[0].prefix} {' '.join(chains[0].names)}\n"


def _noise_of_example(setting: Setting, chains: int, hops: int, tokens: int) -> int:
    """Lines of noise in the worked example, as many as its tokens allow but five at least."""
    made = draw_chains(setting.rng(NAME, "shown"), chains, hops, 3)
    noise = max(5, hops + 1)
    while setting.count(_shown(setting, made, noise + 1, 0)) <= tokens:
        noise += 1
    return noise
