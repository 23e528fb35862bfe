"""Every row of docs/accepted.md has an outcome of its three and names tests that exist."""

import re

import pytest

from tests.launch import ROOT

ROW = re.compile(r"^\| (?!what \|)(?P<what>.+?) \| (?P<outcome>.+?) \| (?P<tests>.+?) \|$", re.MULTILINE)
ROWS = [match.groupdict() for match in ROW.finditer((ROOT / "docs/accepted.md").read_text())]
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["what"][:60])
def test_a_row_says_what_happens_and_which_test_shows_it(row):
    assert row["outcome"].split(":")[0].split(",")[0] in ("accepted", "refused", "warned")
    named = TEST.findall(row["tests"])
    assert named
    for file, test in named:
        assert re.search(rf"^ *def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"no {test} in {file}"
