"""
The encoder's first-order Taylor expansion at theta_pre: f(x; theta_pre) + J(x) tau, trained in its tangent space and evaluated at once.

    forward = linearized.forward(module, encoder, device)         # (B, 3, S, S) -> (B, D), tau = module's weights - theta_pre
    evaluator = linearized.evaluator(encoder, args, images)       # common.Evaluator, or its linear twin for a linear recipe

J tau is one forward-mode derivative (torch.func.jvp). It is linear in tau, so that one pass per image and vector answers every lambda,
every subset and every cell of a heat map by a few additions.
Source  arXiv:2305.12827 (Ortiz-Jimenez et al.); arXiv:2407.07089 section 3
"""
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
from encoders import weights_of


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
    """common.Evaluator for f(x; theta_pre) + sum_t c_t J(x) tau_t: T derivatives per image, whatever the number of settings."""

    def __init__(self, encoder, args, work, alone=False):
        args = type(args)(**vars(args) | {"compile": "off"})
        super().__init__(encoder, args, work, alone)

    def use_vectors(self, vectors):
        self.vectors = [{name: tensor.to(self.device, self.dtype) for name, tensor in vector.items()} for vector in vectors]

    def outputs(self, images, settings):
        batches = len(images) // self.batch_size
        first, last = batches * self.rank // self.world, batches * (self.rank + 1) // self.world
        features, tangents = [], [[] for _ in self.vectors]
        for index in range(first, last):
            batch = self.normalise(images[index * self.batch_size:(index + 1) * self.batch_size]).to(self.dtype)
            if not self.vectors:
                features.append(self.module(batch))
            for t, vector in enumerate(self.vectors):
                value, tangent = expand(self.module, self.slots, vector, batch)
                tangents[t].append(tangent)
                if t == 0:
                    features.append(value)
        if first < last:
            features, tangents = torch.cat(features), [torch.cat(tangent) for tangent in tangents]
            for k, coefficients in enumerate(settings):
                yield k, first, sum((float(c) * tangent for c, tangent in zip(coefficients, tangents, strict=len(coefficients) > 0)), features)
