"""requirements.txt has a floor for everything, in the form that `make test-lowest` makes constraints of."""

import re
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement

from tests.launch import ROOT

LINES = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
CONSTRAINT = re.compile(r"^([a-z_]+)>=([0-9.]+).*")  # as the sed of the Makefile reads a line


def test_every_floor_becomes_a_constraint():
    assert len(LINES) >= 14
    for line in LINES:
        name, floor = CONSTRAINT.fullmatch(line).groups()
        assert Requirement(f"{name}=={floor}").specifier.contains(floor)
        assert Requirement(line).specifier.contains(floor)
    makefile = (ROOT / "Makefile").read_text()
    assert r"s/^([a-z_]+)>=([0-9.]+).*/\1==\2/p" in makefile


@pytest.mark.parametrize("line", LINES)
def test_the_tests_run_with_an_allowed_version(line):
    requirement = Requirement(line)
    assert requirement.specifier.contains(version(requirement.name), prereleases=True)
