"""Documented functions and classes of the installed packages and the standard library, read from source files.

Nothing is imported: files are parsed with `ast`. What is found depends on what is installed, and on nothing else: paths
are sorted, and every choice is by content.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {
    "tests",
    "test",
    "testing",
    "_vendor",
    "vendor",
    "idlelib",
    "lib2to3",
    "site-packages",
    "__pycache__",
}

DOCUMENTED = re.compile(rb':\s*\n\s+[rR]?"""')
"""The start of a documentation string under a `def` or `class` line, near enough to count them."""

UNWANTED = re.compile(r"▁|<0x|<\||\x00|\t")
"""What cannot go through the tokenizer unchanged (its blank, its bytes, its special tokens), and tabs."""

UNDERLINE = re.compile(r"\s*(?:-{3,}|={3,}|~{3,})\s*$")

SECTION = re.compile(
    UNDERLINE.pattern
    + r"|\s*(?:Args?|Arguments|Parameters?|Params|Attributes|Returns?|Yields?|Raises?|Examples?|Usage|Notes?|Warnings?"
    r"|Shape|References?|Inputs?|Outputs?|Keyword (?:Args|Arguments)|See Also)\s*:"
    r"|\s*(?:>>> |\.\. |:\w+[^:]*:(?:\s|$)|@\w|```|\w+ \(`)"
)
"""A line with which a docstring leaves its description: a heading, its underline, a field, or code."""

PLAIN_WORD = re.compile(r"(?<![\w.])[A-Za-z][a-z]+(?![\w(])")

SENTENCE = re.compile(r"[A-Z`\"'][\w`'\"-]*,? [\w`'\"(:*~-]+")
"""How a description in words begins."""


@dataclass(frozen=True)
class Definition:
    """A documented function or class."""

    place: str
    """Module and, for a method, its class: `torch.nn.modules.linear.Linear`."""
    signature: str
    """`def` or `class` line without a body; a class with the signature of its `__init__`."""
    documentation: str
    """The docstring, dedented."""
    family: str
    """A key that near-duplicates share: copies of one text for different classes differ in names and numbers alone."""

    @property
    def description(self) -> str:
        """The documentation up to its first section, example or list of parameters; may be empty."""
        lines = self.documentation.split("\n")
        for number, line in enumerate(lines):
            if SECTION.match(line):
                # The line above an underline is a heading.
                return "\n".join(lines[: number - 1 if UNDERLINE.match(line) and number else number]).strip()
        return self.documentation

    @property
    def has_description(self) -> bool:
        """Whether the description says something in words: not only a list of fields or a piece of code."""
        description = self.description
        return len(description) >= 20 and len(description.split()) >= 4 and bool(SENTENCE.match(description))


def find_definitions(wanted: int, *, workers: int = 2) -> list[Definition]:
    """About two thirds of `wanted` definitions, no two of one family, sorted by place.

    Files are taken by how much of them is documentation, the densest first, until they hold `wanted`: parsing all
    of them would take minutes. A third of what is found is private, a copy, or useless.
    """
    files = _densest(wanted)
    # Collecting garbage, of which syntax trees make none, is half of the work otherwise.
    with ProcessPoolExecutor(workers, initializer=gc.disable) as pool:
        groups = list(pool.map(_definitions_of, [str(path) for path, _ in files], [m for _, m in files], chunksize=16))
    unique: dict[str, Definition] = {}
    for definition in sorted((d for group in groups for d in group), key=lambda d: (d.place, d.signature)):
        unique.setdefault(definition.family, definition)
    return list(unique.values())


def stable_hash(text: str, seed: int) -> int:
    """64 bits that depend on `text` and `seed` alone, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest(), "big")


def _densest(wanted: int) -> list[tuple[Path, str]]:
    counted = []
    for path, module in _source_files():
        source = path.read_bytes()
        count = len(DOCUMENTED.findall(source))
        if count:
            counted.append((len(source) / count, module, count, path))
    counted.sort()
    chosen, total = [], 0
    for _, module, count, path in counted:
        if total >= wanted:
            break
        chosen.append((path, module))
        total += count
    return chosen


def _source_files() -> Iterator[tuple[Path, str]]:
    """Source files and their module names."""
    roots = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
            for name in sorted(names):
                if name.endswith(".py") and not name.startswith("test_"):
                    path = Path(folder, name)
                    module = ".".join(path.relative_to(root).with_suffix("").parts)
                    yield path, module.removesuffix(".__init__")


def _definitions_of(path: str, module: str) -> list[Definition]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's escapes
            tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError):
        return []  # a template, or a test case of a parser
    return list(_walk(tree.body, module))


def _walk(body: Iterable[ast.stmt], place: str) -> Iterator[Definition]:
    """Documented definitions in modules and classes; those inside functions are nobody's interface."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _definition(node, place)
            yield from _walk(node.body, f"{place}.{node.name}")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definition(node, place)


def _definition(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, place: str) -> Iterator[Definition]:
    documentation = ast.get_docstring(node)
    if not documentation or node.name.startswith("_") or not _is_good(documentation):
        return
    signature = _signature(node)
    if len(signature) <= 1500 and not UNWANTED.search(signature):
        yield Definition(place, signature, documentation, _family(documentation))


def _family(documentation: str) -> str:
    """The first words of a text without names, numbers and code; of a short one, everything."""
    words = PLAIN_WORD.findall(documentation)
    return " ".join(words[:60] if len(words) > 4 else documentation.split()).lower()


def _is_good(documentation: str) -> bool:
    return (
        20 <= len(documentation) <= 20_000
        and len(documentation.split()) >= 4
        and sum(character > "\x7f" for character in documentation) <= len(documentation) // 50
        and not UNWANTED.search(documentation)
    )


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The definition without decorators and body."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
        head = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
        inits = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
        return head + "".join(f"\n    {_signature(init)}" for init in inits[:1])
    kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{kind} {node.name}({ast.unparse(node.args)}){returned}:"
