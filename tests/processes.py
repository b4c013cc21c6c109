"""Tests in several processes that meet by gloo."""

import gc
import os

import torch
from torch import distributed, multiprocessing


def _begin(rank, target, folder, count):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=count)
    torch.save(target(rank, folder), f"{folder}/{rank}.pt")
    gc.collect()  # DDP must not be what the process group ends with: examples/parallel.py says why
    distributed.destroy_process_group()


def found_by(target, folder, count=2):
    """What target(rank, folder) returned in each of the processes."""
    multiprocessing.spawn(_begin, (target, folder, count), nprocs=count)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(count)]
