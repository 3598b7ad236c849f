"""Which heads copy: what each reads in a random text that repeats, and what that is to its layer. Needs no data."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold import ops
from kvfold.hf.anatomy import attention_modules, projected
from kvfold.hf.argument import with_cache
from kvfold.hf.images import image_ids
from kvfold.hf.looking import looking
from kvfold.hf.rope import find_ropes
from kvfold.scores.stripes import stripes
from kvfold.views import LayerView

PERIOD, REPEATS = 128, 4
"""Of the text that `copying_heads` reads: so many random tokens, so many times."""
ASKED = 64
"""Queries of that text, evenly spaced, whose outputs are worked out again without copies."""
POWER = 0.75
"""Of what is lost, to make a score of it: heads that copy little are not to have next to nothing of a small budget."""
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def copying_heads(model: Any) -> tuple[tuple[float, ...], ...]:
    """An estimate of what a layer would lose without the copies that a head reads: scores[paged layer][query head].

    The text: 128 random tokens that repeat four times. Copies of a query's token, and the tokens behind those, are
    what echo and induction heads read (RazorAttention, arXiv:2407.15891). A score is a product of two means, to the
    power of 3/4. Over 64 queries, |W_o (o - o')| / |W_o o|: o' is what the heads of a group read where they see no
    copies (what a model has between heads and W_o, a gate or a norm, is left out). Over all queries that have copies,
    |x - x'| / |x|: x' is what the layer passes on without its attention. Query heads of a group have the same.
    The same for every call; the model reads 513 tokens, in two rows, or fewer where its positions end before.
    Raises ValueError for a model without weights, one whose attention is not finite, one that runs a layer more than
    once, and one with fewer than five positions.
    """
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())  # accelerate brings the weights
    if model.device.type == "meta" and not offloaded:
        raise ValueError("heads='probed' reads a text with the model, and its weights are on 'meta': say heads='even'")
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or PERIOD * REPEATS + 1
    period = min(PERIOD, (limit - 1) // REPEATS)
    if period < 1:
        raise ValueError(
            f"heads='probed' reads a text that repeats, and {limit} positions have no room: say heads='even'"
        )
    ids = [getattr(config, name, None) for name in SPECIAL]
    special = [one for each in ids for one in (each if isinstance(each, list) else [each]) if one is not None]
    words = random_words(model, period, 0, config.vocab_size, special)
    text = repeated_text(words, special[0] if special else 0, REPEATS)
    lost: dict[int, Tensor] = {}

    def look(view: LayerView) -> None:
        lost[view.place.layer] = lost_without_copies(view, period).cpu()

    find_ropes(model)  # a pass of its own, which is over before layers are looked at
    # A compiled forward runs as it is written: it would be compiled for these hooks, and once.
    with (
        torch.compiler.set_stance("force_eager"),
        torch.no_grad(),
        _without_attention(model, lost, 1 + period) as shares,
    ):
        read_with(model, text.expand(2, -1), look)
    name = type(model).__name__
    if shares.keys() != lost.keys():
        raise ValueError(f"heads='probed': {name} does not run each of its attention modules once: say heads='even'")
    table = torch.stack([lost[layer] * shares[layer] for layer in lost]).pow(POWER)
    if not table.isfinite().all():
        raise ValueError(f"heads='probed': the attention of {name} to random tokens is not finite: say heads='even'")
    return tuple(tuple(row) for row in table.tolist())


def lost_without_copies(view: LayerView, period: int) -> Float[Tensor, " Hq"]:
    """The share of what a layer's attention says that is lost where the heads of a group see no copies; of row 0.

    Its text is one token, and then one of `period` tokens that repeats.
    """
    _, heads, total, d = view.keys.shape
    asked = torch.linspace(
        1 + period, total - 1, min(ASKED, total - 1 - period), device=view.keys.device, dtype=torch.float32
    ).long()
    q = view.queries.states[:1, :, asked].view(1, heads, -1, len(asked), d)
    keys, values = view.keys[:1], view.values[:1, :, None].float()
    seen = torch.arange(total, device=asked.device) <= asked[:, None]
    read, left = (
        (ops.window_attention(q, keys, view.place.scale, some.expand(1, heads, -1, -1)) @ values)[0]  # H G N Dv
        for some in (seen, seen & ~_copies(asked, total, period))
    )

    def said(outputs: Float[Tensor, "H G N Dv"]) -> Float[Tensor, "N E"]:
        rows = outputs.movedim(2, 0).flatten(1).to(view.values.dtype)
        return projected(view.place.module, rows).float()

    bias, change = said(torch.zeros_like(read)), read - left
    whole = said(read) - bias
    heads_alone = (change.where(torch.arange(heads, device=q.device).view(-1, 1, 1, 1) == h, 0.0) for h in range(heads))
    share = torch.stack([_share(said(alone) - bias, whole) for alone in heads_alone])
    return share.repeat_interleave(q.shape[2])


def _share(change: Float[Tensor, "N E"], whole: Float[Tensor, "N E"]) -> Float[Tensor, ""]:
    """How long a change is, of what it changes; the mean over queries. Where there was nothing, nothing is lost."""
    lost: Tensor = change.norm(dim=-1) / whole.norm(dim=-1).clamp(min=torch.finfo(whole.dtype).tiny)
    return lost.mean()


def _copies(asked: Int[Tensor, " N"], total: int, period: int) -> Bool[Tensor, "N T"]:
    """Which tokens are copies of each query's own, or follow one."""
    back = asked[:, None] - torch.arange(total, device=asked.device)
    copies = (back > 0) & (back % period == 0)
    copies[:, 0] = False  # the first token is not of the words
    return copies | copies.roll(1, dims=1)


@contextmanager
def _without_attention(model: Any, of: dict[int, Any], start: int) -> Iterator[dict[int, Tensor]]:
    """Within the block, row 1 of what a layer passes on is made without its attention, compared, and then row 0's.

    Yields what a pass fills, layer by layer: how far that is from row 0, as a share of it, from column `start` on; of
    the layers that are in `of` when they end. What other threads read meanwhile is left alone.
    """
    found: dict[int, Tensor] = {}
    here = get_ident()
    names = {module: name for name, module in model.named_modules()}

    def silence(_: Any, args: Any, output: Any) -> Any:
        states, rest = _parts(output)
        return rest(torch.stack([states[0], torch.zeros_like(states[0])])) if get_ident() == here else None

    def compare(index: int) -> Callable[..., Any]:
        def hook(_: Any, args: Any, output: Any) -> Any:
            if get_ident() != here:
                return None
            states, rest = _parts(output)
            if index in of:
                whole, less = states[:, start:].float()
                found[index] = _share(whole - less, whole).cpu()
            return rest(states[:1].repeat(2, 1, 1))

        return hook

    with ExitStack() as hooks:
        for index, module in attention_modules(model).items():
            path = names[module].split(".")
            place = max(at for at, part in enumerate(path) if part.isdigit())  # in the list of layers
            layer = model.get_submodule(".".join(path[: place + 1]))
            hooks.callback(module.register_forward_hook(silence).remove)
            hooks.callback(layer.register_forward_hook(compare(index)).remove)
        yield found


def random_words(
    model: Any, count: int, seed: int, vocabulary: int, special: Iterable[int | None]
) -> Int[Tensor, " N"]:
    """Tokens drawn from those that a text may have: not `special`, and none that stands for an image."""
    size = min(model.get_input_embeddings().num_embeddings, vocabulary)
    weights = torch.ones(size, device="cpu", dtype=torch.float32)
    banned = [token for token in (*special, *image_ids(model)) if token is not None and 0 <= token < size]
    weights[torch.tensor(banned, dtype=torch.long, device="cpu")] = 0.0
    return torch.multinomial(weights, count, replacement=True, generator=torch.Generator("cpu").manual_seed(seed))


@torch.no_grad()
def attention_to_copies(
    model: Any, words: Int[Tensor, " N"], first: int, repeats: int, tick: Callable[[str], None] = lambda _: None
) -> Float[Tensor, "two L H G"]:
    """Each head's attention to earlier copies of a query's token (0) and to the tokens behind those (1), summed.

    The text is `first`, then `words` so many times.
    """
    found: list[Tensor] = []

    def look(view: LayerView) -> None:
        tick(f"layer {view.place.ordinal + 1} of {view.place.layers}")
        found.append(stripes(view, len(words), start=1).cpu())

    read_with(model, repeated_text(words, first, repeats), look)
    return torch.stack(found, 1)


def repeated_text(words: Int[Tensor, " N"], first: int, repeats: int) -> Int[Tensor, "1 T"]:
    """`first`, and then `words` so many times."""
    return torch.cat([torch.tensor([first], device="cpu", dtype=torch.int64), words.repeat(repeats)])[None]


def read_with(model: Any, ids: Int[Tensor, "B T"], look: Callable[[LayerView], None]) -> None:
    """Have the model read a text whose layers `look` sees, in eval mode; every module gets back the mode it had."""
    from kvfold.hf.cache import Cache  # which asks for `copying_heads` itself

    reader = model if model.can_generate() else model.base_model  # heads that classify want a padding token
    cache = Cache(reader, "full")
    with looking(reader), cache.observed(look):
        reader(
            ids if model.device.type == "meta" else ids.to(model.device), logits_to_keep=1, **with_cache(reader, cache)
        )


def _parts(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The states that a module gives, and what makes its output of others."""
    if isinstance(output, tuple):
        return output[0], lambda states: (states, *output[1:])
    return output, lambda states: states
