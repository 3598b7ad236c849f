"""What the CPU kernels share: when they fit, their threads, and compiling them before they are needed.

Numba and its kernels are imported on first use: `import kvfold` stays as quick as it was. What is compiled is kept on
disk (beside the package, or in Numba's own folder where that can't be written), for all processes to come.
"""

import logging
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""As what the kernels read floats that NumPy does not know, or not well."""
_set = threading.local()  # Numba's number of threads is one of each Python thread


def fits(x: Tensor) -> bool:
    """Whether the kernels can take it: on the CPU, a float that they can read, and no gradient wanted."""
    return x.device.type == "cpu" and x.dtype in FLOATS and not x.requires_grad


def holds(x: Tensor) -> bool:
    """Whether the kernels that only move numbers can take it: a byte for each will do too."""
    return fits(x) or (x.device.type == "cpu" and x.dtype == torch.uint8)


def widths_fit(*widths: int) -> bool:
    """Whether rows of these many numbers can be read in whole vectors."""
    from kvfold.ops.simd import LANES

    return not any([width % LANES for width in widths])


def use_threads() -> int:
    """Set Numba's threads to torch's; how many that is."""
    wanted = torch.get_num_threads()
    if wanted != getattr(_set, "threads", 0):
        import numba

        numba.set_num_threads(min(wanted, numba.config.NUMBA_NUM_THREADS))
        # Where both have the same OpenMP, starting Numba's threads has set torch's number too.
        torch.set_num_threads(wanted)
        _set.threads = wanted
    return wanted


def floats(x: Tensor) -> np.ndarray:
    """A tensor as a contiguous float32 array."""
    array: np.ndarray = x.float().contiguous().numpy()
    return array


def bits(x: Tensor) -> np.ndarray:
    """A tensor as the kernels read it, contiguous: bfloat16 as uint16, float16 as int16, others as they are."""
    array: np.ndarray = x.contiguous().view(BITS.get(x.dtype, x.dtype)).numpy()
    return array


def warm(work: Any, what: str) -> None:
    """Run `work`, which compiles kernels or loads them from disk; says so at the first that is compiled."""
    from numba.core import event

    class Compiling(event.Listener):  # type: ignore[misc]  # told of kernels that were not on disk, of no others
        said = False

        def on_start(self, event: Any) -> None:
            if not self.said:
                logging.getLogger("kvfold").warning("compiling the CPU kernels for %s", what)
            self.said = True

        def on_end(self, event: Any) -> None: ...

    with event.install_listener("numba:compile", Compiling()):
        work()
