"""A tensor is made with its dtype: what torch takes otherwise is the caller's default, which may be bfloat16."""

import ast

from source_tree import Modules, house, made

FACTORIES = {
    "as_tensor", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randn", "scalar_tensor",
    "tensor", "zeros",
}  # fmt: skip
"""`arange` of integers is exempt, and what is like another tensor."""


def without_dtype(modules: Modules) -> list[str]:
    """Calls of factories that leave the dtype to torch, as "file:line call"."""
    found = []
    for module in modules.values():
        nodes = list(ast.walk(module.tree))
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "torch"]
        names = {alias.asname or alias.name: alias.name for node in imports for alias in node.names}
        for node in nodes:
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            name = called.removeprefix("torch.") if called.startswith("torch.") else names.get(called)
            if name in FACTORIES and not any(keyword.arg in ("dtype", None) for keyword in node.keywords):
                found.append(f"{module.where}:{node.lineno} {ast.unparse(node)}")
    return found


def test_the_rule_finds_them():
    assert without_dtype(
        made(
            a="torch.zeros(2)\ntorch.full(s, 1.0, device=d)\ntorch.zeros(2, dtype=x)\nnp.zeros(2)",
            b="from torch import tensor as t\nt(2)",
        )
    ) == [
        "kvfold/a.py:1 torch.zeros(2)",
        "kvfold/a.py:2 torch.full(s, 1.0, device=d)",
        "kvfold/b.py:2 t(2)",
    ]


def test_every_tensor_is_made_with_its_dtype():
    assert without_dtype(house()) == []
