"""
The encoder's first-order Taylor expansion at theta_pre: f(x; theta_pre) + J(x) tau, trained and evaluated.

    forward = linearized.forward(module, encoder, device)    # inputs -> (B, D), tau = module's - theta_pre
    evaluator = linearized.LinearizedEvaluator(encoder, device, dtype)    # in place of common.Evaluator

J tau is one forward-mode derivative (torch.func.jvp). It is linear in tau, so that one pass per input and
vector answers every lambda, every subset and every cell of a heat map by a few additions.
Source  arXiv:2305.12827 (Ortiz-Jimenez et al.); arXiv:2407.07089 section 3
"""
import contextlib
import re
import warnings

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import Evaluator
from lib.devices import tensor_float
from lib.encoders import weights_of
from lib.files import Refused


def expand(module, theta, tau, inputs):
    """(f(x; theta), J(x) tau), each (B, D).

    theta, tau   {name: tensor}; names that tau lacks do not move. Fused attention has no forward-mode
                 derivative: the plain one is used
    """
    names = set(names_once(module))
    fixed = {name: tensor for name, tensor in theta.items() if name in names and name not in tau}
    tau = {name: tensor for name, tensor in tau.items() if name in names}
    moved = {name: theta[name] for name in tau}

    def features(weights):
        return torch.func.functional_call(module, fixed | weights, (inputs,), tie_weights=False)

    with plain_attention():
        return torch.func.jvp(features, (moved,), (tau,))


@contextlib.contextmanager
def plain_attention():
    """Attention without its fused kernels, nor those of torch.nn.MultiheadAttention (open_clip)."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def batch_norms(module):
    """Names of its batch norms."""
    kind = torch.nn.modules.batchnorm._BatchNorm
    return [name for name, part in module.named_modules() if isinstance(part, kind)]


@contextlib.contextmanager
def refuse_no_derivative(encoder, bf16):
    """Around one pass of one input: Refused where an operation of the encoder has no forward-mode derivative.

    Also where features depend on running statistics, for which there is none, and where an operation has
    one in fp32 only.
    """
    found = batch_norms(encoder.module)
    if found:
        raise Refused(f"{encoder.name} has batch norms ({found[0]}): their running statistics have no "
                      f"derivative, so that it cannot be linearized")
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):     # of torch, on its own jvp
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        missing = re.search(r"(?:forward AD with|derivative for) ([\w:]+)", reason)
        what = f"{missing[1]} has no derivative that is needed" if missing else reason
        remedy = "; in bf16, try --dtype fp32" if bf16 and "type" in reason else ""
        raise Refused(f"{encoder.name} cannot be linearized: {what}{remedy}") from error


def names_once(module):
    """Names of parameters and buffers, once for each module that holds them.

    state_dict has several names for the tensors of a module that stands in several places (CoaT), which
    functional_call would replace, and not put back, several times.
    """
    for prefix, part in module.named_modules():
        for tensors in (part.named_parameters, part.named_buffers):
            yield from (name for name, _ in tensors(prefix, recurse=False))


def forward(module, encoder, device, amp=False):
    """The function that finetune.py trains: the module holds theta_t, what moves is theta_t - theta_pre.

    amp   whether it will be called in bf16. Norms are then in fp32, as on a GPU in any case: on a CPU the
          derivative of one by its fp32 weights is fp32, which a convolution behind it does not take
    """
    for part in module.modules() if amp else ():
        if isinstance(part, (torch.nn.LayerNorm, torch.nn.GroupNorm)):
            part.register_forward_pre_hook(in_fp32)
    theta_pre = {name: tensor.to(device) for name, tensor in weights_of(encoder.module).items()}

    def linear(inputs):
        named = module.named_parameters(remove_duplicate=False)
        tau = {name: parameter - theta_pre[name] for name, parameter in named}
        features, tangent = expand(module, theta_pre, tau, inputs)
        return features + tangent

    with refuse_no_derivative(encoder, amp):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            features = linear(encoder.example(1).to(device))
        features.float().sum().backward()
    module.zero_grad()
    return linear


def in_fp32(module, inputs):
    return tuple(tensor.float() for tensor in inputs)


class LinearizedEvaluator(Evaluator):
    """common.Evaluator for f(x; theta_pre) + sum_t c_t J(x) tau_t.

    One derivative per input and vector, kept until the vectors change, answers any number of settings.
    """

    def __init__(self, encoder, device, dtype, *more, **named):
        with refuse_no_derivative(encoder, dtype == torch.bfloat16), torch.inference_mode():
            super().__init__(encoder, device, dtype, *more, **named)    # on a GPU with a pass of its own
            self.example_pass(self.as_dtype(encoder.example(1)).to(device))

    def example_pass(self, inputs):
        return expand(self.module, self.slots, self.slots, inputs)    # theta_pre in place of a vector

    def use_vectors(self, vectors):
        self.vectors = []
        for vector in vectors:
            self.vectors.append({name: tensor.to(self.device, self.dtype) for name, tensor in vector.items()})
        self.known = {}                                     # split: f and each J tau, (1 + T, N, D) float32

    def stream(self, splits, settings):
        if not self.vectors:                                # theta_pre alone
            yield from super().stream(splits, settings)
            return
        missing = [split for split in splits if split not in self.known]
        if missing:
            self.known |= zip(missing, self.gathered(self.expansions(missing), missing))
        start = 0
        for split in splits:
            value, *tangents = self.known[split]
            for k, coefficients in enumerate(settings):
                own = self.share(k, len(settings), len(split))
                features = value[own.start:own.stop]
                for coefficient, tangent in zip(coefficients, tangents, strict=len(coefficients) > 0):
                    features = features + float(coefficient) * tangent[own.start:own.stop]
                yield k, start + np.arange(own.start, own.stop), features.to(self.dtype)
            start += len(split)

    def expansions(self, splits):
        """(1 + T, N, D): f and every J tau of the stream of splits, this process's share of it."""
        total, batch = sum(len(split) for split in splits), self.batch_size
        terms = torch.zeros(1 + len(self.vectors), total, self.encoder.width, device=self.device)
        for places, inputs in self.chunks(splits):
            batches = len(inputs) // batch
            for i in range(batches * self.rank // self.world, batches * (self.rank + 1) // self.world):
                here = places[i * batch:(i + 1) * batch]
                for t, vector in enumerate(self.vectors, 1):
                    with tensor_float(self.tf32):
                        value, tangent = expand(self.module, self.slots, vector,
                                                inputs[i * batch:(i + 1) * batch])
                    terms[t, here] = tangent[:len(here)].float()
                terms[0, here] = value[:len(here)].float()
        return terms
