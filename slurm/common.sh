#!/usr/bin/env bash
# Common parts of the SLURM scripts in this folder; sourced, never submitted.
#
# What a job script does: source this file, call `trace_ds_begin "$@"`, call `run_stages VERB...`.
#
#   trace_ds_begin CONFIG [ARGUMENTS...]   reads slurm/site.env, settles run directory and command
#   run_stages VERB...                     runs the verbs in order, stops and requeues on USR1
#
# Exit status of a job: 0 all verbs done; 2 the input is wrong (never requeued); 75 stopped on request with a complete
# checkpoint and not requeued: submit the same line again to go on; anything else is the failing verb's own status.
#
# Variables (set them in slurm/site.env, or in front of sbatch):
#   RUN_DIR             run directory on shared storage; default runs/NAME (NAME: the config's key `name`)
#   MAX_RESTARTS        how often a job may have been restarted before it stops requeueing itself; default 20
#   TRACE_DS_HOME       this repository; default: the folder sbatch was called in
#   TRACE_DS_STAGES     verbs to run instead of the script's own list, e.g. "unlearn convert"
#   TRACE_DS_SITE       the site file; default TRACE_DS_HOME/slurm/site.env
# and those explained in slurm/site.env.example. Needs bash 4.4 or newer.

set -euo pipefail

# sbatch passes its caller's environment on. Called from inside a step (an interactive `srun --pty bash`) or a launcher,
# that environment would make every process here take itself for a rank of that other job.
unset SLURM_STEP_ID SLURM_STEPID SLURM_STEP_NUM_TASKS RANK WORLD_SIZE LOCAL_RANK OMPI_COMM_WORLD_SIZE PMI_SIZE

export PYTHONUNBUFFERED=1 # or the log lags behind

# SLURM sends USR1 to the batch shell alone (`--signal=B:USR1@300`: five minutes before the time limit). To stop early and
# go on later: `scancel --batch --signal=USR1 JOBID`. Installed first of all: USR1 kills a shell that does not expect it.
stop_requested=0
interrupted=0
trap on_usr1 USR1

on_usr1() {
  stop_requested=1
  interrupted=1
  # Before run_dir is known nothing runs that could be stopped.
  if [[ -n ${run_dir:-} ]]; then
    mkdir -p "$run_dir"
    : >"$run_dir/stop"
    say "USR1: asked the running stage to save and stop ($run_dir/stop)"
  fi
}

say() { printf 'trace_ds: %(%F %T)T %s\n' -1 "$*"; }

# die MESSAGE: the user's input is wrong.
die() {
  printf 'trace_ds: %s\n' "$*" >&2
  exit 2
}

trace_ds_begin() {
  [[ $# -ge 1 && $1 != -* ]] || die "the first argument must be the config: a recipe name or a YAML file"
  config=$1
  arguments=("${@:2}")
  read_site
  sort_arguments
  [[ ${MAX_RESTARTS:=20} =~ ^[0-9]+$ ]] || die "MAX_RESTARTS=$MAX_RESTARTS is not a number"
}

read_site() {
  local site=${TRACE_DS_SITE:-$TRACE_DS_HOME/slurm/site.env}
  if [[ -e $site ]]; then
    # shellcheck source=slurm/site.env.example
    source "$site"
  elif [[ -n ${TRACE_DS_SITE:-} ]]; then
    die "TRACE_DS_SITE=$site: no such file"
  fi
}

# Sorts the arguments: --run-dir is taken out and settles `run_dir` (absolute; else RUN_DIR, else runs/NAME); --ep and
# --nproc, which only the distributed verbs know, become the --set that means the same to every verb.
sort_arguments() {
  local sorted=() value=${RUN_DIR:-} option
  while ((${#arguments[@]})); do
    option=${arguments[0]}
    arguments=("${arguments[@]:1}")
    case $option in
      --run-dir=* | --ep=* | --nproc=*) arguments=("${option#*=}" "${arguments[@]}") ;;
      --run-dir | --ep | --nproc) ((${#arguments[@]})) || die "$option needs a value" ;;
      *)
        sorted+=("$option")
        continue
        ;;
    esac
    case $option in
      --run-dir*) value=${arguments[0]} ;;
      --ep*) sorted+=(--set "distributed.ep=${arguments[0]}") ;;
      --nproc*) sorted+=(--set "distributed.nproc=${arguments[0]}") ;;
    esac
    arguments=("${arguments[@]:1}")
  done
  arguments=("${sorted[@]}")
  [[ -n $value ]] || value=runs/$(config_name)
  [[ $value == /* ]] || value=$PWD/$value
  run_dir=$value
}

# The config's top-level key `name`, or its file name.
config_name() {
  local file=$config name=
  [[ -f $file ]] || file=$TRACE_DS_HOME/trace_ds/recipes/$config.yaml
  [[ ! -f $file ]] || name=$(sed -n "s/^name:[[:space:]]*[\"']\{0,1\}\([A-Za-z0-9._-]*\).*/\1/p" "$file")
  [[ -n $name ]] || name=$(basename "${config%.y*ml}")
  printf '%s\n' "$name"
}

# Makes `trace_ds`, the command as an array: modules, virtual environment, container.
prepare_command() {
  if [[ -n ${TRACE_DS_MODULES:-} ]]; then
    # `module` is a shell function of the site and is not written for `set -u`.
    set +u
    # shellcheck disable=SC2086  # a list of module names
    module load $TRACE_DS_MODULES
    set -u
  fi
  [[ -z ${TRACE_DS_VENV:-} ]] || export PATH=$TRACE_DS_VENV/bin:$PATH
  read -ra trace_ds <<<"${TRACE_DS_COMMAND:-trace-ds}"
  if [[ -n ${TRACE_DS_CONTAINER:-} ]]; then
    local runtime
    runtime=$(command -v apptainer || command -v singularity) ||
      die "TRACE_DS_CONTAINER is set, but neither apptainer nor singularity is on PATH on $HOSTNAME"
    mkdir -p "$run_dir" # a path must exist before it can be bound
    trace_ds=("$runtime" exec --nv --bind "$TRACE_DS_HOME" --bind "$PWD" --bind "$run_dir"
      "$TRACE_DS_CONTAINER" "${trace_ds[@]}")
  fi
  command -v "${trace_ds[0]}" >/dev/null ||
    die "no command ${trace_ds[0]} on $HOSTNAME: set TRACE_DS_VENV in slurm/site.env (see slurm/site.env.example)"
}

# Where rank 0 listens. The first node's NodeAddr, because that is how SLURM itself reaches it (node names need not
# resolve), and a port outside Linux's ephemeral range that differs between jobs.
settle_master() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
  master_addr=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  [[ -n $master_addr ]] || die "SLURM names no address of node '$first' of job $SLURM_JOB_ID"
  master_port=$((10000 + SLURM_JOB_ID % 20000))
}

# Runs a command in the background and waits for it, so that a trap runs at once and not after the command. Returns the
# command's own status: `wait` returns early when a trap ran, and then the command is waited for again.
run_interruptibly() {
  local status=0
  "$@" &
  local pid=$!
  while :; do
    interrupted=0
    status=0
    wait "$pid" || status=$?
    ((interrupted)) || return "$status"
  done
}

# collect and unlearn: one task per GPU on all nodes.
# --export=ALL: after `sbatch --export=NONE`, which some sites make the default, srun would pass nothing on either.
# --cpus-per-task: srun does not take it over from sbatch (SLURM >= 22.05).
# --kill-on-bad-exit=0: many clusters kill the step when one rank's status is not 0, which would turn the orderly 75 of all
#   ranks into 137. --wait instead bounds how long the others may hang after the first rank has gone.
# No --gpus-per-task: it would hide a node's other GPUs from each task; ranks choose theirs by SLURM_LOCALID.
run_on_all_ranks() {
  settle_master
  run_interruptibly env MASTER_ADDR="$master_addr" MASTER_PORT="$master_port" \
    srun --export=ALL --label --kill-on-bad-exit=0 --wait="${TRACE_DS_WAIT_S:-300}" \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@"
}

run_stage() {
  local verb=$1
  local command=("${trace_ds[@]}" "$verb" "$config" --run-dir "$run_dir" "${arguments[@]}")
  case $verb in
    collect | unlearn) run_on_all_ranks "${command[@]}" ;;
    *) run_interruptibly "${command[@]}" ;;
  esac
}

run_stages() {
  local verb status stages
  read -ra stages <<<"${TRACE_DS_STAGES:-$*}"
  prepare_command
  rm -f "$run_dir/stop" # left by an earlier job: it must not stop this one
  say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0} of at most $MAX_RESTARTS, $run_dir"
  for verb in "${stages[@]}"; do
    ((!stop_requested)) || requeue "before $verb"
    say "$verb"
    status=0
    run_stage "$verb" || status=$?
    say "$verb: exit status $status"
    if ((status == 75)); then
      # Without our signal somebody else asked for the stop (touched the file by hand) and wants it to stay stopped.
      ((stop_requested)) && requeue "during $verb"
      say "stopped on request; submit the same line again to go on"
    fi
    ((status == 0)) || finish "$status"
  done
  finish 0
}

# requeue WHEN: back into the queue under the same job id, unless that has happened too often; never returns.
requeue() {
  if ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
    say "stopped $1 and not requeued: MAX_RESTARTS=$MAX_RESTARTS reached; submit the same line again to go on"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    say "stopped $1 and requeued"
  else
    say "stopped $1; SLURM refused to requeue the job; submit the same line again to go on"
  fi
  finish 75
}

finish() {
  ((!stop_requested)) || rm -f "$run_dir/stop"
  exit "$1"
}
