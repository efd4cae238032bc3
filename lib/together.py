"""
Several stages one after the other in one process: what they import (4 s each on a CPU) is imported once.

    python lib/together.py -- probe.py tiny --seed 1 -- finetune.py tiny --seed 1
"""
import gc
import itertools
import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)            # as of the stages themselves


def leave_nothing_behind():
    """What a stage held is let go of before the next begins: locks, memory, compiled code."""
    gc.collect()
    torch = sys.modules["torch"]
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    words = sys.argv[1:]
    for parting, stage in itertools.groupby(words, "--".__eq__):
        if not parting:
            sys.argv = [*stage]
            runpy.run_path(sys.argv[0], run_name="__main__")
            leave_nothing_behind()
