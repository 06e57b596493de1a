#!/usr/bin/env bash
# Common parts of the SLURM scripts in this folder; sourced, never submitted.
#
# What a job script does: source this file, call `trace_ds_begin "$@"`, call `run_stages VERB...`.
#
#   trace_ds_begin CONFIG [ARGUMENTS...]   reads the site file, settles run directory and command
#   run_stages VERB...                     runs the verbs in order, stops and requeues on USR1
#
# Exit status of a job: 0 all verbs done; 2 the input is wrong (never requeued); 75 stopped on request with a complete
# checkpoint and not requeued: submit the same line again to go on; anything else is the failing verb's own status.
#
# Variables (set them in the site file, or in front of sbatch):
#   RUN_DIR             run directory on shared storage; default runs/NAME (NAME: the config's key `name`)
#   MAX_RESTARTS        how often a job may have been restarted before it stops requeueing itself; default 20
#   TRACE_DS_HOME       this repository; default: the folder sbatch was called in
#   TRACE_DS_STAGES     verbs to run instead of the script's own list, e.g. "unlearn convert"
#   TRACE_DS_VARIANTS   names of the config's `variants` to run beside it, or all; default: none (as --variants)
#   TRACE_DS_NODE_WAIT_S  how long a failed job waits for SLURM to miss a node before the failure is its own; default 300
#   TRACE_DS_SITE_ENV   the site file (empty: none); default slurm/site.env of the folder sbatch was called in, else
#                       ~/.config/trace_ds/site.env
# and those explained in slurm/site.env.example. Needs bash 4.4 or newer.
#
# Job arrays, with every script:
#   sbatch --array=0-4 SCRIPT CONFIG       over seeds: task N runs `--set seed=N` in RUN_DIR-seedN
#   sbatch --array=1-3 SCRIPT LIST.txt     over recipes: task N runs line N of the file, "CONFIG [ARGUMENTS...]" (words
#                                          split at blanks), in RUN_DIR-N (default runs/NAME-N)

set -euo pipefail

# sbatch passes its caller's environment on. Called from inside a step (an interactive `srun --pty bash`) or a launcher,
# that environment would make every process here take itself for a rank of that other job.
unset SLURM_STEP_ID SLURM_STEPID SLURM_STEP_NUM_TASKS RANK WORLD_SIZE LOCAL_RANK OMPI_COMM_WORLD_SIZE PMI_SIZE

export PYTHONUNBUFFERED=1 # or the log lags behind
# glibc gives freed memory back: loading peaks at 1.1 instead of 1.6 times a rank's share (docs/plan.md).
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-65536}"

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
    echo "USR1 to job ${SLURM_JOB_ID:-}" >"$run_dir/stop" # a person's, made by touch, is empty
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
  [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || pick_array_task
  sort_arguments
  [[ ${MAX_RESTARTS:=20} =~ ^[0-9]+$ ]] || die "MAX_RESTARTS=$MAX_RESTARTS is not a number"
  [[ ${TRACE_DS_LAUNCHER:=srun} =~ ^(srun|torchrun|deepspeed)$ ]] ||
    die "TRACE_DS_LAUNCHER=$TRACE_DS_LAUNCHER is none of srun, torchrun, deepspeed"
}

# What this task of a job array runs, and what its run directory's name ends with.
pick_array_task() {
  local line words
  if [[ $config == *.txt ]]; then
    line=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$config") || die "$config cannot be read"
    read -ra words <<<"$line"
    ((${#words[@]})) || die "$config has no line $SLURM_ARRAY_TASK_ID: submit with --array=1-$(grep -c . "$config")"
    config=${words[0]}
    arguments=("${words[@]:1}" "${arguments[@]}")
    run_suffix=-$SLURM_ARRAY_TASK_ID
  else
    arguments+=(--set "seed=$SLURM_ARRAY_TASK_ID")
    run_suffix=-seed$SLURM_ARRAY_TASK_ID
  fi
}

# The site file, looked for where trace_ds/cluster/submit.py looks for it; its path, or "none", goes to the log.
read_site() {
  local site=${TRACE_DS_SITE_ENV-}
  if [[ -z ${TRACE_DS_SITE_ENV+set} ]]; then
    for site in "${SLURM_SUBMIT_DIR:-$PWD}/slurm/site.env" ~/.config/trace_ds/site.env ''; do
      [[ ! -e $site ]] || break
    done
  fi
  printf 'site settings: %s\n' "${site:-none}" >&2
  [[ -n $site ]] || return 0
  [[ -f $site && -r $site ]] || die "the site file $site is not a file that can be read: correct TRACE_DS_SITE_ENV, or make it one"
  bash -n "$site" 2>/dev/null || die "the site file $site is not valid bash: see bash -n $site"
  set +eu # a site's own code
  # shellcheck source=slurm/site.env.example
  source "$site"
  set -eu
}

# Makes `words` of a text as a shell would: quotes group, nothing is expanded.
split_words() {
  local lines
  words=()
  lines=$(xargs -r printf '%s\n' <<<"$1" 2>/dev/null) || die "a quote is not closed in these options for sbatch: $1"
  [[ -z $lines ]] || mapfile -t words <<<"$lines"
}

# Sorts the arguments: --run-dir is taken out and settles `run_dir` (absolute; else RUN_DIR, else runs/NAME); --variants is
# taken out and settles TRACE_DS_VARIANTS; --ep and --nproc, which not every verb knows, become the --set that means the
# same to every verb.
sort_arguments() {
  local sorted=() value=${RUN_DIR:-} option
  while ((${#arguments[@]})); do
    option=${arguments[0]}
    arguments=("${arguments[@]:1}")
    case $option in
      --run-dir=* | --ep=* | --nproc=* | --variants=*) arguments=("${option#*=}" "${arguments[@]}") ;;
      --run-dir | --ep | --nproc | --variants) ((${#arguments[@]})) || die "$option needs a value" ;;
      *)
        sorted+=("$option")
        continue
        ;;
    esac
    case $option in
      --run-dir*) value=${arguments[0]} ;;
      --variants*) export TRACE_DS_VARIANTS=${arguments[0]//,/ } ;;
      --ep*) sorted+=(--set "distributed.ep=${arguments[0]}") ;;
      --nproc*) sorted+=(--set "distributed.nproc=${arguments[0]}") ;;
    esac
    arguments=("${arguments[@]:1}")
  done
  arguments=("${sorted[@]}")
  [[ -n $value ]] || value=runs/$(config_name)
  [[ $value == /* ]] || value=$PWD/$value
  run_dir=$value${run_suffix:-}
}

# What the run is called: the top-level key `name` of the last of the configs (the words before the first option) that has
# one, else TASK-MODEL of the fragments among them, else the first one's file name.
config_name() {
  local recipes=$TRACE_DS_HOME/trace_ds/recipes word file found name='' task='' model=''
  for word in "$config" "${arguments[@]}"; do
    [[ $word != -* ]] || break
    file=$word
    [[ -f $file ]] || file=$recipes/$word.yaml
    [[ ! -f $recipes/tasks/$word.yaml ]] || task=$word
    [[ ! -f $recipes/models/$word.yaml ]] || model=$word
    [[ -f $file ]] || continue
    found=$(sed -n "s/^name:[[:space:]]*[\"']\{0,1\}\([A-Za-z0-9._-]*\).*/\1/p" "$file")
    name=${found:-$name}
  done
  [[ -n $name || -z $task || -z $model ]] || name=$task-$model
  [[ -n $name ]] || name=$(basename "${config%.y*ml}")
  printf '%s\n' "$name"
}

# Makes `container`, what runs a command in the image (empty without one), `step`, the srun options that do so (pyxis), and
# `trace_ds`, the command line's first words. Modules and virtual environment are those of the site file.
prepare_command() {
  if [[ -n ${TRACE_DS_MODULES:-} ]]; then
    [[ -n $(type -t module) ]] ||
      die "TRACE_DS_MODULES is set, but there is no command module on $HOSTNAME: source its start script in the site file"
    # `module` is a shell function of the site and is not written for `set -u`.
    set +u
    # shellcheck disable=SC2086  # a list of module names
    module load $TRACE_DS_MODULES || die "module load $TRACE_DS_MODULES failed on $HOSTNAME: correct TRACE_DS_MODULES"
    set -u
  fi
  [[ -z ${TRACE_DS_VENV:-} ]] || export PATH=$TRACE_DS_VENV/bin:$PATH
  read -ra trace_ds <<<"${TRACE_DS_COMMAND:-trace-ds}"
  container=() step=()
  [[ -z ${TRACE_DS_CONTAINER:-} ]] || prepare_container
  ((${#container[@]} + ${#step[@]})) || command -v "${trace_ds[0]}" >/dev/null ||
    die "no command ${trace_ds[0]} on $HOSTNAME: set TRACE_DS_VENV in the site file (see slurm/site.env.example)"
}

prepare_container() {
  local mounts folder list='' runtime
  read -ra mounts <<<"${TRACE_DS_MOUNTS:-}"
  mounts+=("$TRACE_DS_HOME" "$PWD" "$run_dir")
  mkdir -p "$run_dir" # a path must exist before it can be bound
  if [[ $TRACE_DS_CONTAINER == pyxis:* ]]; then
    for folder in "${mounts[@]}"; do list+=${list:+,}$folder:$folder; done
    step=("--container-image=${TRACE_DS_CONTAINER#pyxis:}" "--container-mounts=$list" "--container-workdir=$PWD")
    return
  fi
  runtime=$(command -v apptainer || command -v singularity) ||
    die "TRACE_DS_CONTAINER is set, but neither apptainer nor singularity is on PATH on $HOSTNAME"
  container=("$runtime" exec --nv)
  for folder in "${mounts[@]}"; do container+=(--bind "$folder"); done
  container+=("$TRACE_DS_CONTAINER")
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

# The distributed verbs, on all nodes: srun starts one task per GPU, or one torchrun or deepspeed per node that does.
# --export=ALL: after `sbatch --export=NONE`, which some sites make the default, srun would pass nothing on either.
# --cpus-per-task: srun does not take it over from sbatch (SLURM >= 22.05).
# --kill-on-bad-exit=0: many clusters kill the step when one rank's status is not 0, which would turn the orderly 75 of all
#   ranks into 137. --wait instead bounds how long the others may hang after the first rank has gone: in good order all go
#   within seconds.
# No --gpus-per-task: it would hide a node's other GPUs from each task; ranks choose theirs by SLURM_LOCALID.
run_on_all_ranks() {
  settle_master
  local per_node=$((SLURM_NTASKS / SLURM_NNODES)) cpus=${SLURM_CPUS_PER_TASK:-1} command=() status=0 began
  printf -v began '%(%s)T' -1
  # shellcheck disable=SC2016  # each node puts in its own number
  local on_each_node=(--ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task=$((cpus * per_node)) "${step[@]}"
    bash -c 'exec "${@//@NODE_RANK@/$SLURM_NODEID}"' bash "${container[@]}")
  case $TRACE_DS_LAUNCHER in
    srun) command=(--cpus-per-task="$cpus" "${step[@]}" "${container[@]}" "${trace_ds[@]}") ;;
    torchrun)
      command=("${on_each_node[@]}" torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$per_node" --node-rank=@NODE_RANK@
        --master-addr="$master_addr" --master-port="$master_port" -m trace_ds)
      ;;
    deepspeed)
      mkdir -p "$run_dir"
      scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots=$per_node/" >"$run_dir/.hostfile"
      command=("${on_each_node[@]}" deepspeed --hostfile="$run_dir/.hostfile" --no_ssh --node_rank=@NODE_RANK@
        --master_addr="$master_addr" --master_port="$master_port" --module trace_ds)
      ;;
  esac
  run_interruptibly env MASTER_ADDR="$master_addr" MASTER_PORT="$master_port" \
    srun --export=ALL --label --kill-on-bad-exit=0 --wait="${TRACE_DS_WAIT_S:-45}" "${command[@]}" "$@" || status=$?
  rm -f "$run_dir/.hostfile"
  # torchrun calls every failure 1. After a stop was asked for, take it for the orderly 75 (a real one comes again).
  if [[ $TRACE_DS_LAUNCHER/$status == torchrun/1 ]] &&
    { ((stop_requested)) || [[ -e $run_dir/stop ]] || stopped_on_request "$1" "$began"; }; then
    status=75
  fi
  return "$status"
}

# stopped_on_request VERB SECONDS: whether a log that the verb wrote since then (of the epoch) ends with that: the ranks
# remove the stop file that they obey.
stopped_on_request() {
  find "$run_dir" -path "*/logs/$1.jsonl" -newermt "@$2" -exec tail -n 1 {} \; | grep -q "stopped on request"
}

# One process on the first node: in this shell, or in a step when only srun can make the container.
run_single() {
  local first=()
  ((!${#step[@]})) || first=(srun --export=ALL --nodes=1 --ntasks=1 "${step[@]}")
  "${first[@]}" "${container[@]}" "${trace_ds[@]}" "$@"
}

# run_stage VERB [VARIANT]
run_stage() {
  local command=("$1" "$config" --run-dir "$run_dir" "${arguments[@]}")
  [[ -z ${2:-} ]] || command+=(--variant "$2")
  case $1 in
    finetune | collect | unlearn | evaluate | doctor) run_on_all_ranks "${command[@]}" ;;
    *) run_interruptibly run_single "${command[@]}" ;;
  esac
}

# sbatch opened the log where it was called, under the name of the #SBATCH line: move it into the run, and leave a link.
# (A log that was sent elsewhere, by --output or SBATCH_OUTPUT, stays there.)
keep_log() {
  local log=$SLURM_SUBMIT_DIR/$SLURM_JOB_NAME-$SLURM_JOB_ID.log kept=$run_dir/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID.log
  [[ ! -L $log && $log -ef /proc/$$/fd/1 && ! $log -ef $kept ]] || return 0
  mkdir -p "$run_dir/logs"
  cat "$log" >>"$kept"
  exec >>"$kept" 2>&1
  ln -sf "$kept" "$log"
}

# Makes `variants`, the names of those that run too, and `finetunes`, whether the config has models fine-tuned: as its dry
# run says, which is asked only where that matters to the stages.
read_config() {
  local resolved every=()
  finetunes=0
  read -ra variants <<<"${TRACE_DS_VARIANTS:-}"
  [[ ${variants[*]} != all ]] || every=(--variants all)
  [[ -n ${every[*]} || " $* " == *" finetune "* ]] || return 0
  resolved=$(run_single run "$config" --run-dir "$run_dir" "${arguments[@]}" "${every[@]}" --dry-run) || return
  ! grep -q '^# run directory: .*would run: prepare, finetune, ' <<<"$resolved" || finetunes=1
  [[ -n ${every[*]} ]] || return 0
  mapfile -t variants < <(sed -n 's/^# variant \([^:]*\): .*/\1/p' <<<"$resolved")
}

run_stages() {
  local verb variant variants finetunes stages
  read -ra stages <<<"${TRACE_DS_STAGES:-$*}"
  prepare_command
  read_config "${stages[@]}" || finish $?
  keep_log
  remove_stale_stop
  say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0} of at most $MAX_RESTARTS, $run_dir"
  for verb in "${stages[@]}"; do
    [[ $verb != finetune ]] || ((finetunes)) || continue
    run_and_check "$verb"
    [[ $verb =~ ^(calibrate|unlearn|convert|evaluate)$ ]] || continue
    for variant in "${variants[@]}"; do run_and_check "$verb" "$variant"; done
  done
  finish 0
}

# A stop file that an earlier job left must not stop this one. What a person touched while this job waited, for the job
# before it in a chain to end or after a requeue, is meant for it: chain.sh has removed what was older.
remove_stale_stop() {
  [[ -n ${TRACE_DS_CHAIN:-}${SLURM_RESTART_COUNT:-} && ! -s $run_dir/stop ]] || rm -f "$run_dir/stop"
}

# run_and_check VERB [VARIANT]: goes on only if it is done and no stop was asked for.
run_and_check() {
  local what=$1${2:+ of variant $2} status=0
  ((!stop_requested)) || requeue "before $what"
  if [[ -e $run_dir/stop ]]; then
    rm -f "$run_dir/stop"
    say "stopped on request before $what; submit the same line again to go on"
    finish 75
  fi
  say "$what"
  run_stage "$@" || status=$?
  say "$what: exit status $status"
  if ((status == 75)); then
    # Without our signal somebody else asked for the stop (touched the file by hand) and wants it to stay stopped.
    ((stop_requested)) && requeue "during $what"
    say "stopped on request; submit the same line again to go on"
  fi
  ((status == 0)) && return
  [[ $1 =~ ^(finetune|collect|unlearn|evaluate)$ && ! $status =~ ^(2|75)$ ]] && ! every_node_answers &&
    requeue "during $what (a node does not answer)" "$status"
  finish "$status"
}

# Whether no node of the job is lost. SLURM requeues a job whose node is lost, but only after SlurmdTimeout (300 s by
# default): the ranks on the other nodes fail long before, and the job with them. A task that does not start is no proof
# (a busy controller makes srun slow), so the controller must miss a node too, within TRACE_DS_NODE_WAIT_S.
every_node_answers() {
  local deadline=$((SECONDS + ${TRACE_DS_NODE_WAIT_S:-300}))
  while ! timeout 60 srun --export=ALL --overlap --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task=1 true; do
    # `*`: does not respond
    ! sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --format=%T | grep -Eq '\*|down|fail' || return 1
    if ((SECONDS >= deadline)); then
      say "srun starts no task on every node, but the controller misses none"
      return 0
    fi
    sleep 5
  done
}

# requeue WHEN [STATUS]: back into the queue under the same job id, unless that has happened too often; never returns.
requeue() {
  if ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
    say "stopped $1 and not requeued: MAX_RESTARTS=$MAX_RESTARTS reached; submit the same line again to go on"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    say "stopped $1 and requeued"
  else
    say "stopped $1; SLURM refused to requeue the job; submit the same line again to go on"
  fi
  finish "${2:-75}"
}

finish() {
  ((!stop_requested)) || rm -f "$run_dir/stop"
  exit "$1"
}
