"""Functions in a model's answer: cut out of its code block and compared by BLEU, as RepoQA does (arXiv:2406.06025)."""

import re
from typing import Any

from kvfold.evaluation.metrics._text import library

# The node that a function is, in tree-sitter's grammar of each language.
KINDS = {
    "python": "function_definition",
    "java": "method_declaration",
    "typescript": "function_declaration",
    "rust": "function_item",
    "cpp": "function_definition",
    "go": "function_declaration",
}
_BLOCK = re.compile(r"^```(?:\w+)?\s*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def first_function(answer: str, lang: str) -> str:
    """The first function of the fenced code blocks, else the first block, else the whole answer.

    Raises ValueError for a language that RepoQA does not have, ImportError where a block must be parsed and there is
    no tree-sitter.
    """
    if lang not in KINDS:
        raise ValueError(f"lang={lang!r} must be one of {', '.join(KINDS)}")
    blocks: list[str] = _BLOCK.findall(answer.strip())
    for block in blocks:
        source = block.encode()
        node = _find(_parser(lang).parse(source).root_node, lang)
        if node is not None:
            return source[node.start_byte : node.end_byte].decode()
    return blocks[0] if blocks else answer.strip()


def similarity(candidate: str, reference: str) -> float:
    """Sentence BLEU of the blank-separated pieces, with NLTK's smoothing method 4."""
    bleu = library("nltk.translate.bleu_score")
    smoothing = bleu.SmoothingFunction().method4
    pieces = re.split(r"\s+", candidate.strip())
    return float(bleu.sentence_bleu([re.split(r"\s+", reference.strip())], pieces, smoothing_function=smoothing))


def _parser(lang: str) -> Any:
    try:
        grammar, tree_sitter = library(f"tree_sitter_{lang}"), library("tree_sitter")
    except ImportError as error:
        message = f"scbench/repoqa parses code blocks of {lang}: pip install tree-sitter tree-sitter-{lang}"
        raise ImportError(message) from error
    language = grammar.language_typescript() if lang == "typescript" else grammar.language()
    return tree_sitter.Parser(tree_sitter.Language(language))


def _find(node: Any, lang: str) -> Any:
    """The first function below a node, the outermost first; in C++ one with a plain name, so no method."""
    if node.type == KINDS[lang] and (lang != "cpp" or _plain_name(node)):
        return node
    return next((found for child in node.children if (found := _find(child, lang)) is not None), None)


def _plain_name(node: Any) -> bool:
    declarator = node.child_by_field_name("declarator")
    if declarator is None or declarator.type != "function_declarator":
        return False
    name = declarator.child_by_field_name("declarator")
    return name is not None and name.type == "identifier"
