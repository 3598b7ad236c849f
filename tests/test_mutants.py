"""The list of `make mutants` fits the code; whoever runs it leaves the code as it was."""

import shutil
from dataclasses import replace

import pytest

import mutants
from mutants import PAGE, ROOT, Mutant


def test_every_change_fits_the_code_and_is_in_docs():
    found = mutants.mutants()
    assert len(found) >= 30 and {each.file.split("/")[2] for each in found} >= {"pages", "formats", "layer", "views"}
    said = PAGE.read_text(encoding="utf-8")
    assert f"of {len(found)} are seen.**" in said, "run: make mutants"
    assert [each.name for each in found if f"| {each.name} | `" not in said] == [], "run: make mutants"


@pytest.mark.parametrize(
    ("old", "new", "tests", "message"),
    [
        ("nowhere", "x", '["tests/test_budgets.py"]', "'a': its old text stands 0 times in src/kvfold/options.py"),
        ("def ", "x", '["tests/test_budgets.py"]', "'a': its old text stands [0-9]+ times"),
        ("def check_int(", "def check_int(", '["tests/test_budgets.py"]', "'a' changes nothing"),
        ("def check_int(", "x", '["tests/nowhere.py"]', "'a': tests=.* are not all there"),
        ("def check_int(", "x", "[]", "'a': tests=.* are not all there"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, old, new, tests, message):
    path = tmp_path / "list.toml"
    path.write_text(
        f'[[mutant]]\nname = "a"\nfile = "src/kvfold/options.py"\nold = "{old}"\nnew = "{new}"\ntests = {tests}\n'
    )
    with pytest.raises(ValueError, match=message):
        mutants.mutants(path)


@pytest.mark.slow
def test_a_change_is_seen_or_not_and_nothing_stays(tmp_path, monkeypatch):
    source, name = tmp_path / "src", "src/kvfold/options.py"
    shutil.copytree(ROOT / "src", source)
    path, text = source / "kvfold/options.py", (ROOT / name).read_text(encoding="utf-8")
    line = "def check_int(name: str, value: object, low: int, odd: bool = False, high: int = LARGEST) -> None:"
    broken = Mutant("broken", name, line, f"{line}\n    return None", ("tests/test_budgets.py",))
    harmless = replace(broken, name="harmless", new=f"{line}  # another comment")
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert [seen for _, seen in mutants.outcomes([broken, harmless], source)] == [True, False]
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert (ROOT / name).read_text(encoding="utf-8") == text
    with pytest.raises(RuntimeError, match="says nothing about the change"):  # no test of it was collected
        list(mutants.outcomes([replace(broken, new=f"import nothing_of_this_name\n\n\n{line}")], source))
    assert path.read_bytes() == before[0]
    monkeypatch.setattr(mutants, "run", lambda tests, source: 1)
    with pytest.raises(RuntimeError, match=r"without any change tests/test_budgets\.py do not pass"):
        list(mutants.outcomes([broken], source))


def test_the_page_counts_what_was_seen():
    one = Mutant("one", "src/kvfold/a.py", "x", "y", ("t",))
    assert "**1 of 2 are seen.**" in mutants.page([(one, True), (replace(one, name="two"), False)])
    assert "| two | `a.py` | **no** |" in mutants.page([(replace(one, name="two"), False)])
