"""`status`: state, progress, GPU-hours and reason of every result of a chain; a table or JSON, once or watched."""

from __future__ import annotations

import json
import sys
from time import gmtime, sleep, strftime
from typing import Any

from trainer.chain.following import snapshot
from trainer.chain.following.options import View
from trainer.chain.following.snapshot import (
    DONE,
    ENDED,
    MISSING,
    NEVER,
    RUNNING,
    UNANSWERED,
    WAITING,
    Element,
    Snapshot,
)
from trainer.chain.settings import Settings
from trainer.tracking.console import table

HEAD = ("stage", "job", "state", "progress", "hours", "node", "detail")
ONCE = View()
FORMAT = 1  # of --json: raised when a key changes its meaning or goes
# the exit code of status and of wait; the settings' and Slurm's own refusals are 2 and 3
CODES = {DONE: 0, RUNNING: 0, WAITING: 0, ENDED: 1, MISSING: 1, UNANSWERED: 3, NEVER: 4}
CLEAR = "\x1b[H\x1b[J"  # a terminal: to the upper left corner, and empty from there on


def show(settings: Settings, view: View = ONCE) -> int:
    """Print the chain as it is, with --watch until it has ended; the exit code is that of CODES.

    Raises:
        ValueError: nothing was submitted in this run folder.
    """
    chain = snapshot.read(settings.run)
    _print(chain, view)
    while view.watch and not chain.settled:
        sleep(view.every)
        chain = snapshot.read(settings.run)
        _print(chain, view)
    return CODES[chain.state]


def as_json(chain: Snapshot) -> dict[str, Any]:
    """The same for programs; docs/slurm.md lists the keys."""
    return {
        "format": FORMAT,
        "run": str(chain.run),
        "time": strftime("%Y-%m-%dT%H:%M:%SZ", gmtime()),
        "state": chain.state,
        "settled": chain.settled,
        "exit_code": CODES[chain.state],
        "slurm_answers": not chain.no_answer,
        "no_answer": chain.no_answer,
        "gpu_hours": _hours(chain.elements),
        "results": [_element_as_json(each) for each in chain.elements],
    }


def reasons(chain: Snapshot) -> list[str]:
    """One line for each result that keeps the chain from its end."""
    return [
        f"{each.result}: {each.state}{f' ({each.detail})' if each.detail else ''}"
        for each in chain.elements
        if CODES[each.state]
    ]


def _print(chain: Snapshot, view: View) -> None:
    if view.json:
        text = json.dumps(as_json(chain), indent=None if view.watch else 1)
    else:
        text = _page(chain)
        if view.watch and sys.stdout.isatty():
            text = CLEAR + text
    print(text, flush=True)


def _page(chain: Snapshot) -> str:
    """The table, and below it what follows from it."""
    first = f"{chain.run}   (Slurm gives no answer: {chain.no_answer})" if chain.no_answer else str(chain.run)
    lines = [(each.result, *_cells(each)) for each in chain.elements]
    parts = [f"{first}\n{table(HEAD, lines)}\n{_hours_line(chain.elements)}"]
    if chain.state == ENDED:
        parts.append("Ended without result: repair the reason, then submit again; what is complete is not run again.")
    if chain.state == NEVER:
        parts.append("Will never start by itself: do what the line says, or `cancel` and submit again.")
    return "\n\n".join(parts)


def _cells(each: Element) -> tuple[str, ...]:
    """job, state, progress, hours, node, detail."""
    word = each.slurm or {ENDED: "ENDED"}.get(each.state, each.state)
    if each.state in (DONE, NEVER):
        word = {DONE: "done", NEVER: "NEVER"}[each.state]
    hours = f"{each.spent.hours:.3g}" if each.spent.starts else "-"
    return (each.job or "-", word, str(each.progress), hours, each.nodes or "-", each.detail)


def _element_as_json(each: Element) -> dict[str, Any]:
    return {
        "result": each.result,
        "stage": each.stage,
        "element": each.element,
        "state": each.state,
        "job": each.job,
        "slurm_state": each.slurm,
        "reason": each.reason,
        "will_never_start": each.never is not None,
        "nodes": each.nodes,
        "detail": each.detail,
        "progress": each.progress.as_json(),
        "gpu_hours": _hours([each]),
        "starts": each.spent.starts,
        "log": str(each.rank0_log or ""),
    }


def _hours(elements: list[Element]) -> dict[str, float | None]:
    """GPU-hours (rank-hours without GPUs): spent, expected in the end as far as it is known, and by the time limits."""
    expected = [expected_hours(each, elements) for each in elements]
    limits = [each.spent.limit for each in elements if each.spent.limit is not None]
    return {
        "spent": sum(each.spent.hours for each in elements),
        "expected": None if None in expected else sum(expected),
        "limit": sum(limits) if limits else None,
    }


def expected_hours(each: Element, elements: list[Element]) -> float | None:
    """GPU-hours of a result when it is done: spent and what its log's ETA says is left, or those of its siblings."""
    if each.state == DONE:
        return each.spent.hours
    left = each.progress.eta_seconds
    if each.state == RUNNING and left is not None and each.spent.ranks is not None:
        return each.spent.hours + left * each.spent.ranks / 3600
    siblings = [other.spent.hours for other in elements if other.stage == each.stage and other.state == DONE]
    return sum(siblings) / len(siblings) if siblings else None


def _hours_line(elements: list[Element]) -> str:
    hours = _hours(elements)
    known = [expected_hours(each, elements) for each in elements]
    parts = [f"{hours['spent']:.3g} GPU-hours spent (nodes held, by the notes of the job bodies)"]
    told = [value for value in known if value is not None]
    if told and len(told) < len(known):
        parts.append(f"{sum(told):.3g} expected for {len(told)} of {len(known)} results (ETA, finished siblings)")
    elif told:
        parts.append(f"{sum(told):.3g} expected in all (ETA, finished siblings)")
    if hours["limit"] is not None:
        parts.append(f"{hours['limit']:.3g} by the time limits")
    return ", ".join(parts)
