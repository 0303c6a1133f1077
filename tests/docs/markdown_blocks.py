"""The fenced blocks of README.md and docs/*.md, and the visible comments that say how a block is checked.

- `# file: train.py` in the first line: the block is that file; later commands of the page run it.
- `# fragment: why` in the first line of a Python block: compiled, not run.
- `# needs a GPU: why`: likewise.
- `# costs too long to run here: why` in the first line of a bash block: looked at, not run.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language and its text."""

    page: Path
    line: int  # of the first line of code, from 1
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def first_line(self) -> str:
        return self.code.lstrip().split("\n", 1)[0]

    @property
    def file_name(self) -> str | None:
        match = re.match(r"# file: (\S+)", self.first_line)
        return match[1] if match else None

    @property
    def is_exempt(self) -> bool:
        return bool(re.match(r"# (fragment|needs a GPU|costs too long to run here): \S+", self.first_line))


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: match.start("code")].count("\n") + 1, match["language"], match["code"])
        for match in FENCE.finditer(text)
    ]


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page) if block.language in languages]


def write_files(page: Path, folder: Path) -> None:
    """Writes a page's `# file:` blocks into a folder, and for pages that just say `train.py` the reader's own one."""
    shutil.copy(Path(__file__).with_name("readers_train.py"), folder / "train.py")
    for block in blocks_of(page):
        if block.file_name:
            (folder / block.file_name).write_text(block.code, encoding="utf-8")
