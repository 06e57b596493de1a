#!/usr/bin/env bash
# Stages of one process each, on one node: prepare, calibrate, convert, report; evaluate too, where one process holds a model.
#
#   TRACE_DS_STAGES="convert" sbatch slurm/single_stage.sh CONFIG [ARGUMENTS...]
#
# Asks for no GPU; `sbatch --gpus-per-node=1 ...` gives it one (evaluate). CONFIG, arguments, variables and what the
# #SBATCH lines can and cannot say: see unlearn_mixtral.sh and common.sh.
#
#SBATCH --job-name=trace-ds-stage
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# SLURM runs a copy of this file from its spool directory: $0 does not lead to the repository.
export TRACE_DS_HOME=${TRACE_DS_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
if [[ ! -r $TRACE_DS_HOME/slurm/common.sh ]]; then
  echo "trace_ds: $TRACE_DS_HOME is not the repository: submit from there or set TRACE_DS_HOME" >&2
  exit 2
fi
# shellcheck source=slurm/common.sh
source "$TRACE_DS_HOME/slurm/common.sh"

trace_ds_begin "$@"
[[ -n ${TRACE_DS_STAGES:-} ]] || die 'set TRACE_DS_STAGES to the verbs to run, e.g. TRACE_DS_STAGES="evaluate report"'
run_stages "$TRACE_DS_STAGES"
