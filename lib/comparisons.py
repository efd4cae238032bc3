"""
Sections of the report that put all variants side by side: pictures, what trains (arXiv:2407.07089), cost.

A variant is what report.py has found of one: {"encoder", "name", "label", "folder", "recipe", and its results
by file}. Each function returns blocks of lib/pages.py.
"""
import json
import zipfile
from pathlib import Path

import numpy as np

from common import PROBES
from lib import plots
from lib.files import Refused

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
METRICS = {"representation": ("KL of representations, nats", None), "disentangle": ("xi of predictions", 2)}


def percent(value):
    return "" if value is None else f"{100 * value:.1f}"


def trains_everything(recipe):
    return not recipe["trained"] and not recipe["linear"]


def with_error(difference):
    """A paired difference in points."""
    return f"{100 * difference['mean']:+.1f} +- {100 * difference['standard_error']:.1f}"


def minus_probing(merge):
    """{column: a merge minus either way of probing}."""
    return {f"minus {kind}": with_error(merge["probing"][kind]["addition_minus"]) for kind in PROBES}


def inputs_of(config):
    """"images" or "texts": what a result's encoder takes."""
    return "images" if "image_size" in config else "texts"


# --------------------------------------------------------------------------------------- pictures


def pictures_of_all(variants, out):
    """The figures over all encoders and variants."""
    blocks = []
    merges = {v["label"]: v["merge.json"] for v in variants.values() if "merge.json" in v}
    scaled = [v for v in variants.values() if "scaling.json" in v]
    scalings = {v["label"]: list(v["scaling.json"]["subsets"].values()) for v in scaled}
    if merges:
        blocks += [("picture", plots.curves(out / "curves.png", merges)),
                   ("p", "Normalized validation accuracy against lambda; lambda = 0 is probing where the "
                         "head is probed.")]
    if scalings:
        caps = {v["scaling.json"]["config"]["images_per_task"] or "all" for v in scaled}
        blocks += [("picture", plots.scaling(out / "scaling.png", scalings)),
                   ("p", f"Normalized test accuracy against the number of merged tasks, lambda picked for "
                         f"each subset; validation and test inputs per task at most: "
                         f"{', '.join(map(str, caps))}.")]
    similar = {}
    for variant in variants.values():
        if "scaling.json" in variant and "vectors.json" in variant:
            similar[variant["label"]] = pair_similarity(variant)
    similar = {label: points for label, points in similar.items() if points}
    if similar:
        blocks += [("picture", plots.similarity(out / "pairs.png", similar)),
                   ("p", "Merging two tasks: normalized accuracy against the cosine of the two vectors.")]
    blocks += heat_maps(variants, "", out)
    for what, first, second in PUBLISHED["comparisons"]:
        compared = {key: v for key, v in variants.items() if key in ((first, "aligned"), (second, "aligned"))}
        rows = {v["label"]: list(v["scaling.json"]["subsets"].values())
                for v in compared.values() if "scaling.json" in v}
        if len(rows) == 2:
            path = out / f"scaling-{first}-{second}.png"
            blocks += [("picture", plots.scaling(path, rows)),
                       ("p", f"The same, {what}: {first} and {second}.")]
        blocks += heat_maps(compared, f"-{first}-{second}", out)
    return [("h2", "All encoders and variants together"), *blocks] if blocks else []


def heat_maps(variants, ending, out):
    """For each pair of tasks a picture of the heat maps of several variants, where there are two or more."""
    pairs = {}
    for variant in variants.values():
        label = f"{variant['encoder']}\n{variant['name']}"
        for pair in variant.get("disentangle.json", {"pairs": {}})["pairs"]:
            pairs.setdefault(pair, {})[label] = read_grid(variant, "disentangle", pair)
    blocks = []
    for pair, grids in sorted(pairs.items()):
        if len(grids) > 1:
            path = out / f"disentangle-{pair}{ending}.png"
            blocks += [("picture", plots.heat_map_panels(path, grids, f"xi of {pair}")),
                       ("p", f"Disentanglement error of {pair}, one colour scale.")]
    return blocks


def read_grid(variant, stem, pair):
    """(xi, lambdas) of a heat map."""
    path = variant["folder"] / stem / f"{pair}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["xi"], arrays["lambdas"]
    except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        again = f"python disentangle.py {variant['encoder']} --name {variant['name']} --overwrite"
        raise Refused(f'{path} cannot be read ({error}): delete it and run "{again}" again') from error


def pair_similarity(variant):
    """[(cosine, normalized accuracy)] of every merged pair of tasks."""
    vectors, points = variant["vectors.json"], []
    place = {name: index for index, name in enumerate(vectors["tasks"])}
    for row in variant["scaling.json"]["subsets"].values():
        if len(row["tasks"]) == 2 and set(row["tasks"]) <= set(place):
            a, b = row["tasks"]
            points.append((vectors["cosine"][place[a]][place[b]], row["normalized"]))
    return points


# --------------------------------------------------------------------------------------- the second paper


def which_parameters_train(variants, out):
    """Recipes that train some parameters or a linear encoder, beside those that train everything."""
    if all(trains_everything(variant["recipe"]) for variant in variants.values()):
        return []
    rows = []
    for variant in variants.values():
        if "merge.json" in variant:
            merge, test = variant["merge.json"], variant["merge.json"]["test"]
            against = variant.get("finetune.json", {}).get("against")
            near = merge["lambdas_within_2_points"]
            rows.append({
                "encoder": variant["encoder"], "name": variant["name"], "recipe": variant["recipe"]["name"],
                "tasks": len(merge["config"]["tasks"]), "n": sum(test["n"].values()),
                "single task": percent(merge["single_task_mean"]),
                "non-linear advantage": f"{100 * against['nonlinear_advantage']:+.1f}" if against else "",
                "addition": percent(test["absolute"]), "normalized": percent(test["normalized"]),
                "lambda": f"{merge['best_lambda']:g}",
                "lambdas within 2 points": f"{near[0]:g} to {near[1]:g}" if near else ""})
    published = PUBLISHED["second paper"]
    for values in published["rows"]:
        row = {key: "" if value is None else value
               for key, value in zip(published["columns"], values, strict=True)}
        rows.append(row | {"name": "paper", "tasks": 8})
    blocks = [("h2", f"Which parameters train, and linearization ({published['table']})"), ("table", rows),
              ("p", "Non-linear advantage: single-task accuracy of training all parameters, with the same "
                    "kind of head, minus the recipe's. Lambdas within 2 points: whose normalized validation "
                    "accuracy is that close to the best.")]
    advantage, posthoc = {}, {}
    for variant in variants.values():
        against = variant.get("finetune.json", {}).get("against")
        if against:
            rows = variant["finetune.json"]["tasks"]
            advantage[variant["label"]] = [(rows[task]["test"] + gap, rows[task]["test"])
                                           for task, gap in against["tasks"].items()]
        if "posthoc.json" in variant:
            rows = variant["posthoc.json"]["tasks"].values()
            posthoc[variant["label"]] = [(row["nonlinear"], row["linearized"]) for row in rows]
    if advantage:
        picture = plots.diagonal(out / "advantage.png", advantage, "single-task accuracy, all parameters",
                                 "single-task accuracy, the recipe")
        blocks += [("picture", picture),
                   ("p", "Non-linear advantage: how far below the diagonal a recipe's accuracy lies, "
                         "a dot per task.")]
    if posthoc:
        rows = []
        for variant in variants.values():
            if "posthoc.json" in variant:
                result = variant["posthoc.json"]
                rows.append({"encoder": variant["encoder"], "name": variant["name"],
                             "tasks": len(result["tasks"]),
                             "n": sum(row["n"] for row in result["tasks"].values()),
                             "fine-tuned": percent(result["mean"]["nonlinear"]),
                             "linearized after the fact": percent(result["mean"]["linearized"])})
        picture = plots.diagonal(out / "posthoc.png", posthoc, "accuracy, fine-tuned",
                                 "accuracy of its linearization")
        blocks += [("picture", picture),
                   ("p", "Kernel-behaviour test: a fine-tuned encoder against its own linearization at "
                         "theta_pre, a dot per task; "
                         "on the diagonal fine-tuning stayed in the kernel regime."),
                   ("table", rows)]
    for encoder in dict.fromkeys(variant["encoder"] for variant in variants.values()):
        own = [variant for variant in variants.values() if variant["encoder"] == encoder]
        blocks += both_metrics(own, out) + cosines(own, out)
    return blocks


def texts_added(variants):
    """Accuracies of encoders of texts on each task: at lambda = 0 and of the sum, beside the paper's sums."""
    published, rows = PUBLISHED["texts"], []
    for variant in variants.values():
        merge = variant.get("merge.json")
        if merge and inputs_of(merge["config"]) == "texts":
            for what, accuracies in (("lambda = 0", merge["test_lambda0"]), ("single task", {
                    "tasks": merge["single_task"], "absolute": merge["single_task_mean"]}),
                    ("addition", merge["test"])):
                rows.append({"encoder": variant["encoder"], "name": variant["name"], "of": what,
                             **{task: percent(value) for task, value in accuracies["tasks"].items()},
                             "mean": percent(accuracies["absolute"])})
    if not rows:
        return []
    for recipe, *values in published["rows"]:
        rows.append({"encoder": "paper, Flan-T5-base", "name": recipe, "of": "addition",
                     **dict(zip(published["columns"], map(str, values), strict=True))})
    about = ("Test accuracy in percent. The paper's heads are lm_head's rows, as under recipe zeroshot and "
             "those that end in -zeroshot; its attention trains q, k and v (attention-qkv-zeroshot).")
    return [("h2", f"Texts ({published['table']})"), ("p", about), ("table", rows)]


def both_metrics(variants, out):
    """Pictures of an encoder's heat maps of both metrics, for pairs whose representations were compared."""
    blocks, pairs, folder = [], set(), variants[0]["folder"].parent.name
    for variant in variants:
        pairs |= set(variant.get("representation.json", {"pairs": {}})["pairs"])
    for pair in sorted(pairs):
        grids = {}
        for stem, metric in METRICS.items():
            there = [v for v in variants if pair in v.get(f"{stem}.json", {"pairs": {}})["pairs"]]
            grids[metric] = {variant["name"]: read_grid(variant, stem, pair) for variant in there}
        blocks += [("picture", plots.metric_panels(out / f"metrics-{folder}-{pair}.png", pair, grids)),
                   ("p", f"Disentanglement of {pair}, {variants[0]['encoder']} (Figures 6 and 8): above of "
                         f"representations, below of predictions; one colour scale for each row.")]
    return blocks


def cosines(variants, out):
    matrices = {v["name"]: (np.array(v["vectors.json"]["cosine"]), v["vectors.json"]["tasks"])
                for v in variants if "vectors.json" in v}
    path = out / f"cosines-{variants[0]['folder'].parent.name}.png"
    return [("picture", plots.cosine_panels(path, matrices)),
            ("p", f"Cosine of task vectors, {variants[0]['encoder']} (Figure 10).")] if matrices else []


def costs(probes, variants):
    """What each variant's training took, and against the one that trains all parameters with such heads."""
    rows = []
    for variant in variants.values():
        finetune = variant.get("finetune.json", {})
        if finetune.get("tasks") and "steps" in finetune["config"]:    # fine-tuned here
            probe, config, cost = probes[variant["encoder"]], finetune["config"], finetune["cost"]
            trained, ratio = finetune["tasks"].values(), finetune.get("against", {}).get("cost_ratio", {})
            probed = variant["recipe"]["head"] == "probed"
            rows.append({
                "encoder": variant["encoder"], "name": variant["name"], "tasks": len(trained),
                "probing, s": f"{probing_seconds(probe, finetune['tasks']):.0f}" if probed else "",
                "search, s": search_seconds(finetune),
                "fine-tuning, s": f"{sum(row['seconds'] for row in trained):.0f}",
                "inputs trained on": len(trained) * config["steps"] * config["batch_size"],
                "parameters": f"{cost['trainable_params']:,}",
                "s per step": f"{cost['seconds_per_step']:.3f}",
                "peak MiB": f"{cost['peak_memory_bytes'] / 2 ** 20:.0f}",
                "parameters ratio": f"{ratio['trainable_params']:.2f}" if ratio else "",
                "time ratio": f"{ratio['seconds_per_step']:.2f}" if ratio else "",
                "memory ratio": f"{ratio['peak_memory_bytes']:.2f}" if ratio else ""})
    if any(row["time ratio"] for row in rows):
        for recipe, count, *ratios in PUBLISHED["cost"]["rows"]:
            rows.append({"encoder": "paper, Flan-T5-base", "name": recipe, "parameters": f"{count:,}",
                         **dict(zip(PUBLISHED["cost"]["columns"][2:], ratios, strict=True))})
    about = ("Medians over tasks; ratios against training all parameters with such heads (arXiv:2407.07089 "
             "Table 4). Probing: features of every input once, the search, then the heads. Search: the "
             "learning rates that were not picked. On a CPU the memory is that of the whole process.")
    return [("h2", "Cost"), ("p", about), ("table", rows)] if rows else []


def probing_seconds(probe, tasks):
    """Seconds of features, the search and both heads of some tasks."""
    seconds = probe["search"]["seconds"]
    for name in set(tasks) & set(probe["tasks"]):
        row = probe["tasks"][name]
        seconds += row["feature_seconds"] + sum(row[kind]["seconds"] for kind in PROBES)
    return seconds


def search_seconds(finetune):
    seconds = finetune.get("search", {}).get("seconds", {})
    others = [value for lr, value in seconds.items() if float(lr) != finetune["lr"]]
    return f"{sum(others):.0f}" if others else ""
