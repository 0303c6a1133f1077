"""Text to pre-train on: any text files, or the English that comes with Python itself."""

from __future__ import annotations

import ast
import dataclasses
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[^a-z])")
HELD_OUT_EVERY = 10
NOT_PROSE = {"test", "tests", "encodings", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}

Document = list[str]
"""Sentences that follow each other."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to train on, and documents that are held out: every tenth, beginning with the fifth.

    Attributes:
        train: documents to train on.
        held_out: documents to validate on; no paragraph of theirs is in the others.
        source: where they come from.
    """

    train: list[Document]
    held_out: list[Document]
    source: str


def corpus_of(text: str | None) -> Corpus:
    """Reads a corpus.

    Args:
        text: a text file, or a directory whose .txt files are read; paragraphs are separated by blank lines, documents
            by two of them. None: the language reference and the documentation strings of Python's standard library.

    Raises:
        FileNotFoundError: there is no such file, or no .txt file in the directory.
        ValueError: there are fewer than 10 documents in it.
    """
    documents = python_documents() if text is None else text_documents(Path(text).expanduser())
    kept = [document for document in without_repetitions(documents) if document]
    if len(kept) < HELD_OUT_EVERY:
        raise ValueError(
            f"data.text={text!r} holds {len(kept)} documents, too few to hold some out: give at least {HELD_OUT_EVERY} "
            "paragraphs, separated by blank lines."
        )
    held_out = [document for index, document in enumerate(kept) if index % HELD_OUT_EVERY == HELD_OUT_EVERY // 2]
    train = [document for index, document in enumerate(kept) if index % HELD_OUT_EVERY != HELD_OUT_EVERY // 2]
    return Corpus(train, held_out, "Python's own documentation" if text is None else str(text))


def python_documents() -> Iterator[list[str]]:
    """Paragraphs of every topic of the language reference, and of every library module's documentation strings.

    Their wording depends on the Python version.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield paragraphs(topics[name])
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if not NOT_PROSE & set(path.relative_to(library).parts):
            yield [paragraph for text in documentation_strings(path) for paragraph in paragraphs(text)]


def documentation_strings(path: Path) -> list[str]:
    """Of a module and everything in it; none of a file that is no Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    places = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, places)]
    return [text for text in found if text]


def text_documents(path: Path) -> Iterator[list[str]]:
    """Paragraphs of every document in a text file, or in a directory's .txt files.

    A text without two blank lines in a row becomes documents of 20 paragraphs, or fewer if it is short.
    """
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        problem = "has no .txt file in it" if path.is_dir() else "is no file"
        raise FileNotFoundError(f"data.text={str(path)!r} {problem}. Give a text file, a directory, or nothing.")
    for file in files:
        parts = re.split(r"\n\s*\n\s*\n", file.read_text(encoding="utf-8"))
        if len(parts) < HELD_OUT_EVERY:
            whole = [paragraph for part in parts for paragraph in paragraphs(part)]
            size = min(20, len(whole) // HELD_OUT_EVERY) or 1
            yield from (whole[start : start + size] for start in range(0, len(whole), size))
        else:
            yield from map(paragraphs, parts)


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, each on one line, without those that have hardly a word in them."""
    joined = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [paragraph for paragraph in joined if len(re.findall(r"[A-Za-z]{2,}", paragraph)) >= 5]


def without_repetitions(documents: Iterable[list[str]]) -> Iterator[Document]:
    """Documents as sentences, every paragraph only where it occurs first: topics quote each other at length."""
    seen: set[str] = set()
    for document in documents:
        sentences: Document = []
        for paragraph in document:
            if paragraph not in seen:
                seen.add(paragraph)
                sentences += SENTENCE_END.split(paragraph)
        yield sentences
