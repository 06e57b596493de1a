"""Peak host memory of loading a model, of token losses and of scoring, ours and the plain way.

    python tools/bench_collect_memory.py                # all; 4.4 GB of disk, 10 GB of memory
    python tools/bench_collect_memory.py --what nll --json

* ``nll``: the losses of 4,096 tokens at vocabulary 150,000, hidden size 256, fp32: in pieces, and from the full logits.
* ``loading``: each of two ranks loads its half of the experts of a 2 GB Mixtral-shaped model (bf16, random weights), or
  its ZeRO-3 partitions, or first the whole model as from_pretrained does. A small model is loaded first, so that
  imports are not counted. ``peak_less_largest_over_share`` is (peak - largest tensor) / what the rank holds at the end;
  above 1.3 for our ways the exit status is 1.
* ``scoring``: what `evaluate` does with a model of 2.2 billion parameters (bf16, 4.4 GB) on one process that holds it
  whole, and on two and four that share it: ``evaluation.ep``, and with it ``evaluation.zero_stage: 3``.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.bench_collect import build
from trace_ds.parallel.environment import free_port

SHAPE = {
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "intermediate_size": 1792,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
LIMIT = 1.3
SCORED_SHAPE = SHAPE | {"num_hidden_layers": 48}
SCORED_TOKENS, SCORED_ROWS = 128, 8
SMALL_SHAPE = SHAPE | {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}


def peak_bytes() -> int:
    """Peak resident memory of this process since :func:`reset_peak` (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def reset_peak() -> int:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def nll_memory(vocabulary: int = 150_000, tokens: int = 4096) -> dict[str, float]:
    """Peak memory of the losses of ``tokens`` tokens, hidden size 256, fp32: all logits, in pieces."""
    import torch

    from trace_ds.models.token_nll import chunked_nll

    generator = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(vocabulary, 256, generator=generator), torch.randn(tokens, 256, generator=generator)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    found = {}
    before = reset_peak()
    pieces = chunked_nll(weight, None, hidden, targets)
    found["chunked_gb"] = (peak_bytes() - before) / 1e9
    before = reset_peak()
    whole = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    found["full_logits_gb"] = (peak_bytes() - before) / 1e9
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
    return found


def loading_memory(world: int = 2) -> dict[str, Any]:
    """Peak host memory of each of ``world`` ranks (one expert-parallel group), our way and by from_pretrained."""
    with tempfile.TemporaryDirectory() as folder:
        me = [sys.executable, __file__, "--folder", folder]
        subprocess.run([*me, "--what", "save-model"], check=True)
        return {
            way: run_ranks([*me, "--what", f"load-{way}"], world) for way in ("share", "share-zero3", "from_pretrained")
        }


def run_ranks(command: list[str], world: int) -> list[Any]:
    """What every rank of a job prints last."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    return [json.loads(process.communicate()[0].strip().splitlines()[-1]) for process in ranks]


def scoring_memory() -> dict[str, Any]:
    """Peak host memory of each rank that scores the same rows: whole, and shared by 2 and 4."""
    with tempfile.TemporaryDirectory() as folder:
        me = [sys.executable, __file__, "--folder", folder]
        subprocess.run([*me, "--what", "save-scored"], check=True)
        ways = {"whole": (1, 1, 0), "ep 2": (2, 2, 0), "ep 2, ZeRO-3": (2, 2, 3), "ep 4, ZeRO-3": (4, 4, 3)}
        return {
            name: run_ranks([*me, "--what", f"score-{ep}-{stage}"], world) for name, (world, ep, stage) in ways.items()
        }


def score_and_measure(folder: Path, ep: int, zero_stage: int) -> dict[str, float]:
    """One rank: the peak while the model is loaded and rows are scored (a small model first, for the imports)."""
    from transformers import PreTrainedTokenizerFast

    from trace_ds.evaluation.language_model import ModelSettings, Sequence, Sharding, loaded
    from trace_ds.models.weight_files import held
    from trace_ds.parallel.world import join

    world = join(threads=1, timeout_minutes=10)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    settings = ModelSettings("bf16", add_bos=False, add_eos=False, batch_rows=2)
    rows = [Sequence(tuple(range(3 + row, 3 + row + SCORED_TOKENS)), 1) for row in range(SCORED_ROWS)]
    for path in (folder / "small", folder):
        before = reset_peak()
        with loaded(str(path), tokenizer, settings, world, Sharding(ep, zero_stage)) as model:
            model.score(rows)
            parameters = list(model.model.parameters())
            share = sum(held(parameter)[0].numel() * parameter.element_size() for parameter in parameters)
            peak = peak_bytes() - before
            del parameters
    return {"share_gb": share / 1e9, "peak_gb": peak / 1e9, "peak_over_share": peak / share}


def save_model(folder: Path, shape: dict[str, Any]) -> None:
    import torch

    for path, chosen in ((folder, shape), (folder / "small", SMALL_SHAPE)):
        model = build("mixtral", chosen, torch.bfloat16, torch.device("cpu"))
        model.save_pretrained(path, max_shard_size="500MB")


def load_and_measure(folder: Path, way: str) -> dict[str, float]:
    """One rank: load, and compare the peak with what is held afterwards (a small model first, for the imports)."""
    from trace_ds.models.weight_files import held
    from trace_ds.parallel.world import join

    world = join(threads=1, timeout_minutes=10)
    engines = [load_engine(folder / "small", way, world)]
    before = reset_peak()
    engines.append(load_engine(folder, way, world))
    parameters = list(engines[1].module.parameters())
    share = sum(held(parameter)[0].numel() * parameter.element_size() for parameter in parameters)
    largest = max(math.prod(getattr(p, "ds_shape", p.shape)) * p.element_size() for p in parameters)
    peak = peak_bytes() - before
    return {
        "share_gb": share / 1e9,
        "largest_tensor_gb": largest / 1e9,
        "peak_gb": peak / 1e9,
        "peak_less_largest_over_share": (peak - largest) / share,
    }


def exceeds(loading: dict[str, list[dict[str, float]]]) -> bool:
    """Whether a rank of one of our ways needed more than :data:`LIMIT` times its share; says so."""
    above = False
    for way, ranks in loading.items():
        worst = max(rank["peak_less_largest_over_share"] for rank in ranks)
        if way.startswith("share") and worst > LIMIT:
            print(f"{way}: {worst:.2f} times the share, more than {LIMIT}", file=sys.stderr)
            above = True
    return above


def load_engine(folder: Path, way: str, world: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from trace_ds.models.autoep import readable_recorders
    from trace_ds.models.engine import base_ds_config
    from trace_ds.models.families import inspect_model
    from trace_ds.models.loading import ModelParts, load_share
    from trace_ds.parallel.world import quiet_deepspeed

    info = inspect_model(folder)
    ds_config = base_ds_config(ep=world.size, info=info, zero_stage=3 if way == "share-zero3" else 0)
    if way == "share-zero3":
        ds_config["bf16"] = {"enabled": True}
    if way.startswith("share"):
        model, _ = load_share(info.path, torch.bfloat16, world, ep=world.size, ds_config=ds_config, parts=ModelParts())
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with readable_recorders():
        return quiet_deepspeed().initialize(model=model.requires_grad_(False), config=ds_config)[0]


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


KINDS = {"nll": nll_memory, "loading": loading_memory, "scoring": scoring_memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    parser.add_argument("--what", default="all", help="all, nll, loading or scoring")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "save-model":
        save_model(arguments.folder, SHAPE)
    elif arguments.what == "save-scored":
        save_model(arguments.folder, SCORED_SHAPE)
        save_tokenizer(arguments.folder)
    elif arguments.what.startswith("score-"):
        ep, stage = map(int, arguments.what.removeprefix("score-").split("-"))
        print(json.dumps(score_and_measure(arguments.folder, ep, stage)), flush=True)
        os._exit(0)
    elif arguments.what.startswith("load-"):
        print(json.dumps(load_and_measure(arguments.folder, arguments.what.removeprefix("load-"))), flush=True)
        os._exit(0)
    elif arguments.what in ("all", *KINDS):
        chosen = KINDS if arguments.what == "all" else (arguments.what,)
        result: dict[str, Any] = {name: KINDS[name]() for name in chosen}
        print(json.dumps(result, indent=None if arguments.json else 1))
        sys.exit(int(exceeds(result.get("loading", {}))))
    else:
        parser.error(f"unknown --what {arguments.what}")


if __name__ == "__main__":
    main()
