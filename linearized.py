"""
The encoder's first-order Taylor expansion at theta_pre: f(x; theta_pre) + J(x) tau, trained in its tangent space and evaluated at once.

    forward = linearized.forward(module, encoder, device)         # (B, 3, S, S) -> (B, D), tau = module's weights - theta_pre
    evaluator = linearized.evaluator(encoder, args, images)       # common.Evaluator, or its linear twin for a linear recipe

J tau is one forward-mode derivative (torch.func.jvp). It is linear in tau, so that one pass per image and vector answers every lambda,
every subset and every cell of a heat map by a few additions.
Source  arXiv:2305.12827 (Ortiz-Jimenez et al.); arXiv:2407.07089 section 3
"""
import argparse

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import ranks
from encoders import weights_of, width_of


def expand(module, theta, tau, images):
    """(f(x; theta), J(x) tau), each (B, D).

    theta, tau   {name: tensor}; tau may lack names, which do not move. Fused attention has no forward-mode derivative: the plain one is used
    """
    fixed = {name: tensor for name, tensor in theta.items() if name not in tau}
    moved = {name: theta[name] for name in tau}
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda weights: torch.func.functional_call(module, fixed | weights, (images,)), (moved,), (tau,))


def forward(module, encoder, device):
    """The function that finetune.py trains: module's parameters are theta_t, and what moves is theta_t - theta_pre."""
    theta_pre = {name: tensor.to(device) for name, tensor in weights_of(encoder.module).items()}

    def linear(images):
        tau = {name: parameter - theta_pre[name] for name, parameter in module.named_parameters()}
        features, tangent = expand(module, theta_pre, tau, images)
        return features + tangent

    return linear


def evaluator(encoder, args, work, alone=False):
    """The evaluator of args.recipe."""
    kind = LinearizedEvaluator if common.RECIPES[args.recipe].linear else common.Evaluator
    return kind(encoder, args, work, alone)


class LinearizedEvaluator(common.Evaluator):
    """common.Evaluator for f(x; theta_pre) + sum_t c_t J(x) tau_t: one derivative per image and vector, kept until the vectors
    change, answers any number of settings in any number of calls."""

    def __init__(self, encoder, args, work, alone=False):
        super().__init__(encoder, argparse.Namespace(**vars(args) | {"compile": "off"}), work, alone)

    def use_vectors(self, vectors):
        self.vectors = [{name: tensor.to(self.device, self.dtype) for name, tensor in vector.items()} for vector in vectors]
        self.known = {}                                                    # id of a split: (the split, f and each J tau, (1 + T, N, D) float32)

    @torch.inference_mode()
    def run(self, splits, settings, consume):
        if not self.vectors:                                               # theta_pre alone
            super().run(splits, settings, consume)
            return
        missing = [split for split in splits if id(split) not in self.known]
        width = width_of(self.encoder)
        expanded = [torch.zeros(1 + len(self.vectors), len(split.rows), width, device=self.device) for split in missing]

        def keep(k, t, rows, features):
            expanded[t][k, rows] = features.float()

        if missing:
            super().run(missing, range(1 + len(self.vectors)), keep)
            if self.world > 1:
                ranks.add_up(expanded)
        self.known |= {id(split): (split, terms) for split, terms in zip(missing, expanded)}
        for t, split in enumerate(splits):
            value, *tangents = self.known[id(split)][1]
            for k, coefficients in enumerate(settings):
                rows = slice(*self.share(k, len(settings), len(value)))
                features = sum((float(c) * tangent[rows] for c, tangent in zip(coefficients, tangents, strict=len(coefficients) > 0)), value[rows])
                consume(k, t, rows, features.to(self.dtype))

    def outputs(self, images, settings):
        if not self.vectors:
            yield from super().outputs(images, settings)
            return
        batches = len(images) // self.batch_size
        first, last = batches * self.rank // self.world, batches * (self.rank + 1) // self.world
        terms = [[] for _ in settings]
        for index in range(first, last):
            batch = self.normalise(images[index * self.batch_size:(index + 1) * self.batch_size]).to(self.dtype)
            for t, vector in enumerate(self.vectors, 1):
                value, tangent = expand(self.module, self.slots, vector, batch)
                terms[t].append(tangent)
            terms[0].append(value)
        for k in settings if first < last else ():
            yield k, first, torch.cat(terms[k])
