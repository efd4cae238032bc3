"""
The flags that stages share, spelt alike, and argparse types that say what is wrong in one line.
"""
import argparse
import os
import sys
from pathlib import Path


def stage_parser(docstring):
    """A parser with the flags every stage has; `--help` shows the docstring with its pasteable commands."""
    from lib.encoders import ENCODERS
    parser = flag_parser(docstring)
    add = parser.add_argument
    add("encoder", help=f"{', '.join(ENCODERS)}, timm:NAME or open_clip:ARCH/TAG")
    add("--tasks", help="comma-separated; NAME of a known task or of a folder in --data, or "
                        "NAME=HUB_ID_OR_FOLDER (default: those of the stage before; probe.py: the encoder's "
                        "own, else the paper's eight)")
    add("--data", type=Path, help="folder of data sets; DIR/NAME is looked for before the hub")
    add("--weights", type=Path, help="checkpoint file of the encoder, for machines without a hub")
    add("--image-size", type=positive,
        help="pixels; position embeddings are resampled (default: the checkpoint's own)")
    add("--runs", type=Path, default=Path("runs"), help="where results go (default: runs)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto",
        help="of the forward pass (auto: bf16 where the hardware has it; disentangle.py fp32)")
    add("--compile", choices=["auto", "on", "off"], default="auto",
        help="auto: when the work ahead repays compiling")
    add("--seed", type=natural, default=0,
        help="reaches everything random except the pinned validation split")
    add("--overwrite", action="store_true",
        help="redo this stage even where its result exists, and keep nothing of it")
    return parser


def add_name(parser):
    """--name and --of, for the stages after finetune.py."""
    parser.add_argument("--name", type=folder_name, default="aligned", metavar="NAME",
                        help="the variant to work on, runs/ENCODER/NAME; finetune.py's --name, else its "
                             "recipe (default aligned)")
    parser.add_argument("--of", type=folder_name, metavar="NAME",
                        help="read fine-tuned encoders and vectors of this variant, and write results under "
                             "--name (default: the same)")


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


def speak_utf8():
    """Start again in UTF-8 mode where the locale is another: names of files and classes are UTF-8."""
    if sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):                # PYTHONIOENCODING may still lack a name's letters
        stream.reconfigure(errors="backslashreplace")


# --------------------------------------------------------------------------------------- argparse types


def natural(text):
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def positive(text):
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positive_float(text):
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


RESERVED = {"features", "heads", "state", "earlier"}       # folders of their own beside the variants' folders


def folder_name(text):
    """A name that can be a folder."""
    sound = text.replace("-", "").replace("_", "").replace(".", "")
    if not (sound.isascii() and sound.isalnum()) or text[0] in "-." or text in RESERVED:
        raise argparse.ArgumentTypeError(f"{text!r} is no name (letters, digits, _ - . only, "
                                         f"and not a folder of the study)")
    return text
