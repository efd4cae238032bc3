"""
TF32 without a GPU: how many predictions change where every product of fp32 numbers rounds its factors to ten
bits, at the sum of all vectors and in the corners of a heat map, beside what bf16 changes.

    python tests/tf32.py tiny                     # after run_all.sh; the flags of merge_eval.py
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import merge_eval
from common import Evaluator, mean, sample
from lib.study import open_study, run
from lib.vectors import load_vector

CORNERS = [(1.0, 1.0), (-1.0, 1.0), (3.0, 3.0), (-3.0, 3.0), (2.0, -3.0)]


def to_tf32(x):
    """float32 rounded to TF32's ten bits of mantissa, to the nearest, of two to the even one."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


class Ampere(torch.overrides.TorchFunctionMode):
    """A CPU that multiplies as an A100 does where it may: float32 factors are rounded to TF32."""

    products = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if torch.backends.cuda.matmul.allow_tf32 and function in (
                F.linear, torch.conv2d, F.scaled_dot_product_attention, torch.matmul):
            assert torch.backends.cudnn.allow_tf32
            self.products += 1
            args = [to_tf32(x) if torch.is_tensor(x) and x.dtype == torch.float32 else x for x in args]
        return function(*args, **kwargs or {})


def main(args):
    there = open_study(args, merge_eval.__file__, "finetune.json")
    names, heads = list(there.tasks), list(there.heads.values())
    vectors = [load_vector(there.source, name, there.encoder) for name in names]
    splits = [sample(task.splits["test"], 1000, args.seed) for task in there.tasks.values()]
    lam = [0.1] * len(names)
    n = sum(len(split) for split in splits)
    for label, used, settings in (("all vectors at .1", slice(None), [lam]),
                                  ("two, in the corners", slice(2), CORNERS)):
        found = {}
        for way, dtype, tf32 in (("fp32", torch.float32, False), ("TF32", torch.float32, True),
                                 ("bf16", torch.bfloat16, False)):
            evaluator = Evaluator(there.encoder, there.device, dtype, tf32=tf32)
            evaluator.use_vectors(vectors[used])
            with Ampere():
                found[way] = evaluator.predictions(splits[used], heads[used], settings)
        for way in ("TF32", "bf16"):
            flips = [(ours != fp32).float().mean(1)
                     for ours, fp32 in zip(found[way], found["fp32"], strict=True)]     # (settings,) each
            xi = [2 * mean(task[k].item() for task in flips) for k in range(len(settings))]
            print(f"{label}, {way}: twice the mean share of predictions that are not fp32's "
                  f"{', '.join(f'{share:.4f}' for share in xi)}")
    print(f"n = {n} images of {', '.join(names)}; corners {CORNERS}, n = {sum(map(len, splits[:2]))}")


if __name__ == "__main__":
    run(main, merge_eval.parse_args)
