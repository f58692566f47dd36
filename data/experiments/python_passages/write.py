#!/usr/bin/env python3
"""Write the passages of Python that the task beside this file reads: 600 characters each, of this Python's own library.

    python data/experiments/python_passages/write.py      # seconds; two files, not committed

Another version of Python has other passages. Those of one module are all in one split.
"""

from __future__ import annotations

import json
import random
import sysconfig
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHARACTERS = 600
EACH = 4
"""Passages of a module."""
ROWS = {"validation": 200, "test": 200}


def passages(module: Path) -> list[str]:
    """Some beginnings of lines in a module, and what follows them; none of a module that is short or no UTF-8."""
    try:
        text = module.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return []
    places = [place for place, character in enumerate(text[: -CHARACTERS - 1]) if character == "\n"]
    chosen = random.Random(module.name).sample(places, EACH) if len(text) > 2 * EACH * CHARACTERS else []
    return [text[place + 1 : place + 1 + CHARACTERS] for place in sorted(chosen)]


def main() -> None:
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(modules)
    found = iter([(module.name, text) for module in modules for text in passages(module)])
    for split, n in ROWS.items():
        rows = [{"module": name, "text": text} for name, text in islice(found, n)]
        (HERE / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{split}: {len(rows)} passages of {len({row['module'] for row in rows})} modules")


if __name__ == "__main__":
    main()
