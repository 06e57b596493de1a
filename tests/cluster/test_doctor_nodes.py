"""``trace-ds doctor`` on several nodes, and faults planted for real: a full disk, no locks, two nodes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from processes import CONTEXT, run_distributed

from trace_ds.cluster import checks
from trace_ds.cluster import doctor as nodes
from trace_ds.cluster.checks import Check
from trace_ds.config.load import load_config
from trace_ds.parallel.environment import free_port


def missing(result: list[Check]) -> dict[str, Check]:
    assert all(check.fix for check in result if check.status != "OK")
    return {check.name: check for check in result if check.status == "MISS"}


# Faults of the machine


def test_expert_parallelism_on_a_gpu_needs_a_c_compiler(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    config, _ = load_config(str(tiny.write_config(tmp_path, tiny_model, distributed__ep=2)))
    name = "C compiler for Triton"
    assert name not in {check.name for check in checks.compiler_checks(config)}  # no GPU here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(checks.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert name not in missing(list(checks.compiler_checks(config)))
    (tmp_path / "gcc").unlink()
    (tmp_path / "Python.h").unlink()
    fault = missing(list(checks.compiler_checks(config)))[name]
    assert "no C compiler and no " in fault.detail and "apt-get install gcc python3-dev" in fault.fix


def lonely_rank(rank: int, port: int, output: str) -> None:
    """The doctor as one rank of two of which the other never comes; its report, or its lines on standard error."""
    from trace_ds.cluster.doctor import doctor

    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(DS_ACCELERATOR="cpu", SLURM_GPUS_ON_NODE="8", CUDA_VISIBLE_DEVICES="", SLURMD_NODENAME="n7")
    nodes.JOIN_TIMEOUT_MINUTES = 0.02
    with Path(output).open("w", encoding="utf-8") as file:
        sys.stdout = sys.stderr = file
        status = doctor(None, None, json=False)
        print(f"status {status}")


def test_ranks_that_do_not_meet_still_report_their_machines(tmp_path: Path) -> None:
    """A node whose GPUs are gone and whose network is closed: both are said, by every node."""
    outputs = [tmp_path / "main", tmp_path / "other"]
    processes = [
        CONTEXT.Process(target=lonely_rank, args=(rank, free_port(), str(output)))
        for rank, output in enumerate(outputs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    main, other = (output.read_text(encoding="utf-8") for output in outputs)
    assert "SLURM promises 8 on this node, torch sees 0" in main
    assert "the ranks do not meet at 127.0.0.1:" in main and "GLOO_SOCKET_IFNAME" in main and "status 1" in main
    assert "trace-ds doctor on n7: GPUs: SLURM promises 8 on this node, torch sees 0. Fix: run nvidia-smi" in other


# Two nodes


def faulty_storage(world: Any, run_dir: str) -> dict[str, list[Check]]:
    """The storage checks between nodes where the first node's write fails (a limit on file sizes), where it knows no
    locks (ENOSYS, as Lustre without -o flock), and where another node knows none."""
    import errno
    import fcntl
    import resource
    import signal

    job = nodes.JoinedRanks(world, [f"n{rank + 1}" for rank in range(world.size)])
    path, flock = Path(run_dir), fcntl.flock

    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def checked(rank: int, fault: Callable[[], object], repair: Callable[[], object]) -> list[Check]:
        if world.rank == rank:
            fault()
        results = list(nodes.shared_storage_checks(job, path))
        if world.rank == rank:
            repair()
        return results

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return {
        "write": checked(0, lambda: limit(1000), lambda: limit(resource.RLIM_INFINITY)),
        "first": checked(0, lambda: setattr(fcntl, "flock", no_locks), lambda: setattr(fcntl, "flock", flock)),
        "second": checked(1, lambda: setattr(fcntl, "flock", no_locks), lambda: setattr(fcntl, "flock", flock)),
    }


def test_storage_faults_of_one_node_are_reported_by_all(tmp_path: Path) -> None:
    """No rank is left waiting for one whose system call failed: the collectives stay in step."""
    ranks = run_distributed(faulty_storage, 2, str(tmp_path / "run"))
    assert ranks[0] == ranks[1]
    faults = {fault: result[-1] for fault, result in ranks[0].items()}
    assert faults["write"].status == "MISS" and "n1 cannot write 1 MiB (File too large)" in faults["write"].detail
    for fault, node, status in (("first", "n1", "MISS"), ("second", "n2", "WARN")):
        check = faults[fault]
        assert check.status == status and check.detail == f"{node}: flock fails (Function not implemented)"
        assert "-o flock" in check.fix
    assert not list(tmp_path.iterdir())


def doctor_on_nodes(world: Any, folder: str) -> list[list[Check] | None]:
    """The doctor as one rank of a job, in two worlds; rank r is on node n(r + 1), which has a working directory of its
    own. In the second world the nodes have different files and each a run directory of its own."""
    from trace_ds.cluster import doctor

    node = f"n{world.rank + 1}"
    os.environ |= {"SLURMD_NODENAME": node, "LOCAL_RANK": "0"}
    os.environ["PYTHONPATH"] = ""
    nodes.join_job = lambda: nodes.JoinedRanks(world, world.gather(node))
    nodes.leave_job = lambda ranks: None
    nodes.SEEN_WITHIN_S = 1.0
    results = []
    for name, run_dir in (("healthy", f"{folder}/healthy/run"), ("faulty", "run")):
        os.chdir(Path(folder) / name / node)
        loaded, _ = load_config(f"{folder}/{name}/config.yaml", [], run_dir)
        results.append(doctor.check_job(loaded, Path(run_dir)))
    return results


def test_two_nodes(tmp_path: Path, tiny_model: Path) -> None:
    """Healthy ones; and with another model on each, a corpus on one only, and expert-parallel size 4 on 2 ranks."""
    for world, ep in (("healthy", 2), ("faulty", 4)):
        for node in ("n1", "n2"):
            shutil.copytree(tiny_model, tmp_path / world / node / "model")
            tiny.write_corpora(tmp_path / world / node / "corpora")
        sides = {f"data__{side}": [{"path": f"corpora/{side}.jsonl"}] for side in ("forget", "retain")}
        tiny.write_config(tmp_path / world, Path("model"), distributed__ep=ep, **sides)
    faulty = tmp_path / "faulty"
    weights = faulty / "n2" / "model" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    (faulty / "n2" / "corpora" / "forget.jsonl").unlink()
    (faulty / "n1" / "run").mkdir()
    (healthy, result), others = run_distributed(doctor_on_nodes, 2, str(tmp_path))
    assert others == [None, None]

    assert missing(healthy) == {}
    names = {check.name: check for check in healthy}
    assert "the same on 2 nodes" in names["model: model"].detail
    assert {"same bytes on all nodes", "rename seen by all nodes", "versions", "gloo all-to-all"} <= names.keys()
    assert names["locks between nodes"].status == "OK"
    assert "2 ranks on 2 nodes" in names["gloo all-reduce"].detail
    assert len({(check.group, check.name) for check in healthy}) == len(healthy)
    assert not list(tmp_path.rglob(".trace-ds*"))

    faults = missing(result)
    assert set(faults) == {
        "model: model", "forget: corpora/forget.jsonl", "same bytes on all nodes", "its own checks"
    }  # fmt: skip
    assert "n1: " in faults["model: model"].detail and "n2: " in faults["model: model"].detail
    assert "copy it to the nodes again" in faults["model: model"].fix
    assert "n2 cannot read what n1 wrote" in faults["same bytes on all nodes"].detail
    assert "4 does not divide the world size 2" in faults["its own checks"].detail
    missing_corpus = [c for c in result if c.group == "corpora" and c.status == "MISS"]
    assert [c.detail for c in missing_corpus] == ["on n2: corpora/forget.jsonl: the corpus file does not exist"]
