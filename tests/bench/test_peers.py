"""Peers in processes of their own: they answer in turns, and one that ends or fails says why and stops no other."""

import io
import json
import runpy
import sys
from pathlib import Path

import pytest

from kvfold.bench import peers
from kvfold.bench.lanes import Rounds
from kvfold.bench.peers import PeerLane, PeerProcess

ROOT = Path(__file__).parents[2]
TURNS = runpy.run_path(str(ROOT / peers.FOLDER / "turns.py"))
ECHO = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"seconds": [1.0], "asked": json.loads(line)}), flush=True)
"""
ENDS = """
import sys
sys.stdin.readline()
print("words", file=sys.stderr)
sys.exit("the reason")
"""


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PAUSE", 0.0)


def lane(process: PeerProcess, method: str = "full") -> PeerLane:
    return PeerLane(process, method, None, 1.0, 2, 8)


def test_the_peers_presses_are_read_without_running_it():
    known = peers.known_methods(ROOT / peers.FOLDER / peers.SCRIPTS["kvpress"])
    assert {"full", "snapkv", "streamingllm", "tova"} <= set(known)
    with pytest.raises(ValueError, match="no dictionary PRESSES"):
        peers.known_methods(ROOT / peers.FOLDER / peers.SCRIPTS["vllm"])


def test_an_answer_for_each_question():
    process = PeerProcess("echo", [sys.executable, "-c", ECHO], 1)
    try:
        one = lane(process)
        assert process.ask("read", rows=2)["asked"] == {"do": "read", "rows": 2}
        assert one.decode(3) == [1.0] and one.failed is None
        assert one.name == "full (echo, own process)"
    finally:
        process.close()
    assert process.run.poll() is not None


def test_one_that_ends_says_why_and_the_others_go_on():
    ended, well = (PeerProcess("p", [sys.executable, "-c", code], 1) for code in (ENDS, ECHO))
    try:
        rounds = Rounds([lane(ended, "a"), lane(well, "b")])
        for _ in range(2):
            rounds.play(1)
    finally:
        ended.close()
        well.close()
    first, second = rounds.lanes
    assert first.failed == "p: a process of its own ended with 1: the reason" and second.failed is None
    assert rounds.taken == {first.name: [], second.name: [[1.0], [1.0]]}
    assert rounds.steps(second).median == 1.0 and rounds.ratio(second, second).to_dict()["max"] == 1.0


def test_a_script_answers_line_by_line(monkeypatch: pytest.MonkeyPatch):
    asked = [{"do": "double", "x": 2}, {"do": "double"}, {"do": "nothing"}]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(each) + "\n" for each in asked)))
    out = io.StringIO()
    TURNS["serve"]({"double": lambda x: {"found": 2 * x}}, out)
    found = [json.loads(line) for line in out.getvalue().splitlines()]
    assert found[0] == {"found": 4} and "missing 1 required" in found[1]["error"]
    assert found[2] == {"error": "KeyError: 'nothing'"}


def test_what_is_printed_elsewhere_is_no_answer():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / peers.FOLDER)!r})\n"
        "import turns, os\nout = turns.answers()\nprint('noise', flush=True)\nos.system('echo more noise')\n"
        "turns.serve({'report': lambda: {'well': True}}, out)"
    )
    process = PeerProcess("p", [sys.executable, "-c", code], 1)
    try:
        assert process.ask("report") == {"well": True}
    finally:
        process.close()
    assert [word.strip() for word in process.words] == ["noise", "more noise"]


def test_kvpress_alone_gets_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "which_peer", lambda python: python)
    made: list[list[str]] = []

    class Noted(PeerProcess):
        def __init__(self, peer: str, command: list[str], threads: int):
            self.peer = peer
            made.append(command)

        def close(self) -> None:
            made.append([self.peer])

    monkeypatch.setattr(peers, "PeerProcess", Noted)
    sizes = {"context": 100, "batch": 2, "dtype": "float32", "new_tokens": 7, "threads": 1}
    methods: list[tuple[str, float | int | None]] = [("snapkv", 25), ("kvmerger", 0.2), ("full", None)]
    with peers.waiting(["kvpress", "vllm"], tmp_path, methods, **sizes) as (lanes, skipped):
        assert [(each.library, each.method, each.share) for each in lanes] == [
            ("kvpress", "snapkv", 0.25), ("kvpress", "full", 1.0), ("vllm", "full", 1.0),
        ]  # fmt: skip
        assert [each["contender"] for each in skipped] == ["kvpress kvmerger"] and len(made) == 2
    assert made[2:] == [["vllm"], ["kvpress"]]
    assert made[0][2] == "--turns" and made[0][made[0].index("--new-tokens") + 1] == "7"
