"""
Sections of the report beyond the paper: merging rules, coefficients of tasks, heads fitted again, negation.

Variants and blocks are as in lib/comparisons.py.
"""
from common import PROBES
from lib.comparisons import minus_probing, percent, with_error


def merging_rules(variants):
    """The merges of the same vectors by two rules or more."""
    groups, rows = {}, []
    for variant in variants.values():
        if "merge.json" in variant:
            merge = variant["merge.json"]
            groups.setdefault((variant["encoder"], merge["of"]), []).append((variant["name"], merge))
    for (encoder, of), merges in groups.items():
        if len({merge["rule"] for _, merge in merges}) > 1:
            for name, merge in merges:
                test = merge["test"]
                rows.append({"encoder": encoder, "vectors of": of, "rule": merge["rule"], "name": name,
                             "n": sum(test["n"].values()), "absolute": percent(test["absolute"]),
                             "normalized": percent(test["normalized"]), "lambda": f"{merge['best_lambda']:g}",
                             **minus_probing(merge),
                             "merging, s": f"{merge['merging_seconds']:.1f}",
                             "MiB": f"{merge['merging_peak_bytes'] / 2 ** 20:.0f}",
                             **{task: percent(value) for task, value in test["tasks"].items()}})
    about = ("Test accuracy in percent, lambda picked on validation for each rule; minus paper, minus "
             "converged: the merge minus either way of probing, +- its paired standard error; merging: its "
             "seconds, and the peak of memory besides what was there.")
    return [("h2", "Merging rules"), ("p", about), ("table", rows)] if rows else []


def beyond_the_sum(variants):
    """Heads fitted again on merged encoders, and a coefficient for each task."""
    fitted, coefficients = [], []
    for variant in variants.values():
        label = {"encoder": variant["encoder"], "name": variant["name"]}
        for way, row in variant.get("refit.json", {"ways": {}})["ways"].items():
            fitted.append({**label, "heads": way, "n": sum(row["test"]["n"].values()),
                           "at lambda = 0": percent(row["test_lambda0"]["absolute"]),
                           "at its best lambda": percent(row["test"]["absolute"]),
                           "lambda": f"{row['best_lambda']:g}", "gain": with_error(row["gain"]),
                           "minus probing": with_error(row["minus_probing"]),
                           "single task": percent(variant["refit.json"]["single_task_mean"])})
        if "coefficients.json" in variant:
            result = variant["coefficients.json"]
            val = result["val"]
            coefficients.append({
                **label, "n": sum(result["test"]["n"].values()),
                "coefficients": ", ".join(f"{task} {value:g}" for task, value
                                          in result["coefficients"].items()),
                "validation, normalized": f"{percent(val['sum'])} to {percent(val['normalized'])}",
                "test": percent(result["test"]["absolute"]), "minus the sum": with_error(result["minus_sum"]),
                **{f"minus {kind}": with_error(result[f"minus_{kind}"]) for kind in PROBES},
                "images": result["images"]})
    blocks = []
    if fitted:
        about = ("Test accuracy in percent of the merged encoder under heads that are obtained anew "
                 "(refit.py); gain: over the same at lambda = 0; minus probing: minus `all` at lambda = 0, "
                 "both +- the paired standard error.")
        blocks += [("h2", "Heads fitted again"), ("p", about), ("table", fitted)]
    if coefficients:
        blocks += [("h2", "A coefficient for each task"), ("table", coefficients)]
    return blocks


def negations(variants):
    """What subtracting vectors does to their tasks, and the others, and what a new head brings back."""
    rows, pictures = [], []
    for variant in variants.values():
        if "negation.json" not in variant:
            continue
        result = variant["negation.json"]
        for label, row in result["means"].items():
            minus_random = row.get("minus_random", {})
            moved = {way: f"{percent(row['lambda0'][way])} to {percent(row['test'][way])} "
                          f"({with_error(row['change'][way])})" for way in row["change"]}
            rows.append({"encoder": variant["encoder"], "name": variant["name"], "subtracted": label,
                         "targets": row["targets"], "n": row["n"], "lambda": f"{row['lambda']:.3g}",
                         "chance": percent(row["chance"]), **moved,
                         "control": f"{percent(row['control']['lambda0'])} to "
                                    f"{percent(row['control']['picked'])}",
                         **{f"{way}, minus random": with_error(each) for way, each in minus_random.items()}})
        pictures += [("picture", variant["folder"] / "negation.png"),
                     ("p", f"Forgetting against what control keeps: {variant['label']}.")]
    about = ("Mean test accuracy in percent of targets, from lambda = 0 to the lambda picked, +- the paired "
             "standard error, under the head as it was (frozen), heads fitted again on all labels and on "
             "few, and by nearest neighbours; control is the mean of the other tasks. For orientation, CLIP "
             "ViT-L/14 with heads from text (arXiv:2212.04089 Table 1; control ImageNet): own 64.8 to 19.0, "
             "control 75.5 to 72.9; random 60.9, control 72.9.")
    return [("h2", "Negation"), ("p", about), ("table", rows), *pictures] if rows else []
