#!/usr/bin/env bash
# The whole pipeline as one job: prepare, finetune (where the config asks for it), collect, calibrate, unlearn, convert,
# evaluate, report.
#
#   sbatch slurm/unlearn_mixtral.sh CONFIG [ARGUMENTS...]
#   RUN_DIR=/shared/runs/books sbatch --nodes=4 slurm/unlearn_mixtral.sh books.yaml --ep 8 --set unlearning.steps=200
#
# CONFIG is a recipe name or a YAML file (or several: TASK MODEL); all further arguments go to every trace-ds verb. Submit from the repository, or
# set TRACE_DS_HOME to it. Works for any model of a config, not only Mixtral. Each stage skips what is done, so the
# same line can be submitted again at any time. Near the time limit finetune, collect and unlearn save what they have and the
# job goes back into the queue by itself (see common.sh for the variables and the exit statuses). Another stage that is then
# running has the 300 s to finish; if it does not, its work is lost and the job ends as TIMEOUT. slurm/chain.sh runs the same stages as
# separate jobs, so that no GPU waits while one process converts. With `--variants all` (or NAME,NAME) the config's variants run too, stage by stage.
#
# Stop now, go on later by itself: scancel --batch --signal=USR1 JOBID. Stop for good: touch RUN_DIR/stop. Both save first.
# PreemptParameters=send_user_signal in the cluster's slurm.conf makes a preemption do the former.
#
# #SBATCH lines are comments to the shell: they cannot read variables. What belongs to your site (account, partition)
# therefore comes from SBATCH_ACCOUNT, SBATCH_PARTITION, ... in the environment (`source slurm/site.env` before sbatch;
# trace-ds submit and chain.sh do so) or from sbatch's command line. Order of precedence: command line, environment, the lines below.
#
#SBATCH --job-name=trace-ds-unlearn
#SBATCH --nodes=2
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
  echo "trace_ds: $TRACE_DS_HOME is not the repository: submit from there or set TRACE_DS_HOME" >&2
  exit 2
fi
# shellcheck source=slurm/common.sh
source "$TRACE_DS_HOME/slurm/common.sh"

trace_ds_begin "$@"
run_stages prepare finetune collect calibrate unlearn convert evaluate report
