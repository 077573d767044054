"""A table larger than memory: prepared, trained on and evaluated, with rows a second and peak memory of each.

    python benchmarks/out_of_core.py [--rows 20_000_000] [--evaluated 100_000_000] [--folder DIR] [--smoke]

Memory is what the process holds by itself (RssAnon) and with the parts of files that are mapped (VmHWM), sampled and as the kernel
counts it, over what it held before. One thread. The table has four numbers, a category, two groups and a label; 98 % of it is the
test part, of which group metrics are counted; then they are counted of more rows, written as preparing writes them.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import libmtl_fair as lf
from libmtl_fair.data import cache
from libmtl_fair.data.blocks import BlockLoader
from libmtl_fair.libmtl.losses import task_dict
from libmtl_fair.models import MLP, linear_heads

BATCH = 2**16


def held(name: str) -> float:
    """Return a line of /proc/self/status in MB; NaN where there is none."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024
    return float("nan")


@contextlib.contextmanager
def measured(what: str, rows: int) -> Iterator[None]:
    """Print rows a second, and the most memory that was held within."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before, most, done, began = held("RssAnon"), [0.0], threading.Event(), time.perf_counter()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], held("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    done.set()
    watcher.join()
    took = time.perf_counter() - began
    own = max(most[0], held("RssAnon")) - before
    speed = f"{rows:>12,} rows {took:8.1f} s {rows / took:>12,.0f} rows/s"
    print(f"{what:32} {speed}   own memory +{own:6.0f} MB   peak RSS {held('VmHWM'):6.0f} MB", flush=True)


def write(path: Path, n_rows: int) -> None:
    """Write people part by part."""
    draw, writer = np.random.default_rng(0), None
    for at in range(0, n_rows, 2**20):
        n = min(2**20, n_rows - at)
        x = draw.standard_normal((4, n), dtype=np.float32)
        sex = draw.integers(0, 2, n, dtype=np.int8)
        columns = {f"x{i}": x[i] for i in range(4)}
        columns |= {
            "town": pa.DictionaryArray.from_arrays(draw.integers(0, 3, n, dtype=np.int8), ["a", "b", "c"]).cast(
                pa.string()
            )
        }
        columns |= {"sex": sex, "y": (x[0] + 0.3 * sex + draw.standard_normal(n, dtype=np.float32) > 0).astype(np.int8)}
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def trainer_of(tasks: tuple[lf.Binary, ...], n_features: int) -> lf.FairTrainer:
    return lf.FairTrainer(
        task_dict(tasks), "EW", "HPS", lambda: MLP(n_features, (16,)), linear_heads(tasks, 16), False, False,
        {"optim": "adam", "lr": 1e-2}, None, device="cpu", progress=False, seed=0, select="last",
    )  # fmt: skip


def evaluate(trainer: lf.FairTrainer, loader: lf.ResidentLoader) -> None:
    with measured("group metrics", loader.n_rows):
        found = trainer.group_metrics(loader, confidence=None)
    print(found.query("metric == 'equalized_odds'")[["attribute", "group", "value"]].to_string(index=False))
    counted = found.query("metric == 'count' and group == 'overall'").value.item()
    assert counted == loader.n_rows, counted


def prepared(folder: Path, n_rows: int) -> BlockLoader:
    """Return a loader of rows that are written as preparing a table writes them, without a table."""
    draw, writer = np.random.default_rng(1), cache.Writer(folder)
    for at in range(0, n_rows, 2**20):
        n = min(2**20, n_rows - at)
        x, sex = draw.standard_normal((n, 8), dtype=np.float32), draw.integers(0, 2, n)
        writer.add("x", x)
        writer.add("y", (x[:, 0] + 0.3 * sex > 0).astype(np.float32))
        writer.add("sex", sex)
    writer.finish({"source": ""})
    about = cache.about(folder, "")
    assert about is not None
    found = {name: cache.mapped(folder, name, held) for name, held in about["arrays"].items()}
    maps = [each for _, opened in found.values() for each in opened]
    x, y, sex = (found[name][0] for name in ("x", "y", "sex"))
    how = {"batch_size": BATCH, "shuffle": False, "device": "cpu", "maps": maps}
    return BlockLoader(x, {"y": y}, {"sex": sex}, group_names={"sex": ["0", "1"]}, **how)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=20_000_000, help="of the table")
    parser.add_argument(
        "--evaluated", type=int, default=100_000_000, help="rows of which group metrics are counted at the end"
    )
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    n_rows = 200_000 if args.smoke else args.rows
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "people.parquet"
        with measured("write the table", n_rows):
            write(path, n_rows)
        print(f"{path.stat().st_size / 2**20:,.0f} MB of parquet; before: RSS {held('VmRSS'):.0f} MB")
        with measured("prepare", n_rows):
            data = lf.load_table(
                path, tasks={"y": {"kind": "binary"}}, sensitive=["sex"], split=(0.01, 0.01, 0.98), out_of_core=True
            )  # fmt: skip
        size = sum(each.stat().st_size for each in Path(f"{path}.libmtl_fair").rglob("*"))
        print(f"{size / 2**20:,.0f} MB of cache")
        trainer = trainer_of(data.tasks, data.n_features)
        with measured("train, one epoch", len(data.train)):
            trainer.train(data.train.loader(4096, shuffle=True, seed=0, device="cpu"))
        evaluate(trainer, data.test.loader(BATCH, device="cpu"))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        n_rows = n_rows if args.smoke else args.evaluated
        with measured("write prepared rows", n_rows):
            loader = prepared(Path(folder) / "rows", n_rows)
        evaluate(trainer_of((lf.Binary("y"),), 8), loader)


if __name__ == "__main__":
    main()
