"""Requests to the hub that are repeated while what went wrong may pass, and errors for people when it does not.

The client itself repeats only some of its requests, and its errors come from whichever HTTP library it uses.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from trainer.config.redaction import safe_line

log = logging.getLogger(__name__)
T = TypeVar("T")

PAUSES = (1, 2, 4, 8, 15, 30, 60, 60)  # seconds between attempts; what the hub asks for by Retry-After comes first
LONGEST_PAUSE = 600  # seconds, whatever Retry-After says
# the same request may succeed later: busy, restarting, or (409, 412) somebody else's commit came first
PASSING = (408, 409, 412, 425, 429, 500, 502, 503, 504)
LONGEST_REASON = 400  # characters
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def patiently(what: str, call: Callable[[], T], leave: type[Exception] | tuple[type[Exception], ...] = ()) -> T:
    """The result of call(), repeated after a pause while what went wrong may pass.

    Args:
        what: is done, for the log and the errors: "pushing to owner/name".
        leave: errors the caller deals with.

    Raises:
        ValueError: the hub refuses it, and would again.
        OSError: no use for minutes, or the disk.
    """
    for pause in (*PAUSES, None):
        try:
            return call()
        except leave:
            raise
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            if pause is None or not _may_pass(error):
                raise _for_people(what, error) from error
            pause = min(_retry_after(error) or pause, LONGEST_PAUSE)
            log.warning("%s: %s; again in %.0f s", what, reason_of(error), pause)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def reason_of(error: BaseException) -> str:
    """What an error says, in one line without the token; of a wrapped one, what the innermost says."""
    if isinstance(error, RuntimeError):
        *_, error = _chain(error)
    return safe_line(error)[:LONGEST_REASON]


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    answer = _answer(error)
    if answer is not None:
        return answer.status_code in PASSING
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, json.JSONDecodeError):  # cut off, or a proxy's page instead of the hub's answer
        return True
    # no answer at all; the hub's storage client (hf_xet) says so by a bare RuntimeError
    if isinstance(error, RuntimeError):
        return True
    return any(isinstance(cause, HTTPError | ConnectionError) for cause in _chain(error))


def _for_people(what: str, error: Exception) -> Exception:
    """What patiently raises for an error that it gives up on."""
    reason = reason_of(error)
    if _may_pass(error):
        return OSError(
            f"{what}: {reason} ({constants.ENDPOINT}, {len(PAUSES) + 1} attempts). Start the same command again later: "
            "what is stored already is not sent twice"
        )
    answer = _answer(error)
    if answer is None:  # of the disk, or of the client itself
        return error if isinstance(error, OSError) else ValueError(f"{what}: {reason}")
    if answer.status_code == 401:
        return ValueError(f"{what}: the token is not valid (expired, revoked or mistyped): {LOG_IN}")
    if answer.status_code == 403:
        return ValueError(f"{what}: the hub refuses it to this token: {reason}")
    return ValueError(f"{what}: HTTP {answer.status_code}: {reason}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it: the client wraps errors of an upload into RuntimeErrors."""
    while error is not None:
        yield error
        error = error.__cause__


def _answer(error: BaseException):
    """The hub's answer behind an error, None when there was none."""
    for cause in _chain(error):
        if isinstance(cause, HTTPError):
            answer = getattr(cause, "response", None)
            if answer is not None:
                return answer
    return None


def _retry_after(error: BaseException) -> float | None:
    """Seconds the hub asks to wait."""
    answer = _answer(error)
    if answer is None:
        return None
    text = answer.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else None
