"""Every kind of fault once, and kills around every stage of a save; the long form is `make faults`."""

import random

from tests.faults.rounds import AROUND, KINDS, draw_fault, harm, undisturbed

FAULTS = [
    {"kind": "kill", "rank": 0, "at": "save", "call": 2, "when": "before", "delay": 0},
    {"kind": "kill", "rank": 1, "at": "save", "call": 1, "when": "after", "delay": 0.005},  # while it is being written
    {"kind": "kill", "rank": 0, "at": "fsync", "call": 6, "when": "before", "delay": 0},
    {"kind": "kill", "rank": 0, "at": "replace", "call": 3, "when": "before", "delay": 0},  # in a commit
    {"kind": "kill", "rank": 0, "at": "phase", "call": 2, "when": "before", "delay": 0},
    {"kind": "slow disk", "rank": 1, "at": "fsync", "call": 1, "when": "before", "delay": 0},
    {"kind": "term", "rank": 1, "at": "step", "call": 2, "when": "after", "delay": 0},
    {"kind": "stop", "rank": 1, "at": "backward", "call": 2, "when": "before", "delay": 0},
    {"kind": "disk full", "rank": 0, "bytes": 40_000},
    {"kind": "read error", "rank": 1, "call": 20},
    {"kind": "nan", "rank": 1, "call": 3},
    {"kind": "dead worker", "rank": 0, "call": 2},
]


def test_every_kind_of_fault_is_survived(warm, tmp_path):
    assert {fault["kind"] for fault in FAULTS} == set(KINDS)
    reference = undisturbed(warm, tmp_path / "undisturbed")
    survived = list(harm(warm, tmp_path, reference, iter(FAULTS)))
    assert survived == FAULTS  # each of them struck


def test_faults_are_drawn_from_the_seed_alone():
    drawn = [[draw_fault(rng) for _ in range(300)] for rng in (random.Random(3), random.Random(3), random.Random(4))]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {fault["kind"] for fault in drawn[0]} == set(KINDS)
    assert {fault["at"] for fault in drawn[0] if "at" in fault} == set(AROUND)
