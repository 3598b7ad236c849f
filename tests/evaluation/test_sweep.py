"""What a sweep may say, and how wrong ones are refused."""

import pytest

from kvfold.evaluation.sweep import check_sweep, list_suites, read_definition, suite
from kvfold.methods import list_methods

SMALL = {"models": ["m"], "methods": ["h2o", "snapkv(budget=64)", "full"], "budgets": [0.5, 32], "tasks": ["agreement"]}


def test_each_method_comes_with_each_budget_it_takes():
    assert check_sweep(SMALL).contenders() == [
        ("full", None), ("h2o", 0.5), ("snapkv(budget=64)", None), ("h2o", 32),
    ]  # fmt: skip


def test_a_composition_comes_with_each_budget_that_one_of_its_stages_takes():
    methods = ["snapkv | full", "h2o(budget=0.5) | streamingllm(budget=9)"]
    assert check_sweep({**SMALL, "methods": methods}).contenders() == [
        ("full", None), (methods[0], 0.5), (methods[1], None), (methods[0], 32),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"methods": ["h2o | tova"]}, r"methods=.*h2o and tova each have one"),
        ({"budget": [0.5]}, r"budget=\[0.5\]: Extra inputs are not permitted"),
        ({"methods": ["h3o"]}, r"methods=.*method='h3o' is unknown \(did you mean 'h2o'"),
        ({"tasks": ["agreement(force=3)"]}, r"task agreement has no option force=3; its options are: forced"),
        ({"tasks": ["nothing/here"]}, r"task='nothing/here' is unknown"),
        ({"tasks": ["agreement(3)"]}, r"options must be name=value"),
        ({"protocols": ["blind"]}, r"protocols.0='blind': Input should be 'aware', 'agnostic' or 'turns'"),
        ({"samples": 0}, r"samples=0: Input should be greater than or equal to 1"),
        ({"budgets": []}, r"budgets=\[\]: List should have at least 1 item"),
        ({"budgets": [1.5]}, r"budget"),
    ],
)
def test_wrong_sweeps_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        check_sweep({**SMALL, **change}).contenders()


def test_all_methods_are_those_with_a_budget():
    slugs = [info.slug for info in list_methods() if "budget" in info.options]
    for every in ("all", ["all"]):
        assert check_sweep({**SMALL, "methods": every}).methods == slugs
    assert "snapkv" in slugs and "full" not in slugs


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"mine: models is missing; methods is missing"):
        check_sweep({"budgets": [1], "tasks": ["agreement"]}, "mine")


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.yaml", "models: [m]\nbudgets: [0.5, 64]\n"),
        ("a.toml", 'models = ["m"]\nbudgets = [0.5, 64]\n'),
        ("a.json", '{"models": ["m"], "budgets": [0.5, 64]}'),
    ],
)
def test_files_of_three_kinds(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_definition(tmp_path / name) == {"models": ["m"], "budgets": [0.5, 64]}


@pytest.mark.parametrize("name, text", [("a.ini", "x=1"), ("a.yaml", "a: [1"), ("a.toml", "a = ["), ("a.json", "[1]")])
def test_files_that_cannot_be_read(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"sweep='.*{name}' (can't be read|must be a mapping)"):
        read_definition(tmp_path / name)


def test_the_suites_that_ship_are_sweeps():
    assert "smoke" in list_suites()
    for name in list_suites():
        made = check_sweep(suite(name), name)
        assert made.name == name and len(made.contenders()) > 1
    with pytest.raises(ValueError, match=r"suite='none' is unknown; there are .*smoke"):
        suite("none")
