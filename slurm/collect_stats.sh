#!/usr/bin/env bash
# Routing statistics and the calibration made from them, without unlearning anything: prepare, collect, calibrate.
#
#   sbatch slurm/collect_stats.sh CONFIG [ARGUMENTS...]
#
# One forward pass over the corpora: one node is usually enough. CONFIG, arguments, variables and what the #SBATCH lines
# can and cannot say: see unlearn_mixtral.sh and common.sh.
#
#SBATCH --job-name=trace-ds-collect
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
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
run_stages prepare collect calibrate
