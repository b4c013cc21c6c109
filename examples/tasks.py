"""Small classification tasks on the text of Python's own standard library, with nothing to download."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FEWEST_WORDS = 10  # of an example; shorter ones say too little

MODULES = {
    "network": "http urllib socket socketserver ssl smtplib ftplib imaplib poplib xmlrpc wsgiref ipaddress "
    "email mailbox",
    "text and data": "json csv html xml re string textwrap difflib configparser plistlib tomllib pprint gettext "
    "codecs pickle base64 struct locale",
    "numbers and time": "statistics fractions _pydecimal random numbers colorsys datetime _pydatetime _strptime "
    "calendar heapq bisect zoneinfo",
    "concurrency": "threading asyncio multiprocessing concurrent queue sched subprocess contextlib signal",
    "files": "pathlib shutil tempfile glob zipfile tarfile gzip bz2 lzma fileinput filecmp os posixpath "
    "ntpath fnmatch stat mimetypes io _pyio",
    "language": "ast inspect dis tokenize importlib code codeop traceback typing types pdb bdb trace symtable "
    "compileall runpy pkgutil dataclasses enum functools abc copy weakref unittest doctest",
    "user interface": "tkinter turtle idlelib curses cmd",
}
CHAPTERS = {
    "statements": "assert assignment augassign break class compound context-managers continue del else for "
    "function global if import nonlocal pass raise return try while with",
    "expressions": "atom-identifiers atom-literals attribute-references await binary bitwise booleans calls "
    "comparisons conversions dict exprlists in lambda lists operator-summary power shifting slicings "
    "subscriptions unary yield",
    "data model": "attribute-access callable-types customization numeric-types objects sequence-types types "
    "specialnames",
    "built-in types": "bltin-code-objects bltin-ellipsis-object bltin-null-object bltin-type-objects specialattrs "
    "truth typesfunctions typesmapping typesmethods typesmodules typesseq typesseq-mutable string-methods",
    "lexis and names": "floating formatstrings id-classes identifiers imaginary integers numbers strings naming "
    "execmodel dynamic-features",
}

Example = tuple[str, str]  # text and label


@dataclass(frozen=True)
class Task:
    """Texts with the numbers of their labels; the classes are equally large."""

    name: str
    question: str
    labels: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]


def make_tasks(names: Sequence[str], train: int, test: int, seed: int) -> list[Task]:
    """The tasks of these names, with about so many examples each; fewer where a class has no more.

    Raises:
        ValueError: there is no such task.
    """
    for name in names:
        if name not in _SOURCES:
            raise ValueError(f"tasks: got {name!r}, wanted some of {', '.join(_SOURCES)}")
    return [_make(name, *_SOURCES[name], train, test, seed) for name in names]


def _make(name: str, question: str, source: Callable[[], Iterator[Example]], train: int, test: int, seed: int) -> Task:
    by_label: dict[str, list[str]] = {}
    for text, label in dict(source()).items():  # each text once
        by_label.setdefault(label, []).append(text)
    labels = tuple(sorted(by_label))
    fewest = min(map(len, by_label.values()))
    for_test = min(-(-test // len(labels)), fewest // 3)
    for_train = min(-(-train // len(labels)), fewest - for_test)
    shuffle = random.Random(f"{name} {seed}").shuffle
    parts: tuple[list, list] = [], []
    for number, label in enumerate(labels):
        texts = sorted(by_label[label])
        shuffle(texts)
        chosen = texts[:for_test], texts[for_test : for_test + for_train]
        for part, some in zip(parts, chosen, strict=True):
            part += [(text, number) for text in some]
    for part in parts:
        shuffle(part)
    return Task(name, question, labels, tuple(parts[1]), tuple(parts[0]))


@cache
def _definitions() -> tuple[tuple[str, ast.AST, str], ...]:
    """Subject, tree and source of every module, class and function of the library's modules, none of them imported."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for subject, modules in MODULES.items():
        for module in modules.split():
            files = (
                [root / f"{module}.py"] if (root / f"{module}.py").is_file() else sorted((root / module).rglob("*.py"))
            )
            for file in files:
                if not any("test" in part for part in file.relative_to(root).parts[1:]):
                    source = file.read_text(errors="replace")
                    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
                    found += [
                        (subject, node, source) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)
                    ]
    return tuple(found)


def _docstrings() -> Iterator[tuple[str, ast.AST, str]]:
    for subject, node, _ in _definitions():
        text = ast.get_docstring(node)
        if text and len(text.split()) >= FEWEST_WORDS:
            yield text, node, subject


def _subjects() -> Iterator[Example]:
    for text, _, subject in _docstrings():
        yield text, subject


def _kinds() -> Iterator[Example]:
    for text, node, _ in _docstrings():
        if not isinstance(node, ast.Module):
            yield text, "class" if isinstance(node, ast.ClassDef) else "function"


def _code() -> Iterator[Example]:
    """Bodies of functions, without their docstrings."""
    for subject, node, source in _definitions():
        if isinstance(node, ast.FunctionDef):
            body = node.body[ast.get_docstring(node) is not None :]
            if len(body) >= 3:
                yield "\n".join(source.split("\n")[body[0].lineno - 1 : body[-1].end_lineno]), subject


def _chapters() -> Iterator[Example]:
    """Paragraphs of the language reference."""
    from pydoc_data.topics import topics

    for chapter, names in CHAPTERS.items():
        for name in names.split():
            for paragraph in topics.get(name, "").split("\n\n"):
                if len(paragraph.split()) >= FEWEST_WORDS:
                    yield paragraph.strip(), chapter


_SOURCES = {
    "subject": ("what a docstring is about", _subjects),
    "code": ("what a function's code is about", _code),
    "kind": ("whether a docstring is a class's or a function's", _kinds),
    "chapter": ("which part of the language reference a paragraph is from", _chapters),
}
TASKS = tuple(_SOURCES)
