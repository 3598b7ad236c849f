"""A context's cache, stored in parts at several levels, and loaded within a budget of time."""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.codecs import CacheGen, parse_codec
from kvfold.files import write_json, write_whole
from kvfold.formats import POSITION
from kvfold.hf.argument import with_cache
from kvfold.hf.cache import Cache
from kvfold.hf.call.given import Given
from kvfold.hf.looking import ids_device
from kvfold.methods.registry import parse
from kvfold.options import check_int, check_number, shown
from kvfold.pages import Arena
from kvfold.streaming.choosing import TEXT, choose, seconds
from kvfold.streaming.manifest import NAME, Blob, ContextPart, Manifest, read
from kvfold.streaming.sources import Origin, check_digest, source_of


@dataclass(frozen=True)
class Streamed:
    """A context that was loaded: its cache, and how each part came."""

    cache: Cache
    ids: Int[Tensor, "1 T"]
    levels: tuple[int, ...]
    """Of each part; 0: the model read its text."""
    nbytes: int
    """Of the parts that were loaded."""
    seconds: float


def save_context(
    folder: str | os.PathLike[str], model: PreTrainedModel, ids: Int[Tensor, "1 T"], *, chunk: int = 1500,
    levels: Sequence[int] = (1, 2, 3), codec: str | CacheGen = "cachegen",
) -> str:  # fmt: skip
    """Have the model read a text of T tokens, and store its cache in parts of `chunk` at each of the codec's levels.

    Each part is a file that `Cache.load` reads, too; `context.json` names them and holds the text as ids. Returns
    that file's SHA-256, by which a reader knows the context. Raises ValueError for levels that the codec has not, a
    folder that is not there, and models that have layers beside those on pages (windows, recurrent states).
    """
    kind = parse_codec(codec)
    check_int("chunk", chunk, 1)
    if not levels or not set(levels) <= set(kind.levels) or len(set(levels)) != len(levels):
        raise ValueError(f"levels={shown(levels)} must be some of {kind.levels}, each once")
    if ids.dim() != 2 or len(ids) != 1 or not ids.shape[1]:
        raise ValueError(f"ids={tuple(ids.shape)} must be the tokens of one text, (1, T)")
    where, total = Path(folder), ids.shape[1]
    if not where.is_dir():
        raise ValueError(f"folder={os.fspath(folder)!r} must be a folder that is there")
    cache = _empty(model, None)
    _read_text(cache, ids)
    parts = []
    for number, start in enumerate(range(0, total, chunk)):
        end, blobs = min(total, start + chunk), {}
        piece = cache.fork()
        piece.crop(end - total)
        for core in piece.paged:
            for _, segment in core.segments:
                valid, columns = segment.columns()
                segment.keep(valid & (columns[POSITION] >= start), {})
        for level in levels:
            file = f"{number:04}-{level}.safetensors"
            piece.save(where / file, codec=replace(kind, level=level))
            content = (where / file).read_bytes()
            blobs[level] = Blob(file, len(content), hashlib.sha256(content).hexdigest())
        parts.append(ContextPart(start, end, blobs))
    write_json(where / NAME, Manifest(tuple(ids[0].tolist()), tuple(parts)).as_json(), argument="folder")
    return hashlib.sha256((where / NAME).read_bytes()).hexdigest()


def load_adaptive(
    source: str | os.PathLike[str], model: PreTrainedModel, *, slo: float, bandwidth: float | None = None,
    prefill_rate: float | None = None, sha256: str | None = None, arena: Arena | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Streamed:  # fmt: skip
    """Load what `save_context` stored, from a folder or an http address, in `slo` seconds if that can be done.

    Part by part, each at the best level for which there is time (`choosing.choose`): by the bandwidth of the part
    before, and by how fast the model reads. `bandwidth` (bytes a second) and `prefill_rate` (tokens a second) are
    what is known before: without the first, the first part comes at the medium level; without the second, the model
    reads no text (it must where nothing is stored). What was measured takes their place. `sha256`: of the manifest, as
    `save_context` returned it; a context of which it is known can't be exchanged for another one.

    Differs from the paper: parts are not decoded while the next one comes, the bandwidth counts decoding, and text
    counts as the best level, not as the last resort (reconstructed: the paper reads text where that fits).
    Raises ValueError for a source that none of ours wrote, for one that is damaged, and where it does not fit the
    model; OSError where it can't be read; OutOfPages where the arena has no room. The budget ends no download.
    """
    for name, rate in (("bandwidth", bandwidth), ("prefill_rate", prefill_rate)):
        if rate is not None:
            check_number(name, rate, 1e-9, float("inf"))
    check_number("slo", slo, 0.0, float("inf"))
    began, place = clock(), source_of(source)
    manifest = read(place, sha256)
    ids = torch.tensor([manifest.ids], dtype=torch.int64)
    cache, levels, loaded = _empty(model, arena), list[int](), 0
    _check_ids(model, ids)
    for number, part in enumerate(manifest.parts):
        ahead = [
            seconds({n: blob.nbytes for n, blob in p.levels.items()}, p.end - p.start, bandwidth, prefill_rate)
            for p in manifest.parts[number:]
        ]
        level = choose(ahead, began + slo - clock(), () if bandwidth is not None else list(part.levels))
        before = clock()
        if level == TEXT:
            _read_text(cache, ids[:, part.start : part.end])
        else:
            piece = _piece(place, part, part.levels[level], model, arena)
            cache = _joined(cache, piece, ids[:, : part.end]) if number else piece
            loaded += part.levels[level].nbytes
        took = max(clock() - before, 1e-9)
        if level == TEXT:
            prefill_rate = (part.end - part.start) / took
        else:
            bandwidth = part.levels[level].nbytes / took
        cache.given = Given((ids[:, : part.end],))
        levels.append(level)
    return Streamed(cache, ids, tuple(levels), loaded, clock() - began)


def _empty(model: PreTrainedModel, arena: Arena | None) -> Cache:
    cache = Cache(model, "full", arena=arena)
    if len(cache.paged) != len(cache.layers):
        raise ValueError(f"model={type(model).__name__} has layers with windows or states, which are not cut in parts")
    return cache


def _check_ids(model: PreTrainedModel, ids: Tensor) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= rows:
        raise ValueError(f"{NAME} has ids up to {int(ids.max())}, and the model knows {rows}")


@torch.no_grad()
def _read_text(cache: Cache, ids: Int[Tensor, "1 N"]) -> None:
    """The model reads on, over what the cache holds."""
    model = cache.model
    model(input_ids=ids.to(ids_device(model)), logits_to_keep=1, **with_cache(model, cache))


def _piece(source: Origin, part: ContextPart, blob: Blob, model: PreTrainedModel, arena: Arena | None) -> Cache:
    """A cache that holds the part's tokens and nothing else. Raises ValueError for any other."""
    content = check_digest(source.read(blob.file, blob.nbytes), blob.sha256, blob.file)
    with tempfile.TemporaryDirectory(prefix="kvfold-") as folder:
        write_whole(path := Path(folder) / blob.file, content)
        del content
        piece = Cache.load(path, model, arena)
    tokens = list(range(part.start, part.end))
    heads = [core.shape[0] if core.shape else 0 for core in piece.paged]
    held = all(core.kept() == [[tokens] * each] for core, each in zip(piece.paged, heads, strict=True)) and all(heads)
    read_so_far = piece.rows.seen.tolist(), piece.rows.width, piece.method == parse("full"), piece.prefill_chunk
    if not held or read_so_far != ([part.end], part.end, True, None) or piece.reading is not None:
        raise ValueError(f"{blob.file} holds other tokens than {part.start} to {part.end} of one text, in full")
    return piece


def _joined(cache: Cache, piece: Cache, ids: Int[Tensor, "1 T"]) -> Cache:
    """The cache with the piece's tokens behind its own."""
    for mine, theirs in zip(cache.paged, piece.paged, strict=True):
        tokens, _ = theirs.stored.tokens()
        mine.stored.append(tokens, even=True)
    cache.rows.rewind(piece.rows.mark())
    return cache
