"""What `Cache(memory=)` chooses formats by: the KL to the full cache under kvfold, by format and share of tokens."""

import random
from typing import Any

import torch
import torch.nn.functional as F

from kvfold import artefacts
from kvfold.calibration.run import Run
from kvfold.calibration.sensitivity import sample
from kvfold.hf.argument import with_cache
from kvfold.hf.bits import GENERAL, MEASURED, PLAIN, TURNED, WEIGHED, WINDOWS, with_form
from kvfold.hf.cache import Cache
from kvfold.hf.shared_prefill import prefill_many
from kvfold.hf.support import has_windows
from kvfold.methods.registry import parse

SHARES = (0.015625, 0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Of a text's tokens, that a head keeps in the mean."""
FED = 64
"""Tokens behind the prompt whose next-token distributions are compared."""
METHOD = "kvfold"


@torch.no_grad()
def memory_table(run: Run) -> dict[str, Any]:
    """`shares`, `forms` (stages behind the method) and `kl`: a row for each form, a number for each share.

    Each sample is a text of `length` tokens, read at once but for the last 64, which are then fed: KL(full || method)
    in nats a token, the mean over all samples. Formats in sliding windows are looked at where the model has those.
    """
    samples, length = run.sizes(6, 2048)
    forms = forms_for(run)
    run.about.update(method=METHOD, fed=FED, shares=list(SHARES))
    if length <= FED:
        raise ValueError(f"length={length} must be more than the {FED} tokens whose distributions are compared")
    rng, model = random.Random(f"{run.seed} memory"), run.model  # other windows than bases were measured on
    cells = [(form, share) for form in forms for share in SHARES if (form, share) != (PLAIN, 1.0)]
    total = dict.fromkeys(cells, 0.0)
    for number in range(samples):
        run.tick(f"sample {number + 1} of {samples}, {len(cells)} caches")
        ids = sample(run, rng, length).to(model.device)
        prompt, rest = ids[:, :-FED], ids[:, -FED:]
        caches = [Cache(model, "full")] + [Cache(model, with_form(parse(METHOD, budget=s), f)) for f, s in cells]
        prefill_many(model, {"input_ids": prompt}, [one for one in caches if not one.coded_windows], logits_to_keep=1)
        for cache in caches:
            if cache.coded_windows:  # what windows hold can't come from another's prefill
                run.tick(f"sample {number + 1} of {samples}, {cache.method.windows} in windows")
                model(input_ids=prompt, **with_cache(model, cache), logits_to_keep=1)
        full = _fed(model, caches[0], rest)
        for cell, cache in zip(cells, caches[1:], strict=True):
            got = _fed(model, cache, rest)
            total[cell] += float(F.kl_div(got, full, reduction="batchmean", log_target=True)) / samples
    total[PLAIN, 1.0] = 0.0
    return {"shares": list(SHARES), "forms": forms, "kl": [[total[form, share] for share in SHARES] for form in forms]}


def forms_for(run: Run) -> list[str]:
    """Formats to look at: those of any model, those whose calibration is there, and each best one with windows."""
    found = list(GENERAL)
    known = artefacts.has("turboquant", run.model)
    found += MEASURED if known else ()
    best = ["fp8", *(WEIGHED if known else TURNED)]
    if has_windows(run.model):
        found += [f"{form} | {WINDOWS}" for form in best]
    return found


def _fed(model: Any, cache: Cache, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (N, V) behind each of ids (1, N), float32."""
    with cache.tentative():
        logits: torch.Tensor = model(input_ids=ids, **with_cache(model, cache)).logits[0]
    return logits.float().log_softmax(-1)
