"""How torch's threads wait under the command line: asleep, unless the user says otherwise."""

import os
import subprocess
import sys

import pytest

from kvfold.waiting import OURS, SAID, environment_of_others

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
    environment = {name: value for name, value in os.environ.items() if name not in SAID} | given
    code = SHOWN.format(before=before, names=SAID)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    shown: dict[str, str | None] = eval(run.stdout.splitlines()[-1])
    return shown


def test_they_sleep_between_products():
    assert found()["OMP_WAIT_POLICY"] == "passive"


@pytest.mark.parametrize(
    "name,value", [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "1000"), ("KMP_BLOCKTIME", "9")]
)
def test_what_the_user_says_stays(name, value):
    assert found(**{name: value}) == {other: value if other == name else None for other in SAID}


def test_what_comes_too_late_is_not_set():
    assert found("import torch")["OMP_WAIT_POLICY"] is None


def test_other_programs_wait_in_their_own_way(monkeypatch):
    for name in (*SAID, OURS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert environment_of_others()["OMP_WAIT_POLICY"] == "active"
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv(OURS, "1")
    assert not {"OMP_WAIT_POLICY", OURS} & environment_of_others().keys()
