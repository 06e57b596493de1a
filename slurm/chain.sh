#!/usr/bin/env bash
# The pipeline as dependent jobs: prepare, collect, calibrate, unlearn, convert, evaluate and report. Not for sbatch: run it
# on a login node. Each job starts when the one before it is done (afterok) and is cancelled if that one fails.
#
#   slurm/chain.sh CONFIG [ARGUMENTS...]
#   RUN_DIR=/shared/runs/books slurm/chain.sh books.yaml --set unlearning.steps=200
#
# Prints one line per job: its stages and its id. Stages of one process run on one node without GPUs, so that no GPU waits
# for them; evaluate asks for two, what Mixtral-8x7B needs in bf16 (trace-ds submit asks for what the model needs). Options
# for sbatch per kind of job: slurm/site.env. TRACE_DS_ALL_SBATCH and TRACE_DS_GPU_SBATCH (collect and unlearn) come after
# those. TRACE_DS_FINETUNE=1 puts a job before collect that fine-tunes (trace-ds submit sets it where the config asks for
# it). With TRACE_DS_DRY_RUN=1 it prints the command lines and submits nothing.
set -euo pipefail

TRACE_DS_HOME=${TRACE_DS_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
export TRACE_DS_HOME
# shellcheck source=slurm/common.sh
source "$TRACE_DS_HOME/slurm/common.sh"
trace_ds_begin "$@"
export RUN_DIR=$run_dir MAX_RESTARTS
export TRACE_DS_CHAIN=1 # from here on a stop file in the run directory is meant for these jobs
[[ -n ${TRACE_DS_DRY_RUN:-} ]] || rm -f "$run_dir/stop"

jobs=()
# A chain is submitted whole or not at all.
trap '((${#jobs[@]} == 0)) || [[ -n ${TRACE_DS_DRY_RUN:-} ]] || scancel "${jobs[@]}"' EXIT

# submit STAGES SCRIPT SBATCH_OPTIONS
submit() {
  local command options id
  read -ra options <<<"$3 ${TRACE_DS_ALL_SBATCH:-}"
  ((${#jobs[@]} == 0)) || options=("--dependency=afterok:${jobs[-1]}" --kill-on-invalid-dep=yes "${options[@]}")
  # squeue shows eight characters of a name
  command=(sbatch --parsable --export=ALL --job-name="${1// /-}-$(basename "$run_dir")" "${options[@]}"
    "$TRACE_DS_HOME/slurm/$2" "$config" "${arguments[@]}")
  if [[ -n ${TRACE_DS_DRY_RUN:-} ]]; then
    jobs+=("JOB$((${#jobs[@]} + 1))")
    printf '%s: TRACE_DS_STAGES=%q RUN_DIR=%q%s\n' "$1" "$1" "$RUN_DIR" "$(printf ' %q' "${command[@]}")"
    return
  fi
  id=$(TRACE_DS_STAGES=$1 "${command[@]}")
  jobs+=("${id%%;*}") # with several clusters: ID;CLUSTER
  printf '%s: %s\n' "$1" "${jobs[-1]}"
}

submit prepare single_stage.sh "${TRACE_DS_CPU_SBATCH:-}"
[[ -z ${TRACE_DS_FINETUNE:-} ]] ||
  submit finetune unlearn_mixtral.sh "${TRACE_DS_UNLEARN_SBATCH:-} ${TRACE_DS_GPU_SBATCH:-}"
submit collect collect_stats.sh "${TRACE_DS_COLLECT_SBATCH:-} ${TRACE_DS_GPU_SBATCH:-}"
submit calibrate single_stage.sh "${TRACE_DS_CPU_SBATCH:-}"
submit unlearn unlearn_mixtral.sh "${TRACE_DS_UNLEARN_SBATCH:-} ${TRACE_DS_GPU_SBATCH:-}"
submit convert single_stage.sh "${TRACE_DS_CPU_SBATCH:-}"
submit "evaluate report" single_stage.sh "${TRACE_DS_EVALUATE_SBATCH:---gpus-per-node=2}"
trap - EXIT
