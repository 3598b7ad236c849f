"""benchmarks/agreement.py: what its file says about itself, and over which documents its table is."""

import json
import re
import runpy
from argparse import Namespace
from pathlib import Path

import pytest

import kvfold

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks/agreement.py"))
H2O = "h2o@0.5"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run by these words: what it measured of h2o, a KL for each document."""

    def made(words="first", **kl):
        monkeypatch.setattr("sys.argv", ["agreement.py", *words.split()])
        found = SCRIPT["Results"](Namespace(out=tmp_path / "a.json", model="tiny", tokens=4, device="cpu"))
        for doc, one in kl.items():
            found.docs.append(doc)
            if not found.has(doc, "h2o", 0.5):
                found.add("h2o", 0.5, {"doc": doc, "context": 8, "kl": one, "top1": 0.5, "bytes": 0.5})
        found.save()
        return json.loads((tmp_path / "a.json").read_text())

    return made


def test_its_example_writes_a_file_that_is_there():
    (path,) = re.findall(r"--out (\S+)", SCRIPT["__doc__"])
    assert (ROOT / path).is_file()


def test_every_command_once_the_last_at_the_end(run):
    assert run("--docs 1", a=0.1)["commands"] == ["python agreement.py --docs 1"]
    assert run("--docs 1", a=0.1)["commands"] == ["python agreement.py --docs 1"]
    assert run("--docs 2", a=0.1, b=0.2)["commands"][1:] == ["python agreement.py --docs 2"]
    found = run("--docs 1", a=0.1)
    assert found["commands"] == ["python agreement.py --docs 2", "python agreement.py --docs 1"]
    assert found["versions"]["kvfold"] == kvfold.__version__ and "command" not in found


def test_a_file_with_one_command_and_no_version_of_kvfold(run, tmp_path):
    old = run("--docs 1", a=0.1)
    old["command"] = old.pop("commands")[0]
    del old["versions"]["kvfold"]
    (tmp_path / "a.json").write_text(json.dumps(old))
    found = run("--docs 2", a=9.0, b=0.2)
    assert found["commands"] == ["python agreement.py --docs 1", "python agreement.py --docs 2"]
    assert found["versions"] == old["versions"]  # what it was is not known
    assert [one["kl"] for one in found["results"][H2O]] == [0.1, 0.2]


def test_another_kvfold_needs_another_file(run, tmp_path):
    old = run(a=0.1)
    old["versions"]["kvfold"] = "0.0.1"
    (tmp_path / "a.json").write_text(json.dumps(old))
    with pytest.raises(SystemExit, match=r"a\.json holds results of another versions; name another file"):
        run(b=0.1)


def test_the_summary_is_over_this_runs_documents(run):
    first = run(a=0.1, b=0.3)
    assert first["summary"][H2O]["kl"] == pytest.approx(0.2) and first["summary"][H2O]["documents"] == 2
    found = run("second", b=0.0)
    assert found["summary"][H2O]["kl"] == pytest.approx(0.3) and found["summary"][H2O]["documents"] == 1
    assert found["results"] == first["results"]
    assert run("third", c=0.5)["summary"][H2O]["kl"] == pytest.approx(0.5)


def test_the_table_is_over_this_runs_documents(tmp_path, capsys):
    kept = SCRIPT["Results"](Namespace(out=None, model="tiny", tokens=4, device="cpu"))
    for doc, kl in (("a", 0.1), ("b", 0.3)):
        kept.add("h2o", 0.5, {"doc": doc, "context": 8, "kl": kl, "top1": 0.5, "bytes": 0.25})
    with pytest.raises(SystemExit, match="nothing was measured: --docs is 0, or no document of --data"):
        SCRIPT["report"]("tiny", kept, ["h2o"], [0.5])
    kept.docs.append("b")
    SCRIPT["report"]("tiny", kept, ["h2o"], [0.5])
    out = capsys.readouterr().out
    assert "tiny, 1 documents" in out and "| h2o | 0.300 [0.300, 0.300] / 0.500 / 0.250 |" in out
