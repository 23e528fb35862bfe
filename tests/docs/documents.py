"""What a document asks its reader to type: fenced blocks of a Markdown file, command lines of a bash block."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.launch import ROOT

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\s*$")
HEREDOC = re.compile(r"<<\s*'(?P<end>\w+)'")
# reference.md is written from the code and compared with it by tests/unit/test_manual.py; log.md tells of the past
LEFT_OUT = ("reference.md", "log.md")
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in LEFT_OUT),
]


@dataclass(frozen=True)
class Block:
    """A fenced block. `line` is the number of its first line in the document, from 1."""

    language: str
    text: str
    line: int


def blocks(document: Path) -> Iterator[Block]:
    """The fenced blocks in order. Raises ValueError when one is not closed."""
    language, indent, start, lines = None, 0, 0, []
    for number, line in enumerate(document.read_text().splitlines(), 1):
        found = FENCE.match(line)
        if language is None and found:
            language, indent, start, lines = found["language"], len(found["indent"]), number + 1, []
        elif found and not found["language"]:
            yield Block(language, "\n".join(lines) + "\n", start)
            language = None
        elif language is not None:
            lines.append(line[indent:])
    if language is not None:
        raise ValueError(f"{document}: the block at line {start} is not closed")


def command_lines(text: str) -> list[str]:
    """The commands of a bash block: continued lines joined, comments left out, a here-document in one piece."""
    commands, lines = [], iter(text.splitlines())
    for line in lines:
        while line.endswith("\\"):
            line = line[:-1].rstrip() + " " + next(lines).strip()
        if heredoc := HEREDOC.search(line):
            for inner in lines:
                line += "\n" + inner
                if inner == heredoc["end"]:
                    break
        else:
            line = re.sub(r"(^|\s+)#.*$", "", line).strip()
        if line:
            commands.append(line)
    return commands
