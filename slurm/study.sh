#!/bin/bash
#SBATCH --job-name=m2mkd-study
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=00:20:00
# A study (docs/studies.md) as jobs: a cell, that is a variant with a seed, is a job, what cells share is made once and
# first, and a last job writes the tables. Settings and commands are those of slurm/m2mkd_vmoe.sh, but for recipe and phase.
#
#   bash slurm/study.sh recipes/study_ablation.yaml plan      number of jobs, arrays and waves, what the cluster says
#   bash slurm/study.sh recipes/study_ablation.yaml           submits what is missing
#   bash slurm/study.sh recipes/study_ablation.yaml status|wait|cancel
#   bash slurm/study.sh recipes/study_ablation.yaml logs m2mkd/seed0 -f
#   bash slurm/study.sh recipes/study_ablation.yaml --only 'm2mkd*' --gpus-per-node 0 --tasks-per-node 1 train.epochs=2

if [[ ${1:-} != *.yaml && ${1:-} != *.yml ]]; then
    echo "error: no study named: bash slurm/study.sh recipes/study_ablation.yaml [plan|status|logs|wait|cancel] ..." >&2
    exit 2
fi
export RECIPE=$1
export OUT=${OUT:-runs/$(basename "${1%.*}")}
export DS_CONFIG=${DS_CONFIG:-study}          # the one that the study names
export GPUS_PER_NODE=${GPUS_PER_NODE:-1}      # of a cell's job
export M2MKD_DRIVER=trainer.study.jobs
shift

# sbatch runs a copy of this file from its spool folder; only SLURM_SUBMIT_DIR leads back
root=$(dirname "$(dirname "$(readlink -f "$0")")")
[[ -f $root/slurm/m2mkd_vmoe.sh ]] || root=${SLURM_SUBMIT_DIR:-$PWD}
if [[ ! -f $root/slurm/m2mkd_vmoe.sh ]]; then
    echo "error: no slurm/m2mkd_vmoe.sh below $root: start this from the top folder of the repository" >&2
    exit 2
fi
exec bash "$root/slurm/m2mkd_vmoe.sh" "$@"
