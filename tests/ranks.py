"""Several gloo ranks on this machine, for tests: `on_ranks(worker, 4)` calls `worker(rank, world)` in four processes.

They are forked from a server that has imported torch's slow parts once.
"""

import multiprocessing
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "flowrl_kernels.modules", "flowrl_kernels.log_partition", "hypothesis"]
)


def _start(rank, worker, world, port):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    worker(rank, world)
    dist.destroy_process_group()


def on_ranks(worker, world):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(_start, args=(worker, world, port), nprocs=world, start_method="forkserver")
