"""The command behind slurm/m2mkd_vmoe.sh.

python -m trainer.chain [submit|plan|status|cancel] [--flags] [section.key=value ...]
"""

from __future__ import annotations

import sys

from trainer.chain import settings as chain_settings
from trainer.chain import status, submit
from trainer.chain.slurm import SlurmError

EXIT_BAD_INPUT = 2
EXIT_SLURM = 3


def main() -> int:
    """Run one command: 0 done, 2 something in the settings or the run folder, 3 Slurm refused or is not there."""
    try:
        command, settings = chain_settings.read(sys.argv[1:])
        if command == "submit":
            return submit.submit(settings)
        if command == "cancel":
            return submit.cancel(settings.run)
        if command == "status":
            return status.show(settings)
        from trainer.chain import plan

        return plan.show(settings)
    except SlurmError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_SLURM
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("error: stopped half-way; nothing of this submission is left", file=sys.stderr)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
