"""What a model, a device and a method come to: bytes, batches and bounds on speed, before anything runs."""

from kvfold.bench.devices import DEVICES, Device, find_device
from kvfold.bench.plan import LayerShape, MemoryPlan, ModelShape, make_plan, shape_of

__all__ = ["DEVICES", "Device", "LayerShape", "MemoryPlan", "ModelShape", "find_device", "make_plan", "shape_of"]
