"""RazorAttention's calibration: echo and induction heads on a random text that repeats (arXiv:2407.15891)."""

from typing import Any

from kvfold.calibration.run import Run
from kvfold.probes.copying import attention_to_copies, random_words

REPEATS = 4


def razor_tables(run: Run) -> dict[str, Any]:
    """`echo` and `induction`: the KV heads' scores, the greatest of each group of query heads.

    K random tokens, 4 times over behind a first token (the paper: K = 2500; here `length` / 4, 500 unless told).
    """
    _, length = run.sizes(1, 4 * 500 + 1)
    period = (length - 1) // REPEATS
    words = random_words(run.model, period, run.seed, len(run.tokenizer), run.tokenizer.all_special_ids)
    first = run.tokenizer.bos_token_id if run.tokenizer.bos_token_id is not None else run.tokenizer.eos_token_id
    run.about.update(period=period, texts=[])  # random tokens
    found = attention_to_copies(run.model, words, first or 0, REPEATS, run.tick).amax(-1)
    return {"echo": found[0].tolist(), "induction": found[1].tolist()}
