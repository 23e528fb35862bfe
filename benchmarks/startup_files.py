"""What each rank asks of the file systems until it has trained for an epoch: files, system calls and bytes, by place.

    python benchmarks/startup_files.py --ranks 1 2 8

It makes a folder of pictures and a teacher, starts phase meta on them under strace, and counts. Where python, code,
data and runs lie on a shared file system every line but "system" goes over the network, for each rank anew but for what
the page cache of its node holds. Seconds are those of a traced start, two to three times as long as one without. Needs
strace.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TRACED = "%file,read,pread64,getdents64,mmap"
# one line of strace -y -s 0: name(arguments) = result
LINE = re.compile(r"^(\w+)\((.*)\)\s+= (-?\d+|0x[0-9a-f]+)")
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
DESCRIPTOR = re.compile(r"\d+<([^>]*)>")
PLACES = ("python and packages", "the repository", "pictures", "teacher", "run folder", "caches", "system")


@dataclass
class Count:
    """Of one rank in one place."""

    opened: int = 0  # files
    looked_up: int = 0  # calls that name a path, those that find nothing among them
    listed: int = 0  # calls that list a folder
    read: int = 0  # bytes
    mapped: set[str] = field(default_factory=set)  # files whose pages are read when they are used
    packages: Counter[str] = field(default_factory=Counter)  # files opened in each

    def mapped_bytes(self) -> int:
        """Of all pages of these files, whether they are used or not."""
        return sum(os.path.getsize(path) for path in self.mapped if os.path.isfile(path))


def main() -> None:
    """Print a table for each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--images", type=int, default=100, help="of a class")
    options = parser.parse_args()
    if not shutil.which("strace"):
        raise SystemExit("strace is not installed; on Debian: apt-get install strace")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pictures = make_pictures(folder / "pictures", options.classes, options.images)
        teacher = make_teacher(folder / "teacher", options.classes)
        print(f"{options.classes} classes of {options.images} pictures, {options.classes} x 5 for validation")
        for number, ranks in enumerate(options.ranks):
            counts, seconds = start(ranks, folder / f"traces{number}", pictures, teacher, folder / f"run{number}")
            print(f"\n{ranks} rank{'s' if ranks > 1 else ''}, {seconds:.0f} s under strace")
            print(page(counts))


def make_pictures(folder: Path, classes: int, images: int) -> Path:
    """train/CLASS/*.png and val/CLASS/*.png; one picture a class, under many names."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in (("train", images), ("val", 5)):
        for label in range(classes):
            place = folder / split / f"class{label:04d}"
            place.mkdir(parents=True)
            pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / "image00000.png")
            for number in range(1, count):
                os.link(place / "image00000.png", place / f"image{number:05d}.png")
    return folder


def make_teacher(folder: Path, classes: int) -> Path:
    """A checkpoint of the tiny recipe's teacher for these classes."""
    import models  # noqa: F401  first: it mends torchvision beside a CPU torch
    from models.teacher.load import save_teacher
    from trainer.config.load import load_recipe
    from trainer.teaching.teachers import new_teacher_of, trained_preprocessing

    recipe = load_recipe(str(ROOT / "tests/fixtures/slurm_tiny.yaml"))
    labels = [f"class{label:04d}" for label in range(classes)]
    folder.mkdir()
    save_teacher(new_teacher_of(recipe.teacher, labels), folder, trained_preprocessing(recipe.teacher))
    return folder


def start(ranks: int, traces: Path, pictures: Path, teacher: Path, out: Path) -> tuple[list[dict[str, Count]], float]:
    """Run phase meta for one epoch; what every rank has done by place, and the seconds."""
    traces.mkdir()
    words = [
        "--recipe", "tests/fixtures/slurm_tiny.yaml", "--ds_config", "ds_configs/cpu_debug.json", "--phase", "meta",
        "--out", str(out), "data.source=folder", f"data.path={pictures}", "data.limit=64", "data.workers=0",
        f"teacher.source={teacher}", "meta.epochs=1",
    ]  # fmt: skip
    environ = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "OMP_NUM_THREADS": "1"}
    environ |= {"HF_HUB_OFFLINE": "1", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    started = time.monotonic()
    processes = []
    for rank in range(ranks):
        prefix = traces / str(rank)
        prefix.mkdir()
        tracer = [
            "strace",
            "-ff",
            "--seccomp-bpf",
            "-qq",
            "-y",
            "-s",
            "0",
            "-e",
            f"trace={TRACED}",
            "-o",
            f"{prefix}/t",
        ]
        command = [*tracer, sys.executable, "trainer/run.py", *words]
        own = environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = (prefix / "log").open("w")
        processes.append(subprocess.Popen(command, cwd=ROOT, env=own, stdout=log, stderr=log))
    codes = [process.wait(1200) for process in processes]
    if any(codes):
        logs = "\n".join((traces / str(rank) / "log").read_text()[-1500:] for rank in range(ranks))
        raise SystemExit(f"the ranks ended with {codes}\n{logs}")
    places = {
        str(pictures): "pictures", str(teacher): "teacher", str(out): "run folder", str(ROOT): "the repository",
        sys.prefix: "python and packages", sys.base_prefix: "python and packages",
        str(Path.home() / ".cache"): "caches",
    }  # fmt: skip
    return [read_traces(traces / str(rank), places) for rank in range(ranks)], time.monotonic() - started


def read_traces(folder: Path, places: dict[str, str]) -> dict[str, Count]:
    """What one rank has done, by place."""
    counts: dict[str, Count] = defaultdict(Count)
    for name, arguments, result in _calls(folder):
        quoted, descriptor = QUOTED.search(arguments), DESCRIPTOR.search(arguments)
        if name in ("read", "pread64", "getdents64", "mmap"):
            if not descriptor or not descriptor[1].startswith("/"):  # a pipe, a socket, memory of its own
                continue
            path = descriptor[1]
        elif quoted and quoted[1]:
            path = quoted[1] if quoted[1].startswith("/") else str(ROOT / quoted[1])
        else:
            continue
        count = counts[_place(path, places)]
        if name in ("read", "pread64"):
            count.read += max(result, 0)
        elif name == "getdents64":
            count.listed += 1
        elif name == "mmap":
            count.mapped.add(path)
        else:
            count.looked_up += 1
            if name in ("open", "openat") and result >= 0 and "O_DIRECTORY" not in arguments:
                count.opened += 1
                count.packages[path.rpartition("site-packages/")[2].split("/")[0]] += 1
    return counts


def page(counts: list[dict[str, Count]]) -> str:
    """Rank 0 beside the mean of the others."""
    sides = [("rank 0", counts[:1])]
    if len(counts) > 1:
        sides.append((f"each of the {len(counts) - 1} others", counts[1:]))
    lines = []
    for side, ranks in sides:
        lines += [f"| {side} | files opened | paths looked up | folders listed | MB read | MB mapped |"]
        lines += ["|---|---:|---:|---:|---:|---:|"]
        total: Counter[str] = Counter()
        for place in PLACES:
            cells = Counter()
            for rank in ranks:
                count = rank.get(place, Count())
                cells += Counter(
                    opened=count.opened, looked_up=count.looked_up, listed=count.listed, read=count.read,
                    mapped=count.mapped_bytes(),
                )  # fmt: skip
            total += cells
            lines.append(_row(place, cells, len(ranks)))
        lines.append(_row("total", total, len(ranks)))
    of_packages = counts[0][PLACES[0]].packages.most_common(6)
    lines.append("files opened by rank 0, by package: " + ", ".join(f"{name} {n:,}" for name, n in of_packages if name))
    return "\n".join(lines)


def _row(name: str, cells: Counter[str], ranks: int) -> str:
    whole = " | ".join(f"{cells[key] / ranks:,.0f}" for key in ("opened", "looked_up", "listed"))
    sizes = " | ".join(f"{cells[key] / ranks / 1e6:,.2f}" for key in ("read", "mapped"))
    return f"| {name} | {whole} | {sizes} |"


def _calls(folder: Path) -> Iterator[tuple[str, str, int]]:
    """(name, arguments, result) of every call of a rank's processes and threads."""
    for path in folder.glob("t.*"):
        for line in path.read_text(errors="replace").splitlines():
            call = LINE.match(line)
            if call:
                yield call[1], call[2], int(call[3], 0)


def _place(path: str, places: dict[str, str]) -> str:
    """The most exact place that a path lies in."""
    within = [place for place in places if path == place or path.startswith(place + "/")]
    return places[max(within, key=len)] if within else "system"


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


if __name__ == "__main__":
    main()
