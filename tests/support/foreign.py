"""Files of ids as other programs write them, by their own libraries where there is one."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from data_tools.ids import TokenReading

Ids = list[list[int]]
MARK = 3  # the id that ends documents in files that do not say where else
BOS = 0


def marked(documents: Ids) -> list[int]:
    return [i for document in documents for i in [*document, MARK]]


def table(documents: Ids, kind: Any = None) -> Any:
    ids = pyarrow.array(documents, kind or pyarrow.list_(pyarrow.int32()))
    return pyarrow.table({"text": ["…"] * len(documents), "input_ids": ids})


def of_parquet(folder: Path, documents: Ids) -> TokenReading:
    half = len(documents) // 2
    parquet.write_table(table(documents[:half]), folder / "a.parquet", row_group_size=7)
    parquet.write_table(table(documents[half:], pyarrow.large_list(pyarrow.uint16())), folder / "b.parquet")
    return TokenReading()


def of_arrow(folder: Path, documents: Ids) -> TokenReading:
    half = len(documents) // 2
    rows = table(documents[:half]).rename_columns(["text", "ids"])
    with pyarrow.OSFile(str(folder / "a.arrow"), "wb") as file, pyarrow.ipc.new_file(file, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=9)
    rows = table(documents[half:], pyarrow.list_(pyarrow.int64())).rename_columns(["text", "ids"])
    with pyarrow.OSFile(str(folder / "b.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows)
    return TokenReading(column="ids")


def of_datasets(folder: Path, documents: Ids) -> TokenReading:
    """Padded rows with their mask, in two files, and a file of the library's cache that is no part of it."""
    import datasets

    datasets.disable_progress_bars()
    longest = max(map(len, documents))
    rows = {
        "input_ids": [[*ids, *[1] * (longest - len(ids))] for ids in documents],
        "attention_mask": [[1] * len(ids) + [0] * (longest - len(ids)) for ids in documents],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(folder, num_shards=2)
    datasets.load_from_disk(folder).map(lambda row: {"input_ids": row["input_ids"][:1]})
    return TokenReading()


def megatron(path: Path, sequences: Sequence[Sequence[int]], ends: Sequence[int], kind: str = "<u2") -> None:
    """`path`.bin and `path`.idx as Megatron-LM's IndexedDatasetBuilder writes them; documents end before sequences."""
    code = {"<u2": 8, "<i4": 4, "<i8": 5}[kind]
    lengths = np.array([len(ids) for ids in sequences], np.int64)
    pointers = np.concatenate(([0], np.cumsum(lengths)))[:-1] * np.dtype(kind).itemsize
    path.with_suffix(".bin").write_bytes(np.array([i for ids in sequences for i in ids], kind).tobytes())
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(ends) + 1)
    index += lengths.astype("<i4").tobytes() + pointers.astype("<i8").tobytes()
    path.with_suffix(".idx").write_bytes(index + np.array([0, *ends], "<i8").tobytes())


def of_megatron(folder: Path, documents: Ids) -> TokenReading:
    """Documents of two sequences, begun and ended by BOS, in one pair of files; of one sequence each in another."""
    half = len(documents) // 2
    cut = [part for ids in documents[:half] for part in ([BOS, *ids[:2]], [*ids[2:], BOS])]
    megatron(folder / "a", cut, range(2, len(cut) + 1, 2))
    megatron(folder / "b", documents[half:], range(1, len(documents) - half + 1), "<i4")
    return TokenReading()


def of_flat(kind: str) -> Callable[[Path, Ids], TokenReading]:
    def write(folder: Path, documents: Ids) -> TokenReading:
        np.array(marked(documents), kind).tofile(folder / "a.bin")
        return TokenReading(mark=MARK, dtype="uint16" if kind == "<u2" else "uint32")

    return write


def of_numpy(folder: Path, documents: Ids) -> TokenReading:
    """A run of ids whose documents begin with BOS and end with a mark, and one in rows, padded with marks."""
    half = len(documents) // 2
    begun = [i for ids in documents[:half] for i in [BOS, *ids, MARK]]
    np.save(folder / "a.npy", np.array(begun, np.uint32))
    rows = marked(documents[half:])
    np.save(folder / "b.npy", np.array(rows + [MARK] * (-len(rows) % 16), ">i8").reshape(-1, 16))
    return TokenReading(mark=MARK)


def of_rows(folder: Path, documents: Ids) -> TokenReading:
    """Rows of equal length over which documents go on, as they are packed for training."""
    ids = marked(documents)
    rows = [ids[i : i + 32] for i in range(0, len(ids), 32)]
    parquet.write_table(table(rows), folder / "packed.parquet", row_group_size=5)
    return TokenReading(mark=MARK)


WRITERS: dict[str, Callable[[Path, Ids], TokenReading]] = {
    "parquet": of_parquet,
    "arrow": of_arrow,
    "datasets": of_datasets,
    "megatron": of_megatron,
    "uint16": of_flat("<u2"),
    "uint32": of_flat("<u4"),
    "numpy": of_numpy,
    "packed rows": of_rows,
}
