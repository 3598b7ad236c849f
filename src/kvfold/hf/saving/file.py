"""Saving a cache and reading it back, bit for bit or in a codec: one safetensors file, tensors plus a JSON header."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.codecs import CacheGen
from kvfold.formats import POSITION, Format, Segment, Spec, format_to
from kvfold.formats.indexed import INNER
from kvfold.hf.beside import check_state, is_window, restore, state_of
from kvfold.hf.call.host import Host
from kvfold.hf.call.reading import Reading
from kvfold.hf.layers import PagedLayer
from kvfold.hf.looking import device_of
from kvfold.hf.saving.fingerprint import fields_of, fingerprint, modules_of
from kvfold.hf.saving.outside import check_outside
from kvfold.hf.saving.packed import pack, unpack
from kvfold.hf.saving.said import Entry, SaidGroup, SaidLayer, SaidRows, check_reading, groups_of
from kvfold.hf.saving.sealed import read_sealed, write_sealed
from kvfold.hf.saving.window import restore_window
from kvfold.hf.windows import CodedWindow
from kvfold.layer.framing import measured
from kvfold.layer.layer import KVLayer
from kvfold.layer.plan import Group
from kvfold.layer.recent import Recent
from kvfold.layer.stored import Stored
from kvfold.methods.base import Method
from kvfold.methods.registry import parse
from kvfold.options import shown

READING = ("valid", "places", "given")
"""Tensors of a `Reading`."""
RECENT = ("states", "lse")
"""Tensors of a `Recent`."""


def _device(model: PreTrainedModel, index: int) -> torch.device:
    """Where layer `index` of the model lies: a model may be spread over several devices."""
    return device_of(*modules_of(model, index), model)


def save(cache: Host, path: str | os.PathLike[str], codec: CacheGen | None = None) -> None:
    """Write what the cache holds to `path`, whole or not at all, keys and values in a codec if there is one.

    Raises ValueError for layers that it can't write, and where `path` is something else than a regular file;
    RuntimeError after a call that failed when layers had stored its tokens.
    """
    cache.forgive()  # who reads the file could not know that some layers are a call ahead
    if cache.pending.recording or cache.pending.waits:
        cache = cache.fork()  # where what waits for assisted decoding's crop is decided: it would be lost
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    written: dict[str, Segment] = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, PagedLayer):
            layers.append(_save_paged(layer.core, f"{index}", tensors, written))
        else:
            said, own = state_of(layer)
            tensors |= {f"{index}.{name}": tensor.contiguous() for name, tensor in own.items()}
            layers.append(said)
    reading, rows = cache.reading, cache.rows
    if reading is not None:
        tensors |= {f"reading.{name}": getattr(reading, name).contiguous() for name in READING}
    header = {
        "groups": [_said_of(group, cache.paged) for group in rows.groups],
        "prefill_chunk": cache.prefill_chunk,
        "model": type(cache.model).__name__,
        "fields": fields_of(cache.model),
        "fingerprint": fingerprint(cache.model),
        "rows": {"seen": rows.seen.tolist(), "prompt": rows.prompt.tolist(), "width": rows.width},
        "reading": None if reading is None else {"surplus": reading.surplus, "fixed": reading.fixed},
        "layers": layers,
    }
    if codec is not None:
        header, tensors = pack(codec, header, tensors)
    write_sealed(path, header, tensors)


def _said_of(group: Group, paged: Sequence[KVLayer]) -> dict[str, Any]:
    """A group's method, its rows, and the columns that the method has set: all that there are, where it is alone."""
    rows, names = group.rows, group.names
    if rows is None:
        found = (segment.columns()[1] for core in paged for _, segment in core.segments)
        names = frozenset().union(*found) - {POSITION}
    return {"method": str(group.method), "rows": None if rows is None else rows.tolist(), "names": sorted(names)}


def _save_paged(core: KVLayer, prefix: str, tensors: dict[str, Tensor], written: dict[str, Segment]) -> dict[str, Any]:
    formats = []
    for number, (form, segment) in enumerate(core.segments):
        name = f"{prefix}.{number}"
        twin = next(
            (other for other, theirs in written.items() if segment.longest and segment.same_pages(theirs)), None
        )
        said, planes = segment.state(of=twin)
        tensors |= {f"{name}.{plane}": tensor.contiguous() for plane, tensor in planes.items()}
        written[name] = segment
        formats.append({**format_to(form), **said, "of": twin})
    recent = core.stored.recent
    if recent is not None:
        tensors |= {f"{prefix}.recent.{name}": getattr(recent, name).contiguous() for name in RECENT}
    return {
        "kind": "paged",
        "recent": None if recent is None else {"at": recent.at.tolist(), "since": recent.since.tolist()},
        "shape": core.shape,
        "dtype": str(core.stored.spec.dtype).removeprefix("torch."),
        "opened": core.stored.opened.tolist(),
        "ordered": core.stored.ordered,
        "formats": formats,
    }


@dataclass(frozen=True, eq=False)
class Contents:
    """What a file holds, its header checked by itself."""

    header: Entry
    rows: SaidRows
    groups: list[SaidGroup]
    layers: list[Entry]
    tensors: Mapping[str, Tensor]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, without that."""
        return {n.removeprefix(prefix): tensor for n, tensor in self.tensors.items() if n.startswith(prefix)}


def load(path: str | os.PathLike[str], make: Callable[[Method, int | None], Host], allow: Collection[str] = ()) -> Any:
    """Read a cache that `save` wrote; `make` makes an empty one of a method and a chunk size.

    All is checked before pages are taken: the digest, the header by itself, against the model, and against the tensors.
    `allow`: models and files that the method in the file may name (see `check_outside`). Raises ValueError for what is
    no such file, for a damaged one, and where file and model don't belong together.
    """
    here = f"path={os.fspath(path)!r}"
    header, tensors = read_sealed(path, here)
    try:
        said = Entry("its header", header)
        found = _contents(said, unpack(said, tensors))
    except ValueError as error:
        raise ValueError(f"{here} is damaged: {error}") from error
    try:
        methods = [parse(group.method) for group in found.groups]
        check_outside(methods, allow)
        empty = [make(method, None if number else header.get("prefill_chunk")) for number, method in enumerate(methods)]
    except (ValueError, TypeError) as error:  # the latter: options of a kind that a method does not think of
        raise ValueError(f"{here} holds a cache that can't be made: {error}") from error
    cache = empty[0]
    _check_model(here, found, cache)
    try:
        _fill(found, cache, dict(_checked(found, cache, [each.rows.own for each in empty])))
    except ValueError as error:
        raise ValueError(f"{here} is damaged: {error}") from error
    cache.rows.groups = tuple(
        Group(each.rows.own, said.rows, said.names) for each, said in zip(empty, found.groups, strict=True)
    )
    return cache


def _contents(header: Entry, tensors: Mapping[str, Tensor]) -> Contents:
    """The header by itself, and which tensors are whose. Raises ValueError where that can't be."""
    for name in ("model", "fingerprint"):
        header.text(name)
    header.part("fields")
    if not header.null("prefill_chunk"):
        header.integer("prefill_chunk", low=2)
    rows = SaidRows.of(header)
    layers = [Entry(f"layer {number}", said) for number, said in enumerate(header.items("layers"))]
    found = Contents(header, rows, groups_of(header, len(rows.seen)), layers, tensors)
    for layer in layers:
        layer.text("kind")
    owners = {str(number) for number in range(len(layers))} | {"reading"}
    for name in tensors:
        if name.partition(".")[0] not in owners:
            raise ValueError(f"tensor {name!r} belongs to no layer")
    reading = found.under("reading.")
    if set(reading) != (set() if header.null("reading") else set(READING)):
        raise header.fail("reading", f"what the tensors {sorted(reading)} belong to")
    if reading:
        check_reading(header.part("reading"), reading, rows)
    planes = (name.split(".", 2)[-1].removeprefix(INNER) for name in tensors)  # where an index lies beside them
    planes = (name.removeprefix("coded.").removeprefix("tail.") for name in planes)
    held = {column for plane in planes for column in (plane, plane.removesuffix(".0").removesuffix(".1"))}
    for group in found.groups:
        if lost := sorted(group.names - held):
            raise ValueError(f"{group.method} has set {lost[0]!r}, which no layer has")
    return found


def _check_model(here: str, found: Contents, cache: Host) -> None:
    """ValueError unless the file was written for this model; it says what differs."""
    model, header = cache.model, found.header
    kinds = ["paged" if isinstance(x, PagedLayer) else "window" if is_window(x) else "state" for x in cache.layers]
    if header.text("model") != type(model).__name__ or kinds != [layer.text("kind") for layer in found.layers]:
        raise ValueError(
            f"{here} holds a cache of a {header.text('model')} with {len(found.layers)} layers; "
            f"model is a {type(model).__name__} with {len(kinds)}"
        )
    theirs, ours = header.part("fields").said, fields_of(model)
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"{here} holds a cache of a model with {name}={shown(theirs.get(name))}; "
                f"this {type(model).__name__} has {name}={ours.get(name)!r}"
            )
    if header.text("fingerprint") != fingerprint(model):
        raise ValueError(
            f"{here} holds a cache of a {type(model).__name__} with other weights than this one's, or other adapters"
        )


def _checked(found: Contents, cache: Host, methods: Sequence[Method]) -> Iterator[tuple[int, tuple[SaidLayer, Spec]]]:
    """The layers that hold pages, each with the spec of its segments. ValueError unless header and tensors agree."""
    rows, known = found.rows, dict[str, tuple[Spec, Format, Mapping[str, Any], dict[str, Tensor]]]()
    queries = int(cache.model.config.get_text_config(decoder=True).num_attention_heads)
    for index, (layer, entry) in enumerate(zip(cache.layers, found.layers, strict=True)):
        own = found.under(f"{index}.")
        if not isinstance(layer, PagedLayer):
            check_state(layer, entry, own, (len(rows.seen), rows.width) if cache.paged else None)
            continue
        said = SaidLayer.of(entry, len(rows.seen))
        places = [str(number) for number in range(len(said.formats))] + ([] if said.recent is None else ["recent"])
        if strange := [name for name in own if name.partition(".")[0] not in places]:
            raise ValueError(f"{entry.where} has a tensor {strange[0]!r} of no format")
        if said.shape is None:
            continue
        core, device = layer.core, _device(cache.model, index)
        spec = Spec(
            len(rows.seen), *said.shape, said.dtype, device, index, core.site.rope,
            measured(methods, core.site), max(1, queries // max(1, said.shape[0])), core.arena,
        )  # fmt: skip
        total = np.zeros((spec.rows, spec.heads), dtype=np.int64)
        for number, (form, each) in enumerate(said.formats):
            try:
                tokens = _tokens(spec, form, each, found.under(f"{index}.{number}."), known)
                form.check(spec, each, tokens, rows.seen)
            except ValueError as error:
                raise ValueError(f"{entry.where} has {error}") from error
            known[f"{index}.{number}"] = spec, form, each, tokens
            total += np.array(each["counts"], dtype=np.int64).reshape(total.shape)
        if said.recent is not None:
            said.recent.check(found.under(f"{index}.recent."), spec, rows.seen)
        if (total > rows.seen[:, None]).any():
            raise ValueError(f"{entry.where} has more tokens of a row than the {rows.seen.tolist()} that were read")
        yield index, (said, spec)


def _tokens(
    spec: Spec, form: Format, said: Mapping[str, Any], own: dict[str, Tensor],
    known: Mapping[str, tuple[Spec, Format, Mapping[str, Any], dict[str, Tensor]]],
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of a segment, with those of one whose pages it holds. ValueError where it can't hold them."""
    of = said.get("of")
    if of is None:
        return own
    if not isinstance(of, str) or of not in known:
        raise ValueError(f"of={shown(of)}, which is no segment before it")
    other, theirs, told, tensors = known[of]
    same = replace(other, layer=spec.layer, rope=spec.rope, device=spec.device) == spec
    if not same or _shared(form, said) != _shared(theirs, told) or own.keys() - {"state"}:
        raise ValueError(f"of={of!r}, whose pages it can't hold: {theirs} of {told['counts']} tokens")
    return {name: tensor for name, tensor in tensors.items() if name != "state"} | own


def _shared(form: Format, said: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two segments that hold the same pages have in common."""
    named = format_to(form)
    options = {name: value for name, value in named["options"].items() if name != "side"}
    return named["format"], options, said.get("counts"), said.get("coded")


def _fill(found: Contents, cache: Host, paged: Mapping[int, tuple[SaidLayer, Spec]]) -> None:
    """Put what was checked into an empty cache. Raises OutOfPages where an arena has no room for it."""
    stores: dict[int, Stored] = {}
    made: dict[str, Segment] = {}
    for index, (said, spec) in paged.items():
        for number, (form, each) in enumerate(said.formats):
            twin = None if each.get("of") is None else made[each["of"]]
            made[f"{index}.{number}"] = form.restore(spec, each, found.under(f"{index}.{number}."), twin)
        segments = [(form, made[f"{index}.{number}"]) for number, (form, _) in enumerate(said.formats)]
        recent = None
        if said.recent is not None:
            own = found.under(f"{index}.recent.")
            states, lse = (own[name].to(spec.device, copy=True) for name in RECENT)
            recent = Recent(states, lse, said.recent.at, said.recent.since)
        stores[index] = Stored(spec, segments, said.opened, said.ordered, recent)
    rows = cache.rows
    rows.seen, rows.prompt, rows.width, rows.width_before = found.rows.seen, found.rows.prompt, *[found.rows.width] * 2
    for index, (layer, entry) in enumerate(zip(cache.layers, found.layers, strict=True)):
        if isinstance(layer, PagedLayer):
            layer.core.stored = stores.get(index, layer.core.stored)
            layer.is_initialized = rows.width > 0
        elif isinstance(layer, CodedWindow):
            restore_window(layer, entry.said, found.under(f"{index}."), len(rows.seen), _device(cache.model, index))
        elif own := found.under(f"{index}."):
            restore(layer, entry.said, own, _device(cache.model, index))
    if not found.header.null("reading"):
        where, reading = cache.paged[0].stored.spec.device, found.header.part("reading").said
        valid, places, given = (found.tensors[f"reading.{name}"].to(where) for name in READING)
        cache.reading = Reading(valid, places, given, surplus=reading["surplus"], fixed=reading["fixed"])
