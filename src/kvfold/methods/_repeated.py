"""A prompt that the model reads a second time, as if it wrote it out once more, and who is looked at meanwhile."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.views import LayerView, PromptView, ReadOn, Requests

ASK = "\n\nRepeat the previous context exactly."
ASK_ON = "\n\nRepeat the part of the previous context exactly, starting with "

Judge = Callable[[LayerView, Bool[Tensor, "B H T"]], Float[Tensor, "B H T"]]
"""From a layer's view of the second reading and the tokens that are repeated, to a score of each of those."""


def repeated(
    prompt: PromptView, views: Sequence[LayerView], judge: Judge, chunk: int, overlap: int
) -> Requests[list[Float[Tensor, "B H _"]]]:
    """Each layer's scores of the tokens that this pass brought, 0 for the others; layers may differ in length.

    The model is asked to repeat the text, `chunk` tokens at a time (from the chunk before, whose last `overlap` tokens
    it is given), and reads the chunk as its own answer (KVzip, arXiv:2505.23416). Without a tokenizer beside the
    model's weights it repeats unasked. Costs a second prefill; nothing of it stays.
    """
    scores = [torch.zeros(view.valid.shape, device=view.valid.device, dtype=torch.float32) for view in views]
    order = torch.argsort(prompt.valid.byte(), dim=1, descending=True, stable=True)
    ids, own = prompt.ids.gather(1, order), prompt.valid.sum(1, keepdim=True)
    start = views[0].place.seen.to(ids.device)[:, None] - own
    for at in range(0, ids.shape[1], chunk):
        here = ids[:, at : at + chunk]
        words = prompt.encode(ASK_ON if at else ASK)
        parts = [ids.new_tensor(words, dtype=ids.dtype).expand(len(ids), -1)]
        parts += [ids[:, max(0, at - overlap) : at]] if words else []
        parts += [ids.new_tensor(prompt.answer(), dtype=ids.dtype).expand(len(ids), -1)] if words else []
        asked = torch.cat(parts, 1)
        count = (own - at).clamp(min=0, max=here.shape[1])
        reads = torch.arange(here.shape[1], device=ids.device) < count
        valid = torch.cat([(count > 0).expand(-1, asked.shape[1]), reads], 1)
        span = (start + at)[..., None], (start + at + count)[..., None]

        def score(view: LayerView, span: tuple[Tensor, Tensor] = span) -> None:
            total = scores[view.place.ordinal]
            first, last = (limit.to(total.device) for limit in span)
            stored = total.shape[-1]
            part = view.valid & (view.positions >= first) & (view.positions < last)
            part[..., stored:] = False
            total += judge(view, part).masked_fill(~part, 0.0)[..., :stored]

        yield ReadOn(torch.cat([asked, here], 1), valid, score)
    return scores
