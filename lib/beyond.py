"""
A section of the report beyond the paper: merging rules. Variants and blocks are as in lib/comparisons.py.
"""
from lib.comparisons import minus_probing, percent


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
                             **{task: percent(value) for task, value in test["tasks"].items()}})
    about = ("Test accuracy in percent, lambda picked on validation for each rule; minus paper, minus "
             "converged: the merge minus either way of probing, +- its paired standard error.")
    return [("h2", "Merging rules"), ("p", about), ("table", rows)] if rows else []
