"""
The study's tables over everything in runs/, beside the published numbers, with the pictures.

    python report.py                                             # all encoders found in runs/
    python report.py --runs elsewhere

Reads   runs/*/probe.json, aligned/finetune.json, aligned/merge.json, aligned/disentangle.json and their pictures
Writes  runs/report/report.md
Source  arXiv:2511.14569 Table 1
"""
import argparse
import os
from pathlib import Path

import common
import files

# arXiv:2511.14569 Table 1, percent: probing, single task, addition absolute, addition normalized; then lambda
PAPER_TABLE_1 = {
    "vit_b16_sup_in1k": (72.1, 90.0, 73.8, 82.0, 0.05),
    "vit_b16_sup_in21k": (80.7, 91.7, 81.7, 89.3, 0.05),
    "vit_b16_mae": (62.8, 84.5, 63.1, 73.0, 0.05),
    "vit_b16_dino": (82.2, 90.6, 82.2, 90.9, 0.00),
    "vit_b16_clip_laion400m": (86.3, 92.9, 89.8, 94.9, 0.10),
    "vit_b16_clip_laion2b": (86.0, 92.6, 89.6, 94.5, 0.15),
    "vit_l16_sup_in21k": (80.3, 92.2, 83.4, 90.8, 0.05),
    "vit_l14_clip_laion2b": (90.8, 95.8, 92.6, 96.7, 0.15),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of results (default runs)")
    return parser.parse_args(argv)


def main(args):
    # ------------------------------------------------------------------ what is there
    merges = {}
    for path in sorted(args.runs.glob("*/aligned/merge.json")):
        merge = files.read_json(path, "python merge_eval.py ENCODER")
        merges[path.parent.parent] = merge
    if not merges:
        raise files.Refused(f'{args.runs}/*/aligned/merge.json: none found, run "bash run_all.sh" or "python merge_eval.py ENCODER" first')
    out = args.runs / "report"

    # ------------------------------------------------------------------ Table 1
    lines = ["# Task addition in closed-vocabulary vision models", "", "## Table 1: probing, single task, task addition (aligned)", "",
             "Test accuracy in percent, mean over tasks; normalized is the mean over tasks of merged / single-task accuracy.", "",
             "| encoder | | tasks | n | probing | single task | addition | normalized | lambda |", "|---|---|---|---|---|---|---|---|---|"]
    for merge in merges.values():
        name, at_zero, test = merge["config"]["encoder"], merge["test_lambda0"], merge["test"]
        tasks, ours = merge["config"]["tasks"], (at_zero["absolute"], common.mean(merge["single_task"].values()), test["absolute"], test["normalized"])
        lines.append(f"| {name} | ours | {len(tasks)} | {sum(test['n'].values())} | " + " | ".join(f"{100 * value:.1f}" for value in ours) + f" | {merge['best_lambda']:g} |")
        if name in PAPER_TABLE_1:
            *published, lam = PAPER_TABLE_1[name]
            lines.append("| | paper | 8 | | " + " | ".join(f"{value:.1f}" for value in published) + f" | {lam:g} |")
            if set(tasks) == set(common.TASKS):
                lines.append("| | difference | | | " + " | ".join(f"{100 * mine - theirs:+.1f}" for mine, theirs in zip(ours, published)) + f" | {merge['best_lambda'] - lam:+g} |")

    # ------------------------------------------------------------------ one section for each encoder
    pictures = []
    for folder, merge in merges.items():
        probe = files.read_json(folder / "probe.json", f"python probe.py {merge['config']['encoder']}")
        finetune = files.read_json(folder / "aligned" / "finetune.json", f"python finetune.py {merge['config']['encoder']}")
        lines += ["", f"## {merge['config']['encoder']}", "", how_obtained(merge, probe, finetune), "",
                  "| task | classes | n | probing | single task | addition | normalized |", "|---|---|---|---|---|---|---|"]
        for task in merge["config"]["tasks"]:
            single, added = merge["single_task"][task], merge["test"]["tasks"][task]
            lines.append(f"| {task} | {probe['tasks'][task]['classes']} | {merge['test']['n'][task]} | {100 * merge['test_lambda0']['tasks'][task]:.1f} | "
                         f"{100 * single:.1f} | {100 * added:.1f} | {100 * added / single:.1f} |")
        found = [folder / "aligned" / "merge.png", *sorted((folder / "aligned" / "disentangle").glob("*.png")), folder / "aligned" / "vectors.png"]
        pictures += [path for path in found if path.exists()]
        lines += [""] + [f"![{path.stem}]({Path(os.path.relpath(path, out)).as_posix().replace(':', '%3A')})" for path in found if path.exists()]
        disentangled = folder / "aligned" / "disentangle.json"
        if disentangled.exists():
            grids = files.read_json(disentangled, f"python disentangle.py {merge['config']['encoder']}")["pairs"]
            lines += ["", "| pair | grid | images | mean xi in [-1, 1]^2 | xi at the origin | largest xi |", "|---|---|---|---|---|---|"]
            lines += [f"| {pair} | {grid['points']} x {grid['points']} on [-{grid['limit']:g}, {grid['limit']:g}] | {' + '.join(map(str, grid['samples']))} | "
                      f"{grid['mean_xi_in_box']:.3f} | {grid['xi_at_origin']:g} | {grid['max_xi']:.2f} |" for pair, grid in grids.items()]

    # ------------------------------------------------------------------ results
    with files.replacing(out / "report.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[4:8 + sum(3 for _ in merges)]))
    for path in [*pictures, out / "report.md"]:
        print(path)


def how_obtained(merge, probe, finetune):
    """One paragraph: settings, seed, device, versions."""
    config, machine = finetune["config"], finetune["machine"]
    seconds = sum(row["seconds"] for row in finetune["tasks"].values())
    return (f"{config['image_size']} pixels; probing {probe['config']['steps']} steps at learning rate {probe['lr']:g}; fine-tuning {config['steps']} steps of "
            f"{config['batch_size']} at {finetune['lr']:g} ({seconds / 60:.1f} min for {len(finetune['tasks'])} tasks); lambda picked from {len(merge['lambdas'])} values "
            f"on {sum(merge['val']['n'].values())} validation images; seed {config['seed']}; forward pass in {merge['config']['dtype']}; {machine['device']}, "
            f"torch {machine['torch']}, timm {machine['timm']}, {merge['machine']['date']}.")


if __name__ == "__main__":
    files.run(main, parse_args)
