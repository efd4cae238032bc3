"""
Sections of the report on pre-training: the paper's eight encoders in small, and emergence.py's table.

Each function returns blocks of lib/pages.py; a variant is as in lib/comparisons.py.
"""
from lib.comparisons import PUBLISHED
from lib.files import read_json

MEASURES = ("lambda = 0", "single task", "addition", "normalized", "lambda")       # of the published tables


def paper_in_small(variants):
    """A table for each recipe: an encoder of run_all.sh tiny-paper in a row, beside the one it stands for."""
    blocks = []
    for recipe, published in PUBLISHED["first paper"].items():
        rows = {}
        for small, large in PUBLISHED["in small"].items():
            merge = variants.get((small, recipe), {}).get("merge.json")
            if merge and merge["config"]["recipe"]["name"] == recipe:
                theirs = published["rows"].get(large, [None] * len(MEASURES))
                rows[small] = figures(merge), dict(zip(MEASURES, theirs, strict=True)), large
        if len(rows) > 1:
            blocks += [("h2", f"The paper in small: {recipe} ({published['table']})"),
                       ("table", [side_by_side(small, *row) for small, row in rows.items()]),
                       ("table", orders(rows))]
    if blocks:
        blocks.append(("p", "Ours / the paper's, percent of test images. Each row stands for an encoder of "
                            "the paper by its scheme, relative amount of pictures and relative size; tasks, "
                            "pictures and scale are others, so that orders compare, not numbers. gain: "
                            "addition - lambda = 0."))
    return blocks


def figures(merge):
    """{measure: number} of a merge.json."""
    test = merge["test"]
    return {"lambda = 0": 100 * merge["test_lambda0"]["absolute"],
            "single task": 100 * merge["single_task_mean"], "addition": 100 * test["absolute"],
            "normalized": 100 * test["normalized"], "lambda": merge["best_lambda"]}


def side_by_side(small, ours, theirs, large):
    row = {"encoder": small, "stands for": large}
    for measure in MEASURES:
        form = "g" if measure == "lambda" else ".1f"
        published = "-" if theirs[measure] is None else f"{theirs[measure]:{form}}"
        row[measure] = f"{ours[measure]:{form}} / {published}"
    return row


def orders(rows):
    """What the second encoder of each of the paper's comparisons has more than the first, in points."""
    table = []
    for claim, first, second in PUBLISHED["orders"]:
        if first in rows and second in rows:
            line = {"": claim}
            for measure in ("addition", "normalized", "gain"):
                differences = []
                for side in (0, 1):                        # ours, the paper's
                    low, high = (value_of(rows[name][side], measure) for name in (first, second))
                    differences.append("-" if None in (low, high) else f"{high - low:+.1f}")
                line[measure] = " / ".join(differences)
            table.append(line)
    return table


def value_of(measured, measure):
    """A measure, or the gain, None where the paper does not have it."""
    if measure != "gain":
        return measured[measure]
    known = None not in (measured["addition"], measured["lambda = 0"])
    return measured["addition"] - measured["lambda = 0"] if known else None


# --------------------------------------------------------------------------------------- along pre-training


def along_pretraining(runs):
    """emergence.py's figure, its table over seeds, and what its rows are."""
    path = runs / "emergence" / "emergence.json"
    if not path.exists():
        return []
    result, rows = read_json(path, "python emergence.py"), []
    config = result["config"]
    for group in result["over_seeds"]:
        steps = "0" if group["scheme"] == "random" else f"{group['step']} of {config['pretrain_steps']}"
        shown = {"scheme": group["scheme"], "steps": steps, "seeds": group["seeds"]}
        for column in ("probing", "single", "addition", "minus_probing"):
            shown[column.replace("_", " ")] = with_deviation(group[column], 100, 1)
        shown["lambda"] = with_deviation(group["best_lambda"], 1, 2)
        for way in ("as it is", "norm", "gain"):
            shown[f"xi, {way}"] = with_deviation(group[f"xi, {way}, prediction"], 1, 2)
        shown["KL, norm"] = with_deviation(group["xi, norm, representation"], 1, 2)
        shown["cosine"] = with_deviation(group["cosine"], 1, 3)
        shown["overlap"] = with_deviation(group["overlap"], 1, 2)
        rows.append(shown)
    ranks = ", ".join(f"{way} {value:+.2f}" for way, value in result["rank_correlation"].items()
                      if value is not None)
    about = (f"Probing and addition in percent of test images against converged heads, mean +- standard "
             f"deviation over seeds; xi in [-1, 1]^2, mean over pairs of tasks that follow each other, of "
             f"{config['samples']} images each: as fine-tuning leaves the vectors, all rescaled to "
             f"{config['relative_norm']:g} of theta_pre's norm, and each scaled down to where its task gains "
             f"{100 * config['gain']:g} points over probing on validation images (tasks that gain less are "
             f"left out). Spearman's rank correlation of xi with probing over {len(result['encoders'])} "
             f"encoders: {ranks}.")
    return [("h2", "Along pre-training (emergence.py)"), ("picture", path.with_suffix(".png")), ("p", about),
            ("table", rows)]


def with_deviation(found, factor, places):
    """[mean, deviation or None] as "71.8 +- 0.4"."""
    average, deviation = found
    if average is None:
        return ""
    spread = "" if deviation is None else f" +- {factor * deviation:.{places}f}"
    return f"{factor * average:.{places}f}{spread}"
