"""How many processes load images, and when input is the limit: figures worked by hand, and real seconds."""

import time

import pytest

from trainer.data.workers import FIRST_STEPS, Limit, Times, spare_processors, workers_for


def times(waited: float, trained: float) -> Times:
    """Steps of equal length after slow first ones, and one that an evaluation came after."""
    first = [9.0] * FIRST_STEPS
    return Times(first + [waited] * 7, first + [trained] * 6 + [60.0])


@pytest.mark.parametrize(
    ("waited", "trained", "workers"),
    [
        (0.61, 0.25, 4),  # 1.25 * .61 / .25 = 3.05
        (0.19, 0.25, 1),  # 1.25 * .19 / .25 = .95
        (0.03, 0.38, 1),
        (0.01, 0.38, 0),  # less than a twentieth of the step
        (8.0, 0.1, 15),  # 100 would be needed
        (1.0, 0.0, 15),
    ],
)
def test_as_many_as_keep_up_with_the_steps(waited, trained, workers):
    assert workers_for(times(waited, trained), most=15) == workers
    assert workers_for(times(waited, trained), most=0) == 0


def test_real_seconds():
    measured = Times()

    def slow():
        for number in range(4):
            time.sleep(0.03)
            yield number

    received = []
    for number in measured.of(slow()):
        received.append(number)
        time.sleep(0.06)
    assert received == [0, 1, 2, 3]
    assert len(measured.waited) == len(measured.trained) == 4
    assert all(waited >= 0.029 for waited in measured.waited) and all(taken >= 0.059 for taken in measured.trained)


def row(limit: Limit, waited: float, trained: float, workers: int) -> str:
    limit.times.waited += [waited] * 3
    limit.times.trained += [trained] * 3
    return limit.remark(workers)


def test_input_as_the_limit_is_said_once_after_two_rows():
    limit = Limit(spare=7)
    assert row(limit, 0.5, 0.5, workers=2) == ""
    expected = "input is the limit: 50% of the time went by waiting for images at data.workers=2; "
    assert row(limit, 0.5, 0.5, workers=2).startswith(expected + "raise it (processors without work: 5)")
    assert [row(limit, 0.5, 0.5, workers=2) for _ in range(3)] == [""] * 3


def test_what_is_not_said():
    limit = Limit(spare=7)
    assert [row(limit, waited, 0.5, workers=2) for waited in (0.5, 0.1, 0.5, 0.1)] == [""] * 4  # never two in a row
    alone = Limit(spare=0)  # one processor that loads and trains in turn
    assert [row(alone, 0.5, 0.5, workers=0) for _ in range(3)] == [""] * 3
    full = Limit(spare=2)
    row(full, 0.5, 0.5, workers=2)
    assert "no processor is left for more" in row(full, 0.5, 0.5, workers=2)


def test_processors_of_a_rank():
    everyone = spare_processors(1) + 1
    assert everyone >= 1
    assert spare_processors(2) == max(0, everyone // 2 - 1)
    assert spare_processors(10**6) == 0
