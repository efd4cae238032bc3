"""
The flags that stages share, spelt alike, and argparse types that say what is wrong in one line.
"""
import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from lib.files import Refused


def stage_parser(docstring, dtypes=("auto", "bf16", "fp32")):
    """A parser with the flags every stage has; `--help` shows the docstring with its pasteable commands."""
    from lib import texts
    from lib.encoders import ENCODERS
    parser = flag_parser(docstring)
    prompts = [f"  {task:<5} {prompt}" for task, prompt in texts.PROMPTS.items()]
    parser.epilog = "\n".join(["prompts in which a T5 reads the tasks of GLUE (lib/texts.py):", *prompts])
    add = parser.add_argument
    add("encoder", help=f"{', '.join(ENCODERS)}, timm:NAME, open_clip:ARCH/TAG or transformers:NAME")
    add("--tasks", help="comma-separated; NAME of a known task or of a folder in --data, "
                        "NAME=HUB_ID_OR_FOLDER, NAME=HUB_ID_OR_FOLDER:IMAGE_COLUMN:LABEL_COLUMN, paper8, "
                        "paper14 or paper20 (default: those of the stage before; probe.py: the encoder's "
                        "own, else paper8)")
    add("--data", type=folder, help="folder of data sets; DIR/NAME is looked for before the hub")
    add("--weights", type=Path,
        help="checkpoint file of the encoder, of transformers:NAME its folder, for machines without a hub")
    add("--image-size", type=positive,
        help="pixels; position embeddings are resampled (default: the checkpoint's own)")
    add("--prompts", type=Path, metavar="FILE",
        help='JSON for a T5, in place of what is below: {"sst2": {"prompt": "Is this good? {}", "words": '
             '{"negative": "no", "positive": "yes"}}}')
    add("--runs", type=folder, default=Path("runs"), help="where results go (default: runs)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
    add("--dtype", choices=dtypes, default="auto",
        help="of the forward pass (auto: bf16 where the hardware has it; default of disentangle.py fine: on "
             "GPUs that have it TF32, else fp32)")
    add("--compile", choices=["auto", "on", "off"], default="auto",
        help="auto: when the work ahead repays compiling")
    add("--seed", type=natural, default=0,
        help="reaches everything random except the pinned validation split")
    add("--overwrite", action="store_true",
        help="redo this stage even where its result exists, and keep nothing of it")
    return parser


def add_name(parser):
    """--name and --of, for the stages after finetune.py."""
    parser.add_argument("--name", type=folder_name, metavar="NAME",
                        help="the variant to work on, runs/ENCODER/NAME; finetune.py's --name, else its "
                             "recipe (default aligned)")
    parser.add_argument("--of", type=folder_name, metavar="NAME",
                        help="read fine-tuned encoders and vectors of this variant, and write results under "
                             "--name (default: the same)")


def add_rule(parser, rules):
    """--rule, for stages that merge vectors."""
    parser.add_argument("--rule", choices=list(rules), default="sum",
                        help="how vectors become one (default sum); of others results go to NAME-RULE")


def variant_names(args):
    """(variant whose vectors are read, variant that results go to); None twice of a stage without variants.

    A rule other than the sum writes beside what it reads, unless --name says where.
    Errors  Refused: --of without --name
    """
    if not hasattr(args, "name"):
        return None, None
    of, rule = getattr(args, "of", None), getattr(args, "rule", "sum")
    if of and not args.name and rule == "sum":
        raise Refused(f"--of {of} reads {of}: --name NAME says where results are to go")
    source = of or args.name or "aligned"
    if rule != "sum" and args.name in (None, source):
        return source, f"{source}-{rule}"
    return source, args.name or source


def flag_parser(docstring):
    """An argparse parser whose --help is the docstring and whose errors are one line."""
    parser = argparse.ArgumentParser(description=docstring,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def one_line(message):
        parser.exit(complain(parser.prog, f"{message} (--help lists the flags)"))

    parser.error = one_line
    return parser


def complain(stage, message):
    """One line on stderr; returns exit code 2."""
    print(f"{stage}: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def have_home():
    """A folder for caches where the user has none: an id that no passwd entry names, and no HOME."""
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = os.path.join(tempfile.gettempdir(), f"home-{os.getuid()}")


def speak_utf8():
    """Start again in UTF-8 mode where the locale is another: names of files and classes are UTF-8."""
    if sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):                # PYTHONIOENCODING may still lack a name's letters
        stream.reconfigure(errors="backslashreplace")


# --------------------------------------------------------------------------------------- argparse types


def natural(text, least=0, most=2 ** 63 - 1):
    """A whole number from 0 to what generators take as a seed."""
    number = int(text) if text.isdecimal() and len(text) < 20 else -1
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
    return number


def positive(text):
    """A whole number from 1 to what no machine gets through."""
    return natural(text, 1, 10 ** 9)


def positive_float(text):
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def share(text):
    """A number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def even_grid(flag, low, high, n):
    """n evenly spaced numbers from low to high, rounded to ten digits; Refused where that spoils them."""
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = np.linspace(low, high, n).round(10)
    if not np.isfinite(numbers).all() or len(np.unique(numbers)) < n:
        raise Refused(f"{flag} {high:g} is no end of a grid of {n} numbers that are kept to ten digits")
    return numbers


def at_the_end(best, lambdas):
    """What is to be said where the best of a grid is its largest."""
    return ", the grid's largest: try a larger --lambda-max" if 0 < best == len(lambdas) - 1 else ""


def folder(text):
    """The path of a folder, that there may be or not."""
    path = Path(text)
    if not text or path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return path


RESERVED = {"features", "heads", "state", "earlier"}       # folders of their own beside the variants' folders


def folder_name(text):
    """A name that can be a folder."""
    sound = text.replace("-", "").replace("_", "").replace(".", "")
    if not (sound.isascii() and sound.isalnum()) or text[0] in "-." or text in RESERVED:
        raise argparse.ArgumentTypeError(f"{text!r} is no name (letters, digits, _ - . only, "
                                         f"and not a folder of the study)")
    return text
