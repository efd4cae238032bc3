"""
Task vectors tau_t = theta_t - theta_pre, their size and the angles between them.

    python make_vectors.py vit_b16_dino
    python make_vectors.py tiny --recipe aligned

Reads   runs/ENCODER/pretrained.safetensors, RECIPE/finetuned/TASK.safetensors (finetune.py)
Writes  runs/ENCODER/RECIPE/vectors/TASK.safetensors, vectors.json, vectors.png
Source  arXiv:2511.14569 section 2; the cosine matrix follows Ilharco et al., arXiv:2212.04089
"""
import torch

import common
import encoders
import files


def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    common.add_recipe(parser)
    return parser.parse_args(argv)


def main(args):
    # ------------------------------------------------------------------ what is to be done
    folder, names = encoders.run_folder(args), [name for name, _ in common.task_names(args)]
    recipe_folder, finetune = folder / args.recipe, f"python finetune.py {args.encoder} --recipe {args.recipe}"
    for name in names:
        files.require(recipe_folder / "finetuned" / f"{name}.safetensors", finetune)
    encoder = encoders.load_encoder(args)
    theta_pre = encoders.weights_of(encoder.module)

    # ------------------------------------------------------------------ tau_t, one task at a time
    norm, relative_norm, layers, directions, sources = {}, {}, {}, [], {}
    for name in names:
        theta_t, about = files.load_tensors(recipe_folder / "finetuned" / f"{name}.safetensors", finetune,
                                            theta_pre=encoder.theta_pre, recipe=args.recipe)
        _, tau_t = common.task_vector(theta_pre, theta_t)
        common.save_vector(folder, args.recipe, name, tau_t, about)
        norm[name] = length(tau_t)
        relative_norm[name] = norm[name] / length(theta_pre)
        layers[name] = {layer: length(pick(tau_t, layer)) / length(pick(theta_pre, layer)) for layer in layer_names(theta_pre)}
        directions.append(torch.cat([tau_t[key].flatten() for key in theta_pre]) / norm[name])
        sources[name] = about["sha256"]
        print(f"vector {name}: norm {norm[name]:.4f}, relative to theta_pre {relative_norm[name]:.2e}", flush=True)
    cosine = [[float(a @ b) for b in directions] for a in directions]

    # ------------------------------------------------------------------ results, made anew each time: they cost seconds
    config = {"encoder": args.encoder, "theta_pre": encoder.theta_pre, "recipe": args.recipe, "finetuned": sources}
    result = {"config": config, "machine": files.machine(common.pick_device(args.device)), "tasks": names, "norm": norm,
              "relative_norm": relative_norm, "relative_norm_per_layer": layers, "cosine": cosine}
    files.write_json(recipe_folder / "vectors.json", result)
    draw(recipe_folder / "vectors.png", names, cosine, f"{args.encoder}, {args.recipe}")


def length(tensors):
    """Euclidean norm of a dict of tensors taken as one vector."""
    return sum(tensor.double().square().sum() for tensor in tensors.values()).sqrt().item()


def layer_names(theta):
    """The module names of one and two parts that own weights: blocks.0, blocks.1, ..., patch_embed, norm, cls_token."""
    return list(dict.fromkeys(".".join(key.split(".")[:2]) if key.split(".")[1:2] and key.split(".")[1].isdigit() else key.split(".")[0] for key in theta))


def pick(theta, layer):
    return {key: tensor for key, tensor in theta.items() if key == layer or key.startswith(layer + ".")}


def draw(path, names, cosine, title):
    """The cosine similarity of every pair of task vectors as a matrix with its numbers."""
    fig, axes = common.figure(1.6 + 0.62 * len(names), 1.1 + 0.62 * len(names))
    image = axes.imshow(cosine, cmap="Blues", vmin=0, vmax=1)
    for row, values in enumerate(cosine):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value > 0.6 else "black")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(f"cosine of task vectors\n{title}", fontsize=10)
    fig.colorbar(image, ax=axes, fraction=0.046)
    common.save_figure(path, fig)


if __name__ == "__main__":
    files.run(main, parse_args)
