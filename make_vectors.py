"""
Task vectors tau_t = theta_t - theta_pre: their size, the angles between them, and the overlap of their subspaces.

    python make_vectors.py vit_b16_dino
    python make_vectors.py tiny --recipe aligned

Reads   runs/ENCODER/pretrained.safetensors, RECIPE/finetuned/TASK.safetensors (finetune.py)
Writes  runs/ENCODER/RECIPE/vectors/TASK.safetensors, vectors.json, vectors.png, overlap.png, overlap_layers.png
Source  arXiv:2511.14569 section 2; the cosine matrix follows Ilharco et al., arXiv:2212.04089. Overlap of two tasks in one layer:
        |U_a^T U_b|^2 / k for the k leading singular directions of the layer's two updates, on the shorter side of the matrix;
        1 for the same subspace, k / d on average for random ones (d the length of that side)
"""
import re

import numpy as np
import torch

import common
import encoders
import files

RANK = 8  # singular directions compared per layer


def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    common.add_recipe(parser)
    return parser.parse_args(argv)


def main(args):
    # ------------------------------------------------------------------ what is to be done
    folder, names = encoders.run_folder(args), [name for name, _ in common.task_names(args)]
    recipe_folder, finetune = folder / args.recipe, f"python finetune.py {args.encoder} --recipe {args.recipe}"
    files.require_rows(recipe_folder / "finetune.json", names, finetune)
    for name in names:
        files.require(recipe_folder / "finetuned" / f"{name}.safetensors", finetune)
    encoder, device = encoders.load_encoder(args), common.pick_device(args.device)
    theta_pre = encoders.weights_of(encoder.module)

    # ------------------------------------------------------------------ tau_t, one task at a time
    files.make_room(recipe_folder, sum((recipe_folder / "finetuned" / f"{name}.safetensors").stat().st_size for name in names), "task vectors")
    norm, relative_norm, layers, directions, sources = {}, {}, {}, [], {}
    changed = [key for key in theta_pre if re.search(common.RECIPES[args.recipe].trained, key)]
    matrices = [key for key in changed if theta_pre[key].ndim >= 2 and min(theta_pre[key].flatten(1).shape) >= 2 * RANK]
    subspaces = {key: [] for key in matrices}
    for name in names:
        theta_t, about = files.load_tensors(recipe_folder / "finetuned" / f"{name}.safetensors", finetune,
                                            theta_pre=encoder.theta_pre, recipe=args.recipe)
        _, tau_t = common.task_vector(theta_pre, theta_t)
        common.save_vector(folder, args.recipe, name, tau_t, about)
        norm[name] = common.length(tau_t)
        if norm[name] == 0:
            raise files.Refused(f"the task vector of {name} is zero: fine-tuning changed nothing, try a larger --lr or more --steps")
        relative_norm[name] = norm[name] / common.length(theta_pre)
        layers[name] = {layer: common.length(pick(tau_t, layer)) / common.length(pick(theta_pre, layer)) for layer in layer_names(tau_t) if common.length(pick(theta_pre, layer)) > 0}
        directions.append(torch.cat([tau_t[key].flatten() for key in tau_t]) / norm[name])
        sources[name] = about["sha256"]
        for key in matrices:
            subspaces[key].append(leading_directions(tau_t[key].flatten(1).to(device if device.type == "cuda" else "cpu"), RANK))
        print(f"vector {name}: norm {norm[name]:.4f}, relative to theta_pre {relative_norm[name]:.2e}", flush=True)
    cosine = [[float(a @ b) for b in directions] for a in directions]
    per_layer = {key: [[float((a.T @ b).square().sum() / RANK) for b in bases] for a in bases] for key, bases in subspaces.items()}
    overlap = [[common.mean(per_layer[key][i][j] for key in matrices) for j in range(len(names))] for i in range(len(names))]
    chance = {key: RANK / min(theta_pre[key].flatten(1).shape) for key in matrices}
    by_chance = common.mean(chance.values())

    # ------------------------------------------------------------------ results, made anew each time: they cost seconds
    config = {"encoder": args.encoder, "theta_pre": encoder.theta_pre, "recipe": args.recipe, "finetuned": sources}
    result = {"config": config} | files.provenance(device) | {"tasks": names, "norm": norm, "relative_norm": relative_norm,
              "relative_norm_per_layer": layers, "cosine": cosine, "subspace_rank": RANK, "subspace_overlap": overlap,
              "subspace_overlap_by_chance": by_chance, "subspace_overlap_per_layer": per_layer, "subspace_overlap_by_chance_per_layer": chance}
    files.write_json(recipe_folder / "vectors.json", result)
    draw(recipe_folder / "vectors.png", names, cosine, f"cosine of task vectors\n{args.encoder}, {args.recipe}")
    draw(recipe_folder / "overlap.png", names, overlap, f"overlap of rank-{RANK} subspaces, {by_chance:.2f} by chance\n{args.encoder}, {args.recipe}")
    draw_layers(recipe_folder / "overlap_layers.png", per_layer, chance, f"overlap of rank-{RANK} subspaces, layer by layer; {args.encoder}, {args.recipe}, tasks {', '.join(names)}")


def leading_directions(matrix, rank):
    """(d, rank) orthonormal: the leading singular directions of a matrix on its shorter side, d long."""
    matrix = matrix.double() if len(matrix) <= len(matrix.T) else matrix.double().T
    return torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]    # eigenvalues ascend


def layer_names(theta):
    """The module names of one and two parts that own weights: blocks.0, blocks.1, ..., patch_embed, norm, cls_token."""
    return list(dict.fromkeys(".".join(key.split(".")[:2]) if key.split(".")[1:2] and key.split(".")[1].isdigit() else key.split(".")[0] for key in theta))


def pick(theta, layer):
    return {key: tensor for key, tensor in theta.items() if key == layer or key.startswith(layer + ".")}


def draw(path, names, matrix, title):
    """A matrix over tasks, values 0 to 1, with its numbers."""
    fig, axes = common.figure(1.6 + 0.62 * len(names), 1.1 + 0.62 * len(names))
    image = axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value > 0.6 else "black")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(title, fontsize=10)
    fig.colorbar(image, ax=axes, fraction=0.046)
    common.save_figure(path, fig)


def draw_layers(path, per_layer, chance, title):
    """One matrix over tasks for every block (the mean over its weights), on one colour scale, with the level of random subspaces."""
    blocks = {layer: list(pick(per_layer, layer)) for layer in layer_names(per_layer)}
    columns = min(6, len(blocks))
    rows = -(-len(blocks) // columns)
    fig, panels = common.figure(1.9 * columns + 0.8, 2.1 * rows + 0.4, rows, columns)
    panels = np.atleast_1d(panels).ravel()
    for axes, (layer, keys) in zip(panels, blocks.items()):
        matrix = np.mean([per_layer[key] for key in keys], axis=0)         # (T, T)
        image = axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
        off = matrix[~np.eye(len(matrix), dtype=bool)]
        pairs = f"pairs {off.mean():.2f}, " if len(off) else ""
        axes.set_title(f"{layer}\n{pairs}chance {np.mean([chance[key] for key in keys]):.2f}", fontsize=8)
    for axes in panels:
        axes.set_axis_off()
    fig.suptitle(title, fontsize=8)
    fig.colorbar(image, ax=list(panels), fraction=0.03)
    common.save_figure(path, fig)


if __name__ == "__main__":
    files.run(main, parse_args)
