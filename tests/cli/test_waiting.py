"""How torch's threads wait under the command line: asleep, unless the user says otherwise."""

import os
import subprocess
import sys

import pytest

from kvfold.cli.app import WAITING

SHOWN = """
import os, sys
{before}
sys.argv = ["kvfold", "methods", "full"]
from kvfold.cli import main
try:
    main()
except SystemExit:
    pass
print({{name: os.environ.get(name) for name in {names}}})
"""


def found(before: str = "", **given: str) -> dict[str, str | None]:
    environment = {name: value for name, value in os.environ.items() if name not in WAITING} | given
    code = SHOWN.format(before=before, names=WAITING)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    shown: dict[str, str | None] = eval(run.stdout.splitlines()[-1])
    return shown


def test_they_sleep_between_products():
    assert found()["OMP_WAIT_POLICY"] == "passive"


@pytest.mark.parametrize(
    "name,value", [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "1000"), ("KMP_BLOCKTIME", "9")]
)
def test_what_the_user_says_stays(name, value):
    assert found(**{name: value}) == {other: value if other == name else None for other in WAITING}


def test_what_comes_too_late_is_not_set():
    assert found("import torch")["OMP_WAIT_POLICY"] is None
