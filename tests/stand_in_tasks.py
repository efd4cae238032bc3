"""
Stand-ins for the 20 tasks of `--tasks paper20`: parquet files with the registered counts, and the splits and
columns of the hub's copies; the pictures are a few kinds of noise a class.

    python tests/stand_in_tasks.py DIR             # 1.2 million pictures of 32 pixels
    bash run_all.sh tiny --tasks paper20 --data DIR --lambdas 6
"""
import io
import sys
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import GROUPS, REGISTERED

COLUMNS = {"cifar10": ("img", "label"), "cifar100": ("img", "fine_label"), "fer2013": ("jpg", "cls")}
KINDS, SIDE = 4, 32                                         # of pictures a class; pixels


def main(folder):
    for number, name in enumerate(GROUPS["paper20"]):
        row, rng = REGISTERED[name], np.random.default_rng(number)
        image, label = COLUMNS.get(name, ("image", "label"))
        kind = datasets.Value("int64") if label == "cls" else datasets.ClassLabel(row.n_classes)
        drawn = [picture(rng, each % row.n_classes) for each in range(KINDS * row.n_classes)]
        for split, n in (("train", row.n_train), (row.test, row.n_test)):
            which = rng.permutation(np.arange(n) % len(drawn))
            columns = {image: [{"bytes": drawn[each], "path": None} for each in which],
                       label: (which % row.n_classes).tolist()}
            rows = datasets.Dataset.from_dict(columns, features=datasets.Features({image: datasets.Image(),
                                                                                   label: kind}))
            rows.to_parquet(folder / name / f"{split}.parquet")
        print(f"{name}: {row.n_train:,} and {row.n_test:,} in {row.n_classes} classes", flush=True)


def picture(rng, each):
    """JPEG bytes: a colour and a direction of stripes by the class, and noise."""
    colour = np.random.default_rng(each).uniform(40, 215, 3)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    stripes = 40 * np.sin(2 * np.pi * (1 + each % 7) * (x * np.cos(each) + y * np.sin(each)))
    pixels = colour + stripes[..., None] + rng.normal(0, 40, (SIDE, SIDE, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
