"""Sentences, a tokenizer and a BERT small enough to be made in a test."""
import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import models, normalizers, pre_tokenizers, processors

WORDS = "a the film book is was good bad dull bright very not so it we saw read and or yes no".split()


def sentences(n, longest, seed):
    """Random sentences of 2 to `longest` words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(2, longest + 1))) for _ in range(n)]


def word_tokenizer(specials, template):
    """A tokenizer of whole words and letters; a special token's number is its place."""
    letters = "abcdefghijklmnopqrstuvwxyz012345"
    pieces = [*specials, *letters, *(f"##{letter}" for letter in letters), *WORDS, "negative", "positive"]
    numbers = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(numbers, unk_token=specials[-1]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = [(token, number) for number, token in enumerate(specials)]
    tokenizer.post_processor = processors.TemplateProcessing(**template, special_tokens=ids)
    return tokenizer


def save_model(folder, model, tokenizer, **special):
    model.save_pretrained(folder)
    kept = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    kept.save_pretrained(folder)
    return folder


def small_bert_folder(folder):
    """The folder, with a BERT of random weights and its tokenizer in it."""
    template = {"single": "[CLS] $A [SEP]", "pair": "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"}
    tokenizer = word_tokenizer(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], template)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=32,
                                     num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                                     max_position_embeddings=60, initializer_range=0.2)
    return save_model(folder, transformers.BertModel(config), tokenizer, pad_token="[PAD]",
                      cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
