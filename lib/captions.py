"""
Captions of the pre-training pictures, put together from what was drawn (lib/generated.py), not from pixels.

    "small dark red doodle bomu on light green, upper left, tilted right, thick lines"    all that may be said
    "doodle bomu on light green"                                                          what is, as a rule

Every specimen has an invented name, as the things in other pictures have names of their own, and that is
always said; the rest by chance, or captions would be told apart by colours alone. No word is one of the
downstream tasks' class names: an encoder meets those for the first time in a zero-shot head.
"""
import numpy as np

from lib.generated import BLOBS, CLOUDS, DOODLES, FRACTALS, PRETRAINING_NUMBER

KINDS = ["doodle"] * DOODLES + ["blob"] * BLOBS + ["fractal"] * FRACTALS + ["cloud"] * CLOUDS    # by label
SYLLABLES = ["ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "tu"]
HUES = np.array(["red", "yellow", "green", "cyan", "blue", "purple"])    # at 0, 60, ... 300 degrees
MENTIONED = 0.3                                            # how often anything but kind and name is said
TEMPLATES = ["a picture of a {}.", "a picture of the {}.", "a photo of a {}.", "a photo of the {}."]


def specimen_name(label):
    """An invented word for a pre-training class, each another: 0 is "baba", 1 "bade", 10 "deba"."""
    return SYLLABLES[label // 10] + SYLLABLES[label % 10]


def graded(values, bounds, words):
    """(N,) words: the first where a value is below bounds[0], the last where it is above bounds[-1]."""
    return np.array(words)[np.searchsorted(bounds, values)]


def colour_words(colours):
    """(N, 3) colours in [0, 1] -> (N,) words like "dark red", "grey" or "light purple"."""
    red, green, blue = colours.T
    angle = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)
    hue = HUES[np.round(angle / (np.pi / 3)).astype(int) % 6]
    hue = np.where(np.ptp(colours, axis=1) < .12, "grey", hue)
    return np.char.add(graded(colours.mean(1), [.35, .65], ["dark ", "", "light "]), hue)


def captions(labels, drawn, seed=0, mentioned=MENTIONED):
    """A noun phrase for each picture of generated.draw_pretraining, a list of N strings.

    labels      (N,) int64          drawn   {name: (N, ...)}, as draw_pretraining returns them
    seed        decides what is mentioned of which picture, by a generator of its own
    """
    rng = np.random.default_rng([seed, PRETRAINING_NUMBER, 1])                     # 0 draws the pictures
    size = graded(drawn["size"].mean(1), [.65, .75], ["small", "middling", "big"])
    row = graded(drawn["centre"][:, 1], [-.05, .05], ["upper ", "central ", "lower "])
    column = graded(drawn["centre"][:, 0], [-.05, .05], ["left", "middle", "right"])
    grain = graded(drawn["cells"], [4, 10], ["coarse", "even", "fine"])
    of_clouds = np.array([KINDS[label] == "cloud" for label in labels])
    before = {"size": np.where(of_clouds, grain, size), "pen": colour_words(drawn["pen"])}
    behind = {"ground": np.char.add(" on ", colour_words(drawn["ground"])),
              "place": np.char.add(", ", np.char.add(row, column)),
              "tilt": graded(drawn["angle"], [-.1, .1], [", tilted left", ", upright", ", tilted right"]),
              "lines": graded(drawn["width"], [.1, .9, 1.4], ["", ", thin lines", ", plain lines",
                                                              ", thick lines"])}
    for name in ("place", "tilt"):
        behind[name] = np.where(of_clouds, "", behind[name])                       # they fill their picture
    said = rng.random((len(labels), len(before) + len(behind))) < mentioned
    phrases = []
    for i, label in enumerate(labels):
        adjectives = [words[i] for words, is_said in zip(before.values(), said[i], strict=False) if is_said]
        phrase = " ".join([*adjectives, KINDS[label], specimen_name(label)])
        for words, is_said in zip(behind.values(), said[i, len(before):], strict=True):
            phrase += words[i] if is_said else ""
        phrases.append(phrase)
    return phrases
