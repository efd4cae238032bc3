"""
Texts: their columns found, tokenised once into int32 arrays of one fixed length a task.

A model that answers (T5) reads a text inside the prompt of its task, any other the text, or the pair, itself.
Shapes: N texts, L tokens as stored, C classes.
"""
import json

import numpy as np

from lib.devices import make_room
from lib.files import Refused, new_array
from lib.progress import progress

# our own, where --prompts FILE says no other; what is asked comes first, so that it is never cut
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



def read_prompts(path=None):
    """{"prompts": {task: prompt}, "words": {task: {class: word}}}: ours, but for what a JSON file says.

    The file is {TASK: {"prompt": "Is this good? {}", "words": {CLASS: WORD}}}; either may be left out.
    Errors   Refused: a file that is not such
    """
    prompts, words = dict(PROMPTS), dict(LABEL_WORDS)
    try:
        asked = json.loads(path.read_text()) if path else {}
        for task, row in asked.items():
            if not set(row) <= {"prompt", "words"}:
                raise ValueError(f"{task} has {', '.join(row)}")
            if "prompt" in row:
                row["prompt"].format("", "")
                prompts[task] = row["prompt"]
            if "words" in row:
                words[task] = dict(row["words"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Refused(f'--prompts {path} is not as {{"sst2": {{"prompt": "Is this good? {{}}", "words": '
                      f'{{"negative": "no", "positive": "yes"}}}}}} ({error})') from error
    return {"prompts": prompts, "words": words}


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


def store(name, encoded, tokenizer, pad, longest, prompts, folder):
    """Tokenise the cells {"train", "test"} of a task into folder/SPLIT_inputs.npy, all of one length.

    tokenizer   tokenizers.Tokenizer
    pad         the number that fills up
    longest     tokens that the model takes at most
    prompts     {task: prompt} for the texts to stand in; None: they stand alone
    The length is the smallest of LENGTHS, up to `longest`, that cuts no more than CUT of the texts.
    Returns  {split: (N, L) int32, memory-mapped}
    Errors   Refused: an empty text, named with its index; a prompt for another number of texts; a full disk
    """
    texts = {split: written(name, split, pairs, prompts) for split, pairs in encoded.items()}
    numbers = {split: tokenise(f"tokenise {name} {split}", tokenizer, rows) for split, rows in texts.items()}
    every = np.array([len(row) for rows in numbers.values() for row in rows])
    length = fitting_length(every, longest)
    cut = int((every > length).sum())
    asked = f", asked as {prompts.get(name, 'they are')!r}" if prompts else ""
    print(f"task {name}: {len(every):,} texts of at most {every.max()} tokens, {length} kept, "
          f"{cut:,} texts cut ({cut / len(every):.2%}){asked}", flush=True)
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


def written(name, split, pairs, prompts):
    """[(text,) or (text, text)] as the tokenizer gets them; Refused where one is empty."""
    texts, count = [], len(pairs[0])
    prompt = (prompts or {}).get(name, GENERAL_PROMPTS[count])
    if prompt.count("{}") != count:
        raise Refused(f"task {name}: its prompt {prompt!r} has not {count} times {{}}, "
                      f"for the texts of a row")
    for index, pair in enumerate(pairs):
        if not all(text and text.strip() for text in pair):
            raise Refused(f"task {name}: text {index} of split {split} is empty: leave its row out")
        texts.append(pair if prompts is None else (prompt.format(*pair),))
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


def label_words(name, classes, words):
    """[the word that answers for each class] of a task: {task: {class: word}}, else the class's own name."""
    known = words.get(name, {})
    return [known.get(each, str(each).replace("_", " ")) for each in classes]


def label_tokens(name, classes, words, tokenizer):
    """(C,) the first token of each class's word.

    Errors  Refused: two words that begin with the same token
    """
    first = {}
    for word in label_words(name, classes, words):
        token = tokenizer.encode(word, add_special_tokens=False).ids[0]
        if token in first:
            raise Refused(f"task {name}: label words {first[token]!r} and {word!r} begin with the same token "
                          f"({tokenizer.id_to_token(token)!r}), so that no first answer tells them apart: "
                          f"give others by --prompts, or take a recipe on probed heads")
        first[token] = word
    return list(first)
