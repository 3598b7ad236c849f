"""The bar of `kvfold run`: for long prompts, on a terminal, and gone at the end."""

import io

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from kvfold.cli import common
from kvfold.cli.app import app
from kvfold.evaluation.decoding import prefill
from kvfold.hf.cache import Cache
from kvfold.hf.call import splitting
from models import subject, tokens


def written(monkeypatch: pytest.MonkeyPatch, terminal: bool, shares: list[float]) -> str:
    """What stands on stderr when so much was told."""
    to = io.StringIO()
    monkeypatch.setattr(common, "stderr", Console(file=to, force_terminal=terminal, width=90))
    with common.reading("reading [40] tokens") as told:
        for share in shares:
            told(share)
    return to.getvalue()


def test_a_bar_is_for_terminals_and_for_what_is_told(monkeypatch):
    assert "reading [40] tokens" in (said := written(monkeypatch, True, [0.25, 1.0])) and "100%" in said
    assert "reading" not in written(monkeypatch, True, [])
    assert written(monkeypatch, False, [0.25, 1.0]) == ""


@pytest.mark.parametrize(("chunk", "size"), [(None, 10), (15, 10), (15, 0)])
def test_a_prompt_tells_how_far_it_is(chunk, size):
    model, told = subject("llama"), []
    prefill(model, tokens(45)["input_ids"], Cache(model, part_size=size), chunk, told.append)
    assert told == sorted(told) and told[-1] == 1.0
    assert len(told) >= (3 if not size else 9)


def test_a_short_prompt_tells_nothing():
    model, told = subject("llama"), []
    prefill(model, tokens(45)["input_ids"], Cache(model), None, told.append)
    assert told == []


def test_run_reads_in_parts_by_itself(folder, document, monkeypatch):
    sizes, reach = [], splitting.Parts.reach

    def noted(self, stop):
        reach(self, stop)
        sizes.append(stop - self.start)

    monkeypatch.setattr(splitting, "PART", 64)
    monkeypatch.setattr(splitting.Parts, "reach", noted)
    given = ["run", "--model", str(folder), "--file", str(document), "--max-new-tokens", "4", "--no-chat"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert sizes.count(64) >= 3 * 3
    assert torch.is_grad_enabled() and "\x1b[" not in done.stderr
