"""What trainer/tracking/health.py calls a spike, a dead expert and one bad step too many; worked by hand."""

import math

import pytest

from trainer.config.runtime import RunConfig
from trainer.tracking.health import Health, NonFiniteLoss


def health(**run):
    return Health(RunConfig(**run), "train")


def told(watch, rows):
    """(step, message) of everything found in rows of (loss or a whole row), steps 1, 2, ..."""
    found = []
    for step, row in enumerate(rows, start=1):
        row = row if isinstance(row, dict) else {"loss": row}
        found += [(step, finding.message) for finding in watch.look(step, row)]
    return found


# median 1.0, deviations 0, 0, .1, .1, .1, .1, .2, .2: their median 0.1, so a robust standard deviation is 0.14826
QUIET = [1.0, 1.1, 0.9, 1.1, 0.9, 1.2, 0.8, 1.0]


def test_a_spike_is_ten_robust_deviations_above_the_median():
    assert told(health(), [*QUIET, 1.0 + 10 * 0.14826 - 0.01]) == []
    (step, message), *more = told(health(), [*QUIET, 1.0 + 10 * 0.14826 + 0.01])
    assert step == 9 and not more
    assert "jumped to 2.493 (median of the 8 rows before: 1)" in message
    assert told(health(spike_factor=3.0), [*QUIET, 1.5]) != []
    assert told(health(spike_factor=0.0), [*QUIET, 1e9]) == []


def test_a_spike_needs_eight_rows_before_it():
    assert told(health(), [*QUIET[:7], 1e9]) == []


def test_no_spike_on_a_plateau_nor_while_the_loss_falls():
    assert told(health(), [2.0] * 8 + [2.15]) == []  # below 10 x 1% of the median, although the deviation is 0
    assert told(health(), [2.0] * 8 + [2.25]) != []
    assert told(health(), [10 * 0.8**row for row in range(40)]) == []


def test_a_spike_is_told_once_and_a_new_level_is_learned():
    found = told(health(), [*QUIET, *[5.0] * 30, 50.0])
    assert [step for step, _ in found] == [9, 39]


def test_a_loss_that_is_not_a_number_in_a_row_is_a_spike_and_not_remembered():
    watch = health()
    assert [step for step, _ in told(watch, [*QUIET, math.nan])] == [9]
    assert watch.losses == QUIET


def test_a_spike_rolls_back_under_that_policy_and_stops_when_it_comes_too_often():
    watch = health(on_spike="rollback", max_nonfinite=1)
    told(watch, QUIET)
    (finding,) = watch.look(9, {"loss": 9.0})
    assert finding.roll_back
    watch.rolled_back(9, 5, needed=False)
    assert watch.losses == QUIET, "a row whose steps were given up is no measure"
    with pytest.raises(NonFiniteLoss, match=r"jumped to 9 .* at step 10, 2 times by now \(run.max_nonfinite=1\)"):
        watch.look(10, {"loss": 9.0})


def load(*shares):
    return {"loss": 1.0, "load/blocks.1.mlp": list(shares), "load/blocks.3.mlp": [0.25] * 4}


def test_an_expert_is_dead_after_five_rows_without_tokens():
    watch = health()
    alive, idle = load(0.4, 0.3, 0.2, 0.1), load(0.5, 0.3, 0.2, 0.0)
    found = told(watch, [idle] * 4 + [alive] + [idle] * 7)
    assert found == [(10, "layer blocks.1.mlp: no tokens for expert 3 in 5 rows, at step 10")]
    assert watch.summary()["dead_experts"] == {"blocks.1.mlp": [3]}
    assert told(watch, [alive]) == [] and watch.summary()["dead_experts"] == {}
    assert told(health(dead_after=0), [idle] * 20) == []


def test_a_hundredth_of_an_equal_share_is_as_good_as_dead():
    assert told(health(dead_after=1), [load(0.4, 0.3, 0.2974, 0.0026)]) == []  # 0.0026 x 4 experts = 1.04%
    assert told(health(dead_after=1), [load(0.4, 0.3, 0.2976, 0.0024)]) != []


def test_a_collapsed_router_names_the_experts_that_are_left():
    found = told(
        health(dead_after=2), [load(0.5, 0, 0.5, 0), load(0.99, 0, 0.01, 0), load(1.0, 0, 0, 0), load(1, 0, 0, 0)]
    )
    assert found == [
        (2, "layer blocks.1.mlp: no tokens for experts 1, 3 in 2 rows, at step 2"),
        (4, "layer blocks.1.mlp: the router has collapsed to expert 0 of 4 at step 4"),
    ]


def test_skips_up_to_the_limit():
    watch = health(on_nonfinite="skip", max_nonfinite=2)
    for step in (3, 7):
        finding = watch.refused_step(step, "the gradient")
        assert finding.message == f"the gradient is not finite at step {step}: the step is skipped"
        assert not finding.roll_back
    assert watch.counts() == {"nonfinite_steps": 2}
    with pytest.raises(NonFiniteLoss, match=r"the gradient is not finite at step 8, 3 times by now .*=2\)"):
        watch.refused_step(8, "the gradient")


def test_stops_at_once_by_default():
    with pytest.raises(NonFiniteLoss, match=r"the loss of rank 1 is not finite at step 3\. Stopped on all ranks"):
        health().refused_step(3, "the loss of rank 1")


def test_broken_weights_can_only_be_rolled_back():
    for policy in ("stop", "skip"):
        with pytest.raises(NonFiniteLoss, match="a weight is not finite at step 4"):
            health(on_nonfinite=policy).broken_weights(4)
    watch = health(on_nonfinite="rollback")
    assert watch.broken_weights(4).roll_back
    with pytest.raises(NonFiniteLoss, match="no checkpoint yet"):
        watch.rolled_back(4, None, needed=True)
    assert "no checkpoint to go back to" in watch.rolled_back(4, None, needed=False).message


def test_what_was_decided_survives_a_checkpoint():
    before = health(on_nonfinite="rollback", dead_after=3)
    told(before, [load(0.5, 0.3, 0.2, 0.0)] * 2)
    before.refused_step(2, "the gradient")
    before.rolled_back(2, 1, needed=False)
    after = health(on_nonfinite="rollback", dead_after=3)
    after.restore(before.state())
    assert after.summary() == before.summary() == {
        "nonfinite_steps": [2], "rollbacks": [[2, 1]], "dead_experts": {}, "warnings": 2,
    }  # fmt: skip
    row = load(0.5, 0.3, 0.2, 0.0)
    assert after.look(3, row) == before.look(3, row) != []
