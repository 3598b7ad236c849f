"""What a method's late events see: the layers that a pass has done with, and a prompt that can be read again."""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import AutoTokenizer

from kvfold.hf.rope import text_decoder
from kvfold.layer import KVLayer
from kvfold.passes import Pass
from kvfold.views import LayerView

if TYPE_CHECKING:
    from kvfold.hf.cache import Cache

WORDS = "what a user says"


class Done:
    """The layers that a forward pass has done with, as a method's late events see them."""

    def __init__(self, layers: list[KVLayer], this: Pass):
        self._layers, self._this = layers, this

    @property
    def prefill(self) -> bool:
        """Whether the pass read a prompt."""
        return self._this.prefill

    @property
    def step(self) -> dict[str, Any]:
        """The context that the layers of this pass share."""
        return self._this.step

    def __getitem__(self, ordinal: int) -> LayerView:
        return self._layers[ordinal].view(self._this)

    def __len__(self) -> int:
        return len(self._layers)


class Prompt(Done):
    """A prompt that every layer has stored, as `Method.after_prompt` sees it.

    Raises ValueError where the model was called without the prompt's ids.
    """

    def __init__(self, cache: "Cache", this: Pass):
        super().__init__(cache.paged, this)
        if this.token_ids is None:
            raise ValueError(f"method={cache.method} reads a prompt again: call the model with input_ids")
        self._cache, self._ids = cache, this.token_ids

    @property
    def ids(self) -> Int[Tensor, "B Q"]:
        """The tokens of the pass."""
        return self._ids

    @property
    def valid(self) -> Bool[Tensor, "B Q"]:
        """Which of them are not padding."""
        return self._mask()[:, -self.ids.shape[1] :]

    def _mask(self) -> Bool[Tensor, "B W"]:
        """Which of all columns read so far are not padding."""
        if self._this.mask is not None:
            return self._this.mask.bool()
        return torch.ones(len(self.ids), self._layers[0].width, dtype=torch.bool, device=self.ids.device)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; none where the model's folder has no tokenizer."""
        found = tokenizer_of(self._cache.model.name_or_path)
        return [] if found is None else list(found(text, add_special_tokens=False).input_ids)

    def answer(self) -> list[int]:
        """What the model's chat template puts between a user's words and the answer, as tokens."""
        found = tokenizer_of(self._cache.model.name_or_path)
        if found is None or not found.chat_template:
            return []
        turn = [{"role": "user", "content": WORDS}]
        rendered: str = found.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return self.encode(rendered.rpartition(WORDS)[2])

    @torch.no_grad()
    def read(self, ids: Int[Tensor, "B N"], valid: Bool[Tensor, "B N"], observe: Callable[[LayerView], None]) -> None:
        """Run `ids` through the model as if they came next; `observe` gets every layer's view, then they are gone."""
        cache = self._cache
        seen = torch.from_numpy(self._layers[0].seen).to(ids.device)[:, None]
        before = cache.prefill_chunk, cache.recording
        cache.prefill_chunk, cache.recording = None, False  # one pass, and nobody crops it
        try:
            with cache.tentative(observe), cache.prefilling():
                text_decoder(cache.model)(
                    input_ids=ids,
                    attention_mask=torch.cat([self._mask(), valid], 1).long(),
                    position_ids=(seen + valid.cumsum(1) - 1).clamp(min=0),
                    past_key_values=cache,
                    use_cache=True,
                )
        finally:
            cache.prefill_chunk, cache.recording = before


@lru_cache(maxsize=8)
def tokenizer_of(place: str) -> Any:
    """The tokenizer beside a model's weights, or None; nothing is fetched."""
    if not place:
        return None
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError):
        return None
