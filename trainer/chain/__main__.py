"""The command behind slurm/m2mkd_vmoe.sh.

python -m trainer.chain [submit|plan|status|logs|wait|cancel] [--flags] [section.key=value ...]
"""

from __future__ import annotations

import os
import signal
import sys

from trainer.chain import settings as chain_settings
from trainer.chain import submit
from trainer.chain.cancel import cancel
from trainer.chain.following import logs, options, status, wait
from trainer.chain.slurm import SlurmError
from trainer.chain.together import Stopped, complain

EXIT_BAD_INPUT = 2
EXIT_SLURM = 3
FOLLOWING = {"status": status.show, "logs": logs.show, "wait": wait.show}


def main() -> int:
    """Run one command.

    Returns:
        0 done, 1 something failed or lives on, 2 bad settings or run folder, 3 Slurm refused or is absent, 128 + n by
        signal n; of status, logs and wait: trainer/chain/following/status.py, CODES.
    """
    command = ""
    try:
        view, arguments = options.take(sys.argv[1:])
        command, settings = chain_settings.read(arguments)
        if command in FOLLOWING:
            return FOLLOWING[command](settings, view)
        if command == "submit":
            return submit.submit(settings)
        if command == "cancel":
            return cancel(settings.run)
        from trainer.chain import plan

        return plan.show(settings)
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


if __name__ == "__main__":
    sys.exit(main())
