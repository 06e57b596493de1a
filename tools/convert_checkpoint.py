#!/usr/bin/env python3
"""Convert a sharded checkpoint to a Hugging Face model, on any machine.

    python tools/convert_checkpoint.py runs/wmdp/checkpoints/step_000100 model --base-model /models/Mixtral-8x7B-v0.1
    python tools/convert_checkpoint.py runs/wmdp/checkpoints model --tag step_000050 --jobs 4 --verify

``trace-ds convert SOURCE DESTINATION`` without installing trace_ds, for a login node: copy the folders ``tools/`` and
``trace_ds/`` there, side by side. torch, transformers and safetensors must be installed; no DeepSpeed, no GPU, no
process group, no compiler. (The model card then says nothing of the run; everything else is the same.) Exit status:
0 done, 2 the input is wrong (one line says what, where and the fix; nothing is left behind).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trace_ds.errors import UserError

NEEDED = {"torch": "torch>=2.11", "transformers": "transformers>=5.17,<5.25", "safetensors": "safetensors"}


def place(text: str) -> Path:
    return Path(os.path.expanduser(text))  # noqa: PTH111 (which would fail for ~nobody)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Convert a sharded checkpoint to a Hugging Face model: streamed, exact, verified."
    )
    parser.add_argument("source", type=place, help="DeepSpeed checkpoint (any ZeRO stage) or model directory")
    parser.add_argument("destination", type=place, help="new directory")
    parser.add_argument("--tag", help="step below SOURCE (default: what `latest` says)")
    parser.add_argument("--dtype", default="same", help="bf16, fp16, fp32 or same (default)")
    parser.add_argument("--max-shard-size", default="5GB", help="largest safetensors file (default 5GB)")
    parser.add_argument("--jobs", type=int, default=1, help="threads (default 1)")
    parser.add_argument("--base-model", type=place, help="directory with config.json and tokenizer")
    parser.add_argument("--verify", action="store_true", help="read everything again and compare")
    parser.add_argument("--dry-run", action="store_true", help="check, say what would be written, write nothing")
    options = vars(parser.parse_args())
    try:
        from trace_ds.conversion.convert import convert_command

        return convert_command(options.pop("source"), options.pop("destination"), **options)
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return error.exit_status
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        if package not in NEEDED:
            raise
        print(f"error: {error.name} cannot be imported. Fix: pip install '{NEEDED[package]}'", file=sys.stderr)
        return UserError.exit_status


if __name__ == "__main__":
    sys.exit(main())
