"""What all tests share."""

import os
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import Phase, settings

os.environ["KVFOLD_PROBES"] = "off"  # nothing of a test lies in the user's folder
torch.set_num_threads(1)  # tiny tensors: a second thread only waits
sys.path.insert(0, str(Path(__file__).parent))  # `import models`

# Models are slow and shared machines slower: no deadline, few examples, the same ones on every run.
settings.register_profile("kvfold", deadline=None, max_examples=6, derandomize=True, print_blob=False)
settings.register_profile("quick", settings.get_profile("kvfold"), max_examples=2)  # `make test-fast`
settings.register_profile(  # `make mutants`: that a test fails is enough, the least example takes minutes
    "mutants", settings.get_profile("kvfold"), phases=(Phase.explicit, Phase.generate), database=None
)
settings.load_profile("kvfold")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _sentences_of_tiny_models():
    """Models that were made here come from no folder with a tokenizer: a few of their ids end sentences."""
    from kvfold.hf import cache, words
    from kvfold.testing import VOCAB

    plain, ends = words.sentence_ends, torch.arange(VOCAB) % 11 == 5

    def known(place):
        return plain(place) if place else ends

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "sentence_ends", known)
        patch.setattr(cache, "sentence_ends", known)
        yield


@pytest.fixture
def scratch_methods():
    """Methods that a test registers leave the registry when it ends."""
    from kvfold.methods import list_methods
    from kvfold.methods.base import registry

    list_methods()
    before = dict(registry)
    yield registry
    registry.clear()
    registry.update(before)


@pytest.fixture
def unchecked():
    """Annotations are not checked, as in use: wrong types reach the checks that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
