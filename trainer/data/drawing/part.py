"""Fills a part of a procedural data set: python -P part.py TASK, as procedural.py starts it.

TASK is JSON: folder, family (a module beside this file with draw_images), labels (first class and the one after the
last), kind, maker (process id) and what the images depend on. A script, because importing trainer.data loads torch.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np


def fill(task: dict) -> None:
    """Draw all images of some classes into the prepared files of a folder."""
    folder = Path(task["folder"])
    sys.path.append(str(Path(__file__).parents[1]))
    family = importlib.import_module(f"{Path(__file__).parent.name}.{task['family']}")
    per_class = task["per_class"]
    images_NSS = np.load(folder / "images.npy", mmap_mode="r+")
    palettes_N23 = np.load(folder / "palettes.npy", mmap_mode="r+")
    for label in range(*task["labels"]):
        if os.getppid() != task["maker"]:  # it was killed: nobody waits for the rest
            sys.exit(1)
        rows = slice(label * per_class, (label + 1) * per_class)  # sorted by class
        images_NSS[rows], palettes_N23[rows] = family.draw_images(
            task["seed"], task["kind"], label, range(per_class), task["size"], task["difficulty"]
        )


if __name__ == "__main__":
    for warning in (signal.SIGTERM, signal.SIGUSR1):  # sent to a whole job step, and meant for its ranks
        signal.signal(warning, signal.SIG_IGN)
    fill(json.loads(sys.argv[1]))
