#!/bin/bash
#SBATCH --job-name=m2mkd-chain
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=00:20:00
# The m2mKD chain on Slurm: (download ->) (teacher or probe ->) meta -> one distillation job per module -> train -> evaluate.
# With LEVEL=expert one job per expert of each module before that; what else a recipe asks for is in docs/slurm.md.
#
#   sbatch slurm/m2mkd_vmoe.sh                    a small driver job submits the chain (start it in the repository)
#   bash slurm/m2mkd_vmoe.sh                      the same from the login node
#   bash slurm/m2mkd_vmoe.sh plan|status|wait|cancel
#   bash slurm/m2mkd_vmoe.sh logs distill_1 -f
#   NODES=4 bash slurm/m2mkd_vmoe.sh --partition gpu train.epochs=50
#   SBATCH_ACCOUNT=mine sbatch slurm/m2mkd_vmoe.sh    where a job needs an account: ACCOUNT below is not the driver job's
#   RECIPE=recipes/own_images.yaml DS_CONFIG=ds_configs/one_machine.json bash slurm/m2mkd_vmoe.sh --gpus-per-node 1 \
#       data.path=PICTURES teacher.source=HUB_ID
#
# Submitting again submits what is missing. docs/slurm.md: first run on a new cluster, and what each message means.

# ---- settings: edit here, or give them by environment (NODES=4 ...) or flag (--nodes 4); --help explains each ----
set -a
RECIPE=${RECIPE:-recipes/vmoe_base_imagenet.yaml}
DS_CONFIG=${DS_CONFIG:-ds_configs/node8_zero1_ep8.json}
OUT=${OUT:-runs/m2mkd_vmoe}     # on a file system that all nodes share
# nodes to cpus, time and the rows below take values per stage: 4,distill=1,evaluate=1 or gpu,distill=a100
NODES=${NODES:-1}               # per job
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
GPU_TYPE=${GPU_TYPE:-}          # a100 for --gres=gpu:a100:8
GPU_REQUEST=${GPU_REQUEST:-gres}   # or gpus-per-node, gpus-per-task
TASKS_PER_NODE=${TASKS_PER_NODE:-}   # ranks per node, only without GPUs
CPUS_PER_TASK=${CPUS_PER_TASK:-8}
MEM=${MEM:-}
TIME=${TIME:-24:00:00}          # per job
PARTITION=${PARTITION:-}
QOS=${QOS:-}
CONSTRAINT=${CONSTRAINT:-}
RESERVATION=${RESERVATION:-}
DOWNLOAD_PARTITION=${DOWNLOAD_PARTITION:-}   # CPU partition with internet, for a teacher or data from the hub
DOWNLOAD_ARGS=${DOWNLOAD_ARGS:-}   # more sbatch flags of download and push, which SBATCH_ARGS is not for
ACCOUNT=${ACCOUNT:-}
AFTER=${AFTER:-}                # ids of other jobs, 12:13, that must end well first
EXCLUDE=${EXCLUDE:-}
MAIL=${MAIL:-}
HOOK=${HOOK:-}                  # shell command at done, failed, requeued: "$1" result, "$2" event, "$3" text
ENV_FILE=${ENV_FILE:-}          # sourced before python starts: module load ..., source venv/bin/activate
PYTHON=${PYTHON:-python}
CONTAINER=${CONTAINER:-}        # image that the ranks run in
CONTAINER_RUNTIME=${CONTAINER_RUNTIME:-pyxis}   # or apptainer, singularity
CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-}   # /data:/data
SRUN_ARGS=${SRUN_ARGS:-}
SBATCH_ARGS=${SBATCH_ARGS:-}
GPU_KIND=${GPU_KIND:-}          # plan: h200, h100, ... for memory, traffic and time of every phase
ELEMENTS_PER_JOB=${ELEMENTS_PER_JOB:-1}   # of an array, one after another in one job, per stage: 1,expert=8
ARRAY_THROTTLE=${ARRAY_THROTTLE:-0}   # jobs of one array (modules, experts) running at once; 0 = all
ACCEPT=${ACCEPT:-}              # go on with what is refused: across, down, mixed (docs/slurm.md)
LEVEL=${LEVEL:-}                # module or expert; empty = distill.level of the recipe
set +a
# ---- end of settings ----

# sbatch runs a copy of this file from its spool folder; only SLURM_SUBMIT_DIR leads back
root=$(dirname "$(dirname "$(readlink -f "$0")")")
[[ -f $root/slurm/common.sh ]] || root=${SLURM_SUBMIT_DIR:-$PWD}
if [[ ! -f $root/slurm/common.sh ]]; then
    echo "error: no slurm/common.sh below $root: start this from the top folder of the repository" >&2
    exit 2
fi
# which python reads the flags is itself a flag
for ((i = 1; i <= $#; i++)); do
    after=$((i + 1))
    case ${!i} in
        --env-file=*) ENV_FILE=${!i#*=} ;;
        --python=*) PYTHON=${!i#*=} ;;
        --env-file) ENV_FILE=${!after:-} ;;
        --python) PYTHON=${!after:-} ;;
    esac
done
source "$root/slurm/common.sh"
activate_environment || exit 2
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$PYTHON" -m "${M2MKD_DRIVER:-trainer.chain}" "$@"
