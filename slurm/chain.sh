#!/usr/bin/env bash
# The pipeline as dependent jobs: prepare, collect, calibrate, unlearn, convert, evaluate and report. Not for sbatch: run it
# on a login node. Each job starts when the one before it is done (afterok) and is cancelled if that one fails.
#
#   slurm/chain.sh CONFIG [ARGUMENTS...]
#   RUN_DIR=/shared/runs/books slurm/chain.sh books.yaml --set unlearning.steps=200
#
# Prints one line per job: its stages and its id. Stages of one process run on one node without GPUs, so that no GPU waits
# for them. Options for sbatch per kind of job: the site file (slurm/site.env). TRACE_DS_GPU_SBATCH (finetune, collect,
# unlearn, evaluate) and TRACE_DS_ALL_SBATCH come after those. What `trace-ds submit` sets: TRACE_DS_FINETUNE=1 puts a job
# before collect that fine-tunes; TRACE_DS_ONE_JOB=STAGES submits one job that runs all of them, in place of the chain;
# TRACE_DS_COMMANDS=FILE gets the command lines.
# With TRACE_DS_DRY_RUN=1 it prints the command lines and submits nothing.
set -euo pipefail

TRACE_DS_HOME=${TRACE_DS_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
export TRACE_DS_HOME
unset SLURM_SUBMIT_DIR # of an interactive job that this is called in
# shellcheck source=slurm/common.sh
source "$TRACE_DS_HOME/slurm/common.sh"
trace_ds_begin "$@"
export RUN_DIR=$run_dir MAX_RESTARTS

jobs=()
# All jobs are submitted, or none.
trap '((${#jobs[@]} == 0)) || [[ -n ${TRACE_DS_DRY_RUN:-} ]] || scancel "${jobs[@]}"' EXIT

# submit STAGES SCRIPT SBATCH_OPTIONS
submit() {
  local command words id line
  printf -v line 'RUN_DIR=%q' "$RUN_DIR"
  split_words "$3 ${TRACE_DS_ALL_SBATCH:-}"
  ((${#jobs[@]} == 0)) || words=("--dependency=afterok:${jobs[-1]}" --kill-on-invalid-dep=yes "${words[@]}")
  # squeue shows eight characters of a name
  [[ -n ${TRACE_DS_ONE_JOB:-} ]] || words=("--job-name=${1// /-}-$(basename "$run_dir")" "${words[@]}")
  command=(sbatch --parsable --export=ALL "${words[@]}" "$TRACE_DS_HOME/slurm/$2" "$config" "${arguments[@]}")
  if [[ -z ${TRACE_DS_ONE_JOB:-} ]]; then
    export TRACE_DS_STAGES=$1
    printf -v line 'TRACE_DS_STAGES=%q %s' "$1" "$line"
  fi
  line+=$(printf ' %q' "${command[@]}")
  if [[ -n ${TRACE_DS_DRY_RUN:-} ]]; then
    jobs+=("JOB$((${#jobs[@]} + 1))")
    printf '%s: %s\n' "$1" "$line"
    return
  fi
  id=$("${command[@]}")
  [[ -z ${TRACE_DS_COMMANDS:-} ]] || printf '%s\n' "$line" >>"$TRACE_DS_COMMANDS"
  jobs+=("${id%%;*}") # with several clusters: ID;CLUSTER
  check_time_limit "${jobs[-1]}"
  printf '%s: %s\n' "$1" "${jobs[-1]}"
}

# check_time_limit JOB: by default SLURM queues a job whose limit is beyond its partition's, which then never starts.
check_time_limit() {
  local job_limit partitions partition_limit longest=0
  read -r job_limit partitions < <(squeue --noheader --jobs="$1" --format='%l %P') || return 0
  while read -r partition_limit; do
    ((longest >= $(minutes "$partition_limit"))) || longest=$(minutes "$partition_limit")
  done < <(sinfo --noheader --partition="$partitions" --format=%l)
  ((longest == 0 || $(minutes "$job_limit") <= longest)) ||
    die "the time limit $job_limit is beyond that of partition $partitions: give a shorter one (--sbatch --time=…, or SBATCH_TIMELIMIT in the site file)"
}

# minutes [DAYS-][[HOURS:]MINUTES:]SECONDS
minutes() {
  [[ $1 =~ ^(([0-9]+)-)?(([0-9]+):)?([0-9]+):[0-9]+$ ]] || { echo $((1 << 40)); return; } # infinite, UNLIMITED
  echo $((10#0${BASH_REMATCH[2]} * 1440 + 10#0${BASH_REMATCH[4]} * 60 + 10#0${BASH_REMATCH[5]}))
}

gpus=${TRACE_DS_GPU_SBATCH:-}
if [[ -n ${TRACE_DS_ONE_JOB:-} ]]; then
  submit "$TRACE_DS_ONE_JOB" unlearn_mixtral.sh "$gpus"
else
  export TRACE_DS_CHAIN=1 # from here on a stop file in the run directory is meant for these jobs
  [[ -n ${TRACE_DS_DRY_RUN:-} ]] || rm -f "$run_dir/stop"
  submit prepare single_stage.sh "${TRACE_DS_CPU_SBATCH:-}"
  [[ -z ${TRACE_DS_FINETUNE:-} ]] || submit finetune unlearn_mixtral.sh "${TRACE_DS_UNLEARN_SBATCH:-} $gpus"
  submit collect collect_stats.sh "${TRACE_DS_COLLECT_SBATCH:-} $gpus"
  submit calibrate single_stage.sh "${TRACE_DS_CPU_SBATCH:-}"
  submit unlearn unlearn_mixtral.sh "${TRACE_DS_UNLEARN_SBATCH:-} $gpus"
  submit convert single_stage.sh "${TRACE_DS_CPU_SBATCH:-}"
  submit "evaluate report" unlearn_mixtral.sh "${TRACE_DS_EVALUATE_SBATCH:-} $gpus"
fi
trap - EXIT
