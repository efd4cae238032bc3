"""
Fine-tuned encoders from elsewhere: a checkpoint becomes a task's theta_t, as if finetune.py had made it.

    python make_vectors.py open_clip:ViT-B-16-quickgelu/openai --name theirs --head text \\
        --tasks eurosat,dtd --from 'tanganke/clip-vit-base-patch16_{}'   # {}: a task's name in FusionBench
    python make_vectors.py vit_b16_dino --name mine --from dtd=run1/checkpoint.pth svhn=OWNER/NAME

Files are .safetensors, or what torch.save wrote of tensors in dicts; whatever lies around an encoder's names
(state_dict, model, teacher, module., visual., vit., an exponential moving average) is found by looking for
them. Names of timm, open_clip and OpenAI are timm's own converters' work; those of transformers' ViT, CLIP
and ConvNeXt are LAYOUTS. Nothing is pickled out of a file.
"""
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

import common
from lib import hub
from lib.encoders import file_sha256, weights_of
from lib.files import Refused, fingerprint, save_tensors
from lib.study import open_study
from lib.training import evaluate
from lib.vectors import head_file, norm, task_vector

HEADS = {"probed": (False, "probe.py's"), "own": (True, "the checkpoint's classifier"),
         "text": (False, "of class names, by the encoder's text tower")}      # whether they trained along
FARTHEST = 0.5  # |theta_t - theta_pre| / |theta_pre|: fine-tuning gives .001 to .3, other weights .8 and more
# where FusionBench (arXiv:2406.03280) calls a task otherwise in the names of its checkpoints
FUSIONBENCH = {"cars": "stanford_cars", "flowers102": "oxford_flowers102"}
FILES = "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
PREFERRED = re.compile(r"ema|teacher")                      # of two encoders in a file
CLASSIFIER = re.compile(r"(^|\.)(head|fc|classifier|head\.fc)\.weight$")


class Layout(NamedTuple):
    anchor: str     # a name that every checkpoint of this layout has, behind whatever prefix
    renamed: list   # [(regular expression, replacement)], all applied in turn
    fused: str = ""  # the end of the name that queries, keys and values have as one tensor, from .q, .k, .v


LAYOUTS = {
    "transformers' ViT": Layout("embeddings.patch_embeddings.projection.weight", [
        (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^embeddings\.cls_token", "cls_token"), (r"^embeddings\.position_embeddings", "pos_embed"),
        (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
        (r"attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r"attn.\1."),
        (r"attention\.(q|k|v)_proj\.", r"attn.\1."),
        (r"attention\.(?:output\.dense|o_proj)", "attn.proj"),
        (r"layernorm_before", "norm1"), (r"layernorm_after", "norm2"), (r"^layernorm\.", "norm."),
        (r"intermediate\.dense", "mlp.fc1"), (r"(?<=\d\.)output\.dense", "mlp.fc2")], "attn.qkv."),
    "transformers' CLIP": Layout("embeddings.class_embedding", [
        (r"^embeddings\.class_embedding", "class_embedding"),
        (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"^embeddings\.patch_embedding\.", "conv1."),
        (r"^pre_layrnorm", "ln_pre"), (r"^post_layernorm", "ln_post"),
        (r"^encoder\.layers\.", "transformer.resblocks."),
        (r"self_attn\.(q|k|v)_proj\.", r"attn.\1."), (r"self_attn\.", "attn."), (r"layer_norm", "ln_"),
        (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj")], "attn.in_proj_"),
    "transformers' ConvNeXt": Layout("embeddings.patch_embeddings.weight", [
        (r"^embeddings\.patch_embeddings", "stem.0"), (r"^embeddings\.layernorm", "stem.1"),
        (r"^encoder\.", ""), (r"downsampling_layer", "downsample"), (r"(\d+)\.layers\.", r"\1.blocks."),
        (r"^layernorm", "head.norm"), (r"layernorm", "norm"), (r"layer_scale_parameter", "gamma"),
        (r"dwconv", "conv_dw"), (r"pwconv", "mlp.fc")]),
    "OpenAI's CLIP": Layout("class_embedding", []),
    "Meta's ConvNeXt": Layout("downsample_layers.0.0.weight", []),
}


def bring(args, script):
    """Write theta_t and finetune.json, and heads that are not probe.py's, of each checkpoint in args.

    Errors  Refused: what is no checkpoint, of other names or shapes, of another base, without such a head
    """
    args.tasks, checkpoints = sources_of(args)
    study = open_study(args, script, "probe.json")
    encoder, trained_along = study.encoder, HEADS[args.head][0]
    kind = "random" if args.head == "own" else args.head    # whatever it began from, it is of theta_t alone
    how = {"name": "brought", "head": kind, "train_head": trained_along, "trained": "", "linear": False,
           "probe": args.probe if args.head == "probed" else None}
    files = {name: checkpoint_file(name, checkpoint) for name, checkpoint in checkpoints.items()}
    made_of = {name: {"data": data, "checkpoint": file_sha256(files[name], f"--from {name}:")}
               for name, data in study.data.items()}
    for name in made_of if args.head == "probed" else ():
        made_of[name]["head"] = study.probed_head(args.probe, name)
    tuned = {name: study.here / "finetuned" / f"{name}.safetensors" for name in checkpoints}
    heads = {name: head_file(study.here, how, name, encoder.name)[0] for name in checkpoints}
    result = study.result("finetune.json", {"recipe": how}, made_of, key="tasks", protected=True,
                          weights=lambda name: [tuned[name], heads[name]])
    if not result.todo:
        return
    result.values["recipe"] = how
    if args.head == "text":
        from lib import text_heads
        head_of = text_heads.maker(encoder, args.weights, study.folder, study.device)
    validated = [len(study.tasks[name].splits[split]) for name in result.todo for split in ("val", "test")]
    evaluator = study.evaluator(sum(validated), alone=True)

    for name in result.todo:
        task = study.tasks[name]
        state = read_checkpoint(name, files[name])
        theta_t, about = theta_of(name, checkpoints[name], state, encoder)
        print(f"brought {name}: {about['said']}", flush=True)
        if args.head == "probed":
            head = study.probed_heads[args.probe][name]
        elif args.head == "text":
            head = head_of(task)
        else:
            head = common.Head(*classifier(name, state, len(task.classes), encoder.width, study.device),
                               normalise=False)
        theta_t, _ = task_vector(weights_of(encoder.module), theta_t)
        with result.saving(name):
            save_tensors(tuned[name], theta_t, theta_pre=encoder.fingerprint, recipe=how, task=name,
                         data=task.fingerprint, head=fingerprint(common.head_tensors(head)))
            if args.head != "probed":
                common.save_head(heads[name], head, task, encoder)
            result.rows[name] = row = evaluate(evaluator, encoder, theta_t, task, head, ["val", "test"])
            row |= {"data": task.fingerprint, "source": task.source, "checkpoint": checkpoints[name],
                    "relative_distance": about["distance"]}
            tests = [each["test"] for each in result.rows.values()]
            result.values["mean_test"] = common.mean(tests)
        print(f"brought {name}: validation {row['val']:.4f}, test {row['test']:.4f} (n = {row['n_test']}) "
              f"under {HEADS[args.head][1]} head", flush=True)


def sources_of(args):
    """("a,b", {task: checkpoint}) of the words NAME=CHECKPOINT, or one CHECKPOINT with {} for all --tasks."""
    checkpoints = {}
    for word in args.checkpoints:
        name, given, checkpoint = word.partition("=")
        if given and name in checkpoints:
            raise Refused(f"--from names a task twice: {name}")
        if given:
            checkpoints[name] = checkpoint
        elif "{}" not in word or not args.tasks:
            raise Refused(f"--from {word}: give NAME=CHECKPOINT, or --tasks and a CHECKPOINT with {{}} where "
                          f"a task's name is")
        else:
            named = common.task_sources(args.tasks, args.data, recorded={})
            checkpoints |= {name: word.replace("{}", FUSIONBENCH.get(name, name)) for name in named}
    return args.tasks or ",".join(checkpoints), checkpoints


# --------------------------------------------------------------------------------------- files


def checkpoint_file(name, checkpoint):
    """The file of a checkpoint: a file, a folder that has one of FILES, or OWNER/NAME of the hub."""
    local = Path(checkpoint).expanduser()
    if local.is_dir():
        found = [local / file for file in FILES if (local / file).is_file()]
        if not found:
            raise Refused(f"--from {name}={checkpoint}: the folder has none of {', '.join(FILES)}")
        return found[0]
    if local.is_file() or not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint) or local.suffix in (".pt", ".bin"):
        return local
    hub.go_offline_if_unreachable()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    for file in FILES:
        try:
            with hub.checked_download(checkpoint):
                return Path(hf_hub_download(checkpoint, file))
        except EntryNotFoundError as error:
            missing = error
        except Refused:
            raise
        except Exception as error:  # the hub client raises many types
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise Refused(f"--from {name}={checkpoint} is no file here, and could not be had from the hub "
                          f"({reason})") from error
    raise Refused(f"--from {name}={checkpoint}: the repository has none of {', '.join(FILES)}") from missing


def read_checkpoint(name, file):
    """{name: tensor} of all tensors in a file; of nested dicts the keys with dots between them are the name.

    Errors  Refused: no file of tensors, a cut one, one that holds pickled objects
    """
    try:
        if file.suffix == ".safetensors":
            import safetensors.torch
            return safetensors.torch.load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling and safetensors raise many types on what is no checkpoint
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise Refused(f"--from {name}: {file} cannot be read as tensors by name ({reason})") from error
    return flattened(loaded)


def flattened(values, above=""):
    """{name: tensor} of nested dicts."""
    tensors = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict):
            tensors |= flattened(value, f"{above}{key}.")
        elif torch.is_tensor(value):
            tensors[f"{above}{key}"] = value
    return tensors


# --------------------------------------------------------------------------------------- names


def theta_of(name, checkpoint, state, encoder):
    """(theta_t {name: float32 tensor}, {"said", "distance"}) of a checkpoint's tensors by their own names.

    Errors  Refused: no encoder of these names, other shapes, tensors missing, farther than FARTHEST
    """
    which, theta_pre = f"--from {name}={checkpoint}", weights_of(encoder.module)
    layout, prefix = layout_of(which, state, theta_pre)
    inner = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    projection = state.get(prefix.removesuffix("vision_model.") + "visual_projection.weight")
    if layout == "transformers' CLIP" and projection is not None:
        inner["proj"] = projection.T
    try:
        named = as_named_by(encoder, layout, inner)
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:      # of timm's converters
        raise Refused(f"{which}: another architecture than {encoder.name} ({error})") from error
    theta_t, other = {}, []
    for key, before in theta_pre.items():
        if key in named and named[key].shape == before.shape:
            theta_t[key] = named[key].float()
        elif key in named and not projects(encoder, key):
            other.append(f"{key} {list(named[key].shape)}, {list(before.shape)} in {encoder.name}")
    if other:
        raise Refused(f"{which}: another architecture: {other[0]} ({len(other)} tensors of {len(theta_pre)})")
    kept = [key for key in theta_pre if key not in theta_t]
    lacking = [key for key in kept if not projects(encoder, key)]
    if lacking:
        raise Refused(f"{which} lacks {lacking[0]} ({len(lacking)} tensors of {len(theta_pre)})")
    ignored = [key for key in named if key not in theta_t]
    kinds = {numberless(key) for key in theta_pre}
    more = [key for key in ignored if numberless(key) in kinds and key not in theta_pre]
    if more:
        raise Refused(f"{which}: another architecture: {encoder.name} has no {more[0]} ({len(more)} tensors)")
    theta_t |= {key: theta_pre[key] for key in kept}
    for key, tensor in theta_t.items():
        if not tensor.isfinite().all():
            raise Refused(f"{which}: {key} holds values that are not finite")
    update = {key: theta_t[key] - theta_pre[key] for key in theta_t}
    distance = norm(update) / norm(theta_pre)
    if distance == 0:
        raise Refused(f"{which} is theta_pre itself: fine-tuning has changed nothing")
    if distance > FARTHEST:
        raise Refused(f"{which} is no fine-tuned {encoder.name}: |theta_t - theta_pre| / |theta_pre| is "
                      f"{distance:.2f}, where fine-tuning gives .001 to .3 and unrelated weights .8 and more")
    ignored += [key for key in state if not key.startswith(prefix)]
    coarse = sorted({str(tensor.dtype)[6:] for tensor in named.values()} & {"float16", "bfloat16"})
    said = [f"{len(theta_t) - len(kept)} tensors of {checkpoint}{f' behind `{prefix}`' if prefix else ''}"
            f"{f' by the names of {layout}' if layout else ''}", f"relative distance {distance:.1e}"]
    said += [f"ignored {listed(ignored)}"] if ignored else []
    said += [f"as in theta_pre, not in the file: {listed(kept)}"] if kept else []
    said += [f"stored in {coarse[0]}, whose rounding is in the vector"] if coarse else []
    return theta_t, {"said": "; ".join(said), "distance": distance}


def numberless(key):
    """A tensor's name without the number of its block."""
    return re.sub(r"\d+", "#", key)


def listed(keys):
    """Names for a message: the first three, and how many."""
    return ", ".join(sorted(keys)[:3]) + (f", ... ({len(keys)})" if len(keys) > 3 else "")


def projects(encoder, key):
    """Whether a tensor is CLIP's projection to the joint space, which fine-tuned towers often lack."""
    library = encoder.description["architecture"]["library"]
    return re.fullmatch({"timm": r"head\.(weight|bias)", "open_clip": "proj"}.get(library, "(?!)"), key)


def layout_of(which, state, theta_pre):
    """(layout, None for the encoder's own names, and the prefix before all of them)."""
    found = Counter()                                       # {prefix: how many of the encoder's names follow}
    for key in state:
        parts = key.split(".")
        for place in range(len(parts)):
            if ".".join(parts[place:]) in theta_pre:
                found["".join(f"{part}." for part in parts[:place])] += 1
    most = max(found.values(), default=0)
    if 2 * most > len(theta_pre):
        return None, only(which, [prefix for prefix, count in found.items() if count == most])
    for layout, (anchor, *_) in LAYOUTS.items():
        prefixes = [key.removesuffix(anchor) for key in state if key == anchor or key.endswith(f".{anchor}")]
        if prefixes:
            return layout, only(which, prefixes)
    raise Refused(f"{which}: no such encoder in it: its {len(state)} tensors ({listed(state)}) are named "
                  f"neither like {listed(theta_pre)} nor as {', '.join(LAYOUTS)}")


def only(which, prefixes):
    """The one prefix, of several the one of an average or a teacher; Refused where that is not one."""
    preferred = [prefix for prefix in prefixes if PREFERRED.search(prefix)] if len(prefixes) > 1 else prefixes
    if len(preferred) != 1:
        raise Refused(f"{which} holds {len(prefixes)} encoders, behind "
                      f"{' and '.join(f'`{prefix}`' for prefix in prefixes)}: save one of them")
    return preferred[0]


def as_named_by(encoder, layout, inner):
    """{name: tensor} of a checkpoint's encoder by the names of the encoder's library."""
    named = dict(inner)
    if layout:
        named = {}
        for key, tensor in inner.items():
            for pattern, replacement in LAYOUTS[layout].renamed:
                key = re.sub(pattern, replacement, key)
            named[key] = tensor
    if layout and LAYOUTS[layout].fused:
        for key in [key for key in named if ".attn.q." in key]:
            parts = [named.pop(key.replace(".attn.q.", f".attn.{part}."), None) for part in "qkv"]
            if all(part is not None for part in parts):
                named[key.replace("attn.q.", LAYOUTS[layout].fused)] = torch.cat(parts)
    if encoder.description["architecture"]["library"] != "timm":
        return named
    if "class_embedding" in named:
        named = {f"visual.{key}": tensor for key, tensor in named.items()}     # where timm looks for them
    convert = getattr(sys.modules[type(encoder.module).__module__], "checkpoint_filter_fn", None)
    return convert(named, encoder.module) if convert else named


def classifier(name, state, classes, width, device):
    """(weight (C, D), bias (C,) or None) of the one classifier of this shape in a checkpoint."""
    found = {key: tensor for key, tensor in state.items() if CLASSIFIER.search(key) and tensor.ndim == 2}
    fitting = [key for key, tensor in found.items() if tensor.shape == (classes, width)]
    preferred = [key for key in fitting if PREFERRED.search(key)] or fitting
    if len(preferred) != 1:
        shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in found.items()) or "none"
        raise Refused(f"--head own: task {name} needs one classifier of {classes} classes on {width} "
                      f"numbers, and its checkpoint has {shapes}: leave out --head for probe.py's head")
    bias = state.get(preferred[0].removesuffix("weight") + "bias")
    return state[preferred[0]].float().to(device), None if bias is None else bias.float().to(device)
