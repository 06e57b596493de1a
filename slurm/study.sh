#!/usr/bin/env bash
# A job of a study (trace-ds bench), as a task of an array: submitted by `trace-ds submit RECIPE --study`, which says with
# TRACE_DS_PHASE and TRACE_DS_FIRST what the numbers of the tasks mean. What it runs is an ordinary job in a run directory
# of its own: signals, requeueing and statuses are those of common.sh.
#
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# SLURM runs a copy of this file from its spool directory: $0 does not lead to the repository.
export TRACE_DS_HOME=${TRACE_DS_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
if [[ ! -r $TRACE_DS_HOME/slurm/common.sh ]]; then
  echo "trace_ds: $TRACE_DS_HOME is not the repository: submit with trace-ds submit RECIPE --study" >&2
  exit 2
fi
# shellcheck source=slurm/common.sh
source "$TRACE_DS_HOME/slurm/common.sh"

[[ -n ${TRACE_DS_PHASE:-} ]] || die "TRACE_DS_PHASE is not set: submit with trace-ds submit RECIPE --study"
trace_ds_begin "$@"
run_study_task
