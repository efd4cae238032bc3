"""
Every table and figure over everything in runs/, ours beside the published numbers.

    python report.py                                             # all encoders and recipes found in runs/
    python report.py --runs runs --seeds runs-seed1 runs-seed2   # mean and deviation over seeds, each in a folder of its own

Reads   runs/*/probe.json, runs/*/RECIPE/*.json, the heat maps' A-B.npz
Writes  runs/report/report.md, report.html (one self-contained page), *.png
Source  arXiv:2511.14569 Tables 1, 3, 4 and Figures 1 to 9; arXiv:2407.07089 Tables 2, 4, 5 and Figures 3, 5, 6, 8, 9, 10
"""
import base64
import html
import os
import shlex
import zipfile
from pathlib import Path

import numpy as np

import common
import files
import text_heads

# Published averages over the paper's eight tasks, percent; the last column is lambda. None: not legible in the source.
PAPER = {
    "aligned": ("Table 1", ["probing", "single task", "addition", "normalized", "lambda"], {
        "vit_b16_sup_in1k": (72.1, 90.0, 73.8, 82.0, 0.05), "vit_b16_sup_in21k": (80.7, 91.7, 81.7, 89.3, 0.05),
        "vit_b16_mae": (62.8, 84.5, 63.1, 73.0, 0.05), "vit_b16_dino": (82.2, 90.6, 82.2, 90.9, 0.00),
        "vit_b16_clip_laion400m": (86.3, 92.9, 89.8, 94.9, 0.10), "vit_b16_clip_laion2b": (86.0, 92.6, 89.6, 94.5, 0.15),
        "vit_l16_sup_in21k": (80.3, 92.2, 83.4, 90.8, 0.05), "vit_l14_clip_laion2b": (90.8, 95.8, 92.6, 96.7, 0.15)}),
    "full": ("Table 3", [None, "single task", "addition", "normalized", "lambda"], {
        "vit_b16_sup_in1k": (None, 87.9, 44.5, 46.5, 0.35), "vit_b16_sup_in21k": (None, 90.2, 55.5, 58.5, 0.25),
        "vit_b16_mae": (None, 82.1, 25.3, 26.9, 0.25), "vit_b16_dino": (None, 87.9, 27.9, 28.8, 0.25),
        "vit_b16_clip_laion400m": (None, 91.6, 45.8, 47.1, 0.30), "vit_b16_clip_laion2b": (None, 92.0, 47.0, 48.2, 0.30),
        "vit_l16_sup_in21k": (None, 90.9, 59.9, 62.2, 0.25), "vit_l14_clip_laion2b": (None, 94.1, 70.9, 72.9, 0.40)}),
    "zeroshot": ("Table 4, encoder", ["zero-shot", "single task", "addition", "normalized", "lambda"], {
        "vit_b16_clip_laion2b": (54.42, 91.36, 72.36, None, None)}),
    "zeroshot-full": ("Table 4, full", ["zero-shot", "single task", "addition", "normalized", "lambda"], {
        "vit_b16_clip_laion2b": (54.42, 91.63, 71.16, 75.89, 0.25)}),
}
WHAT_MAKES = {"finetune.json": "finetune.py", "vectors.json": "make_vectors.py", "merge.json": "merge_eval.py",
              "disentangle.json": "disentangle.py", "scaling.json": "merge_eval.py --subsets 5"}
SECOND_PAPER = ["attention", "attention-bias", "attention-mlp", "attention-mlp-bias", "linearized"]
MORE = {"posthoc.json": "posthoc.py", "representation.json": "disentangle.py --metric representation"}  # for recipes of the second paper
PAPER_2 = [  # arXiv:2407.07089 Tables 2 and 5: eight tasks, zero-shot heads, percent: encoder, what trains, single task, addition, normalized
    ("CLIP ViT-B/32", "all (as aligned)", None, 70.0, 77.04), ("CLIP ViT-B/32", "linearized", None, 76.26, 85.82), ("CLIP ViT-B/32", "attention", 89.55, 78.37, 87.42),
    ("CLIP ViT-B/32", "attention-bias", 89.48, 77.71, 86.79), ("CLIP ViT-B/32", "attention-mlp", 88.95, 76.52, 86.11), ("CLIP ViT-B/32", "attention-mlp-bias", 89.43, 77.8, 86.93),
    ("CLIP ViT-B/16", "all (as aligned)", None, 74.75, 80.59), ("CLIP ViT-B/16", "linearized", None, 79.01, 86.32), ("CLIP ViT-B/16", "attention", None, 80.44, 87.25),
    ("CLIP ViT-L/14", "all (as aligned)", None, 84.4, 89.47), ("CLIP ViT-L/14", "linearized", None, 85.53, 91.44), ("CLIP ViT-L/14", "attention", None, 87.91, 93.66)]
COMPARISONS = [("data size", "vit_b16_sup_in1k", "vit_b16_sup_in21k"), ("data size", "vit_b16_clip_laion400m", "vit_b16_clip_laion2b"),
               ("model scale", "vit_b16_sup_in21k", "vit_l16_sup_in21k"), ("model scale", "vit_b16_clip_laion2b", "vit_l14_clip_laion2b")]


def parse_args(argv=None):
    parser = files.flag_parser(__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of results (default runs)")
    parser.add_argument("--seeds", type=Path, nargs="+", default=[], help="other folders with the same study under other seeds")
    return parser.parse_args(argv)


def main(args):
    # ------------------------------------------------------------------ what is there: {(encoder, recipe): {file: result}}
    found, probes, folders = {}, {}, {}
    for path in sorted(args.runs.glob("*/probe.json")):
        probe = files.read_json(path, "python probe.py ENCODER")
        probes[probe["encoder"]], folders[probe["encoder"]] = probe, path.parent
        for recipe in common.RECIPES:
            results = {name: files.read_json(path.parent / recipe / name, f"python {script} {probe['encoder']} --recipe {recipe}")
                       for name, script in (WHAT_MAKES | MORE).items() if (path.parent / recipe / name).exists()}
            if results:
                found[probe["encoder"], recipe] = results
    if not probes:
        raise files.Refused(f'no results in {args.runs} ({args.runs}/*/probe.json): run "bash run_all.sh" or "python probe.py ENCODER" first')
    merges = {key: results["merge.json"] for key, results in found.items() if "merge.json" in results}
    out, blocks = args.runs / "report", [("heading", "Task addition in closed-vocabulary vision models")]

    # ------------------------------------------------------------------ the tables of accuracies, ours and the paper's
    tables = []
    for recipe, (paper_table, columns, published) in PAPER.items():
        header = ["encoder", "", "tasks", "n", *[column for column in columns if column]]
        rows = []
        for (encoder, other), merge in merges.items():
            if other == recipe:
                rows += accuracy_rows(encoder, merge, found[encoder, recipe].get("finetune.json"), recipe, columns, published.get(encoder))
        if rows:
            table = [("heading2", f"{recipe}: {', '.join(column for column in columns if column)} (arXiv:2511.14569 {paper_table})"), ("table", header, rows)]
            tables += table
    if tables:
        blocks += [("text", "Test accuracy in percent, mean over tasks, n test images in all; normalized is the mean over tasks of merged / single-task accuracy.")]
    blocks += tables

    # ------------------------------------------------------------------ mean and deviation over seeds
    rows = []
    for (encoder, recipe), merge in merges.items():
        others = [folder / folders[encoder].name / recipe / "merge.json" for folder in args.seeds]
        seeded = [merge, *(files.read_json(path, f"python merge_eval.py {encoder} --recipe {recipe} --runs {path.parents[2]}") for path in others if path.exists())]
        if len(seeded) > 1:
            columns = [[one["test_lambda0"]["absolute"], common.mean(one["single_task"].values()), one["test"]["absolute"], one["test"]["normalized"]] for one in seeded]
            rows.append([encoder, recipe, len(seeded), *[f"{100 * np.mean(column):.1f} +- {100 * np.std(column, ddof=1):.1f}" for column in zip(*columns)],
                         ", ".join(f"{one['best_lambda']:g}" for one in seeded)])
    if rows:
        blocks += [("heading2", "Over seeds"), ("text", "Mean and standard deviation of the test figures above; the seed reaches everything but the validation split."),
                   ("table", ["encoder", "recipe", "seeds", "lambda = 0", "single task", "addition", "normalized", "lambda"], rows)]

    # ------------------------------------------------------------------ figures over all encoders and recipes
    pictures = []
    if merges:
        pictures.append((draw_curves(out / "curves.png", merges), "Normalized validation accuracy against lambda; lambda = 0 is probing where the head is probed."))
    scalings = {key: results["scaling.json"] for key, results in found.items() if "scaling.json" in results}
    if scalings:
        caps = {result["config"]["images_per_task"] or "all" for result in scalings.values()}
        caption = f"Normalized test accuracy against the number of merged tasks, lambda picked for each subset; validation and test images per task at most: {', '.join(map(str, caps))}."
        pictures.append((draw_scalings(out / "scaling.png", scalings), caption))
        for what, *compared in COMPARISONS:
            chosen = {key: result for key, result in scalings.items() if key[0] in compared and key[1] == "aligned"}
            if len(chosen) == 2:
                pictures.append((draw_scalings(out / f"scaling-{'-'.join(compared)}.png", chosen), f"The same, {what}: {' and '.join(compared)}."))
        similarity = {key: pair_similarity(scalings[key], found[key]["vectors.json"]) for key in scalings if "vectors.json" in found[key]}
        if any(similarity.values()):
            pictures.append((draw_similarity(out / "pairs.png", similarity), "Merging two tasks: normalized accuracy against the cosine of the two vectors."))
    for pair in sorted({pair for results in found.values() for pair in results.get("disentangle.json", {"pairs": {}})["pairs"]}):
        grids = {key: folders[key[0]] / key[1] / "disentangle" / f"{pair}.npz" for key, results in found.items()
                 if pair in results.get("disentangle.json", {"pairs": {}})["pairs"]}
        grids = {key: path for key, path in grids.items() if path.exists()}
        if len(grids) > 1:
            pictures.append((draw_panels(out / f"disentangle-{pair}.png", pair, grids, 2), f"Disentanglement error of {pair}, one colour scale."))
        for what, *compared in COMPARISONS:
            chosen = {key: path for key, path in grids.items() if key[0] in compared and key[1] == "aligned"}
            if len(chosen) == 2:
                pictures.append((draw_panels(out / f"disentangle-{pair}-{'-'.join(compared)}.png", pair, chosen, 2), f"The same, {what}: {' and '.join(compared)}."))
    if pictures:
        blocks.append(("heading2", "All encoders and recipes together"))
        for path, caption in pictures:
            blocks += [("picture", path), ("text", caption)]

    # ------------------------------------------------------------------ which parameters train (arXiv:2407.07089)
    if any(is_second(recipe) for _, recipe in found):
        blocks += second_paper(found, merges, folders, out)

    # ------------------------------------------------------------------ cost of two stages against full fine-tuning
    rows = [cost_row(encoder, recipe, results["finetune.json"], probes[encoder]) for (encoder, recipe), results in found.items()
            if results.get("finetune.json", {}).get("tasks")]
    if rows:
        blocks += [("heading2", "Cost"), ("text", "Aligned counts probing too: features of every image once, the search, then the heads. A learning-rate search trains one task at six rates; "
                                                  "the picked rate's run is that task's own training and counts there. Seconds are those of the machines named below."),
                   ("table", ["encoder", "recipe", "tasks", "probing, s", "learning-rate search, s", "fine-tuning, s", "images trained on", "parameters trained per task", "s per step", "peak memory, MiB"], rows)]

    # ------------------------------------------------------------------ one section for each encoder and recipe
    for (encoder, recipe), results in found.items():
        blocks += [("heading2", f"{encoder}, {recipe}"), *section(folders[encoder] / recipe, probes[encoder], results)]

    # ------------------------------------------------------------------ what is missing
    missing = [[encoder, recipe, found[encoder, recipe][name]["command"] if name in found.get((encoder, recipe), {}) else command(script, recipe, probe)] for encoder, probe in probes.items() for recipe in common.RECIPES
               if (encoder, recipe) in found or recipe in PAPER and (common.RECIPES[recipe].head != "text" or encoder in text_heads.TEXT_TOWERS or encoder.startswith("open_clip:"))
               for name, script in (WHAT_MAKES | (MORE if is_second(recipe) else {})).items()
               if unfinished(name, found.get((encoder, recipe), {}).get(name), probe) and not (name == "posthoc.json" and common.RECIPES[recipe].linear)]
    if missing:
        blocks += [("heading2", "Not there yet"), ("table", ["encoder", "recipe", "the command that makes it"], missing)]

    # ------------------------------------------------------------------ where each number comes from
    rows = []
    for encoder, probe in probes.items():
        results = {"probe.json": probe} | {f"{recipe}/{name}": result for (other, recipe), there in found.items() if other == encoder for name, result in there.items()}
        rows += [[folders[encoder] / name, result["command"], result["machine"]["date"]] for name, result in results.items()]
    blocks += [("heading2", "Where the numbers come from"), ("text", "Every number above stands in one of these files; the command is the last that wrote it."),
               ("table", ["file", "command", "date"], rows)]

    # ------------------------------------------------------------------ results
    with files.replacing(out / "report.md") as temporary:
        temporary.write_text(as_markdown(blocks, out))
    with files.replacing(out / "report.html") as temporary:
        temporary.write_text(as_html(blocks))
    for kind, *rest in tables:
        print(f"\n{rest[0]}" if kind == "heading2" else table_text(*rest))
    print()
    for path in dict.fromkeys([block[1] for block in blocks if block[0] == "picture"] + [out / "report.md", out / "report.html"]):
        print(path)


def unfinished(name, result, probe):
    """Whether a result is not there, or lacks tasks or subsets that its command would still add."""
    if name == "finetune.json" and result:
        return not set(probe["tasks"]) <= set(result["tasks"])
    if name == "scaling.json" and result:
        return max(len(row["tasks"]) for row in result["subsets"]) < len(result["config"]["tasks"])
    return result is None


def command(script, recipe, probe):
    """The command line of a later stage that fits a probe.json: its own flags but those of probing."""
    words, kept = iter(shlex.split(probe["command"])[2:]), []
    for word in words:
        if word.startswith("--probe-"):
            if "=" not in word:
                next(words)
        elif word != "--overwrite":
            kept.append(word)
    return f"python {script.split()[0]} {shlex.join([*kept, '--recipe', recipe, *script.split()[1:]])}"


def percent(value):
    return "" if value is None else f"{100 * value:.1f}"


def accuracy_rows(encoder, merge, finetune, recipe, columns, published):
    """Ours, the paper's, and their difference where the tasks are the paper's eight."""
    names, test = merge["config"]["tasks"], merge["test"]
    first = merge["test_lambda0"]["absolute"] if recipe in ("aligned", "zeroshot") else None
    if recipe == "zeroshot-full" and finetune and set(names) <= set(finetune["tasks"]):
        first = common.mean(finetune["tasks"][name]["zero_shot"] for name in names)
    ours = [first, common.mean(merge["single_task"].values()), test["absolute"], test["normalized"]]
    used = [index for index, column in enumerate(columns[:-1]) if column]
    rows = [[encoder, "ours", len(names), sum(test["n"].values()), *[percent(ours[i]) for i in used], f"{merge['best_lambda']:g}"]]
    if published:
        rows.append(["", "paper", 8, "", *["" if published[i] is None else f"{published[i]:.1f}" for i in used], "" if published[-1] is None else f"{published[-1]:g}"])
        if set(names) == set(common.TASKS):
            rows.append(["", "difference", "", "", *["" if published[i] is None or ours[i] is None else f"{100 * ours[i] - published[i]:+.1f}" for i in used],
                         "" if published[-1] is None else f"{merge['best_lambda'] - published[-1]:+g}"])
    return rows


def cost_row(encoder, recipe, finetune, probe):
    rows, config = finetune["tasks"], finetune["config"]
    probing = sum(probe["tasks"][name]["seconds"] + probe["tasks"][name]["feature_seconds"] for name in rows if name in probe["tasks"]) + probe["search"]["seconds"]
    searching = [seconds for lr, seconds in finetune.get("search", {}).get("seconds", {}).items() if float(lr) != finetune["lr"]]
    return [encoder, recipe, len(rows), f"{probing:.0f}" if common.RECIPES[recipe].head == "probed" else "", f"{sum(searching):.0f}" if searching else "",
            f"{sum(row['seconds'] for row in rows.values()):.0f}",
            len(rows) * config["steps"] * config["batch_size"], f"{max(row['trainable_params'] for row in rows.values()):,}",
            f"{sum(row['seconds'] for row in rows.values()) / len(rows) / config['steps']:.3f}", f"{max(row['peak_memory_bytes'] for row in rows.values()) / 2 ** 20:.0f}"]


def section(folder, probe, results):
    """Blocks of one encoder under one recipe: how it was obtained, accuracies per task, disentanglement, pictures."""
    blocks, merge, finetune = [], results.get("merge.json"), results.get("finetune.json")
    if finetune and "lr" in finetune:
        config, where = finetune["config"], finetune["machine"]
        blocks.append(("text", f"{config['image_size']} pixels; probing {probe['config']['steps']} steps at learning rate {probe['lr']:g}; fine-tuning {config['steps']} steps of "
                               f"{config['batch_size']} at {finetune['lr']:g}{' (searched on ' + finetune['search']['task'] + ')' if config['lr'] == 'search' else ''}; seed {config['seed']}; "
                               f"{where['device']}, {where['threads']} threads, torch {where['torch']}, timm {where['timm']}, {where['date']}."))
    if merge:
        blocks.append(("text", f"lambda picked from {len(merge['lambdas'])} values on {sum(merge['val']['n'].values())} validation images, forward pass in {merge['config']['dtype']}."))
        rows = []
        for task in merge["config"]["tasks"]:
            single, added = merge["single_task"][task], merge["test"]["tasks"][task]
            rows.append([task, merge["test"]["n"][task], percent(merge["test_lambda0"]["tasks"][task]), percent(single), percent(added), percent(added / single)])
        blocks.append(("table", ["task", "n", "lambda = 0", "single task", "addition", "normalized"], rows))
    if "vectors.json" in results:
        vectors = results["vectors.json"]
        off = [vectors["cosine"][i][j] for i in range(len(vectors["tasks"])) for j in range(i)]
        overlap = [vectors["subspace_overlap"][i][j] for i in range(len(vectors["tasks"])) for j in range(i)]
        if off:
            blocks.append(("text", f"Task vectors: norm {min(vectors['relative_norm'].values()):.1e} to {max(vectors['relative_norm'].values()):.1e} of theta_pre's; cosine of two tasks "
                                   f"{common.mean(off):.3f} on average, {max(off):.3f} at most; overlap of their rank-{vectors['subspace_rank']} subspaces {common.mean(overlap):.3f}, "
                                   f"{vectors['subspace_overlap_by_chance']:.3f} by chance."))
    if "disentangle.json" in results:
        rows = [[pair, f"{grid['points']} x {grid['points']} on [-{grid['limit']:g}, {grid['limit']:g}]", " + ".join(map(str, grid["samples"])), f"{grid['mean_xi_in_box']:.3f}",
                 f"{grid['xi_at_origin']:g}", f"{grid['max_xi']:.2f}"] for pair, grid in results["disentangle.json"]["pairs"].items()]
        blocks.append(("table", ["pair", "grid", "images", "mean xi in [-1, 1]^2", "xi at the origin", "largest xi"], rows))
    pictures = [folder / "merge.png", folder / "scaling.png", *sorted((folder / "disentangle").glob("*.png")), *sorted((folder / "representation").glob("*.png")), folder / "vectors.png", folder / "overlap.png", folder / "overlap_layers.png"]
    return blocks + [("picture", path) for path in pictures if path.exists()]


# ---------------------------------------------------------------------------------------------- figures


def draw_curves(path, merges):
    fig, axes = common.figure(7.6, 4.4)
    for (encoder, recipe), merge in merges.items():
        line, = axes.plot(merge["lambdas"], merge["val"]["normalized"], marker=".", linestyle="-" if recipe == "aligned" else "--", label=f"{encoder}, {recipe}")
        axes.plot(merge["best_lambda"], max(merge["val"]["normalized"]), marker="*", markersize=12, color=line.get_color())
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="scaling coefficient lambda (0: probing)", ylabel="mean normalized validation accuracy", ylim=(0, 1.03))
    fig.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncol=2)
    common.save_figure(path, fig)
    return path


def draw_scalings(path, scalings):
    fig, axes = common.figure(6.4, 4.4)
    for (encoder, recipe), scaling in scalings.items():
        rows = scaling["subsets"]
        sizes = sorted({len(row["tasks"]) for row in rows})
        line, = axes.plot(sizes, [common.mean(row["normalized"] for row in rows if len(row["tasks"]) == size) for size in sizes], label=f"{encoder}, {recipe}")
        axes.plot([len(row["tasks"]) for row in rows], [row["normalized"] for row in rows], ".", alpha=0.4, color=line.get_color())
    axes.set(xlabel="number of merged tasks", ylabel="normalized test accuracy", ylim=(0, None))
    fig.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncol=2)
    common.save_figure(path, fig)
    return path


def pair_similarity(scaling, vectors):
    """[(cosine, normalized accuracy)] of every merged pair of tasks."""
    place = {name: index for index, name in enumerate(vectors["tasks"])}
    return [(vectors["cosine"][place[row["tasks"][0]]][place[row["tasks"][1]]], row["normalized"])
            for row in scaling["subsets"] if len(row["tasks"]) == 2 and set(row["tasks"]) <= set(place)]


def is_second(recipe):
    """Whether a recipe is one of arXiv:2407.07089's, with any head."""
    return recipe.removesuffix("-zeroshot").removesuffix("-random") in SECOND_PAPER


def second_paper(found, merges, folders, out):
    """Blocks: accuracies by what trains, cost, non-linear advantage, post-hoc linearization, disentanglement by both metrics, cosines."""
    rows = []
    for (encoder, recipe), merge in merges.items():
        if is_second(recipe) or recipe in ("aligned", "zeroshot", "full"):
            single, base, curve = common.mean(merge["single_task"].values()), merges.get((encoder, base_recipe(recipe))), merge["val"]["normalized"]
            near = [lam for lam, value in zip(merge["lambdas"], curve) if value > max(curve) - 0.02]
            advantage = f"{100 * (common.mean(base['single_task'].values()) - single):+.1f}" if base and is_second(recipe) and base["config"]["tasks"] == merge["config"]["tasks"] else ""
            rows.append([encoder, recipe, len(merge["config"]["tasks"]), sum(merge["test"]["n"].values()), percent(single), advantage, percent(merge["test"]["absolute"]),
                         percent(merge["test"]["normalized"]), f"{merge['best_lambda']:g}", f"{min(near):g} to {max(near):g}"])
    rows += [[f"paper, {encoder}, zero-shot head", trained, 8, "", "" if single is None else f"{single:.1f}", "", f"{absolute:.1f}", f"{normalized:.1f}", "", ""]
             for encoder, trained, single, absolute, normalized in PAPER_2]
    blocks = [("heading2", "Which parameters train, and linearization (arXiv:2407.07089 Tables 2 and 5)"),
              ("table", ["encoder", "recipe", "tasks", "n", "single task", "non-linear advantage", "addition", "normalized", "lambda", "lambdas within 2 points"], rows),
              ("text", "Non-linear advantage: single-task accuracy of training all parameters, with the same kind of head, minus the recipe's. Robustness to lambda (Figure 9) is the width of "
                       "the last column: the lambdas whose normalized validation accuracy is within two points of the best; curves.png above shows them all.")]
    rows = []
    for (encoder, recipe), results in found.items():
        base = found.get((encoder, base_recipe(recipe)), {}).get("finetune.json")
        if is_second(recipe) and base and base.get("tasks") and results.get("finetune.json", {}).get("tasks"):
            own, full = [median_cost(result) for result in (results["finetune.json"], base)]
            rows.append([encoder, recipe, f"{own[0]:,}", f"{own[0] / full[0]:.2f}", f"{own[1]:.3f}", f"{own[1] / full[1]:.2f}", f"{own[2] / 2 ** 20:.0f}", f"{own[2] / full[2]:.2f}"])
    if rows:
        rows += [["paper, Flan-T5-base", "attention", "63,700,000", "0.29", "", "0.58", "850", "1.00"], ["paper, Flan-T5-base", "linearized", "222,000,000", "1.00", "", "2.32", "1795", "2.11"]]
        blocks += [("heading2", "Cost against training all parameters (arXiv:2407.07089 Table 4)"),
                   ("table", ["encoder", "recipe", "parameters trained", "ratio", "s per step", "ratio", "peak memory, MiB", "ratio"], rows),
                   ("text", "Medians over tasks; on a CPU the memory is that of the whole process, images and libraries included.")]
    tuned = {key: results["finetune.json"]["tasks"] for key, results in found.items() if results.get("finetune.json", {}).get("tasks")}
    points = {(encoder, recipe): [(tuned[encoder, base][name]["test"], row["test"]) for name, row in rows.items() if name in tuned[encoder, base]]
              for (encoder, recipe), rows in tuned.items() if is_second(recipe) for base in [base_recipe(recipe)] if (encoder, base) in tuned}
    if points:
        blocks += [("picture", draw_diagonal(out / "advantage.png", points, "single-task accuracy, all parameters", "single-task accuracy, the recipe")),
                   ("text", "Non-linear advantage: how far below the diagonal a recipe's single-task accuracy lies, a dot per task.")]
    posthoc = {key: [(row["nonlinear"], row["linearized"]) for row in results["posthoc.json"]["tasks"].values()] for key, results in found.items() if "posthoc.json" in results}
    if posthoc:
        blocks += [("picture", draw_diagonal(out / "posthoc.png", posthoc, "accuracy, fine-tuned", "accuracy of its linearization")),
                   ("text", "Kernel-behaviour test: the fine-tuned encoder against its own linearization at theta_pre, a dot per task; on the diagonal fine-tuning stayed in the kernel regime."),
                   ("table", ["encoder", "recipe", "tasks", "n", "fine-tuned", "linearized after the fact"],
                    [[encoder, recipe, len(rows), sum(row["n"] for row in rows.values()), *[percent(common.mean(row[kind] for row in rows.values())) for kind in ("nonlinear", "linearized")]]
                     for (encoder, recipe), rows in ((key, found[key]["posthoc.json"]["tasks"]) for key in posthoc)])]
    compared = {key: folders[key[0]] / key[1] for key in found if is_second(key[1]) or key[1] in ("aligned", "zeroshot", "full")}
    for encoder in dict.fromkeys(encoder for encoder, _ in compared):
        there = {recipe: folder for (other, recipe), folder in compared.items() if other == encoder}
        pairs = {stem: {recipe: found[encoder, recipe].get(f"{stem}.json", {"pairs": {}})["pairs"] for recipe in there} for stem in ("representation", "disentangle")}
        for pair in sorted({pair for rows in pairs["representation"].values() for pair in rows}):
            grids = {stem: {recipe: read_grid(there[recipe] / stem / f"{pair}.npz", encoder, recipe) for recipe, rows in of_recipe.items() if pair in rows} for stem, of_recipe in pairs.items()}
            blocks += [("picture", draw_metrics(out / f"metrics-{folders[encoder].name}-{pair}.png", pair, grids)),
                       ("text", f"Disentanglement of {pair}, {encoder} (Figures 6 and 8): above of representations, KL divergence in nats, below of predictions; one colour scale for each row.")]
        cosines = {recipe: found[encoder, recipe]["vectors.json"] for recipe in there if "vectors.json" in found[encoder, recipe]}
        if cosines:
            blocks += [("picture", draw_cosines(out / f"cosines-{folders[encoder].name}.png", cosines)),
                       ("text", f"Cosine of task vectors, {encoder} (Figure 10); in the titles its mean and maximum over pairs.")]
    return blocks


def median_cost(finetune):
    """(parameters trained, seconds per step, peak bytes) of a fine-tuning, medians over its tasks."""
    trained, seconds, peak = (np.median([row[key] for row in finetune["tasks"].values()]) for key in ("trainable_params", "seconds", "peak_memory_bytes"))
    return int(trained), seconds / finetune["config"]["steps"], peak


def base_recipe(recipe):
    """The recipe of the first paper with the same head: all parameters train."""
    return "zeroshot" if recipe.endswith("-zeroshot") else "full" if recipe.endswith("-random") else "aligned"


def draw_diagonal(path, points, xlabel, ylabel):
    """A dot per task for each encoder and recipe, with the diagonal."""
    fig, axes = common.figure(5.4, 4.8)
    for (encoder, recipe), pairs in points.items():
        axes.plot(*zip(*pairs), "o", alpha=0.6, label=f"{encoder}, {recipe}")
    axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=0.8)
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, 1), ylim=(0, 1))
    fig.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncol=2)
    common.save_figure(path, fig)
    return path


def draw_similarity(path, similarity):
    fig, axes = common.figure(6.4, 4.4)
    for (encoder, recipe), points in similarity.items():
        if points:
            axes.plot(*zip(*points), "o", alpha=0.6, label=f"{encoder}, {recipe}, {len(points)} pairs")
    axes.set(xlabel="cosine of the two task vectors", ylabel="normalized test accuracy of the merged pair")
    fig.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncol=2)
    common.save_figure(path, fig)
    return path


def draw_panels(path, pair, grids, top):
    """The same pair's heat map for every encoder and recipe, on one colour scale from 0 to `top`."""
    columns = min(4, len(grids))
    rows = -(-len(grids) // columns)
    fig, panels = common.figure(3.2 * columns + 0.8, 3.4 * rows, rows, columns)
    for axes in panels.flat[len(grids):]:
        axes.set_axis_off()
    for axes, ((encoder, recipe), grid) in zip(panels.flat, grids.items()):
        image = common.heat_map(axes, *read_grid(grid, encoder, recipe), top)
        axes.set_title(f"{encoder.removeprefix('timm:')}\n{recipe}", fontsize=8)
    fig.colorbar(image, ax=panels, label=f"xi of {pair}")
    common.save_figure(path, fig)
    return path


def draw_metrics(path, pair, grids):
    """A row for each metric, a column for each recipe, a colour scale for each row; grids {"representation" or "disentangle": {recipe: (xi, lambdas)}}."""
    grids = {stem: row for stem, row in grids.items() if row}
    columns = [recipe for recipe in common.RECIPES if any(recipe in row for row in grids.values())]
    fig, panels = common.figure(2.5 * len(columns) + 1.2, 2.7 * len(grids), len(grids), len(columns), squeeze=False)
    for line, (stem, row) in zip(panels, grids.items()):
        top = 2 if stem == "disentangle" else max(xi.max() for xi, _ in row.values())
        for axes, recipe in zip(line, columns):
            if recipe in row:
                image = common.heat_map(axes, *row[recipe], top)
                axes.set_title(recipe, fontsize=8)
            else:
                axes.set_axis_off()
        fig.colorbar(image, ax=list(line), label="xi of predictions" if stem == "disentangle" else "KL of representations, nats")
    fig.supxlabel(f"lambdas of the two tasks of {pair}: the first to the right, the second upwards", fontsize=9)
    common.save_figure(path, fig)
    return path


def read_grid(path, encoder, recipe):
    """(xi, lambdas) of a heat map."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["xi"], arrays["lambdas"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise files.Refused(f'{path} cannot be read ({error}): delete it and run "python disentangle.py {encoder} --recipe {recipe} --overwrite" again') from error


def draw_cosines(path, cosines):
    """One matrix over tasks for each recipe, on a colour scale that ends at the largest off the diagonals."""
    matrices = {recipe: (np.array(vectors["cosine"]), vectors["tasks"]) for recipe, vectors in cosines.items()}
    off = {recipe: matrix[~np.eye(len(matrix), dtype=bool)] for recipe, (matrix, _) in matrices.items()}
    top = max((np.abs(values).max() for values in off.values() if len(values)), default=1)
    columns = min(4, len(matrices))
    rows = -(-len(matrices) // columns)
    fig, panels = common.figure(3.2 * columns + 0.8, 3.4 * rows, rows, columns, squeeze=False)
    for axes in panels.flat[len(matrices):]:
        axes.set_axis_off()
    for axes, (recipe, (matrix, tasks)) in zip(panels.flat, matrices.items()):
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-top, vmax=top)
        axes.set_xticks(range(len(tasks)), tasks, rotation=90, fontsize=7)
        axes.set_yticks(range(len(tasks)), tasks, fontsize=7)
        axes.set_title(f"{recipe}\nmean {off[recipe].mean():.3f}, largest {off[recipe].max():.3f}" if len(off[recipe]) else recipe, fontsize=8)
    fig.colorbar(image, ax=panels, label="cosine of task vectors", extend="max")
    common.save_figure(path, fig)
    return path


# ---------------------------------------------------------------------------------------------- pages


def table_text(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])


def as_markdown(blocks, out):
    lines = []
    for kind, *rest in blocks:
        if kind == "picture":
            link = Path(os.path.relpath(rest[0], out)).as_posix().replace(":", "%3A").replace(" ", "%20")
            lines.append(f"![{rest[0].stem}]({link})")
        else:
            lines.append({"heading": "# {}", "heading2": "## {}", "text": "{}"}[kind].format(rest[0]) if kind != "table" else table_text(*rest))
    return "\n\n".join(lines) + "\n"


def as_html(blocks):
    """One page with its pictures inside."""
    parts = ["<!doctype html><meta charset='utf-8'><title>Task addition</title><style>body{font:15px sans-serif;max-width:60em;margin:2em auto}"
             "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}img{max-width:100%}</style>"]
    for kind, *rest in blocks:
        if kind == "picture":
            parts.append(f"<img alt='{html.escape(rest[0].stem)}' src='data:image/png;base64,{base64.b64encode(rest[0].read_bytes()).decode()}'>")
        elif kind == "table":
            cells = [[f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row] for tag, row in [("th", rest[0]), *(("td", row) for row in rest[1])]]
            parts.append("<table>" + "".join(f"<tr>{''.join(row)}</tr>" for row in cells) + "</table>")
        else:
            tag = {"heading": "h1", "heading2": "h2", "text": "p"}[kind]
            parts.append(f"<{tag}>{html.escape(rest[0])}</{tag}>")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    files.run(main, parse_args)
