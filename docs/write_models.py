"""Write docs/models.md: every model type that transformers opens as a language model, tried on a tiny random model.

    python docs/write_models.py [MODEL_TYPE ...]

With model types, only their rows are made anew. All of them take about ten minutes.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

import transformers  # noqa: E402
from helpers.every_model import Tried, Trying  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
HEAD = """# Models

Which architectures can be searched. Every model type that transformers {version} opens as a language model was tried
on a tiny random model of six layers: checked, opened, stitched, scored, generated from and exported. The export was
read again. `python docs/write_models.py` writes this page.

{counts}

What `check` refuses, it refuses in one sentence, before anything is loaded. Not all that transformers opens can be
shortened. A shorter model has to be written as a configuration that everybody can read, and a kept layer has to compute
what it did.

- **Scored by**: *direct* is the arithmetic written out, *tree* the model's own forward on packed texts, *rows* padded
  texts ([speed.md](speed.md)). The scores are the same.
- **Layers that stay**: no configuration can do without them, so that every plan keeps them. Here they are those of the
  tiny model; `check` names yours.
- Mixtures of experts, hybrids and windows: every kept layer keeps its kind. The last attention layer of a hybrid stays
  where all could go.
- Of a multimodal model, the language model is searched; the rest stays as it is.

| model type | result | scored by | remark |
|---|---|---|---|
"""


def page_of(tried: Sequence[Tried]) -> str:
    """The page for what was tried."""
    counts = Counter(one.result for one in tried)
    table = "\n".join(f"| {result} | {n} |" for result, n in counts.most_common())
    counted = f"| result | model types |\n|---|---|\n{table}\n| all | {len(tried)} |"
    rows = [f"| `{one.model_type}` | {one.result} | {one.path} | {_cell(one.why)} |" for one in tried]
    return HEAD.format(version=transformers.__version__, counts=counted) + "\n".join(rows) + "\n"


def rows_of(page: str) -> dict[str, Tried]:
    """What a page says, by model type."""
    cells = (re.split(r" (?<!\\)\| ?", line[2:-2]) for line in page.splitlines() if line.startswith("| `"))
    return {name.strip("`"): Tried(name.strip("`"), result, path, _plain(why)) for name, result, path, why in cells}


def _plain(cell: str) -> str:
    return cell.replace("\\|", "|").replace("&lt;", "<")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def main(asked: Sequence[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    tried = rows_of(PAGE.read_text(encoding="utf-8")) if asked else {}
    with tempfile.TemporaryDirectory() as folder:
        trying = Trying(Path(folder))
        for model_type in asked or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            tried[model_type] = trying.attempt(model_type)
            print(tried[model_type], flush=True)
    PAGE.write_text(page_of([tried[name] for name in sorted(tried)]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
