"""kvfold.json, the card of a converted model: it says its format; a card that can't be read stops no other."""

import json
import os
import stat

import pytest

from kvfold.models.bundled import CARD, Card, available, make_once, read_card, store, write_card

GIVEN = Card("m", "M", "none", 128, "/m.gguf", "0" * 64)


def test_a_card_has_the_number_of_its_format_and_older_ones_none(tmp_path):
    write_card(GIVEN, tmp_path)
    said = json.loads((tmp_path / CARD).read_text())
    assert said.pop("format") == 1 and read_card(tmp_path / CARD) == GIVEN
    (tmp_path / CARD).write_text(json.dumps(said))
    assert read_card(tmp_path / CARD) == GIVEN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2, "weights": "int4"}, "was written by format 2, this kvfold reads format 1"),
        ({"format": "1"}, "was written by format '1'"),
        ({"weights": "int4"}, "is damaged: weights='int4'"),
        ({"context_length": "128"}, "is damaged: context_length='128'"),
        ({"title": None}, "is damaged: title=None"),
    ],
)
def test_a_card_that_cant_be_read_stops_no_other(change, message, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path))
    for name in ("good", "newer", "broken"):
        (store() / name).mkdir(parents=True)
        write_card(GIVEN, store() / name)
    path = store() / "newer" / CARD
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (store() / "broken" / CARD).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=message):
        read_card(path)
    assert [info.folder for info in available()][-1] == store() / "good"
    assert len(caplog.messages) == 2 and message in caplog.messages[1] and "broken" in caplog.messages[0]


def test_a_converted_model_has_the_umasks_mode(tmp_path, monkeypatch):
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path))
    before = os.umask(0o027)
    try:
        folder = make_once("a-model", lambda working: write_card(GIVEN, working))
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750 and stat.S_IMODE((folder / CARD).stat().st_mode) == 0o640
