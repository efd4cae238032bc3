"""
The one door of every stage: how it starts, is skipped, goes on after a kill, saves, and says what it did.

    study = open_study(args, __file__, "finetune.json")     # encoder, tasks, device, where results go
    result = study.result("merge.json", settings, inputs)   # made already, to be gone on with, or new
    if not result.todo:
        return
    with result.saving():                # what stands in the way is set aside first, the JSON is written last
        ...

A result remembers its settings, what it was made of, and the code that made it. Training is protected: other
settings ask for --name or --overwrite. An analysis always runs; what it replaces is kept in earlier/, under
its date.
"""
import errno
import functools
import itertools
import os
import signal
import sys
from pathlib import Path

import torch

import common
from lib import encoders, flags, ranks
from lib.devices import compile_pays, has_tf32, pick_device, pick_dtype
from lib.files import Refused, file_metadata, read_json
from lib.flags import complain, have_home, speak_utf8
from lib.linearized import LinearizedEvaluator
from lib.results import Result, jsonable, refuse_other_settings
from lib.vectors import head_file, probe_file, vector_metadata


# what a file system says of a place or a limit, not of a bug
OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
                  errno.EMFILE, errno.ENFILE, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO,
                  errno.ESTALE}


def run(main, parse_args):
    """Run a stage from the command line: a refusal is one line and exit code 2, a bug keeps its traceback."""
    speak_utf8()
    have_home()
    stage = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # so that temporary files are removed
    if ranks.rank() > 0:
        sys.stdout = open(os.devnull, "w")                 # rank 0 speaks for all; errors still show
    go_on = "what was finished is kept, the same command goes on from there"
    try:
        args = parse_args()
        ranks.join()
        main(args)
        ranks.leave()
        sys.stdout.flush()
    except Refused as refusal:
        sys.exit(complain(stage, refusal))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())     # Python says the rest at its end
        complain(stage, f"what read its output has ended; {go_on}")
        sys.exit(141)
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        sys.exit(complain(stage, f"{error.strerror}: {error.filename or 'writing a result'}; {go_on}"))
    except (MemoryError, RuntimeError) as error:
        of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not of_memory and "allocate memory" not in str(error):
            raise
        reason = str(error).partition("\n")[0] or "of this machine"
        sys.exit(complain(stage, f"out of memory ({reason}): try a smaller --batch-size or --image-size"))
    except KeyboardInterrupt:
        print(f"{stage}: interrupted; {go_on}", file=sys.stderr)
        sys.exit(130)


# --------------------------------------------------------------------------------------- what a stage opens


class Study:
    """An encoder, its tasks, a device, and the folder of a variant; see open_study."""

    def __init__(self, args, script, before):
        self.script, self.seed, self.runs, self.asked = Path(script), args.seed, args.runs, args.encoder
        self.overwrite, self.compile = args.overwrite, args.compile
        self.folder = encoders.run_folder(args.runs, args.encoder)              # runs/ENCODER
        source, self.name = flags.variant_names(args)
        self.here = self.folder / (self.name or "")        # this stage's results
        self.source = self.folder / (source or "")         # finetune.json, vectors
        recorded = self.recorded(before)
        asked = None if args.tasks is None else common.task_sources(args.tasks, args.data, recorded)
        self.device = pick_device(args.device)
        precision = args.dtype
        if precision == "fine":
            precision = "tf32" if has_tf32(self.device) else "fp32"
        self.dtype, self.dtype_reason = pick_dtype(precision, self.device)
        self.tf32 = precision == "tf32"
        self.encoder = encoders.load_encoder(args.encoder, args.runs, args.weights, args.image_size,
                                             args.prompts)
        self.sources = asked or recorded or self.default_sources(args.data)

    def recorded(self, before):
        """{task: source} of the stage before's result, "probe.json" or "finetune.json"; {} without one."""
        path = (self.folder if before == "probe.json" else self.source) / (before or "")
        if not path.is_file():
            return {}
        made_by = f"python {Path(before).stem}.py {self.asked}"
        result = self.finetune_json if before == "finetune.json" else read_json(path, made_by)
        return {name: row["source"] for name, row in result.get("tasks", {}).items()}

    def default_sources(self, data):
        """The tasks an encoder's description names, else the paper's eight."""
        return common.task_sources(",".join(self.encoder.description["tasks"] or common.TASKS), data)

    @property
    def precision(self):
        """The forward pass's dtype in a word, for a result's config."""
        return "tf32" if self.tf32 else str(self.dtype)[6:]

    @functools.cached_property
    def tasks(self):
        """{name: common.Task}, loaded when first asked for."""
        return {name: self.load_task(name) for name in self.sources}

    def load_task(self, name):
        return common.load_task(name, self.sources[name], self.encoder, self.runs, self.seed)

    def settings(self, stage, args, defaults, recipe=None):
        """{knob: value} from the command line, else the encoder's own setting for a stage, else the default.

        An encoder's setting may depend on the recipe: {recipe: value}.
        """
        own = self.encoder.description["defaults"].get(stage, {})
        chosen = {}
        for key, default in defaults.items():
            value = own.get(key, default)
            if isinstance(value, dict):
                value = value.get(recipe, default)
            chosen[key] = value if getattr(args, key) is None else getattr(args, key)
        return chosen

    @functools.cached_property
    def finetune_json(self):
        """finetune.json of the variant, read once."""
        return read_json(self.source / "finetune.json", self.made_by)

    @property
    def made_by(self):
        return f"python finetune.py {self.asked} --name {self.source.name}"

    @functools.cached_property
    def finetuned(self):
        """finetune.json of the variant; Refused if it is missing or lacks one of the tasks."""
        path, rows = self.source / "finetune.json", self.finetune_json.get("tasks", {})
        missing = [name for name in self.sources if name not in rows]
        if missing:
            words = f'run "{self.made_by} --tasks {",".join(self.sources)}" first'
            raise Refused(f"{path} lacks {', '.join(missing)}: {words}")
        return self.finetune_json

    @property
    def single_task(self):
        """{"val", "test": {task: accuracy of its theta_t under its own head}}; Refused where one is 0."""
        rows, accuracy = self.finetuned["tasks"], {"val": {}, "test": {}}
        for split, name in itertools.product(accuracy, self.sources):
            accuracy[split][name] = rows[name][split]
        none = [name for name in self.sources if 0 in (rows[name]["val"], rows[name]["test"])]
        if none:
            others = ",".join(name for name in self.sources if name not in none) or "others"
            raise Refused(f"{', '.join(none)}: theta_t has no image right ({self.source.name}/finetune.json) "
                          f"and so no normalized accuracy: fine-tune longer, or go on with --tasks {others}")
        return accuracy

    @property
    def recipe(self):
        """How theta_t came about, from finetune.json: name, head, train_head, trained, linear."""
        return self.finetuned["recipe"]

    @functools.cached_property
    def heads(self):
        """{task: the Head that its theta_t was trained against}."""
        return {name: self.load_head(task) for name, task in self.tasks.items()}

    @functools.cached_property
    def probed_heads(self):
        """{way of probing: {task: Head}}: the baselines, whatever heads this variant was trained against."""
        heads = {kind: {} for kind in common.PROBES}
        for kind, (name, task) in itertools.product(heads, self.tasks.items()):
            path, made_by = probe_file(self.folder, kind, name, self.encoder.name)
            heads[kind][name] = common.load_head(path, made_by, task, self.encoder, self.device)
        return heads

    def probes(self):
        """{way of probing: {task: SHA-256 of its head}}, for a result's inputs; the heads are not read."""
        found = {kind: {} for kind in common.PROBES}
        for kind, name in itertools.product(found, self.sources):
            found[kind][name] = self.probed_head(kind, name)
        return found

    def vectors(self, names=None):
        """{task: SHA-256 of its vector}, for a result's inputs; the vectors are not read."""
        names = names or self.sources
        about = {name: vector_metadata(self.source, name, self.encoder)
                 for name in self.finetuned["tasks"] if name in names}
        return {name: metadata["sha256"] for name, metadata in about.items()}

    def probed_head(self, kind, name):
        """SHA-256 of a task's head from one way of probing; Refused where probe.json is of another."""
        head, made_by = probe_file(self.folder, kind, name, self.encoder.name)
        found, rows = file_metadata(head, made_by)["sha256"], self.probe_rows
        if rows is not None and found not in rows.get(name, {"weights_sha256": []})["weights_sha256"]:
            raise Refused(f'{head} is not what {self.folder / "probe.json"} describes, as after an '
                          f'interrupted --overwrite: run "{made_by}" again')
        return found

    @functools.cached_property
    def probe_rows(self):
        """{task: row} of probe.json, read once; None where only the heads are there."""
        path = self.folder / "probe.json"
        return read_json(path, f"python probe.py {self.encoder.name}")["tasks"] if path.exists() else None

    def load_head(self, task):
        """The head of a task; Refused where its theta_t was trained and tested on other data than these."""
        row, path = self.finetuned["tasks"][task.name], self.source / "finetune.json"
        if row["data"] != task.fingerprint:
            raise Refused(f"{path}: {task.name} was fine-tuned and tested on other data than there are now: "
                          f'run "{self.made_by} --tasks {task.name} --overwrite" first')
        path, made_by = head_file(self.source, self.recipe, task.name, self.encoder.name)
        return common.load_head(path, made_by, task, self.encoder, self.device)

    @functools.cached_property
    def summaries(self):
        """{task: what its stored inputs say of themselves}, without loading them."""
        summaries = {}
        for name, source in self.sources.items():
            summaries[name] = common.task_summary(name, source, self.encoder, self.runs, self.seed)
        return summaries

    @property
    def data(self):
        """{task: fingerprint of its inputs and labels}, without loading them."""
        return {name: summary["sha256"] for name, summary in self.summaries.items()}

    def evaluator(self, images, linear=False, alone=False):
        """The evaluator, or its linear twin; `images` forward passes ahead decide whether compiling pays."""
        ranks.wait()                                       # none writes before all have read what is there
        mode = "off" if linear else self.compile
        work = images if alone else images / ranks.world()
        compiled, why = compile_pays(mode, self.device, self.encoder, work)
        kind = LinearizedEvaluator if linear else common.Evaluator
        evaluator = kind(self.encoder, self.device, self.dtype, compiled, alone, self.tf32)
        stored = next(iter(self.summaries.values()))["shapes"]["test_inputs"][1:]
        failed = evaluator.compile_now(stored) if compiled else ""
        if failed and mode == "on":
            raise Refused(f"--compile on: {failed}; leave it out to go on without")
        compiled, why = compiled and not failed, failed or why
        print(f"evaluator: {self.precision} ({self.dtype_reason}), batch {evaluator.batch_size}, "
              f"{'compiled' if compiled else 'eager'} ({why})", flush=True)
        return evaluator

    def config(self, settings):
        """A result's config: what every stage has in it, and the settings of its own."""
        return {"encoder": self.encoder.name, "theta_pre": self.encoder.fingerprint,
                **self.encoder.settings, "seed": self.seed, **settings}

    def refuse_other_settings(self, file, settings):
        """As `result` does for what is protected, but before its inputs are read, decoded or drawn."""
        path = self.here / file
        if path.exists() and not self.overwrite:
            beside = "--name NEW" if self.name else "another --runs"
            there = read_json(path, "the same command")
            refuse_other_settings(path, there, jsonable(self.config(settings)), beside)

    def result(self, file, settings, inputs=None, **more):
        """The Result (lib/results.py) in `file` under these settings.

        more    its key, files, weights, protected
        """
        result = Result(self.here / file, self.config(settings), inputs or {}, self.script, self.device,
                        self.overwrite, named=bool(self.name), **more)
        if self.name:
            result.provenance["of"] = self.source.name     # whose vectors these are
        return result


def open_study(args, script, before=None):
    """Load what a stage works on.

    script   the stage's __file__: its code is a setting of what it makes
    before   the result whose tasks are the default, "probe.json" or "finetune.json"; None: the encoder's own
    """
    return Study(args, script, before)
