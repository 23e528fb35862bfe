"""The Slurm chain behind slurm/m2mkd_vmoe.sh: submit, plan, follow, cancel. Runs on a login node, without torch."""
