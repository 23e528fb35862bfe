# Functions of the chain driver and of the job body (slurm/phase.sbatch). Sourced, not run.

say() { printf '[%(%H:%M:%S)T %s] %s\n' -1 "${STAGE:-chain}${element:+ $element}" "$*"; }

# Compute nodes have no internet: what is wanted of the hub is in the caches.
offline() { export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1; }

# Sources ENV_FILE and makes sure that there is a python.
activate_environment() {
    if [[ -n ${ENV_FILE:-} ]]; then
        [[ $ENV_FILE == */* ]] || ENV_FILE=$PWD/$ENV_FILE # `source` would look for it on PATH
        [[ -r $ENV_FILE ]] || { echo "error: ENV_FILE $ENV_FILE cannot be read" >&2; return 2; }
        source_environment || return 2
    fi
    ((${HAS_CONTAINER:-0})) && return # there python is inside
    command -v "$PYTHON" >/dev/null && return
    echo "error: no $PYTHON on $(hostname): set PYTHON, or ENV_FILE to a file that activates the environment" >&2
    return 2
}

# Sources ENV_FILE. It fails when its last command did, unless that is a test: `[[ -d x ]] && module load x` is no failure.
source_environment() {
    local status last="" depth=${#BASH_SOURCE[@]}
    set -o functrace
    trap '((${#BASH_SOURCE[@]} == depth)) || last=$BASH_COMMAND' DEBUG # only the commands of the file
    # shellcheck disable=SC1090
    source "$ENV_FILE"
    status=$?
    trap - DEBUG
    set +o functrace
    set +eu # the file's, not ours
    ((status == 0)) && return
    case $last in
        '['* | '(('* | 'test '*) ((status == 1)) && return ;;
    esac
    echo "error: sourcing ENV_FILE $ENV_FILE failed with status $status at: $last" >&2
    return 2
}
