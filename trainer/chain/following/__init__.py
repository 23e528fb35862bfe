"""Where a submitted chain is: status, logs and wait look at one snapshot of Slurm and of the run folder."""
