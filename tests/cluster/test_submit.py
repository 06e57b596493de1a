"""``trace-ds submit``: what it checks, what it writes, what it hands to SLURM."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import tiny
from command import tree

from trace_ds.cluster import submit
from trace_ds.cluster.submit import Cluster, submit_run
from trace_ds.config.load import dump_yaml, with_changes
from trace_ds.errors import UserError
from trace_ds.stages.pipeline import Request

ROOT = Path(__file__).resolve().parents[2]
ONE_NODE = Cluster(1, 2)


@pytest.fixture
def request_(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    for name in [name for name in os.environ if name.startswith(("TRACE_DS", "SBATCH", "SLURM"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    config = tiny.write_config(tmp_path, tiny_model, distributed__ep=2)
    return Request.load(str(config), [], tmp_path / "runs" / "a run")


def failing(request: Request, cluster: Cluster, **options: bool) -> str:
    """The message of the mistake; nothing may be written."""
    before = tree(Path.cwd())
    with pytest.raises(UserError) as error:
        submit_run(request, cluster, **{"chain": False, "dry_run": False, **options})
    assert tree(Path.cwd()) == before
    assert error.value.fix
    return error.value.line()


def test_dry_run_prints_the_exact_lines_and_writes_nothing(
    request_: Request, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    before = tree(tmp_path)
    assert submit_run(request_, Cluster(2, 1, "--time=4:00:00", "0-4"), chain=False, dry_run=True) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "sbatch" in line)
    folder = f"'{tmp_path}/runs/a run/submitted/1'"
    assert line == (
        rf"RUN_DIR={tmp_path}/runs/a\ run sbatch --parsable --export=ALL --nodes=2 --ntasks-per-node=1 "
        f"--gpus-per-node=1 --array=0-4 --time=4:00:00 {folder}/slurm/unlearn_mixtral.sh {folder}/config.yaml"
    )
    assert submit_run(request_, Cluster(2, 4, "--qos=x"), chain=True, dry_run=True) == 0
    jobs = [line for line in capsys.readouterr().out.splitlines() if line.startswith("TRACE_DS_STAGES")]
    assert len(jobs) == 6 and all("--qos=x" in job for job in jobs)
    assert [job.split()[0].split("=")[1] for job in jobs[:5]] == [
        "prepare",
        "collect",
        "calibrate",
        "unlearn",
        "convert",
    ]
    assert all(f"--dependency=afterok:JOB{number} " in job for number, job in enumerate(jobs) if number)
    shape = "--nodes=2 --ntasks-per-node=4 --gpus-per-node=4"
    assert [shape in job for job in jobs] == [False, True, False, True, False, True]
    assert tree(tmp_path) == before


def test_automatic_sizes_are_those_of_the_cluster(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the configuration that the jobs read."""
    request = Request(with_changes(request_.config, {"distributed.ep": "auto"}, "test"), request_.run)
    configs: list[str] = []
    monkeypatch.setattr(submit, "render_scripts", lambda request, folder: configs.append(dump_yaml(request.written)))
    monkeypatch.setattr(submit, "run_chain", lambda *arguments: {})
    for cluster, size in ((Cluster(2, 1), 1), (Cluster(2, 2), 2), (Cluster(3, 8), 4)):
        assert submit_run(request, cluster, chain=False, dry_run=True) == 0
        assert f"\n  ep: {size}\n" in configs[-1]


def test_mistakes(request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not divide the world size 3" in failing(request_, Cluster(3, 1))
    sharded = with_changes(request_.config, {"evaluation.ep": 4, "evaluation.nproc": 4}, "test")
    assert "evaluation.ep: expert-parallel size 4 does not" in failing(Request(sharded, request_.run), Cluster(2, 1))
    assert "--sbatch: a quote is not closed: --comment='a" in failing(request_, Cluster(1, 2, "--comment='a"))
    assert "cannot be combined" in failing(request_, Cluster(1, 2, array="0-1"), chain=True)
    monkeypatch.setenv("TRACE_DS_SITE_ENV", "nowhere.env")
    assert "TRACE_DS_SITE_ENV=nowhere.env: no such file" in failing(request_, ONE_NODE)
    monkeypatch.delenv("TRACE_DS_SITE_ENV")
    (tmp_path / "slurm").mkdir()
    with socket.socket(socket.AF_UNIX) as site:
        site.bind("slurm/site.env")
    assert "slurm/site.env: the site file is not a file that can be read" in failing(request_, ONE_NODE)
    (tmp_path / "slurm/site.env").unlink()
    (tmp_path / "slurm/site.env").write_text("if true\n")
    assert "is not valid bash" in failing(request_, ONE_NODE)
    (tmp_path / "slurm/site.env").unlink()
    record = request_.run.path / "submitted" / "1" / "jobs.json"
    request_.run.mark()
    record.parent.mkdir(parents=True)
    (tmp_path / "sbatch").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for damaged in ("{", '{"jobs": {"run": "-1"}}'):
        record.write_text(damaged)
        assert str(record) in failing(request_, ONE_NODE)
    shutil.rmtree(request_.run.path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    (tmp_path / "sbatch").unlink()
    monkeypatch.setattr(submit.shutil, "which", lambda name: None)
    assert "there is no sbatch on this machine" in failing(request_, ONE_NODE)
    Path("corpora/forget.jsonl").unlink()
    assert "forget.jsonl" in failing(request_, ONE_NODE)


def test_python_and_the_scripts_read_the_same_site_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the environment, else of the folder, else of the user; an empty variable means none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SLURM_SUBMIT_DIR", raising=False)
    monkeypatch.delenv("TRACE_DS_SITE_ENV", raising=False)
    places = [tmp_path / "home/.config/trace_ds/site.env", tmp_path / "slurm/site.env", tmp_path / "my.env"]
    script = f'TRACE_DS_HOME={ROOT}; source {ROOT}/slurm/common.sh; read_site; echo "${{CHOSEN:-}}"'

    def result() -> list[str]:
        read = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        said = read.stderr.removeprefix("site settings: ").strip()
        assert said == str(submit.site_file() or "none")
        return [said, read.stdout.strip()]

    assert result() == ["none", ""]
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"false; export CHOSEN={path} $UNSET\n")
        if path.name == "my.env":
            monkeypatch.setenv("TRACE_DS_SITE_ENV", str(path))
        assert result() == [str(path), str(path)]
    monkeypatch.setenv("TRACE_DS_SITE_ENV", "")
    assert result() == ["none", ""]


def test_a_submission_holds_all_that_its_jobs_need(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scripts as they are now, the resolved configuration, the site file."""
    (tmp_path / "my.env").write_text("export SBATCH_QOS=long\n")
    monkeypatch.setenv("TRACE_DS_SITE_ENV", "my.env")
    submit.render_scripts(request_, tmp_path / "draft")
    scripts = tmp_path / "draft" / "slurm"
    assert {path.name for path in scripts.iterdir()} == {*submit.SCRIPTS, "site.env"}
    assert (scripts / "site.env").read_text() == "export SBATCH_QOS=long\n"
    shutil.copy(tmp_path / "draft" / "config.yaml", tmp_path / "again.yaml")
    assert Request.load("again.yaml", [], request_.run.path).config == request_.config


def test_one_variant_of_a_run(request_: Request, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--variant NAME`, as the scripts call the stages."""
    from trace_ds.stages.pipeline import run_verb

    changes = {"variants": {"even": {"calibration.rule": "uniform"}}}
    request = Request(with_changes(request_.config, changes, "test"), request_.run)
    assert run_verb("run", request, dry_run=True) == 0
    assert "# variant" not in capsys.readouterr().out  # none is run by default
    assert run_verb("run", request.with_variants("even"), dry_run=True) == 0
    assert (
        "\n# variant even: {'calibration.rule': 'uniform'}\n" in capsys.readouterr().out
    )  # what slurm/common.sh reads
    variant = request.variant("even")
    assert variant.config.calibration.rule == "uniform" and variant.run.data == request.run.data
    assert variant.run.path == request.run.path / "variants" / "even"
    with pytest.raises(UserError, match=r"no variant 'odd'.*use one of its own: even"):
        request.with_variants("even,odd")
