"""Tiny real families of any architecture: random weights, a tokenizer of a few words."""

from __future__ import annotations

from pathlib import Path

CANDIDATES = ("math", "code", "prose")


TEXT = "the cat sat on a mat and one plus two is three while a dog ran far away from red green blue hills"
WORDS = TEXT.split()


EXPERTS_BEHIND = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "head_dim": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
"""What makes a tiny DeepSeek-V3: one dense layer, then experts."""


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

    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(model_type, **(sizes | changes))
