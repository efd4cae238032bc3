"""
Several processes on one study: `torchrun --nproc-per-node N STAGE.py ENCODER ...`, on machines sharing runs/.

The evaluator deals out weight settings or batches, finetune.py tasks and learning rates; rank 0 writes the
results, and they are those of one process. A process on its own passes through all of this without a trace.
"""
import contextlib
import datetime
import os
import signal
import sys

import torch
import torch.distributed as dist


def rank():
    return int(os.environ.get("RANK", 0)) if started() else 0


def world():
    """How many processes torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if started() else 1


def started():
    """Whether processes are told where to meet, as by torchrun; a scheduler may count them without."""
    return "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ


def local_rank():
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def join():
    """Meet the other processes, by gloo also where they have GPUs.

    What passes between them are megabytes; NCCL refuses two processes on one GPU and hangs on some machines.
    """
    if world() > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            print(f"process {rank()} of {world()}, as RANK and WORLD_SIZE say: waiting for the others at "
                  f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", file=sys.stderr, flush=True)
        ended = signal.signal(signal.SIGTERM, signal.SIG_DFL)              # which waiting would not notice
        dist.init_process_group("gloo", timeout=datetime.timedelta(hours=12))
        signal.signal(signal.SIGTERM, ended)
    elif not started() and os.environ.get("WORLD_SIZE", "1") != "1":
        print(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but nothing says where to meet (MASTER_ADDR, "
              f"MASTER_PORT), as torchrun does: one process on its own", file=sys.stderr, flush=True)


def wait():
    """Until every process is here."""
    if world() > 1:
        dist.barrier()


@contextlib.contextmanager
def first(path):
    """Rank 0 goes through the body first; the others follow and find its file or folder `path` there."""
    if rank() > 0:
        wait()
        if path.parent.exists():
            os.listdir(path.parent)                        # NFS remembers for a while that it was not there
    yield
    if rank() == 0:
        wait()


def deal(items):
    """Rounds of one item for each process: this process's, or None where a round has too few."""
    for start in range(0, len(items), world()):
        dealt = items[start:start + world()]
        yield dealt[rank()] if rank() < len(dealt) else None


def add_up(tensors):
    """Sum each tensor over the processes, in place; where all but one hold zeros the result is exact."""
    for tensor in tensors:
        whole = tensor.cpu()
        whole = whole.float() if whole.dtype == torch.bfloat16 else whole      # gloo adds no bfloat16
        dist.all_reduce(whole)
        tensor.copy_(whole)


def gather(value):
    """[value of rank 0, of rank 1, ...], any object that pickles."""
    everything = [value] * world()
    if world() > 1:
        dist.all_gather_object(everything, value)
    return everything


def leave():
    if world() > 1:
        dist.destroy_process_group()
