"""How much of the networks that people use can be pruned, and whether what is pruned is right.

    python -m benchmarks.zoo [--family torchvision|segmentation|detection|video|timm|mtcnn] [NAME …] [--minutes 30]
    python -m benchmarks.zoo --again 'timm/*vit*'        what an older version of the code has judged, once more
    python -m benchmarks.zoo --table | --report | --draw FILE

Every network of a family (all families by default) with random weights, those of facenet-pytorch with their real ones,
in a process of its own with a time limit: capture, groups with their proofs, a cut of 30 % of every group, the cut
network against the masked dense one, one training step, ONNX, ONNX Runtime against torch, the ONNX narrowed from the
dense one against the one exported from the pruned network, and Torch-Pruning on the same network by the same test.
One JSON line a network in benchmarks/results/zoo.jsonl; a network that is there is not run again.

Needs the extra `bench`, installed with --no-deps beside a CPU build of torch, and for the family `mtcnn`
`pip install --no-deps facenet-pytorch==2.6.0` (its wheel asks for numpy below 2 and torch below 2.3, and runs without).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import resource
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.coupling import depgraph, networks, table
from benchmarks.coupling.steps import Record, judge
from benchmarks.coupling.table import Key, Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "zoo.jsonl"
PARTS = ("depgraph", "networks", "steps")
JUDGING = ("pipeline/prune/**/*.py", "pipeline/graph/**/*.py", *(f"benchmarks/coupling/{name}.py" for name in PARTS))
"""The code that a row depends on."""


def main() -> None:
    """Fill the table, or show it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--family", choices=sorted(networks.families()))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--limit", type=float, default=120, help="seconds for one network")
    parser.add_argument("--theirs", type=float, default=60, help="seconds for Torch-Pruning on it, counted from there")
    parser.add_argument("--gib", type=float, default=8, help="memory that the process of one network may have")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further network after these")
    parser.add_argument(
        "--again", metavar="PATTERN", help="run FAMILY/NAME like this that older code judged, or that was stopped"
    )
    parser.add_argument("--beside", metavar="REMARK", help="what else the machine did, kept with the seconds")
    parser.add_argument("--report", action="store_true", help="counts, and what freezes most")
    parser.add_argument("--table", action="store_true", help="totals and one line a network, as Markdown")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="seconds against number of layers, as a picture")
    parser.add_argument("--one", action="store_true", help="run one network here and print its line")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.report:
        print(table.report(load(RESULTS)))
    elif args.table:
        print(table.markdown(load(RESULTS)))
    elif args.draw:
        table.draw(load(RESULTS), args.draw)
    elif args.one:
        *_, row = steps(args.family or "torchvision", args.names[0], args.size)
        print(json.dumps(row))
    else:
        bound(args.gib)
        end = time.monotonic() + 60 * args.minutes
        for family, name in waiting(load(RESULTS), args.family, args.names, args.again):
            if time.monotonic() > end:
                break
            row = _apart(family, name, args.size, (args.limit, args.theirs))
            keep(RESULTS, row | ({"beside": args.beside} if args.beside else {}))


def bound(gib: float) -> None:
    """No process from here on takes more memory, so that a network that runs out of it says so and harms no other."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30), hard))


def waiting(rows: dict[Key, Row], family: str | None, names: list[str], again: str | None) -> list[Key]:
    """What is to be run: what has no row yet, or with a pattern what older code has judged or what was stopped."""
    every = [(f, name) for f, list_names in networks.families().items() if family in (None, f) for name in list_names()]
    chosen = [key for key in every if not names or key[1] in names]
    if again is None:
        return [key for key in chosen if key not in rows]
    return [key for key in chosen if key in rows and _old(rows[key]) and fnmatch("/".join(key), again)]


def _old(row: Row) -> bool:
    """Whether another run may say something else."""
    stopped = "failed" in row or row.get("torch_pruning", {}).get("outcome") in ("late", "absent")
    return stopped or row.get("code") != version()


@cache
def version() -> str:
    """Digest of the code that judges."""
    files = sorted(path for pattern in JUDGING for path in ROOT.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


# --- one network ---------------------------------------------------------------------------------------------------


def steps(family: str, name: str, size: int) -> Iterator[Row]:
    """The row of a network when ours is done, and again with Torch-Pruning's column."""
    record = Record(family=family, name=name, code=version())
    model, example = networks.build(family, name, size)
    network = judge(record, model, example, trained=family in networks.TRAINED)
    yield dict(record)
    yield record | {"torch_pruning": depgraph.judge(model, example, network)}


def _apart(family: str, name: str, size: int, limits: tuple[float, float]) -> Row:
    """One network in a process of its own, forked so that the libraries are loaded once.

    limits: seconds for our steps, and for Torch-Pruning after them.
    """
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    start = time.monotonic()
    child = fork.Process(target=_send, args=(theirs, family, name, size), daemon=True)
    child.start()
    theirs.close()
    row: Row = {"family": family, "name": name, "code": version()}
    why = ""
    for limit in limits:
        if not ours.poll(limit):
            why = f"more than {limit:.0f} s"
            child.kill()
            break
        try:
            row |= ours.recv()
        except EOFError:
            child.join()
            why = f"ended with {child.exitcode}"
            break
        if "failed" in row:
            break
    child.join()
    if why:
        row |= {"torch_pruning": {"outcome": "late", "reason": why}} if "captured" in row else {"failed": why}
    return row | {"total_s": round(time.monotonic() - start, 1)}


def _send(pipe: Connection, family: str, name: str, size: int) -> None:
    try:
        for row in steps(family, name, size):
            pipe.send(row)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is the result
        pipe.send({"failed": f"{type(error).__name__}: {error}"[:300]})
    pipe.close()


# --- the rows ------------------------------------------------------------------------------------------------------


def load(path: Path) -> dict[Key, Row]:
    """The rows as they are stored, the last line of a network counts."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {(row["family"], row["name"]): row for row in rows}


def keep(path: Path, row: Row) -> None:
    """Write one line in the place of the network's older one, and show it in short."""
    rows = load(path) | {(row["family"], row["name"]): row}
    fresh = path.with_suffix(".new")  # a run that is stopped here leaves the table whole
    fresh.write_text("".join(json.dumps(r, sort_keys=True) + "\n" for _, r in sorted(rows.items())))
    fresh.replace(path)
    errors = {key: value for key, value in row.items() if key.endswith("_error") or key == "failed"}
    short = {key: row.get(key) for key in ("offered", "macs_removed_at_30", "macs_touched", "cut_equal", "onnx_equal")}
    theirs = row.get("torch_pruning", {})
    print(f"{row['name']:32} {row.get('total_s', 0):6} s  {short}  narrow {row.get('narrow_equal')}", flush=True)
    print(f"      Torch-Pruning {theirs}")
    for key, value in (row.get("leaves") or {}).items():
        print(f"      leaf {key}: {value}")
    if row.get("refuted"):
        print(f"      refuted {row['refuted']}")
    for key, value in errors.items():
        print(f"      {key}: {value}", flush=True)


if __name__ == "__main__":
    main()
