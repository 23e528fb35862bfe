"""Whether a phase in training is healthy: steps that are not finite, loss spikes, dead experts; and what is done then.

Only numbers that all ranks hold alike are judged (ZeRO's verdict on the summed gradient, a metrics row), so every rank
decides the same at the same step without asking the others. What a decision depends on stands in the checkpoints: a
run killed and started again skips and rolls back at the same steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from trainer.config.runtime import RunConfig

ROWS = 32  # rows a spike is measured against, at most
FEWEST_ROWS = 8  # before any is called a spike
LEAST_SPREAD = 0.01  # of the median: on a plateau the deviation is so small that noise would be a spike
DEAD_SHARE = 0.01  # of an equal share of the choices: an expert below it counts as without tokens
COLLAPSED_SHARE = 0.9  # of the first choices: an expert above it leaves the others nothing to do
CHANCE_TAIL = 1e-3  # of the binomial distribution on either side: what counts as above or below chance
COLLAPSED_ENTROPY = 0.25  # of the first choices, 1 = spread evenly over all experts


class NonFiniteLoss(RuntimeError):
    """A loss, a gradient or the weights stopped being numbers; the message names the step."""


@dataclass(frozen=True)
class Finding:
    """Something a person should know, as it goes into a row of kind "warning"."""

    message: str
    roll_back: bool = False  # the weights have to go back to the last checkpoint
    about: dict[str, Any] = field(default_factory=dict)  # more keys of the row, e.g. the layer and its experts


class Health:
    """The watch over one phase; its methods raise on all ranks alike.

    Args:
        description: of the phase, for messages.
    """

    def __init__(self, run: RunConfig, description: str):
        self.run = run
        self.description = description
        self.nonfinite: list[int] = []  # steps whose loss or gradient was no number: their update was never made
        self.rollbacks: list[list[int]] = []  # [step after which, step whose weights came back]
        self.losses: list[float] = []  # of the last rows
        self.spiking = False
        self.idle: dict[str, list[int]] = {}  # per MoE layer and expert: rows in a row without tokens
        self.unused: dict[str, list[int]] = {}  # per MoE layer: experts without a token in the last evaluation
        self.collapsed: list[str] = []  # MoE layers whose router had collapsed in the last evaluation
        self.warnings = 0

    def refused_step(self, step: int, cause: str) -> Finding:
        """Judge an optimiser step that ZeRO refused, because the gradient of all ranks together was not finite.

        Args:
            step: its number, 1 = the first.
            cause: what was not finite, for the message.

        Raises:
            NonFiniteLoss: the policy is stop, or this is one step too many.
        """
        self.nonfinite.append(step)
        policy = self.run.on_nonfinite
        self._stop_at_limit(step, f"{cause} is not finite", len(self.nonfinite), stop=policy == "stop")
        text = f"{cause} is not finite at step {step}: the step is skipped"
        return self._finding(text, roll_back=policy == "rollback")

    def broken_weights(self, step: int) -> Finding:
        """Judge weights that are not finite after a step whose gradient was: they must not reach a checkpoint.

        Raises:
            NonFiniteLoss: unless the policy is rollback.
        """
        self.nonfinite.append(step)
        stop = self.run.on_nonfinite != "rollback"  # the step is made: it cannot be skipped any more
        self._stop_at_limit(step, "a weight is not finite", len(self.nonfinite), stop=stop)
        return self._finding(f"a weight is not finite after step {step}", roll_back=True)

    def look(self, step: int, row: dict[str, Any]) -> list[Finding]:
        """Judge a metrics row (the same on all ranks): its loss against the rows before, and the load of its experts.

        Raises:
            NonFiniteLoss: a spike after which the weights went back once too often.
        """
        return [*self._spike(step, row["loss"]), *self._dead_experts(step, row)]

    def look_at_evaluation(
        self, step: int, evaluation: dict[str, float], layers: Mapping[str, Mapping[str, Any]]
    ) -> list[Finding]:
        """Judge an evaluation: images on which the model's output is no number, idle experts, collapsed routers.

        Args:
            layers: per MoE layer "load" and "first", as from Choices.summary.
        """
        findings = []
        for layer, values in layers.items():
            findings += self._routing(step, layer, values)
        count = evaluation.get("nonfinite_images", 0)
        if count:
            text = f"the model's output is not finite on {count} of {evaluation['images']} validation images"
            findings.append(self._finding(text))
        return findings

    def rolled_back(self, step: int, to: int | None, *, needed: bool) -> Finding:
        """Note that the weights after `step` are those of step `to` again, so that its images are not seen once more.

        Args:
            to: None = there was no checkpoint to go back to.
            needed: the weights of `step` are of no use.

        Raises:
            NonFiniteLoss: nothing to go back to although it is needed.
        """
        if to is None:
            self._stop_at_limit(step, "a weight is not finite and there is no checkpoint yet", 1, stop=needed)
            return self._finding("there is no checkpoint to go back to yet: going on with the weights as they are")
        self.rollbacks.append([step, to])
        text = f"rolled back to the weights of step {to}: updates since then are given up, the next step is {step + 1}"
        return self._finding(text, about={"rolled_back_to": to})

    def counts(self) -> dict[str, int]:
        """What a metrics row tells, where there is something to tell."""
        counts = {"nonfinite_steps": len(self.nonfinite), "rollbacks": len(self.rollbacks)}
        return {name: count for name, count in counts.items() if count}

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint; copies, because a checkpoint is written while training goes on."""
        state = {
            "nonfinite": self.nonfinite,
            "rollbacks": self.rollbacks,
            "losses": self.losses,
            "spiking": self.spiking,
            "idle": self.idle,
            "unused": self.unused,
            "collapsed": self.collapsed,
            "warnings": self.warnings,
        }
        return copy.deepcopy(state)

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what state() returned."""
        for name in self.state():
            setattr(self, name, state[name])

    def summary(self) -> dict[str, Any]:
        """What result.json tells of it."""
        dead = {layer: self._dead(layer) for layer in self.idle}
        return {
            "nonfinite_steps": self.nonfinite,
            "rollbacks": self.rollbacks,
            "dead_experts": {layer: experts for layer, experts in dead.items() if experts},
            "warnings": self.warnings,
        }

    def _spike(self, step: int, loss: float) -> list[Finding]:
        """A loss far above the median of the rows before, measured in robust standard deviations (MAD x 1.4826)."""
        losses = self.losses
        was_spiking = self.spiking
        self.spiking = False
        if self.run.spike_factor and len(losses) >= FEWEST_ROWS:
            middle = median(losses)
            # MAD = median |loss - median|; x 1.4826 it estimates the standard deviation of a normal distribution
            deviation = 1.4826 * median(abs(x - middle) for x in losses)
            spread = max(deviation, LEAST_SPREAD * abs(middle))
            # loss > median + spike_factor x spread, or no number
            self.spiking = not loss <= middle + self.run.spike_factor * spread
        roll_back = self.spiking and self.run.on_spike == "rollback"
        if not roll_back and math.isfinite(loss):
            self.losses = [*losses, loss][-ROWS:]
        if not self.spiking or (was_spiking and not roll_back):
            return []  # a spike is told once, not in each of its rows
        what = f"the loss jumped to {loss:.4g} (median of the {len(losses)} rows before: {median(losses):.4g})"
        if roll_back:
            self._stop_at_limit(step, what, len(self.rollbacks) + 1, stop=False)
        return [self._finding(f"{what} at step {step}", roll_back=roll_back)]

    def _dead_experts(self, step: int, row: dict[str, Any]) -> list[Finding]:
        """Experts that have just been without tokens for run.dead_after rows; each is told once until it revives."""
        findings = []
        for key, load in row.items():
            if not key.startswith("load/"):
                continue
            layer = key.removeprefix("load/")
            idle = self.idle.setdefault(layer, [0] * len(load))
            for expert, share in enumerate(load):
                # share / (1 / experts), relative to an equal share
                if share * len(load) < DEAD_SHARE:
                    idle[expert] += 1
                else:
                    idle[expert] = 0
            if not self.run.dead_after or self.run.dead_after not in idle:
                continue
            dead = self._dead(layer)
            if len(dead) * 2 > len(load):
                alive = [expert for expert in range(len(load)) if expert not in dead]
                text = f"layer {layer}: the router has collapsed to {_experts(alive)} of {len(load)} at step {step}"
            else:
                text = f"layer {layer}: no tokens for {_experts(dead)} in {self.run.dead_after} rows, at step {step}"
            findings.append(self._finding(text, about={"layer": layer, "dead_experts": dead}))
        return findings

    def _routing(self, step: int, layer: str, values: Mapping[str, Any]) -> list[Finding]:
        """What the validation images say of a layer, told once; what the training rows have told is not told again."""
        findings = []
        dead = self._dead(layer) if layer in self.idle else []
        unused = [expert for expert, share in enumerate(values["load"]) if not share]
        told = {*dead, *self.unused.get(layer, ())}
        new = [expert for expert in unused if expert not in told]
        self.unused[layer] = unused
        if new:
            text = f"layer {layer}: not one validation token for {_experts(new)}, at step {step}"
            findings.append(self._finding(text, about={"layer": layer, "unused_experts": unused}))
        cause = collapse(values["first"])
        collapse_told = layer in self.collapsed or len(dead) * 2 > len(values["load"])
        self.collapsed = [name for name in self.collapsed if name != layer]
        if cause:
            self.collapsed.append(layer)
        if cause and not collapse_told:
            text = f"layer {layer}: the router has collapsed on the validation images: {cause}, at step {step}"
            findings.append(self._finding(text, about={"layer": layer, "first_choices": values["first"]}))
        return findings

    def _dead(self, layer: str) -> list[int]:
        """Experts of a layer that have been without tokens for run.dead_after rows; none when that is 0."""
        if not self.run.dead_after:
            return []
        return [expert for expert, rows in enumerate(self.idle[layer]) if rows >= self.run.dead_after]

    def _finding(self, message: str, **values: Any) -> Finding:
        self.warnings += 1
        return Finding(message, **values)

    def _stop_at_limit(self, step: int, what: str, count: int, *, stop: bool) -> None:
        if stop or count > self.run.max_nonfinite:
            limit = "" if stop else f", {count} times by now (run.max_nonfinite={self.run.max_nonfinite})"
            raise NonFiniteLoss(
                f"{self.description}: {what} at step {step}{limit}. Stopped on all ranks; the last checkpoint is from "
                "before. Lower the phase's lr, set its clip, or look at the data; run.on_nonfinite=skip or rollback "
                "goes on after single steps"
            )


def collapse(first: Sequence[float]) -> str | None:
    """Why a router counts as collapsed, from the share of the first choices that each expert gets; None = it does not.

    One expert gets more than COLLAPSED_SHARE, or the entropy relative to an even spread is below COLLAPSED_ENTROPY.
    """
    if len(first) < 2:
        return None
    # H = -sum p log p, relative to log E of an even spread
    entropy = -sum(share * math.log(share) for share in first if share > 0) / math.log(len(first))
    if max(first) <= COLLAPSED_SHARE and entropy >= COLLAPSED_ENTROPY:
        return None
    used = [expert for expert, share in enumerate(first) if share * len(first) >= DEAD_SHARE]
    return f"first choices go to {_experts(used)} of {len(first)}, {max(first):.0%} to one (entropy {entropy:.2f})"


def against_chance(accuracy: float, images: float, classes: float) -> str:
    """Whether a model knows more than its classes' number: "above", "near" or "below" chance.

    The tails of the binomial distribution of `images` guesses at 1 / `classes`, of CHANCE_TAIL each: what is far below
    has its classes in another order, for one that has learnt nothing guesses right that often.

    Args:
        accuracy: 0..1 on these images.
    """
    p, n, correct = 1 / classes, round(images), round(accuracy * images)
    at_least = sum(_binomial(n, k, p) for k in range(correct, n + 1))
    at_most = sum(_binomial(n, k, p) for k in range(correct + 1))
    if at_least < CHANCE_TAIL and accuracy > p:
        return "above"
    return "below" if at_most < CHANCE_TAIL else "near"


def _binomial(n: int, k: int, p: float) -> float:
    """Probability of k right guesses of n: n! / (k! (n - k)!) p^k (1 - p)^(n - k), by logarithms."""
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))


def _experts(numbers: list[int]) -> str:
    names = ", ".join(map(str, numbers))
    return f"expert {names}" if len(numbers) == 1 else f"experts {names}"
