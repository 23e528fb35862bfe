"""What is repeated, for how long, and what people are told in the end."""

import time

import pytest
from huggingface_hub import HfApi

from tests.hub_server import WRITER, HubServer
from trainer.hub.retry import LONGEST_PAUSE, PAUSES, patiently, reason_of


@pytest.fixture
def pauses(monkeypatch):
    """The pauses asked for, in seconds; none is made."""
    asked = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer() as server:
        server.connect(monkeypatch, tmp_path)
        yield server


def test_retry_after_comes_before_our_own_pauses(server, pauses):
    server.fail("whoami", 429, 2, headers={"Retry-After": "17"})
    server.fail("whoami", 503, 1, headers={"Retry-After": "86400"})
    server.fail("whoami", 503, 1, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})  # not read: our own pause
    assert patiently("asking", HfApi().whoami)["name"] == "alice"
    assert pauses == [17, 17, LONGEST_PAUSE, PAUSES[3]]


def test_giving_up_takes_minutes_and_says_how_to_go_on(server, pauses):
    server.fail("whoami", 503, 99)
    with pytest.raises(OSError, match=r"^asking: .*503 .* 9 attempts\)\. Start the same command again later"):
        patiently("asking", HfApi().whoami)
    assert tuple(pauses) == PAUSES and sum(pauses) >= 180


@pytest.mark.parametrize("status", [400, 402, 413, 422, 451])
def test_what_will_not_pass_is_not_repeated(server, pauses, status):
    server.fail("whoami", status, 99)
    with pytest.raises(ValueError, match=rf"^asking: HTTP {status}: .*injected {status}"):
        patiently("asking", HfApi().whoami)
    assert pauses == [] and server.count("whoami") == 1


def failing_once(error: Exception):
    """A call that raises, and then answers."""
    found = iter([error])

    def call() -> str:
        for problem in found:
            raise problem
        return "answer"

    return call


def test_the_storage_client_reports_a_lost_connection_by_a_bare_error(pauses):
    assert patiently("sending", failing_once(RuntimeError("Data processing error"))) == "answer"
    assert pauses == [PAUSES[0]]


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "x"), ValueError("bad metadata")])
def test_errors_of_this_machine_are_not_repeated(pauses, error):
    with pytest.raises(type(error), match=str(error).split()[-1]):
        patiently("sending", failing_once(error))
    assert pauses == []


def test_errors_the_caller_deals_with_come_through_as_they_are(pauses):
    error = ConnectionError("gone")
    with pytest.raises(ConnectionError) as raised:
        patiently("sending", failing_once(error), leave=ConnectionError)
    assert raised.value is error and pauses == []


def test_one_line_without_the_token(monkeypatch):
    assert reason_of(ValueError(f"Illegal header value\n b'Bearer {WRITER}'")) == "Illegal header value b'Bearer ***'"
    monkeypatch.setenv("HF_TOKEN", "of-another-shape")
    assert reason_of(OSError("Bearer of-another-shape")) == "Bearer ***"
    assert reason_of(TimeoutError()) == "TimeoutError"
