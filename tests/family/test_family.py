"""The family: what preflight refuses and says, what is opened, what is shared."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlparse

import pytest
import torch
from helpers.adapters import write_adapter
from safetensors.torch import load_file, save_file

from gptailor.errors import UserError
from gptailor.family.models import Family, open_family
from gptailor.family.preflight import preflight
from gptailor.family.residence import n_bytes, pick_device, settle, tensors_of
from gptailor.family.spread import Room

FAMILY = Path(__file__).resolve().parents[3] / "shared" / "smollm2"
UP = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture
def copied(tiny_family: Path, tmp_path: Path) -> Path:
    """A family that a test may damage."""
    return Path(shutil.copytree(tiny_family, tmp_path / "family"))


def edit_json(path: Path, **changes) -> None:
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def refusal(spec) -> str:
    with pytest.raises(UserError) as caught:
        preflight(spec)
    return str(caught.value)


def shard(folder: Path) -> list[str]:
    """Split model.safetensors in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, part in zip(files, (names[:20], names[20:]), strict=True):
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return files


# --- what fits ---------------------------------------------------------------------------------------------------


def test_a_sound_family(tiny_family, make_spec):
    found = preflight(make_spec(tiny_family))
    base = load_file(tiny_family / "base" / "model.safetensors")
    assert (found.architecture, found.n_layers, found.hidden_size, found.vocab_size) == ("LlamaForCausalLM", 6, 32, 300)
    assert found.dtype == "float32"
    assert found.n_parameters == sum(tensor.numel() for tensor in base.values())
    assert len(set(found.layer_parameters)) == 1
    layers = sum(found.layer_parameters)
    assert found.model_bytes == {"base": 4 * found.n_parameters} | dict.fromkeys(("code", "math", "prose"), 4 * layers)
    assert found.notes == ()


def test_a_run_in_another_type_needs_other_bytes(tiny_family, make_spec):
    spec = make_spec(tiny_family, dtype="bfloat16")
    assert preflight(spec).distinct_bytes * 2 == preflight(make_spec(tiny_family)).distinct_bytes
    family = open_family(spec)
    assert family.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in family.layer(0, "math").state_dict().values()} == {torch.bfloat16}


def test_a_tied_head_counts_once(make_family, make_spec):
    folder = make_family("llama", tie_word_embeddings=True)
    found = preflight(make_spec(folder))
    assert found.n_parameters == sum(p.numel() for p in open_family(make_spec(folder)).model.parameters())


def test_sharded_weights_are_read_and_opened(copied, make_spec):
    whole = preflight(make_spec(copied))
    expected = open_family(make_spec(copied)).layer(5, "math").state_dict()
    shard(copied / "math")
    shard(copied / "base")
    assert preflight(make_spec(copied)) == whole
    found = open_family(make_spec(copied)).layer(5, "math").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_licences_come_from_the_model_cards(copied, make_spec):
    (copied / "base" / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n")
    (copied / "math" / "README.md").write_text("---\nlicense: other\nlicense_name: llama2\n---\n")
    (copied / "code" / "README.md").write_text("---\nlicense: [broken\n---\n")
    assert preflight(make_spec(copied)).licences == {"base": "apache-2.0", "math": "llama2"}


def test_a_larger_vocabulary_and_other_settings_are_noted(copied, make_spec):
    def grow(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.zeros(12, 32)])

    edit_weights(copied / "code", grow)
    edit_json(copied / "code" / "config.json", vocab_size=312, rms_norm_eps=0.5)
    edit_json(copied / "math" / "config.json", rope_parameters=None, rope_theta=10000.0)  # as transformers 4 wrote it
    notes = "\n".join(preflight(make_spec(copied)).notes)
    assert "candidates.math" not in notes
    assert "candidates.code: its vocabulary has 312 entries, the base's has 300" in notes
    assert "candidates.code: its rms_norm_eps is 0.5, the base's is 1e-06; the base's is used" in notes
    open_family(make_spec(copied))


def test_seven_billion_parameters_take_less_than_two_seconds(tmp_path, tiny_family, make_spec):
    """Headers of a 7B family over sparse files: right sizes, no data."""
    folder, shards = tmp_path / "seven", 3
    for name in ("base", "chat", "math", "code"):
        fake_seven_billion(folder / name, shards)
        shutil.copy(tiny_family / "base" / "tokenizer.json", folder / name)
    preflight(make_spec(tiny_family))  # transformers' import is not what is measured
    started = time.process_time()  # of this process alone: others may keep the machine busy
    found = preflight(make_spec(folder))
    assert time.process_time() - started < 2.0
    assert 6.7e9 < found.n_parameters < 6.8e9
    assert found.dtype == "float16" and found.model_bytes["base"] == 2 * found.n_parameters


def fake_seven_billion(folder: Path, shards: int) -> None:
    hidden, inner, vocab, layers = 4096, 11008, 32000, 32
    tensors = {"model.embed_tokens.weight": [vocab, hidden], "lm_head.weight": [vocab, hidden]}
    tensors["model.norm.weight"] = [hidden]
    for i in range(layers):
        p = f"model.layers.{i}."
        tensors |= {f"{p}self_attn.{n}_proj.weight": [hidden, hidden] for n in "qkvo"}
        tensors |= {f"{p}mlp.{n}_proj.weight": [inner, hidden] for n in ("gate", "up")}
        tensors |= {f"{p}mlp.down_proj.weight": [hidden, inner]}
        tensors |= {f"{p}{n}_layernorm.weight": [hidden] for n in ("input", "post_attention")}
    folder.mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers}
    config |= {"hidden_size": hidden, "vocab_size": vocab}
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    for s in range(shards):
        file, offset, header = f"model-{s + 1:05}-of-{shards:05}.safetensors", 0, {}
        for name in sorted(tensors)[s::shards]:
            size = 2 * torch.Size(tensors[name]).numel()
            header[name] = {"dtype": "F16", "shape": tensors[name], "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[name] = file
        data = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(data)) + data)
        os.truncate(folder / file, 8 + len(data) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# --- what is refused, and what it says ---------------------------------------------------------------------------


def test_a_missing_tensor_is_named(copied, make_spec):
    edit_weights(copied / "math", lambda tensors: tensors.pop(UP))
    text = refusal(make_spec(copied))
    assert text.splitlines() == [
        "the models do not fit together: 1 problem",
        f"candidates.math: tensor {UP} is missing (the base has it, in model.safetensors)",
    ]


def test_a_wrong_shape_is_named_with_both_sizes(copied, make_spec):
    edit_weights(copied / "code", lambda tensors: tensors.update({UP: torch.zeros(60, 32)}))
    assert f"candidates.code: model.safetensors: tensor {UP} has shape [60, 32], the base's has [64, 32]" in refusal(
        make_spec(copied)
    )


def test_a_tensor_missing_in_the_base_is_named(copied, make_spec):
    edit_weights(copied / "base", lambda tensors: tensors.pop(UP))
    assert f"base_model: tensor {UP} is missing: the model that config.json describes has it" in refusal(
        make_spec(copied)
    )


def test_a_wrong_shape_in_the_base_is_named(copied, make_spec):
    edit_weights(copied / "base", lambda tensors: tensors.update({UP: torch.zeros(60, 32)}))
    assert f"base_model: model.safetensors: tensor {UP} has shape [60, 32]" in refusal(make_spec(copied))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 5}, "config.json has 5 layers, the base has 6; it is no fine-tune of this base"),
        ({"hidden_size": 48}, "config.json has 48 hidden_size, the base has 32"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "is a Qwen3ForCausalLM, the base is a Llama"),
        ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantised"),
        (
            {"num_attention_heads": 2},
            "its num_attention_heads is 2, the base's is 4; its layers cannot work in",
        ),
        ({"hidden_act": "gelu"}, "its hidden_act is gelu, the base's is silu; its layers cannot work in the base"),
    ],
)
def test_candidates_that_are_no_fine_tunes(copied, make_spec, change, message):
    edit_json(copied / "math" / "config.json", **change)
    assert f"candidates.math: {message}" in refusal(make_spec(copied))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "nonesuch", "architectures": ["NonesuchForCausalLM"]}, "NonesuchForCausalLM is not a decoder"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "is an encoder-decoder; only decoder-only"),
        ({"num_hidden_layers": 7}, "its tensors are not numbered as the 7 layers"),
        ({"num_hidden_layers": None}, "config.json does not say how many layers"),
        (
            {"vocab_size": 256},
            "embed_tokens.weight has shape [300, 32], the model that config.json describes has [",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "its weights are quantised (awq)"),
        ({"quantization_config": "awq"}, "its weights are quantised (awq)"),
        ({"hidden_size": "wide"}, "config.json: transformers cannot read it"),
        ({"rope_parameters": "linear"}, "config.json: transformers cannot"),
        ({"architectures": "LlamaForCausalLM", "model_type": None}, "model_type None is not a decoder-only"),
    ],
)
def test_bases_that_cannot_be_stitched(copied, make_spec, change, message):
    edit_json(copied / "base" / "config.json", **change)
    text = refusal(make_spec(copied))
    assert "base_model: " in text and message in text


def test_remote_code_needs_permission(copied, make_spec):
    edit_json(copied / "base" / "tokenizer_config.json", auto_map={"AutoTokenizer": "evil.Tokenizer"})
    text = refusal(make_spec(copied))
    assert "base_model: tokenizer_config.json asks for code of its own to be run (auto_map: AutoTokenizer)" in text
    assert "set trust_remote_code: true" in text
    preflight(make_spec(copied, trust_remote_code=True))


def test_kernels_from_the_hub_are_remote_code_too(copied, make_spec):
    edit_json(copied / "base" / "config.json", attn_implementation="someone/fast-attention")
    assert "base_model: config.json asks for code from the hub to be run (attn_implementation: someone/" in refusal(
        make_spec(copied)
    )


def test_a_model_and_an_adapter_in_one_folder_are_refused(copied, make_spec):
    """transformers would load another base than the one that was checked."""
    (copied / "base" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    assert "base_model: holds both a full model and an adapter_config.json" in refusal(make_spec(copied))


def test_pickles_are_refused_even_with_permission(copied, make_spec):
    (copied / "math" / "model.safetensors").rename(copied / "math" / "pytorch_model.bin")
    text = refusal(make_spec(copied, trust_remote_code=True))
    assert "candidates.math: only pickled weights are here (pytorch_model.bin)" in text
    assert "convert them to safetensors" in text


def test_a_cut_off_file_is_noticed_by_its_header(copied, make_spec):
    weights = copied / "math" / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size - 1000)
    text = refusal(make_spec(copied))
    assert (
        f"candidates.math: model.safetensors is cut off: {size - 1000:,} bytes, its header describes {size:,}" in text
    )
    os.truncate(weights, 100)
    assert "is not a safetensors file, or is cut off (100 bytes)" in refusal(make_spec(copied))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "is a Git LFS pointer"),
        (struct.pack("<Q", 1 << 60) + b"{}", "is not a safetensors file"),
        (struct.pack("<Q", 6) + b"[1, 2]", "damaged header"),
        (struct.pack("<Q", 5) + b"{nope", "damaged header"),
        (struct.pack("<Q", 13) + b'{"a": {"b":1}}', "damaged header"),
    ],
)
def test_files_that_are_no_weights(copied, make_spec, content, message):
    (copied / "code" / "model.safetensors").write_bytes(content)
    text = refusal(make_spec(copied))
    assert "candidates.code: model.safetensors" in text and message in text


def test_a_header_that_lies_about_sizes(copied, make_spec):
    path = copied / "math" / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    changed = raw[8 : 8 + length].replace(b'"shape":[64,32]', b'"shape":[64,33]', 1)
    path.write_bytes(raw[:8] + changed + raw[8 + length :])
    assert "of shape [64, 33] has 8,192 bytes in its header" in refusal(make_spec(copied))


def test_missing_parts_are_named_all_at_once(copied, make_spec):
    (copied / "math" / "config.json").unlink()
    (copied / "code" / "model.safetensors").unlink()
    for file in (copied / "base").glob("tokenizer*"):
        file.unlink()
    files = shard(copied / "prose")
    (copied / "prose" / files[1]).unlink()
    lines = refusal(make_spec(copied)).splitlines()
    assert lines[0] == "the models do not fit together: 4 problems"
    assert "candidates.math: config.json is missing" in lines
    assert "candidates.code: no weights: expected model.safetensors or model.safetensors.index.json" in lines
    assert f"candidates.prose: 1 of 2 shards are missing: {files[1]}" in lines
    assert "base_model: has no tokenizer (tokenizer.json or tokenizer.model)" in lines


def test_an_index_may_not_leave_its_folder(copied, make_spec):
    shard(copied / "math")
    index = copied / "math" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../base/model.safetensors"}}))
    assert "names '../base/model.safetensors', which is not a safetensors file of this folder" in refusal(
        make_spec(copied)
    )


def test_many_wrong_tensors_are_counted_not_listed(copied, make_spec):
    edit_weights(
        copied / "math", lambda tensors: [tensors.pop(name) for name in list(tensors) if "mlp.up_proj" in name]
    )
    lines = refusal(make_spec(copied)).splitlines()
    assert len(lines) == 6 and lines[-1] == "candidates.math: and 2 more tensors do not fit"


def test_paths_and_hub_ids_that_lead_nowhere(tiny_family, make_spec, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = refusal(make_spec(tiny_family, candidates={"a": "./nowhere", "b": "nobody/nothing", "c": __file__}))
    assert "candidates.a: ./nowhere: no such folder" in text
    assert "candidates.b: nobody/nothing: no such folder, not in the local hub cache, and the hub could not be" in text
    assert "test_family.py is a file; expected a model's folder" in text


def test_a_hub_id_is_found_in_the_local_cache(tiny_family, tmp_path, make_spec, monkeypatch):
    commit = "0" * 40
    repo = tmp_path / "models--someone--tiny-math"
    shutil.copytree(tiny_family / "math", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    family = open_family(
        make_spec(tiny_family, candidates={"math": "someone/tiny-math", "b": str(tiny_family / "code")})
    )
    assert family.label("math") == "someone/tiny-math" and family.label("b") == "code"


@pytest.mark.slow
def test_a_model_on_the_hub_is_judged_by_its_headers(tiny_family, make_spec, tmp_path):
    """A hub on loopback: preflight fetches configurations and headers, opening fetches the rest."""
    shutil.copytree(tiny_family, tmp_path / "hub" / "someone")
    write_adapter(tmp_path / "hub" / "someone" / "lora", tiny_family / "base")
    (tmp_path / "hub" / "someone" / "broken").mkdir()
    (tmp_path / "hub" / "someone" / "broken" / "pytorch_model.bin").write_bytes(b"pickle")
    spec = make_spec(
        tiny_family, base_model="someone/base", candidates={"math": "someone/math", "lora": "someone/lora"}
    )
    bad = make_spec(tiny_family, candidates={"a": "someone/broken", "b": "someone/gone"})
    code = (
        "import pathlib, sys\n"
        "from gptailor.errors import UserError\n"
        "from gptailor.family.models import open_family\n"
        "from gptailor.family.preflight import preflight\n"
        "from gptailor.spec.files import parse_spec\n"
        "good, bad = map(parse_spec, pathlib.Path(sys.argv[1]).read_text().split('=====\\n'))\n"
        "weights = lambda: len(list(pathlib.Path(sys.argv[2]).glob('*/snapshots/*/*.safetensors')))\n"
        "print(preflight(good).model_bytes, weights())\n"
        "try:\n    preflight(bad)\nexcept UserError as error:\n    print(error)\n"
        "print(open_family(good).label('math'), weights())\n"
    )
    (tmp_path / "specs").write_text(spec.to_yaml() + "=====\n" + bad.to_yaml())
    with hub_on_loopback(tmp_path / "hub") as address:
        cache = tmp_path / "cache"
        env = os.environ | {
            "HF_ENDPOINT": address,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "specs"), str(cache)],
            capture_output=True, text=True, env=env, cwd=Path(__file__).parents[2], timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = preflight(make_spec(tiny_family)).model_bytes
    lines = done.stdout.splitlines()
    sizes = {"base": expected["base"], "math": expected["math"], "lora": 4 * 6 * (32 * 32 + 32 * 64)}
    assert lines[0] == f"{sizes} 0"
    assert (
        "candidates.a: someone/broken: the hub has no safetensors weights for it; pickled weights are refu"
        in done.stdout
    )
    assert (
        "candidates.b: someone/gone: no such folder, not in the local hub cache, and the hub could not be"
        in done.stdout
    )
    assert lines[-1] == "someone/math 3"


@contextmanager
def hub_on_loopback(folder: Path):
    """Serves folder/OWNER/NAME as the hub would: the model's listing, files with ETag, ranges. Yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            listing = re.fullmatch(r"/api/models/(\w+/\w+)(/revision/\w+|/tree/\w+)?", path)
            file = re.fullmatch(r"/(\w+/\w+)/resolve/\w+/(.+)", path)
            here = folder / (listing or file)[1] if listing or file else folder / "nowhere"  # type: ignore[index]
            if listing and here.is_dir():
                files = sorted(p for p in here.iterdir())
                if "/tree/" in path:
                    data = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name} for p in files]
                else:
                    data = {"id": listing[1], "sha": "1" * 40, "siblings": [{"rfilename": p.name} for p in files]}  # type: ignore[assignment]
                self.answer(200, json.dumps(data).encode(), {"Content-Type": "application/json"})
            elif file and (here / file[2]).is_file():
                content = (here / file[2]).read_bytes()
                headers = {"ETag": f'"{file[2]}"', "X-Repo-Commit": "1" * 40}
                part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if part:
                    content = content[int(part[1]) : int(part[2]) + 1]
                self.answer(206 if part else 200, content, headers)
            else:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound" if not here.is_dir() else "EntryNotFound"})

        def answer(self, code: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def test_devices_that_are_not_here():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device: cuda:99 is not here"):
        pick_device("cuda:99")


# --- adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"layers_to_transform": [1, 4]}])
def test_an_adapter_gives_the_weights_of_its_merged_folder(tiny_family, tmp_path, make_spec, options, dtype):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = write_adapter(tmp_path / "adapter", tiny_family / "base", **options)
    dense = AutoModelForCausalLM.from_pretrained(tiny_family / "base", dtype=torch.float32)
    merged = PeftModel.from_pretrained(dense, adapter).merge_and_unload().to(getattr(torch, dtype))
    merged.save_pretrained(tmp_path / "merged")
    places = {"adapter": str(adapter), "merged": str(tmp_path / "merged")}
    spec = make_spec(tiny_family, candidates=places, dtype=dtype)
    family = open_family(spec)
    stored = load_file(tiny_family / "base" / "model.safetensors")
    for name, tensor in family.model.state_dict().items():
        assert torch.equal(tensor, stored[name].to(tensor.dtype)), f"the base's {name} must stay as it was"
    for index in range(6):
        mine, its = (family.layer(index, name).state_dict() for name in places)
        assert all(torch.equal(mine[name], its[name]) for name in mine), index
    changed = options.get("layers_to_transform", range(6))
    base, found = family.layer(1).state_dict(), family.layer(1, "adapter").state_dict()
    assert not torch.equal(found["mlp.down_proj.weight"], base["mlp.down_proj.weight"])
    assert found["mlp.up_proj.weight"].data_ptr() == base["mlp.up_proj.weight"].data_ptr()
    assert preflight(spec).model_bytes["adapter"] == family.dtype.itemsize * len(changed) * (32 * 32 + 32 * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter; only LoRA adapters"),
        ({"r": 8}, "adapter_config.json says rank 8, adapter_model.safetensors has rank [4] for model.layers.0"),
        ({"target_modules": ["q_proj", "gone"]}, "adapter_config.json targets gone, but adapter_model.safetensors has"),
        ({"layer_replication": [[0, 3]]}, "replicates layers"),
    ],
)
def test_adapters_whose_configuration_does_not_fit(tiny_family, tmp_path, make_spec, change, message):
    adapter = write_adapter(tmp_path / "adapter", tiny_family / "base")
    edit_json(adapter / "adapter_config.json", **change)
    assert message in refusal(make_spec(tiny_family, candidates={"a": str(adapter), "b": str(tiny_family / "math")}))


def test_adapters_of_another_base(tiny_family, make_family, tmp_path, make_spec):
    other = make_family("llama", intermediate_size=48, num_hidden_layers=8)
    adapter = write_adapter(tmp_path / "adapter", other / "base")
    text = refusal(make_spec(tiny_family, candidates={"a": str(adapter), "b": str(tiny_family / "math")}))
    assert "lora_A.weight has shape [4, 48], the base's module is 64 to 32 wide" in text
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    text = refusal(make_spec(tiny_family, candidates={"a": str(adapter), "b": str(tiny_family / "math")}))
    assert "candidates.a: only pickled weights are here (adapter_model.bin)" in text


def test_an_adapter_on_more_layers_than_there_are(tiny_family, make_family, tmp_path, make_spec):
    adapter = write_adapter(tmp_path / "adapter", make_family("llama", num_hidden_layers=7) / "base")
    text = refusal(make_spec(tiny_family, candidates={"a": str(adapter), "b": str(tiny_family / "math")}))
    assert "adapts module model.layers.6.self_attn.q_proj, which the base does not have" in text


def test_an_adapter_as_base_is_refused(tiny_family, tmp_path, make_spec):
    adapter = write_adapter(tmp_path / "adapter", tiny_family / "base")
    assert "base_model: is a LoRA adapter; the base must be a full model" in refusal(
        make_spec(tiny_family, base_model=str(adapter))
    )


# --- what is opened ----------------------------------------------------------------------------------------------


def test_candidates_lend_their_own_layers(tiny_family, make_spec):
    family = open_family(make_spec(tiny_family))
    assert (family.names, family.n_layers, str(family.device)) == (("code", "math", "prose"), 6, "cpu")
    for name in ("base", *family.names):
        stored = load_file(tiny_family / name / "model.safetensors")
        for index in range(6):
            for key, tensor in family.layer(index, name).state_dict().items():
                assert torch.equal(tensor, stored[f"model.layers.{index}.{key}"])
    with pytest.raises(UserError, match="'physics' is not in this family; it has base, code, math, prose"):
        family.layer(0, "physics")


def test_equal_tensors_are_held_once(tiny_family, make_spec):
    """The candidates' norms equal the base's; their matrices do not."""
    family = open_family(make_spec(tiny_family))
    base, math = (family.layer(2, name).state_dict() for name in ("base", "math"))
    shared = {name for name in base if base[name].data_ptr() == math[name].data_ptr()}
    assert shared == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    layer = sum(t.nbytes for name, t in base.items() if name not in shared)
    assert family.distinct_bytes == sum(p.nbytes for p in family.model.parameters()) + 3 * 6 * layer
    assert family.distinct_bytes < preflight(make_spec(tiny_family)).distinct_bytes


def test_a_candidate_equal_to_the_base_costs_nothing(copied, make_spec):
    shutil.copy(copied / "base" / "model.safetensors", copied / "math" / "model.safetensors")
    without = open_family(make_spec(copied, candidates={name: str(copied / name) for name in ("code", "prose")}))
    assert open_family(make_spec(copied)).distinct_bytes == without.distinct_bytes


def test_weights_are_mapped_not_read(make_family, make_spec):
    """Opening a family of 150 MB must not cost 150 MB: pages are read when they are first used."""
    import psutil

    folder = make_family("llama", hidden_size=512, intermediate_size=2048, head_dim=64, num_attention_heads=8)
    process = psutil.Process()
    before = process.memory_info().rss
    family = open_family(make_spec(folder))
    grown = process.memory_info().rss - before
    assert family.distinct_bytes > 150e6 and grown < 0.5 * family.distinct_bytes


def test_layers_without_room_on_the_device_visit_it(tiny_family, make_spec):
    """The device is torch's `meta`, which keeps no data but knows what lives there; room is for base and `code`."""
    family = open_family(make_spec(tiny_family))
    device = torch.device("meta")
    layers = {name: [family.layer(i, name) for i in range(6)] for name in family.names}
    base = n_bytes(tensors_of([family.model]))
    own = n_bytes(tensors_of([family.layer(0)])) - 2 * 32 * 4  # the norms are the base's
    with pytest.raises(UserError, match=r"device: the base needs [0-9]+ kB, meta has [0-9]+ kB free; use cpu"):
        settle(family.model, layers, {device: Room(base - 1)})
    visitors = settle(family.model, layers, {device: Room(base + 6 * own + 2 * own)})
    assert {t.device.type for t in tensors_of([family.model, *layers["code"]])} == {"meta"}
    waiting = dict(layers["math"][3].named_parameters())
    assert waiting["mlp.up_proj.weight"].device.type == "cpu"
    assert waiting["input_layernorm.weight"].device.type == "meta", "shared with the base, which lives there"

    assert visitors.keys() == {device} and visitors[device].capacity == 2 * own
    settled = Family(
        family.model, family.tokenizer, layers, family.preflight, family.renumbering, device, family.spec, {}, visitors
    )
    assert settled.layer(3, "code") is layers["code"][3]
    guests = [settled.layer(i, "math") for i in range(6)]
    assert {t.device.type for t in tensors_of(guests)} == {"meta"}
    assert visitors[device].n_bytes == 2 * own, "the two used last"
    assert settled.layer(4, "math") is guests[4] and settled.layer(5, "math") is guests[5]
    settled.layer(0, "math")
    assert settled.layer(5, "math") is guests[5] and settled.layer(4, "math") is not guests[4]


@pytest.mark.family
@pytest.mark.slow
def test_real_adapters_equal_their_merged_folders(make_spec):
    merged = os.environ.get("GPTAILOR_SMOLLM2", "")
    if not FAMILY.is_dir() or not merged:
        pytest.skip(
            "needs the SmolLM2 family beside the project, and GPTAILOR_SMOLLM2 naming the folder it was built in"
        )
    folder = Path(merged)
    places = {name: str(FAMILY / "adapters" / name) for name in ("math", "code")}
    places |= {f"{name}-merged": str(folder / name) for name in ("math", "code")}
    family = open_family(make_spec(folder, candidates=places))
    for name in ("math", "code"):
        for index in range(family.n_layers):
            mine, its = (family.layer(index, n).state_dict() for n in (name, f"{name}-merged"))
            assert all(torch.equal(mine[key], its[key]) for key in mine)


def test_what_transformers_leaves_out_as_its_default_is_known(make_family, make_spec) -> None:
    """Gemma 3 in the larger sizes says no vocab_size; Gemma 3n says its MLP's width layer by layer."""
    folder = make_family("llama", vocab_size=32_000)
    config = json.loads((folder / "base" / "config.json").read_text())
    del config["vocab_size"]
    (folder / "base" / "config.json").write_text(json.dumps(config))
    assert preflight(make_spec(folder)).vocab_size == 32_000
    family = open_family(make_spec(folder))
    vars(family.model.config)["intermediate_size"] = [64, 128, 64]
    assert family.inner_size == 128
