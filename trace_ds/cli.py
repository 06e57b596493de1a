"""The command line ``trace-ds VERB CONFIG…``: it parses, calls the verb and turns errors into exit statuses.

    trace-ds demo
    trace-ds run wmdp_cyber olmoe_1b_7b
    trace-ds run CONFIG --run-dir runs/mine --set unlearning.alpha=4
    deepspeed --num_accelerators 8 --module trace_ds collect CONFIG

Exit status: 0 done; 2 the input is wrong (one line says what, where and the fix); 75 stopped on request with a
complete checkpoint; anything else is a failure.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from trace_ds import __version__
from trace_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR, AgreedError, JobFailed, StopRequested, UserError
from trace_ds.terminal import VERBOSE, guard_streams, quiet_libraries

EXIT_INTERRUPTED = 130
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of the system that may not say which file
LAUNCHED = ("finetune", "collect", "unlearn", "evaluate")
ONE_PROCESS = ("fetch", "prepare", "calibrate", "convert", "report", "run", "submit", "demo", "bench")

app = typer.Typer(
    name="trace-ds",
    help="Routing-aware unlearning for Mixture-of-Experts language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _set_verbose(verbose: bool) -> None:
    if verbose:
        os.environ[VERBOSE] = "1"  # a variable, so that the ranks of a job are verbose too


def _run_dir(text: str) -> Path:
    from trace_ds.run.directory import run_path

    return run_path(str(text))


def _complete_config(incomplete: str) -> list[str]:
    from trace_ds.config.load import complete_config

    return complete_config(incomplete)


def _complete_key(incomplete: str) -> list[str]:
    from trace_ds.config.load import complete_key

    return complete_key(incomplete)


CONFIG_HELP = (
    "YAML files or names of recipes (`trace-ds recipes`), merged from left to right; a TASK and a MODEL make a run."
)
ConfigArgument = Annotated[list[str], typer.Argument(help=CONFIG_HELP, autocompletion=_complete_config)]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", parser=_run_dir, metavar="PATH", help="Run directory; default runs/NAME.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", autocompletion=_complete_key, help="Override: dotted.key=value.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and what would run.")]
NprocOption = Annotated[
    int | None, typer.Option("--nproc", min=1, help="Number of local processes, without a launcher.")
]
EpOption = Annotated[int | None, typer.Option("--ep", min=1, help="Expert-parallel size.")]
VariantOption = Annotated[
    str | None, typer.Option("--variant", help="Work on this variant of the config instead of the run.")
]
VariantsOption = Annotated[
    str, typer.Option("--variants", metavar="all|NAME,…", help="Also run these variants of the config; default: none.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", callback=_set_verbose, help="Print full logs.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def main() -> None:
    """Entry point of ``trace-ds`` and ``python -m trace_ds``."""
    guard_streams()
    quiet_libraries()
    # The deepspeed launcher puts --local_rank=N before the script's own arguments; the environment has it too.
    arguments = [word for word in sys.argv[1:] if not word.startswith(("--local_rank", "--local-rank"))]
    try:
        status = app(arguments, standalone_mode=False)
    except (UserError, JobFailed) as error:
        _fail(str(error), error.exit_status)
    except AgreedError:  # the main process prints the message
        _end(EXIT_USER_ERROR)
    except StopRequested as error:
        print(f"trace-ds: {error}", file=sys.stderr)
        _end(EXIT_STOPPED)
    except OSError as error:
        if error.filename is None and error.errno not in NO_SPACE:
            raise
        place = os.fsencode(error.filename).decode("utf-8", "backslashreplace") if error.filename else ""
        fix = "correct the path, its permissions or the free space there, or choose another --run-dir"
        _fail(str(UserError(str(error.strerror), place, fix)), EXIT_USER_ERROR)
    except typer.Exit as end:
        _end(end.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _end(EXIT_INTERRUPTED)
    except Exception as error:
        show = getattr(error, "show", None)
        if callable(show):  # a usage error (typer has its own copy of click's exceptions)
            show()
            _end(EXIT_USER_ERROR)
        raise
    _end(status if isinstance(status, int) else 0)


def _end(status: int) -> NoReturn:
    """Exit; a process that was a rank has its own way."""
    if status == EXIT_INTERRUPTED:  # by Ctrl-C, of which typer makes a status
        print("trace-ds: interrupted", file=sys.stderr)
    if "trace_ds.parallel.world" in sys.modules:
        from trace_ds.parallel.world import end_process

        end_process(status)
    sys.exit(status)


def _fail(line: str, status: int) -> NoReturn:
    print(f"trace-ds: error: {line}", file=sys.stderr)
    _end(status)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"trace_ds {__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand in ONE_PROCESS:
        _refuse_ranks(str(context.invoked_subcommand))


def _refuse_ranks(verb: str) -> None:
    """Under a launcher every rank would do the whole work of a verb that is one process."""
    from trace_ds.parallel.environment import rank_and_size

    rank, size = rank_and_size()
    if size > 1 and rank == 0:
        raise UserError(
            f"{verb} runs as one process, and the launcher started {size}",
            "the launcher",
            f"start `trace-ds {verb}` by itself: it starts the processes it needs (or launch {', '.join(LAUNCHED)})",
        )
    if size > 1:
        raise typer.Exit(EXIT_USER_ERROR)


def _changes(set_: Sequence[str] | None, nproc: int | None, ep: int | None, section: str = "distributed") -> list[str]:
    """``--set``, and ``--nproc`` and ``--ep`` as if they were set."""
    sizes = [f"{section}.{key}={value}" for key, value in (("nproc", nproc), ("ep", ep)) if value is not None]
    return [*(set_ or []), *sizes]


def _add_stage(name: str, help_text: str) -> None:
    """Add the verb of one stage; they share their options."""

    @app.command(name, help=help_text)
    def run_stages(
        config: ConfigArgument,
        run_dir: RunDirOption = None,
        set_: SetOption = None,
        nproc: NprocOption = None,
        ep: EpOption = None,
        variant: VariantOption = None,
        dry_run: DryRunOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        section = "evaluation" if name == "evaluate" else "distributed"
        _run_verb(name, config, run_dir, _changes(set_, nproc, ep, section), variant, dry_run)


def _run_verb(
    name: str, config: Sequence[str], run_dir: Path | None, changes: Sequence[str], variant: str | None, dry_run: bool
) -> None:
    from trace_ds.stages.pipeline import Request, run_verb

    request = Request.load(config, changes, run_dir)
    if variant is not None:
        request = request.variant(variant)
    raise typer.Exit(run_verb(name, request, dry_run=dry_run))


@app.command()
def run(
    config: ConfigArgument,
    run_dir: RunDirOption = None,
    set_: SetOption = None,
    nproc: NprocOption = None,
    ep: EpOption = None,
    variants: VariantsOption = "",
    dry_run: DryRunOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run all stages: skips finished ones and resumes an interrupted one."""
    from trace_ds.stages.pipeline import Request, run_verb

    request = Request.load(config, _changes(set_, nproc, ep), run_dir).with_variants(variants)
    if dry_run:
        from trace_ds.cluster.plan import summary_line

        print(f"# {summary_line(request)}")
    raise typer.Exit(run_verb("run", request, dry_run=dry_run))


@app.command()
def demo(
    run_dir: Annotated[Path, typer.Option("--run-dir", parser=_run_dir, metavar="PATH", help="Where to work.")] = Path(
        "runs/demo"
    ),
    set_: SetOption = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    verbose: VerboseOption = False,
) -> None:
    """Run the whole method on real text, on this machine, in minutes."""
    from trace_ds.demo.run import demo as run_demo

    raise typer.Exit(run_demo(run_dir, list(set_ or []), seed))


@app.command()
def fetch(config: ConfigArgument, set_: SetOption = None) -> None:
    """Download the models and datasets that a configuration names to the local cache (on a login node)."""
    from trace_ds.config.load import load_config
    from trace_ds.stages.fetch import fetch as run_fetch

    run_fetch(load_config(config, set_ or [])[0])


for _name, _help in {
    "prepare": "Tokenise and pack the corpora.",
    "finetune": "Train the models that a benchmark needs: target, retrained (distributed).",
    "collect": "Count how often each expert is selected on each corpus (distributed).",
    "calibrate": "Find the forget-critical experts and compute the retain weights.",
    "unlearn": "Train the model to forget; writes sharded checkpoints (distributed).",
    "evaluate": "Score models: forgetting, utility, privacy, routing drift (on one process or many).",
}.items():
    _add_stage(_name, _help)


@app.command()
def convert(
    source: Annotated[
        list[str], typer.Argument(help="CONFIG… of a run; or a checkpoint or model directory and where to write.")
    ],
    run_dir: RunDirOption = None,
    set_: SetOption = None,
    tag: Annotated[
        str | None, typer.Option(help="Checkpoint tag in SOURCE; default: the one that `latest` names.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16, fp32 or same (default).")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Largest file; default 5GB.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads; default 1.")] = None,
    base_model: Annotated[Path | None, typer.Option(help="Model directory with config.json and tokenizer.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also compare checksums of SOURCE and read the result back.")
    ] = False,
    variant: VariantOption = None,
    dry_run: DryRunOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Convert a checkpoint of a run, or SOURCE to DESTINATION, to a Hugging Face model (one process, no GPU)."""
    from trace_ds.config.compose import is_config

    given = {"tag": tag, "dtype": dtype, "max_shard_size": max_shard_size, "jobs": jobs, "base_model": base_model}
    options = {name: value for name, value in (given | {"verify": verify or None}).items() if value is not None}
    if len(source) != 2 or is_config(source[0]):
        _refuse({f"--{name.replace('_', '-')}": value for name, value in options.items()}, "with a CONFIG")
        return _run_verb("convert", source, run_dir, set_ or [], variant, dry_run)
    _refuse({"--run-dir": run_dir, "--set": set_, "--variant": variant}, "with SOURCE DESTINATION")
    from trace_ds.conversion.convert import convert_command

    raise typer.Exit(convert_command(Path(source[0]), Path(source[1]), dry_run=dry_run, **options))


def _refuse(options: Mapping[str, object], place: str) -> None:
    """Refuse options that this form of the command does not read."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(f"{', '.join(given)} means nothing {place}", "convert", "leave it out")


@app.command()
def report(
    configs: Annotated[list[str], typer.Argument(help="CONFIG…, or a run directory.")],
    run_dir: RunDirOption = None,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write a run's report: one HTML page, CSV files and a model card."""
    from trace_ds.stages.pipeline import report_command

    if len(configs) > 1 or not Path(configs[0]).is_dir():
        return _run_verb("report", configs, run_dir, set_ or [], None, dry_run)
    raise typer.Exit(report_command(Path(configs[0])))


@app.command(hidden=True)
def rank() -> None:
    """Be one local rank of a job that another process has checked (it starts this command itself)."""
    from trace_ds.stages.pipeline import run_rank

    raise typer.Exit(run_rank())


@app.command()
def submit(
    config: ConfigArgument,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs, and processes, of each node.")] = 8,
    chain: Annotated[
        bool, typer.Option("--chain", help="One job per stage, each dependent on the one before.")
    ] = False,
    study: Annotated[bool, typer.Option("--study", help="Submit the runs of `bench`, one job for each seed.")] = False,
    array: Annotated[str | None, typer.Option(help="Seeds, as for sbatch --array: 0-4.")] = None,
    sbatch: Annotated[str, typer.Option(help="More options for sbatch: '--partition=gpu --time=4:00:00'.")] = "",
    gpu_memory: Annotated[float, typer.Option(min=1.0, help="GB of one GPU.")] = 80.0,
    run_dir: RunDirOption = None,
    set_: SetOption = None,
    ep: EpOption = None,
    variants: VariantsOption = "",
    dry_run: DryRunOption = False,
) -> None:
    """Check a run (or study), write its job scripts into the run directory and submit them to SLURM."""
    from trace_ds.cluster.submit import Cluster, submit_run
    from trace_ds.stages.pipeline import Request

    changes = _changes(set_, None, ep)
    cluster = Cluster(nodes, gpus_per_node, sbatch, array, gpu_memory)
    if study:
        from trace_ds.studies.study import submit_study

        if array:
            raise UserError("a study has seeds of its own", "--array", "leave it out")
        raise typer.Exit(submit_study(config, run_dir, changes, cluster, chain=chain, dry_run=dry_run))
    request = Request.load(config, changes, run_dir).with_variants(variants)
    raise typer.Exit(submit_run(request, cluster, chain=chain, dry_run=dry_run))


@app.command()
def doctor(
    config: Annotated[list[str] | None, typer.Argument(help=f"{CONFIG_HELP} Default: the machine only.")] = None,
    run_dir: RunDirOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Check machine, launchers, storage, model and data before a run: OK, WARN or MISS, each with its fix."""
    from trace_ds.cluster.doctor import doctor as run_doctor
    from trace_ds.stages.pipeline import Request

    request = Request.load(config, list(set_ or []), run_dir) if config else None
    directory = request.run.path if request is not None else run_dir
    raise typer.Exit(run_doctor(request.config if request else None, directory, json))


@app.command()
def plan(
    config: ConfigArgument,
    run_dir: RunDirOption = None,
    set_: SetOption = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    gpu_memory: Annotated[float, typer.Option(min=1.0, help="GB of one GPU.")] = 80.0,
    tflops: Annotated[float, typer.Option(min=0.001, help="Dense bf16 peak of one GPU.")] = 989.0,
    host_memory: Annotated[float, typer.Option(min=0.001, help="GB of a node's own memory.")] = 1000.0,
    variants: VariantsOption = "",
    json: JsonOption = False,
) -> None:
    """Estimate memory, storage, least time and what fits of a config (or a MODEL alone); loads no weights."""
    from trace_ds.cluster.job import ClusterSpec
    from trace_ds.cluster.plan import plan_command
    from trace_ds.config.compose import recipe_names
    from trace_ds.stages.pipeline import Request

    spec = ClusterSpec(nodes, gpus_per_node, gpu_memory, tflops, host_memory)
    changes = list(set_ or [])
    if set(config) <= set(recipe_names("model")):  # corpora of unknown length
        changes = [f"data.{side}=[{{path: no task}}]" for side in ("forget", "retain")] + changes
    request = Request.load(config, changes, run_dir).with_variants(variants).located("plan", download=False)
    raise typer.Exit(plan_command(request.chosen_config, spec, json, set(request.written.variants)))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Artefact, checkpoint, model or run directory.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare hashes too.")] = False,
) -> None:
    """Show what a run, artefact, checkpoint or model is, and check that it is complete."""
    from trace_ds.stages.inspect import inspect_path

    raise typer.Exit(inspect_path(path, verify))


@app.command()
def bench(
    recipe: ConfigArgument,
    run_dir: RunDirOption = None,
    set_: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan: which runs, on which seeds.")] = False,
    analyse: Annotated[bool, typer.Option("--analyse", help="Run nothing; analyse the runs that are there.")] = False,
) -> None:
    """Compare methods at matched forgetting over several seeds, each at its own strengths (resumable)."""
    from trace_ds.studies.study import run_study

    raise typer.Exit(run_study(recipe, run_dir, set_ or [], dry_run=dry_run, analyse_only=analyse))


@app.command()
def recipes(show: Annotated[str | None, typer.Option(help="Print this recipe.")] = None) -> None:
    """List the recipes of the package: whole runs, and tasks and models to combine; --show NAME prints one."""
    import textwrap

    from trace_ds.config.compose import find_config, read_config_text, recipe_names, recipes

    if show is not None:
        print(read_config_text(find_config(show)), end="")
        return
    files = recipes()
    titles = {
        "task": "Tasks: `trace-ds run TASK MODEL`",
        "model": "Models: `trace-ds plan TASK MODEL` needs no download",
        "run": "Whole runs: `trace-ds run NAME`, `trace-ds bench NAME`",
    }
    for kind, title in titles.items():
        print(f"\n{title}\n")
        for name in recipe_names(kind):
            about = f"  {name:<20} {read_config_text(files[name]).splitlines()[0].lstrip('# ')}"
            print(textwrap.fill(about, 80, subsequent_indent=" " * 23))
