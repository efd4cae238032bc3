"""
Texts: their columns found, tokenised once into int32 arrays of one fixed length a task.

A model that answers (T5) reads a text inside the prompt of its task, any other the text, or the pair, itself.
Shapes: N texts, L tokens as stored, C classes.
"""
import numpy as np

from lib.devices import make_room
from lib.files import Refused, new_array
from lib.progress import progress

# our own; what is asked comes first, so that cutting a long text leaves it
PROMPTS = {
    "cola": "Is this sentence acceptable or unacceptable English? {}",
    "mnli": "Does the premise mean entailment, contradiction or neither, neutral, for the hypothesis? "
            "Premise: {} Hypothesis: {}",
    "mrpc": "Do both sentences say the same, yes or no? First: {} Second: {}",
    "qqp": "Do both questions ask the same, yes or no? First: {} Second: {}",
    "rte": "Does the second text follow from the first, yes or no? First: {} Second: {}",
    "sst2": "Is the sentiment of this review negative or positive? {}",
    "stsb": "How alike are both sentences in meaning, from 0 to 5? First: {} Second: {}",
}
GENERAL_PROMPTS = {1: "{}", 2: "{} {}"}
# {task: {class: the word that answers for it}}; a class that is not here answers by its name
LABEL_WORDS = {
    "mrpc": {"not_equivalent": "no", "equivalent": "yes"},
    "qqp": {"not_duplicate": "no", "duplicate": "yes"},
    "rte": {"entailment": "yes", "not_entailment": "no"},
}
LENGTHS = 16, 32, 64, 128, 256, 512
CUT = 0.01                                                  # share of a task's texts that may be cut at most
BLOCK = 4096                                                # texts tokenised at a time


# --------------------------------------------------------------------------------------- columns

PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
         ("question", "sentence"), ("text1", "text2"))


def input_columns(features):
    """[the text column] or [two of them] among a data set's features; [] where it is not clear which.

    Columns of GLUE's names come before others, which count where there are no more than two.
    """
    kinds = {column: getattr(kind, "dtype", "") for column, kind in features.items()}
    found = [column for column, kind in kinds.items() if kind in ("string", "large_string")
             and column not in ("label", "labels")]
    for pair in PAIRS:
        if set(pair) <= set(found):
            return list(pair)
    for column in ("sentence", "text"):
        if column in found:
            return [column]
    return found if len(found) <= 2 else []


def cells(rows, columns):
    """[(text,) or (text, text)] of the rows of a split."""
    texts = [rows[column][:] for column in columns]
    return list(zip(*texts, strict=True))


# --------------------------------------------------------------------------------------- tokenising, once


def store(name, encoded, tokenizer, pad, longest, prompted, folder):
    """Tokenise the cells {"train", "test"} of a task into folder/SPLIT_inputs.npy, all of one length.

    tokenizer   tokenizers.Tokenizer
    pad         the number that fills up
    longest     tokens that the model takes at most
    prompted    whether the texts stand in the task's prompt
    The length is the smallest of LENGTHS, up to `longest`, that cuts no more than CUT of the texts.
    Returns  {split: (N, L) int32, memory-mapped}
    Errors   Refused: an empty text, named with its index; a full disk
    """
    texts = {split: written(name, split, pairs, prompted) for split, pairs in encoded.items()}
    numbers = {split: tokenise(f"tokenise {name} {split}", tokenizer, rows) for split, rows in texts.items()}
    every = np.array([len(row) for rows in numbers.values() for row in rows])
    length = fitting_length(every, longest)
    cut = int((every > length).sum())
    print(f"task {name}: {len(every):,} texts of at most {every.max()} tokens, {length} kept, "
          f"{cut:,} texts cut ({cut / len(every):.2%})", flush=True)
    make_room(folder.parent, 4 * length * len(every), f"tokens of task {name}")
    tokenizer.enable_truncation(length)
    stored = {}
    for split, rows in numbers.items():
        stored[split] = new_array(folder / f"{split}_inputs.npy", (len(rows), length), np.int32)
        for index, row in enumerate(rows):
            if len(row) > length:
                row = tokenizer.encode(*texts[split][index]).ids
            stored[split][index, :len(row)] = row
            stored[split][index, len(row):] = pad
        stored[split].flush()
    tokenizer.no_truncation()
    return stored


def fitting_length(lengths, longest):
    """The smallest of LENGTHS, up to `longest`, that holds all but CUT of texts of these lengths (N,)."""
    allowed = sorted({length for length in LENGTHS if length < longest} | {min(longest, LENGTHS[-1])})
    for length in allowed:
        if (lengths > length).mean() <= CUT:
            return length
    return allowed[-1]


def written(name, split, pairs, prompted):
    """[(text,) or (text, text)] as the tokenizer gets them; Refused where one is empty."""
    texts = []
    for index, pair in enumerate(pairs):
        if not all(text and text.strip() for text in pair):
            raise Refused(f"task {name}: text {index} of split {split} is empty: leave its row out")
        if prompted:
            pair = (PROMPTS.get(name, GENERAL_PROMPTS[len(pair)]).format(*pair),)
        texts.append(pair)
    return texts


def tokenise(label, tokenizer, texts):
    """[(length,) int32] of texts, of any lengths."""
    numbers = []
    with progress(len(texts), label, "text") as bar:
        for start in range(0, len(texts), BLOCK):
            block = texts[start:start + BLOCK]
            block = [text if len(text) == 2 else text[0] for text in block]
            numbers += [np.array(found.ids, np.int32) for found in tokenizer.encode_batch(block)]
            bar.update(len(block))
    return numbers


# --------------------------------------------------------------------------------------- label words


def label_words(name, classes):
    """[the word that answers for each class] of a task: LABEL_WORDS, else the class's own name or number."""
    known = LABEL_WORDS.get(name, {})
    return [known.get(each, str(each).replace("_", " ")) for each in classes]


def label_tokens(name, classes, tokenizer):
    """(C,) the first token of each class's word.

    Errors  Refused: two words that begin with the same token
    """
    words, first = label_words(name, classes), {}
    for word in words:
        token = tokenizer.encode(word, add_special_tokens=False).ids[0]
        if token in first:
            raise Refused(f"task {name}: label words {first[token]!r} and {word!r} begin with the same token "
                          f"({tokenizer.id_to_token(token)!r}), so that no first answer tells them apart: "
                          f"name the classes otherwise, or take a recipe on probed heads")
        first[token] = word
    return list(first)
