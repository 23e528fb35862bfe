"""Paths as people write them, with ~ and $VARIABLES, which mean another place in every job."""

import os
import re


def expanded(place: str) -> str:
    """A path or hub id with ~ and $VARIABLES replaced; one that exists as it is written is taken as it is.

    Raises:
        ValueError: a variable that is not set, or is empty; it is named.
    """
    if "$" in place and not os.path.exists(place):
        for name in re.findall(r"\$(\w+)", place) + re.findall(r"\$\{([^}]*)\}", place):
            if not os.environ.get(name):
                raise ValueError(f"${name} in {place!r} is not set here: export it, or write the path itself")
        place = os.path.expandvars(place)
    return os.path.expanduser(place) if place.startswith("~") else place
