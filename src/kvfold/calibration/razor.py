"""RazorAttention's calibration: echo and induction heads on a random text that repeats (arXiv:2407.15891)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.calibration.run import Run
from kvfold.hf.cache import Cache
from kvfold.views import LayerView

REPEATS = 4


def razor_tables(run: Run) -> dict[str, Any]:
    """`echo` and `induction`: the KV heads' scores, the greatest of each group of query heads.

    K random tokens, 4 times over behind a first token (the paper: K = 2500; here `length` / 4, 500 unless told).
    """
    _, length = run.sizes(1, 4 * 500 + 1)
    period = (length - 1) // REPEATS
    rng = torch.Generator().manual_seed(run.seed)
    size = run.model.get_input_embeddings().num_embeddings
    special = [token for token in run.tokenizer.all_special_ids if token is not None and token < size]
    weights = torch.ones(min(size, len(run.tokenizer)))
    weights[torch.tensor([token for token in special if token < len(weights)], dtype=torch.long)] = 0.0
    words = torch.multinomial(weights, period, replacement=True, generator=rng)
    first = run.tokenizer.bos_token_id if run.tokenizer.bos_token_id is not None else run.tokenizer.eos_token_id
    ids = torch.cat([torch.tensor([first or 0]), words.repeat(REPEATS)])[None]
    found: list[Tensor] = []

    def look(view: LayerView) -> None:
        run.tick(f"layer {view.place.ordinal + 1} of {view.place.layers}")
        found.append(stripes(view, period, start=1).amax(2).cpu())

    run.about.update(period=period, texts=[])  # random tokens
    cache = Cache(run.model, "full")
    with torch.no_grad(), cache.observed(look):
        run.model(ids.to(run.model.device), past_key_values=cache, logits_to_keep=1)
    echo, induction = torch.stack(found, 1)
    return {"echo": echo.tolist(), "induction": induction.tolist()}


def stripes(view: LayerView, period: int, start: int) -> Float[Tensor, "two H G"]:
    """Attention to earlier copies of the same token, and to the tokens behind those, summed over all queries.

    The text of row 0 repeats with `period` from slot `start` on. Only the stripes of the attention matrix are worked
    out, from the queries' log-sum-exps.
    """
    _, heads, total, d = view.keys.shape
    q = view.queries.states[:1].view(1, heads, -1, total, d)[0].float() * view.place.scale  # H G T D
    k, lse = view.keys[0].float(), view.queries.lse[:1].view(1, heads, -1, total)[0]
    sums = torch.zeros(2, heads, q.shape[1], device=q.device)
    for back in range(period, total - start, period):
        at = torch.arange(start + back, total, device=q.device)
        for which in (0, 1):
            seen = at[at - back + which <= at]
            logits = torch.einsum("hgtd,htd->hgt", q[:, :, seen], k[:, seen - back + which])
            sums[which] += (logits - lse[:, :, seen]).exp().sum(-1)
    return sums
