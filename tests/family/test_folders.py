"""Folders as people have them: what transformers opens without a word fits here, and what would be lost is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.adapters import write_adapter
from helpers.families import save_family, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gptailor.errors import UserError
from gptailor.family.models import open_family, prove_small
from gptailor.plan import StitchPlan
from gptailor.stitch.stitcher import Stitcher

IDS = torch.arange(3, 15).reshape(2, 6)


def edit_json(path: Path, **changes) -> None:
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def rewrite(folder: Path, change) -> None:
    """Let change(tensors) give what the folder's weight file holds from now on."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def llamas(tmp_path) -> Path:
    return save_family(tmp_path, tiny_config(), candidates=("math", "code"))


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def computes_as_transformers(spec, folder: Path) -> None:
    """Base and candidate, all their layers kept, are what transformers opens; embeddings are equal in these."""
    stitcher = Stitcher(open_family(spec))
    for name, source in (("base", "base"), ("math", "math")):
        found = logits(stitcher.stitch(StitchPlan.dense(6, source)))
        assert torch.allclose(found, logits(AutoModelForCausalLM.from_pretrained(folder / name)), atol=1e-5)


def test_llama_2_carries_a_buffer_that_its_fine_tunes_lack(llamas, make_spec):
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(6)}
    rewrite(llamas / "base", lambda tensors: tensors | frequencies)
    found = prove_small(make_spec(llamas))
    assert found.notes == () and found.n_parameters == sum(
        tensor.numel() for tensor in load_file(llamas / "math" / "model.safetensors").values()
    )
    computes_as_transformers(make_spec(llamas), llamas)


def test_gpt_2_is_spelled_in_two_ways(tmp_path, make_spec):
    config = tiny_config("gpt2", n_layer=6, n_head=4, n_embd=32, n_positions=64, tie_word_embeddings=True)
    folder = save_family(tmp_path, config, candidates=("math", "code"))

    def as_published(tensors):
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(6)}
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | masks

    for name in ("base", "code"):
        rewrite(folder / name, as_published)
    assert prove_small(make_spec(folder)).notes == ()
    computes_as_transformers(make_spec(folder), folder)
    lora = write_adapter(tmp_path / "lora", folder / "math", targets=("c_attn",), fan_in_fan_out=True)
    spec = make_spec(folder, candidates={"math": str(lora)}, operations=["remove", "select"])
    assert open_family(spec).layer(2, "math") is not open_family(spec).layer(2)


def test_pythia_carries_masks(tmp_path, make_spec):
    folder = save_family(tmp_path, tiny_config("gpt_neox"), candidates=("math",))
    masks = {f"gpt_neox.layers.{i}.attention.masked_bias": torch.tensor(-1e9) for i in range(6)}
    rewrite(folder / "base", lambda tensors: tensors | masks)
    assert prove_small(make_spec(folder, operations=["remove", "select"])).notes == ()


def test_layers_after_the_last_predict_further_tokens(llamas, make_spec):
    def further(tensors):
        last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.5.")}
        return tensors | {name.replace("layers.5.", "layers.6."): tensor.clone() for name, tensor in last.items()}

    for name in ("base", "math"):
        rewrite(llamas / name, further)
    (note,) = prove_small(make_spec(llamas)).notes
    assert "9 tensors belong to layers beyond the 6 of the model" in note
    computes_as_transformers(make_spec(llamas), llamas)


def test_embeddings_of_another_width_are_a_matter_of_design(tmp_path, make_spec):
    config = tiny_config("opt", ffn_dim=64, word_embed_proj_dim=16)
    folder = save_family(tmp_path, config, candidates=("math",))
    prove_small(make_spec(folder, operations=["remove", "select"]))


def test_a_base_without_the_head_that_it_announces(llamas, make_spec):
    rewrite(llamas / "base", lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    with pytest.raises(
        UserError, match=r"tensor lm_head.weight is missing: the model that config.json describes has it"
    ):
        prove_small(make_spec(llamas))


def test_biases_that_the_base_lacks_are_never_dropped(llamas, make_spec):
    biases = {
        f"model.layers.{i}.self_attn.{n}_proj.bias": torch.ones(32 if n in "qo" else 16)
        for i in range(6)
        for n in "qkvo"
    }
    rewrite(llamas / "math", lambda tensors: tensors | biases)
    edit_json(llamas / "math" / "config.json", attention_bias=True)
    with pytest.raises(
        UserError, match=r"candidates.math: model.safetensors: tensor model.layers.0.self_attn.k_proj.bias"
    ):
        prove_small(make_spec(llamas))


def test_settings_are_told_whichever_way_they_are_spelled(llamas, make_spec):
    edit_json(llamas / "base" / "config.json", rope_parameters=None, rms_norm_eps=None)  # the default: 10000, 1e-6
    edit_json(llamas / "math" / "config.json", rope_parameters=None, rope_theta=500000.0, rms_norm_eps=1e-5)
    scaled = {"rope_type": "linear", "factor": 2.0}
    edit_json(llamas / "code" / "config.json", rope_parameters=None, rope_theta=10000.0, rope_scaling=scaled)
    notes = prove_small(make_spec(llamas)).notes
    assert "candidates.math: its rope_theta is 500000.0, the base's is 10000.0; the base's is used" in notes
    assert "candidates.math: its rms_norm_eps is 1e-05, the base's is 1e-06; the base's is used" in notes
    assert "candidates.code: its factor is 2.0, the base's is None; the base's is used" in notes
    assert len(notes) == 4, "and the type of the scaling"


def test_an_unrelated_model_of_the_same_shape(llamas, make_spec):
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(tiny_config()).save_pretrained(llamas / "math")
    (note,) = prove_small(make_spec(llamas)).notes
    assert note.startswith("candidates.math: its layers are 1.4") and "it may be no fine-tune of this base" in note


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("base/config.json", {"model_type": ["llama"]}, "is not a decoder-only language model that transformers"),
        ("base/config.json", {"quantization_config": "gptq"}, r"its weights are quantised \(gptq\)"),
        ("base/config.json", {"rope_parameters": "linear"}, "base_model: config.json: transformers cannot read it"),
        ("base/config.json", {"auto_map": 7}, "transformers cannot open base's tokenizer: argument of type 'int'"),
        ("base/tokenizer_config.json", {"bos_token": ["<s>"]}, "cannot open base's tokenizer: Special token bos_token"),
        ("math/config.json", {"rope_parameters": "linear"}, "candidates.math: config.json: transformers cannot read"),
        ("math/config.json", {"text_config": "llama"}, "text_config is 'llama', where a record is expected"),
        ("code/adapter_config.json", {"r": [4]}, r"adapter_config.json says rank \[4\], adapter_model.safetensors has"),
    ],
)
def test_text_where_a_record_is_expected(llamas, make_spec, file, changes, said):
    shutil.rmtree(llamas / "code")
    write_adapter(llamas / "code", llamas / "base")
    prove_small(make_spec(llamas))
    edit_json(llamas / file, **changes)
    with pytest.raises(UserError, match=said):
        prove_small(make_spec(llamas))


def test_weights_under_other_names(llamas, make_spec):
    place = llamas / "math" / "model.safetensors"
    for name in ("consolidated.safetensors", "model.fp16.safetensors"):
        place = place.rename(llamas / "math" / name)
        with pytest.raises(UserError, match=rf"no weights: .*; {name} is another form of them"):
            prove_small(make_spec(llamas))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, "it also adapts lm_head; embeddings and head stay"),
        ({"modules_to_save": ["input_layernorm"]}, None),
        ({"targets": ("q_proj", "embed_tokens")}, "it also adapts model.embed_tokens; embeddings and head stay"),
        ({"targets": ("q_proj", "lm_head")}, "it also adapts lm_head; embeddings and head stay"),
        ({"trainable_token_indices": {"embed_tokens": [5, 6]}}, "it also adapts model.embed_tokens; embeddings"),
    ],
)
def test_adapters_that_peft_wrote(llamas, tmp_path, make_spec, changes, said):
    """The layers' part is used as PEFT merges it, and the rest is named."""
    lora = write_adapter(tmp_path / "lora", llamas / "base", **changes)
    spec = make_spec(llamas, candidates={"lora": str(lora)}, operations=["remove", "select"])
    notes = prove_small(spec).notes
    assert notes == () if said is None else any(said in note for note in notes), notes
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llamas / "base"), lora).merge_and_unload()
    mine = open_family(spec).layer(3, "lora").state_dict()
    expected = theirs.model.layers[3].state_dict()
    assert all(torch.allclose(mine[name], expected[name], atol=1e-6) for name in mine)


def test_an_adapter_that_names_another_base(llamas, tmp_path, make_spec):
    lora = write_adapter(tmp_path / "lora", llamas / "base")
    edit_json(lora / "adapter_config.json", base_model_name_or_path="someone/other-7b")
    spec = make_spec(llamas, candidates={"lora": str(lora)}, operations=["remove", "select"])
    (note,) = prove_small(spec).notes
    assert note == (
        "candidates.lora: adapter_config.json says that it was made for someone/other-7b; the base here is base"
    )


def test_text_fine_tunes_of_a_multimodal_base(tmp_path, make_spec):
    """Gemma 3: the base sees, its fine-tunes read."""
    text = tiny_config("gemma3_text", tie_word_embeddings=True, sliding_window=8).to_dict()
    text.pop("model_type")
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    from transformers import AutoConfig

    save_family(
        tmp_path / "both", AutoConfig.for_model("gemma3", text_config=text, vision_config=vision), candidates=()
    )
    save_family(tmp_path / "text", AutoConfig.for_model("gemma3_text", **text), candidates=("math",))
    places = {"base_model": str(tmp_path / "both" / "base"), "candidates": {"math": str(tmp_path / "text" / "math")}}
    spec = make_spec(tmp_path / "both", **places, operations=["remove", "select"])
    family = open_family(spec)
    mine = family.layer(3, "math").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "text" / "math").model.layers[3].state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
