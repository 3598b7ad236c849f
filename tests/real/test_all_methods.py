"""Every method that is registered, on a bundled model, from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvfold
from kvfold.methods.base import keeping

STORY = Path(__file__).parents[2] / "examples/documents/blue-carbuncle.txt"


@pytest.mark.slow
def test_every_method_reads_and_answers_within_its_budget() -> None:
    """A prompt of 800 tokens: no error, and bytes of a quarter and what pages, columns and tables take."""
    words = ["--methods", "all", "--budget", "0.25", "--context", "800", "--max-new-tokens", "2", "--json"]
    command = [sys.executable, "-m", "kvfold", "compare", "--file", str(STORY), "--ask", "Who stole the stone?", *words]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # other tests run beside: a second thread would wait for its core
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["method"]: row for row in json.loads(done.stdout)["rows"]}
    infos = kvfold.list_methods()
    assert set(rows) == {info.slug for info in infos}
    assert all(row["answer"] is not None and row["kl"] >= 0 for row in rows.values())
    ratios = {info.slug: rows[info.slug]["ratio"] for info in infos if "budget" in info.options}
    limited = {slug: ratio for slug, ratio in ratios.items() if keeping([kvfold.parse(slug)])}
    reading = {slug: ratio for slug, ratio in ratios.items() if slug not in limited}
    assert 0.75 < reading.pop("sentencekv") < 0.85  # which keeps three times what it reads, and means of sentences
    # Whose budget is of what is read alone: all is kept, and beside it an index, at most a copy of the keys.
    assert not {slug: ratio for slug, ratio in reading.items() if not 1.0 < ratio < 1.5}
    assert limited.pop("look-m") > 0.9  # a text without images stays as it is
    assert not {slug: ratio for slug, ratio in limited.items() if ratio > 0.28}
