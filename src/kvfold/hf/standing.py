"""What stands on one module in the place of a method of its class, and calls that."""

import inspect
import weakref
from typing import Any

from torch import nn


class StandIn:
    """A callable that takes the place of the method `name` on one module: it can be copied and pickled with it.

    It holds the module weakly. One that held it would keep a model alive, which nobody uses any more, until Python
    looks for circles: on a GPU the next model would be loaded beside it.
    """

    name: str

    def __init__(self, module: nn.Module):
        self._module = weakref.ref(module)
        self.__signature__ = inspect.signature(getattr(type(module), self.name).__get__(module))  # others look at it

    @property
    def module(self) -> Any:
        """The module. Raises ReferenceError where it is gone."""
        found = self._module()
        if found is None:
            raise ReferenceError(f"the module that {self.name} belongs to is gone")
        return found

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What the class's own method makes of a call."""
        module = self.module
        return getattr(type(module), self.name)(module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StandIn":
        return type(self)(memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module,)


def stand(kind: type[StandIn], module: nn.Module) -> None:
    """Put one on a module whose class has that method, and which has nothing of its own there."""
    if hasattr(type(module), kind.name) and kind.name not in vars(module):
        setattr(module, kind.name, kind(module))
