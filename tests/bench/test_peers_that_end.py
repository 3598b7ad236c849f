"""A peer that has ended before it is asked takes nothing else with it."""

import sys

import pytest

from kvfold.bench import peers


def test_one_that_ended_is_said_and_closed():
    peer = peers.PeerProcess("kvpress", [sys.executable, "-c", "raise SystemExit(3)"], 1)
    peer.run.wait()
    with pytest.raises(RuntimeError, match="ended with 3"):
        peer.ask("read", words="x" * 100_000)
    peer.close()


def test_each_peer_is_named_once(monkeypatch):
    monkeypatch.setattr(peers, "which_peer", lambda _: "vllm")
    given = {"context": 8, "batch": 1, "dtype": "float32", "new_tokens": 1, "threads": 1}
    with (
        pytest.raises(ValueError, match="must name each peer once"),
        peers.waiting(["a", "b"], None, [("full", None)], **given),
    ):
        pass
