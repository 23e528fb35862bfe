"""Tokens and passwords stay out of what is written: refused where they are typed, blanked where they are repeated."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from trainer.config.load import one_line

# tokens of the hub and of trackers by their shape, and user:password@ or token@ of an address
PATTERN = re.compile(r"\bhf_[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}|(?<=://)[^/\s@]+(?=@)")
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD")
SHORTEST = 8  # characters; a shorter secret would blank words it has nothing to do with
BLANK = "***"


def redact(text: str) -> str:
    """`text` with everything that is or looks like a secret blanked."""
    for name in VARIABLES:
        secret = os.environ.get(name, "")
        if len(secret) >= SHORTEST:
            text = text.replace(secret, BLANK)
    return PATTERN.sub(BLANK, text)


def safe_line(error: BaseException) -> str:
    """What an error says, in one line without secrets; the name of its type when it says nothing."""
    return redact(one_line(error) or type(error).__name__)


def refuse_secrets(texts: Iterable[str], where: str) -> None:
    """Raise a ValueError for the first text that holds a secret: it would end up in logs and config.yaml."""
    for text in texts:
        redacted = redact(text)
        if redacted != text:
            raise ValueError(
                f"{where} holds a token or password ({redacted[:100]!r}): it would be kept with the results. Give it "
                f"as {VARIABLES[0]} in the environment or log in with hf auth login, and take it out."
            )
