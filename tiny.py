"""
The pictures behind `tiny`: eight small generated tasks and a pre-training set, 32 x 32 pixels, nothing to download.

    python tiny.py                        # one contact sheet per task and one of the pre-training set, as PNG, in the current folder
    python tiny.py --folder sheets --seed 1

Every picture is drawn with numpy from a generator seeded by (seed, task, split): the same call gives the same pixels.
Outlines are stored once as distance fields; a picture looks its pixels up there after a random pose and a smooth
random warp, a whole batch at a time. Lengths are in units of half a picture: a picture is [-1, 1] x [-1, 1], y down.
"""
import argparse
import os

import numpy as np

SIDE = 32
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
OUTLINES = ["triangle", "circle", "diamond", "octagon"]
PICTOGRAMS = {"arrow": "2026 022042", "bar": "0343", "cross": "0145 4105", "bolt": "30034316"}
FIGURES = ["circle", "triangle", "square", "pentagon", "hexagon", "star", "cross", "heart", "crescent", "arrow"]
TASKS = {
    "glyphs": DIGITS,
    "numbers": DIGITS,
    "signs": [f"{outline} with {pictogram}" for outline in OUTLINES for pictogram in PICTOGRAMS],
    "textures": ["stripes", "checks", "dots", "waves", "zigzags", "grid", "rings", "bricks", "marble", "speckles"],
    "shapes": FIGURES,
    "counts": ["one", "two", "three", "four", "five", "six"],
    "ground": ["forest", "cropland", "pasture", "river", "lake", "highway", "houses", "factories", "orchard", "dunes"],
    "letters": list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}
TRAIN_IMAGES, TEST_IMAGES = 4000, 1000
PRETRAINING_IMAGES = 24000

# Pen strokes on a grid of 5 x 7 points: "062046 1434" is one line through (0,6), (2,0), (4,6) and one from (1,4) to (3,4).
DIGIT_STROKES = ["103041453616050110", "112026 1636", "01103041420646", "0110304142334445361605 1333", "300444 3036",
                 "400003334445361605", "413010010516364544331304", "004016", "103041423313020110 133344453616050413",
                 "051636454130100102133342"]
LETTER_STROKES = ["062046 1434", "00063645443303 3342413000", "4130100105163645", "00062644422000", "40000646 0333",
                  "400006 0333", "41301001051636454323", "0006 4046 0343", "2026 1030 1636", "4045361605",
                  "0006 4003 0346", "000646", "0600234046", "06004640", "103041453616050110", "06003041423303",
                  "103041453616050110 2446", "06003041423303 2346", "413010010213334445361605", "0040 2026",
                  "000516364540", "002640", "0016233640", "0046 4006", "002340 2326", "00400646"]


# ---------------------------------------------------------------- distance fields, one per outline, made once

FIELD, REACH = 96, 1.6                                                     # a field is 96 x 96 samples of [-1.6, 1.6]^2
AXIS = np.linspace(-REACH, REACH, FIELD, dtype=np.float32)
FIELD_POINTS = np.stack(np.meshgrid(AXIS, AXIS), -1)                       # (96, 96, 2) as x, y


def line_field(lines):
    """Distance of every field point to the nearest of some open polylines.

    lines    list of (V, 2) arrays
    Returns  (96, 96) float32, >= 0
    """
    nearest = np.full((FIELD, FIELD), np.inf, np.float32)
    for line in lines:
        for start, end in zip(line[:-1], line[1:]):
            along = end - start
            t = np.clip((FIELD_POINTS - start) @ along / max(along @ along, 1e-9), 0, 1)
            nearest = np.minimum(nearest, np.linalg.norm(FIELD_POINTS - start - t[..., None] * along, axis=-1))
    return nearest.astype(np.float32)


def polygon_field(corners):
    """Signed distance of every field point to a closed polygon (V, 2), negative inside: (96, 96) float32."""
    inside = np.zeros((FIELD, FIELD), bool)
    x, y = FIELD_POINTS[..., 0], FIELD_POINTS[..., 1]
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0)):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    distance = line_field([np.concatenate([corners, corners[:1]])])
    return np.where(inside, -distance, distance)


def stroke_field(strokes):
    """The field of a character written as in DIGIT_STROKES, y in [-1, 1]."""
    return line_field([(np.array([[int(c) for c in pair] for pair in zip(line[::2], line[1::2])]) - (2, 3)) / 3
                       for line in strokes.split()])


def radial(radii, turn=0.0):
    """Corners of a polygon from its radii at equal angles, first one up: (V,) -> (V, 2)."""
    angles = turn + 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.stack([np.sin(angles), -np.cos(angles)], -1) * np.asarray(radii, float)[:, None]


def figure_corners(name):
    """Corners of a named figure, (V, 2), within about 1 of the origin and upright."""
    t = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    if name == "heart":
        x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x, -y - 2], -1) / 16
    if name == "crescent":                                                 # one circle without a shifted, smaller one
        outer, inner = np.linspace(.6, 2 * np.pi - .6, 24), np.linspace(2 * np.pi - .92, .92, 24)
        return np.concatenate([np.stack([np.cos(outer), np.sin(outer)], -1),
                               np.stack([.26 + .71 * np.cos(inner), .71 * np.sin(inner)], -1)])
    return {"circle": radial(np.ones(32)), "triangle": radial(np.ones(3)), "square": radial(np.ones(4), np.pi / 4),
            "diamond": radial(np.ones(4)), "pentagon": radial(np.ones(5)), "hexagon": radial(np.ones(6)),
            "octagon": radial(np.ones(8), np.pi / 8), "star": radial([1, .42] * 5),
            "cross": np.array([(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3), (.3, 1), (-.3, 1),
                               (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)]),
            "arrow": np.array([(0, -1), (.75, -.1), (.28, -.1), (.28, 1), (-.28, 1), (-.28, -.1), (-.75, -.1)])}[name]


# ---------------------------------------------------------------- brushes, a batch at a time

PIXELS = (np.arange(SIDE, dtype=np.float32) + .5) / SIDE * 2 - 1           # pixel centres in [-1, 1]
X, Y = np.meshgrid(PIXELS, PIXELS)                                         # (32, 32) each


def uniform(rng, low, high, *shape):
    return (low + (high - low) * rng.random(shape, dtype=np.float32)).astype(np.float32)


def smooth_noise(rng, n, cells):
    """Random fields of mean 0 and standard deviation about 1 that vary over 2/cells: (N, 32, 32)."""
    knots = rng.standard_normal((n, cells + 3, cells + 3), dtype=np.float32)
    at = (PIXELS + 1) / 2 * cells + 1                                      # position of each pixel among the knots
    away = np.abs(at[:, None] - np.arange(cells + 3))
    weights = np.where(away < 1.5, np.cos(np.clip(away, 0, 1.5) * np.pi / 3) ** 2, 0).astype(np.float32)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)              # (32, cells + 3)
    return weights @ knots @ weights.T


def place(rng, fields, which, centre, size, angle, warp=0.0):
    """Distance, in pixels, of each picture's pixels to one posed outline per picture.

    fields   (M, 96, 96)   distance fields            which  (N,) int   the one to use in each picture
    centre   (N, 2)        x, y in [-1, 1]            size   (N,) or (N, 2)   half extent
    angle    (N,)          radians, clockwise         warp   standard deviation of the smooth warp, in outline units
    Returns  (N, 32, 32) float32
    """
    n = len(which)
    size = np.broadcast_to(np.asarray(size, np.float32).reshape(n, -1), (n, 2))
    dx, dy = X - centre[:, 0, None, None], Y - centre[:, 1, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    u = (cos * dx + sin * dy) / size[:, 0, None, None]
    v = (cos * dy - sin * dx) / size[:, 1, None, None]
    if warp:
        u, v = u + warp * smooth_noise(rng, n, 3), v + warp * smooth_noise(rng, n, 3)
    u = np.clip((u + REACH) * ((FIELD - 1) / (2 * REACH)), 0, FIELD - 1.001)
    v = np.clip((v + REACH) * ((FIELD - 1) / (2 * REACH)), 0, FIELD - 1.001)
    left, top = u.astype(np.int32), v.astype(np.int32)
    u, v = u - left, v - top
    flat, at = fields.ravel(), (which[:, None, None] * FIELD + top) * FIELD + left
    above = flat[at] * (1 - u) + flat[at + 1] * u
    below = flat[at + FIELD] * (1 - u) + flat[at + FIELD + 1] * u
    return (above * (1 - v) + below * v) * (size.mean(1)[:, None, None] * SIDE / 2)


def ink(distance, width=0.0):
    """Soft coverage in [0, 1] of what lies within `width` pixels, (N,) or a number, of the outline."""
    return np.clip(.5 + np.reshape(width, (-1, 1, 1)) - distance, 0, 1)


def paint(images, coverage, colour):
    """Lay colour (N, 3) or (N, 3, 32, 32) over images (N, 3, 32, 32) where coverage (N, 32, 32) is 1, in place."""
    images += coverage[:, None] * (colour.reshape(len(images), 3, *colour.shape[2:] or (1, 1)) - images)


def two_colours(rng, n, contrast, swapped=0.0):
    """A dark and a light random colour per picture, (N, 3) each in [0, 1], `contrast` or more apart in brightness.

    swapped  fraction of the pictures that get the light colour first
    """
    middle, half = uniform(rng, .35, .65, n, 1), uniform(rng, contrast, .6, n, 1) / 2
    half *= np.where(uniform(rng, 0, 1, n, 1) < swapped, -1, 1)
    tint = uniform(rng, -.3, .3, 2, n, 3)
    tint -= tint.mean(-1, keepdims=True)
    return np.clip(middle - half + tint[0], 0, 1), np.clip(middle + half + tint[1], 0, 1)


def backdrop(rng, colour, roughness):
    """Pictures of one colour (N, 3) each with smooth variation of standard deviation `roughness`: (N, 3, 32, 32)."""
    n = len(colour)
    return colour[:, :, None, None] + roughness * np.stack([smooth_noise(rng, n, 3) for _ in range(3)], 1)


def finish(rng, images, noise):
    """Per-picture brightness and contrast, pixel noise up to `noise`, and rounding to uint8."""
    n = len(images)
    images = (images - .5) * uniform(rng, .7, 1.1, n, 1, 1, 1) + .5 + uniform(rng, -.1, .1, n, 1, 1, 1)
    images += uniform(rng, 0, noise, n, 1, 1, 1) * rng.standard_normal(images.shape, dtype=np.float32)
    return (np.clip(images, 0, 1) * 255 + .5).astype(np.uint8)


# ---------------------------------------------------------------- the eight tasks: (rng, labels (N,)) -> (N, 3, 32, 32) uint8

def draw_glyphs(rng, labels):
    n = len(labels)
    fields = np.stack([stroke_field(s) for s in DIGIT_STROKES])
    size = uniform(rng, .45, .8, n, 1) * uniform(rng, .8, 1.2, n, 2)
    distance = place(rng, fields, labels, uniform(rng, -.15, .15, n, 2), size, uniform(rng, -.35, .35, n), warp=.11)
    images = np.repeat(ink(distance, uniform(rng, .4, 2, n))[:, None], 3, 1)
    return (images * 255 + .5).astype(np.uint8)


def draw_numbers(rng, labels):
    n = len(labels)
    fields = np.stack([stroke_field(s) for s in DIGIT_STROKES])
    paper, pen = two_colours(rng, n, .3, swapped=.1)
    images = backdrop(rng, paper, .05)
    size, width, tilt = uniform(rng, .5, .75, n), uniform(rng, 1, 2, n), uniform(rng, -.2, .2, n)
    centre = uniform(rng, -.12, .12, n, 2)
    for side in (-1, 1, 0):
        which = rng.integers(0, 10, n) if side else labels
        step = side * size * uniform(rng, 1.45, 1.7, n)
        at = centre + np.stack([step * np.cos(tilt), step * np.sin(tilt)], 1)
        paint(images, ink(place(rng, fields, which, at, size, tilt, warp=.06), width), pen)
    return finish(rng, images, .08)


def draw_signs(rng, labels):
    n = len(labels)
    outlines = np.stack([polygon_field(figure_corners(name)) for name in OUTLINES])
    pictograms = np.stack([stroke_field(s) for s in PICTOGRAMS.values()])
    pen, plate = two_colours(rng, n, .4)
    images = backdrop(rng, uniform(rng, .1, .5, n, 3), .08)
    rim = pen + uniform(rng, -.1, .3, n, 3)
    centre, size, angle = uniform(rng, -.1, .1, n, 2), uniform(rng, .7, .9, n), uniform(rng, -.15, .15, n)
    distance = place(rng, outlines, labels // len(PICTOGRAMS), centre, size, angle, warp=.03)
    paint(images, ink(distance), rim)
    paint(images, ink(distance, -uniform(rng, 1, 2.5, n)), plate)
    distance = place(rng, pictograms, labels % len(PICTOGRAMS), centre, size * .5, angle, warp=.05)
    paint(images, ink(distance, uniform(rng, .8, 1.5, n)), pen)
    return finish(rng, images, .08)


def draw_textures(rng, labels):
    n = len(labels)
    angle, period = uniform(rng, -.4, .4, n, 1, 1), uniform(rng, .3, .55, n, 1, 1)
    bend = .08 * smooth_noise(rng, n, 2)
    u = (np.cos(angle) * X + np.sin(angle) * Y) / period + uniform(rng, 0, 1, n, 1, 1) + bend
    v = (np.cos(angle) * Y - np.sin(angle) * X) / period + uniform(rng, 0, 1, n, 1, 1) + bend
    wave = lambda t: np.sin(2 * np.pi * t)
    triangle = lambda t: 2 * np.abs(2 * (t % 1) - 1) - 1
    brick = np.minimum(np.abs(v % 1 - .5), np.abs((u / 2 + .5 * (np.floor(v) % 2)) % 1 - .5) * 2)
    radius = np.hypot(X - uniform(rng, -.6, .6, n, 1, 1), Y - uniform(rng, -.6, .6, n, 1, 1)) / period
    value = {"stripes": wave(u), "checks": 2 * wave(u / 1.5) * wave(v / 1.5), "dots": 1.5 * (wave(u) + wave(v)) - 1.2,
             "waves": wave(u + .35 * wave(v / 2)), "zigzags": triangle(u + .5 * triangle(v / 2)),
             "grid": 2 - 6 * np.minimum(np.abs(u % 1 - .5), np.abs(v % 1 - .5)) * 2, "rings": wave(radius + bend),
             "bricks": 8 * brick - 1.2, "marble": 3 * np.abs(smooth_noise(rng, n, 5)) - 1.2,
             "speckles": smooth_noise(rng, n, 16)}
    value = np.stack([value[name] for name in TASKS["textures"]])[labels, np.arange(n)]        # (N, 32, 32)
    first, second = two_colours(rng, n, .3, swapped=.2)
    images = backdrop(rng, first, .1)
    paint(images, np.clip(.5 + uniform(rng, .5, 1.5, n, 1, 1) * value, 0, 1), second)
    return finish(rng, images, .08)


def draw_shapes(rng, labels):
    n = len(labels)
    fields = np.stack([polygon_field(figure_corners(name)) for name in FIGURES])
    ground, fill = two_colours(rng, n, .3, swapped=.1)
    images = backdrop(rng, ground, .06)
    size = uniform(rng, .5, .8, n, 1) * uniform(rng, .9, 1.1, n, 2)
    distance = place(rng, fields, labels, uniform(rng, -.2, .2, n, 2), size, uniform(rng, -.4, .4, n), warp=.03)
    paint(images, ink(distance), fill)
    return finish(rng, images, .08)


def draw_counts(rng, labels):
    n = len(labels)
    fields = np.stack([polygon_field(figure_corners(name)) for name in FIGURES[:5]])
    ground, fill = two_colours(rng, n, .4)
    images = backdrop(rng, ground, .05)
    cell = np.argsort(rng.random((n, 16)), 1)                              # distinct cells of a 4 x 4 board
    kind, size = rng.integers(0, len(fields), n), uniform(rng, .15, .24, n)
    for k in range(len(TASKS["counts"])):
        rows = np.flatnonzero(labels >= k)                                 # label 0 is one object
        m = len(rows)
        centre = np.stack([cell[rows, k] % 4, cell[rows, k] // 4], 1) / 2 - .75 + uniform(rng, -.08, .08, m, 2)
        part = images[rows]
        distance = place(rng, fields, kind[rows], centre, size[rows], uniform(rng, -np.pi, np.pi, m))
        paint(part, ink(distance), fill[rows] + uniform(rng, -.1, .1, m, 3))
        images[rows] = part
    return finish(rng, images, .08)


def draw_ground(rng, labels):
    n = len(labels)
    angle = uniform(rng, 0, 2 * np.pi, n, 1, 1)
    u = np.cos(angle) * X + np.sin(angle) * Y + uniform(rng, -.35, .35, n, 1, 1)
    v = np.cos(angle) * Y - np.sin(angle) * X + uniform(rng, -.35, .35, n, 1, 1)
    bend, patch, fine = smooth_noise(rng, n, 2), smooth_noise(rng, n, 4), smooth_noise(rng, n, 12)
    period = uniform(rng, .22, .4, n, 1, 1)
    wave = lambda t: np.sin(2 * np.pi * t / period)
    soft = lambda t: np.clip(.5 + t * 16, 0, 1)                            # t in half pictures, edge one pixel wide
    lot_u, lot_v = u / .5, v / .5
    roof = np.minimum(.3 - np.abs(lot_u % 1 - .5), .22 - np.abs(lot_v % 1 - .5)) * .5
    hall = np.minimum(.36 - np.abs(u / 1.1 % 1 - .5), .4 - np.abs(v / .8 % 1 - .5)) * .9
    green, earth = np.array([.32, .45, .2], np.float32), np.array([.55, .45, .3], np.float32)
    water, grey, sand = (np.array(c, np.float32) for c in ((.15, .28, .42), (.6, .6, .62), (.8, .7, .5)))
    under = {"forest": .6 * green, "pasture": 1.2 * green, "dunes": sand, "orchard": earth}
    over = {"forest": (np.clip(.5 + fine, 0, 1), .3 * green), "cropland": (np.clip(.5 + wave(u + .05 * bend), 0, 1), earth),
            "pasture": (np.clip(.3 * patch, 0, 1), earth), "river": (soft(.2 - np.abs(u + .25 * bend)), water),
            "lake": (soft(.75 - np.hypot(u, v) + .25 * patch), water), "highway": (soft(.14 - np.abs(u)), grey),
            "houses": (soft(roof), np.array([.7, .35, .25], np.float32)), "factories": (soft(hall), 1.3 * grey),
            "orchard": (np.clip(1.2 * (wave(u) + wave(v)) - .6, 0, 1), .7 * green),
            "dunes": (np.clip(.5 * np.sin(6 * u + 2 * bend), 0, 1), .7 * sand)}
    names = TASKS["ground"]
    base = np.stack([under.get(name, green) for name in names])[labels]
    mix = uniform(rng, 0, .3, n, 1)                                        # season: some ground greener, some drier
    images = backdrop(rng, base * (1 - mix) + np.stack([green, earth, sand])[rng.integers(0, 3, n)] * mix, .04)
    images += .05 * fine[:, None]
    coverage = np.stack([over[name][0] for name in names])[labels, np.arange(n)]
    paint(images, coverage, np.stack([over[name][1] for name in names])[labels] + uniform(rng, -.12, .12, n, 3))
    images = images * uniform(rng, .8, 1.2, n, 3, 1, 1)                    # haze and colour cast
    return finish(rng, images, .1)


def draw_letters(rng, labels):
    n = len(labels)
    fields = np.stack([stroke_field(s) for s in LETTER_STROKES])
    paper = uniform(rng, .65, 1, n, 3)
    images = backdrop(rng, paper, .05)
    size = uniform(rng, .6, .8, n, 1) * uniform(rng, .85, 1.15, n, 2)
    distance = place(rng, fields, labels, uniform(rng, -.15, .15, n, 2), size, uniform(rng, -.2, .2, n), warp=.06)
    paint(images, ink(distance, uniform(rng, .6, 1.8, n)), uniform(rng, 0, .45, n, 3))
    return finish(rng, images, .1)


def draw_task(name, split, seed=0):
    """One split of one task.

    name     a key of TASKS                     split  "train" or "test"
    Returns  images (N, 3, 32, 32) uint8 and labels (N,) int64, indices into TASKS[name], balanced, in random order
    Errors   ValueError on any other name or split
    """
    if name not in TASKS or split not in ("train", "test"):
        raise ValueError(f"no generated task {name!r} with split {split!r}: tasks are {', '.join(TASKS)}, splits train, test")
    rng = np.random.default_rng([seed, list(TASKS).index(name), ("train", "test").index(split)])
    n = TRAIN_IMAGES if split == "train" else TEST_IMAGES
    labels = rng.permutation(np.arange(n) % len(TASKS[name])).astype(np.int64)
    draw = {"glyphs": draw_glyphs, "numbers": draw_numbers, "signs": draw_signs, "textures": draw_textures, "shapes": draw_shapes,
            "counts": draw_counts, "ground": draw_ground, "letters": draw_letters}[name]
    return draw(rng, labels), labels


# ---------------------------------------------------------------- pre-training: other pictures, other classes

DOODLES, BLOBS, FRACTALS, CLOUDS = 48, 16, 16, 16                          # classes of each kind


def doodle_field(rng):
    """A random scribble: two to four polylines or arcs."""
    lines = []
    for _ in range(rng.integers(2, 5)):
        if rng.random() < .5:
            lines.append(rng.uniform(-.95, .95, (rng.integers(2, 5), 2)))
        else:
            t = rng.uniform(0, 2 * np.pi) + np.linspace(0, rng.uniform(2, 6), 10)
            lines.append(rng.uniform(-.5, .5, 2) + rng.uniform(.25, .7) * np.stack([np.cos(t), np.sin(t)], -1))
    return line_field(lines)


def blob_field(rng):
    """A random closed contour: a circle whose radius varies with a few harmonics."""
    t = 2 * np.pi * np.arange(48) / 48
    radii = .7 + sum(rng.normal(0, .22) * np.cos(k * t + rng.uniform(0, 2 * np.pi)) for k in range(2, 8))
    return polygon_field(radial(np.clip(radii, .15, 1.1)))


def fractal_points(rng, points=1024):
    """Attractor of a random iterated function system of three contractions, centred and scaled: (points, 2)."""
    turn, shrink = rng.uniform(0, 2 * np.pi, 3), rng.uniform(.4, .75, (3, 2))
    maps = np.stack([np.stack([np.cos(turn), -np.sin(turn)], -1), np.stack([np.sin(turn), np.cos(turn)], -1)], 1) * shrink[:, None]
    shift, at = rng.uniform(-1, 1, (3, 2)), np.zeros((points, 2))
    for _ in range(24):
        pick = rng.integers(0, 3, points)
        at = np.einsum("nij,nj->ni", maps[pick], at) + shift[pick]
    return (at - at.mean(0)) / np.abs(at - at.mean(0)).max()


def draw_pretraining(seed=0):
    """The pre-training set: scribbles, blobs, fractals and colour noise, each class one random specimen in random poses.

    Returns  images (24000, 3, 32, 32) uint8 and labels (24000,) int64 in [0, 96), balanced, in random order
    """
    rng = np.random.default_rng([seed, len(TASKS), 0])
    doodles = np.stack([doodle_field(rng) for _ in range(DOODLES)])
    blobs = np.stack([blob_field(rng) for _ in range(BLOBS)])
    fractals = np.stack([fractal_points(rng) for _ in range(FRACTALS)])    # (F, 1024, 2)
    classes = DOODLES + BLOBS + FRACTALS + CLOUDS
    labels = rng.permutation(np.arange(PRETRAINING_IMAGES) % classes).astype(np.int64)
    cells = [2, 3, 5, 8, 12, 16]
    clouds = [(rng.choice(cells), rng.choice(cells), rng.uniform(0, 6), rng.integers(0, 3)) for _ in range(CLOUDS)]
    images = np.empty((len(labels), 3, SIDE, SIDE), np.uint8)
    for start in range(0, len(labels), 1000):
        images[start:start + 1000] = draw_specimens(rng, labels[start:start + 1000], doodles, blobs, fractals, clouds)
    return images, labels


def draw_specimens(rng, labels, doodles, blobs, fractals, clouds):
    """Pictures of the given pre-training classes.

    labels   (N,) int64: doodles first, then blobs, fractals, clouds
    doodles  (D, 96, 96) and blobs (B, 96, 96) distance fields      fractals  (F, 1024, 2) points
    clouds   (cells of one noise, cells of another, frequency, how they combine) for each class
    Returns  (N, 3, 32, 32) uint8
    """
    n = len(labels)
    ground, pen = two_colours(rng, n, .3, swapped=.1)
    images = backdrop(rng, ground, .06)
    coverage = np.zeros((n, SIDE, SIDE), np.float32)
    centre = uniform(rng, -.15, .15, n, 2)
    size = uniform(rng, .55, .85, n, 1) * uniform(rng, .9, 1.1, n, 2)
    angle = uniform(rng, -.3, .3, n)

    rows = np.flatnonzero(labels < DOODLES)
    distance = place(rng, doodles, labels[rows], centre[rows], size[rows], angle[rows], warp=.08)
    coverage[rows] = ink(distance, uniform(rng, .5, 1.8, len(rows)))

    kind = labels - DOODLES
    rows = np.flatnonzero((kind >= 0) & (kind < BLOBS))
    distance = place(rng, blobs, kind[rows], centre[rows], size[rows], angle[rows], warp=.05)
    coverage[rows] = ink(distance)

    kind = kind - BLOBS
    rows = np.flatnonzero((kind >= 0) & (kind < FRACTALS))
    points = fractals[kind[rows]] * size[rows, None]                       # (M, 1024, 2)
    cos, sin = np.cos(angle[rows])[:, None], np.sin(angle[rows])[:, None]
    x = cos * points[..., 0] - sin * points[..., 1] + centre[rows, :1]
    y = sin * points[..., 0] + cos * points[..., 1] + centre[rows, 1:]
    column, row = (np.clip((t + 1) / 2 * SIDE, 0, SIDE - 1).astype(np.int64) for t in (x, y))
    pixel = (np.arange(len(rows))[:, None] * SIDE + row) * SIDE + column
    hits = np.bincount(pixel.ravel(), minlength=len(rows) * SIDE * SIDE)
    coverage[rows] = np.clip(hits.reshape(-1, SIDE, SIDE) / 3, 0, 1)

    kind = kind - FRACTALS
    for k, (coarse, fine, frequency, law) in enumerate(clouds):
        rows = np.flatnonzero(kind == k)
        a, b = smooth_noise(rng, len(rows), coarse), smooth_noise(rng, len(rows), fine)
        value = (a * b, np.sin(frequency * a) + .5 * b, np.maximum(a, b) - .5)[law]
        coverage[rows] = np.clip(.5 + value, 0, 1)
    paint(images, coverage, pen)
    return finish(rng, images, .06)


# ---------------------------------------------------------------- contact sheets

def contact_sheet(images, labels, rows=26, columns=12):
    """A row of pictures per class: (H, W, 3) uint8."""
    sheet = np.full((rows * 34, columns * 34, 3), 128, np.uint8)
    for row in range(rows):
        for column, image in enumerate(images[labels == row][:columns]):
            sheet[row * 34 + 1:row * 34 + 33, column * 34 + 1:column * 34 + 33] = image.transpose(1, 2, 0)
    return sheet


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=".", help="where the PNG files go (default: here)")
    parser.add_argument("--seed", type=int, default=0, help="draws other pictures (default: 0)")
    return parser.parse_args(argv)


def main(args):
    from PIL import Image
    os.makedirs(args.folder, exist_ok=True)
    for name in [*TASKS, "pretraining"]:
        images, labels = draw_task(name, "train", args.seed) if name in TASKS else draw_pretraining(args.seed)
        Image.fromarray(contact_sheet(images, labels, min(labels.max() + 1, 160))).save(os.path.join(args.folder, f"{name}.png"))


if __name__ == "__main__":
    main(parse_args())
