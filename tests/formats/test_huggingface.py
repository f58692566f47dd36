"""Exports: what is written loads in plain transformers and gives the engine's logits; nothing else is touched."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptailor.errors import UserError
from gptailor.family.models import open_family
from gptailor.formats.companions import copy_companions
from gptailor.formats.generations import for_both
from gptailor.formats.huggingface import OLDER_NOTE, PLAN_FILE, as_text, export_hf
from gptailor.plan import LayerChoice, StitchPlan
from gptailor.stitch.stitcher import Stitcher
from gptailor.trial import Score

IDS = torch.tensor([[5, 17, 250, 33, 4, 99, 120, 7, 61, 200, 3, 44]])
PLAN = StitchPlan(
    6,
    (
        LayerChoice(0, output_scale=1.25),
        LayerChoice(2, ("math",)),
        LayerChoice(3, ("code", "math"), "task_arithmetic", 0.4, output_scale=0.5),
        LayerChoice(5, ("code", "math"), "ties", 0.7, (("density", 0.5),)),
    ),
)
REMOVED = StitchPlan.without({1, 3, 4}, 6)
UNSCALED = StitchPlan(6, (LayerChoice(1), LayerChoice(2, ("math",)), LayerChoice(4)))


@pytest.fixture(scope="module")
def family(tiny_family, make_spec):
    return open_family(make_spec(tiny_family))


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def front_matter(text: str) -> dict[Any, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_folder_gives_the_engines_logits(family, tmp_path):
    steps: list[tuple[str, float]] = []
    made = export_hf(family, PLAN, tmp_path / "out", progress=lambda step, share: steps.append((step, share)))
    assert (made.folder, made.n_layers, made.max_difference) == (tmp_path / "out", 4, 0.0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(theirs), logits(Stitcher(family).stitch(PLAN)))
    assert made.n_parameters == sum(p.numel() for p in theirs.parameters())
    assert theirs.config.num_hidden_layers == 4 and theirs.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the cat").input_ids == family.tokenizer("the cat").input_ids
    assert StitchPlan.from_json(json.loads((tmp_path / "out" / PLAN_FILE).read_text())) == PLAN
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert not list((tmp_path / "out").glob("*.bin")) and os.stat(tmp_path / "out").st_mode & 0o777 == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside it"
    shares = [share for _, share in steps]
    assert shares == sorted(shares) and steps[-1] == ("done", 1.0)


def test_scales_are_folded_into_the_weights(family, tmp_path):
    export_hf(family, PLAN, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].state_dict()
    for name, tensor in family.layer(0).state_dict().items():
        factor = 1.25 if name in ("self_attn.o_proj.weight", "mlp.down_proj.weight") else 1.0
        assert torch.equal(found[name], tensor * factor)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"vocab_size": 320}),
        ("qwen2", {"tie_word_embeddings": True, "vocab_size": 320}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("gemma2", {"tie_word_embeddings": True, "sliding_window": 8}),
        ("gemma3_text", {"tie_word_embeddings": True, "sliding_window": 8}),
        ("mistral", {"sliding_window": 8}),
        ("gpt_neox", {}),
        ("mixtral", {"num_local_experts": 2}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_architectures(make_family, make_spec, tmp_path, model_type, options, dtype):
    if model_type.startswith("gemma"):
        options = options | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}
    family = open_family(make_spec(make_family(model_type, dtype=dtype, **options)))
    made = export_hf(family, UNSCALED, tmp_path / "out")
    assert made.max_difference == 0.0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == getattr(torch, dtype)
    if "layer_types" in options:
        assert theirs.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    if options.get("tie_word_embeddings"):
        assert theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight
    ids = IDS[:, :10]
    ours = Stitcher(family).stitch(UNSCALED)
    assert torch.equal(*(m.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=2) for m in (ours, theirs)))  # type: ignore[operator]


def test_an_export_can_be_a_base_again(family, make_spec, tiny_family, tmp_path):
    export_hf(family, UNSCALED, tmp_path / "out")
    again = open_family(make_spec(tiny_family, base_model=str(tmp_path / "out"), candidates={}, operations=["remove"]))
    assert again.n_layers == 3


def test_the_card_says_what_it_is(family, tmp_path):
    scores = [
        Score("piqa", "acc_norm", 0.6543, 0.0111, 1000, True),
        Score("arc_easy", "acc", 0.5, None, 200, True, is_objective=False),
    ]
    export_hf(
        family, PLAN, tmp_path / "out", title="Config 7 of demo", scores=scores, facts={"run": "demo", "seed": "0"}
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gptailor"],
    }
    plain = card.replace("\\", "")
    for part in (
        "# Config 7 of demo",
        "4 of 6 layers",
        "0 base scale 1.25 | 2 math | 3 code+math x0.40 scale 0.50 | 5 code+math x0.70 | removed 1 4",
        "| base | base | not stated |",
        "| math | math | not stated |",
        "| piqa | acc_norm | 0.6543 | 0.0111 | 1000 | yes |",
        "| arc_easy | acc | 0.5000 |  | 200 | no |",
        "- run: demo",
    ):
        assert part in plain
    assert "prose" not in card, "a candidate that lends nothing is no source"


def test_licences_of_the_sources_are_carried(tiny_family, make_spec, tmp_path):
    import shutil

    copied = shutil.copytree(tiny_family, tmp_path / "family")
    for name in ("base", "math", "code"):
        (copied / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (copied / "code" / "README.md").write_text("---\nlicense: llama2\n---\n")
    family = open_family(make_spec(copied))
    export_hf(family, UNSCALED, tmp_path / "same")
    assert front_matter((tmp_path / "same" / "README.md").read_text())["license"] == "apache-2.0"
    export_hf(family, PLAN, tmp_path / "mixed")
    card = (tmp_path / "mixed" / "README.md").read_text()
    assert "license" not in front_matter(card)
    assert r"| code | code | llama2 |" in card and r"| base | base | apache\-2.0 |" in card


def test_a_snapshot_of_the_hub_has_the_models_name(tiny_family, make_spec, tmp_path):
    """Its folder is called by a commit, and its files are links into the cache."""
    snapshot = tmp_path / "models--ada--tiny" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    for file in (tiny_family / "base").iterdir():
        (snapshot / file.name).symlink_to(file)
    export_hf(
        open_family(make_spec(tiny_family, base_model=str(snapshot), candidates={}, operations=["remove"])),
        REMOVED,
        tmp_path / "out",
    )
    assert front_matter((tmp_path / "out" / "README.md").read_text())["base_model"] == ["ada/tiny"]
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_what_is_beside_the_weights_is_the_bases_own(tiny_family, make_spec, tmp_path):
    """Older spellings of the base stay, templates and odd settings are copied, the machine's traces are not."""
    import shutil

    copied = shutil.copytree(tiny_family, tmp_path / "family")
    base, out = copied / "base", tmp_path / "out"
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {"extra_special_tokens": ["<pad>"], "name_or_path": "/home/ada/base", "local_files_only": True}
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"vocab_file": "/home/ada/base/tokenizer.model"}))
    (base / "tokenizer.model").write_bytes(b"pieces")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (base / "trainer_state.json").write_text('{"best_model_checkpoint": "/home/ada/runs/1"}')
    config = json.loads((base / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    config |= {"rope_theta": theta, "rope_scaling": None, "_name_or_path": "/home/ada/base", "torch_dtype": "float32"}
    (base / "config.json").write_text(json.dumps(config))
    odd = {"temperature": 0.9, "do_sample": False, "eos_token_id": 1}  # as some are on the hub; not valid when saved
    (base / "generation_config.json").write_text(json.dumps(odd))
    (base / "preprocessor_config.json").write_text('{"image_mean": [0.5], "_name_or_path": "/home/ada/base"}')
    export_hf(open_family(make_spec(copied, candidates={}, operations=["remove"])), REMOVED, out)
    assert json.loads((out / "preprocessor_config.json").read_text()) == {"image_mean": [0.5]}
    for name in ("tokenizer.json", "tokenizer.model", "additional_chat_templates/tools.jinja", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((out / "generation_config.json").read_text()) == odd
    made = json.loads((out / "config.json").read_text())
    assert (made["rope_theta"], made["rope_scaling"], made["rope_parameters"]["rope_theta"]) == (theta, None, theta)
    assert made["torch_dtype"] == made["dtype"] == "float32" and made["num_hidden_layers"] == 3
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["additional_special_tokens"] == ["<pad>"] and "extra_special_tokens" not in tokenizer
    text = "".join(path.read_text() for path in out.iterdir() if path.suffix in (".json", ".md"))
    assert "ada" not in text and "local_files_only" not in text and not (out / "trainer_state.json").exists()


def test_a_tokenizer_that_is_not_the_bases_never_appears(family, tmp_path, monkeypatch):
    """A fault between copying and loading: two pieces of the written vocabulary change places."""

    def swapped(base, out, tokenizer):
        copy_companions(base, out, tokenizer)
        data = json.loads((out / "tokenizer.json").read_text())
        vocabulary = data["model"]["vocab"]
        vocabulary["a"], vocabulary["t"] = vocabulary["t"], vocabulary["a"]
        (out / "tokenizer.json").write_text(json.dumps(data))

    monkeypatch.setattr("gptailor.formats.huggingface.copy_companions", swapped)
    with pytest.raises(RuntimeError, match="the exported tokenizer is not the base's: they differ on 'The cat"):
        export_hf(family, UNSCALED, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_keys_of_transformers_4_that_say_another_thing_are_told(make_family, make_spec, tmp_path, monkeypatch):
    """Without the older key, version 4 computes with its default: the card says so."""

    def forgetful(written, config, original):
        return {k: v for k, v in for_both(written, config, original).items() if k != "rope_theta"}

    monkeypatch.setattr("gptailor.formats.huggingface.for_both", forgetful)
    folder = make_family("llama", candidates=(), rope_parameters={"rope_theta": 77.0, "rope_type": "default"})
    made = export_hf(open_family(make_spec(folder, operations=["remove"])), REMOVED, tmp_path / "out")
    assert made.notes == (f"{OLDER_NOTE} llama.",)
    assert "has no keys for llama" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "nasty",
    [
        "<script>alert(1)</script>",
        "[click](javascript:alert(1))",
        "![x](http://evil.example/x.png)",
        "a | b\n\n# Heading\n---\nlicense: evil",
        "`code` *bold* __init__ ~~x~~ $x^2$ :smile: &lt;",
        "see https://evil.example/ and www.evil.example",
        "\u202egnp.exe\x00\x1b[31m",
    ],
)
def test_what_others_wrote_stays_text(family, tmp_path, nasty):
    score = Score(nasty, nasty, 0.5, None, 1, True)
    export_hf(family, UNSCALED, tmp_path / "out", title=nasty, scores=[score], facts={nasty: nasty})
    card = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(card).get("license") is None
    assert len(re.findall(r"^# ", card, re.MULTILINE)) == 1 and card.count("\n---\n") == 1
    body = card.split("\n---\n", 1)[1]
    for markup in ("<script", "](", "![", "http:", "https:", "www.", "\x00", "\x1b", "\u202e"):
        assert markup not in body
    rows = [line for line in body.splitlines() if line.startswith("|") and "0.5000" in line]
    assert len(rows) == 1 and len(re.findall(r"(?<!\\)\|", rows[0])) == 7
    assert "\n" not in as_text(nasty)


def test_folders_of_others_are_left_alone(family, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other things already; name a folder that is new or empty"):
        export_hf(family, UNSCALED, mine)
    assert (mine / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UserError, match="is a file; name a folder that does not exist yet"):
        export_hf(family, UNSCALED, mine / "thesis.txt")
    with pytest.raises(UserError, match=r"thesis.txt/deeper could not be written"):
        export_hf(family, UNSCALED, mine / "thesis.txt" / "deeper")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_folder_is_filled_and_an_earlier_export_left_alone(family, tmp_path):
    (tmp_path / "out").mkdir()
    export_hf(family, PLAN, tmp_path / "out")
    with pytest.raises(UserError, match="holds an earlier export already; name a folder that is new or empty"):
        export_hf(family, UNSCALED, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_does_not_give_the_logits_never_appears(family, tmp_path, monkeypatch):
    """A fault between writing and loading: one weight of the written file is changed."""
    save: Callable[..., Any] = type(family.model).save_pretrained

    def damaged(model, folder, **options):
        save(model, folder, **options)
        file = folder / "model.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-400:] = bytes(400)
        file.write_bytes(bytes(raw))

    monkeypatch.setattr(type(family.model), "save_pretrained", damaged)
    with pytest.raises(RuntimeError, match="logits differ from the engine's"):
        export_hf(family, UNSCALED, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_noticed_first(family, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(UserError, match=r"has 1\.0 MB free, the model needs"):
        export_hf(family, UNSCALED, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep" / "out").exists()
