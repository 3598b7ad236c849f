"""benchmarks/needles.py: methods down, lengths across, a table for each protocol."""

import runpy
from pathlib import Path

import pytest

from report_folders import write_folder

NEEDLES = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/needles.py"))


def test_a_table_for_each_protocol(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", protocols=("aware", "agnostic"), samples=5, failures=False)
    text = NEEDLES["page"](folder)
    assert text.count("| method | budget | KV ratio | 1024 | 4096 |") == 2 and "at one of 5 depths" in text
    assert "protocol: aware" in text and "protocol: agnostic" in text
    rows = [line for line in text.splitlines() if line.startswith("| `full` | - | 1.000 |")]
    assert len(rows) == 2 and all(line.count("|") == 6 for line in rows)
    assert "too small" not in text


def test_without_needles_there_is_no_table(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", tasks=["agreement"], samples=2)
    with pytest.raises(ValueError, match="hold no task niah"):
        NEEDLES["page"](folder)
