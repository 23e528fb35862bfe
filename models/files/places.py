"""Where something lies: $VARIABLES and ~ of a path, which differ from job to job while what lies there does not."""

import os
import re

VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


def expanded(text: str) -> str:
    """A path, or the id of a repository, with its $VARIABLES and ~ filled in; as a recipe is written it keeps them.

    Raises:
        ValueError: a variable is not set in this environment; it is named.
    """
    filled = os.path.expandvars(text)
    unset = VARIABLE.search(filled)
    if unset:
        raise ValueError(
            f"{text!r} names {unset[0]}, which is not set in the environment of this job: export it, or write the path"
        )
    return os.path.expanduser(filled)
