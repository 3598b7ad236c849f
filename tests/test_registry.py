"""Finding methods, their text form, and the public names."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import kvfold
from kvfold.methods import get_method, list_methods, parse
from kvfold.methods.base import Method, Pipeline, method
from kvfold.methods.kvmerger import KVMerger
from kvfold.methods.snapkv import SnapKV
from kvfold.methods.streamingllm import StreamingLLM

SHIPPED = {"full", "h2o", "kvmerger", "snapkv", "streamingllm", "tova"}


def test_public_names():
    assert kvfold.__all__ == [
        "Arena", "Cache", "Dense", "Drop", "Keep", "LayerView", "Method", "MethodInfo", "OutOfPages", "Pipeline",
        "Read", "Rewrite", "Store", "fast_linears", "list_methods", "load", "method", "parse",
    ]  # fmt: skip
    assert all(getattr(kvfold, name) is not None and name in dir(kvfold) for name in kvfold.__all__)
    with pytest.raises(AttributeError, match="'kvfold' has no attribute 'Cahce'"):
        kvfold.Cahce  # noqa: B018


def test_importing_brings_neither_transformers_nor_methods():
    script = """
import sys, warnings
filters, threads = list(warnings.filters), sys.getrecursionlimit()
import torch
state = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
import kvfold
from kvfold.methods.base import registry
assert "transformers" not in sys.modules, "transformers"
assert registry == {}, registry
assert set(kvfold.__all__) <= set(dir(kvfold)), dir(kvfold)
after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
assert torch.equal(state[0], after[0]) and state[1:] == after[1:]
slugs = [info.slug for info in kvfold.list_methods()]
assert "transformers" not in sys.modules, "transformers, after list_methods"
print(*slugs)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) >= SHIPPED


def test_list_methods():
    infos = list_methods()
    slugs = [info.slug for info in infos]
    assert slugs == sorted(slugs) and set(slugs) >= SHIPPED
    assert [info.slug for info in list_methods()] == slugs
    for info in infos:
        assert info.cls.info is info and get_method(info.slug) is info
        assert info.title and info.summary and not info.summary.startswith(info.cls.__name__ + "(")


def test_every_paper_method_has_a_formula():
    for info in list_methods():
        if info.paper:
            assert info.formula, f"{info.slug}: @method(..., formula=r'...'), LaTeX, for docs/methods"
        for line in info.formula.splitlines():
            assert line == line.strip() and line.count("{") == line.count("}") and "$" not in line, info.slug


def test_every_option_is_explained():
    for info in list_methods():
        silent = [name for name, meaning in info.meanings.items() if not meaning]
        assert not silent, f"{info.slug}: @method(..., options={{name: meaning}}) lacks {silent}"


@pytest.mark.usefixtures("scratch_methods")
def test_formula_and_options_of_a_method():
    made = method(
        "mine", title="Mine", kind="evict", options={"window": "how wide"},
        formula=r"""
            a = b,
                c
            d
        """,
    )  # fmt: skip
    cls = made(dataclass(frozen=True)(type("Mine", (SnapKV,), {"__doc__": "Mine."})))
    assert cls.info.formula == "a = b, c\nd"
    assert cls.info.meanings["window"] == "how wide" and "fraction" in cls.info.meanings["budget"]
    assert cls.info.meanings["kernel"] == ""
    with pytest.raises(ValueError, match=r"options=\['widow'\] are none of mine's: budget, window, kernel, pool"):
        method("mine", title="Mine", kind="evict", options={"widow": "?"})(cls)


def test_to_dict_is_json():
    for info in list_methods():
        back = json.loads(json.dumps(info.to_dict()))
        assert list(back) == ["slug", "title", "arxiv", "kind", "summary", "options"]
        assert parse(info.slug) == info.cls(**info.options)
    kvmerger = get_method("kvmerger").to_dict()
    assert kvmerger["arxiv"] == "2407.08454" and kvmerger["kind"] == "merge"
    assert kvmerger["options"]["budget"] == 0.35 and kvmerger["options"]["threshold"] is None


def test_parse_of_one_method():
    assert parse("snapkv") == parse(" snapkv ( ) ") == SnapKV()
    assert parse("snapkv(budget=16, pool='max')") == parse("snapkv", budget=16, pool="max")
    assert parse("snapkv(budget=16)", window=8) == SnapKV(budget=16, window=8)
    assert parse('kvmerger(skip=(0, -1), threshold=None,\n mass="paper")') == KVMerger(skip=(0, -1), mass="paper")
    given = SnapKV(budget=3)
    assert parse(given) is given


def test_parse_of_compositions():
    three = parse("h2o(budget=0.5) | kvmerger(skip=(0, (1))) | snapkv")
    assert isinstance(three, Pipeline) and [stage.info.slug for stage in three.stages] == ["h2o", "kvmerger", "snapkv"]
    assert three.stages[1] == KVMerger(skip=(0, 1))
    assert parse("full|snapkv") == parse("full") | parse("snapkv")
    assert (SnapKV() | (parse("full") | SnapKV())).stages == ((SnapKV() | parse("full")) | SnapKV()).stages


def test_a_method_as_text_parses_back():
    for info in list_methods():
        assert parse(str(info.cls())) == info.cls()
    chain = SnapKV(budget=9, pool="max") | KVMerger(mass="paper", skip=())
    assert parse(str(chain)) == chain


@pytest.mark.usefixtures("scratch_methods")
def test_quotes_and_brackets_may_hold_anything():
    @method("labelled", title="Labelled", kind="none")
    @dataclass(frozen=True)
    class Labelled(Method):
        """Takes any text."""

        label: str = ""
        more: tuple[object, ...] = ()

    for label in ("a | b", "x) | (y", "it's", 'say "a|b"', "=,(", "\\", "\\' | h2o(", 'it\'s "a | b"'):
        stage = Labelled(label=label, more=((label,), "|"))
        assert parse(str(stage)) == stage
        assert parse(f"{stage} | full") == stage | parse("full")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapkw", r"method='snapkw' is unknown \(did you mean 'snapkv'\?\); there are .*full, h2o, .*kvmerger"),
        ("zzz", r"method='zzz' is unknown; there are "),
        ("", "method='' is not of the form"),
        ("snapkv |", "method='' is not of the form"),
        ("snapkv(budget=3", r"method='snapkv\(budget=3' is not of the form"),
        ("snapkv)", "is not of the form"),
        ("snapkv(3)", "options are given by name"),
        ("snapkv(**{'budget': 3})", "options are given by name"),
        ("snapkv(budget=)", "can't read the options"),
        ("snapkv(budget=open('x'))", "can't read the options"),
        ("snapkv(budget=3)(window=4)", "one pair of parentheses"),
        ("snapkv(budget=3)+h2o(budget=4)", "one pair of parentheses"),
        ("snapkv(budget=3, budget=4)", "budget is given twice"),
        ("snapkv(bugdet=3)", r"snapkv has no option bugdet=3; its options are: budget, window, kernel, pool"),
        ("snapkv(budget=-3)", "budget=-3 must be a fraction"),
        ("full(budget=3)", "full has no option budget=3; its options are: none"),
        ("snapkv | streamingllm(sinks=-1)", "sinks=-1 must be an int >= 0"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_options_beside_the_text():
    with pytest.raises(ValueError, match="'budget' is given twice for snapkv"):
        parse("snapkv(budget=3)", budget=4)
    with pytest.raises(ValueError, match=r"\['budget'\] must be given to SnapKV"):
        parse(SnapKV(), budget=4)


def test_options_beside_a_composition_go_to_the_only_stage_that_has_them():
    assert parse("snapkv | full", budget=4) == SnapKV(budget=4) | parse("full")
    assert parse("full | snapkv(window=8)", budget=4, kernel=3).stages[1] == SnapKV(budget=4, window=8, kernel=3)
    assert parse("h2o | streamingllm(budget=9)", sinks=2).stages[1] == StreamingLLM(budget=9, sinks=2)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("h2o | snapkv", {"budget": 4}, r"\['budget'\] belong inside .* 'h2o \| snapkv': h2o and snapkv each have"),
        ("h2o(budget=0.5) | snapkv", {"budget": 4}, "h2o and snapkv each have one"),
        ("snapkv(budget=3) | full", {"budget": 4}, "'budget' is given twice for snapkv"),
        ("full | full", {"budget": 4}, r"budget=4 fits no stage of 'full \| full': full and full have no such option"),
        ("snapkv | full", {"windw": 4}, "windw=4 fits no stage of .*: snapkv and full have"),
        ("snapkw | full", {"budget": 4}, "method='snapkw' is unknown"),
        ("snapkv | full", {"budget": -4}, "budget=-4 must be a fraction"),
    ],
)
def test_options_that_fit_no_stage_or_several(text, options, message):
    with pytest.raises(ValueError, match=message):
        parse(text, **options)


def test_at_most_one_stage_has_compact_positions():
    compact = StreamingLLM(positions="compact")
    assert (compact | SnapKV()).compact and not (SnapKV() | StreamingLLM()).compact
    with pytest.raises(ValueError, match="two stages with compact positions"):
        compact | compact


class FakeEntry:
    """An entry point of another package."""

    def __init__(self, load):
        self.load = load


def test_other_packages_add_methods(monkeypatch, scratch_methods):
    def load():
        @method("theirs", title="Theirs", kind="evict", paper="0000.00000")
        @dataclass(frozen=True)
        class Theirs(Method):
            """From another package."""

            strength: float = 0.5

    asked = []
    found = sys.modules["kvfold.methods.registry"]
    monkeypatch.setattr(found, "entry_points", lambda *, group: asked.append(group) or [FakeEntry(load)])
    found._scan.cache_clear()
    try:
        assert "theirs" in [info.slug for info in list_methods()]
        assert str(parse("theirs(strength=0.1) | full")) == "theirs(strength=0.1) | full()"
        list_methods()
        assert asked == ["kvfold.methods"]  # looked for once
    finally:
        found._scan.cache_clear()


@pytest.mark.usefixtures("scratch_methods")
def test_a_slug_or_kind_that_can_not_be():
    cls = dataclass(frozen=True)(type("Mine", (Method,), {"__module__": "elsewhere", "__doc__": "Mine."}))
    with pytest.raises(ValueError, match=r"slug='snapkv' is taken by kvfold\.methods\.snapkv\.SnapKV"):
        method("snapkv", title="Mine", kind="evict")(cls)
    with pytest.raises(ValueError, match="kind='other' is not one of none, evict"):
        method("mine", title="Mine", kind="other")
    for slug in ("", "a b", "a|b", "-x", "a("):
        with pytest.raises(ValueError, match="slug="):
            method(slug, title="Mine", kind="evict")
    assert get_method("snapkv").cls is SnapKV


@pytest.mark.parametrize(
    "options",
    ["-" * 100_000 + "1", "[" * 100_000, "not " * 100_000 + "1", "1+" * 50_000 + "1", "9" * 4000, "10**20"],
    ids=["minus", "lists", "not", "sums", "digits", "power"],
)
def test_texts_that_no_method_has_are_refused_in_few_words(options):
    with pytest.raises(ValueError, match=r"method='kvfold|window=") as error:
        kvfold.parse(f"kvfold(window={options})")
    assert len(str(error.value)) < 800


def test_a_long_composition_is_read_in_linear_time():
    assert len(kvfold.parse("full|" * 2000 + "full").stages) == 2001
    with pytest.raises(ValueError, match="is unknown") as error:
        kvfold.parse("a" * 10**6)
    assert len(str(error.value)) < 2000


def test_classes_of_methods_are_typed_and_there_by_name():
    """An editor sees them in a block that only type checkers read; whoever imports one gets it."""
    source = Path(kvfold.methods.__file__).read_text(encoding="utf-8")
    shown = dict(re.findall(r"^    from (kvfold\.methods\.\w+) import (\w+) as \2$", source, re.MULTILINE))
    mine = [info.cls for info in list_methods() if info.cls.__module__.startswith("kvfold.")]
    assert shown == {cls.__module__: cls.__name__ for cls in mine}
    from kvfold.methods import KVFold, SnapKV

    assert SnapKV is get_method("snapkv").cls and str(SnapKV(window=8)) == str(kvfold.parse("snapkv(window=8)"))
    assert KVFold is get_method("kvfold").cls
    with pytest.raises(AttributeError, match=r"'kvfold.methods' has no attribute 'SnapKw'"):
        kvfold.methods.SnapKw  # noqa: B018
