#!/usr/bin/env bash
# Trains. Every argument goes to titan_distill.train:
#
#   ./run_train.sh                                            the small Wan of tests/assets, on any machine
#   ./run_train.sh --job.config_file train_configs/X.toml     another job
#   ./run_train.sh --training.steps 20 --metrics.wandb true   the same job, changed
#   ./run_train.sh --help                                     every key
#
# Environment: NGPU         processes to start (default: the visible GPUs; 1 where there are none)
#              LOG_RANK     ranks whose output is shown, comma-separated (default: 0)
#              CONFIG_FILE  the job when no --job.config_file is given
#              PYTHON       the interpreter (default: the active environment's)
#
# Exit codes: 0 done, 2 the input was wrong (one sentence says what), 3 ended by the doctor and saved, 75 asked to stop by
#             SIGTERM or SIGUSR1 and saved, 130 interrupted by Ctrl-C and not saved, anything else a failure.
set -euo pipefail

gpus_visible() {
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^-]' || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

has_option() { # NAME ARGUMENT...: whether --NAME VALUE, --NAME=VALUE or --NAME is among the arguments
    local name=$1 argument
    for argument in "${@:2}"; do
        [[ "$argument" == "--$name" || "$argument" == "--$name="* ]] && return 0
    done
    return 1
}

wrong() { # SENTENCE: what is wrong with the input
    echo "error: $1" >&2
    exit 2
}

export PYTHONUTF8=1 # names of files and output in UTF-8, whatever the locale
python=${PYTHON:-$(command -v python || command -v python3)}
num_gpus=$(gpus_visible)
num_processes=${NGPU:-$((num_gpus > 0 ? num_gpus : 1))}
[[ $num_processes =~ ^[1-9][0-9]{0,5}$ ]] ||
    wrong "NGPU = '$num_processes' is not a number of processes; set it to a positive integer, or unset it"
shown_ranks=${LOG_RANK:-0}
[[ $shown_ranks =~ ^[0-9]{1,6}(,[0-9]{1,6})*$ ]] ||
    wrong "LOG_RANK = '$shown_ranks' is not a list of ranks; set it to numbers with commas between them, such as 0,1"
for rank in ${shown_ranks//,/ }; do
    ((10#$rank < num_processes)) ||
        wrong "LOG_RANK = '$shown_ranks' names rank $rank, but the largest of $num_processes is $((num_processes - 1))"
done
arguments=("$@")
has_option job.config_file "$@" || arguments=(--job.config_file "${CONFIG_FILE:-train_configs/tiny_wan_dmd2.toml}" "$@")

# Without this every process would start a thread for each core, and they would fight for them.
num_cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((num_cores > num_processes ? num_cores / num_processes : 1))}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

if ((num_processes == 1)) || has_option help "$@"; then
    exec "$python" -m titan_distill.train "${arguments[@]}"
fi
if has_option job.dry_run "$@"; then # one process that plays the first of many
    WORLD_SIZE=$num_processes exec "$python" -m titan_distill.train "${arguments[@]}"
fi

# One process tells of wrong input before all of them start.
trap 'exit 75' TERM USR1 # once the check is done; from then on the launcher listens
WORLD_SIZE=$num_processes LOCAL_WORLD_SIZE=$num_processes "$python" -m titan_distill.train --check "${arguments[@]}" >/dev/null
exec "$python" -m titan_distill.launch --standalone --nproc-per-node "$num_processes" \
    --local-ranks-filter "$shown_ranks" --role rank --tee 3 \
    -m titan_distill.train "${arguments[@]}"
