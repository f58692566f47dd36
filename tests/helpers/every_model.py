"""Any model type of transformers as a tiny random model, and what becomes of it here: the table in docs/models.md."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gptailor.errors import UserError
from gptailor.family.models import Family, open_family, prove_small
from gptailor.family.preflight import architecture_problems
from gptailor.family.skeleton import reason_of
from gptailor.formats.huggingface import export_hf
from gptailor.plan import LayerChoice, StitchPlan
from gptailor.spec.files import build_spec
from gptailor.spec.sections import Benchmark
from gptailor.stitch.stitcher import Stitcher
from helpers.evaluate_tools import evaluator, opened, write_task
from helpers.families import train_tokenizer

IDS = (torch.arange(24) * 7 % 280 + 3).reshape(2, 12)
N_LAYERS, N_REMOVED = 6, 2

SIZES: dict[str, Any] = {
    # width, depth, heads, by every name that configurations have for them
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "emb_dim": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "hidden_dim": 32,
    "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "d_inner": 64, "dim_ff": 64, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_hidden_layers": 6, "n_layer": 6, "num_layers": 6, "n_layers": 6, "decoder_layers": 6, "encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    # vocabulary, positions
    "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False,
    "initializer_range": 0.3,
    "n_positions": 256, "n_ctx": 256, "max_position_embeddings": 256, "max_seq_len": 256, "sliding_window": 8,
    "attention_window_size": 8,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2, "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    # latent attention, state spaces, linear attention, indexers
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "qk_head_dim":
    8,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "mamba_dt_rank": 4, "mamba_d_ssm": 64, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8,
    "state_size": 8,
    "time_step_rank": 4, "expand": 2, "n_groups": 1, "chunk_size": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8,
    "lru_width": 32,
    # what is used elsewhere alone
    "num_nextn_predict_layers": 0, "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8,
    "global_head_dim": 8,
}  # fmt: skip

LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 4}
WINDOWS = ["sliding_attention", "full_attention"] * 3
HYBRID = ["linear_attention", "linear_attention", "hybrid"] * 2
DECODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""Encoders in name, which are decoders when their configuration says so."""

SPECIAL: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in DECODERS},
    **dict.fromkeys(("axk1", "axk2", "youtu", "longcat_flash"), LATENT),
    **{name: LATENT | {"first_k_dense_replace": 1} for name in ("deepseek_v2", "deepseek_v3")},
    **{name: {"num_key_value_heads": 4} for name in ("deepseek_v32", "glm4_moe_lite", "glm_moe_dsa")},
    **{name: {"rotary_dim": 8} for name in ("codegen", "gptj")},
    **{name: {"layer_types": ["conv", "full_attention"] * 3} for name in ("lfm2", "lfm2_moe")},
    **{name: {"global_head_dim": 16, "layer_types": WINDOWS} for name in ("gemma4_text", "gemma4_unified_text")},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "falcon": {"head_dim": ...},
    "xlstm": {"v_head_dim": ..., "head_dim": ..., "qk_head_dim": ..., "hidden_size": 128, "num_heads": 2},
    "xlnet": {"max_position_embeddings": ...},
    "prophetnet": {"num_hidden_layers": ..., "num_encoder_layers": 2, "num_decoder_layers": 6},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"] * 3, "axial_pos_embds": False},
    "rwkv": {"rescale_every": 2},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "zamba2": {"layers_block_type": HYBRID},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": WINDOWS, "laurel_rank": 8,
                     "activation_sparsity_pattern": [0.0] * 6},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [2, 5]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention"] * 2, "num_hidden_layers": ...},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                       "indexer_compress_ratio": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 64}},
    "inkling2_text": {"unpadded_vocab_size": 300},
    "inkling2_loop_text": {"unpadded_vocab_size": 300, "n_layers_per_attn_res_block": 2, "loop_layer_index_start": 2,
                           "loop_layer_index_end": 4},
    "phi4_multimodal": {
        "vision_config": {"num_hidden_layers": 2, "image_size": 28, "crop_size": 28, "patch_size": 14},
        "audio_config": {"num_blocks": 2, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32,
                         "nemo_conv_channels": 8, "input_size": 16},
    },
    "dots3_note": {
        "vision_config": {"num_hidden_layers": 2, "mlp_layer_types": ["dense"] * 2, "adapter_in_dim": 32,
                          "adapter_out_dim": 32},
        "audio_config": {"num_hidden_layers": 2, "adapter_input_size": 32, "adapter_out_dim": 32,
                         "downsample_hidden_size": 8},
    },
    "dots3_note_text": {"num_key_value_heads": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
                        "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8, "swa_head_dim": 8, "swa_qk_nope_head_dim": 4,
                        "swa_v_head_dim": 8},
}  # fmt: skip
"""Where SIZES alone give no model; ... leaves a size out."""


@dataclass(frozen=True)
class Tried:
    """One model type.

    result: works, refused (by check), no result (no tiny model could be made), or what went wrong; path: how it is
    scored; why: the refusal, or a remark.
    """

    model_type: str
    result: str
    path: str = ""
    why: str = ""


def tiny_of(model_type: str) -> Any:
    """A configuration of six layers of width 32, with text and other parts alike."""
    configuration = CONFIG_MAPPING[model_type]
    values = _sizes_of(configuration()) | SPECIAL.get(model_type, {})
    for name in getattr(configuration, "sub_configs", None) or {}:
        part: Any = getattr(configuration(), name, None)
        if hasattr(part, "model_type"):
            own = SPECIAL.get(part.model_type, {}) | SPECIAL.get(model_type, {}).get(name, {})
            values[name] = _sizes_of(part) | own | {"model_type": part.model_type}
    return AutoConfig.for_model(model_type, **{key: value for key, value in values.items() if value is not ...})


def _sizes_of(default: Any) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for name, size in SIZES.items():
        try:
            known |= {name: size} if hasattr(default, name) else {}
        except Exception:  # an attribute that differs by layer may not be asked for
            known[name] = size
    return known


def attempt(model_type: str, folder: Path, benchmark: Any) -> Tried:
    """Write a tiny family, check, open, stitch, score, generate and export it. benchmark: an opened one."""
    config = None
    try:
        config = tiny_of(model_type)
        _write(folder, config)
    except Exception as error:  # any library's, for a model that nobody made so small
        for why in () if config is None else architecture_problems(config.to_dict(), trust_remote_code=False):
            return Tried(model_type, "refused", why=why)
        return Tried(model_type, "no result", why=f"no tiny model of it could be made: {_line(error)}")
    spec = build_spec(
        {
            "name": "tried",
            "base_model": str(folder / "base"),
            "candidates": {"other": str(folder / "other")},
            "operations": ["remove", "select"],
            "remove": N_REMOVED,
            "objectives": [{"benchmark": "tried"}],
            "device": "cpu",
        }
    )
    try:
        prove_small(spec)
    except UserError as error:
        return Tried(model_type, "refused", why=str(error).splitlines()[-1].removeprefix("base_model: "))
    except Exception as error:
        return Tried(model_type, "check crashed", why=_line(error))
    try:
        return _used(model_type, open_family(spec), benchmark, folder)
    except Exception as error:
        return Tried(model_type, "failed after check", why=_line(error))


def _write(folder: Path, config: Any) -> None:
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_config(config).eval(), train_tokenizer()
    for name in ("base", "other"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.add_(0.3 * parameter.std().nan_to_num() * torch.randn_like(parameter))


def _used(model_type: str, family: Family, benchmark: Any, folder: Path) -> Tried:
    stitcher = Stitcher(family)
    free = [layer for layer in range(family.n_layers) if layer not in family.renumbering.fixed]
    kept = [layer for layer in range(family.n_layers) if layer not in free[1 : 1 + N_REMOVED]]
    plan = StitchPlan(family.n_layers, tuple(LayerChoice(i, ("other",) if i % 2 else ()) for i in kept))
    model = stitcher.stitch(plan)
    scorer = evaluator([benchmark], family.tokenizer)
    scorer.items(model, benchmark, 0, 5)
    remarks = [f"layers that stay: {', '.join(map(str, sorted(family.renumbering.fixed)))}"] * bool(
        family.renumbering.fixed
    )
    if not _writes_alike(stitcher.stitch(plan)):
        dense = stitcher.stitch(StitchPlan.dense(family.n_layers))
        if _writes_alike(dense):
            return Tried(model_type, "failed after check", why="generates otherwise with a cache than without")
        remarks.append("the dense model, too, writes otherwise with a cache than without")
    export_hf(family, plan, folder / "exported", stitcher=stitcher)
    return Tried(model_type, "works", scorer.path or "", "; ".join(remarks))


def _writes_alike(model: Any) -> bool:
    written = [
        model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=2)
        for cache in (True, False)
    ]
    return torch.equal(*written)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {reason_of(error)}"[:200]


class Trying:
    """A place to try model types in, one after another."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        write_task(folder / "tasks", "tried")
        (self._benchmark,) = opened(
            folder / "tasks", train_tokenizer(), Benchmark(benchmark="tried", split="validation")
        )

    def attempt(self, model_type: str) -> Tried:
        place = self._folder / model_type
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return attempt(model_type, place, self._benchmark)
        finally:
            shutil.rmtree(place, ignore_errors=True)
