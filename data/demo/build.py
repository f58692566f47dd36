#!/usr/bin/env python3
"""Build the demo: a tokenizer, four benchmarks, a base model trained from scratch, and three fine-tunes of it.

    python data/demo/build.py              # two cores, under 15 minutes; the committed files were made so
    python data/demo/build.py --times 4    # data/demo/times/4: a family whose base learned from four times the tokens

Everything follows from fixed seeds. The base learns all four domains of `generators.py` for a while and none to
perfection; each fine-tune then goes on with one domain, so that it is clearly the best there: a family as the search
expects it, small enough to be kept beside the code. Questions of the benchmarks are never trained on. Families written
elsewhere hold models alone: every family is judged on the benchmarks that lie here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from generators import DOMAINS, Question, benchmark, draw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SEED = 0
END = "<|end|>"  # ends every training text; also the padding
VOCABULARY = 768
SHAPE: dict[str, Any] = {  # 1.9 million parameters
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
}
FINE_TUNES = ("code", "sums", "prose")  # nobody owns series: it shows what specialising costs
BASE_STEPS = 900
TUNE_STEPS = {"sums": 240, "code": 700, "prose": 240}  # code is learned most slowly
BATCH = 32  # questions
BASE_RATE, TUNE_RATE = 0.006, 0.004  # learning rates of the layers' matrices
PROMPT_WEIGHT = 0.3  # of a prompt's tokens in the loss; the answer's weigh 1
REPLAY = 0.15  # share of all domains in a fine-tune's batches, against forgetting


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on texts of all domains: most words and all numbers become one token."""
    rng = random.Random(f"{SEED} tokenizer")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(
        ("".join(text for text, _ in draw(domain, rng).pieces) for domain in DOMAINS for _ in range(4000)), trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=SHAPE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def make_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    end = tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=end, **SHAPE)
    return LlamaForCausalLM(config)


# --- training -----------------------------------------------------------------------------------------------------


def batches(
    tokenizer: PreTrainedTokenizerFast, mixture: dict[str, float], held_out: set[str], rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches without end: token ids and loss weights, both (BATCH, length), questions of like length together."""
    end = tokenizer.eos_token_id
    domains, shares = list(mixture), list(mixture.values())
    while True:
        drawn = [draw(domain, rng) for domain in rng.choices(domains, shares, k=16 * BATCH)]
        rows = [encode(q, tokenizer) for q in drawn if q.query not in held_out]
        rows.sort(key=lambda row: len(row[0]))
        chunks = [rows[i : i + BATCH] for i in range(0, len(rows) - BATCH + 1, BATCH)]
        rng.shuffle(chunks)
        for chunk in chunks:
            length = max(len(ids) for ids, _ in chunk)
            ids = torch.tensor([ids + [end] * (length - len(ids)) for ids, _ in chunk])
            weights = torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in chunk])
            yield ids, weights


def encode(asked: Question, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[float]]:
    """A training text's token ids and the weight of each in the loss."""
    ids: list[int] = []
    weights: list[float] = []
    for text, is_answer in (*asked.pieces, (END, True)):
        piece = tokenizer(text)["input_ids"]
        ids += piece
        weights += [1.0 if is_answer else PROMPT_WEIGHT] * len(piece)
    return ids, weights


def train(
    model: LlamaForCausalLM, data: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int, rate: float, label: str
) -> None:
    """Muon for the layers' matrices (it needs far fewer steps than Adam here), AdamW for the rest; linear decay."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.3 * rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 30, 1.6 * (1 - step / steps)))
        for o in optimizers
    ]
    model.train()
    started = time.perf_counter()
    for step in range(1, steps + 1):
        ids, weights = next(data)
        logits = model(input_ids=ids[:, :-1]).logits
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if step % 100 == 0 or step == steps:
            print(f"{label}: step {step}/{steps}, loss {loss:.3f}, {time.perf_counter() - started:.0f} s", flush=True)


# --- scoring and saving -------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[Question]) -> float:
    """Share of questions whose right choice is the likeliest continuation of the query (lm-eval's acc)."""
    model.eval()
    right = 0
    for start in range(0, len(questions), 100):
        part = questions[start : start + 100]
        starts = [n for q in part for n in [len(tokenizer(q.query)["input_ids"])] * len(q.choices)]
        texts = tokenizer([f"{q.query} {choice}" for q in part for choice in q.choices])["input_ids"]
        length = max(map(len, texts))
        ids = torch.tensor([t + [tokenizer.pad_token_id] * (length - len(t)) for t in texts])
        scored = torch.tensor([[s <= i < len(t) for i in range(length)] for t, s in zip(texts, starts, strict=True)])
        logits = model(input_ids=ids[:, :-1]).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(texts), -1)
        likelihoods = -(losses * scored[:, 1:]).sum(1).view(len(part), -1)
        right += sum(int(best) == q.gold for best, q in zip(likelihoods.argmax(1), part, strict=True))
    return right / len(questions)


BENCHMARK_YAML = """\
# {domain}: a benchmark of the demo's own making (data/demo/generators.py). Scored text: query + " " + choice.
task: demo_{domain}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {folder}/calibration.jsonl
    test: {folder}/test.jsonl
output_type: multiple_choice
validation_split: validation
test_split: test
doc_to_text: query
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def as_jsonl(questions: list[Question]) -> str:
    rows = ({"query": q.query, "choices": list(q.choices), "gold": q.gold} for q in questions)
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_benchmark(domain: str, splits: dict[str, list[Question]], out: Path) -> None:
    folder = out / "benchmarks" / f"demo_{domain}"
    folder.mkdir(parents=True, exist_ok=True)
    from_root = Path(os.path.relpath(folder, ROOT)).as_posix()
    (folder / f"demo_{domain}.yaml").write_text(BENCHMARK_YAML.format(domain=domain, folder=from_root))
    for split, questions in splits.items():
        (folder / f"{split}.jsonl").write_text(as_jsonl(questions))


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
{front}---
# {title}

{text}

Architecture: Llama, {layers} layers, hidden size {hidden}, {millions:.1f} million parameters, byte-level BPE with a
vocabulary of {vocabulary} tokens. It knows the demo's made-up world and nothing else: use it to try gptailor.
"""

BASE_TEXT = """\
The base model of gptailor's demo family, trained from random weights by `data/demo/build.py` on generated questions
of four domains (sums, code, prose, series): {steps} steps of {batch} questions, Muon and AdamW, seed {seed}. No text of
anybody else went into it."""

TUNE_TEXT = """\
A fine-tune of `../base` (`data/demo/build.py`): {steps} further steps of {batch} questions, {share:.0%} of them from
the {name} domain, the rest from all domains, so that it is the family's best at {name} and forgets little else."""


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str, steps: int, out: Path) -> None:
    """Write one model as a plain Hugging Face folder in bfloat16, with its card."""
    folder = out / "models" / name
    if name == "base":
        text, front = BASE_TEXT.format(steps=steps, batch=BATCH, seed=SEED), ""
    else:
        text = TUNE_TEXT.format(steps=steps, batch=BATCH, share=1 - REPLAY, name=name)
        front = "base_model: ../base\n"
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(
        CARD.format(
            title=f"gptailor demo: {name}",
            text=text,
            front=front,
            layers=SHAPE["num_hidden_layers"],
            hidden=SHAPE["hidden_size"],
            millions=model.num_parameters() / 1e6,
            vocabulary=len(tokenizer),
        )
    )


def fine_tune(name: str, out: Path, held_out: set[str]) -> None:
    """One fine-tune on one thread: two of them share the two cores."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM.from_pretrained(out / "models" / "base", dtype=torch.float32)
    mixture = {domain: REPLAY / len(DOMAINS) + (1 - REPLAY) * (domain == name) for domain in DOMAINS}
    data = batches(tokenizer, mixture, held_out, random.Random(f"{SEED} {name}"))
    train(model, data, TUNE_STEPS[name], TUNE_RATE, name)
    save(model, tokenizer, name, TUNE_STEPS[name], out)


def report(out: Path, benchmarks: dict[str, dict[str, list[Question]]]) -> None:
    """Print every saved model's accuracy on every benchmark's test split, in percent."""
    print(f"\n{'test accuracy, %':18}" + "".join(f"{domain:>9}" for domain in benchmarks))
    for name in ("base", *FINE_TUNES):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "models" / name)
        model = LlamaForCausalLM.from_pretrained(out / "models" / name, dtype=torch.float32)
        scores = [accuracy(model, tokenizer, splits["test"]) for splits in benchmarks.values()]
        print(f"{name:18}" + "".join(f"{100 * score:9.1f}" for score in scores), flush=True)


def parse_arguments() -> tuple[float, int, Path]:
    """How many times the committed base's tokens, how many threads, and the folder to write to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=float, default=1.0, help="train the base on so many times its tokens")
    parser.add_argument("--threads", type=int, default=2, help="cores; what is committed was made with 2")
    parser.add_argument("--out", type=Path, help="folder for models/ (default: here, or times/TIMES here)")
    asked = parser.parse_args()
    if asked.times * BASE_STEPS < 1 or asked.threads < 1:
        parser.error("--times must give at least one step, and --threads is at least 1")
    usual = HERE if asked.times == 1 else HERE / "times" / f"{asked.times:g}"
    return asked.times, asked.threads, (asked.out or usual).resolve()


def main() -> None:
    times, threads, out = parse_arguments()
    torch.set_num_threads(threads)

    benchmarks = {domain: benchmark(domain) for domain in DOMAINS}
    if out == HERE:
        for domain, splits in benchmarks.items():
            write_benchmark(domain, splits, out)
    held_out = {q.query for splits in benchmarks.values() for questions in splits.values() for q in questions}

    tokenizer = make_tokenizer()
    base = make_base(tokenizer)
    print(f"{base.num_parameters():,} parameters, vocabulary {len(tokenizer)}", flush=True)
    data = batches(tokenizer, dict.fromkeys(DOMAINS, 1.0), held_out, random.Random(f"{SEED} base"))
    steps = round(times * BASE_STEPS)
    train(base, data, steps, BASE_RATE, "base")
    save(base, tokenizer, "base", steps, out)

    with ProcessPoolExecutor(threads, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(fine_tune, name, out, held_out) for name in FINE_TUNES]:
            done.result()
    report(out, benchmarks)


if __name__ == "__main__":
    main()
