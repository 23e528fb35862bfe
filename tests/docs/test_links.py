"""Links and pictures of the documents lead to files that exist, and to headings that are in them."""

import re

import pytest

from tests.docs.documents import DOCUMENTS

LINK = re.compile(r"\]\((?!https?:)((?:[^)#\s]*\.\w+)?)(?:#([^)\s]*))?\)")  # a file, a heading, or both


def anchors(text: str) -> set[str]:
    """What a heading can be linked by: its words in small letters, joined by dashes, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for path, anchor in LINK.findall(document.read_text()):
        target = document.parent / path if path else document
        assert target.is_file(), f"{document.name} links to {path}, which does not exist"
        assert not anchor or anchor in anchors(target.read_text()), f"{document.name}: no heading #{anchor} in {path}"


def test_anchors():
    assert anchors("# What it costs\ntext\n## `plan`, and: why?\n") == {"what-it-costs", "plan-and-why"}
