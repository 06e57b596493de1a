"""Arrays in files: passes over them leave little of them in memory, and change nothing in what they hold."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from trace_ds.calibration.rows import RowSelections
from trace_ds.corpora.dataset import ROW_SCHEMA, FlatArray, TokenDataset
from trace_ds.run import mapped
from trace_ds.run.files import new_array
from trace_ds.run.mapped import Mapped, open_mapped

FILE_BYTES, RESIDENT_BYTES = 1 << 26, 1 << 22
MOST_BYTES = RESIDENT_BYTES + (6 << 20)  # and the slice in hand, the pages around it, the offsets of rows


def resident_bytes(path: Path) -> int:
    """Of all mappings of a file in this process."""
    total, mine = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, value = line.partition(":")
        if "-" in key.split(" ")[0]:
            mine = line.endswith(str(path))
        elif mine and key == "Rss":
            total += int(value.split()[0]) * 1024
    return total


def write_dataset(path: Path) -> TokenDataset:
    """8.5 million tokens in rows of 1,000, a document a row."""
    tokens = 34 * 250_000
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, ROW_SCHEMA) as writer:
        for start in range(0, tokens, 250_000):
            place = np.arange(start, start + 250_000, dtype=np.int32)
            offsets = np.arange(0, 250_001, 1000, dtype=np.int32)
            columns = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (place, place // 1000)]
            writer.write_batch(pa.record_batch(columns, schema=ROW_SCHEMA))
    return TokenDataset.open(path)


def read_npy(path: Path, check: Callable[[], None]) -> None:
    np.save(path, np.arange(FILE_BYTES // 8))
    array, total = open_mapped(path), 0
    for start in range(0, len(array), 1 << 17):
        total += int(array[start : start + (1 << 17)].sum())
        check()
    assert total == len(array) * (len(array) - 1) // 2


def read_flat_parts(path: Path, check: Callable[[], None]) -> None:
    np.save(path, np.arange(FILE_BYTES // 8))
    whole = open_mapped(path)
    array = FlatArray([whole.part(start, start + 70_001) for start in range(0, len(whole), 70_001)])
    for start in range(0, len(array), 1 << 16):
        assert array[start : start + (1 << 16)][-1] == min(start + (1 << 16), len(array)) - 1
        check()


def read_rows(path: Path, check: Callable[[], None]) -> None:
    counts = np.ones((FILE_BYTES // 4096, 8, 256), np.uint16)
    np.save(path, counts)
    selections = RowSelections((open_mapped(path),), 256, np.zeros((0, 8, 256), np.uint8), np.zeros(0))
    for rows, block in selections.blocks():
        assert block[0, 0] == 1 and rows.stop <= len(counts)
        check()


def read_one_by_one(path: Path, check: Callable[[], None]) -> None:
    """Few bytes each time, but each time other pages."""
    np.save(path, np.arange(FILE_BYTES // 8))
    array = open_mapped(path)
    for place in range(0, len(array), 1 << 12):
        assert array[place] == place
        check() if place % (1 << 18) == 0 else None


def write_npy(path: Path, check: Callable[[], None]) -> None:
    array = new_array(path, np.float64, (FILE_BYTES // 8,))
    for start in range(0, len(array), 1 << 16):
        array[start : start + (1 << 16)] = np.arange(start, start + (1 << 16))
        check()
    for start in range(0, len(array), 1 << 16):
        array[start : start + (1 << 16)] *= 2.0
        check()
    array.flush()
    assert (np.load(path) == 2.0 * np.arange(len(array))).all()


def read_dataset(path: Path, check: Callable[[], None]) -> None:
    """Token ids at random, document ids in order: both lie in one file."""
    dataset = write_dataset(path)
    for start, stop in dataset.spans():
        assert dataset.counted(start, stop).sum() == stop - start - ((stop // 1000) - (start // 1000))
        assert dataset.row(start // 1000 * 577 % dataset.rows).document_ids.min() >= 0
        check()


@pytest.mark.parametrize("work", [read_npy, read_flat_parts, read_rows, read_one_by_one, write_npy, read_dataset])
def test_a_pass_over_a_file_leaves_little_of_it_in_memory(tmp_path: Path, monkeypatch, work) -> None:
    monkeypatch.setattr(mapped, "RESIDENT_BYTES", RESIDENT_BYTES)
    monkeypatch.setattr("trace_ds.calibration.rows.BLOCK_VALUES", 1 << 19)
    found: list[int] = []
    calls, path = itertools.count(), tmp_path / "file.npy"
    work(path, lambda: None if next(calls) % 4 else found.append(resident_bytes(path)))
    assert path.stat().st_size >= FILE_BYTES and len(found) >= 8
    assert 0 < max(found) <= MOST_BYTES


def test_slices_stay_valid_and_results_are_plain(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(mapped, "RESIDENT_BYTES", 1)  # every slice is the last one
    np.save(tmp_path / "a.npy", np.arange(1 << 20))
    array = open_mapped(tmp_path / "a.npy")
    kept = array[1000:2000]
    assert array[5] == 5 and (array[::1000][:3] == [0, 1000, 2000]).all() and (kept == np.arange(1000, 2000)).all()
    plain = (kept, array * 2, np.asarray(array), array[array > 3], pickle.loads(pickle.dumps(array))[1:])
    assert [type(found) for found in plain] == [np.ndarray] * 5 and isinstance(array.sum(), np.integer)
    with pytest.raises(ValueError, match="read-only"):
        array[0:2] = 1
    written = new_array(tmp_path / "b.npy", np.int64, (4, 3))
    mine = written
    mine += 1
    written[1:3] = [[5, 6, 7]]
    written[np.array([0])] = 9
    assert isinstance(mine, Mapped) and written.tolist() == [[9, 9, 9], [5, 6, 7], [5, 6, 7], [1, 1, 1]]
    assert new_array(tmp_path / "none.npy", np.int64, (0, 3))[:].shape == open_mapped(tmp_path / "none.npy")[:].shape


CALIBRATE_ROWS = """
import sys
from pathlib import Path
import numpy as np, scipy.optimize, torch
import trace_ds.calibration.rows as rows_module
from trace_ds.calibration.diagnose import document_sums
from trace_ds.calibration.rows import RowSelections
from trace_ds.calibration.rules import Request, weigh_rows
from trace_ds.config.sections.calibration import CalibrationConfig
from trace_ds.corpora.dataset import TokenMap
from trace_ds.run import mapped
from trace_ds.run.files import new_array

def kib(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])

mapped.RESIDENT_BYTES, rows_module.BLOCK_VALUES = 1 << 22, 1 << 18
folder, rows, layers, experts = Path(sys.argv[1]), 6000, 64, 64
draw = np.random.default_rng(0)
chosen = draw.random((500, layers, experts)).argsort(axis=2)[:, :, :2].astype(np.uint8)
counts = new_array(folder / "rows.npy", np.uint16, (rows, layers, experts))
kinds = draw.multinomial(1023, [1 / experts] * experts, (64, layers)).astype(np.uint16) * 2
for start in range(0, rows, 50):
    counts[start : start + 50] = kinds[draw.integers(0, 64, 50)]
documents = new_array(folder / "documents", np.int32, (rows * 1024,))
for start in range(0, rows, 50):
    documents[start * 1024 : (start + 50) * 1024] = np.arange(start, start + 50).repeat(1024)
tokens = TokenMap(np.arange(rows + 1) * 1024, documents, rows)
scope = np.zeros((layers, experts), bool)
scope[0, :20] = True
scipy.optimize.minimize(lambda x: x @ x, np.ones(2), method="L-BFGS-B")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = kib("VmRSS")
selections = RowSelections((counts,), 2, chosen, np.arange(500) * 100)
retain = selections.sums(np.ones(rows)) / (1023 * rows)
forget = retain * draw.uniform(0.9, 1.1, retain.shape)
made = weigh_rows(Request(CalibrationConfig(), tokens, scope, forget, retain, np.zeros_like(retain)), selections)
document_sums(tokens, made.weight_T)
assert 0.5 <= made.ess < 1.0
print(kib("VmHWM") - before)
"""


def test_weighting_rows_needs_less_memory_than_its_files(tmp_path: Path) -> None:
    """120 MB of files: at most 48 MB (36 measured), of which 16 are the sample for the quantiles of the weights."""
    done = subprocess.run(
        [sys.executable, "-c", CALIBRATE_ROWS, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / 1024 < 48
