"""
Outlines and brushes for the generated pictures (lib/generated.py), all numpy, a batch of pictures at a time.

An outline is stored once as a distance field; `place` looks a picture's pixels up there after a random pose
and a smooth random warp. Lengths are in units of half a picture: a picture is [-1, 1] x [-1, 1], y down.
The order of the calls to `rng` is part of what is drawn: swapping two of them changes every picture.
"""
import numpy as np

SIDE = 32  # a picture is SIDE x SIDE pixels
PIXELS = (np.arange(SIDE, dtype=np.float32) + .5) / SIDE * 2 - 1  # (32,) pixel centres in [-1, 1]
X, Y = np.meshgrid(PIXELS, PIXELS)  # (32, 32) each

# A field reaches beyond the picture's own [-1, 1]: an outline drawn small leaves pixels far outside it.
FIELD, REACH = 96, 1.6  # 96 x 96 samples of [-1.6, 1.6]^2
AXIS = np.linspace(-REACH, REACH, FIELD, dtype=np.float32)
FIELD_POINTS = np.stack(np.meshgrid(AXIS, AXIS), -1)  # (96, 96, 2) as x, y

# Pen strokes on a grid of 5 x 7 points, two digits (x, then y) a point, a space between two lines:
# "062046 1434", the letter A, is one line through (0,6), (2,0), (4,6) and one from (1,4) to (3,4).
DIGIT_STROKES = [
    "103041453616050110", "112026 1636", "01103041420646", "0110304142334445361605 1333", "300444 3036",
    "400003334445361605", "413010010516364544331304", "004016", "103041423313020110 133344453616050413",
    "051636454130100102133342",
]
LETTER_STROKES = [
    "062046 1434", "00063645443303 3342413000", "4130100105163645", "00062644422000", "40000646 0333",
    "400006 0333", "41301001051636454323", "0006 4046 0343", "2026 1030 1636", "4045361605",
    "0006 4003 0346", "000646", "0600234046", "06004640", "103041453616050110", "06003041423303",
    "103041453616050110 2446", "06003041423303 2346", "413010010213334445361605", "0040 2026",
    "000516364540", "002640", "0016233640", "0046 4006", "002340 2326", "00400646",
]


# --------------------------------------------------------------------------------------- distance fields

def line_field(lines):
    """Distance of every field point to the nearest of some open polylines.

    lines    list of (V, 2) arrays of points
    Returns  (96, 96) float32, >= 0
    """
    nearest = np.full((FIELD, FIELD), np.inf, np.float32)
    for line in lines:
        for start, end in zip(line[:-1], line[1:]):
            along = end - start
            # How far along the segment its nearest point lies; the 1e-9 is for a segment of length 0.
            fraction = np.clip((FIELD_POINTS - start) @ along / max(along @ along, 1e-9), 0, 1)
            away = FIELD_POINTS - start - fraction[..., None] * along  # (96, 96, 2)
            nearest = np.minimum(nearest, np.linalg.norm(away, axis=-1))
    return nearest.astype(np.float32)


def polygon_field(corners):
    """Signed distance of every field point to a closed polygon (V, 2), negative inside: (96, 96) float32."""
    inside = np.zeros((FIELD, FIELD), bool)
    x, y = FIELD_POINTS[..., 0], FIELD_POINTS[..., 1]
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0)):
        if y0 != y1:
            # A point is inside if a ray to its right crosses an odd number of edges.
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    distance = line_field([np.concatenate([corners, corners[:1]])])
    return np.where(inside, -distance, distance)


def stroke_field(strokes):
    """The field of a character written as in DIGIT_STROKES, scaled to y in [-1, 1]: (96, 96) float32."""
    lines = []
    for digits in strokes.split():
        x = [int(digit) for digit in digits[0::2]]
        y = [int(digit) for digit in digits[1::2]]
        lines.append((np.stack([x, y], -1) - (2, 3)) / 3)  # (2, 3) is the middle of the grid
    return line_field(lines)


def stroke_fields(characters):
    """stroke_field of each of M characters: (M, 96, 96) float32."""
    return np.stack([stroke_field(strokes) for strokes in characters])


def figure_fields(names):
    """polygon_field of each of M named figures: (M, 96, 96) float32."""
    return np.stack([polygon_field(figure_corners(name)) for name in names])


# --------------------------------------------------------------------------------------- named outlines

def radial(radii, turn=0.0):
    """Corners of a polygon from its radii at equal angles, the first one up: (V,) -> (V, 2)."""
    angles = turn + 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.stack([np.sin(angles), -np.cos(angles)], -1) * np.asarray(radii, float)[:, None]


def heart_corners():
    """A heart: (32, 2)."""
    t = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2], -1) / 16


def crescent_corners():
    """One circle without a shifted, smaller one: (48, 2)."""
    outer = np.linspace(.6, 2 * np.pi - .6, 24)
    inner = np.linspace(2 * np.pi - .92, .92, 24)  # backwards, so that the contour closes
    outer_arc = np.stack([np.cos(outer), np.sin(outer)], -1)
    inner_arc = np.stack([.26 + .71 * np.cos(inner), .71 * np.sin(inner)], -1)
    return np.concatenate([outer_arc, inner_arc])


CROSS = [(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
         (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)]
ARROW = [(0, -1), (.75, -.1), (.28, -.1), (.28, 1), (-.28, 1), (-.28, -.1), (-.75, -.1)]
FIGURE_CORNERS = {
    "circle": radial(np.ones(32)),
    "triangle": radial(np.ones(3)),
    "square": radial(np.ones(4), np.pi / 4),
    "diamond": radial(np.ones(4)),
    "pentagon": radial(np.ones(5)),
    "hexagon": radial(np.ones(6)),
    "octagon": radial(np.ones(8), np.pi / 8),
    "star": radial([1, .42] * 5),
    "cross": np.array(CROSS),
    "heart": heart_corners(),
    "crescent": crescent_corners(),
    "arrow": np.array(ARROW),
}


def figure_corners(name):
    """Corners of a named figure, a key of FIGURE_CORNERS: (V, 2), within about 1 of the origin, upright."""
    return FIGURE_CORNERS[name]


# --------------------------------------------------------------------------------------- random specimens

def doodle_field(rng):
    """The field of a random scribble, two to four polylines or arcs: (96, 96) float32."""
    lines = []
    for _ in range(rng.integers(2, 5)):
        if rng.random() < .5:
            corner_count = rng.integers(2, 5)
            lines.append(rng.uniform(-.95, .95, (corner_count, 2)))
        else:
            first_angle = rng.uniform(0, 2 * np.pi)
            angles = first_angle + np.linspace(0, rng.uniform(2, 6), 10)
            centre = rng.uniform(-.5, .5, 2)
            radius = rng.uniform(.25, .7)
            lines.append(centre + radius * np.stack([np.cos(angles), np.sin(angles)], -1))
    return line_field(lines)


def blob_field(rng):
    """The field of a random closed contour, a circle whose radius varies: (96, 96) float32."""
    angles = 2 * np.pi * np.arange(48) / 48
    variation = np.zeros(48)
    for harmonic in range(2, 8):  # 1 would only shift the circle
        height = rng.normal(0, .22)
        phase = rng.uniform(0, 2 * np.pi)
        variation += height * np.cos(harmonic * angles + phase)
    return polygon_field(radial(np.clip(.7 + variation, .15, 1.1)))


def fractal_points(rng, points=1024):
    """Attractor of a random iterated function system of three contractions, within [-1, 1]: (points, 2)."""
    turn = rng.uniform(0, 2 * np.pi, 3)
    shrink = rng.uniform(.4, .75, (3, 2))
    shift = rng.uniform(-1, 1, (3, 2))
    upper_row = np.stack([np.cos(turn), -np.sin(turn)], -1)
    lower_row = np.stack([np.sin(turn), np.cos(turn)], -1)
    maps = np.stack([upper_row, lower_row], 1) * shrink[:, None]  # (3, 2, 2)
    at = np.zeros((points, 2))
    for _ in range(24):  # 0.75 ** 24: a thousandth of where a point began is left
        which = rng.integers(0, 3, points)
        at = np.einsum("nij,nj->ni", maps[which], at) + shift[which]
    centred = at - at.mean(0)
    return centred / np.abs(centred).max()


def cloud_recipe(rng):
    """A class of clouds: (cells of one noise, cells of another, frequency, how they combine: 0, 1 or 2)."""
    cells = [2, 3, 5, 8, 12, 16]
    return rng.choice(cells), rng.choice(cells), rng.uniform(0, 6), rng.integers(0, 3)


# --------------------------------------------------------------------------------------- brushes for batches

def uniform(rng, low, high, *shape):
    """Uniform random numbers in [low, high): an array of the given shape, float32."""
    return (low + (high - low) * rng.random(shape, dtype=np.float32)).astype(np.float32)


def smooth_noise(rng, n, cells):
    """Random fields of mean 0 and deviation about 1 that vary over 2 / cells: (N, 32, 32) float32."""
    knots = rng.standard_normal((n, cells + 3, cells + 3), dtype=np.float32)
    at = (PIXELS + 1) / 2 * cells + 1  # position of each pixel among the knots
    away = np.abs(at[:, None] - np.arange(cells + 3))  # (32, cells + 3)
    weights = np.where(away < 1.5, np.cos(np.clip(away, 0, 1.5) * np.pi / 3) ** 2, 0).astype(np.float32)
    # Weights of norm 1 keep the knots' variance of 1 at every pixel.
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    return weights @ knots @ weights.T


def sine_wave(t, period=1.0):
    """A wave in [-1, 1] of the given period."""
    return np.sin(2 * np.pi * t / period)


def triangle_wave(t):
    """A wave of straight lines in [-1, 1] of period 1."""
    return 2 * np.abs(2 * (t % 1) - 1) - 1


def off_middle(t):
    """Distance to the middle of the unit interval that t lies in, in [0, .5]."""
    return np.abs(t % 1 - .5)


def place(rng, fields, which, centre, size, angle, warp=0.0):
    """Distance, in pixels, of each picture's pixels to one posed outline per picture.

    fields   (M, 96, 96)        distance fields
    which    (N,) int           the field to use in each picture
    centre   (N, 2)             x, y in [-1, 1]
    size     (N,) or (N, 2)     half extent, or half width and half height
    angle    (N,)               radians, clockwise
    warp     float              standard deviation of the smooth warp, in outline units
    Returns  (N, 32, 32), negative inside a polygon
    """
    n = len(which)
    size = np.asarray(size, np.float32)
    size = np.broadcast_to(size if size.ndim == 2 else size[:, None], (n, 2))
    # Move the pixels into the outline's own frame: shift, turn back, scale.
    dx, dy = X - centre[:, 0, None, None], Y - centre[:, 1, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    u = (cos * dx + sin * dy) / size[:, 0, None, None]  # (N, 32, 32)
    v = (cos * dy - sin * dx) / size[:, 1, None, None]
    if warp:
        u = u + warp * smooth_noise(rng, n, 3)
        v = v + warp * smooth_noise(rng, n, 3)
    pixels_per_unit = size.mean(1)[:, None, None] * SIDE / 2
    return look_up(fields, which, u, v) * pixels_per_unit


def look_up(fields, which, u, v):
    """One of the fields (M, 96, 96) per picture, interpolated at u, v (N, 32, 32): (N, 32, 32)."""
    # 1.001 below the size, so that the sample to the right of and below the last one still exists.
    u = np.clip((u + REACH) * ((FIELD - 1) / (2 * REACH)), 0, FIELD - 1.001)
    v = np.clip((v + REACH) * ((FIELD - 1) / (2 * REACH)), 0, FIELD - 1.001)
    left, top = u.astype(np.int32), v.astype(np.int32)
    u, v = u - left, v - top
    flat = fields.ravel()  # so that one index per pixel reaches all four of its neighbours
    at = (which[:, None, None] * FIELD + top) * FIELD + left
    above = flat[at] * (1 - u) + flat[at + 1] * u
    below = flat[at + FIELD] * (1 - u) + flat[at + FIELD + 1] * u
    return above * (1 - v) + below * v


def ink(distance, width=0.0):
    """Soft coverage in [0, 1] of what lies within `width` pixels, (N,) or a number, of the outline."""
    return np.clip(.5 + np.reshape(width, (-1, 1, 1)) - distance, 0, 1)


def soft_edge(inside):
    """Coverage in [0, 1] of where `inside`, in half pictures, is positive, with an edge one pixel wide."""
    return np.clip(.5 + inside * (SIDE / 2), 0, 1)


def points_coverage(points, centre, size, angle):
    """Coverage by points (N, P, 2) posed as in place, full where three or more fall: (N, 32, 32)."""
    n = len(points)
    points = points * size[:, None]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x = cos * points[..., 0] - sin * points[..., 1] + centre[:, :1]  # (N, P)
    y = sin * points[..., 0] + cos * points[..., 1] + centre[:, 1:]
    column = np.clip((x + 1) / 2 * SIDE, 0, SIDE - 1).astype(np.int64)
    row = np.clip((y + 1) / 2 * SIDE, 0, SIDE - 1).astype(np.int64)
    pixel = (np.arange(n)[:, None] * SIDE + row) * SIDE + column
    hits = np.bincount(pixel.ravel(), minlength=n * SIDE * SIDE)
    return np.clip(hits.reshape(n, SIDE, SIDE) / 3, 0, 1)


def cloud_coverage(rng, n, first_cells, second_cells, frequency, combination):
    """Coverage by clouds of one recipe: (N, 32, 32)."""
    first = smooth_noise(rng, n, first_cells)
    second = smooth_noise(rng, n, second_cells)
    if combination == 0:
        value = first * second
    elif combination == 1:
        value = np.sin(frequency * first) + .5 * second
    else:
        value = np.maximum(first, second) - .5
    return np.clip(.5 + value, 0, 1)


def paint(images, coverage, colour):
    """Lay colour (N, 3) over images (N, 3, 32, 32) where coverage (N, 32, 32) is 1, in place."""
    images += coverage[:, None] * (colour[:, :, None, None] - images)


def two_colours(rng, n, contrast, swapped=0.0):
    """A dark and a light random colour per picture, (N, 3) each, in [0, 1].

    contrast  least difference of their brightness
    swapped   fraction of the pictures that get the light colour first
    """
    middle = uniform(rng, .35, .65, n, 1)
    half = uniform(rng, contrast, .6, n, 1) / 2
    half *= np.where(uniform(rng, 0, 1, n, 1) < swapped, -1, 1)
    tint = uniform(rng, -.3, .3, 2, n, 3)
    tint -= tint.mean(-1, keepdims=True)  # a tint changes the hue, not the brightness
    return np.clip(middle - half + tint[0], 0, 1), np.clip(middle + half + tint[1], 0, 1)


def backdrop(rng, colour, roughness):
    """Pictures of one colour (N, 3) each, with smooth noise of deviation `roughness`: (N, 3, 32, 32)."""
    n = len(colour)
    variation = np.stack([smooth_noise(rng, n, 3) for _channel in range(3)], 1)
    return colour[:, :, None, None] + roughness * variation


def finish(rng, images, noise):
    """Per-picture brightness and contrast, pixel noise up to `noise`, rounding: (N, 3, 32, 32) uint8."""
    n = len(images)
    contrast = uniform(rng, .7, 1.1, n, 1, 1, 1)
    brightness = uniform(rng, -.1, .1, n, 1, 1, 1)
    images = (images - .5) * contrast + .5 + brightness
    strength = uniform(rng, 0, noise, n, 1, 1, 1)
    images += strength * rng.standard_normal(images.shape, dtype=np.float32)
    return (np.clip(images, 0, 1) * 255 + .5).astype(np.uint8)
