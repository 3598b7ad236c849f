"""How torch's threads wait for their next product: turning in place, or asleep. torch asks when it is imported."""

import os
import sys

POLICY = "OMP_WAIT_POLICY"
SAID = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user says it."""
OURS = "KVFOLD_WAITS"
"""A variable that says that the policy is kvfold's, not the user's."""


def rest_between_products() -> None:
    """Let torch's threads sleep between two products, unless the user says how they wait; before torch is imported.

    They would turn in place for milliseconds, on the cores that our kernels are given next, and behind a busy program
    that has taken their own. See docs/benchmarks.md.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in SAID):
        os.environ[POLICY], os.environ[OURS] = "passive", "1"


def environment_of_others() -> dict[str, str]:
    """This process's environment for a program that waits in its own way, whatever we do."""
    others = dict(os.environ)
    if others.pop(OURS, None):
        del others[POLICY]
    return others
