"""
Pictures: stored once as uint8 squares, prepared and augmented in batches on the device.

Shapes: N pictures, B a batch, s pixels a side as stored, S pixels a side as the encoder takes them.
"""
import functools
import io
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from lib.devices import make_room
from lib.files import Refused, new_array
from lib.progress import progress

# --------------------------------------------------------------------------------------- decoding, once

BITS, SAMPLE_FORMAT, SIGNED = 258, 339, (2,)                # tags of TIFF, and whole numbers below 0 too
ORIENTATION = 0x0112                                        # the EXIF tag, and what undoes its values
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
           4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
           7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


class Frame(NamedTuple):
    """How a picture becomes a square: resized by which interpolation, and cut at both ends or squashed."""
    side: int                          # pixels
    interpolation: str = "bicubic"     # or "bilinear"
    squash: bool = False

    def square(self, image):
        """A PIL image as a square one."""
        method = Image.Resampling[self.interpolation.upper()]
        if self.squash:
            return image.resize((self.side, self.side), method)
        return ImageOps.fit(image, (self.side, self.side), method)


def input_columns(features):
    """[the image column] among a data set's features; [] where there is none, or more than one.

    Without one of images what pandas leaves of it counts: {"bytes", "path"}, or bytes alone.
    """
    import datasets
    raw = datasets.Value("binary"), datasets.Value("large_binary")
    images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    structs = [column for column, kind in features.items()
               if isinstance(kind, dict) and kind.keys() <= {"bytes", "path"} and kind.get("bytes") in raw]
    plain = [column for column, kind in features.items() if kind in raw]
    found = images or structs or plain
    return found if len(found) == 1 else []


def endings():
    """Of the files that Pillow reads, with those of its plug-ins: {".png", ...}."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def cells(rows, columns):
    """The undecoded cells {"bytes", "path"} of the image column."""
    import datasets
    return rows.cast_column(columns[0], datasets.Image(decode=False))[columns[0]]


def store(name, encoded, frame, folder):
    """Decode the undecoded image columns {"train", "test"} of a task into folder/SPLIT_inputs.npy.

    Pictures of one small square size keep it, all others become a Frame's squares.
    Returns  {split: (N, 3, s, s) uint8, memory-mapped}
    Errors   Refused: a picture that cannot be decoded, named with its index; a full disk
    """
    native = one_small_square_size(encoded, frame.side)
    count = sum(len(cells) for cells in encoded.values())
    make_room(folder.parent, count * 3 * (native or frame.side) ** 2, f"decoded images of task {name}")
    return {split: decode_split(name, split, cells, native, frame, folder / f"{split}_inputs.npy")
            for split, cells in encoded.items()}


def open_image(cell):
    """PIL image of an undecoded cell {"bytes", "path"}."""
    return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])


def as_seen(image):
    """The RGB image that a viewer shows of a PIL image: upright as its EXIF says, on white where transparent.

    Of 16 bits a channel the upper 8 count, as Pillow itself has it for colours, and of 32 likewise. Of floats
    1 is white.
    Errors  ValueError: a grey that is no picture by this
    """
    image.load()
    turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(scaled(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def scaled(image):
    """(h, w) uint8 of a grey PIL image of mode I or F: white is the largest whole number of its type, or 1.

    Errors  ValueError: values below 0 or above white, or none of which 8 bits would keep anything
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    [bits], signed = tags.get(BITS, (32,)), tags.get(SAMPLE_FORMAT) == SIGNED
    if image.mode == "I" and not signed:
        values = values.view(np.uint32)                     # Pillow has them signed
    white = 1 if image.mode == "F" else 2 ** (bits - signed) - 1
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= white or 0 < high < white / 256:
        raise ValueError(f"its {bits} bits a pixel hold {low:.6g} to {high:.6g}, where 0 is black and "
                         f"{white:.6g} white: store it with 8 or 16 bits")
    return np.minimum(values * (256 / white), 255).astype(np.uint8)


def one_small_square_size(encoded, side):
    """The side of all images if square, alike and at most `side` pixels; else 0. Reads headers only."""
    first = None
    for cells in encoded.values():
        for cell in cells:
            try:
                size = open_image(cell).size
            except Exception:  # decode_split names the broken image; until then its set is like any other
                return 0
            first = first or size
            if size != first or size[0] != size[1] or size[0] > side:
                return 0
    return first[0]


def decode_split(name, split, cells, native, frame, path):
    """Decode `cells` in threads into .npy, (N, 3, s, s) uint8: as they are where native, else as framed."""
    def decode(index, cell):
        try:
            image = as_seen(open_image(cell))
        except Exception as error:  # pillow and its codecs raise many types on a broken file
            reason = f"{type(error).__name__}: {error}"
            message = f"task {name}: image {index} of split {split} cannot be decoded ({reason})"
            raise Refused(message[:300]) from error
        return as_array(image if native else frame.square(image))

    shape = (len(cells), 3, native or frame.side, native or frame.side)
    pixels = new_array(path, shape, np.uint8)
    with ThreadPoolExecutor() as pool, progress(len(cells), f"decode {name} {split}", "img") as bar:
        for start in range(0, len(cells), 512):
            block = cells[start:start + 512]
            for offset, decoded in enumerate(pool.map(decode, range(start, start + len(block)), block)):
                pixels[start + offset] = decoded
            bar.update(len(block))
    pixels.flush()
    return pixels


def as_array(image):
    """(3, s, s) uint8 of a square PIL image in RGB."""
    return np.asarray(image).transpose(2, 0, 1)


def as_stored(image, frame):
    """(3, s, s) uint8 of one RGB PIL image: as it is where it is a small square, else a Frame's square."""
    small = image.width == image.height <= frame.side
    return as_array(image if small else frame.square(image))


# --------------------------------------------------------------------------------------- on the device


def fit(images, size, frame):
    """(N, 3, s, s) uint8 -> (N, 3, S, S) uint8: antialiased to a Frame's side, then the centre S x S."""
    from torchvision.transforms.v2 import InterpolationMode, functional
    if images.shape[-1] != frame.side and images.device.type == "cpu":
        method = InterpolationMode(frame.interpolation)
        images = functional.resize(images, [frame.side, frame.side], method, antialias=True)
    elif images.shape[-1] != frame.side:
        images = resize_in_two_passes(images, frame)
    return functional.center_crop(images, [size, size])


def resize_in_two_passes(images, frame):
    """(N, 3, s, s) uint8 -> (N, 3, side, side) uint8 as Pillow does: along rows, rounded, then along columns.

    For GPUs, where torchvision's own is one pass in float: what leaves 0 to 255 between the passes is not cut
    off, and the picture is another by up to 31 grey levels.
    """
    for shape in ((images.shape[-2], frame.side), (frame.side, frame.side)):
        wide = F.interpolate(images.float(), shape, mode=frame.interpolation, align_corners=False,
                             antialias=True)
        images = wide.round_().clamp_(0, 255).to(torch.uint8)
    return images


def normalise(images, mean, std):
    """(B, 3, S, S) in [0, 255], any dtype, to float32 with an encoder's mean and deviation per channel."""
    return (images.float() - on_device(mean, images.device)) / on_device(std, images.device)


def as_pictures(prepared, mean, std):
    """What normalise undone shows: (B, 3, S, S) float32 -> (B, S, S, 3) uint8 on the CPU, for plots."""
    pixels = prepared * on_device(std, prepared.device) + on_device(mean, prepared.device)
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@functools.cache
def on_device(channels, device):
    """Three numbers in [0, 1] as a (3, 1, 1) tensor in [0, 255]; made once: a copy to a GPU waits for it."""
    with torch.inference_mode(False):                       # evaluation and training share it
        return torch.tensor(channels, device=device).view(3, 1, 1) * 255


def random_resized_crop(images, size, generator, scale=(0.9, 1.0)):
    """torchvision's RandomResizedCrop(size, scale, ratio=(3/4, 4/3), bicubic) for a whole batch.

    images   (B, 3, s, s) uint8, on the device that does the work
    Returns  (B, 3, size, size) float32 in [0, 255]; every image its own box, all of it where ten draws miss
    """
    batch, device = len(images), images.device
    uniform = torch.rand(4, 10, batch, device=device, generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * uniform[0]
    ratio = torch.exp((2 * uniform[1] - 1) * np.log(4 / 3))
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()    # (10, B), fractions of the side
    fits = (width <= 1) & (height <= 1)
    first = fits.float().argmax(0, keepdim=True)            # first draw that fits, as torchvision tries them
    found = fits.any(0)
    width = torch.where(found, width.gather(0, first)[0], 1.0)      # (B,)
    height = torch.where(found, height.gather(0, first)[0], 1.0)
    left = uniform[2, 0] * (1 - width)
    top = uniform[3, 0] * (1 - height)
    box = torch.zeros(batch, 2, 3, device=device)
    box[:, 0, 0], box[:, 0, 2] = width, 2 * left + width - 1
    box[:, 1, 1], box[:, 1, 2] = height, 2 * top + height - 1
    grid = F.affine_grid(box, [batch, 3, size, size], align_corners=False)
    crops = F.grid_sample(images.float(), grid, mode="bicubic", padding_mode="border", align_corners=False)
    return crops.clamp(0, 255)
