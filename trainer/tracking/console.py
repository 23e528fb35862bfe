"""What a process of the trainer writes to its terminal or log: its own lines, and little of what the libraries say."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from trainer.config.load import one_line
from trainer.config.redaction import redact


def quieten() -> None:
    """Keep what is not about this run out of its log; before the heavy imports."""
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)  # DeepSpeed's
    if not sys.stderr.isatty():  # bars drawn into files
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def set_up_logging(main: bool) -> None:
    """Log lines of rank 0, errors alone of the others; of the libraries warnings and errors alone."""
    logging.basicConfig(level=logging.INFO if main else logging.ERROR, format="%(levelname)s %(message)s", force=True)
    for name in ("DeepSpeed", "deepspeed", "httpx", "httpx2", "huggingface_hub", "transformers", "timm"):
        logging.getLogger(name).setLevel(logging.WARNING if main else logging.ERROR)


def say_error(error: BaseException, prefix: str = "") -> None:
    """What an error says, as a line of standard error without secrets."""
    print(f"{prefix}error: {redact(one_line(error))}", file=sys.stderr, flush=True)


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """Left-aligned columns; the last one as long as it wants."""
    rows = [head, *lines]
    widths = [max(map(len, column)) for column in zip(*rows)]
    widths[-1] = 0
    texts = []
    for row in rows:
        cells = map(str.ljust, row, widths)
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)
