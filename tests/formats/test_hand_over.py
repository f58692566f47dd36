"""Exports in other people's hands: transformers 4, llama.cpp and its converter, the real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_exports
from helpers.families import WORDS, save_family, tiny_config
from helpers.other_tools import LLAMA_CPP, ROOT, TRANSFORMERS_4, installed, run_with
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptailor.family.models import open_family
from gptailor.formats.huggingface import export_hf
from gptailor.plan import StitchPlan

HELPERS = ROOT / "tests" / "helpers"
SMOLLM2 = os.environ.get("GPTAILOR_SMOLLM2", "")
TEXT = "the cat sat on a mat and one plus two is three while the naïve dog"
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TWO_KINDS = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2, "sliding_window": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_theta": 500.0} | LLAMA_3 | {"original_max_position_embeddings": 32}},
    "qwen2": {"rope_parameters": {"rope_theta": 700.0, "rope_type": "default"}},
    "gemma3_text": TWO_KINDS
    | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        }
    },
    "gpt_neox": {"rope_parameters": {"rope_theta": 300.0, "rope_type": "default", "partial_rotary_factor": 0.5}},
    "stablelm": {"rope_parameters": {"rope_theta": 300.0, "rope_type": "default", "partial_rotary_factor": 0.5}},
    "phi3": {
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 300.0,
            "short_factor": [1.0, 1.5, 2.0, 2.5],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
        },
    },
    "qwen3_moe": {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 2, "rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}},
}


def exported(make_spec: Callable[..., Any], base: Path, out: Path, *gone: int) -> Path:
    """The base's folder without these layers."""
    asked = {"candidates": {}, "operations": ["remove"], "remove": len(gone), "base_model": str(base)}
    family = open_family(make_spec(base.parent, **asked))
    export_hf(family, StitchPlan.without(set(gone), family.n_layers), out)
    return out


def in_transformers_4(*folders: Path) -> None:
    """The folders' tokens, texts and losses are those that this environment's transformers gives."""
    packages = installed(*TRANSFORMERS_4)
    theirs = run_with(packages, HELPERS / "read_exports.py", *folders)
    assert theirs["version"].startswith("4.")
    for folder, found in zip(folders, theirs["read"], strict=True):
        ours = read_exports.read(str(folder))
        losses = ours.pop("losses")
        assert found.pop("losses") == pytest.approx(losses, rel=1e-5), folder
        assert found == ours, folder


@pytest.mark.slow
def test_transformers_4_reads_them_alike(make_spec: Callable[..., Any], tmp_path: Path) -> None:
    """The demo's export and those of families whose keys transformers 5 has renamed, none of them at its default."""
    folders = [exported(make_spec, ROOT / "data" / "demo" / "models" / "base", tmp_path / "demo", 3, 7)]
    for model_type, changes in FAMILIES.items():
        family = save_family(tmp_path / model_type, tiny_config(model_type, **changes), candidates=())
        folders.append(exported(make_spec, family / "base", tmp_path / f"{model_type}-out", 1, 4))
    in_transformers_4(*folders)


@pytest.mark.family
@pytest.mark.slow
def test_a_real_model_travels(make_spec: Callable[..., Any], tmp_path: Path) -> None:
    if not SMOLLM2:
        pytest.skip("needs GPTAILOR_SMOLLM2, naming the folder in which the SmolLM2 family was built")
    folder = exported(make_spec, Path(SMOLLM2) / "base", tmp_path / "out", 20, 21, 22, 23)
    in_transformers_4(folder)
    same_in_llama_cpp(folder, 26)


def test_peft_and_pipelines_take_it_as_a_base(make_spec: Callable[..., Any], tmp_path: Path) -> None:
    """A step of training lowers the loss on what it was trained on; the pipeline says what the model does."""
    from peft import LoraConfig, get_peft_model
    from transformers import pipeline

    family = save_family(tmp_path / "family", tiny_config(), candidates=())
    folder = exported(make_spec, family / "base", tmp_path / "out", 1, 4)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the cat sat on a mat", return_tensors="pt").input_ids
    wanted = tokenizer.decode(plain.generate(ids, max_new_tokens=4, do_sample=False)[0], skip_special_tokens=True)
    said = pipeline("text-generation", str(folder))("the cat sat on a mat", max_new_tokens=4, do_sample=False)
    assert said[0]["generated_text"] == wanted
    torch.manual_seed(0)
    model = get_peft_model(plain, LoraConfig(target_modules="all-linear"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def sentencepiece_family(folder: Path, tokenizer: str = "LlamaTokenizer", **changes: Any) -> Path:
    """A tiny model whose tokenizer is a tokenizer.model and nothing else, as Llama 2's and Gemma's are at heart."""
    import sentencepiece

    text = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    sizes = {"vocab_size": 360, "hidden_size": 64, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
    config = tiny_config(**({"model_type": "llama", "pad_token_id": 0} | sizes | changes))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    settings = {"tokenizer_class": tokenizer, "add_bos_token": True, "legacy": False, "unk_token": "<unk>"}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "name_or_path": "/home/somebody/model"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def gguf_of(folder: Path) -> tuple[Path, Path]:
    """The folder converted as llama.cpp's own script does, and the packages that it came from."""
    packages, file = installed(*LLAMA_CPP), folder.with_suffix(".gguf")
    script = packages / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(folder), "--outfile", str(file), "--outtype", "f32"]
    environment = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return file, packages


def difference_in_llama_cpp(folder: Path, n_layers: int) -> float:
    """Convert, run, and compare tokens and metadata with transformers'.

    How far the first token's log-probabilities are apart, over the five likeliest.
    """
    file, packages = gguf_of(folder)
    found = run_with(packages, HELPERS / "run_gguf.py", file, TEXT, 6)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert found["ids"] == ids[0].tolist()
    kind = found["facts"]["general.architecture"]
    assert found["facts"][f"{kind}.block_count"] == n_layers
    with torch.inference_mode():
        expected = model.float()(ids).logits[0, -1].log_softmax(-1)
    return max(abs(value - float(expected[int(token)])) for token, value in found["first"].items())


def same_in_llama_cpp(folder: Path, n_layers: int) -> None:
    assert difference_in_llama_cpp(folder, n_layers) < 0.01


@pytest.mark.slow
def test_a_sentencepiece_family_goes_through_gguf(make_spec: Callable[..., Any], tmp_path: Path) -> None:
    base = sentencepiece_family(tmp_path / "base")
    folder = exported(make_spec, base, tmp_path / "out", 1, 4)
    assert (folder / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    assert "somebody" not in (folder / "tokenizer_config.json").read_text()
    same_in_llama_cpp(folder, 4)
    in_transformers_4(folder)


@pytest.mark.slow
def test_the_card_warns_of_a_pattern_that_llama_cpp_cannot_read(make_spec: Callable[..., Any], tmp_path: Path) -> None:
    """Gemma 3 has five layers with a window, then one without: llama.cpp counts, whatever the list says."""
    pattern = (["sliding_attention"] * 5 + ["full_attention"]) * 2
    gemma = {"num_hidden_layers": 12, "layer_types": pattern, "sliding_window": 8, "query_pre_attn_scalar": 16}
    gemma |= {"model_type": "gemma3_text", "tie_word_embeddings": True}
    base = sentencepiece_family(tmp_path / "base", "GemmaTokenizer", **gemma)
    kept = exported(make_spec, base, tmp_path / "kept", 10, 11)
    assert "With other tools" not in (kept / "README.md").read_text()
    same_in_llama_cpp(kept, 10)
    broken = exported(make_spec, base, tmp_path / "broken", 0, 4)
    assert "`layer_types` in config.json" in (broken / "README.md").read_text().replace("\\", "")
    assert difference_in_llama_cpp(broken, 10) > 0.1, "llama.cpp reads the list by now: the note can go"
