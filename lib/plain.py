"""
The usual way to evaluate a merge, as public scripts do it: what bench.py measures the evaluator against.

Everything is read from disk, the merge goes through load_state_dict, a DataLoader makes the batches, and the
forward pass is eager in fp32.
"""
import copy

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

LAMBDA, BATCH_SIZE = 0.3, 128


def write_weights(folder, encoder, vector):
    """A checkpoint and a task vector, {name: tensor}, as such scripts find them."""
    theta_pre = {name: tensor.float() for name, tensor in encoder.module.state_dict().items()}
    save_file(theta_pre, folder / "pretrained.safetensors")
    save_file(vector, folder / "vector.safetensors")


def write_images(folder, splits):
    """Folders of JPEG files, folder/T/CLASS/N.jpg."""
    from PIL import Image
    for t, split in enumerate(splits):
        for index, image in enumerate(split.inputs):
            path = folder / str(t) / str(split.labels[index]) / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(path, quality=90)


def merged(folder, encoder, device):
    """A copy of the encoder's module with the merge in it."""
    pre, vector = load_file(folder / "pretrained.safetensors"), load_file(folder / "vector.safetensors")
    module = copy.deepcopy(encoder.module).to(device)
    module.load_state_dict({name: pre[name] + LAMBDA * vector[name] for name in pre})
    return module


def on_images(folder, encoder, heads, device):
    """Correct predictions under one lambda on the folders of write_images, decoded on the way."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2
    transform = v2.Compose([
        v2.Resize(encoder.size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(encoder.size), v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(encoder.mean, encoder.std)])
    module, hits = merged(folder, encoder, device), 0
    for t, head in enumerate(heads):
        pictures = ImageFolder(folder / str(t), transform)
        hits += count(module, torch.utils.data.DataLoader(pictures, BATCH_SIZE, num_workers=2), head, device)
    return hits


def on_texts(folder, encoder, texts, labels, head, device):
    """Correct predictions under one lambda on [(L,) tokens], each batch filled up to its longest (0 pads)."""
    def collate(rows):
        tokens = torch.nn.utils.rnn.pad_sequence([texts[row] for row in rows], batch_first=True)
        return tokens, labels[rows]

    loader = torch.utils.data.DataLoader(range(len(texts)), BATCH_SIZE, collate_fn=collate)
    return count(merged(folder, encoder, device), loader, head, device)


@torch.no_grad()
def count(module, loader, head, device):
    hits = 0
    for inputs, labels in loader:
        logits = F.linear(module(inputs.to(device)), head.weight, head.bias)
        hits += (logits.argmax(1) == labels.to(device)).sum().item()
    return hits
