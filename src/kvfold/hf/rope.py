"""A model's rotary embedding, used through the model's own code so that every convention is its own.

Which channels of a layer's keys turn is measured: models leave RoPE out of some layers (SmolLM3, Cohere 2, EXAONE 4,
Llama 4), or turn a part of each head (Phi, Persimmon, StableLM), and each says so in words of its own.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from threading import RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from kvfold.artefacts.fields import text_config, turns_by_length
from kvfold.hf.anatomy import attention_modules, has_grid_positions, text_decoder
from kvfold.hf.argument import with_cache
from kvfold.hf.looking import has_weights, ids_device, looking
from kvfold.hf.tables import rotaries
from kvfold.ops.cpu import fits
from kvfold.ops.turn import Pairs, naive, turn
from kvfold.rotation import Rope, Still

APPLY = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")
"""What the files of models call the function that turns queries and keys."""
COSINES = (1.0, -1.0)
"""What a pass is read with: in its first row nothing turns, in the second all by half a turn, in the rest as ever."""
POSITIONS = (0, 0, 1, 3, 11)
"""Of one token in each row. Alone it reads itself and nothing else, so that what enters a layer is the same in all."""
PARTS = (2, 3, 5, 7)
"""Tokens, each read in such rows: these parts of the way through the vocabulary."""
CLOSE, COARSE = 1e-3, 0.05
"""How far a key that is turned here may be from the model's, of the largest; the second in 16 bits."""

STEPS = (0, 1, -1, 3, -17, 77, -1001, 4099)
"""By which a rotation is compared with one by pairs of channels."""

Known = tuple[Tensor, int, Pairs | None]
"""A module's angles, how often they were written, and how it turns by them."""
_paired: WeakKeyDictionary[nn.Module, dict[Any, Known]] = WeakKeyDictionary()
_found: WeakKeyDictionary[nn.Module, dict[int, Rope]] = WeakKeyDictionary()
_failed: WeakSet[nn.Module] = WeakSet()
"""Models of which was said that the pass over them failed."""
_measuring = RLock()


@dataclass(frozen=True)
class ModelRope:
    """Rotates vectors further with the rotary module and the `apply_rotary_pos_emb` of the model's own file."""

    rotary: nn.Module
    apply: Callable[..., Any]
    layer_type: str | None
    channels: tuple[int, int]
    """The first that turns, and the one behind the last."""

    def shift(self, x: Tensor, steps: Tensor) -> Tensor:
        """Vectors (B, H, T, D) rotated for position p become those for p + steps (B, H, T); computed in float32."""
        pairs = self.pairs if fits(x) else None
        return self._by_model(x, steps) if pairs is None else turn(x, steps, pairs)

    @property
    def pairs(self) -> Pairs | None:
        """Pairs of channels and their angles, where the model's own code does just what these say."""
        angles = getattr(self.rotary, "inv_freq" if self.layer_type is None else f"{self.layer_type}_inv_freq", None)
        if not isinstance(angles, Tensor) or angles.device.type != "cpu":
            return None
        known, written = _paired.setdefault(self.rotary, {}), _version(angles)
        key = self.layer_type, self.apply, self.channels
        of, times, pairs = known.get(key, (None, 0, None))
        if of is not angles or times != written:  # each layer asks at every step
            pairs = self._paired(angles)
            known[key] = angles, written, pairs
        return pairs

    def _paired(self, angles: Tensor) -> Pairs | None:
        """What `pairs` says by these angles, worked out."""
        start, stop = self.channels
        if angles.shape != ((stop - start) // 2,):
            return None
        with torch.inference_mode(False), torch.no_grad():
            turns = angles.detach().float().numpy().copy()
            steps = torch.tensor(STEPS, dtype=torch.int32)[None, None]
            x = torch.linspace(-1.0, 1.0, steps.numel() * (stop + 1), dtype=torch.float32)
            x = x.view(1, 1, -1, stop + 1)[..., :stop]
            want = self._by_model(x, steps)
            both = (Pairs(turns, start, neighbours) for neighbours in (False, True))
            return next(
                (pairs for pairs in both if bool((naive.turn(x, steps, pairs) - want).abs().max() < 1e-5)), None
            )

    def _by_model(self, x: Tensor, steps: Tensor) -> Tensor:
        """`shift` by the model's own code."""
        (b, h, t, d), (start, stop) = x.shape, self.channels
        alike = h > 1 and torch.equal(steps[:, 1:], steps[:, :-1]) if x.device.type == "cpu" else steps.stride(1) == 0
        rows, heads = (b, h) if alike else (b * h, 1)  # heads that turn alike need their angles once
        flat = x.reshape(rows, heads, t, d).float()
        part = flat[..., start:stop]
        both = (part,) if _alone(self.apply) else (part, part)
        turned = self.apply(*both, *self._made(flat, (steps[:, 0] if alike else steps).reshape(rows, t)))
        turned = turned if isinstance(turned, Tensor) else turned[0]
        if stop - start < d:
            turned = torch.cat([flat[..., :start], turned, flat[..., stop:]], -1)
        made: Tensor = turned.to(x.dtype).view(b, h, t, d)
        return made

    def _made(self, x: Tensor, steps: Int[Tensor, "R T"]) -> tuple[Tensor, Tensor]:
        where = {} if self.layer_type is None else {"layer_type": self.layer_type}
        cos, sin = self.rotary(x, position_ids=steps, **where)
        scaling = self._scaling()  # YaRN and longrope multiply cos and sin; the stored vector already has it
        return cos / scaling, sin / scaling

    def _scaling(self) -> float:
        name = "attention_scaling" if self.layer_type is None else f"{self.layer_type}_attention_scaling"
        return float(getattr(self.rotary, name, 1.0))


def _version(x: Tensor) -> int:
    """How often a tensor was written in place, as far as that is counted."""
    return -1 if x.is_inference() else x._version


@cache
def _alone(apply: Callable[..., Any]) -> bool:
    """Whether such a function takes queries or keys alone, not both."""
    return list(inspect.signature(apply).parameters)[1] == "cos"


def find_ropes(model: Any) -> dict[int, Rope]:
    """What turns the keys of each layer that a cache of this model holds in full; none for a layer where none is known.

    `Still` where positions leave them as they are. None is known where the model has no rotary module, its angles
    depend on the text's length, images have positions of their own, or the model's own keys are not what its
    rotation makes of them (a norm behind it). Measured once for a model, by a pass over a few tokens, in which other
    threads may use the model. A pass that fails is said once, as a warning, and made again for the next cache.
    """
    decoder = text_decoder(model)
    if has_grid_positions(model) or not rotaries(model) or not has_weights(decoder):
        return {}
    with _measuring:
        if decoder not in _found:
            try:
                keys = _keys(model, decoder)
            except Exception as error:  # a model that reads no lone token: that alone keeps nobody from using it
                if decoder not in _failed:
                    _failed.add(decoder)
                    name, text = type(model).__name__, "which keys of %s turn is not known: %s: %s"
                    logging.getLogger("kvfold").warning(text, name, type(error).__name__, error)
                return {}
            _found[decoder] = _ropes(model, keys)
        return _found[decoder]


def _ropes(model: Any, keys: dict[int, Tensor]) -> dict[int, Rope]:
    """What turns these layers' keys, as `_keys` gives them."""
    modules, found = attention_modules(model), dict[int, Rope]()
    for layer, states in keys.items():
        rows = states[:, :, 0].reshape(len(POSITIONS), -1, *states.shape[1::2]).transpose(1, 2)  # R H N D
        close, rows = (CLOSE if rows.dtype.itemsize >= 4 else COARSE), rows.float()
        turned, silent = _turning(rows)
        if not bool(turned.any()):
            found[layer] = Still()
            continue
        candidates = _candidates(model, modules.get(layer), turned, silent)
        rope = next((rope for rope in candidates if _explains(rope, rows, close)), None)
        if rope is not None:
            found[layer] = rope
    return found


def _keys(model: Any, decoder: Any) -> dict[int, Tensor]:
    """The keys of every layer that holds keys, (R * N, H, 1, D); none where the rotations don't go by rows."""
    config, seen, here = text_config(model), list[bool](), get_ident()

    def turn(module: nn.Module, args: Any, output: Any) -> Any:
        if get_ident() != here:  # another thread's pass: it is to read as ever
            return None
        parts = output if isinstance(output, tuple) else (output,)
        made = [part.clone() for part in parts]
        each = len(PARTS)
        seen.append(all(len(part) == each * len(POSITIONS) for part in parts))
        if seen[-1]:
            size = parts[0].abs() if len(parts) == 1 else torch.sqrt(sum(part.float() ** 2 for part in parts))
            for row, cosine in enumerate(COSINES):
                rows = slice(row * each, (row + 1) * each)
                made[0][rows] = (cosine * size[rows]).to(made[0].dtype)
                for sine in made[1:]:
                    sine[rows] = 0
        return tuple(made) if isinstance(output, tuple) else made[0]

    cache = DynamicCache(config=config)
    device = ids_device(decoder)
    tokens = torch.tensor([config.vocab_size // part for part in PARTS], device=device, dtype=torch.int64)
    places = torch.tensor(POSITIONS, device=device, dtype=torch.int64).repeat_interleave(len(PARTS))
    with looking(model), ExitStack() as stack:
        for rotary in rotaries(model):
            stack.callback(rotary.register_forward_hook(turn).remove)
        ids = tokens.repeat(len(POSITIONS))[:, None]
        decoder(input_ids=ids, position_ids=places[:, None], use_cache=True, **with_cache(decoder, cache))
    if not seen or not all(seen):
        return {}
    held = {i: getattr(layer, "keys", None) for i, layer in enumerate(cache.layers)}
    return {i: k for i, k in held.items() if isinstance(k, Tensor) and k.dim() == 4 and k.shape[2] == 1}


def _turning(rows: Float[Tensor, "R H N D"]) -> tuple[Bool[Tensor, " D"], Bool[Tensor, " D"]]:
    """Of which channels half a turn changes the sign; and which say nothing, as they are zero in all keys."""
    apart, opposite = ((rows[1] + sign * rows[0]).abs().sum((0, 1)) for sign in (-1, 1))
    return opposite < apart, opposite == apart


def _candidates(
    model: Any, attention: nn.Module | None, turned: Bool[Tensor, " D"], silent: Bool[Tensor, " D"]
) -> Iterator[ModelRope]:
    """The rotations that a layer may have whose channels turn so: those at one end of a head, or all."""
    file = sys.modules[type(attention).__module__] if attention is not None else None
    functions = [getattr(file, name) for name in APPLY if hasattr(file, name)]
    size, places = len(turned), torch.arange(len(turned), device=turned.device)
    for rotary in rotaries(model):
        kinds: Any = getattr(rotary, "rope_type", "default")
        for layer_type in kinds if isinstance(kinds, dict) else (None,):
            if turns_by_length(kinds if layer_type is None else kinds[layer_type]):
                continue
            width = _width(rotary, layer_type, turned.device)
            ends = [(start, start + n) for n in (width, 2 * width) for start in {0, size - n} if 0 < n <= size]
            for start, stop in ends:
                inside = (places >= start) & (places < stop)
                if bool(((inside == turned) | silent).all()):
                    yield from (ModelRope(rotary, apply, layer_type, (start, stop)) for apply in functions)


def _width(rotary: nn.Module, layer_type: str | None, device: torch.device) -> int:
    """For how many channels a rotary embedding has angles: all that turn, or half; 0: not in a form that we know."""
    where = {} if layer_type is None else {"layer_type": layer_type}
    one = torch.zeros(1, 1, dtype=torch.long, device=device)
    angles = rotary(one.float(), position_ids=one, **where)
    return int(angles[0].shape[-1]) if isinstance(angles, tuple) and len(angles) == 2 else 0


def _explains(rope: ModelRope, rows: Float[Tensor, "R H N D"], close: float) -> bool:
    """Whether a rotation makes of the keys that were not turned those that the model has."""
    still, turned = rows[:1].expand_as(rows[2:]), rows[2:]
    places = torch.tensor(POSITIONS[2:], device=rows.device, dtype=torch.int64)[:, None, None].expand(turned.shape[:3])
    gap = (rope.shift(still, places) - turned).abs().max()
    return bool(gap <= close * turned.abs().max())
