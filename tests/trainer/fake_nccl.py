"""NCCL without GPUs: threads of one process that know a unique id meet, and bytes go through queues."""

import ctypes
import os
import queue
import threading

import torch

MEETINGS = {}
LOCK = threading.Lock()


class Meeting:
    """`size` ranks that came by one id; rank 0 speaks."""

    def __init__(self, size, patience):
        self.barrier, self.patience = threading.Barrier(size, timeout=patience), patience
        self.wires = [queue.Queue() for _ in range(size)]


def meet(unique, size, rank, patience=5.0):
    with LOCK:
        found = MEETINGS.setdefault(unique, Meeting(size, patience))
    assert len(found.wires) == size
    assert 0 <= rank < size
    found.barrier.wait()  # ncclCommInitRank
    found.barrier.wait()  # the sum of one number each, after which all ranks are known to be there
    return Rank(found, rank)


class Rank:
    def __init__(self, meeting, rank):
        self.meeting, self.rank, self.aborted = meeting, rank, False

    def send(self, tensors):
        assert self.rank == 0
        for tensor in tensors:
            assert tensor.is_contiguous()
            data = ctypes.string_at(tensor.data_ptr(), tensor.nbytes)  # what lies there, as NCCL takes it
            for wire in self.meeting.wires[1:]:
                wire.put(data)

    def receive(self, shape, dtype):
        data = self.meeting.wires[self.rank].get(timeout=self.meeting.patience)
        if data is None:
            raise RuntimeError("NCCL error: the communicator was aborted")
        return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)

    def abort(self):
        self.aborted = True
        for wire in self.meeting.wires:
            wire.put(None)


class Library:
    """Stands for flowrl_kernels.trainer.rollout.nccl.Library; `made` holds every communicator."""

    made = []  # noqa: RUF012

    def unique_id(self):
        return os.urandom(128)

    def join(self, unique, size, device):
        self.made.append(meet(unique, size, 0))
        return self.made[-1]
