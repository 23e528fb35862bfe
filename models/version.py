"""Versions of the package m2mkd: its own, and which of them can read what is saved here. No torch.

config.json carries both: "m2mkd_version" wrote it, "m2mkd_needs" is the oldest one that reads it as it is meant.
"""

from collections.abc import Mapping
from typing import Any

from packaging.version import InvalidVersion, Version

VERSION = "0.2.0"
# to be raised to VERSION by a change after which an older package would read a config.json as another model
NEEDS = "0.2.0"
SAVED = {"m2mkd_version": VERSION, "m2mkd_needs": NEEDS}  # in config.json


def check_needs(content: Mapping[str, Any], source: object) -> None:
    """Refuse the config.json of `source` where it needs a newer package than this one.

    One without versions (from before they were written) is read.

    Raises:
        ValueError: a newer version is needed, or what should be a version is none.
    """
    for key in SAVED:
        value = content.get(key)
        if value is None:
            continue
        try:
            Version(value)
        except (InvalidVersion, TypeError):
            raise ValueError(
                f"config.json of {source} has {key} {value!r}, expected a version such as {VERSION}: take the "
                f"config.json that was saved with these weights."
            ) from None
    needs = content.get("m2mkd_needs")
    if needs is not None and Version(needs) > Version(VERSION):
        written = content.get("m2mkd_version", needs)
        raise ValueError(
            f"{source} was saved by m2mkd {written} and needs {needs} or newer, this is {VERSION}: install the newer "
            f"one (the model card says from where)."
        )
