"""The command behind slurm/m2mkd_vmoe.sh.

python -m trainer.chain [submit|plan|status|cancel] [--flags] [section.key=value ...]
"""

from __future__ import annotations

import signal
import sys

from trainer.chain import settings as chain_settings
from trainer.chain import status, submit
from trainer.chain.cancel import cancel
from trainer.chain.slurm import SlurmError
from trainer.chain.together import Stopped, complain

EXIT_BAD_INPUT = 2
EXIT_SLURM = 3


def main() -> int:
    """Run one command.

    Returns:
        0 done, 1 something failed or lives on, 2 bad settings or run folder, 3 Slurm refused or is absent, 128 + n by
        signal n.
    """
    try:
        command, settings = chain_settings.read(sys.argv[1:])
        if command == "submit":
            return submit.submit(settings)
        if command == "cancel":
            return cancel(settings.run)
        if command == "status":
            return status.show(settings)
        from trainer.chain import plan

        return plan.show(settings)
    except SlurmError as error:
        complain(f"error: {error}")
        return EXIT_SLURM
    except Stopped as error:
        complain(f"error: {error}")
        return 128 + error.number
    except (ValueError, OSError) as error:
        complain(f"error: {error}")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        complain("error: stopped by Ctrl-C")
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
