"""Encoders of texts against transformers' own forward pass, and texts through every stage."""
import copy
import json
import shutil
from unittest import mock

import common
import datasets
import finetune
import numpy as np
import pretrain_t5
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import edit, perform, refuse
from safetensors.torch import load_file
from small_language import save_model, sentences, small_bert_folder, word_tokenizer

from lib import encoders, files, flags, language, linearized, text_heads, texts
from lib.parameters import choose_parameters

CPU = torch.device("cpu")
BERT, T5 = "transformers:tiny/bert", "transformers:tiny/t5"


def write_task(folder, longest, pair=(), classes=("negative", "positive"), n=(60, 40)):
    """Parquet files of a task: is a word "good" among the words, of a pair in the first text?"""
    for split, size in zip(("train", "test"), n, strict=True):
        columns = {}
        for seed, column in enumerate(pair or ("sentence",)):
            columns[column] = sentences(size, longest, 2 * seed + (split == "test"))
        first = next(iter(columns.values()))
        columns["label"] = [int("good" in text.split()) for text in first]
        kinds = {column: datasets.Value("string") for column in columns}
        features = datasets.Features(kinds | {"label": datasets.ClassLabel(names=list(classes))})
        write_rows(folder, split, columns, features)
    return folder


def write_rows(folder, split, columns, features=None):
    folder.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_dict(columns, features=features)
    rows.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Folder of a BERT with random weights."""
    return small_bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module", params=["flan", "v1.0"])
def t5(request, tmp_path_factory):
    """Folder of a T5 with random weights: with a head of its own, or its embedding rescaled."""
    template = {"single": "$A </s>", "pair": "$A </s> $B </s>"}
    tokenizer = word_tokenizer(["<pad>", "</s>", "<unk>"], template)
    torch.manual_seed(0)
    flan = request.param == "flan"
    config = transformers.T5Config(vocab_size=tokenizer.get_vocab_size(), d_model=32, d_kv=8, d_ff=48,
                                   num_layers=2, num_heads=4, decoder_start_token_id=0,
                                   initializer_factor=3.0,
                                   feed_forward_proj="gated-gelu" if flan else "relu",
                                   tie_word_embeddings=not flan)
    model = transformers.T5ForConditionalGeneration(config)
    if flan:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, 32))
    folder = save_model(tmp_path_factory.mktemp("t5"), model, tokenizer, pad_token="<pad>", eos_token="</s>",
                        unk_token="<unk>")
    said = json.loads((folder / "config.json").read_text())
    said.pop("scale_decoder_outputs")
    (folder / "config.json").write_text(json.dumps(said | {"tie_word_embeddings": not flan}))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder of three tasks whose texts are of different lengths."""
    folder = tmp_path_factory.mktemp("data")
    write_task(folder / "short", 6)
    write_task(folder / "sst2", 24)
    write_task(folder / "rte", 20, ("sentence1", "sentence2"), ("entailment", "not_entailment"))
    return folder


@pytest.fixture(scope="module")
def small_bert(bert, tmp_path_factory):
    """Its TextEncoder."""
    return encoders.load_encoder(BERT, tmp_path_factory.mktemp("small"), bert)


def load_tasks(encoder, data, runs):
    names = "short", "sst2", "rte"
    return {name: common.load_task(name, str(data / name), encoder, runs) for name in names}


def texts_of(data, name, split="test"):
    """[(text,) or (text, text)] as they lie in a task's files."""
    rows = datasets.load_dataset(str(data / name), split=split)
    return texts.cells(rows, texts.input_columns(rows.features))


def stored(task, split="test"):
    split = task.splits[split]
    return torch.from_numpy(np.array(split.inputs[split.indices]))


# --------------------------------------------------------------------------------------- the feature


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_a_berts_feature_is_transformers_own(bert, data, tmp_path, pooling):
    """Of sentences and pairs, with their types; dropout is off where transformers would have it on."""
    folder = shutil.copytree(bert, tmp_path / "model")
    if pooling == "mean":
        (folder / "1_Pooling").mkdir()
        said = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False,
                "pooling_mode_mean_tokens": True}
        (folder / "1_Pooling/config.json").write_text(json.dumps(said))
    encoder = encoders.load_encoder(BERT, tmp_path, folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert not any("pooler" in name for name in encoders.weights_of(encoder.module))
    for name, task in load_tasks(encoder, data, tmp_path).items():
        given = texts_of(data, name)
        theirs = tokenizer(*map(list, zip(*given, strict=True)), padding=True, return_tensors="pt",
                           return_token_type_ids=True)
        assert theirs["token_type_ids"].max() == (name == "rte")
        with torch.no_grad():
            states = model(**theirs).last_hidden_state
            ours = encoder.module.train()(stored(task))
        mask = theirs["attention_mask"][..., None]
        expected = states[:, 0] if pooling == "first" else (states * mask).sum(1) / mask.sum(1)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert ours.std(0).mean() > 0.05                   # texts are told apart


@pytest.mark.parametrize("kind, pad", [("roberta", 1), ("mpnet", 1), ("modernbert", 0)])
def test_other_families_features_are_transformers_own(kind, pad):
    """Also of texts longer than what local attention sees."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        vocab_size=100, pad_token_id=pad, initializer_range=0.5)
    model = transformers.AutoModel.from_config(language.without_dropout(config)).eval()
    tokens = torch.randint(4, 90, (3, 300))
    tokens[0, 250:] = pad
    mask = (tokens != pad).long()
    with torch.no_grad():
        states = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        module = language.as_module(model, {"name": kind, "pad": pad, "separator": None, "pooling": "mean"})
        ours = module.eval()(tokens.int())
    expected = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_a_t5s_logits_and_answers_are_transformers_own(t5, data, tmp_path):
    encoder = encoders.load_encoder(T5, tmp_path, t5)
    model = transformers.T5ForConditionalGeneration.from_pretrained(t5).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(t5)
    assert not any("lm_head" in name for name in encoders.weights_of(encoder.module))
    head_of = text_heads.maker(encoder, None, tmp_path / "transformers_tiny_t5", CPU)
    many = "film book good bad dull bright very not".split()
    write_task(tmp_path / "many", 20, classes=many)
    for name, where, words in (("sst2", data, ["negative", "positive"]), ("rte", data, ["yes", "no"]),
                               ("many", tmp_path, many)):
        task = common.load_task(name, str(where / name), encoder, tmp_path)
        head = head_of(task)
        prompts = [texts.PROMPTS.get(name, "{}").format(*pair) for pair in texts_of(where, name)]
        theirs = tokenizer(prompts, padding=True, truncation=True, max_length=stored(task).shape[1],
                           return_tensors="pt", return_token_type_ids=False)
        first = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
        with torch.no_grad():
            logits = model(**theirs, decoder_input_ids=torch.zeros(len(prompts), 1, dtype=torch.long)).logits
            ours = encoder.module(stored(task))
        torch.testing.assert_close(common.logits(ours, head), logits[:, 0, first], rtol=1e-3, atol=1e-4)
        said = model.generate(**theirs, max_new_tokens=1, do_sample=False, num_beams=1,
                              prefix_allowed_tokens_fn=lambda *_: first)
        answers = [first.index(token) for token in said[:, 1].tolist()]
        assert common.predict(ours, head).tolist() == answers
    assert len(set(answers)) > 1                           # of many words


def test_what_a_text_is_filled_up_with_changes_nothing(small_bert, t5, data, tmp_path):
    encoder = encoders.load_encoder(T5, tmp_path, t5)
    for one in (small_bert, encoder):
        tokens = stored(common.load_task("rte", str(data / "rte"), one, tmp_path))
        longest = int((tokens > 0).sum(1).max())
        assert longest < tokens.shape[1]
        with torch.no_grad():
            bare = one.module(tokens[:, :longest])
            torch.testing.assert_close(bare, one.module(tokens), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [64, 5])
def test_a_step_goes_through_in_parts_of_like_length(small_bert, data, tmp_path, size):
    """Every text once, with its label, and the gradient is the whole step's."""
    task = common.load_task("rte", str(data / "rte"), small_bert, tmp_path)
    tokens = stored(task)[:30]
    labels, module = torch.arange(30) % small_bert.width, copy.deepcopy(small_bert.module)
    F.cross_entropy(module(tokens), labels).backward()
    whole = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    parts = list(small_bert.training_parts(tokens, labels, size, torch.Generator()))
    for part, answers in parts:
        (F.cross_entropy(module(part), answers) * len(part) / 30).backward()
        longest = (part != small_bert.description["architecture"]["pad"]).sum(1).max()
        assert longest <= part.shape[1] <= longest + 7 and len(part) <= min(size, 8)
    assert sorted(answer for _, answers in parts for answer in answers.tolist()) == labels.sort()[0].tolist()
    assert sum(part.numel() for part, _ in parts) < .6 * tokens.numel()
    for gradient, parameter in zip(whole, module.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


# --------------------------------------------------------------------------------------- the evaluator


@pytest.mark.parametrize("linear", [False, True])
def test_tasks_of_different_lengths_in_one_call_are_as_one_at_a_time(small_bert, data, tmp_path, linear):
    tasks = load_tasks(small_bert, data, tmp_path)
    splits = [tasks[name].splits[split] for name in tasks for split in ("test", "val")]
    assert len({split.inputs.shape[1] for split in splits}) == 3
    generator = torch.Generator().manual_seed(0)
    vector = {name: 0.1 * torch.randn(tensor.shape, generator=generator)
              for name, tensor in encoders.weights_of(small_bert.module).items()}
    heads = [common.random_head(32, 2, generator) for _ in splits]
    kind = linearized.LinearizedEvaluator if linear else common.Evaluator
    evaluator = kind(small_bert, CPU, torch.float32)
    settings = [(0.0,), (0.5,), (1.0,)]
    evaluator.use_vectors([vector])
    together = evaluator.features(splits, settings)
    counted = evaluator.hits(splits, heads, settings)
    for split, head, features, hits in zip(splits, heads, together, counted, strict=True):
        evaluator.use_vectors([vector])
        assert evaluator.hits([split], [head], settings) == [hits]
        torch.testing.assert_close(evaluator.features([split], settings)[0], features)
    assert any(len(set(hits)) > 1 for hits in counted)


def test_texts_are_evaluated_at_the_shortest_length_that_holds_them(small_bert, data, tmp_path):
    for task in load_tasks(small_bert, data, tmp_path).values():
        split = task.splits["val"]
        whole = split.inputs[split.indices]
        real, seen = (whole > 0).sum(1), []
        for rows, inputs in small_bert.parts(split):
            cut = inputs[split.indices[rows]]
            shorter = max([length for length in texts.LENGTHS if length < cut.shape[1]], default=0)
            assert ((shorter < real[rows]) & (real[rows] <= cut.shape[1])).all()
            assert np.array_equal(cut, whole[rows, :cut.shape[1]])
            seen += rows.tolist()
        assert sorted(seen) == list(range(len(split)))
        evaluator = common.Evaluator(small_bert, CPU, torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(evaluator.features([split])[0][0],
                                       small_bert.module(torch.from_numpy(whole)), rtol=1e-4, atol=1e-5)


def test_a_graph_is_compiled_for_each_length(small_bert, data, tmp_path, monkeypatch):
    """One whole graph each, of which the example's is one; what is compiled is what is eager."""
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(common, "compile_module",
                        lambda module: torch.compile(module, dynamic=False, fullgraph=True, backend=backend))
    tasks = load_tasks(small_bert, data, tmp_path)
    splits = [tasks[name].splits["test"] for name in ("short", "rte")]
    compiled = common.Evaluator(small_bert, CPU, torch.float32, compile=True)
    assert compiled.compile_now(splits[0].inputs.shape[1:]) == "" and len(graphs) == 1
    found = compiled.features(splits)
    lengths = {inputs.shape[1] for split in splits for _, inputs in small_bert.parts(split)}
    assert len(graphs) == len(lengths) and lengths >= {16, 32, 60}
    eager = common.Evaluator(small_bert, CPU, torch.float32).features(splits)
    for ours, theirs in zip(found, eager, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_expansion_is_the_derivative(small_bert, t5, tmp_path):
    """Forward mode against reverse mode: v (J tau) = (v J) tau for any v."""
    for encoder in (small_bert, encoders.load_encoder(T5, tmp_path, t5)):
        module, generator = encoder.module, torch.Generator().manual_seed(1)
        theta = {name: tensor.clone() for name, tensor in encoders.weights_of(module).items()}
        tau = {name: 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in theta.items()}
        tokens = torch.randint(3, 20, (4, 12), generator=generator)
        tokens[1, 7:] = tokens[2, 3:] = 0
        features, back = torch.func.vjp(
            lambda weights: torch.func.functional_call(module, weights, (tokens,)), theta)
        value, tangent = linearized.expand(module, theta, tau, tokens)
        torch.testing.assert_close(value, features, rtol=1e-4, atol=1e-5)
        for _ in range(5):
            v = torch.randn(tangent.shape, generator=generator)
            gradients = back(v)[0]
            expected = sum((gradients[name] * tau[name]).sum() for name in tau)
            torch.testing.assert_close((v * tangent).sum(), expected, rtol=1e-3, atol=1e-3)
        assert tangent.abs().max() > 0.1


# --------------------------------------------------------------------------------------- what trains


def trained(module, name):
    recipe = finetune.RECIPES[name]
    return choose_parameters(module, recipe.trained, name)


def test_flan_t5_base_has_the_papers_numbers_of_parameters():
    config = transformers.T5Config(vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_layers=12,
                                   num_heads=12, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    architecture = {"library": "transformers", "name": "t5", "config": language.plain(config), "pad": 0,
                    "start": 0, "scale": 1.0}
    with torch.device("meta"):
        module = encoders.build_architecture(architecture)
    assert trained(module, "zeroshot") == 222_903_552
    assert trained(module, "attention-zeroshot") == 84_934_656
    assert trained(module, "attention-qkv-zeroshot") == 63_700_992
    assert trained(module, "attention-mlp-zeroshot") == 84_934_656 + 24 * 3 * 768 * 2048
    assert sum(parameter.numel() for parameter in module.parameters()) == 222_903_552
    assert sum(tensor.numel() for tensor in encoders.weights_of(module).values()) == 222_903_552


@pytest.mark.parametrize("kind, sizes", [
    ("bert", ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")),
    ("roberta", ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")),
    ("electra", ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")),
    ("mpnet", ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")),
    ("deberta-v2", ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")),
    ("distilbert", ("dim", "n_layers", "n_heads", "hidden_dim")),
])
def test_attention_recipes_find_the_matrices_of_every_family(kind, sizes):
    config = transformers.AutoConfig.for_model(kind, **dict(zip(sizes, (32, 3, 2, 48), strict=True)))
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert trained(model, "attention") == 3 * 4 * 32 * 32
    assert trained(model, "attention-qkv") == 3 * 3 * 32 * 32
    assert trained(model, "attention-bias") == 3 * 4 * (32 * 32 + 32 * (kind != "t5"))
    assert trained(model, "attention-mlp") == 3 * (4 * 32 * 32 + 2 * 32 * 48)


# --------------------------------------------------------------------------------------- the stages


def test_texts_go_through_every_stage(bert, data, tmp_path):
    """None of which needs --weights or --data once the one before has run."""
    runs, tasks = tmp_path / "runs", ["--tasks", "short,sst2,rte"]
    shared = [BERT, "--runs", runs, "--dtype", "fp32", "--compile", "off"]
    perform("probe", *shared, *tasks, "--weights", bert, "--data", data, "--probe-steps", "20")
    for name in ("aligned", "attention-qkv", "linearized"):
        variant = [*shared, "--name", name]
        perform("finetune", *variant, "--steps", "4", "--batch-size", "16", "--lr", "1e-2")
        perform("make_vectors", *variant)
    for name in ("aligned", "linearized"):
        perform("merge_eval", *shared, "--name", name, "--lambdas", "3")
    perform("disentangle", *shared, "--points", "3", "--samples", "20")
    here = runs / "transformers_tiny_bert"
    merged = json.loads((here / "aligned/merge.json").read_text())
    assert merged["test"]["n"] == {"short": 40, "sst2": 40, "rte": 40}
    assert "image_size" not in merged["config"] and merged["config"]["longest_text"] == 60
    layers = json.loads((here / "aligned/vectors.json").read_text())["relative_norm_per_layer"]["sst2"]
    assert set(layers) == {"model.embeddings", "model.encoder.layer.0", "model.encoder.layer.1"}
    moved = files.load_tensors(here / "attention-qkv/vectors/rte.safetensors", "")[0]
    assert len(moved) == 2 * 3 and not any("output" in name for name in moved)
    perform("report", "--runs", runs)
    report = (runs / "report/report.md").read_text()
    assert "of the 120 test texts right" in report and f"transformers {transformers.__version__}" in report
    table = report[report.index("## Texts (arXiv:2407.07089 Table 3"):]
    assert "| paper, Flan-T5-base | attention-qkv | addition |" in table


@pytest.mark.parametrize("t5", ["flan"], indirect=True)
def test_a_t5_trains_against_its_own_words(t5, data, tmp_path):
    shared = [T5, "--runs", tmp_path, "--dtype", "fp32", "--compile", "off", "--name", "zeroshot"]
    perform("finetune", *shared, "--tasks", "sst2,rte", "--weights", t5, "--data", data, "--steps", "4",
            "--batch-size", "16", "--lr", "1e-3")
    rows = json.loads((tmp_path / "transformers_tiny_t5/zeroshot/finetune.json").read_text())["tasks"]
    assert set(rows) == {"sst2", "rte"} and all(0 <= row["zero_shot"] <= 1 for row in rows.values())
    perform("make_vectors", *shared)


def test_what_a_gap_left_out_is_what_is_said():
    rng = np.random.default_rng(0)
    for n in (4, 5, 12, 60, 128):
        tokens = list(range(100, 100 + n))
        read, said = pretrain_t5.with_gaps(tokens, rng)
        assert read[-1] == said[-1] == 1 and read[0] == 100 and said[0] == 3
        gaps, whole = {}, []
        for token in said[:-1]:
            if token < 100:                                # a sentinel, they count upwards
                gaps[token] = []
            else:
                gaps[max(gaps)].append(token)
        for token in read[:-1]:
            whole += gaps[token] if token < 100 else [token]
        assert whole == tokens and len(gaps) == max(1, round(0.05 * n))
        assert sum(map(len, gaps.values())) == max(1, round(0.15 * n))


def test_a_batch_in_parts_has_the_gradient_of_the_whole_batch():
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, num_heads=2, d_ff=24, num_layers=1,
                                   num_decoder_layers=1, pad_token_id=0, eos_token_id=1,
                                   decoder_start_token_id=0)
    model, rng = transformers.T5ForConditionalGeneration(config).eval(), np.random.default_rng(0)
    pairs = [(rng.integers(3, 40, n).tolist(), rng.integers(3, 40, m).tolist())
             for n, m in rng.integers(1, 12, (10, 2))]
    found = []
    for size in (3, 10):
        model.zero_grad()
        loss = pretrain_t5.backward(model, pairs, size, "cpu")
        found.append([loss, *(parameter.grad.clone() for parameter in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert found[0][1].abs().max() > 1e-3


def test_a_prompt_that_is_cut_keeps_its_end():
    tokenizer = pretrain_t5.make_tokenizer(["good words are read here"] * 20)
    tokenizer.enable_truncation(6)
    tokens = tokenizer.encode("good words are read " * 9).ids
    assert len(tokens) == 6 and tokens[-1] == 1 and 1 not in tokens[:-1]


def test_a_t5_made_here_goes_through_zeroshot(data, tmp_path, monkeypatch):
    """A stopped training goes on to the same weights; what is written is a T5's checkpoint."""
    monkeypatch.setattr(pretrain_t5, "VOCABULARY", 150)
    monkeypatch.setattr(pretrain_t5, "SAVE_EVERY", 2)
    given = ["--tasks", "sst2,rte", "--data", data, "--steps", "4", "--batch-size", "4"]
    perform("pretrain_t5", tmp_path / "whole", *given)
    real = pretrain_t5.with_gaps
    calls = []

    def stops(*words):
        calls.append(words)
        if len(calls) > 3 * 4:
            raise KeyboardInterrupt
        return real(*words)

    monkeypatch.setattr(pretrain_t5, "with_gaps", stops)
    with pytest.raises(KeyboardInterrupt):
        perform("pretrain_t5", tmp_path / "stopped", *given)
    monkeypatch.setattr(pretrain_t5, "with_gaps", real)
    with monkeypatch.context() as patch:                   # and behind its last step
        patch.setattr(pretrain_t5, "write_json", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            perform("pretrain_t5", tmp_path / "stopped", *given)
    perform("pretrain_t5", tmp_path / "stopped", *given)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not (tmp_path / "stopped/state").exists()
    said = refuse("pretrain_t5", tmp_path / "whole", *given[:-1], "8")
    assert "was made with other settings" in said
    shared = ["transformers:small/t5", "--runs", tmp_path / "runs", "--dtype", "fp32", "--compile", "off"]
    perform("finetune", *shared, "--recipe", "zeroshot", *given[:4], "--weights", tmp_path / "whole",
            "--steps", "2", "--lr", "1e-3")


# --------------------------------------------------------------------------------------- inputs


def test_texts_are_of_the_shortest_length_that_holds_all_but_a_hundredth(small_bert, data, tmp_path, capsys):
    tasks = load_tasks(small_bert, data, tmp_path)
    assert {name: task.splits["test"].inputs.shape[1] for name, task in tasks.items()} == {
        "short": 16, "sst2": 32, "rte": 60}
    lengths = np.array([5] * 98 + [20] * 2)
    assert texts.fitting_length(lengths, 512) == 32 and texts.fitting_length(lengths[:-1], 512) == 32
    assert texts.fitting_length(np.append(lengths, [5] * 100), 512) == 16
    write_task(tmp_path / "long", 200)
    capsys.readouterr()
    tokens = stored(common.load_task("long", str(tmp_path / "long"), small_bert, tmp_path))
    assert tokens.shape == (40, 60) and "texts cut (" in capsys.readouterr().out
    assert (tokens.amax(1) < 200).all() and ((tokens == 2).sum(1) == 1).all()    # [SEP] ends what is cut, too


def test_scores_of_stsb_become_six_classes(small_bert, tmp_path):
    scores = [0.0, 0.4, 0.5, 1.5, 2.5, 3.2, 4.0, 4.49, 4.5, 5.0]
    for split in ("train", "test"):
        words = sentences(10, 5, 0)
        write_rows(tmp_path / "stsb", split, {"sentence1": words, "sentence2": words, "label": scores})
    task = common.load_task("stsb", str(tmp_path / "stsb"), small_bert, tmp_path)
    assert task.classes == [0, 1, 2, 3, 4, 5]
    assert task.splits["test"].labels.tolist() == [0, 0, 1, 2, 3, 3, 4, 4, 5, 5]


def test_what_looks_like_a_special_token_is_text(small_bert):
    numbers = texts.tokenise("", small_bert.tokenizer, [("good [PAD] film [SEP] bad",)])[0].tolist()
    assert numbers[0] == 1 and numbers[-1] == 2 and not {0, 2} & set(numbers[:-1])


# --------------------------------------------------------------------------------------- bad input


def small_task(folder, **columns):
    """A task of twelve rows a split, with these columns in place of what it would have."""
    rows = {"sentence": sentences(12, 5, 0), "label": [0, 1] * 6} | columns
    for split in ("train", "test"):
        write_rows(folder, split, {name: values for name, values in rows.items() if values is not None})
    return folder


def test_help_shows_the_prompts():
    said = flags.stage_parser("").format_help()
    assert all(prompt in said for prompt in texts.PROMPTS.values())


def test_bad_texts_are_refused_in_one_line(bert, tmp_path):
    def refused(name):
        return refuse("probe", BERT, "--weights", bert, "--runs", tmp_path / "runs", "--tasks",
                      f"{name}={tmp_path / name}")

    def said(name, **columns):
        small_task(tmp_path / name, **columns)
        return refused(name)

    empty = [*sentences(11, 5, 0), "  "]
    assert "text 11 of split train is empty" in said("empty", sentence=empty)
    assert "split train has labels -1 to 1" in said("hidden", label=[-1, 1] * 6)
    near = said("near", label=None, labl=[0, 1] * 6)
    assert "one column `label`, found sentence (string), labl (int64); did you mean labl?" in near
    three = {name: sentences(12, 5, 0) for name in ("one", "two", "three")}
    assert "needs one or two text columns" in said("unclear", sentence=None, **three)
    assert "needs one or two text columns" in said("no_text", sentence=list(range(12)))
    small_task(tmp_path / "other")
    write_rows(tmp_path / "other", "test", {"sentense": sentences(12, 5, 0), "label": [0, 1] * 6})
    message = refused("other")
    assert "split test" in message and "no column 'sentence' as train has; did you mean sentense?" in message


def test_texts_and_images_are_not_taken_for_each_other(bert, data, tmp_path, small_encoder):
    shared = [BERT, "--weights", bert, "--runs", tmp_path]
    assert "glyphs is of images" in refuse("probe", *shared, "--tasks", "glyphs")
    assert "mnist is of images" in refuse("probe", *shared, "--tasks", "mnist")
    prompts = tmp_path / "prompts.json"
    prompts.write_text("{}")
    assert "does not answer in words" in refuse("probe", *shared, "--prompts", prompts)
    assert "takes texts: leave out --image-size" in refuse("probe", *shared, "--image-size", "32")
    with pytest.raises(files.Refused, match="rte is of texts, and small takes images"):
        common.load_task("rte", str(data / "rte"), small_encoder, tmp_path)
    with pytest.raises(files.Refused, match="needs one image column and one column `label`, found sentence"):
        common.load_task("short", str(data / "short"), small_encoder, tmp_path)


@pytest.mark.parametrize("t5", ["flan"], indirect=True)
def test_prompts_and_words_are_the_users_where_a_file_says_so(t5, data, tmp_path, capsys):
    file = tmp_path / "prompts.json"
    file.write_text('{"sst2": {"prompt": "good film or bad {}", "words": {"positive": "yes"}}}')
    encoder = encoders.load_encoder(T5, tmp_path, t5, prompts=file)
    task = common.load_task("sst2", str(data / "sst2"), encoder, tmp_path)
    assert "asked as 'good film or bad {}'" in capsys.readouterr().out
    begins = encoder.tokenizer.encode("good film or bad", add_special_tokens=False).ids
    assert (stored(task)[:, :len(begins)] == torch.tensor(begins)).all()
    ours = texts.label_tokens("sst2", task.classes, encoder.description["words"], encoder.tokenizer)
    assert ours == [encoder.tokenizer.token_to_id(word) for word in ("negative", "yes")]
    assert encoders.load_encoder(T5, tmp_path).description["prompts"]["rte"] == texts.PROMPTS["rte"]
    again = [T5, "--runs", tmp_path, "--tasks", "sst2", "--data", data, "--prompts", file]
    edit(file, "good film or bad {}", "good film or bad")
    assert "was begun with other prompts: use another --runs" in refuse("probe", *again)
    said = refuse("probe", *again[:2], tmp_path / "other", "--weights", t5, *again[3:])
    assert "its prompt 'good film or bad' has not 1 times {}, for the texts of a row" in said
    file.write_text('{"sst2": "good?"}')
    assert "prompts.json is not as" in refuse("probe", *again)


def test_label_words_with_one_first_token_are_refused(t5, tmp_path):
    encoder = encoders.load_encoder(T5, tmp_path, t5)
    assert len(texts.label_tokens("any", ["good", "bad"], {}, encoder.tokenizer)) == 2
    with pytest.raises(files.Refused, match="label words 'so_a'|label words 'so a' and 'so it' begin with"):
        texts.label_tokens("any", ["so_a", "so it"], {}, encoder.tokenizer)


def test_other_models_files_are_refused(bert, tmp_path):
    def said(folder):
        return refuse("probe", BERT, "--weights", folder, "--runs", tmp_path / "runs", "--tasks", "rte")

    assert "is not a folder" in said(bert / "model.safetensors")
    changed = shutil.copytree(bert, tmp_path / "larger")
    vocabulary = json.loads((bert / "config.json").read_text())["vocab_size"]
    more = dict.fromkeys([f"[{letter}]" for letter in "abc"])
    kept = transformers.AutoTokenizer.from_pretrained(bert)
    kept.add_tokens(list(more))
    kept.save_pretrained(changed)
    assert f"the tokenizer has {vocabulary + 3} tokens and the model {vocabulary}" in said(changed)
    changed = shutil.copytree(bert, tmp_path / "shape")
    edit(changed / "config.json", '"num_hidden_layers": 2', '"num_hidden_layers": 3')
    assert "lacks encoder.layer.2.attention.output.LayerNorm.bias" in said(changed)
    changed = shutil.copytree(bert, tmp_path / "wide")
    edit(changed / "config.json", '"intermediate_size": 48', '"intermediate_size": 64')
    assert "wide is no checkpoint of transformers:tiny/bert" in said(changed)
    changed = shutil.copytree(bert, tmp_path / "decoder")
    edit(changed / "config.json", '"model_type": "bert"', '"model_type": "gpt2"')
    assert "is a gpt2: encoders of texts are BERT and its kin, or T5" in said(changed)


def test_a_stored_tokenizer_is_known_again(bert, tmp_path):
    encoders.load_encoder(BERT, tmp_path, bert)
    assert encoders.load_encoder(BERT, tmp_path, bert).width == 32
    path = tmp_path / "transformers_tiny_bert/tokenizer.json"
    edit(path, '"good"', '"goood"')
    with pytest.raises(files.Refused, match="tokenizer.json is missing, or not what"):
        encoders.load_encoder(BERT, tmp_path)
