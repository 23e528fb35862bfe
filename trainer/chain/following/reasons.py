"""Which of Slurm's reasons for a waiting job mean that it will not start until somebody changes something.

The codes are those of squeue's manual ("JOB REASON CODES"); where slurmctld puts a sentence in place of a code, a part
of it. A job with any other reason (Resources, Priority, Dependency, BeginTime, ...) starts when its turn comes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SOON = 60  # seconds for which `wait` watches a reason that lies in the submission itself
LATER = 1800  # ... and one that lies in the cluster's state, which somebody may be repairing
_SIZE = "ask for less: --nodes, --gpus-per-node, --cpus-per-task, --mem, --time"
_ACCOUNT = "accounts: sacctmgr show assoc user=$USER; choose one with --account"
_QOS = "QOS: sacctmgr show assoc user=$USER format=account,qos; choose one with --qos"
_BUDGET = "the budget is used up: sshare; another --account or --qos, or ask the administrators"


@dataclass(frozen=True)
class Never:
    """Why a waiting job will not start by itself."""

    reason: str  # Slurm's word
    advice: str
    patience: int  # seconds after which `wait` gives up

    def __str__(self) -> str:
        return f"will never start: {self.reason}; {self.advice}"


# (pattern of the reason, what to do, how long `wait` hopes), the first that fits
_NEVER = (
    (r"DependencyNeverSatisfied", "a stage it needs did not end well: `cancel`, then submit again", SOON),
    (r"PartitionTimeLimit", "the limit: scontrol show partition; lower --time", SOON),
    (r"PartitionNodeLimit|PartitionConfig", "the limits: scontrol show partition; change --nodes", SOON),
    (r"PartitionDown|PartitionInactive", "sinfo -s; another --partition, or ask the administrators", LATER),
    (r"AccountNotAllowed|InvalidAccount|[Aa]ccount.*not (permitted|allowed|known)", _ACCOUNT, SOON),
    (r"InvalidQOS|QOSNotAllowed|QOS.*not (permitted|allowed)", _QOS, SOON),
    (r"(not in|[Uu]ser).*group.*(permitted|allowed)", "another --partition", SOON),
    (r"(QOS|Assoc)\w*Minutes|QOSUsageThreshold|\w*GrpBilling\w*Minutes", _BUDGET, LATER),
    (r"(QOS|Assoc)Max\w*PerJob\w*|QOSTimeLimit|QOSResourceLimit|MaxMemPerLimit", _SIZE, SOON),
    (r"QOSMin\w*", "the QOS wants more: sacctmgr show qos; another --qos", SOON),
    (r"BadConstraints", "no node has these features: sinfo -o '%N %f'; change --constraint", SOON),
    (r"ReservationDeleted", "the reservation is gone: scontrol show reservation; submit without it", SOON),
    (r"ReqNodeNotAvail(?!.*maintenance)|NodeDown", "nodes are down or drained: sinfo -R; or ask for others", LATER),
    (r"JobHeldUser", "somebody holds it: scontrol release ID", LATER),
    (r"JobHeldAdmin|[Hh]eld", "it is held: scontrol show job ID says why; scontrol release ID", LATER),
)  # fmt: skip


def never(reason: str) -> Never | None:
    """What a waiting job's reason means when it will not start by itself, else None.

    Args:
        reason: as squeue's %r tells it, e.g. "ReqNodeNotAvail, UnavailableNodes:node3".
    """
    words = reason.replace("_", " ")  # some versions of squeue print sentences with underscores
    for pattern, advice, patience in _NEVER:
        if re.search(pattern, words):
            return Never(words, advice, patience)
    return None
