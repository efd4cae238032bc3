"""
What do pictures show? One pass through the merged encoder, every task's head on its features.

    python predict.py tiny PICTURE.png FOLDER '2026-*.jpg'
    ls *.jpg | python predict.py tiny - --csv > said.csv
    python predict.py tiny FOLDER --task glyphs --top 1
    python predict.py tiny FOLDER --by finetuned              # theta_t of each task: T passes instead of one
    python predict.py tiny FOLDER --name aligned-ties         # another merge
    python predict.py runs/bundle FOLDER                      # what bundle.py has made, or hf-hub:USER/NAME

A folder gives all pictures below it, `-` the paths on standard input, a line each. A picture that cannot be
read is named, the others go on, and the exit code is 1. What is said of a picture is what merge_eval.py
counted: the same vectors, heads, evaluator. In bf16 a compiled pass may differ from an eager one on a picture
in 500.

Reads   runs/ENCODER/pretrained.safetensors, heads/, NAME/merge.json (merge_eval.py), and NAME/vectors/ of the
        variant that was merged
Writes  nothing; a table, or CSV, to standard output, everything else to standard error
Source  arXiv:2511.14569: one encoder serves all tasks
"""
import csv
import glob
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common import Evaluator, Head, Split, logits
from lib import devices, flags, images, merging
from lib.encoders import Encoder, as_encoder, describe, load_encoder, near, run_folder
from lib.files import Refused, load_tensors, read_json
from lib.hub import checked_download
from lib.linearized import LinearizedEvaluator
from lib.reading import files_below
from lib.study import run
from lib.vectors import head_file, load_vector

BLOCK = 512                                                # pictures decoded at a time


def parse_args(argv=None):
    parser = flags.flag_parser(__doc__)
    add = parser.add_argument
    add("encoder", help="as in merge_eval.py; or a bundle: its folder, or hf-hub:USER/NAME")
    add("pictures", nargs="+", help="files, folders, patterns, or - for paths on standard input")
    add("--task", default="all", help="one task, or several with commas (default all that were merged)")
    add("--name", type=flags.folder_name, default="aligned", help="whose merge.json (default aligned)")
    add("--by", choices=["merged", "finetuned", "pretrained"], default="merged",
        help="merged: one encoder for all tasks; finetuned: theta_t for each; pretrained: theta_pre, probing")
    add("--top", type=flags.positive, default=3, help="classes that are named (default 3)")
    add("--csv", action="store_true", help="lines of picture,task,rank,class,probability")
    add("--runs", type=flags.folder, default=Path("runs"), help="where results are (default: runs)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="of the forward pass")
    add("--compile", choices=["auto", "on", "off"], default="auto",
        help="auto: when the work ahead repays compiling")
    return parser.parse_args(argv)


class Opened(NamedTuple):
    encoder: Encoder
    heads: dict          # {task: Head}
    classes: dict        # {task: [C names]}
    merge: dict          # merge.json; of a bundle None
    folder: Path         # the variant's that was merged, runs/ENCODER/NAME; or the bundle's


def main(args):
    # ---------------------------------------------------- open
    device = devices.pick_device(args.device)
    dtype, _ = devices.pick_dtype(args.dtype, device)
    of_bundle = args.encoder.startswith("hf-hub:") or Path(args.encoder, "heads.safetensors").exists()
    opened = (open_bundle(args.encoder, device) if of_bundle
              else open_merge(args.encoder, args.runs, args.name, device))
    opened, paths = chosen(opened, args.task), list(found(args.pictures))
    passes, words = passes_of(opened, args.by)
    linear = bool(opened.merge and opened.merge["recipe"]["linear"])
    mode = "off" if linear else args.compile
    compiled, why = devices.compile_pays(mode, device, opened.encoder, len(paths) * len(passes))
    evaluator = (LinearizedEvaluator if linear else Evaluator)(opened.encoder, device, dtype, compiled)
    why = (compiled and evaluator.compile_now()) or why
    print(f"predict: {words}; {len(opened.heads)} heads, {str(dtype)[6:]}, "
          f"{'compiled' if evaluator.forward is not evaluator.module else 'eager'} ({why})", file=sys.stderr)

    # ---------------------------------------------------- a block of pictures at a time
    write = csv_lines(sys.stdout) if args.csv else print_lines
    done, start = 0, time.perf_counter()
    for first in range(0, len(paths), BLOCK):
        read, pixels = read_pictures(paths[first:first + BLOCK], opened.encoder.frame)
        rows, splits = by_shape(pixels)
        answers = [{} for _ in read]                       # of each picture {task: [(class, probability)]}
        for tasks, vector, coefficient in passes if read else ():
            evaluator.use_vectors([vector])
            for places, features in zip(rows, evaluator.features(splits, [(coefficient,)]), strict=True):
                for task in tasks:
                    top = classified(features[0], opened.heads[task], opened.classes[task], args.top)
                    for place, named in zip(places, top, strict=True):
                        answers[place][task] = named
        for path, answer in zip(read, answers, strict=True):
            write(path, answer)
        sys.stdout.flush()
        done += len(read)

    # ---------------------------------------------------- say
    seconds = time.perf_counter() - start
    print(f"predict: {done} pictures, passes each: {len(passes)}, {seconds:.1f} s, "
          f"{done / seconds:.0f} img/s (reading included)", file=sys.stderr)
    if done < len(paths):
        print(f"predict: {len(paths) - done} of {len(paths)} could not be read", file=sys.stderr)
        sys.exit(1)


# --------------------------------------------------------------------------------------- what answers


def open_merge(encoder_name, runs, name, device):
    """What merge_eval.py has made of a variant, with the heads of all tasks that were merged.

    Errors  Refused: no merge yet, an encoder of texts
    """
    here = run_folder(runs, encoder_name) / name
    merge = read_json(here / "merge.json", f"python merge_eval.py {encoder_name} --name {name}")
    encoder, folder = load_encoder(encoder_name, runs), here.parent / merge["of"]
    if encoder.takes != "images":
        raise Refused(f"{encoder_name} takes {encoder.takes}, and predict.py reads pictures")
    heads, classes = {}, {}
    for task in merge["test"]["tasks"]:
        path, made_by = head_file(folder, merge["recipe"], task, encoder_name)
        tensors, about = load_tensors(path, made_by, theta_pre=encoder.fingerprint)
        bias = tensors["bias"].to(device) if "bias" in tensors else None
        heads[task] = Head(tensors["weight"].to(device), bias, about["normalise"])
        classes[task] = about["classes"]
    return Opened(encoder, heads, classes, merge, folder)


def open_bundle(source, device):
    """What bundle.py has written, in a folder or on the hub; Refused where it is no such thing."""
    import timm
    from safetensors.torch import load_file
    try:
        folder = on_disk(source)
        module = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        tensors = load_file(folder / "heads.safetensors", device=str(device))
        tasks = json.loads((folder / "config.json").read_text())["tasks"]
        heads = {task: Head(tensors[f"{task}.weight"], tensors.get(f"{task}.bias"), about["normalise"])
                 for task, about in tasks.items()}
        classes = {task: about["classes"] for task, about in tasks.items()}
    except Refused:
        raise
    except Exception as error:  # timm, safetensors and the hub's client raise many types
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise Refused(f"{source} is no bundle that bundle.py has made ({reason})") from error
    size, *config = (module.pretrained_cfg[key] for key in ("input_size", "mean", "std", "crop_pct",
                                                            "interpolation", "crop_mode"))
    description = describe(module, {"name": source}, size[-1], *config, encoder=source)
    encoder = as_encoder(lambda: module, description)
    return Opened(encoder, heads, classes, None, folder)


def on_disk(source):
    """The folder of a bundle, that is one or hf-hub:USER/NAME."""
    if not source.startswith("hf-hub:"):
        return Path(source)
    from huggingface_hub import snapshot_download
    repo = source.removeprefix("hf-hub:")
    with checked_download(repo):
        return Path(snapshot_download(repo))


def chosen(opened, tasks):
    """What is opened with the heads of some tasks only; "all", or names with commas."""
    names = list(opened.heads) if tasks == "all" else tasks.split(",")
    for name in names:
        if name not in opened.heads:
            raise Refused(f"--task: {name} is not among them{near(name, opened.heads, 0.5)} "
                          f"(they are {', '.join(opened.heads)})")
    return opened._replace(heads={name: opened.heads[name] for name in names})


def passes_of(opened, by):
    """([(tasks, vector, coefficient)], which weights these are, in words).

    theta_pre + coefficient * vector answers for the tasks.
    """
    encoder, merge, names = opened.encoder, opened.merge, list(opened.heads)
    if merge is None:
        if by != "merged":
            raise Refused(f"--by {by}: a bundle holds the merged encoder only")
        return [(names, {}, 0.0)], "merged encoder of a bundle"
    if by == "finetuned":
        passes = [([name], load_vector(opened.folder, name, encoder), 1.0) for name in names]
        return passes, "fine-tuned encoders, one for each task"
    if by == "pretrained":
        return [(names, {}, 0.0)], "pre-trained encoder (probing)"
    merged, rule, lam = list(merge["test"]["tasks"]), merge["rule"], merge["best_lambda"]
    vector = merging.merge(rule, opened.folder, merged, encoder, merge["config"]["seed"])
    return [(names, vector, lam)], f"merged encoder ({rule} of {len(merged)} vectors, lambda = {lam:g})"


# --------------------------------------------------------------------------------------- pictures


def found(words):
    """Yield the paths that the command line means: files, folders, patterns, lines of standard input.

    Errors  Refused: a folder without a picture, a pattern that fits nothing
    """
    endings = images.endings()
    for word in words:
        if word == "-":
            yield from filter(None, (line.rstrip("\r\n") for line in sys.stdin))
        elif os.path.isdir(word):
            below = [path for path in files_below(word) if path.suffix.lower() in endings]
            if not below:
                raise Refused(f"{word} holds no picture")
            yield from map(str, below)
        elif glob.has_magic(word) and not os.path.exists(word):
            fitting = sorted(glob.glob(word, recursive=True))
            if not fitting:
                raise Refused(f"no file fits {word}")
            yield from fitting
        else:
            yield word


def read_pictures(paths, frame):
    """([path], [(3, s, s) uint8]) of files, as those of a task are stored; what cannot be read is named."""
    def one(path):
        try:
            return images.as_stored(images.as_seen(Image.open(path)), frame)
        except Exception as error:  # pillow and its codecs raise many types on a broken file
            return f"{type(error).__name__}: {' '.join(str(error).split())}"

    with ThreadPoolExecutor() as pool:
        found = dict(enumerate(pool.map(one, paths)))
    for place in [place for place in found if isinstance(found[place], str)]:
        print(f"predict: {paths[place]} cannot be read: {found.pop(place)}", file=sys.stderr)
    return [paths[place] for place in found], list(found.values())


def by_shape(pixels):
    """([places (n,)], [Split]) of (3, s, s) pictures, those of one size together."""
    places = {}
    for place, picture in enumerate(pixels):
        places.setdefault(picture.shape, []).append(place)
    splits = []
    for rows in places.values():
        stack = np.stack([pixels[row] for row in rows])
        splits.append(Split(stack, np.arange(len(rows)), np.zeros(len(rows), np.int64)))
    return list(places.values()), splits


# --------------------------------------------------------------------------------------- answers


def classified(features, head, classes, top):
    """[[(class, probability)]] of features (N, D): the `top` likeliest classes, the likeliest first."""
    values, places = logits(features, head).softmax(1).topk(min(top, len(classes)))
    rows = []
    for chances, numbers in zip(values.tolist(), places.tolist(), strict=True):
        rows.append([(classes[k], chance) for k, chance in zip(numbers, chances, strict=True)])
    return rows


def print_lines(path, answer):
    """A picture's answers as people read them."""
    print(path)
    width = max(map(len, answer))
    for task, top in answer.items():
        print(f"  {task:<{width}}  " + "   ".join(f"{name} {chance:.2f}" for name, chance in top))


def csv_lines(file):
    """A function that writes a picture's answers as CSV."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["picture", "task", "rank", "class", "probability"])

    def write(path, answer):
        for task, top in answer.items():
            for rank, (name, chance) in enumerate(top, 1):
                writer.writerow([path, task, rank, name, f"{chance:.6f}"])

    return write


if __name__ == "__main__":
    run(main, parse_args)
