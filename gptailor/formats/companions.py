"""What stands beside the weights: the base's own tokenizer, chat templates and generation settings, copied.

A tokenizer that transformers reads and writes again is another set of files: tokenizer.model is gone, which converters
to GGUF tokenise with, and keys have the names of the version that wrote them. So files are copied byte by byte, and of
their settings only what tells of the machine, or what the other generation of transformers cannot read, is changed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gptailor.family.checkpoint import read_json
from gptailor.formats.generations import tokenizer_for_both, without_machine

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
NAMES = frozenset(
    [
        "tokenizer.json",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "tekken.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
    ]
)
PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""Of images and sound, which the rest of a multimodal model still takes."""
PATTERNS = ("additional_chat_templates/*.jinja", "*.tiktoken", "tokenizer.model.v*")
SAMPLES = (
    "The cat sat on the mat, and 3.14159 is not 22/7.",
    "  Leading blanks,\ttabs\n\nand  empty lines \n",
    "def f(x):\n    return x**2 + 1  # naïve café\n",
    "Größe, señor, 東京都, Привет, 안녕하세요, مرحبا, 🙂🙃",
    "<s></s><|endoftext|> {[(\\\"')]} https://example.org/?q=1&r=2",
)


def copy_companions(base: Path, out: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Copy what the base's folder has beside weights and configuration; a link is copied as the file it leads to."""
    own = {str(name) for name in tokenizer.vocab_files_names.values()}
    found = [base / name for name in sorted(NAMES | own) if Path(name).name == name and (base / name).is_file()]
    found += [path for pattern in PATTERNS for path in sorted(base.glob(pattern)) if path.is_file()]
    for path in found:
        target = out / path.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if (base / TOKENIZER_CONFIG).is_file():
        write_json(out / TOKENIZER_CONFIG, tokenizer_for_both(read_json(base / TOKENIZER_CONFIG)))
    (out / GENERATION_CONFIG).unlink(missing_ok=True)  # transformers makes one up where the base has none
    for name in (GENERATION_CONFIG, *PROCESSORS):
        if (base / name).is_file():
            write_json(out / name, without_machine(read_json(base / name)))


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_difference(mine: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    """The first thing on which two tokenizers differ: their special tokens, some texts, a conversation; or None."""
    if mine.special_tokens_map != theirs.special_tokens_map or len(mine) != len(theirs):
        return "the special tokens"
    for text in SAMPLES:
        for special in (True, False):
            ids = [tokenizer(text, add_special_tokens=special).input_ids for tokenizer in (mine, theirs)]
            if ids[0] != ids[1] or mine.decode(ids[0]) != theirs.decode(ids[1]):
                return repr(text)
    if mine.chat_template != theirs.chat_template:
        return "the chat template"
    return None
