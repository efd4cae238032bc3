"""
The pictures behind `tiny`: eight small generated tasks and a pre-training set, 32 x 32 pixels, no download.

    python -m lib.generated                       # contact sheets of all nine, as PNG, here
    python -m lib.generated --folder sheets --seed 1

Every picture comes from a generator seeded by (seed, number of the task, number of the split), so the same
call gives the same pixels. To add a task, write its draw function and give it a line in GENERATED.
"""
import argparse
import hashlib
import os
from pathlib import Path

import numpy as np

from lib.drawing import (DIGIT_STROKES, LETTER_STROKES, SIDE, X, Y, backdrop, blob_field, cloud_coverage,
                         cloud_recipe, doodle_field, figure_fields, finish, fractal_points, ink, off_middle,
                         paint, place, points_coverage, sine_wave, smooth_noise, soft_edge, stroke_fields,
                         triangle_wave, two_colours, uniform)

SPLITS = {"train": (0, 4000), "test": (1, 1000)}  # number for the seed, pictures
PRETRAINING_NUMBER, PRETRAINING_IMAGES = 8, 24000
DOODLES, BLOBS, FRACTALS, CLOUDS = 48, 16, 16, 16  # pre-training classes of each kind

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
OUTLINES = ["triangle", "circle", "diamond", "octagon"]
PICTOGRAMS = {"arrow": "2026 022042", "bar": "0343", "cross": "0145 4105", "bolt": "30034316"}
SIGNS = [f"{outline} with {pictogram}" for outline in OUTLINES for pictogram in PICTOGRAMS]
TEXTURES = ["stripes", "checks", "dots", "waves", "zigzags", "grid", "rings", "bricks", "marble", "speckles"]
FIGURES = ["circle", "triangle", "square", "pentagon", "hexagon",
           "star", "cross", "heart", "crescent", "arrow"]
COUNTABLE = ["circle", "triangle", "square", "pentagon", "hexagon"]
COUNTS = ["one", "two", "three", "four", "five", "six"]
GROUNDS = ["forest", "cropland", "pasture", "river", "lake",
           "highway", "houses", "factories", "orchard", "dunes"]


# --------------------------------------------------------------------------------------- the eight tasks
# each: generator and labels (N,) int64 -> (N, 3, 32, 32) uint8

def draw_glyphs(rng, labels):
    """White digits on black, strongly deformed."""
    n = len(labels)
    size = uniform(rng, .45, .8, n, 1) * uniform(rng, .8, 1.2, n, 2)
    centre = uniform(rng, -.15, .15, n, 2)
    angle = uniform(rng, -.35, .35, n)
    distance = place(rng, stroke_fields(DIGIT_STROKES), labels, centre, size, angle, warp=.11)
    coverage = ink(distance, uniform(rng, .4, 2, n))
    images = np.repeat(coverage[:, None], 3, 1)
    return (images * 255 + .5).astype(np.uint8)


def draw_numbers(rng, labels):
    """Coloured digits between two others, as in a house number; the middle one counts."""
    n = len(labels)
    fields = stroke_fields(DIGIT_STROKES)
    paper, pen = two_colours(rng, n, .3, swapped=.1)
    images = backdrop(rng, paper, .05)
    size = uniform(rng, .5, .75, n)
    width = uniform(rng, 1, 2, n)
    tilt = uniform(rng, -.2, .2, n)
    centre = uniform(rng, -.12, .12, n, 2)
    for side in (-1, 1, 0):  # the middle one last, over its neighbours
        which = rng.integers(0, 10, n) if side else labels
        step = side * size * uniform(rng, 1.45, 1.7, n)
        at = centre + np.stack([step * np.cos(tilt), step * np.sin(tilt)], 1)
        paint(images, ink(place(rng, fields, which, at, size, tilt, warp=.06), width), pen)
    return finish(rng, images, .08)


def draw_signs(rng, labels):
    """Road signs: a plate of one of four outlines, a rim, and one of four pictograms."""
    n = len(labels)
    outline, pictogram = labels // len(PICTOGRAMS), labels % len(PICTOGRAMS)
    pen, plate = two_colours(rng, n, .4)
    images = backdrop(rng, uniform(rng, .1, .5, n, 3), .08)
    rim = pen + uniform(rng, -.1, .3, n, 3)
    centre = uniform(rng, -.1, .1, n, 2)
    size = uniform(rng, .7, .9, n)
    angle = uniform(rng, -.15, .15, n)
    distance = place(rng, figure_fields(OUTLINES), outline, centre, size, angle, warp=.03)
    paint(images, ink(distance), rim)
    paint(images, ink(distance, -uniform(rng, 1, 2.5, n)), plate)
    distance = place(rng, stroke_fields(PICTOGRAMS.values()), pictogram, centre, size * .5, angle, warp=.05)
    paint(images, ink(distance, uniform(rng, .8, 1.5, n)), pen)
    return finish(rng, images, .08)


def draw_textures(rng, labels):
    """Two colours in one of ten patterns, turned, scaled and bent."""
    n = len(labels)
    angle = uniform(rng, -.4, .4, n, 1, 1)
    period = uniform(rng, .3, .55, n, 1, 1)
    bend = .08 * smooth_noise(rng, n, 2)
    # Pattern coordinates, one period long per unit.
    u = (np.cos(angle) * X + np.sin(angle) * Y) / period + uniform(rng, 0, 1, n, 1, 1) + bend  # (N, 32, 32)
    v = (np.cos(angle) * Y - np.sin(angle) * X) / period + uniform(rng, 0, 1, n, 1, 1) + bend
    radius = np.hypot(X - uniform(rng, -.6, .6, n, 1, 1), Y - uniform(rng, -.6, .6, n, 1, 1)) / period
    every_other = .5 * (np.floor(v) % 2)  # half a brick, in every other course
    value_of = {
        "stripes": sine_wave(u),
        "checks": 2 * sine_wave(u / 1.5) * sine_wave(v / 1.5),
        "dots": 1.5 * (sine_wave(u) + sine_wave(v)) - 1.2,
        "waves": sine_wave(u + .35 * sine_wave(v / 2)),
        "zigzags": triangle_wave(u + .5 * triangle_wave(v / 2)),
        "grid": 2 - 6 * np.minimum(off_middle(u), off_middle(v)) * 2,
        "rings": sine_wave(radius + bend),
        "bricks": 8 * np.minimum(off_middle(v), off_middle(u / 2 + every_other) * 2) - 1.2,
        "marble": 3 * np.abs(smooth_noise(rng, n, 5)) - 1.2,
        "speckles": smooth_noise(rng, n, 16),
    }
    value = np.stack([value_of[name] for name in TEXTURES])[labels, np.arange(n)]  # (N, 32, 32)
    first, second = two_colours(rng, n, .3, swapped=.2)
    images = backdrop(rng, first, .1)
    paint(images, np.clip(.5 + uniform(rng, .5, 1.5, n, 1, 1) * value, 0, 1), second)
    return finish(rng, images, .08)


def draw_shapes(rng, labels):
    """One filled figure."""
    n = len(labels)
    ground, fill = two_colours(rng, n, .3, swapped=.1)
    images = backdrop(rng, ground, .06)
    size = uniform(rng, .5, .8, n, 1) * uniform(rng, .9, 1.1, n, 2)
    centre = uniform(rng, -.2, .2, n, 2)
    angle = uniform(rng, -.4, .4, n)
    distance = place(rng, figure_fields(FIGURES), labels, centre, size, angle, warp=.03)
    paint(images, ink(distance), fill)
    return finish(rng, images, .08)


def draw_counts(rng, labels):
    """One to six small objects of one kind; their number is the class."""
    n = len(labels)
    fields = figure_fields(COUNTABLE)
    ground, fill = two_colours(rng, n, .4)
    images = backdrop(rng, ground, .05)
    cell = np.argsort(rng.random((n, 16)), 1)  # distinct cells of a 4 x 4 board
    kind = rng.integers(0, len(fields), n)
    size = uniform(rng, .15, .24, n)
    for k in range(len(COUNTS)):
        with_k = np.flatnonzero(labels >= k)  # label 0 is one object
        column, row = cell[with_k, k] % 4, cell[with_k, k] // 4
        centre = np.stack([column, row], 1) / 2 - .75 + uniform(rng, -.08, .08, len(with_k), 2)
        angle = uniform(rng, -np.pi, np.pi, len(with_k))
        distance = place(rng, fields, kind[with_k], centre, size[with_k], angle)
        part = images[with_k]
        paint(part, ink(distance), fill[with_k] + uniform(rng, -.1, .1, len(with_k), 3))
        images[with_k] = part
    return finish(rng, images, .08)


def draw_ground(rng, labels):
    """Land seen from above: one ground colour, and over it what the class is named after."""
    n = len(labels)
    angle = uniform(rng, 0, 2 * np.pi, n, 1, 1)
    u = np.cos(angle) * X + np.sin(angle) * Y + uniform(rng, -.35, .35, n, 1, 1)  # (N, 32, 32)
    v = np.cos(angle) * Y - np.sin(angle) * X + uniform(rng, -.35, .35, n, 1, 1)
    bend, patch, fine = smooth_noise(rng, n, 2), smooth_noise(rng, n, 4), smooth_noise(rng, n, 12)
    period = uniform(rng, .22, .4, n, 1, 1)
    roof = np.minimum(.3 - off_middle(u / .5), .22 - off_middle(v / .5)) * .5
    hall = np.minimum(.36 - off_middle(u / 1.1), .4 - off_middle(v / .8)) * .9
    trees = sine_wave(u, period) + sine_wave(v, period)
    colours = [(.32, .45, .2), (.55, .45, .3), (.15, .28, .42), (.6, .6, .62), (.8, .7, .5), (.7, .35, .25)]
    green, earth, water, grey, sand, tile = np.array(colours, np.float32)
    ground_of = {"forest": .6 * green, "pasture": 1.2 * green, "dunes": sand, "orchard": earth}  # else green
    cover_of = {  # where it lies and its colour
        "forest": (np.clip(.5 + fine, 0, 1), .3 * green),
        "cropland": (np.clip(.5 + sine_wave(u + .05 * bend, period), 0, 1), earth),
        "pasture": (np.clip(.3 * patch, 0, 1), earth),
        "river": (soft_edge(.2 - np.abs(u + .25 * bend)), water),
        "lake": (soft_edge(.75 - np.hypot(u, v) + .25 * patch), water),
        "highway": (soft_edge(.14 - np.abs(u)), grey),
        "houses": (soft_edge(roof), tile),
        "factories": (soft_edge(hall), 1.3 * grey),
        "orchard": (np.clip(1.2 * trees - .6, 0, 1), .7 * green),
        "dunes": (np.clip(.5 * np.sin(6 * u + 2 * bend), 0, 1), .7 * sand),
    }
    ground = np.stack([ground_of.get(name, green) for name in GROUNDS])[labels]  # (N, 3)
    coverage = np.stack([cover_of[name][0] for name in GROUNDS])[labels, np.arange(n)]  # (N, 32, 32)
    colour = np.stack([cover_of[name][1] for name in GROUNDS])[labels]  # (N, 3)
    mix = uniform(rng, 0, .3, n, 1)
    season = np.stack([green, earth, sand])[rng.integers(0, 3, n)]  # (N, 3)
    images = backdrop(rng, ground * (1 - mix) + season * mix, .04)
    images += .05 * fine[:, None]
    paint(images, coverage, colour + uniform(rng, -.12, .12, n, 3))
    images = images * uniform(rng, .8, 1.2, n, 3, 1, 1)  # haze and colour cast
    return finish(rng, images, .1)


def draw_letters(rng, labels):
    """A dark capital letter on light paper."""
    n = len(labels)
    paper = uniform(rng, .65, 1, n, 3)
    images = backdrop(rng, paper, .05)
    size = uniform(rng, .6, .8, n, 1) * uniform(rng, .85, 1.15, n, 2)
    centre = uniform(rng, -.15, .15, n, 2)
    angle = uniform(rng, -.2, .2, n)
    distance = place(rng, stroke_fields(LETTER_STROKES), labels, centre, size, angle, warp=.06)
    width = uniform(rng, .6, 1.8, n)
    paint(images, ink(distance, width), uniform(rng, 0, .45, n, 3))
    return finish(rng, images, .1)


# Number for the seed, classes, draw function. A task keeps its number wherever it stands in the table, so
# that adding one leaves every other picture as it was. 8 is the pre-training set's: the next free one is 9.
GENERATED = {
    "glyphs": (0, DIGITS, draw_glyphs),
    "numbers": (1, DIGITS, draw_numbers),
    "signs": (2, SIGNS, draw_signs),
    "textures": (3, TEXTURES, draw_textures),
    "shapes": (4, FIGURES, draw_shapes),
    "counts": (5, COUNTS, draw_counts),
    "ground": (6, GROUNDS, draw_ground),
    "letters": (7, list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), draw_letters),
}
TASKS = {name: classes for name, (_, classes, _) in GENERATED.items()}
NUMBERS = [PRETRAINING_NUMBER, *(number for number, _, _ in GENERATED.values())]
assert len(set(NUMBERS)) == len(NUMBERS), f"two generated sets share a number for the seed: {sorted(NUMBERS)}"


def code_fingerprint():
    """SHA-256 (hex) of the code that draws: what cached pictures are named by."""
    files = [Path(__file__), Path(__file__).with_name("drawing.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def draw_task(name, split, seed=0):
    """One split of one task.

    name     a key of TASKS
    split    "train" or "test"
    Returns  images (N, 3, 32, 32) uint8 and labels (N,) int64, indices into TASKS[name],
             balanced, in random order
    Errors   ValueError on any other name or split
    """
    if name not in GENERATED or split not in SPLITS:
        raise ValueError(f"no generated task {name!r} with split {split!r}: "
                         f"tasks are {', '.join(GENERATED)}, splits {', '.join(SPLITS)}")
    task_number, classes, draw_pictures = GENERATED[name]
    split_number, n = SPLITS[split]
    rng = np.random.default_rng([seed, task_number, split_number])
    labels = rng.permutation(np.arange(n) % len(classes)).astype(np.int64)
    return draw_pictures(rng, labels), labels


# --------------------------------------------------------------------------------------- pre-training

def draw_pretraining(seed=0):
    """The pre-training set: scribbles, blobs, fractals, clouds; a class is one specimen in random poses.

    Returns  images (24000, 3, 32, 32) uint8 and labels (24000,) int64 in [0, 96), balanced, in random order;
             what was drawn {name: (24000, ...)}: see draw_specimens, and "cells" of a cloud's finer noise,
             0 elsewhere (lib/captions.py puts it into words)
    """
    rng = np.random.default_rng([seed, PRETRAINING_NUMBER, 0])
    doodles = np.stack([doodle_field(rng) for _ in range(DOODLES)])  # (48, 96, 96)
    blobs = np.stack([blob_field(rng) for _ in range(BLOBS)])  # (16, 96, 96)
    fractals = np.stack([fractal_points(rng) for _ in range(FRACTALS)])  # (16, 1024, 2)
    classes = DOODLES + BLOBS + FRACTALS + CLOUDS
    labels = rng.permutation(np.arange(PRETRAINING_IMAGES) % classes).astype(np.int64)
    clouds = [cloud_recipe(rng) for _ in range(CLOUDS)]
    images, parts = np.empty((len(labels), 3, SIDE, SIDE), np.uint8), []
    for start in range(0, len(labels), 1000):  # in parts, or the temporaries take gigabytes
        part = slice(start, start + 1000)
        images[part], drawn = draw_specimens(rng, labels[part], doodles, blobs, fractals, clouds)
        parts.append(drawn)
    finest = [0] * (classes - CLOUDS) + [max(first, second) for first, second, *_rest in clouds]
    whole = {"cells": np.array(finest)[labels]}
    for name in parts[0]:
        whole[name] = np.concatenate([drawn[name] for drawn in parts])
    return images, labels, whole


def draw_specimens(rng, labels, doodles, blobs, fractals, clouds):
    """Pictures of the given pre-training classes.

    labels   (N,) int64: doodles first, then blobs, fractals, clouds
    doodles  (D, 96, 96) distance fields            blobs   (B, 96, 96) distance fields
    fractals (F, 1024, 2) points                    clouds  one cloud_recipe for each class
    Returns  (N, 3, 32, 32) uint8, and what was drawn: "ground" and "pen", colours (N, 3); "centre" and "size"
             (N, 2), "angle" (N,) in radians, clockwise (clouds have none of them); "width" (N,) of a doodle's
             lines in pixels, 0 elsewhere
    """
    n = len(labels)
    ground, pen = two_colours(rng, n, .3, swapped=.1)
    images = backdrop(rng, ground, .06)
    coverage = np.zeros((n, SIDE, SIDE), np.float32)
    centre = uniform(rng, -.15, .15, n, 2)
    size = uniform(rng, .55, .85, n, 1) * uniform(rng, .9, 1.1, n, 2)
    angle = uniform(rng, -.3, .3, n)

    kind = labels
    here = np.flatnonzero(kind < len(doodles))  # the pictures that show a doodle
    distance = place(rng, doodles, kind[here], centre[here], size[here], angle[here], warp=.08)
    width = np.zeros(n, np.float32)
    width[here] = uniform(rng, .5, 1.8, len(here))
    coverage[here] = ink(distance, width[here])

    kind = kind - len(doodles)
    here = np.flatnonzero((kind >= 0) & (kind < len(blobs)))
    distance = place(rng, blobs, kind[here], centre[here], size[here], angle[here], warp=.05)
    coverage[here] = ink(distance)

    kind = kind - len(blobs)
    here = np.flatnonzero((kind >= 0) & (kind < len(fractals)))
    coverage[here] = points_coverage(fractals[kind[here]], centre[here], size[here], angle[here])

    kind = kind - len(fractals)
    for k, recipe in enumerate(clouds):
        here = np.flatnonzero(kind == k)
        coverage[here] = cloud_coverage(rng, len(here), *recipe)

    paint(images, coverage, pen)
    drawn = {"ground": ground, "pen": pen, "centre": centre, "size": size, "angle": angle, "width": width}
    return finish(rng, images, .06), drawn


# --------------------------------------------------------------------------------------- contact sheets

def contact_sheet(images, labels, columns=12):
    """A row of pictures per class, a grey frame around each: (H, W, 3) uint8."""
    classes, cell = labels.max() + 1, SIDE + 2
    sheet = np.full((classes * cell, columns * cell, 3), 128, np.uint8)
    for label in range(classes):
        for column, image in enumerate(images[labels == label][:columns]):
            top, left = label * cell + 1, column * cell + 1
            sheet[top:top + SIDE, left:left + SIDE] = image.transpose(1, 2, 0)
    return sheet


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=".", help="where the PNG files go (default: here)")
    parser.add_argument("--seed", type=int, default=0, help="draws other pictures (default: 0)")
    return parser.parse_args(argv)


def main(args):
    from PIL import Image  # only the sheets need it
    os.makedirs(args.folder, exist_ok=True)
    for name in TASKS:
        images, labels = draw_task(name, "train", args.seed)
        Image.fromarray(contact_sheet(images, labels)).save(os.path.join(args.folder, f"{name}.png"))
    images, labels, _ = draw_pretraining(args.seed)
    Image.fromarray(contact_sheet(images, labels)).save(os.path.join(args.folder, "pretraining.png"))


if __name__ == "__main__":
    main(parse_args())
