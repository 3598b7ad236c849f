"""What tests of kernels share; a file with sets of its own has a fixture of its own by this name."""

from collections.abc import Iterator

import pytest

from kvfold.ops import _cpu


@pytest.fixture(params=_cpu.names())
def instructions(request) -> Iterator[None]:
    """On every instruction set that this processor has."""
    _cpu.use(request.param)
    yield
    _cpu.use(_cpu.names()[0])
