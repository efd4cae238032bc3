"""
A bundle: the merged encoder, every task's head and a model card in one folder, which needs nothing of this.

    python bundle.py tiny runs/bundle
    python predict.py runs/bundle PICTURE.png
    python bundle.py tiny runs/bundle-ties --name aligned-ties --push USER/NAME

The encoder is one of timm's: timm.create_model("local-dir:FOLDER", pretrained=True), or "hf-hub:USER/NAME"
once it is pushed. The card has the lines that use all heads with nothing but timm and safetensors.

Reads   what predict.py reads, NAME/merged.safetensors (merge_eval.py), NAME/finetuned/ for its size
Writes  FOLDER/model.safetensors, config.json (timm's, and the classes of each task), heads.safetensors
        (TASK.weight, TASK.bias), README.md (the card); with --push the same on the hub
"""
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from common import head_tensors
from lib import flags, pages
from lib.comparisons import percent
from lib.encoders import ENCODERS, build_architecture
from lib.files import Refused, load_tensors
from lib.study import run
from predict import open_merge

EXAMPLE = """\
import json, timm, torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
encoder = timm.create_model("local-dir:FOLDER", pretrained=True).eval()         # or hf-hub:USER/NAME
heads, tasks = load_file("FOLDER/heads.safetensors"), json.load(open("FOLDER/config.json"))["tasks"]
look = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
picture = SQUARE
with torch.no_grad():
    feature = encoder(look(picture)[None])[0]
for task, about in tasks.items():
    scale = feature.norm() if about["normalise"] else 1
    scores = heads[f"{task}.weight"] @ (feature / scale) + heads.get(f"{task}.bias", 0)
    print(task, about["classes"][scores.argmax()], f"{scores.softmax(0).max():.2f}")
"""


def parse_args(argv=None):
    parser = flags.flag_parser(__doc__)
    add = parser.add_argument
    add("encoder", help="as in merge_eval.py")
    add("folder", type=Path, help="where the bundle goes; not there yet")
    add("--name", type=flags.folder_name, default="aligned", help="whose merge.json (default aligned)")
    add("--runs", type=flags.folder, default=Path("runs"), help="where results are (default: runs)")
    add("--push", metavar="USER/NAME", help="upload it to the hub, as whom huggingface_hub is logged in")
    return parser.parse_args(argv)


def main(args):
    # ---------------------------------------------------- open
    opened = open_merge(args.encoder, args.runs, args.name, torch.device("cpu"))
    if args.folder.exists():
        written = args.folder / "README.md"
        if args.push and written.exists() and written.read_text() == card(args, opened):
            push(args.folder, args.push)                   # an upload that failed is tried again
            return
        raise Refused(f"{args.folder} is there already: delete it, or give another folder")
    encoder, merge = opened.encoder, opened.merge
    architecture = encoder.description["architecture"]
    if merge["recipe"]["linear"]:
        raise Refused(f"{args.name} is linearized: its merge is theta_pre and a derivative, "
                      f"no set of weights that timm could load")
    if architecture["library"] != "timm":
        raise Refused(f"{args.encoder} is an encoder of {architecture['library']}, and a bundle's is one of "
                      f"timm's: bundle.py takes timm:NAME")
    made_by = f"python merge_eval.py {args.encoder} --name {args.name}"
    here = opened.folder.parent / args.name
    weights, _ = load_tensors(here / "merged.safetensors", made_by, theta_pre=encoder.fingerprint,
                              best_lambda=merge["best_lambda"])

    # ---------------------------------------------------- write beside its place, then move it there
    place = args.folder.with_name(args.folder.name + ".tmp")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    module = build_architecture(architecture)
    module.load_state_dict(weights, strict=True)
    write_encoder(place, module, encoder, tasks_of(opened))
    heads = {}
    for name, head in opened.heads.items():
        heads |= {f"{name}.{part}": tensor.contiguous() for part, tensor in head_tensors(head).items()}
    save_file(heads, place / "heads.safetensors")
    (place / "README.md").write_text(card(args, opened))
    for path in place.iterdir():                           # safetensors' files are their owner's alone
        path.chmod((place / "README.md").stat().st_mode)
    place.rename(args.folder)

    # ---------------------------------------------------- say, push
    own = sum(path.stat().st_size for path in args.folder.iterdir())
    single = [opened.folder / "finetuned" / f"{name}.safetensors" for name in opened.heads]
    tuned = sum(path.stat().st_size for path in single if path.exists())
    print(f"bundle: {args.folder}, {len(opened.heads)} tasks, {own / 1e6:.1f} MB; their fine-tuned encoders "
          f"are {tuned / 1e6:.1f} MB")
    if args.push:
        push(args.folder, args.push)


def square_of(frame):
    """The expression, in the card's lines, of a picture as its frame makes it a square."""
    picture, shape = 'Image.open("PICTURE").convert("RGB")', f"({frame.side}, {frame.side})"
    method = f"Image.{frame.interpolation.upper()}"
    if frame.squash:
        return f"{picture}.resize({shape}, {method})"
    return f"ImageOps.fit({picture}, {shape}, {method})      # its centre square"


def tasks_of(opened):
    """{task: {"classes", "normalise"}} for config.json."""
    return {name: {"classes": list(map(str, opened.classes[name])), "normalise": head.normalise}
            for name, head in opened.heads.items()}


def write_encoder(folder, module, encoder, tasks):
    """model.safetensors and config.json, as timm writes them for the hub."""
    from timm.models import save_for_hf
    size = (3, encoder.size, encoder.size)
    transform = {"input_size": size, "mean": encoder.mean, "std": encoder.std,
                 "interpolation": encoder.frame.interpolation,
                 "crop_pct": encoder.size / (encoder.frame.side + 0.1),      # which timm rounds down again
                 "crop_mode": "squash" if encoder.frame.squash else "center"}
    save_for_hf(module, folder, model_config={"tasks": tasks}, safe_serialization=True,
                model_args=encoder.description["architecture"]["kwargs"], data_config=transform)


def card(args, opened):
    """The model card: what it is, how good, how it came about, how it is used."""
    merge, encoder = opened.merge, opened.encoder
    rows = []
    for name in opened.heads:
        rows.append({"task": name, "classes": len(opened.classes[name]), "n": merge["test"]["n"][name],
                     "probing (lambda = 0)": percent(merge["test_lambda0"]["tasks"][name]),
                     "one encoder a task": percent(merge["single_task"][name]),
                     "this encoder": percent(merge["test"]["tasks"][name])})
    rows.append({"task": "mean", "n": sum(merge["test"]["n"].values()),
                 "probing (lambda = 0)": percent(merge["test_lambda0"]["absolute"]),
                 "one encoder a task": percent(merge["single_task_mean"]),
                 "this encoder": percent(merge["test"]["absolute"])})
    licence, machine = licence_of(args.encoder), merge["machine"]
    front = ["---", "library_name: timm", "pipeline_tag: image-classification",
             "tags: [timm, task-arithmetic, model-merging]",
             *([f"license: {licence}"] if licence else []), "---"]
    about = (f"One image encoder that serves {len(opened.heads)} tasks: theta_pre + lambda x the "
             f"{merge['rule']} of its task vectors (recipe {merge['recipe']['name']}), lambda = "
             f"{merge['best_lambda']:g}, picked on validation images. Each task has a linear head.")
    made = (f"theta_pre is {args.encoder} (SHA-256 of its weights {encoder.fingerprint[:16]}), licence: "
            f"{licence or 'not stated by timm'}. Test accuracy in percent, by `{merge['command']}` on "
            f"{machine['date']}, {', '.join(f'{key} {machine[key]}' for key in machine if key != 'date')}; "
            f"pictures of {encoder.size} pixels, forward pass in {merge['config']['dtype']}, seed "
            f"{merge['config']['seed']}. Method: arXiv:2511.14569.")
    blocks = [("h1", f"{args.encoder}, {args.name}: one encoder, {len(opened.heads)} tasks"), ("p", about),
              ("table", rows), ("p", made), ("h2", "Use"),
              ("p", "```python\n" + EXAMPLE.replace("SQUARE", square_of(encoder.frame)) + "```")]
    return "\n".join(front) + "\n" + pages.as_markdown(blocks, Path())


def licence_of(encoder_name):
    """What timm says of a checkpoint's licence; None where it says nothing, as of one made here."""
    from timm.models import get_pretrained_cfg
    name = (ENCODERS.get(encoder_name) or encoder_name).removeprefix("timm:")
    config = get_pretrained_cfg(name, allow_unregistered=True)
    return config and config.license


def push(folder, repo):
    """Upload a bundle to the hub."""
    from huggingface_hub import HfApi
    try:
        HfApi().create_repo(repo, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Task addition: one encoder")
    except Exception as error:  # no login, no network: another HTTP library in every major version
        reason = " ".join(str(error).split())[:300]
        raise Refused(f"{folder} is made, but could not be uploaded to {repo} ({reason}): "
                      f"log in with `hf auth login`, or upload the folder by hand") from error
    print(f"bundle: uploaded to {repo}")


if __name__ == "__main__":
    run(main, parse_args)
