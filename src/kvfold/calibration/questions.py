"""Needles in running text, with the place of the needle known token by token."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvfold.calibration.run import Run, opening

COPY = (
    ("The lighthouse keeper at Tarrow Point drinks warm ginger beer with a slice of lemon every evening.",
     "What does the lighthouse keeper at Tarrow Point drink every evening?"),
    ("The best place to watch the herons of Lake Ashel is the wooden jetty behind the old chapel.",
     "What is the best place to watch the herons of Lake Ashel?"),
    ("The secret ingredient of Marta's apple cake is a spoonful of roasted fennel seeds.",
     "What is the secret ingredient of Marta's apple cake?"),
    ("The password of the night archive is seven purple elephants under a glass moon.",
     "What is the password of the night archive?"),
)  # fmt: skip
"""(needle, question): the needle is the answer."""
REASON = (
    ("Ana keeps her spare key under the blue flowerpot. ", "Bruno keeps his spare key inside the old piano.",
     " Ana is a baker, and Bruno is a sailor.", "Where does the sailor keep the spare key?", "inside the old piano"),
    ("", "The green boat sails to the island of Morvane.", " The red boat sails to the port of Callis. "
     "The ferryman owns the green boat, and the smuggler owns the red one.",
     "Where does the ferryman's boat sail to?", "to the island of Morvane"),
    ("Dr. Holt studies the beetles of the northern marshes. ", "Dr. Vane studies the songs of the humpback whales.",
     " Dr. Vane likes to work at sea, and Dr. Holt never leaves the land.",
     "What does the doctor who works at sea study?", "the songs of the humpback whales"),
    ("", "Lena gave her brother a brass telescope.", " Tom gave his sister a silver whistle. "
     "It was Lena who was born in the winter.",
     "What did the one who was born in the winter give?", "a brass telescope"),
)  # fmt: skip
"""(before, right sentence, after, question, answer): what is before and after holds a distractor and what decides."""
MARK = "\u241fDOCUMENT\u241f"


@dataclass(frozen=True)
class NeedleQuestion:
    """A prompt (1, T), the tokens of its answer, and where (from, to) the needle that answers it stands."""

    prompt: Tensor
    answer: list[int]
    span: tuple[int, int]

    @property
    def fed(self) -> Tensor:
        """What the model reads: prompt and answer, without the answer's last token."""
        return torch.cat([self.prompt, torch.tensor([self.answer[:-1]], dtype=torch.long)], 1)

    @property
    def needle(self) -> list[int]:
        """The needle's tokens."""
        found: list[int] = self.prompt[0, slice(*self.span)].tolist()
        return found


def questions(run: Run, kind: str, samples: int, length: int) -> Iterator[NeedleQuestion]:
    """Prompts of a fifth of `length` to all of it, needles of `kind` "copy" or "reason" at depths 0.05 to 0.95.

    Raises ValueError for a `length` whose fifth has no room, and for texts that are shorter than a prompt.
    """
    rng = random.Random(f"{run.seed}:{kind}")
    for i in range(samples):
        if kind == "copy":
            needle, asked = COPY[i % len(COPY)]
            parts = ("", needle, "", asked, needle)
        else:
            parts = REASON[i % len(REASON)]
        size = int(length * (1 + i * 4 // max(1, samples - 1)) / 5)
        yield _question(run.tokenizer, rng.choice(list(run.texts))[1], parts, size, length, rng)


def _question(
    tokenizer: Any, text: str, parts: tuple[str, str, str, str, str], size: int, length: int, rng: random.Random
) -> NeedleQuestion:
    before, needle, after, asked, answer = parts
    head, tail = frame(tokenizer, asked)
    pieces = [_ids(tokenizer, part) for part in (f"\n\n{before}".removesuffix(" "), f" {needle}", f"{after}\n\n")]
    reply = _ids(tokenizer, answer if getattr(tokenizer, "chat_template", None) else f" {answer}")
    room = size - len(head) - len(tail) - len(reply) - sum(map(len, pieces))
    words = _ids(tokenizer, text)
    if room < 16:
        raise ValueError(
            f"length={length}: prompts are a fifth of that and longer, and one of {size} tokens has no room for its "
            f"question and 16 tokens of text; length must be at least {5 * (size - room + 16)}"
        )
    if len(words) < room:
        raise ValueError(f"texts: one has {len(words)} tokens, and a prompt of {size} needs {room} of it")
    start = rng.randrange(len(words) - room + 1)
    cut = start + int(room * rng.uniform(0.05, 0.95))
    first = [*head, *words[start:cut], *pieces[0]]
    ids = [*first, *pieces[1], *pieces[2], *words[cut : start + room], *tail]
    return NeedleQuestion(torch.tensor([ids], dtype=torch.int64), reply, (len(first), len(first) + len(pieces[1])))


def frame(tokenizer: Any, question: str) -> tuple[list[int], list[int]]:
    """Tokens before and after the document: the chat template's, or plain text for a base model."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": f"{MARK}\n\n{question}"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        head, _, tail = text.partition(MARK)
        return _ids(tokenizer, head), _ids(tokenizer, tail)
    return opening(tokenizer), _ids(tokenizer, f"\n\nQuestion: {question}\nAnswer:")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
