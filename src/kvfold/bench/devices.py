"""Devices as their makers' datasheets give them: memory, bandwidth, and dense matrix throughput by dtype.

NVIDIA's sheets often print tensor-core throughput with 2:4 sparsity; here it is halved. GeForce cards are given with
float32 accumulation, which is what torch uses. float32 is the plain FP32 rate, as torch does not use TF32 by default.
Gigabytes are 10^9 bytes: a driver may report up to 7 % more, and never hands out all of it.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

TERA = 10**12
GB = 10**9


@dataclass(frozen=True)
class Device:
    """A device: memory in bytes, memory bandwidth in bytes/s, peak FLOPs/s by dtype (dense matrix products)."""

    name: str
    memory: int
    bandwidth: float
    flops: Mapping[str, float]

    def peak(self, dtype: str) -> float:
        """FLOPs/s in this dtype. Raises ValueError for one that the device has no fast path for."""
        if dtype not in self.flops:
            raise ValueError(f"dtype={dtype!r} must be one that {self.name} multiplies fast: {', '.join(self.flops)}")
        return self.flops[dtype]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def _gpu(
    name: str, memory: int, bandwidth: int, half: float | int, single: float | int, *, bf16: bool = True
) -> Device:
    """A preset from datasheet units: GB, GB/s, TFLOPs in half precision (tensor cores, dense) and in float32."""
    flops = {"float16": float(half) * TERA, "float32": float(single) * TERA}
    if bf16:
        flops = {"bfloat16": float(half) * TERA, **flops}
    return Device(name, memory * GB, float(bandwidth * GB), flops)


DEVICES = {
    device.name: device
    for device in (
        _gpu("B200", 180, 8000, 2250, 75),
        _gpu("H200", 141, 4800, 989.5, 67),
        _gpu("H100-SXM", 80, 3350, 989.5, 67),
        _gpu("H100-PCIe", 80, 2000, 756.5, 51),
        _gpu("A100-80GB", 80, 2039, 312, 19.5),
        _gpu("A100-40GB", 40, 1555, 312, 19.5),
        _gpu("L40S", 48, 864, 362, 91.6),
        _gpu("L4", 24, 300, 121, 30.3),
        _gpu("A10", 24, 600, 125, 31.2),
        _gpu("T4", 16, 320, 65, 8.1, bf16=False),
        _gpu("RTX5090", 32, 1792, 209.5, 104.8),
        _gpu("RTX4090", 24, 1008, 165.2, 82.6),
        _gpu("RTX3090", 24, 936, 71, 35.6),
        _gpu("MI300X", 192, 5300, 1307.4, 163.4),
    )
}
"""Presets by name; B200 and A100-80GB are the SXM modules."""

ALIASES = {"h100": "H100-SXM", "a100": "A100-80GB"}

_QUANTITY = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z/]*)\s*")
_PREFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_UNITS = {
    "memory": (_PREFIX | _BINARY, ("b",), "bytes, as 24GB or 24GiB"),
    "bandwidth": (_PREFIX | _BINARY, ("b/s",), "bytes per second, as 900GB/s or 1TB/s"),
    "flops": (_PREFIX, ("", "flops", "flop/s", "flops/s"), "operations per second, as 165T or 165TFLOPS"),
}


def quantity(name: str, text: str) -> float:
    """The number that `text` gives for "memory" (bytes), "bandwidth" (bytes/s) or "flops" (FLOPs/s).

    Raises ValueError that names the argument, its text and the form that is wanted.
    """
    prefixes, units, form = _UNITS[name]
    found = _QUANTITY.fullmatch(text)
    factors = {f"{prefix}{unit}": factor for prefix, factor in prefixes.items() for unit in units}
    if found is None or found[2].lower() not in factors or not float(found[1]) > 0:
        raise ValueError(f"{name}={text!r} must be a positive number of {form}")
    return float(found[1]) * factors[found[2].lower()]


def find_device(
    name: str | None, *, memory: str | None = None, bandwidth: str | None = None, flops: str | None = None
) -> Device:
    """A preset by its name in any spelling, with what else is given in its place; all three given need no name.

    A `flops` given holds for every dtype. Raises ValueError for an unknown name, a quantity that can't be read, or
    a device that is not described in full.
    """
    given = {"memory": memory, "bandwidth": bandwidth, "flops": flops}
    missing = [f"--{what}" for what, text in given.items() if text is None]
    known = f"one of {', '.join(DEVICES)}"
    if name is None and missing:
        raise ValueError(f"device=None must be {known}; a device of your own lacks {', '.join(missing)}")
    base = Device("custom", 0, 0.0, {}) if name is None else _preset(name, known)
    parts: dict[str, Any] = {what: quantity(what, text) for what, text in given.items() if text is not None}
    if "memory" in parts:
        parts["memory"] = int(parts["memory"])
    if "flops" in parts:
        parts["flops"] = dict.fromkeys(("bfloat16", "float16", "float32"), parts["flops"])
    if parts and name is not None:
        parts["name"] = f"{base.name} (changed)"
    return replace(base, **parts)


def _preset(name: str, known: str) -> Device:
    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    names = {plain(device): device for device in DEVICES} | ALIASES
    if plain(name) not in names:
        raise ValueError(f"device={name!r} must be {known}, or left out with --memory, --bandwidth and --flops given")
    return DEVICES[names[plain(name)]]
