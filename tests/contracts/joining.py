"""Requests that are read alone, and a batch that they join and leave."""

import torch

import kvfold
from models import feed, subject, tokens

METHODS = [
    "full", "h2o(budget=0.4)", "streamingllm(budget=12)", "snapkv(budget=0.5)", "tova(budget=10)",
    "kvmerger(budget=0.5)", "kvfold(budget=0.5)", "cam(budget=0.4)", "d2o(budget=0.6)", "keepkv(budget=0.5)",
    "streamingllm(budget=12, positions='compact')", "cake(budget=0.5)", "kvzip(budget=0.5)", "snapkv(budget=0.5) | fp8",
    "full | kivi(group=8, channels=8, residual=8)", "h2o(budget=0.5) | mustafar(residual=8, group=8)",
    "snapkv(budget=0.5) | think(recent=8)",
]  # fmt: skip
LENGTHS = [40, 23, 57, 9, 31, 18, 64, 50, 12, 35, 28, 44, 26, 39, 33, 42, 36]


class Request:
    """One sequence: its prompt, and what the model says after it when nobody else is there."""

    def __init__(self, model, method: str, length: int, seed: int, steps: int, chunk: int | None = None):
        self.method, self.model, self.chunk = method, model, chunk
        self.ids = tokens(length, seed=seed)["input_ids"]
        cache, said = self.read()
        self.truth, self.held = [said], []
        for _ in range(steps):
            token = self.truth[-1].argmax(-1)
            self.truth.append(
                feed(model, cache, token[:, -1:], torch.ones(1, cache.get_seq_length() + 1).long())[:, -1:]
            )
            self.held.append([cache.kept(core.layer)[0] for core in cache.paged])

    def read(self):
        cache = kvfold.Cache(self.model, self.method, prefill_chunk=self.chunk)
        return cache, feed(self.model, cache, self.ids, torch.ones_like(self.ids))[:, -1:]


class Batch:
    """Requests that are decoded together: a cache, and for each of its rows whose it is and how far it is."""

    def __init__(self, model, method="full"):
        self.model, self.cache, self.rows, self.step = model, kvfold.Cache(model, method), [], []

    def join(self, request) -> None:
        self.cache.join(request.read()[0])
        self.rows.append(request)
        self.step.append(0)

    def leave(self, *rows: int) -> None:
        self.cache.retire(rows)
        self.rows = [r for i, r in enumerate(self.rows) if i not in rows]
        self.step = [s for i, s in enumerate(self.step) if i not in rows]

    def decode(self) -> None:
        """One token for each row, and the check that it is what the row gives alone."""
        token = torch.cat([r.truth[s].argmax(-1)[:, -1:] for r, s in zip(self.rows, self.step, strict=True)])
        width = self.cache.get_seq_length() + 1
        read = torch.tensor(self.cache.rows.seen)[:, None] + 1
        mask = (torch.arange(width) >= width - read).long()
        logits = feed(self.model, self.cache, token, mask)
        for row, (request, step) in enumerate(zip(self.rows, self.step, strict=True)):
            truth = request.truth[step + 1]
            # The last bit of a key may round to another code.
            atol = 2e-4 if "|" not in request.method else 0.05
            torch.testing.assert_close(logits[row : row + 1, -1:], truth, atol=atol, rtol=0)
            assert "|" in request.method or int(logits[row, -1].argmax()) == int(truth[0, -1].argmax())
            held = [self.cache.kept(core.layer)[row] for core in self.cache.paged]
            assert held == request.held[step], f"row {row}, {request.method}"
        self.step = [s + 1 for s in self.step]


def requests(name: str, methods=METHODS, steps: int = 30):
    model = subject(name)
    pairs = zip(methods, LENGTHS, strict=False)
    return model, [Request(model, method, length, seed, steps) for seed, (method, length) in enumerate(pairs)]
