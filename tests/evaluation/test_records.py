"""Results on disk: whole lines, once each, in order, whoever was killed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.evaluation.records import Lines, ResultFolder, key_of, read_lines

ABOUT = {"versions": {}}
SWEEP = {"name": "s", "methods": ["full"], "seed": 0}


def record(example: str, **more):
    key = {"model": "m", "dtype": "float32", "task": "t", "length": 8, "protocol": "aware", "example": example}
    return {**key, "method": "full", "budget": None, **more}


def test_a_store_goes_on(tmp_path):
    first = ResultFolder(tmp_path / "a", SWEEP, ABOUT)
    first.add([record("2", score=0.5), record("0", text="ü</script>\u2028")])
    first.close()
    again = ResultFolder(tmp_path / "a", {**SWEEP, "methods": ["full", "h2o"]}, ABOUT)
    assert again.done == {key_of(record("2")), key_of(record("0"))}
    again.add([record("1")])
    again.finish({key_of(record(name)): i for i, name in enumerate("012")})
    again.close()
    assert [each["example"] for each in read_lines(tmp_path / "a" / "results.jsonl")] == ["0", "1", "2"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".lock", "results.jsonl", "sweep.json"]


def test_a_result_counts_once(tmp_path):
    store = ResultFolder(tmp_path, SWEEP, ABOUT)
    store.add([record("0")])
    with pytest.raises(AssertionError, match="count twice"):
        store.add([record("0", score=1.0)])
    store.add_examples([{"model": "m", "task": "t", "length": 8, "example": "0"}] * 1)
    store.add_examples([{"model": "m", "task": "t", "length": 8, "example": "0"}])
    assert len(list(read_lines(tmp_path / "examples.jsonl"))) == 1


def test_another_sweep_and_another_writer_are_refused(tmp_path):
    store = ResultFolder(tmp_path, SWEEP, ABOUT)
    with pytest.raises(RuntimeError, match="another process is writing"):
        ResultFolder(tmp_path, SWEEP, ABOUT)
    store.close()
    with pytest.raises(ValueError, match=r"results for seed=0, not 1"):
        ResultFolder(tmp_path, {**SWEEP, "seed": 1}, ABOUT)


@given(st.integers(0, 200))
def test_a_line_cut_anywhere_is_as_if_it_had_not_been(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("lines") / "results.jsonl"
    Lines(path).append([{"i": i, "text": "schön"} for i in range(6)])
    data = path.read_bytes()
    whole = [json.loads(line) for line in data[:cut].decode(errors="ignore").split("\n")[: data[:cut].count(b"\n")]]
    path.write_bytes(data[:cut])
    assert list(read_lines(path)) == whole
    Lines(path).append([{"i": 9}])
    assert list(read_lines(path)) == [*whole, {"i": 9}]


def test_damage_elsewhere_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"results.jsonl, line 2, is damaged"):
        list(read_lines(path))


def test_each_file_has_the_number_of_its_format(tmp_path):
    store = ResultFolder(tmp_path, SWEEP, ABOUT)
    store.add([record("0")])
    store.add_examples([{"model": "m", "task": "t", "length": 8, "example": "0"}])
    store.close()
    for name in ("results.jsonl", "examples.jsonl", "sweep.json"):
        path = tmp_path / name
        text = path.read_text()
        assert json.loads(text)["format"] == 1
        path.write_text(text.replace('"format": 1', '"format": 2'))
        with pytest.raises(ValueError, match=rf"{name}.* was written by format 2, this kvfold reads format 1"):
            list(read_lines(path)) if path.suffix == ".jsonl" else ResultFolder(tmp_path, SWEEP, ABOUT)
        path.write_text(text)
    assert ResultFolder(tmp_path, SWEEP, ABOUT).done == {key_of(record("0"))}


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"sweep": 3}', '{"format": [], "sweep": {}}'])
def test_a_damaged_definition_is_named(text, tmp_path):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ValueError, match=r"sweep.json (is damaged|is not JSON|was written by format)"):
        ResultFolder(tmp_path, SWEEP, ABOUT)
