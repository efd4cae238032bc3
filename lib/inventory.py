"""
What a runs folder holds: results of every encoder and variant, what does not go together, what is missing.

Each function of the report returns blocks of lib/pages.py; a variant is as in lib/comparisons.py.
"""
from pathlib import Path

from lib.comparisons import PUBLISHED, trains_everything
from lib.files import read_json

MADE_BY = {"finetune.json": "finetune.py", "vectors.json": "make_vectors.py", "merge.json": "merge_eval.py",
           "disentangle.json": "disentangle.py", "scaling.json": "subsets.py"}
MADE_ON_DEMAND = {"representation.json": "disentangle.py --metric representation",
                  "posthoc.json": "posthoc.py", "precision.json": "precision.py",
                  "refit.json": "refit.py", "coefficients.json": "coefficients.py",
                  "negation.json": "negate.py"}


def find_results(runs):
    """({encoder: probe.json}, {(encoder, name): its results}) of everything in a runs folder."""
    probes, variants = {}, {}
    for path in sorted(runs.glob("*/probe.json")):
        probe = read_json(path, "python probe.py ENCODER")
        if not probe.get("tasks"):                         # stopped after its search
            continue
        encoder = probe["encoder"]
        folders = sorted(folder for folder in path.parent.iterdir() if folder.is_dir())
        probes[encoder] = probe
        for folder in folders:
            found = {}
            for file, script in (MADE_BY | MADE_ON_DEMAND).items():
                if (folder / file).exists():
                    found[file] = read_json(folder / file, f"python {script} {encoder} --name {folder.name}")
            if found:
                configs = [result["config"] for result in found.values()]
                recipe = next(config["recipe"] for config in configs if "recipe" in config)
                variants[encoder, folder.name] = {
                    "encoder": encoder, "name": folder.name, "folder": folder, "recipe": recipe,
                    "label": f"{encoder}, {folder.name}", **found}
    return probes, variants


# --------------------------------------------------------------------------------------- what goes together


def out_of_step(probes, variants):
    """A table of results that were made of other data, encoders or vectors than the results beside them."""
    rows = []
    for (encoder, name), variant in variants.items():
        of = [result["of"] for file, result in variant.items() if file.endswith(".json") and "of" in result]
        source = variants.get((encoder, of[0] if of else name), {})
        now = {(task, "data"): row["data"] for task, row in probes[encoder]["tasks"].items()}
        for task, row in source.get("finetune.json", {}).get("tasks", {}).items():
            now |= {(task, "finetuned"): row["weights_sha256"][0], (task, "single_task"): row["test"]}
        vectors = source.get("vectors.json", {"tasks": [], "weights_sha256": []})
        for task, fingerprint in zip(vectors["tasks"], vectors["weights_sha256"], strict=True):
            now[task, "vectors"] = fingerprint
        for file, result in variant.items():
            used = made_of(result) if file.endswith(".json") else {}
            tasks = {task for (task, kind), value in used.items() if now.get((task, kind), value) != value}
            if tasks:
                rows.append({"file": variant["folder"] / file, "tasks": ", ".join(sorted(tasks)),
                             "the command that makes it anew": result["command"]})
    about = ("These results were made of other data, fine-tuned encoders or vectors of some tasks than the "
             "results beside them: what stands below of both does not belong together.")
    return [("h2", "Out of step"), ("p", about), ("table", rows)] if rows else []


def made_of(result):
    """{(task, "data", "vectors", "finetuned" or "single_task"): what a result was made of}."""
    config, used = result["config"], {}
    whole = {kind: config.get(kind, {}) for kind in ("data", "vectors", "finetuned")}
    whole["single_task"] = config.get("single_task", {}).get("test", {})
    for kind, values in whole.items():
        used |= {(task, kind): value for task, value in values.items()}
    for key in ("tasks", "pairs", "subsets", "targets"):
        rows = result.get(key, {})
        for name, row in rows.items() if isinstance(rows, dict) else ():
            tasks, inputs = row.get("tasks", [name]), row.get("made_of", {})
            for kind, values in inputs.items():
                each = values if isinstance(values, list) else [values]
                named = {"vector": "vectors"}.get(kind, kind)
                used |= {(task, named): value for task, value in zip(tasks, each, strict=True)}
    return used


# --------------------------------------------------------------------------------------- what is missing


def not_there_yet(runs, probes, variants):
    """The commands that would make what is missing."""
    rows = []
    for encoder, probe in probes.items():
        possible = [name for name in PUBLISHED["first paper"]
                    if probe["text_tower"] or not name.startswith("zeroshot")]
        tuned = [name for (other, name), v in variants.items() if other == encoder and "finetune.json" in v]
        for name in dict.fromkeys([*possible, *tuned]):
            variant = variants.get((encoder, name), {})
            wanted = dict(MADE_BY)
            if variant and not trains_everything(variant["recipe"]):
                wanted |= {key: MADE_ON_DEMAND[key] for key in ("representation.json", "posthoc.json")}
                if variant["recipe"]["linear"]:
                    del wanted["posthoc.json"]
            for file, script in wanted.items():
                if file in variant and unfinished(file, variant[file], probe):
                    rows.append({"encoder": encoder, "name": name,
                                 "the command that makes it": variant[file]["command"]})
                elif unfinished(file, variant.get(file), probe):
                    stage, *words = script.split()
                    where = "" if runs == Path("runs") else f" --runs {runs}"
                    seed = f" --seed {probe['config']['seed']}" if probe["config"]["seed"] else ""
                    more = "".join(f" {word}" for word in words)
                    command = f"python {stage} {encoder}{where}{seed} --name {name}{more}"
                    rows.append({"encoder": encoder, "name": name, "the command that makes it": command})
    return [("h2", "Not there yet"), ("table", rows)] if rows else []


def unfinished(file, result, probe):
    """Whether a result is not there, or lacks tasks or subsets that its command would still add."""
    if file == "finetune.json" and result:
        return not set(probe["tasks"]) <= set(result["tasks"])
    if file == "scaling.json" and result:
        return max(len(row["tasks"]) for row in result["subsets"].values()) < len(result["config"]["tasks"])
    return result is None


def sources(runs, probes, variants):
    """Where each number comes from."""
    rows = []
    for encoder, probe in probes.items():
        own = [variant for (other, _), variant in variants.items() if other == encoder]
        path = own[0]["folder"].parent / "probe.json" if own else "probe.json"
        rows.append({"file": path, "command": probe["command"], "date": probe["machine"]["date"]})
        for variant in own:
            for file in MADE_BY | MADE_ON_DEMAND:
                if file in variant:
                    rows.append({"file": variant["folder"] / file, "command": variant[file]["command"],
                                 "date": variant[file]["machine"]["date"]})
    about = "Every number above stands in one of these files; the command is the last that wrote it."
    return [("h2", "Where the numbers come from"), ("p", about), ("table", rows)]
