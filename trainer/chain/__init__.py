"""The Slurm chain behind slurm/m2mkd_vmoe.sh: submit, plan, status, cancel. Runs on a login node, without torch."""
