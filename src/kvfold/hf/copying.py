"""Which heads copy: what each attends to in a random text that repeats. Needs no data, and one short prompt."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold import artefacts
from kvfold.hf.images import image_ids
from kvfold.scores.stripes import stripes
from kvfold.views import LayerView

PERIOD, REPEATS = 128, 4
"""Of the text that `copying_heads` reads: so many random tokens, so many times."""
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def copying_heads(model: Any) -> tuple[tuple[float, ...], ...]:
    """How much each query head attends to copies of its token and to what followed them: scores[paged layer][head].

    The mean over the queries of a text of 128 random tokens that repeats four times: echo and induction heads, as
    RazorAttention finds them (arXiv:2407.15891), added up. The same for every call; the model reads 513 tokens.
    Raises ValueError for a model without weights, and for one whose attention is not finite.
    """
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())  # accelerate brings the weights
    if model.device.type == "meta" and not offloaded:
        raise ValueError("heads='probed' reads a text with the model, and its weights are on 'meta': say heads='even'")
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or PERIOD * REPEATS + 1
    period = min(PERIOD, (limit - 1) // REPEATS)
    ids = [getattr(config, name, None) for name in SPECIAL]
    special = [one for each in ids for one in (each if isinstance(each, list) else [each]) if one is not None]
    words = random_words(model, period, 0, config.vocab_size, special)
    sums = attention_to_copies(model, words, special[0] if special else 0, REPEATS).sum(0)
    table = (sums / (period * (REPEATS - 1))).flatten(1)
    if not table.isfinite().all():
        name = type(model).__name__
        raise ValueError(f"heads='probed': the attention of {name} to random tokens is not finite: say heads='even'")
    return tuple(tuple(row) for row in table.tolist())


def random_words(
    model: Any, count: int, seed: int, vocabulary: int, special: Iterable[int | None]
) -> Int[Tensor, " N"]:
    """Tokens drawn from those that a text may have: not `special`, and none that stands for an image."""
    size = min(model.get_input_embeddings().num_embeddings, vocabulary)
    weights = torch.ones(size, device="cpu")
    banned = [token for token in (*special, *image_ids(model)) if token is not None and 0 <= token < size]
    weights[torch.tensor(banned, dtype=torch.long, device="cpu")] = 0.0
    return torch.multinomial(weights, count, replacement=True, generator=torch.Generator("cpu").manual_seed(seed))


@torch.no_grad()
def attention_to_copies(
    model: Any, words: Int[Tensor, " N"], first: int, repeats: int, tick: Callable[[str], None] = lambda _: None
) -> Float[Tensor, "two L H G"]:
    """Each head's attention to earlier copies of a query's token (0) and to the tokens behind those (1), summed.

    The text is `first`, then `words` so many times. Read in eval mode; every module gets back the mode that it had.
    """
    from kvfold.hf.cache import Cache  # which asks for `copying_heads` itself

    ids = torch.cat([torch.tensor([first], device="cpu"), words.repeat(repeats)])[None]
    found: list[Tensor] = []

    def look(view: LayerView) -> None:
        tick(f"layer {view.place.ordinal + 1} of {view.place.layers}")
        found.append(stripes(view, len(words), start=1).cpu())

    cache, training = Cache(model, "full"), [module for module in model.modules() if module.training]
    model.eval()
    try:
        with cache.observed(look):
            model(ids if model.device.type == "meta" else ids.to(model.device), past_key_values=cache, logits_to_keep=1)
    finally:
        for module in training:
            module.training = True
    return torch.stack(found, 1)


artefacts.PROBES["copying"] = copying_heads
