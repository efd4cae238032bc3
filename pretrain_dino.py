"""
Pre-train the small encoder by self-distillation: what it says of one view of a picture is what its teacher,
its own running average, says of another view.

    python pretrain_dino.py tiny-dino                                   # four minutes on one core
    python pretrain_dino.py slow-dino --checkpoints 0,25,100,400,1500   # also runs/slow-dino-step0, ...
    python pretrain_dino.py own-dino --tasks pets=FOLDER                # on your own pictures, labels or none

Two large crops go through both, small ones, at half the side, through the student alone. What the teacher
says is centred, or one prototype would win for all pictures, and sharpened, or all would be alike: the
entropy of what it says of a picture, and that of the mean of all, show either collapse. The teacher is saved.
Architecture, pictures and number of images seen are those of pretrain.py.

Writes  runs/ENCODER/pretrained.safetensors, pretrain.json and the rest as pretrain.py does; neighbours.png
Source  arXiv:2104.14294; fewer prototypes, and a faster average, for a short training
"""
import copy
import math

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

from lib import encoders, plots, pretraining
from lib.images import as_pictures
from lib.study import run
from lib.training import batches, learning_rate
from pretrain import ARCHITECTURE, CLIP_NORM, SETTINGS, WEIGHT_DECAY

HEAD = {"hidden": 256, "bottleneck": 64, "prototypes": 512}
VIEWS = {"small": 2, "large_scale": (0.6, 1.0), "small_scale": (0.3, 0.6), "colours": 0.8}
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04
CENTRE_MOMENTUM, FIRST_MOMENTUM = 0.9, 0.98                # the teacher's rises to 1 along a cosine


def parse_args(argv=None):
    return pretraining.pretraining_parser(__doc__).parse_args(argv)


class ProjectionHead(torch.nn.Module):
    """(B, D) features -> (B, K) cosines with K prototypes, by way of a bottleneck."""

    def __init__(self, width, hidden, bottleneck, prototypes):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(width, hidden, bias=False), torch.nn.GELU(),
                                          torch.nn.Linear(hidden, hidden, bias=False), torch.nn.GELU(),
                                          torch.nn.Linear(hidden, bottleneck, bias=False))
        self.prototypes = torch.nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, features):
        return F.linear(F.normalize(self.layers(features), dim=1), F.normalize(self.prototypes, dim=1))


def features_of(module, views):
    """(B, D) features of views of any size: position embeddings are resampled to their patches."""
    patches = module.patch_embed.proj(views)               # (B, D, h, w)
    positions = resample_abs_pos_embed(module.pos_embed, list(patches.shape[2:]), num_prefix_tokens=0)
    tokens = module.blocks(patches.flatten(2).transpose(1, 2) + positions)
    return module.forward_head(module.norm(tokens))


def distillation_loss(student, teacher, centre):
    """Mean cross entropy between what the teacher says of a large view and the student of every other view.

    student   list of (B, K), large views first          teacher   list of (B, K), the large views
    """
    losses = []
    for i, large in enumerate(teacher):
        target = ((large - centre) / TEACHER_TEMPERATURE).softmax(1).detach()
        for j, view in enumerate(student):
            if i != j:
                losses.append(-(target * (view / STUDENT_TEMPERATURE).log_softmax(1)).sum(1).mean())
    return sum(losses) / len(losses)


def entropies(teacher, centre):
    """(mean entropy of what the teacher says of a picture, entropy of its mean), in shares of log K.

    The first is 1 where it says the same of every prototype, the second 0 where one prototype wins for all.
    """
    said = ((torch.cat(teacher) - centre) / TEACHER_TEMPERATURE).softmax(1)        # (B, K)
    mean, most = said.mean(0), math.log(said.shape[1])
    each = -(said * said.clamp_min(1e-9).log()).sum(1).mean()
    return each / most, -(mean * mean.clamp_min(1e-9).log()).sum() / most


def momentum(step, steps):
    """Of the teacher's average: from FIRST_MOMENTUM to 1 along a cosine."""
    return 1 - (1 - FIRST_MOMENTUM) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def follow(teacher, student, share):
    """Teacher = share * teacher + (1 - share) * student, in place."""
    for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
        average.lerp_(parameter, 1 - share)


def main(args):
    # ---------------------------------------------------- open
    architecture = pretraining.sized(ARCHITECTURE, args.large)
    settings = {"head": HEAD, "views": VIEWS, "temperatures": [STUDENT_TEMPERATURE, TEACHER_TEMPERATURE],
                "momenta": [CENTRE_MOMENTUM, FIRST_MOMENTUM]}
    result, device = pretraining.open_result(args, __file__, architecture, **settings)
    if result is None:
        return

    # ---------------------------------------------------- student, teacher, images
    torch.manual_seed(args.seed)                           # as in pretrain.py: the same random initialisation
    module = encoders.build_architecture(architecture).to(device).train()
    with torch.no_grad():
        module.pos_embed.mul_(15)
    description = pretraining.describe(args, module, architecture, SETTINGS, "dino")
    student = torch.nn.ModuleDict({"encoder": module, "head": ProjectionHead(description["width"], **HEAD)})
    student = student.to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    encoder = encoders.as_encoder(lambda: teacher["encoder"], description)
    pictures = pretraining.open_pictures(args, encoder, device, need_labels=False)
    generator = torch.Generator(device).manual_seed(args.seed)
    train, test = pretraining.hold_out(len(pictures.images), device, generator)
    centre = torch.nn.ParameterDict({"centre": torch.zeros(HEAD["prototypes"], device=device)})
    centre.requires_grad_(False)

    # ---------------------------------------------------- AdamW, warm-up, cosine to 0
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=WEIGHT_DECAY, fused=True)
    order = batches(len(train), args.batch_size, args.pretrain_steps, generator)
    parts = {"student": student, "teacher": teacher, "centre": centre, "optimizer": optimizer}
    training = pretraining.Training(args, result, pictures, encoder, generator, parts)
    for step, batch in training.steps(order):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.pretrain_steps, args.lr)
        large, small = views_of(pictures.images[train[batch]], encoder, generator)
        said = student["head"](torch.cat([features_of(module, large), features_of(module, small)]))
        with torch.no_grad():
            taught = teacher["head"](features_of(teacher["encoder"], large)).split(args.batch_size)
        loss = distillation_loss(said.split(args.batch_size), taught, centre["centre"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        follow(teacher, student, momentum(step, args.pretrain_steps))
        each, mean = entropies(taught, centre["centre"])
        centre["centre"].lerp_(torch.cat(taught).mean(0), 1 - CENTRE_MOMENTUM)
        training.after(step, loss, entropy=each, entropy_of_mean=mean)

    # ---------------------------------------------------- save, say, show
    with torch.no_grad():
        images = encoder.prepare(pictures.images[test[:1000]])
        features = encoder.module(images)
        each, mean = entropies([teacher["head"](features)], centre["centre"])
    values = {"entropy": each.item(), "entropy_of_mean": mean.item(), "n": len(images)}
    said = training.finish(values)
    print(f"pretrain_dino: the teacher's entropy is {each:.3f} of the most for a picture, {mean:.3f} for the "
          f"mean of all (n = {len(images)}; 1 for a picture or 0 for the mean is collapse), {said}")
    show(result.path.with_name("neighbours.png"), encoder, images, features)


def views_of(stored, encoder, generator):
    """(2 * B, 3, S, S) large and (n * B, 3, S / 2, S / 2) small views of B pictures, first views first."""
    def views(count, scale):
        return torch.cat([pretraining.random_views(stored, encoder, scale, VIEWS["colours"], generator)
                          for _ in range(count)])

    small = F.avg_pool2d(views(VIEWS["small"], VIEWS["small_scale"]), 2)
    return views(2, VIEWS["large_scale"]), small


def show(path, encoder, images, features):
    """Eight held-out pictures, and below each the five others that are nearest to it by cosine.

    images, features   (N, 3, S, S) prepared and (N, D)
    """
    features = F.normalize(features - features.mean(0), dim=1)
    count = min(6, len(features))
    nearest = (features[:8] @ features.T).topk(count, dim=1).indices               # (8, 6), itself first
    rows = {}
    for rank, label in enumerate(["picture", "nearest", "2nd", "3rd", "4th", "5th"][:count]):
        rows[label] = as_pictures(images[nearest[:, rank]], encoder.mean, encoder.std)
    plots.picture_rows(path, rows, "held-out pictures and their neighbours by cosine of features")


if __name__ == "__main__":
    run(main, parse_args)
