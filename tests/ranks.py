"""Two processes with gloo on the CPU (or NCCL on two GPUs), which run checks of one module together.

    results = together("checks", ["equal", "refused"])   # checks.equal() and checks.refused() on both
    results["equal"]                                      # what rank 0's and rank 1's have returned

A check that raises on one rank alone leaves the other waiting: after `PATIENCE` seconds gloo gives up.
"""

from __future__ import annotations

import datetime
import importlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIZE = 2
# Where the checks of a rank compute.
DEVICE = os.environ.get("RANKS_DEVICE", "cpu")
PATIENCE = 60


def together(module: str, names: Sequence[str], device: str = "cpu") -> dict[str, list[Any]]:
    """What each check returns on each rank; an error is the text of its traceback."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        children = []
        for rank in range(SIZE):
            place = {"RANK": str(rank), "WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            place |= {"OMP_NUM_THREADS": "1", "RANKS_DEVICE": device}
            command = [sys.executable, "-W", "ignore", __file__, folder, module, *names]
            children.append(subprocess.Popen(command, env={**os.environ, **place}))
        try:
            for child in children:
                child.wait(timeout=600)
        finally:
            for child in children:
                child.kill()
                child.wait()
        kept = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(SIZE)]
    return {name: [results[name] for results in kept] for name in names}


def _run(folder: str, module: str, names: Sequence[str]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["RANK"]))
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", timeout=datetime.timedelta(seconds=PATIENCE))
    checks, results = importlib.import_module(module), {}
    for name in names:
        try:
            results[name] = getattr(checks, name)()
        except Exception:
            results[name] = traceback.format_exc()
    (Path(folder) / str(dist.get_rank())).write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _run(*sys.argv[1:3], sys.argv[3:])
