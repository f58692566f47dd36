"""Reads model folders as a stranger's script does, with whichever transformers it is started with.

`read_exports.py FOLDER...` prints, as JSON, the version, and for each folder the ids, the text and the loss of fixed
lines.
"""

from __future__ import annotations

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

LINES = ("the cat sat on a mat and one plus two is three", "Größe = 3.14 # 東京\n\n  the dog")


def read(folder: str) -> dict[str, object]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)  # type: ignore[misc]
    assert not info["missing_keys"] and not info["unexpected_keys"], info  # type: ignore[has-type]
    ids = [tokenizer(line).input_ids for line in LINES]
    with torch.inference_mode():
        losses = [float(model(torch.tensor([row]), labels=torch.tensor([row])).loss) for row in ids]  # type: ignore[has-type]
    turns = [{"role": "user", "content": "hello"}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False) if tokenizer.chat_template else None
    return {"ids": ids, "text": [tokenizer.decode(row) for row in ids], "losses": losses, "chat": chat}


if __name__ == "__main__":
    print(json.dumps({"version": transformers.__version__, "read": [read(folder) for folder in sys.argv[1:]]}))
