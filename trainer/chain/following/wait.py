"""`wait`: until a chain has ended or cannot go on. Exit code 0 only when every result is done."""

from __future__ import annotations

from time import monotonic, sleep, strftime

from trainer.chain.following import snapshot
from trainer.chain.following.options import View
from trainer.chain.following.snapshot import LIVE, NEVER, UNANSWERED, Snapshot
from trainer.chain.following.status import CODES, reasons
from trainer.chain.settings import Settings

SILENCE = 3600  # seconds without an answer of Slurm after which `wait` ends with 3


def show(settings: Settings, view: View) -> int:
    """Print a line when a result changes its state; in the end the reasons of what is not done.

    A bad end is believed when it is seen twice: a shared file system may show a result later than Slurm shows the end
    of its job. A reason for which a job will never start is believed after its patience (reasons.py).

    Returns:
        A code of trainer/chain/following/status.py:CODES.

    Raises:
        ValueError: nothing was submitted in this run folder.
    """
    states: dict[str, str] = {}
    since: dict[tuple[str, str], float] = {}  # (result, state) -> when that was seen first, in a row
    silent_since: float | None = None
    suspected = False
    while True:
        chain = snapshot.read(settings.run)
        now = monotonic()
        for each in chain.elements:
            if each.state not in (states.get(each.result), UNANSWERED):
                detail = f" ({each.detail})" if each.detail else ""
                print(f"{strftime('%H:%M:%S')} {each.result}: {each.state}{detail}", flush=True)
                states[each.result] = each.state
                since[each.result, each.state] = now
        if not chain.no_answer:
            silent_since = None
        elif silent_since is None:
            silent_since = now
            print(f"{strftime('%H:%M:%S')} Slurm gives no answer, asking on: {chain.no_answer}", flush=True)
        if silent_since is not None and now - silent_since > SILENCE:
            return _end(chain, UNANSWERED)
        hopeless = _settled(chain, since, now)
        if hopeless and (suspected or not CODES[chain.state]):
            return _end(chain, chain.state)
        suspected = hopeless
        sleep(view.every)


def _settled(chain: Snapshot, since: dict[tuple[str, str], float], now: float) -> bool:
    """Whether nothing will change any more: nothing is live but what waits for something that will never start."""
    waiting_for_ever = False
    for each in chain.elements:
        if each.state == NEVER:
            if now - since[each.result, NEVER] < each.never.patience:
                return False
            waiting_for_ever = True
    for each in chain.elements:
        depends = waiting_for_ever and each.reason == "Dependency"
        if each.state in LIVE and not depends:
            return False
    return True


def _end(chain: Snapshot, state: str) -> int:
    for line in reasons(chain):
        print(line, flush=True)
    return CODES[state]
