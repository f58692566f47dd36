"""The texts of edits: from files, data sets, the run's folder and the base's own pen, by a digest."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from gptailor.errors import UserError
from gptailor.evaluate.calibration import TextReader, written
from gptailor.family.models import open_family


@pytest.fixture(scope="module")
def family(tiny_family, make_spec):
    return open_family(make_spec(tiny_family))


def nobody() -> PreTrainedModel:
    pytest.fail("texts of files are read without a model")


def reader(family, folder: Path | None = None) -> TextReader:
    return TextReader(family.tokenizer, list, 0, folder)


def test_texts_of_files_and_data_sets(family, tmp_path) -> None:
    rows = [{"text": "the cat sat on a mat"}, {"text": "red green blue"}]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [family.tokenizer(row["text"])["input_ids"] for row in rows]
    found = reader(family)
    named = [found.named(source, 1000, nobody) for source in (f"file:{tmp_path}/some.jsonl", f"hub:{tmp_path}")]
    assert [found.known[one.digest] for one in named] == [expected, expected] and named[0].digest == named[1].digest
    few = found.named(f"file:{tmp_path}/some.jsonl", len(expected[0]) + 1, nobody)
    assert found.known[few.digest] == [expected[0], expected[1][:1]]
    (tmp_path / "long.txt").write_text("one plus two is three " * 400)
    long = found.named(f"file:{tmp_path}/long.txt", 1500, nobody)
    lengths = [len(text) for text in found.known[long.digest]]
    assert max(lengths) == 512 and sum(lengths) == 1500
    narrow = TextReader(family.tokenizer, list, 0, window=256)
    short = narrow.named(f"file:{tmp_path}/long.txt", 1500, nobody)
    assert max(map(len, narrow.known[short.digest])) == 256, "no longer than what the model reads"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("objectives", "texts: objectives holds none"),
        ("file:{}/none.txt", r"texts: .*none.txt cannot be read as UTF-8 text"),
        ("file:{}/broken.jsonl", "texts: .*broken.jsonl: not one JSON object a line"),
        ("file:{}/other.jsonl", r'other.jsonl, line 1: expected an object with a "text"'),
        ("hub:{}/nowhere", "texts: the data set .*nowhere cannot be opened"),
    ],
)
def test_texts_that_are_not_there(family, tmp_path, source, message) -> None:
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "other.jsonl").write_text('{"words": 1}\n')
    with pytest.raises(UserError, match=message):
        reader(family).named(source.format(tmp_path), 100, nobody)


def test_the_base_writes_texts_by_the_runs_seed(family) -> None:
    first, again = (reader(family).named("base", 150, lambda: family.model) for _ in range(2))
    other = TextReader(family.tokenizer, list, 1).named("base", 150, lambda: family.model)
    assert first == again != other


def test_where_a_text_ends_the_next_begins_in_its_row(family) -> None:
    """Tokens that end texts are none of them inside, no token that was written is lost, and every step is told."""
    shares, end = list[float](), family.tokenizer.eos_token_id
    texts = list(islice(written(family.model, family.tokenizer, 6000, 0, shares.append), 200))
    start = texts[0][0]
    assert len(texts) > 20 and all(text[0] == start and not {end, start} & set(text[1:]) for text in texts)
    assert shares[:2] == [2 * 24 / 6000, 3 * 24 / 6000] and shares == sorted(shares)  # 24 rows fill a window of 256
    assert family.model.generation_config.eos_token_id == end


def test_kept_texts_that_were_changed_do_not_count(family, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on a mat")
    named = reader(family, tmp_path).named(f"file:{tmp_path}/a.txt", 100, nobody)
    (tmp_path / "a.txt").unlink()
    assert reader(family, tmp_path)(named, nobody) == [family.tokenizer("the cat sat on a mat")["input_ids"]]
    (tmp_path / "texts" / f"{named.digest}.json").write_text("[[1, 2]]")
    with pytest.raises(UserError, match="cannot be read"):
        reader(family, tmp_path)(named, nobody)
