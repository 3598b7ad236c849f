"""Calls that bring no text of their batch: no row, no token, a mask or positions of another batch."""

import pytest
import torch

import kvfold
from models import feed, subject

IDS = torch.arange(24).view(2, 12) + 3


def padded(rows: int, width: int = 12, cut: int = 3) -> torch.Tensor:
    mask = torch.ones(rows, width, dtype=torch.long)
    mask[:, :cut] = 0
    return mask


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": IDS[:0]}, r"input_ids of shape \(0, 12\) must be \(B, Q\), with at least one row"),
        ({"input_ids": IDS[:, :0]}, r"input_ids of shape \(2, 0\) must be"),
        ({"input_ids": IDS[0]}, r"input_ids of shape \(12,\) must be \(B, Q\)"),
        ({"inputs_embeds": torch.zeros(0, 3, 64)}, r"inputs_embeds of shape \(0, 3, 64\) must be \(B, Q, C\)"),
        ({"inputs_embeds": torch.zeros(3, 64)}, r"inputs_embeds of shape \(3, 64\) must be"),
        (
            {"input_ids": IDS, "attention_mask": padded(1)},
            r"attention_mask of shape \(1, 12\) .* the 2 rows of",
        ),
        ({"input_ids": IDS, "attention_mask": padded(3)}, r"attention_mask of shape \(3, 12\) must be \(B, T\)"),
        ({"input_ids": IDS, "attention_mask": padded(3, cut=0)}, r"attention_mask of shape \(3, 12\) must be"),
        ({"input_ids": IDS, "attention_mask": torch.ones(12)}, r"attention_mask of shape \(12,\) must be \(B, T\)"),
        ({"input_ids": IDS, "attention_mask": padded(2, cut=12)}, r"marks none of the 12 new columns"),
        ({"input_ids": IDS[:, :1], "attention_mask": padded(2, 1, cut=1)}, r"marks none of the 1 new columns"),
        ({"input_ids": IDS, "position_ids": torch.arange(36).view(3, 12)}, r"position_ids of shape \(3, 12\) must be"),
        ({"input_ids": IDS, "position_ids": torch.arange(12)}, r"position_ids of shape \(12,\) must be"),
    ],
)
@pytest.mark.parametrize(("name", "chunk"), [("full", None), ("d2o", 4), ("jrt-prompt", None), ("kvzip", 4)])
def test_arguments_that_fit_no_batch(name, chunk, given, message):
    """Before anything is read, by every method, and the cache stays usable."""
    model = subject("llama")
    cache = kvfold.Cache(model, name, prefill_chunk=chunk)
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model(**given, past_key_values=cache)
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    feed(model, cache, IDS, padded(2, cut=0))
    if "attention_mask" in given and given["input_ids"].shape[1] > 1:  # the same on a further turn
        wrong = given["attention_mask"]
        wrong = torch.cat([torch.ones_like(wrong), wrong], -1)
        kept, width = cache.kept(0), cache.get_seq_length()
        with pytest.raises(ValueError, match="attention_mask"), torch.no_grad():
            model(**{**given, "attention_mask": wrong}, past_key_values=cache)
        assert cache.kept(0) == kept and cache.get_seq_length() == width


def test_a_row_of_padding_alone_reads_beside_others():
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), "d2o")
    mask = padded(2, cut=0)
    mask[0] = 0
    assert torch.isfinite(feed(model, cache, IDS, mask)[1]).all()
