#!/bin/bash
#SBATCH --job-name=m2mkd-chain
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=00:20:00
# The m2mKD chain for a NAC student: slurm/m2mkd_vmoe.sh, whose settings and commands are all valid here, with its recipe.
#
#   sbatch slurm/m2mkd_nac.sh
#   bash slurm/m2mkd_nac.sh plan|status|wait|cancel
#   RECIPE=recipes/nac_imagenet.yaml bash slurm/m2mkd_nac.sh

export RECIPE=${RECIPE:-recipes/nac_tiny_imagenet.yaml}
export DS_CONFIG=${DS_CONFIG:-ds_configs/node8_zero1.json}   # no experts to share
export OUT=${OUT:-runs/m2mkd_nac}

# sbatch runs a copy of this file from its spool folder; only SLURM_SUBMIT_DIR leads back
root=$(dirname "$(dirname "$(readlink -f "$0")")")
[[ -f $root/slurm/m2mkd_vmoe.sh ]] || root=${SLURM_SUBMIT_DIR:-$PWD}
if [[ ! -f $root/slurm/m2mkd_vmoe.sh ]]; then
    echo "error: no slurm/m2mkd_vmoe.sh below $root: start this from the top folder of the repository" >&2
    exit 2
fi
exec bash "$root/slurm/m2mkd_vmoe.sh" "$@"
