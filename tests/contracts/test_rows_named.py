"""Rows and numbers of tokens that are none are refused; rows come in any sequence."""

import numpy as np
import pytest
import torch

import kvfold
from models import feed, subject, tokens

ODD = [[True, False], [0.5], ["a"], [[0]], None, [2**70], [2], [-1], torch.tensor([True, False])]
"""What names no rows of a batch of two."""


@pytest.mark.parametrize("rows", ODD, ids=repr)
@pytest.mark.parametrize("operation", ["take", "retire", "prefilling"])
def test_what_names_no_rows(rows, operation, unchecked):
    cache = kvfold.Cache(subject("llama"), "snapkv")
    feed(cache.model, cache, *tokens(20, 20).values())
    if operation == "prefilling" and rows is None:
        return  # all of them
    with pytest.raises(ValueError, match=r"rows=.* must be different rows of the batch, 0 to 1"):
        getattr(cache, operation)(rows=rows)
    assert cache.rows.batch == 2


def test_rows_of_nothing():
    with pytest.raises(ValueError, match="which has none: nothing was read"):
        kvfold.Cache(subject("llama"), "snapkv").take([0])


@pytest.mark.parametrize("rows", [[1], torch.tensor([1]), range(1, 2)], ids=repr)
def test_rows_in_any_sequence_that_read_a_prompt(rows, unchecked):
    """A list used to count as all of them."""
    cache = kvfold.Cache(subject("llama"), "snapkv")
    feed(cache.model, cache, *tokens(20, 20).values())
    mask = torch.cat([torch.ones(2, 20), torch.tensor([[0, 0, 1], [1, 1, 1]])], 1).long()
    with cache.prefilling(rows=rows):
        feed(cache.model, cache, torch.ones(2, 3).long(), mask)
    assert cache.rows.prompt.tolist() == [20, 23]


@pytest.mark.parametrize("odd", [None, 1.5, "3", torch.tensor(1.5)], ids=repr)
def test_what_is_no_number_of_tokens_to_take_back(odd, unchecked):
    cache = kvfold.Cache(subject("llama"), "full")
    feed(cache.model, cache, *tokens(20).values())
    with pytest.raises(ValueError, match=r"tokens_to_remove=.* must be an int"):
        cache.crop(odd)
    cache.crop(np.int64(-3))
    assert cache.get_seq_length() == 17
