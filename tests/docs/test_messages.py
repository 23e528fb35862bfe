"""docs/troubleshooting.md quotes what the code says: each quoted message occurs in the source, `…` for what differs."""

import ast
import re

import pytest

from tests.launch import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
ROW = re.compile(r"^\| (?P<cell>`.+?`.*?) \|", re.MULTILINE)
GAP = "\0"  # where the code puts a value


def said() -> list[str]:
    """Every text in models/ and trainer/, formatted values as GAP, and the Slurm scripts as they stand."""
    found = []
    for path in sorted([*(ROOT / "models").rglob("*.py"), *(ROOT / "trainer").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[\d.]*[sdf]", GAP, node.value))
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else GAP for p in node.values))
    return found + [path.read_text() for path in sorted((ROOT / "slurm").iterdir())]


def pattern(quoted: str) -> re.Pattern:
    """What a source text looks like that says the quoted message: `…` inside it is anything with a value in it."""
    parts = [part.strip() for part in quoted.strip("… ").split("…")]
    return re.compile(f".*{GAP}.*".join(map(re.escape, parts)), re.DOTALL)


SAID = said()
EXPECTED = [text for row in ROW.finditer(PAGE.read_text()) for text in re.findall(r"`([^`]+)`", row["cell"])]


@pytest.mark.parametrize("quoted", EXPECTED)
def test_a_quoted_message_occurs_in_the_source(quoted):
    wanted = pattern(quoted)
    assert any(wanted.search(text) for text in SAID), f"docs/troubleshooting.md: no code says {quoted!r}"


def test_the_search_can_fail():
    assert len(EXPECTED) > 50
    assert any(pattern("unknown key …").search(text) for text in SAID)
    for changed in ("unknown kee …", "a global batch of … pictures does not divide"):
        assert not any(pattern(changed).search(text) for text in SAID)
