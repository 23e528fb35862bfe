"""One command of a driver: that of a chain (python -m trainer.chain) or of a study's jobs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence

from trainer.chain.cancel import cancel
from trainer.chain.following import logs, options, status, wait
from trainer.chain.settings import Settings
from trainer.chain.slurm import SlurmError
from trainer.chain.together import Stopped, complain

EXIT_BAD_INPUT = 2
EXIT_SLURM = 3
FOLLOWING = {"status": status.show, "logs": logs.show, "wait": wait.show}


def carry_out(
    arguments: Sequence[str],
    read: Callable[[Sequence[str]], tuple[str, Settings]],
    submit: Callable[[Settings], int],
    plan: Callable[[Settings], int],
) -> int:
    """Run one command.

    Args:
        arguments: of the command line.
        read: gives command and settings, as trainer/chain/settings.py:read.
        submit, plan: these two commands; the others are the same for whatever has a run folder with jobs.tsv.

    Returns:
        0 done, 1 something failed or lives on, 2 bad settings or run folder, 3 Slurm refused or is absent, 128 + n by
        signal n; of status, logs and wait: trainer/chain/following/status.py, CODES.
    """
    command = ""
    try:
        view, others = options.take(arguments)
        command, settings = read(others)
        if command in FOLLOWING:
            return FOLLOWING[command](settings, view)
        if command == "submit":
            return submit(settings)
        if command == "cancel":
            return cancel(settings.run)
        return plan(settings)
    except SlurmError as error:
        complain(f"error: {error}")
        return EXIT_SLURM
    except Stopped as error:
        complain(f"error: {error}")
        return 128 + error.number
    except BrokenPipeError:  # a reader such as head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # python flushes once more at its end
        return 0 if command in FOLLOWING else EXIT_BAD_INPUT
    except (ValueError, OSError) as error:
        complain(f"error: {error}")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        if command not in FOLLOWING:
            complain("error: stopped by Ctrl-C")
        return 128 + signal.SIGINT
