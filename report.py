"""
Every table and figure over everything in runs/, ours beside the published numbers.

    python report.py                                            # all encoders and variants found in runs/
    python report.py --runs runs --seeds runs-seed1 runs-seed2  # mean and deviation over seeds, a folder each

Reads   runs/*/probe.json, runs/*/NAME/*.json, the heat maps' A-B.npz
Writes  runs/report/report.md, report.html (one self-contained page), *.png, with --seeds also seeds.json
Source  arXiv:2511.14569 Tables 1, 3, 4 and Figures 1 to 9; arXiv:2407.07089 Tables 2 to 5 and Figures 3, 5,
        6, 8 to 10; their numbers are in lib/published.json. Nothing is computed here but means over seeds:
        every other number stands in the JSON file of its stage
"""
from pathlib import Path

import numpy as np

from common import PROBES, TASKS
from lib import flags, pages
from lib.beyond import beyond_the_sum, merging_rules, negations
from lib.comparisons import (PUBLISHED, costs, inputs_of, minus_probing, percent, pictures_of_all,
                             texts_added, trains_everything, which_parameters_train)
from lib.devices import pick_device
from lib.files import Refused, read_json, replacing, write_json
from lib.inventory import find_results, not_there_yet, out_of_step, sources
from lib.results import provenance
from lib.schemes import along_pretraining, paper_in_small
from lib.study import run

def parse_args(argv=None):
    parser = flags.flag_parser(__doc__)
    parser.add_argument("--runs", type=flags.folder, default=Path("runs"),
                        help="folder of results (default runs)")
    parser.add_argument("--seeds", type=flags.folder, nargs="+", default=[],
                        help="other folders with the same study under other seeds")
    return parser.parse_args(argv)


def main(args):
    # ---------------------------------------------------- what is there
    for folder in args.seeds:
        if not folder.is_dir():
            raise Refused(f"--seeds {folder} is not a folder")
    probes, variants = find_results(args.runs)
    pretraining = along_pretraining(args.runs)
    if not probes and not pretraining:
        raise Refused(f'no results in {args.runs} ({args.runs}/*/probe.json): run "bash run_all.sh" first')
    out = args.runs / "report"

    # ---------------------------------------------------- the page
    accuracies, doubtful = accuracy_tables(variants), out_of_step(probes, variants)
    blocks = [("h1", "Task addition in closed-vocabulary vision models"),
              *doubtful, *answers(probes, variants), *accuracies]
    if args.seeds:
        blocks += over_seeds(args, variants, out)
    blocks += merging_rules(variants) + beyond_the_sum(variants) + negations(variants)
    blocks += pictures_of_all(variants, out)
    blocks += which_parameters_train(variants, out) + texts_added(variants)
    blocks += paper_in_small(variants) + pretraining
    blocks += costs(probes, variants)
    for variant in variants.values():
        blocks += section(variant, probes[variant["encoder"]])
    blocks += not_there_yet(args.runs, probes, variants)
    blocks += sources(args.runs, probes, variants)

    # ---------------------------------------------------- save, say
    with replacing(out / "report.md") as temporary:
        temporary.write_text(pages.as_markdown(blocks, out))
    with replacing(out / "report.html") as temporary:
        temporary.write_text(pages.as_html(blocks))
    for kind, content in accuracies + doubtful:
        print(f"\n{pages.markdown_table(content) if kind == 'table' else content}")
    print()
    for path in dict.fromkeys(content for kind, content in blocks if kind == "picture"):
        print(path)
    print(f"{out / 'report.md'}\n{out / 'report.html'}")


# --------------------------------------------------------------------------------------- the three questions


def answers(probes, variants):
    """A sentence for each encoder and question of the README: addition, disentanglement, probing, control."""
    blocks = []
    for encoder in probes:
        merged = [variant for (other, _), variant in variants.items()
                  if other == encoder and "merge.json" in variant]
        ours = [v for v in merged if v["recipe"]["head"] == "probed" and trains_everything(v["recipe"])]
        controls = [v for v in merged if v["recipe"]["head"] == "random" and trains_everything(v["recipe"])]
        if ours:
            main = next((variant for variant in ours if variant["name"] == "aligned"), ours[0])
            blocks += [("h2", f"{encoder}: the three questions"), ("p", one_encoder(main)),
                       ("p", disentangled(main)), ("p", probing(main, controls[0] if controls else None))]
    return blocks


def one_encoder(variant):
    merge = variant["merge.json"]
    test, tasks = merge["test"], len(merge["config"]["tasks"])
    return (f"1. Does one encoder serve all tasks? With all {tasks} vectors added at "
            f"lambda = {merge['best_lambda']:g} it gets {percent(test['absolute'])} % of the "
            f"{sum(test['n'].values()):,} test {inputs_of(merge['config'])} right, where {tasks} encoders of "
            f"their own get {percent(merge['single_task_mean'])} %: {percent(test['normalized'])} % of each "
            f"task's own accuracy, on average ({variant['name']}).")


def disentangled(variant):
    parts = ["2. Are the vectors disentangled?"]
    if "disentangle.json" in variant:
        result = variant["disentangle.json"]
        pairs = result["pairs"]
        xi = [row["mean_xi_in_box"] for row in pairs.values()]
        floor = "not measured (precision.py)"
        if "precision.json" in variant:
            floor = f"{variant['precision.json']['xi_floor']:.3f} in bf16 (precision.py)"
        count = f"{len(pairs)} pair{'s' if len(xi) > 1 else ''}"
        parts.append(f"Adding another task's vector changes predictions by xi = {np.mean(xi):.2f} in "
                     f"[-1, 1]^2 (mean over {count}: {', '.join(pairs)}; 0: never, 2: always, for both "
                     f"tasks), computed in {result['config']['dtype']}; the floor that rounding puts under "
                     f"it is {floor}.")
    if variant.get("vectors.json", {}).get("cosine_of_pairs"):
        cosine = variant["vectors.json"]["cosine_of_pairs"]
        parts.append(f"The vectors' cosine is {cosine['mean']:.3f} on average, {cosine['max']:.3f} at most.")
    return " ".join(parts) if len(parts) > 1 else f"{parts[0]} Not measured yet."


def probing(variant, control):
    merge = variant["merge.json"]
    n = sum(merge["test"]["n"].values())
    behind = 100 * (merge["single_task_mean"] - merge["test"]["absolute"])
    said = f"3. Is probing nearly as good? On the same {n:,} test {inputs_of(merge['config'])} addition is "
    said += ", and ".join(against_probing(kind, merge["probing"][kind]) for kind in PROBES)
    said += f". It is {behind:.1f} points below single-task encoders."
    if control:
        other = control["merge.json"]
        said += (f" The control {control['name']}, whose heads train along, gets "
                 f"{percent(other['test']['absolute'])} % when added "
                 f"({percent(other['test']['normalized'])} % normalized, lambda = {other['best_lambda']:g}), "
                 f"from {percent(other['single_task_mean'])} % on single tasks.")
    else:
        said += " The control full was not run (bash run_all.sh ENCODER --everything)."
    return said


def against_probing(kind, probed):
    """How addition stands to one way of probing; more than two paired standard errors count."""
    minus = probed["addition_minus"]
    points, error = 100 * minus["mean"], 100 * minus["standard_error"]
    verdict = "above" if points > 2 * error else "below" if points < -2 * error else "within the noise of"
    how = {"paper": "the paper's probing", "converged": "the converged one"}[kind]
    return (f"{verdict} {how} ({percent(probed['absolute'])} %): {points:+.1f} +- {error:.1f} points, above "
            f"it on {minus['tasks_won']} of {len(minus['tasks'])} tasks")


# --------------------------------------------------------------------------------------- accuracies


def accuracy_tables(variants):
    """A table for each recipe of the first paper: ours under all names, the paper's, and their difference."""
    blocks = []
    for recipe, published in PUBLISHED["first paper"].items():
        rows = []
        for variant in variants.values():
            if variant["recipe"]["name"] == recipe and "merge.json" in variant:
                rows += accuracy_rows(variant, published)
        if rows:
            blocks += [("h2", f"{recipe} ({published['table']})"), ("table", rows)]
    if blocks:
        blocks.append(("p", "Test accuracy in percent, mean over tasks, n test inputs in all; lambda = 0 has "
                            "the heads that the encoder was trained against; normalized: mean over tasks of "
                            "addition / single task; minus paper, minus converged: addition minus either "
                            "way of probing, +- its paired standard error."))
    return blocks


def accuracy_rows(variant, published):
    """Ours, the paper's, and their difference where the tasks are the paper's eight."""
    merge, test = variant["merge.json"], variant["merge.json"]["test"]
    tasks = merge["config"]["tasks"]
    zero = merge["test_lambda0"]["absolute"]
    if merge["recipe"]["head"] == "text" and merge["recipe"]["train_head"]:
        # at lambda = 0 its heads are not from text
        zero = np.mean([variant["finetune.json"]["tasks"][task]["zero_shot"] for task in tasks])
    ours = [100 * zero, 100 * merge["single_task_mean"], 100 * test["absolute"], 100 * test["normalized"],
            merge["best_lambda"]]
    columns, name, rule = published["columns"], variant["name"], merge["rule"]
    if rule != "sum" and not name.endswith(f"-{rule}"):
        name = f"{name}, rule {rule}"
    rows = [{"encoder": variant["encoder"], "name": name,
             "tasks": len(tasks), "n": sum(test["n"].values()),
             **dict(zip(columns, map(digits, ours, columns), strict=True)),
             **minus_probing(merge)}]
    theirs = published["rows"].get(variant["encoder"]) if rule == "sum" else None
    if theirs:
        rows.append({"name": "paper", "tasks": 8,
                     **dict(zip(columns, map(digits, theirs, columns), strict=True))})
    if theirs and set(tasks) == set(TASKS):
        gaps = [None if paper is None else own - paper for own, paper in zip(ours, theirs, strict=True)]
        rows.append({"name": "difference", **dict(zip(columns, map(digits, gaps, columns), strict=True))})
    return rows


def digits(value, column):
    return "" if value is None else f"{value:g}" if column == "lambda" else f"{value:.1f}"


def over_seeds(args, variants, out):
    """Mean and standard deviation over the runs folders of several seeds; written to seeds.json."""
    rows, values = [], {}
    for variant in variants.values():
        merges = [variant["merge.json"]] if "merge.json" in variant else []
        for folder in args.seeds:
            path = folder / variant["folder"].relative_to(args.runs) / "merge.json"
            if merges and path.exists():
                merges.append(read_json(path, "python merge_eval.py"))
        if len(merges) < 2:
            continue
        columns = {"lambda = 0": [merge["test_lambda0"]["absolute"] for merge in merges],
                   "single task": [merge["single_task_mean"] for merge in merges],
                   "addition": [merge["test"]["absolute"] for merge in merges],
                   "normalized": [merge["test"]["normalized"] for merge in merges]}
        for kind in PROBES:
            columns[f"probing, {kind}"] = [merge["probing"][kind]["absolute"] for merge in merges]
            columns[f"minus {kind}"] = [merge["probing"][kind]["addition_minus"]["mean"] for merge in merges]
        values[variant["label"]] = {}
        rows.append({"encoder": variant["encoder"], "name": variant["name"], "seeds": len(merges)})
        for key, found in columns.items():
            mean, deviation = float(np.mean(found)), float(np.std(found, ddof=1))
            values[variant["label"]][key] = [mean, deviation]
            rows[-1][key] = f"{100 * mean:.1f} +- {100 * deviation:.1f}"
        rows[-1]["lambda"] = ", ".join(f"{merge['best_lambda']:g}" for merge in merges)
    write_json(out / "seeds.json", {"config": {}, "mean_and_deviation": values,
                                    **provenance(pick_device("cpu"))})
    if not rows:
        return []
    about = ("Mean and standard deviation of the test figures; the seed reaches everything but the "
             "validation split.")
    return [("h2", "Over seeds"), ("p", about), ("table", rows)]


# --------------------------------------------------------------------------------------- variants and sources


def section(variant, probe):
    """One variant: how it was obtained, accuracies per task, vectors, disentanglement, its pictures."""
    blocks, folder = [("h2", variant["label"])], variant["folder"]
    if variant.get("finetune.json", {}).get("tasks"):
        finetune = variant["finetune.json"]
        config, machine = finetune["config"], finetune["machine"]
        searched = f" (searched on {finetune['search']['task']})" if "search" in finetune else ""
        library = "timm" if inputs_of(config) == "images" else "transformers"
        pixels = f"{config['image_size']} pixels; " if "image_size" in config else ""
        how = "fine-tuned elsewhere"
        if "steps" in config:
            how = (f"fine-tuning {config['steps']} steps of {config['batch_size']} at {finetune['lr']:g}"
                   f"{searched}")
        blocks.append(("p", f"Recipe {config['recipe']['name']}; {pixels}"
                            f"probing as the paper {probe['config']['steps']} steps at learning rate "
                            f"{probe['lr']:g}; trained against {config['recipe']['probe'] or 'other'} heads; "
                            f"{how}; seed {config['seed']}; "
                            f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
                            f"{library} {machine[library]}, {machine['date']}."))
    if "merge.json" in variant:
        merge = variant["merge.json"]
        test, n_val = merge["test"], sum(merge["val"]["n"].values())
        of = "" if merge["of"] == variant["name"] else f"Vectors of {merge['of']}, {merge['rule']}; "
        most = "at most " if merge["config"].get("search") == "fine" else ""
        blocks.append(("p", f"{of}lambda picked from {len(merge['lambdas'])} values on {most}{n_val} "
                            f"validation {inputs_of(merge['config'])}, forward pass in "
                            f"{merge['config']['dtype']}."))
        rows = []
        for task in merge["config"]["tasks"]:
            single, added = merge["single_task"][task], test["tasks"][task]
            rows.append({"task": task, "n": test["n"][task],
                         "lambda = 0": percent(merge["test_lambda0"]["tasks"][task]),
                         **{f"probing, {kind}": percent(merge["probing"][kind]["tasks"][task])
                            for kind in PROBES},
                         "single task": percent(single), "addition": percent(added),
                         "normalized": percent(added / single)})
        blocks.append(("table", rows))
    if variant.get("vectors.json", {}).get("overlap_of_pairs"):
        vectors = variant["vectors.json"]
        sizes = vectors["relative_norm"].values()
        cosine, overlap = vectors["cosine_of_pairs"], vectors["overlap_of_pairs"]
        blocks.append(("p", f"Task vectors: norm {min(sizes):.1e} to {max(sizes):.1e} of theta_pre's; cosine "
                            f"of two tasks {cosine['mean']:.3f} on average, {cosine['max']:.3f} at most; "
                            f"overlap of their rank-{vectors['subspace_rank']} subspaces "
                            f"{overlap['mean']:.3f}, {vectors['subspace_overlap_by_chance']:.3f} by chance."))
    rows = []
    for pair, row in variant.get("disentangle.json", {"pairs": {}})["pairs"].items():
        points, limit = row["points"], row["limit"]
        rows.append({"pair": pair, "grid": f"{points} x {points} on [-{limit:g}, {limit:g}]",
                     "inputs": " + ".join(map(str, row["samples"])),
                     "mean xi in [-1, 1]^2": f"{row['mean_xi_in_box']:.3f}",
                     "xi at the origin": f"{row['xi_at_origin']:g}", "largest xi": f"{row['max_xi']:.2f}"})
    if rows:
        blocks.append(("table", rows))
    pictures = [folder / "merge.png", folder / "scaling.png", *sorted(folder.glob("disentangle/*.png")),
                *sorted(folder.glob("representation/*.png")), folder / "vectors.png", folder / "overlap.png",
                folder / "overlap_layers.png"]
    return blocks + [("picture", path) for path in pictures if path.exists()]


if __name__ == "__main__":
    run(main, parse_args)
