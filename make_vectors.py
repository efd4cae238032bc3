"""
Task vectors tau_t = theta_t - theta_pre: their size, the angles between them, the overlap of their subspaces.

    python make_vectors.py tiny
    python make_vectors.py vit_b16_dino --name full
    python make_vectors.py vit_b16_dino --from dtd=checkpoint.pth svhn=OWNER/NAME    # fine-tuned elsewhere

Reads   runs/ENCODER/pretrained.safetensors, NAME/finetuned/TASK.safetensors, finetune.json (finetune.py)
Writes  runs/ENCODER/NAME/vectors/TASK.safetensors, vectors.json, vectors.png, overlap.png, overlap_layers.png
Source  arXiv:2511.14569 section 2; the cosine matrix follows Ilharco et al., arXiv:2212.04089.
        Overlap of two tasks in one layer: |U_a^T U_b|^2 / k for the k leading singular directions of the
        layer's two updates, on the shorter side of the matrix; 1 for the same subspace, k / d on average for
        random ones (d the length of that side)
"""
import re

import numpy as np
import torch

from common import PROBES, mean
from lib import flags, plots, ranks
from lib.devices import make_room
from lib.encoders import weights_of
from lib.files import Refused, file_metadata, load_tensors, require
from lib.study import open_study, run
from lib.vectors import by_name, norm, save_vector, task_vector, theta_fingerprint

RANK = 8  # singular directions compared per layer
# parameters' names begin so: in transformers, else with one word and perhaps a number
BLOCK = re.compile(r"(model\.)?(en|de)coder\.(layer|block)\.\d+|model\.[^.]+|[^.]+(\.\d+(?=\.|$))?")


def parse_args(argv=None):
    parser = flags.stage_parser(__doc__)
    flags.add_name(parser)
    add = parser.add_argument
    add("--from", nargs="+", dest="checkpoints", metavar="NAME=CHECKPOINT",
        help="encoders fine-tuned elsewhere, of tasks that are probed: a file, a folder or OWNER/NAME of the "
             "hub each, or one with {} where the name of each of --tasks is (default: what finetune.py has "
             "made)")
    add("--head", choices=["probed", "own", "text"], default="probed",
        help="of those encoders: probe.py's (default), their own classifier, or one of class names")
    add("--probe", choices=PROBES, default="paper", help="which of probe.py's heads (default paper)")
    args = parser.parse_args(argv)
    if args.checkpoints:
        args.name = args.name or "brought"
    elif args.head != "probed" or args.probe != "paper":
        parser.error("--head and --probe are for --from: finetune.json says what finetune.py trained against")
    if args.checkpoints and args.of:
        parser.error("--from makes a variant of its own: leave out --of")
    return args


def main(args):
    # ---------------------------------------------------- open
    if args.checkpoints:
        from lib.brought import bring
        bring(args, __file__)
    study = open_study(args, __file__, "finetune.json")
    names, recipe, theta_pre = list(study.sources), study.recipe, weights_of(study.encoder.module)
    tuned, fingerprints = fine_tuned_files(study)
    pictures = [study.here / f"{stem}.png" for stem in ("vectors", "overlap", "overlap_layers")]
    vectors = [study.here / "vectors" / f"{name}.safetensors" for name in names]
    result = study.result("vectors.json", {"recipe": recipe, "finetuned": fingerprints},
                          files=lambda row: pictures, weights=lambda row: vectors)
    if not result.todo:
        return
    make_room(study.here, sum(path.stat().st_size for path in tuned.values()), "task vectors")

    # ---------------------------------------------------- tau_t, one task at a time
    norms, relative_norms, layers, norm_pre = {}, {}, {}, norm(theta_pre)
    for name in names:
        theta_t, about = load_tensors(tuned[name], study.made_by, theta_pre=study.encoder.fingerprint,
                                      recipe=recipe)
        _, tau_t = task_vector(theta_pre, theta_t)
        save_vector(study.here, tau_t, about)
        norms[name] = norm(tau_t)
        if norms[name] == 0:
            raise Refused(f"the task vector of {name} is zero: fine-tuning changed nothing, "
                          f"try a larger --lr or more --steps")
        relative_norms[name] = norms[name] / norm_pre
        layers[name] = relative_norms_of_layers(tau_t, theta_pre)
        print(f"vector {name}: norm {norms[name]:.4f}, relative to theta_pre {relative_norms[name]:.2e}",
              flush=True)

    # ---------------------------------------------------- angles, and overlap of subspaces, tensor by tensor
    ranks.wait()                                           # until rank 0 has written them
    products, overlaps = torch.zeros(len(names), len(names), dtype=torch.float64), {}
    for key, updates in by_name([(path, study.made_by) for path in vectors]):
        products += inner_products(updates)
        large = updates[0].ndim >= 2 and min(updates[0].flatten(1).shape) >= 2 * RANK
        if large and all(update.any() for update in updates):
            device = study.device if study.device.type == "cuda" else "cpu"
            bases = [leading_directions(update.flatten(1).to(device), RANK) for update in updates]
            overlaps[key] = pairwise(overlap_of, bases)                                # (T, T)
    cosine = cosines(products)                                                         # (T, T)
    per_layer = {key: overlaps[key] for key in theta_pre if key in overlaps}
    overlap = np.mean(list(per_layer.values()), axis=0).tolist() if per_layer else None
    chance = {key: RANK / min(theta_pre[key].flatten(1).shape) for key in per_layer}
    by_chance = mean(chance.values()) if per_layer else None

    # ---------------------------------------------------- save
    with result.saving():
        result.values = {
            "tasks": names, "norm": norms, "relative_norm": relative_norms, "relative_norm_per_layer": layers,
            "cosine": cosine, "subspace_rank": RANK,
            "subspace_overlap": overlap, "subspace_overlap_by_chance": by_chance,
            "subspace_overlap_per_layer": per_layer, "subspace_overlap_by_chance_per_layer": chance,
            "cosine_of_pairs": of_pairs(cosine), "overlap_of_pairs": of_pairs(overlap) if per_layer else None}
        title = f"{args.encoder}, {study.name}"
        plots.task_matrix(pictures[0], names, cosine, f"cosine of task vectors\n{title}")
        if per_layer:
            plots.task_matrix(pictures[1], names, overlap,
                              f"overlap of rank-{RANK} subspaces, {by_chance:.2f} by chance\n{title}")
            plots.layer_matrices(pictures[2], by_block(per_layer), by_block(chance),
                                 f"overlap of rank-{RANK} subspaces, layer by layer; {title}, "
                                 f"tasks {', '.join(names)}")


def fine_tuned_files(study):
    """({task: file of theta_t}, {task: its SHA-256}); Refused: missing, not what finetune.json describes."""
    tuned, fingerprints = {}, {}
    for name in study.sources:
        tuned[name] = study.source / "finetuned" / f"{name}.safetensors"
        require(tuned[name], study.made_by)
        fingerprints[name] = file_metadata(tuned[name], study.made_by)["sha256"]
        if fingerprints[name] != theta_fingerprint(study.finetuned, name):
            raise Refused(f'{tuned[name]} is not what finetune.json describes: run "{study.made_by}" first')
    return tuned, fingerprints


def leading_directions(matrix, rank):
    """(d, rank) orthonormal: the leading singular directions of a matrix on its shorter side, d long."""
    matrix = matrix.double() if len(matrix) <= len(matrix.T) else matrix.double().T
    return torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]    # eigenvalues ascend


def overlap_of(a, b):
    """|a^T b|^2 / k of two subspaces, (d, k) orthonormal each: 1 where they are the same."""
    return float((a.T @ b).square().sum() / a.shape[1])


def inner_products(tensors):
    """(T, T) inner products of T tensors of one shape, float32, summed in double."""
    products = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    for pieces in zip(*[tensor.flatten().split(2 ** 20) for tensor in tensors], strict=True):
        block = torch.stack(pieces).double()               # (T, at most 2^20)
        products += block @ block.T
    return products


def cosines(products):
    """(T, T) cosines of T vectors as lists, from their inner products."""
    lengths = products.diagonal().sqrt()
    return (products / torch.outer(lengths, lengths)).tolist()


def pairwise(function, items):
    """(T, T) values of a function of two of T items."""
    matrix = []
    for a in items:
        matrix.append([function(a, b) for b in items])
    return matrix


def of_pairs(matrix):
    """{"mean", "max"} of a symmetric (T, T) matrix over pairs of tasks; None for one task."""
    values = np.array(matrix)[np.triu_indices(len(matrix), 1)]
    return {"mean": float(values.mean()), "max": float(values.max())} if len(values) else None


def block_of(key):
    """The block that owns a parameter: blocks.0, encoder.layer.0, ..., patch_embed, norm, cls_token."""
    return BLOCK.match(key)[0]


def by_block(per_parameter):
    """{block: mean over its parameters} of {parameter: number or matrix}."""
    blocks = {}
    for key, value in per_parameter.items():
        blocks.setdefault(block_of(key), []).append(value)
    return {block: np.mean(values, axis=0) for block, values in blocks.items()}


def relative_norms_of_layers(tau_t, theta_pre):
    """{block: norm of its update / norm of its pre-trained weights}."""
    norms = {}
    for block in dict.fromkeys(map(block_of, tau_t)):
        before = norm({key: tensor for key, tensor in theta_pre.items() if block_of(key) == block})
        if before > 0:
            norms[block] = norm({key: tensor for key, tensor in tau_t.items()
                                 if block_of(key) == block}) / before
    return norms


if __name__ == "__main__":
    run(main, parse_args)
