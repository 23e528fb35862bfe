"""The background half of a save: a copy of the training state in host memory, and the thread that writes it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.files import Layout, text_of, write_file, write_tensors
from trainer.distributed.ranks import Dist

FIRST_POLL = 0.005  # seconds between two looks for the other ranks' files, at first; twice as long each time
LONGEST_POLL = 1.0  # seconds
VISIBLE = 90.0  # seconds until what one node has written is seen by another: NFS remembers a folder for up to 60
ADVICE = "The previous checkpoint is untouched; free some space and start the same command again"


def names_of(rank: int) -> tuple[str, str]:
    """Names of the two files of a rank: its shard, and what it wants back."""
    return f"rank_{rank:05d}.safetensors", f"rank_{rank:05d}.json"


class Staging:
    """Host memory the state is copied to; pinned beside a GPU, and the same for every save."""

    def __init__(self, device: torch.device):
        self.device = device
        self.buffer = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def fill(self, tensors: Sequence[Tensor], layout: Layout) -> Tensor:
        """Copy the tensors to where `layout` puts them; returns the bytes. Training may go on when this returns."""
        cuda = self.device.type == "cuda"
        if len(self.buffer) != layout.data_bytes:
            self.buffer = torch.empty(layout.data_bytes, dtype=torch.uint8, pin_memory=cuda)
        for tensor, (begin, end) in zip(tensors, layout.places):
            self.buffer[begin:end].view(tensor.dtype).copy_(tensor.reshape(-1), non_blocking=True)
        if cuda:
            torch.cuda.synchronize(self.device)
        return self.buffer


class Writing(threading.Thread):
    """One save: writes this rank's files; on rank 0 also waits for those of all ranks and then calls `commit`.

    Args:
        folder: of the checkpoint; it exists.
        layout: of this rank's shard.
        data: the bytes behind its header; must not change until `on_disk` is set.
        own: JSON values of this rank.
        needed: bytes of the whole checkpoint, for messages.
        commit: puts the checkpoint in force.

    Attributes:
        on_disk: set when this rank's files are written and flushed, or have failed.
        error: what went wrong, None as long as nothing has.
    """

    def __init__(
        self,
        folder: Path,
        dist: Dist,
        layout: Layout,
        data: Tensor,
        own: dict[str, Any],
        needed: int,
        commit: Callable[[], None],
    ):
        # a daemon: the end of a rank that has failed must not wait for it
        super().__init__(name="checkpoint", daemon=True)
        self.folder = folder
        self.dist = dist
        self.layout = layout
        self.data = data
        self.own = own
        self.needed = needed
        self.commit = commit
        self.on_disk = threading.Event()
        self.error: Exception | None = None
        self._met = threading.Event()  # every rank's on_disk is set
        self._abandoned = False  # one of them has failed

    def all_have_written(self, failed: bool) -> None:
        """Tell the thread that every rank's `on_disk` is set, and whether one of them has failed."""
        self._abandoned = failed
        self._met.set()

    def run(self) -> None:
        self._try(self._write)
        self.on_disk.set()
        if self.dist.main and self.error is None:
            self._try(self._finish)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            free = shutil.disk_usage(self.folder.parent).free
            self.error = OSError(
                f"cannot write checkpoint {self.folder}: {error.strerror or error}; {self.needed:,} bytes needed, "
                f"{free:,} free. {ADVICE}"
            )
        except Exception as error:  # raised again by the training thread, on all ranks
            self.error = error

    def _write(self) -> None:
        shard, own = names_of(self.dist.rank)
        record = write_tensors(self.folder / shard, self.layout, [self.data])
        write_file(self.folder / own, text_of({"own": self.own, "shard": record}))  # last: says that both are there

    def _finish(self) -> None:
        """Rank 0: commit when the files of all ranks are there, or give up."""
        expected = {names_of(rank)[1] for rank in range(self.dist.world)}
        pause = FIRST_POLL
        patience = VISIBLE
        while missing := expected - set(os.listdir(self.folder)):
            if self._met.is_set():
                if self._abandoned:
                    return
                if patience <= 0:
                    raise OSError(f"{min(missing)} was written but is not here: all ranks need the same folder")
                time.sleep(pause)
                patience -= pause
            else:
                self._met.wait(pause)
            pause = min(2 * pause, LONGEST_POLL)
        self.commit()
