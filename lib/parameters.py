"""
Which parameters of an encoder train: those of the attention, with or without biases and MLPs, by their names.

Names are those of timm, of open_clip (biases of some families are attn.q_bias and attn.v_bias) and of
transformers.
Source  arXiv:2407.07089 section 3 and Table 5
"""
import re

from lib.files import Refused

QKV = (r"(attn\.(qkv|qk|kv|w?[qkv]|[qkv]_proj|in_proj|Wqkv)|(self|attention)\.(query|key|value)(_proj)?"
       r"|attention\.[qkv]_lin|Attention\.[qkv])[._]")
OUT = r"(attn\.(proj|out_proj|o|Wo)|attention\.(output\.dense|out_lin)|Attention\.o)[._]"
ATTENTION = rf"({QKV}|{OUT})"
MLP = (r"(mlp\.(fc1|fc1_[gx]|fc2|c_fc|c_proj|Wi|Wo)|\d\.(intermediate|output)\.dense|ffn\.lin[12]"
       r"|DenseReluDense\.w[io](_[01])?)\.")
PARTS = {
    "attention": rf"{ATTENTION}weight$",
    "attention-qkv": rf"{QKV}weight$",
    "attention-bias": rf"{ATTENTION}(weight|bias)$",
    "attention-mlp": rf"({ATTENTION}|{MLP})weight$",
    "attention-mlp-bias": rf"({ATTENTION}|{MLP})(weight|bias)$",
}
# a matrix of theirs by another name is found by the names of the modules that hold it
HOLDERS = {"attn": r"(attn|[Aa]ttention(\.self|\.output)?)\.(?!relative_attention_bias)\w+\.weight$",
           "mlp": r"(mlp|intermediate|ffn|DenseReluDense)\.\w+\.weight$"}


def choose_parameters(module, trained, what):
    """Let the parameters train that `trained` names, and only those; returns how many numbers they hold.

    trained  regular expression; empty: all of them
    what     is said in a refusal
    Errors   Refused: there is none, or a matrix of attention (or MLP) by another name would stay as it is
    """
    count, left_out = 0, []
    holders = [pattern for part, pattern in HOLDERS.items() if part in trained]
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(bool(re.search(trained, name)))
        count += parameter.numel() if parameter.requires_grad else 0
        if not parameter.requires_grad and parameter.ndim == 2 and not re.search(rf"{OUT}weight$", name):
            found = filter(None, [re.search(rf"(?:^|\.){pattern}", name) for pattern in holders])
            left_out += [match[0].removeprefix(".") for match in found]
    if count == 0:
        names = [name for name, _ in module.named_parameters()]
        raise Refused(f"{what}: by its name no parameter is one that it trains (they are {names[0]} to "
                      f"{names[-1]}); recipes aligned and full train any encoder")
    if left_out:
        named = ", ".join(sorted(set(left_out)))
        raise Refused(f"{what} would leave out {named} ({len(left_out)} matrices): "
                      f"recipes aligned and full train any encoder")
    return count
