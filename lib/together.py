"""
Several stages one after the other in one process: libraries (4 s of a CPU for each stage) are imported once.

    python lib/together.py -- probe.py tiny --seed 1 -- finetune.py tiny --seed 1
"""
import gc
import itertools
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)                                    # as of the stages themselves


def leave_nothing_behind():
    """What a stage held is let go of before the next begins: our own modules, locks, memory, compiled code.

    A stage writes down the code that it finds on disk, which may be edited while the study runs.
    """
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name == "lib" or file and name != "__main__" and Path(file).parent in (ROOT, ROOT / "lib"):
            del sys.modules[name]
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
