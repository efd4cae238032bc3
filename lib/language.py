"""
Encoders of texts, from transformers: BERT and its kin, and T5, which answers.

    module, description = build("sentence-transformers/all-MiniLM-L6-v2", weights=None, folder=runs_folder)

Feature of BERT and its kin: the mean over real tokens, or the first token's state, of the last layer, as
1_Pooling/config.json of sentence-transformers says; without one the first token's of BERT, of others the
mean. Of T5: the decoder's state on its start token after the final norm; its head are rows of lm_head, which
does not train. Dropout is off, in training too.
Shapes: B a batch, L tokens, D feature width, V vocabulary, C classes.
Source  arXiv:2407.07089 (Flan-T5); arXiv:1908.10084 (pooling)
"""
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lib import texts
from lib.files import Refused, load_tensors, replacing, save_tensors
from lib.hub import checked_download

TOKENIZER_FILE = "tokenizer.json"                          # in runs/ENCODER, beside pretrained.safetensors
LM_HEAD_FILE = "lm_head.safetensors"
TASKS = list(texts.PROMPTS)
EXAMPLE_LENGTH = 128


@dataclass(frozen=True)
class TextEncoder:
    """An encoder of texts: what lib/encoders.py's Encoder is for images, with the same methods."""
    name: str
    build: Callable          # () -> the module, once
    width: int               # D
    fingerprint: str         # of theta_pre
    description: dict        # all that pretrained.safetensors says of it
    tokenizer: object        # tokenizers.Tokenizer

    takes, unit = "texts", "text"
    wants = "one or two text columns (sentence; sentence1, sentence2; text; ...)"
    input_columns, cells = staticmethod(texts.input_columns), staticmethod(texts.cells)

    @functools.cached_property
    def module(self):
        """(B, L) int32 or int64 tokens -> (B, D), built when first asked for."""
        return self.build()

    def prepare(self, stored):
        """(N, L) int32 tokens as they are: the module tells real ones from padding."""
        return stored

    def training_parts(self, stored, labels, size, generator):
        """[((b, l), (b,))]: a step's texts and labels, of like length together, at most `size` at a time.

        A quarter of the step at most, filled up to its own longest text: two to three times fewer tokens.
        """
        lengths = (stored != self.description["architecture"]["pad"]).sum(1)               # (B,)
        parts = lengths.argsort(stable=True).split(min(size, -(-len(labels) // 4)))
        ends = [int(lengths[rows].max() + 7) // 8 * 8 for rows in parts]
        return [(stored[rows, :end], labels[rows]) for rows, end in zip(parts, ends, strict=True)]

    def example(self, n, stored=None):
        """(n, L) tokens, none of them padding, of the length of a stored text."""
        length = stored[0] if stored else min(EXAMPLE_LENGTH, self.description["longest"])
        return torch.full((n, length), int(self.description["architecture"]["pad"] == 0), dtype=torch.int32)

    def parts(self, split):
        """[(rows (n,), (N_all, L) tokens)]: for each of LENGTHS a split's texts that fit in no shorter."""
        stored = split.inputs.shape[1]
        real = (split.inputs[split.indices] != self.description["architecture"]["pad"]).sum(1)     # (N,)
        ends = np.array([length for length in texts.LENGTHS if length < stored] + [stored])
        fitting = ends[np.searchsorted(ends, real)]
        return [(np.flatnonzero(fitting == end), split.inputs[:, :end]) for end in ends if end in fitting]

    def store(self, name, encoded, folder):
        """A data set's texts {split: cells}, tokenised once to be kept: see texts.store."""
        return texts.store(name, encoded, self.tokenizer, self.description["architecture"]["pad"],
                           self.description["longest"], self.description.get("prompts"), folder)

    def stored_as(self, name):
        """What decides, besides the data set, how a task is stored."""
        prompts = self.description.get("prompts")          # of a T5
        asked = prompts and prompts.get(name, "general")
        return [self.description["tokenizer"], self.description["longest"], asked]

    @property
    def settings(self):
        """What a result's config says of the input."""
        return {"longest_text": self.description["longest"]}


# --------------------------------------------------------------------------------------- modules


class Pooled(torch.nn.Module):
    """A transformer of tokens and the feature that it is known by.

    pad        the token that fills up, masked
    separator  the token after which the second text's type begins; None: there are no types
    first      whether the feature is the first token's state, else the mean over real tokens
    """

    def __init__(self, model, pad, separator, first):
        super().__init__()
        self.model, self.pad, self.separator, self.first = model, pad, separator, first
        # ready-made for sdpa, which then takes one kernel whether there is padding or not; local attention
        # (ModernBERT) makes masks of its own
        local = any(getattr(model.config, key, None) for key in ("local_attention", "sliding_window"))
        self.ready_mask = model._supports_sdpa and not local

    def forward(self, tokens):
        """(B, L) tokens -> (B, D)."""
        tokens = tokens.long()
        real, more = tokens != self.pad, {}                                                # (B, L)
        if self.separator is not None:
            ended = (tokens == self.separator).cumsum(1) - (tokens == self.separator).long()
            more["token_type_ids"] = (ended > 0).long() * real                             # (B, L)
        mask = real[:, None, None] if self.ready_mask else real                            # (B, 1, 1, L)
        states = self.model(input_ids=tokens, attention_mask=mask, **more).last_hidden_state   # (B, L, D)
        if self.first:
            return states[:, 0]
        weights = real[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp_min(1)


class FirstAnswer(torch.nn.Module):
    """T5 up to its first answer: the decoder's state on its start token, after the final norm.

    scale   what the state is multiplied by: d_model^-0.5 of the checkpoints whose head is their embedding
    """

    def __init__(self, model, pad, start, scale):
        super().__init__()
        self.shared, self.encoder, self.decoder = model.shared, model.encoder, model.decoder
        self.encoder.embed_tokens = self.decoder.embed_tokens = None        # `shared` by other names
        self.pad, self.start, self.scale = pad, start, scale

    def forward(self, tokens):
        """(B, L) tokens -> (B, D)."""
        tokens = tokens.long()
        mask = (tokens != self.pad)[:, None, None]                                         # (B, 1, 1, L)
        read = self.encoder(inputs_embeds=self.shared(tokens), attention_mask=mask).last_hidden_state
        begun = self.shared(torch.full_like(tokens[:, :1], self.start))                    # (B, 1, D)
        states = self.decoder(inputs_embeds=begun, encoder_hidden_states=read, encoder_attention_mask=mask,
                              use_cache=False).last_hidden_state                           # (B, 1, D)
        return states[:, 0] * self.scale


def build_architecture(architecture):
    """The module of a description's "architecture", randomly initialised."""
    import transformers
    config = transformers.AutoConfig.for_model(**architecture["config"])
    return as_module(transformers.AutoModel.from_config(config), architecture)


def as_module(model, architecture):
    """A transformers model as the module (B, L) -> (B, D) of an architecture."""
    if architecture["name"] == "t5":
        return FirstAnswer(model, architecture["pad"], architecture["start"], architecture["scale"])
    if getattr(model, "pooler", None) is not None:
        model.pooler = None                                # a layer of its training's that no feature meets
    return Pooled(model, architecture["pad"], architecture["separator"], architecture["pooling"] == "first")


# --------------------------------------------------------------------------------------- from a checkpoint


def build(name, weights, folder):
    """(module with its pre-trained weights, description) of transformers:NAME.

    weights  folder with config.json, weights and the tokenizer's files; None: from the hub
    folder   runs/ENCODER, to which tokenizer.json and T5's lm_head.safetensors are written
    Errors   Refused: a model that is neither an encoder of texts nor T5, weights that are missing in the
             checkpoint, a tokenizer of another model; what transformers itself raises
    """
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if weights and not weights.is_dir():
        raise Refused(f"--weights {weights} is not a folder: give the one that holds config.json, "
                      f"model.safetensors and the tokenizer's files of {name}")
    source = str(weights or name)
    with checked_download(None if weights else name):
        config = without_dropout(transformers.AutoConfig.from_pretrained(source))
        answers = config.model_type == "t5"
        if not answers and type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING:
            raise Refused(f"{source} is a {config.model_type}: encoders of texts are BERT and its kin, or T5")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        pooling = "answer" if answers else pooling_of(source, config.model_type)
        kind = transformers.T5ForConditionalGeneration if answers else transformers.AutoModel
        model, found = kind.from_pretrained(source, config=config, dtype=torch.float32,
                                            output_loading_info=True)
    missing = [key for key in found["missing_keys"] if not key.startswith("pooler.")]
    if missing:
        raise Refused(f"{source} lacks {min(missing)} ({len(missing)} tensors): "
                      f"its weights are not what its config.json says")
    kept, sha256 = keep_tokenizer(source, tokenizer, config.vocab_size, folder)
    architecture = {"library": "transformers", "name": config.model_type, "config": plain(config),
                    "pad": tokenizer.pad_token_id, "pooling": pooling,
                    "separator": type_separator(kept, tokenizer.sep_token_id, config)}
    if answers:
        architecture["start"] = config.decoder_start_token_id or 0
        architecture["scale"] = config.d_model ** -0.5 if config.scale_decoder_outputs else 1.0
        save_tensors(folder / LM_HEAD_FILE, {"weight": model.lm_head.weight}, tokenizer=sha256)
    longest = min(texts.LENGTHS[-1], positions(model, config), tokenizer.model_max_length)
    module = as_module(model, architecture).eval()
    width = check_padding(source, module, longest)
    print(f"{source}: a text's feature is {SAID[pooling]}, {width} numbers; "
          f"at most {longest} tokens are read", flush=True)
    return module, {"architecture": architecture, "width": width, "longest": longest, "tokenizer": sha256,
                    "text_tower": LM_HEAD_FILE if answers else None, "tasks": TASKS, "defaults": {},
                    "transformers": transformers.__version__}


SAID = {"first": "its first token's state", "mean": "the mean state of its tokens",
        "answer": "the decoder's first state, before lm_head"}


def pooling_of(source, model_type):
    """"first" or "mean": how a model's states become a feature, as its 1_Pooling/config.json says."""
    from transformers.utils import cached_file
    file = cached_file(source, "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return "first" if model_type == "bert" else "mean"
    said = json.loads(Path(file).read_text())
    modes = {mode for mode, on in said.items() if mode.startswith("pooling_mode_") and on is True}
    known = {"pooling_mode_cls_token": "first", "pooling_mode_mean_tokens": "mean"}
    if len(modes) != 1 or not modes <= set(known):
        raise Refused(f"{source}: 1_Pooling/config.json asks for {', '.join(sorted(modes)) or 'nothing'}; "
                      f"known are {' and '.join(known)}")
    return known[modes.pop()]


def without_dropout(config):
    """A configuration whose every dropout is 0: training is then the function that is evaluated."""
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def plain(config):
    """A configuration as JSON, without what it says of the checkpoint's place and kind."""
    values = json.loads(config.to_json_string(use_diff=False))
    for key in ("_name_or_path", "architectures", "transformers_version", "dtype"):
        values.pop(key, None)
    return values


def positions(model, config):
    """How many tokens a model takes; 512 and more where positions are relative."""
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, torch.nn.Embedding):
            # RoBERTa counts from behind the padding's number
            return part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
    return getattr(config, "max_position_embeddings", None) or texts.LENGTHS[-1]


def check_padding(source, module, longest):
    """The width of a feature; Refused where it depends on how far a text is filled up."""
    half = max(1, min(8, longest // 2))
    tokens = torch.arange(2, 2 + half)[None] + (module.pad in range(2, 2 + half)) * half
    filled = torch.cat([tokens, torch.full_like(tokens, module.pad)], 1)
    with torch.no_grad():
        feature, same = module(tokens), module(filled)
    if not torch.allclose(feature, same, rtol=1e-3, atol=1e-4):
        raise Refused(f"{source}: what a text is filled up with changes its feature "
                      f"by up to {(feature - same).abs().max():.1e}: it is no encoder that masks its padding")
    return feature.shape[1]


# --------------------------------------------------------------------------------------- its tokenizer


def keep_tokenizer(source, tokenizer, vocabulary, folder):
    """(tokenizers.Tokenizer, its file's SHA-256), in folder/tokenizer.json, without cutting or filling.

    Errors  Refused: no such tokenizer, none for padding, another model's
    """
    kept = getattr(tokenizer, "backend_tokenizer", None)
    if kept is None or tokenizer.pad_token_id is None:
        raise Refused(f"{source} has no tokenizer that transformers reads as tokenizer.json, "
                      f"or none with a token for padding")
    size = max(kept.get_vocab().values()) + 1
    if not 0.9 * vocabulary <= size <= vocabulary:
        raise Refused(f"{source}: the tokenizer has {size} tokens and the model {vocabulary}: "
                      f"it is another model's tokenizer")
    kept.no_truncation()
    kept.no_padding()
    with replacing(folder / TOKENIZER_FILE) as temporary:
        kept.save(str(temporary))
    return load_tokenizer(folder)


def load_tokenizer(folder, sha256=None):
    """(tokenizers.Tokenizer, SHA-256) of a folder's tokenizer.json; Refused where that is not `sha256`.

    What looks like a special token in a text is text.
    """
    import tokenizers
    path = folder / TOKENIZER_FILE
    content = path.read_bytes() if path.exists() else b""
    found = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, found):
        raise Refused(f"{path} is missing, or not what pretrained.safetensors beside it was made with: "
                      f"delete that file, and the same command makes both again")
    tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    tokenizer.encode_special_tokens = True
    return tokenizer, found


def type_separator(tokenizer, separator, config):
    """The token after which the second text of a pair has another type; None where there are no types."""
    typed = 1 in tokenizer.encode("a", "b").type_ids and getattr(config, "type_vocab_size", 0) > 1
    return separator if typed else None


# --------------------------------------------------------------------------------------- in runs/


def as_encoder(build, description, fingerprint, folder):
    """The TextEncoder of runs/ENCODER."""
    tokenizer, _ = load_tokenizer(folder, description["tokenizer"])
    name, width = description["encoder"], description["width"]
    return TextEncoder(name, build, width, fingerprint, description, tokenizer)


def load_lm_head(folder, encoder):
    """(V, D) lm_head's weight of a T5, from runs/ENCODER."""
    made_by, tokenizer = f"python probe.py {encoder.name}", encoder.description["tokenizer"]
    tensors, _ = load_tensors(folder / LM_HEAD_FILE, made_by, tokenizer=tokenizer)
    return tensors["weight"]


def folder_sha256(folder):
    """SHA-256 over the files of a checkpoint's folder, by which --weights is known again."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*"), *folder.glob("1_Pooling/*")]):
        if path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
