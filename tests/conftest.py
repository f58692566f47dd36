"""Tiny real models, made once a test session: the whole engine runs on them in seconds and without a network."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CANDIDATES = ("math", "code", "prose")
WORDS = "the cat sat on a mat and one plus two is three while a dog ran far away from red green blue hills".split()


def train_tokenizer(vocab_size: int = 300):
    """A byte-level BPE tokenizer with BOS, EOS, padding and a chat template, trained on a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return tokenizer


def save_family(folder: Path, config, *, dtype: str = "float32", candidates: tuple[str, ...] = CANDIDATES) -> Path:
    """Write `folder`/base (random weights) and one folder a candidate: the base plus noise on its layers' weights.

    Norms, embeddings and head are equal to the base's in every candidate.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    original = {name: value.clone() for name, value in base.state_dict().items()}
    for name in ("base", *candidates):
        with torch.no_grad():
            for key, parameter in base.named_parameters():
                parameter.copy_(original[key])
                if name != "base" and "layers." in key and parameter.ndim == 2:
                    parameter.add_(0.5 * parameter.std() * torch.randn_like(parameter))
        base.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def tiny_config(model_type: str = "llama", **changes):
    """A configuration of any decoder-only architecture with 6 layers of hidden size 32, 4 heads and 2 KV heads."""
    from transformers import AutoConfig

    sizes = dict(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    return AutoConfig.for_model(model_type, **(sizes | changes))


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `math`, `code` and `prose`: Llamas of 6 layers, float32. Read it, do not change it."""
    return save_family(tmp_path_factory.mktemp("tiny_family"), tiny_config())


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., object]:
    """make_spec(folder, remove=2): a run over a family's folder, whose every sub-folder but `base` is a candidate."""
    from gptailor.spec import build_spec

    def make(folder: Path, **changes):
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "base")
        data = {
            "name": "tiny",
            "base_model": str(folder / "base"),
            "candidates": {name: str(folder / name) for name in names},
            "remove": 1,
            "objectives": [{"benchmark": "none"}],
            "device": "cpu",
        }
        return build_spec(data | changes)

    return make


@pytest.fixture(scope="session")
def make_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_family("qwen3", tie_word_embeddings=True): a family of another architecture (see tiny_config)."""

    def make(model_type: str, *, dtype: str = "float32", candidates: tuple[str, ...] = ("math", "code"), **changes):
        folder = tmp_path_factory.mktemp(model_type)
        return save_family(folder, tiny_config(model_type, **changes), dtype=dtype, candidates=candidates)

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB. Mounting needs rights that a developer's machine may not give."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root; a file size limit stands in for it in test_store_faults.py")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dashboard's folder of runs, empty, and no shipped example beside it."""
    from gptailor.dashboard import readers

    monkeypatch.setenv("GPTAILOR_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(readers, "DEMO", tmp_path / "demo")
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield opened
        opened.close()
