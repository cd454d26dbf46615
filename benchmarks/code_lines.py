"""Tokens of single lines of Python, each with its role, and a classifier for them.

Part of the labels can be read off the token (numbers, operators), part asks for the words around
it and what they usually mean: whether a name is a parameter, a local, imported or a global is
decided by the whole module, but only its line is shown.
"""

from __future__ import annotations

import ast
import builtins
import io
import keyword
import random
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from corpus import Item, Module, modules
from training import IGNORED, Batch, Row, Settings, by_length, class_measures, fit

ROLES = (
    "argument name",
    "attribute",
    "builtin",
    "comment",
    "definition",
    "global",
    "import",
    "keyword",
    "local",
    "number",
    "operator",
    "parameter",
    "string",
)
MAX_PIECES = 64
BATCH = 32
_MIN_TOKENS, _MAX_TOKENS = 5, 40
_OF_TYPE = {
    tokenize.NAME: "keyword",  # those that are no names
    tokenize.COMMENT: "comment",
    tokenize.NUMBER: "number",
    tokenize.OP: "operator",
    tokenize.STRING: "string",
}
_LAYOUT = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

measures = class_measures


def collect(modules_per_package: int = 200, lines_per_module: int = 12) -> list[Item]:
    found: list[Item] = []
    seen: set[tuple[str, ...]] = set()
    for module in modules(modules_per_package):
        lines = list(_lines(module))
        random.Random(module.source).shuffle(lines)
        kept = 0
        for words, labels in lines:
            if tuple(words) not in seen and kept < lines_per_module:
                seen.add(tuple(words))
                kept += 1
                row = {"words": words, "labels": labels}
                found.append(Item(module.source, module.package, row))
    return found


def finetune(
    base: Path,
    out: Path,
    rows: Sequence[Row],
    labels: Sequence[str],
    settings: Settings,
    progress: bool,
) -> None:
    """Train all weights and a new head in float32; save in bfloat16 with tokenizer."""
    torch.manual_seed(settings.seed)
    names = dict(enumerate(labels))
    model = AutoModelForTokenClassification.from_pretrained(
        base,
        dtype=torch.float32,
        num_labels=len(labels),
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )
    shuffled = _batches(base, rows, random.Random(settings.seed))
    fit(model, shuffled, settings, progress=progress)
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def load(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForTokenClassification.from_pretrained(
        folder, dtype=torch.float32
    )
    return model.eval()


def batches(folder: Path, rows: Sequence[Row]) -> list[Batch]:
    return _batches(folder, rows, None)


def _batches(folder: Path, rows: Sequence[Row], shuffle: random.Random | None) -> list[Batch]:
    """The first piece of a token carries its label, the others none."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(
        [row["words"] for row in rows],
        is_split_into_words=True,
        truncation=True,
        max_length=MAX_PIECES,
    )
    found = []
    for picked in by_length([len(ids) for ids in tokens["input_ids"]], BATCH, shuffle):
        features = {key: [tokens[key][i] for i in picked] for key in tokens}
        inputs = dict(tokenizer.pad(features, return_tensors="pt"))
        targets = torch.full_like(inputs["input_ids"], IGNORED)
        for at, index in enumerate(picked):
            before = None
            for position, word in enumerate(tokens.word_ids(index)):
                if word is not None and word != before:
                    targets[at, position] = rows[index]["labels"][word]
                before = word
        found.append((inputs, targets))
    return found


def _lines(module: Module) -> Iterator[tuple[list[str], list[int]]]:
    """Tokens and numbers of their roles, for each line that no token leaves or enters.

    Left out are lines with a name that the syntax tree doesn't place, as in ``except E as name``.
    """
    roles = _name_roles(module)
    by_line: dict[int, list[tokenize.TokenInfo]] = defaultdict(list)
    torn: set[int] = set()
    try:
        for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
            if token.start[0] != token.end[0]:
                torn.update(range(token.start[0], token.end[0] + 1))
            elif token.type not in _LAYOUT:
                by_line[token.start[0]].append(token)
    except (tokenize.TokenError, SyntaxError):
        return
    for number, tokens in by_line.items():
        # The syntax tree counts bytes, the tokens characters: the same in ASCII only.
        fits = _MIN_TOKENS <= len(tokens) <= _MAX_TOKENS and tokens[0].line.isascii()
        if number in torn or not fits:
            continue
        found = [
            roles.get(token.start)
            if token.type == tokenize.NAME and not keyword.iskeyword(token.string)
            else _OF_TYPE.get(token.type)
            for token in tokens
        ]
        labels = [ROLES.index(role) for role in found if role is not None]
        if len(labels) == len(tokens):
            yield [token.string for token in tokens], labels


def _name_roles(module: Module) -> dict[tuple[int, int], str]:
    """(line, column) -> the role of the name that stands there."""
    imported: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported.update((a.asname or a.name).split(".")[0] for a in node.names)
    roles: dict[tuple[int, int], str] = {}

    def visit(node: ast.AST, parameters: frozenset[str], local: frozenset[str]) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            lead = {ast.FunctionDef: 4, ast.ClassDef: 6}.get(type(node), 10)  # `def `, `class `
            roles[node.lineno, node.col_offset + lead] = "definition"
        if isinstance(node, _Scope):
            arguments = [n for n in ast.walk(node.args) if isinstance(n, ast.arg)]
            parameters |= {a.arg for a in arguments}
            names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
            local |= {n.id for n in names if isinstance(n.ctx, ast.Store)} - parameters
        elif isinstance(node, ast.arg):
            roles[node.lineno, node.col_offset] = "parameter"
        elif isinstance(node, ast.keyword) and node.arg:
            roles[node.lineno, node.col_offset] = "argument name"
        elif isinstance(node, ast.Attribute) and node.end_lineno and node.end_col_offset:
            roles[node.end_lineno, node.end_col_offset - len(node.attr)] = "attribute"
        elif isinstance(node, ast.alias):
            roles[node.lineno, node.col_offset] = "import"
        elif isinstance(node, ast.Name):
            roles[node.lineno, node.col_offset] = (
                "parameter"
                if node.id in parameters
                else "local"
                if node.id in local
                else "import"
                if node.id in imported
                else "builtin"
                if hasattr(builtins, node.id)
                else "global"
            )
        for child in ast.iter_child_nodes(node):
            visit(child, parameters, local)

    visit(module.tree, frozenset(), frozenset())
    return roles
