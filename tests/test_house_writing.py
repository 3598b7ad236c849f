"""Files are written by kvfold.files alone: whole or not at all, as the umask says, never over a device."""

import ast
from collections.abc import Iterator

import pytest

from source_tree import Module, house

HOME = "kvfold.files"
WRITING = {
    "write_text", "write_bytes", "touch", "rename", "fdopen", "mkstemp", "mkdtemp", "NamedTemporaryFile", "save_file",
    "save_pretrained", "savez", "savez_compressed", "savetxt", "tofile", "to_csv", "to_json", "to_parquet", "dump",
    "copy2", "copyfile", "copyfileobj", "copytree", "move", "symlink_to", "hardlink_to",
}  # fmt: skip
"""Functions that make or move a file, whoever they belong to."""
FULL = {"os.replace", "os.open", "torch.save", "np.save", "numpy.save", "shutil.copy", "safetensors.torch.save"}
"""Those whose last name means other things, too."""
EXCEPTIONS = {
    ("kvfold.models.bundled", "working.rename"): "a folder that is made beside its place, and renamed when whole",
    ("kvfold.models.bundled", "target.open"): "within it",
    ("kvfold.models.bundled", "shutil.copyfileobj"): "within it",
    ("kvfold.models.gguf", "model.save_pretrained"): "within it",
    ("kvfold.models.gguf", "tokenizer.save_pretrained"): "within it",
    ("kvfold.cli.uptrain", "lm.save_pretrained"): "into a folder that kvfold.files makes, whole or not at all",
    ("kvfold.cli.uptrain", "tokenizer.save_pretrained"): "within it",
    ("kvfold.cli.app", "os.open"): "the null device, in the place of a closed pipe",
    ("kvfold.bench.peak", "Path('/proc/self/clear_refs').write_text"): "a switch of the kernel's, no file",
}


def writes(node: ast.Call) -> bool:
    """Whether a call opens a file to write, makes one, or puts one in another's place."""
    text = ast.unparse(node.func)
    name = text.split(".")[-1]
    if text in FULL or name in WRITING:
        return True
    if name == "replace" and isinstance(node.func, ast.Attribute):  # of a Path; a text's has two arguments
        return len(node.args) == 1 and not node.keywords
    if name != "open":
        return False
    modes = [each.value for each in node.keywords if each.arg == "mode"] or node.args[int(text == "open") :][:1]
    return any(set("wax+") & set(each.value) for each in modes if isinstance(each, ast.Constant) and each.value)


def found_in(tree: ast.AST, safe: bool = False) -> Iterator[tuple[int, str]]:
    """Line and function of each call that writes, but for what is handed to `write_whole` or within `replacing`."""
    for node in ast.iter_child_nodes(tree):
        inside = safe
        if isinstance(node, ast.With):
            calls = (each.context_expr for each in node.items)
            inside |= any(isinstance(each, ast.Call) and ast.unparse(each.func) == "replacing" for each in calls)
        elif isinstance(node, ast.Call):
            inside |= ast.unparse(node.func) == "write_whole"
            if writes(node) and not inside:
                yield node.lineno, ast.unparse(node.func)
        yield from found_in(node, inside)


def loose(module: Module) -> list[str]:
    """The lines of a file that write past `kvfold.files`."""
    calls = found_in(module.tree)
    return [f"{module.where}:{line}: {call}" for line, call in calls if (module.name, call) not in EXCEPTIONS]


def test_writers_are_found():
    source = """
def f(path, cache, text, mode):
    path.write_text("a"), path.open("w"), open(path, "rb+"), open(path, mode="a"), path.open(mode="xb")
    json.dump({}, file), os.replace(a, b), part.replace(path), torch.save(x, path), tempfile.mkstemp(), a.rename(b)
    path.open(), open(path), open(path, "rb"), text.replace("a", "b"), replace(x, y=1), dataclasses.replace(x, y=1)
    cache.save(path), form.open(spec), json.dumps({}), zipfile.ZipFile(path).open(member)
    write_whole(path, lambda part: chart.write_text(part))
    with replacing(path) as part:
        save_file(tensors, part)
    save_file(tensors, part)
"""
    found = [call for _, call in found_in(ast.parse(source))]
    assert found == [
        "path.write_text", "path.open", "open", "open", "path.open", "json.dump", "os.replace", "part.replace",
        "torch.save", "tempfile.mkstemp", "a.rename", "save_file",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in house() if name != HOME])
def test_nobody_writes_otherwise(name: str):
    found = loose(house()[name])
    assert not found, "write files by kvfold.files (write_whole, write_json, replacing, append):\n" + "\n".join(found)


def test_every_exception_is_needed():
    used = {(name, call) for name, module in house().items() for _, call in found_in(module.tree)}
    assert set(EXCEPTIONS) <= used, f"nobody needs {set(EXCEPTIONS) - used} any more: leave them out"
