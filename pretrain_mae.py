"""
Pre-train the small encoder as a masked autoencoder: three patches of four are hidden and have to be guessed.

    python pretrain_mae.py tiny-mae                                    # two minutes on one core
    python pretrain_mae.py slow-mae --checkpoints 0,25,100,400,1500    # also runs/slow-mae-step0, ...
    python pretrain_mae.py own-mae --tasks pets=FOLDER                 # on your own pictures, labels or none

The encoder sees visible patches only; a light decoder, thrown away afterwards, sees what it makes of them and
guesses the pixels of the hidden ones, each patch normalised by its own mean and deviation. Architecture,
pictures and number of images seen are those of pretrain.py.

Writes  runs/ENCODER/pretrained.safetensors, pretrain.json and the rest as pretrain.py does;
        reconstruction.png
Source  arXiv:2111.06377, of which 75 % hidden, a narrow decoder and normalised pixels
"""
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block

from lib import encoders, plots, pretraining
from lib.images import as_pictures
from lib.study import run
from lib.training import batches, learning_rate
from pretrain import ARCHITECTURE, CLIP_NORM, SETTINGS, WEIGHT_DECAY

HIDDEN = 0.75                                              # share of the patches
DECODER = {"width": 64, "depth": 1, "heads": 4}


def parse_args(argv=None):
    return pretraining.pretraining_parser(__doc__, lr=2e-3).parse_args(argv)


class Decoder(torch.nn.Module):
    """Tokens of the visible patches -> pixels of all patches."""

    def __init__(self, n_patches, encoder_width, n_values, width, depth, heads):
        super().__init__()
        self.embed = torch.nn.Linear(encoder_width, width)
        self.hidden = torch.nn.Parameter(0.02 * torch.randn(1, 1, width))          # for any hidden patch
        self.positions = torch.nn.Parameter(0.3 * torch.randn(1, n_patches, width))
        self.blocks = torch.nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = torch.nn.LayerNorm(width)
        self.pixels = torch.nn.Linear(width, n_values)

    def forward(self, tokens, visible):
        """(B, V, D) visible patches, (B, V) where these are -> (B, P, 3 * p * p)."""
        tokens = self.embed(tokens)
        patches = self.hidden.expand(len(tokens), self.positions.shape[1], -1)
        patches = patches.scatter(1, visible[..., None].expand_as(tokens), tokens) + self.positions
        return self.pixels(self.norm(self.blocks(patches)))


def choose_patches(n, n_patches, generator):
    """Random masks of n pictures: (M * n, V) visible and (M * n, H) hidden patches, first masks first.

    A picture's patches are dealt out to its masks: each is visible in one of them. With 75 % hidden there are
    four masks a picture, and the encoder sees as many patches as under pretrain.py.
    """
    order = torch.rand(n, n_patches, device=generator.device, generator=generator).argsort(1)
    n_visible = n_patches - round(HIDDEN * n_patches)
    masks = torch.cat([order.roll(-start, 1) for start in range(0, n_patches, n_visible)])
    return masks[:, :n_visible], masks[:, n_visible:]


def encode(module, images, visible):
    """What the ViT makes of some patches of prepared images: (B, V, D)."""
    patches = module.patch_embed(images) + module.pos_embed                        # (B, P, D)
    patches = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[2]))
    return module.norm(module.blocks(patches))


def patches_of(images, side):
    """(B, 3, S, S) -> (B, P, 3 * side * side), patches in the order of the ViT's tokens."""
    return F.unfold(images, side, stride=side).transpose(1, 2)


def statistics(patches):
    """Mean and deviation of each patch (B, P, 3 * p * p): (B, P, 1) each."""
    return patches.mean(2, keepdim=True), (patches.var(2, keepdim=True) + 1e-6).sqrt()


def masked_loss(guessed, patches, hidden):
    """Mean squared error on hidden patches only, against their normalised pixels.

    guessed, patches   (B, P, 3 * p * p)         hidden   (B, H), which of the P
    """
    mean, deviation = statistics(patches)
    errors = (guessed - (patches - mean) / deviation).square().mean(2)             # (B, P)
    return errors.gather(1, hidden).mean()


def main(args):
    # ---------------------------------------------------- open
    architecture = pretraining.sized(ARCHITECTURE, args.large)
    settings = {"hidden": HIDDEN, "decoder": DECODER}
    result, device = pretraining.open_result(args, __file__, architecture, **settings)
    if result is None:
        return

    # ---------------------------------------------------- module, images, decoder
    torch.manual_seed(args.seed)                           # as in pretrain.py: the same random initialisation
    module = encoders.build_architecture(architecture).to(device).train()
    with torch.no_grad():
        module.pos_embed.mul_(15)
    description = pretraining.describe(args, module, architecture, SETTINGS, "mae")
    encoder = encoders.as_encoder(lambda: module, description)
    pictures = pretraining.open_pictures(args, encoder, device, need_labels=False)
    generator = torch.Generator(device).manual_seed(args.seed)
    train, test = pretraining.hold_out(len(pictures.images), device, generator)
    side, n_patches = module.patch_embed.patch_size[0], module.patch_embed.num_patches
    decoder = Decoder(n_patches, encoder.width, 3 * side ** 2, **DECODER).to(device)

    def reconstruct(images):
        """(loss, guessed (M * B, P, 3 * p * p), hidden (M * B, H)) of prepared images under M masks each."""
        visible, hidden = choose_patches(len(images), n_patches, generator)
        images = images.repeat(len(visible) // len(images), 1, 1, 1)
        guessed = decoder(encode(module, images, visible), visible)
        return masked_loss(guessed, patches_of(images, side), hidden), guessed, hidden

    # ---------------------------------------------------- AdamW, warm-up, cosine to 0
    parameters = [*module.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=WEIGHT_DECAY, fused=True)
    order = batches(len(train), args.batch_size, args.pretrain_steps, generator)
    parts = {"module": module, "decoder": decoder, "optimizer": optimizer}
    training = pretraining.Training(args, result, pictures, encoder, generator, parts)
    for step, batch in training.steps(order):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.pretrain_steps, args.lr)
        loss, _, _ = reconstruct(encoder.prepare(pictures.images[train[batch]]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        training.after(step, loss)

    # ---------------------------------------------------- save, say, show
    with torch.no_grad():
        images = encoder.prepare(pictures.images[test[:1000]])
        loss, guessed, hidden = reconstruct(images)
    said = training.finish({"held_out_loss": loss.item(), "n": len(images)})
    print(f"pretrain_mae: held-out loss {loss:.4f} (n = {len(images)}; 1 is guessing every mean), {said}")
    images = images[:8]                                    # with the first mask of each
    guessed, hidden = guessed[:len(images)], hidden[:len(images)]
    show(result.path.with_name("reconstruction.png"), encoder, images, guessed, hidden, side)


def show(path, encoder, images, guessed, hidden, side):
    """Pictures, what was visible of them, and the guess with each hidden patch's own mean and contrast."""
    patches = patches_of(images, side)
    mean, deviation = statistics(patches)
    where = torch.zeros_like(patches[..., :1]).scatter(1, hidden[..., None], 1.0)  # (B, P, 1), 1 where hidden
    rows = {"picture": patches, "visible": patches * (1 - where),
            "guessed": torch.lerp(patches, guessed * deviation + mean, where)}
    for name, row in rows.items():
        whole = F.fold(row.transpose(1, 2), images.shape[2:], side, stride=side)
        rows[name] = as_pictures(whole, encoder.mean, encoder.std)
    plots.picture_rows(path, rows, "held-out pictures; a guessed patch has its own mean and contrast")


if __name__ == "__main__":
    run(main, parse_args)
