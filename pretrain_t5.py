"""
Pre-train a small T5 from scratch, where there is no hub: it fills in gaps and, as Flan-T5, answers prompts.

    python pretrain_t5.py runs/small-t5 --data DIR --tasks cola,sst2,mrpc,rte,stsb,qqp
    python probe.py transformers:small/t5 --weights runs/small-t5 --data DIR --tasks cola,sst2,mrpc
    python finetune.py transformers:small/t5 --recipe zeroshot

Half of each batch are texts of the tasks with spans left out, which the decoder has to say; half are prompts
of lib/texts.py, which it has to answer by the label's word. All are of train without its validation part.
What is written is a checkpoint as transformers writes them, with a tokenizer made of the same texts.

Writes  FOLDER/config.json, model.safetensors, tokenizer.json, tokenizer_config.json, pretrain_t5.json; while
        it trains FOLDER/state, from which the same command goes on
Source  arXiv:1910.10683 (T5, span corruption); arXiv:2210.11416 (Flan-T5, prompts)
"""
import itertools
import time
from pathlib import Path

import numpy as np
import torch

import common
from lib import flags, language, texts
from lib.devices import pick_device
from lib.files import Refused, load_state, read_json, save_state, write_json
from lib.progress import progress
from lib.reading import read_dataset
from lib.results import provenance
from lib.study import run
from lib.training import learning_rate

SHAPE = {"d_model": 128, "d_kv": 32, "d_ff": 384, "num_heads": 4, "num_layers": 4, "num_decoder_layers": 2,
         "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}
VOCABULARY, SENTINELS = 8000, 20
LONGEST = 128                                               # tokens read, of a longer text the first
LEFT_OUT, SPAN = 0.15, 3                                    # share of a text's tokens, mean length of a gap
PART = 16                                                   # texts filled up to one length, of a batch
CLIP_NORM, WEIGHT_DECAY = 1.0, 0.01
SAVE_EVERY, SAY_EVERY = 250, 100                            # steps


def parse_args(argv=None):
    parser = flags.flag_parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="where the checkpoint goes")
    add("--tasks", required=True, help="comma-separated, as in probe.py")
    add("--data", type=flags.folder, help="folder of data sets; DIR/NAME is looked for before the hub")
    add("--prompts", type=Path, metavar="FILE", help="as in probe.py")
    add("--steps", type=flags.positive, default=3000, help="optimizer steps (default 3000)")
    add("--batch-size", type=flags.positive, default=32,
        help="texts, and as many prompts, a step (default 32)")
    add("--lr", type=flags.positive_float, default=1e-3, help="peak learning rate (default 1e-3)")
    add("--seed", type=flags.natural, default=0, help="of everything random (default 0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
    return parser.parse_args(argv)


def main(args):
    # ---------------------------------------------------- open
    import transformers
    settings = {key: str(value) for key, value in vars(args).items()}
    device, asked = pick_device(args.device), texts.read_prompts(args.prompts)
    if (args.folder / "model.safetensors").exists():
        made = read_json(args.folder / "pretrain_t5.json", "python pretrain_t5.py")["config"]
        if made != settings:
            raise Refused(f"{args.folder} was made with other settings: give another folder")
        print(f"pretrain_t5: {args.folder} is there already")
        return
    args.folder.mkdir(parents=True, exist_ok=True)

    # ---------------------------------------------------- texts and prompts, a tokenizer made of them
    plain, prompted = [], []                                # [text], [(prompt, word)]
    for name, source in common.task_sources(args.tasks, args.data).items():
        cells, labels, classes = read_dataset(name, source, common.REGISTERED.get(name), language.TextEncoder)
        rows, _ = common.validation_split(len(labels["train"]))
        cells, words = [cells["train"][row] for row in rows], texts.label_words(name, classes, asked["words"])
        plain += itertools.chain(*cells)
        prompts = texts.written(name, "train", cells, asked["prompts"])
        prompted += [(prompt, words[label])
                     for (prompt,), label in zip(prompts, labels["train"][rows], strict=True)]
    tokenizer = make_tokenizer(itertools.chain(plain, *prompted))
    tokenizer.enable_truncation(LONGEST)                    # </s> stays where a prompt is cut
    gapped = [row.ids for row in tokenizer.encode_batch(plain, add_special_tokens=False)]
    gapped = [row for row in gapped if len(row) > 3]
    prompts, words = zip(*prompted, strict=True)
    read = [row.ids for row in tokenizer.encode_batch(prompts)]
    said = [row.ids for row in tokenizer.encode_batch(words)]
    tokenizer.no_truncation()
    print(f"pretrain_t5: {len(gapped):,} texts and {len(read):,} prompts, "
          f"{tokenizer.get_vocab_size():,} kinds of tokens", flush=True)

    # ---------------------------------------------------- AdamW, warm-up, cosine to 0
    torch.manual_seed(args.seed)
    config = transformers.T5Config(vocab_size=tokenizer.get_vocab_size(), pad_token_id=0, eos_token_id=1,
                                   decoder_start_token_id=0, **SHAPE)
    model = transformers.T5ForConditionalGeneration(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=WEIGHT_DECAY, fused=True)
    path, begin, losses = args.folder / "state", 0, []
    if path.exists():
        state = load_state(path)
        if state["settings"] != settings:
            raise Refused(f"{path} is of a training with other settings: delete it, or give another folder")
        begin, losses = state["step"], state["losses"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    start = time.perf_counter()
    with progress(args.steps, "pretrain_t5", "step") as bar:
        bar.update(begin)
        for step in range(begin, args.steps):
            rng = np.random.default_rng([args.seed, step])
            pairs = [with_gaps(gapped[row], rng) for row in rng.integers(len(gapped), size=args.batch_size)]
            pairs += [(read[row], said[row]) for row in rng.integers(len(read), size=args.batch_size)]
            loss = backward(model, pairs, PART, device)
            optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr)
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
            bar.update(1)
            if (step + 1) % SAY_EVERY == 0:
                losses.append(loss.item())
                bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
            if (step + 1) % SAVE_EVERY == 0 and step + 1 < args.steps:
                save_state(path, {"settings": settings, "step": step + 1, "losses": losses,
                                  "model": model.state_dict(), "optimizer": optimizer.state_dict()})

    # ---------------------------------------------------- save, say
    kept = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>",
                                                eos_token="</s>", unk_token="<unk>")
    kept.save_pretrained(args.folder)
    write_json(args.folder / "pretrain_t5.json", {"config": settings, "losses": losses,
                                                  "texts": len(gapped), "prompts": len(read),
                                                  **provenance(device)})
    model.save_pretrained(args.folder)
    path.unlink(missing_ok=True)
    print(f"pretrain_t5: {args.steps} steps of {args.batch_size} + {args.batch_size}, loss "
          f"{loss.item():.2f}, {time.perf_counter() - start:.0f} s: {args.folder}")


def backward(model, pairs, size, device):
    """Mean loss over all tokens said in a batch [(what is read, what is said)], its gradient added up.

    size  texts that go through the model at a time, those of like length together
    """
    pairs = sorted(pairs, key=lambda pair: len(pair[0]))
    tokens, loss = sum(len(said) for _, said in pairs), 0.0
    for first in range(0, len(pairs), size):
        inputs, labels = (filled_up(rows, device) for rows in zip(*pairs[first:first + size]))
        labels = labels.masked_fill(labels == 0, -100)
        part = model(input_ids=inputs, attention_mask=inputs != 0, labels=labels).loss
        part = part * (labels != -100).sum() / tokens
        part.backward()
        loss += part.detach()
    return loss


def make_tokenizer(lines):
    """A tokenizer with T5's special tokens: <pad> 0, </s> 1, <unk> 2, <extra_id_N> behind them.

    Of byte pairs: T5's own kind, a unigram model, comes out otherwise each time.
    """
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{number}>" for number in range(SENTINELS))]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def with_gaps(tokens, rng):
    """(what is read, what is said): spans of a text's tokens replaced by a sentinel each, and they behind it.

    As T5 does it: LEFT_OUT of the tokens, in spans of SPAN on average, a text begins with what stays.
    """
    left_out = max(1, round(LEFT_OUT * len(tokens)))
    spans = min(max(1, round(left_out / SPAN)), len(tokens) - left_out, SENTINELS)
    read, said, at = [], [], 0
    for number, (stays, goes) in enumerate(zip(parts(len(tokens) - left_out, spans, rng),
                                               parts(left_out, spans, rng), strict=True)):
        sentinel, gap = 3 + number, at + stays
        read += [*tokens[at:gap], sentinel]
        said += [sentinel, *tokens[gap:gap + goes]]
        at = gap + goes
    return [*read, *tokens[at:], 1], [*said, 1]


def parts(n, count, rng):
    """`count` random whole numbers of 1 and more that add up to n."""
    cuts = np.sort(rng.choice(np.arange(1, n), count - 1, replace=False)) if count > 1 else []
    return np.diff([0, *cuts, n])


def filled_up(rows, device):
    """(B, L) int64 tokens of lists of them, filled up with 0."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


if __name__ == "__main__":
    run(main, parse_args)
