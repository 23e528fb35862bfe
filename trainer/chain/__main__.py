"""The command behind slurm/m2mkd_vmoe.sh.

python -m trainer.chain [submit|plan|status|logs|wait|cancel] [--flags] [section.key=value ...]
"""

from __future__ import annotations

import sys

from trainer.chain import commands, submit
from trainer.chain import settings as chain_settings
from trainer.chain.settings import Settings


def main() -> int:
    """Run one command; the exit code is that of trainer/chain/commands.py."""
    return commands.carry_out(sys.argv[1:], chain_settings.read, submit.submit, _plan)


def _plan(settings: Settings) -> int:
    from trainer.chain import plan

    return plan.show(settings)


if __name__ == "__main__":
    sys.exit(main())
