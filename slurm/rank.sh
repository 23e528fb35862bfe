#!/bin/bash
# Runs one rank of a phase and notes how it ended.
#   rank.sh CODES COMMAND...      a line in CODES for a rank that does not end with 0: exit code, rank, node; the first one first

# Until python listens, a warning would end it.
trap "" USR1 TERM
codes=$1
shift
echo "== rank $SLURM_PROCID on $SLURMD_NODENAME, job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, step $SLURM_STEP_ID"
"$@"
code=$?
((code)) && echo "$code $SLURM_PROCID $SLURMD_NODENAME" >>"$codes"
# An interrupted rank must not look bad to srun, which would kill the others on their way out.
((code == 75)) && exit 0
exit "$code"
