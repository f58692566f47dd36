"""The texts that edits of weights are computed from, by name: of the run, of a file, of the hub, or the base's own.

An edited plan names its texts by a digest of their token ids. Wherever the plan's model is stitched (engine, worker,
held-out evaluation, export), they are found again here: in this process's memory, in the run's folder, or at their
source. What comes from the source and has another digest is refused: it would be another model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, groupby
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from gptailor.errors import UserError
from gptailor.evaluate.benchmarks import OpenBenchmark, calibration_batches
from gptailor.evaluate.generation import padding_token
from gptailor.plan import Texts
from gptailor.store.folder import write_atomically

TEXT_TOKENS = 512
"""Tokens of a text at most: longer documents are cut."""
WRITTEN_ROWS, WRITTEN_BYTES = 64, 4 << 30
"""Rows that a model writes at once, at most; and their keys and values, were no heads shared."""
BYTES_PER_TOKEN = 16
"""Of a plain file, as many bytes are read as so many a token."""
MAX_FILE = 1 << 30

Dense = Callable[[], PreTrainedModel]
"""The dense base, live."""


class TextReader:
    """Finds texts. One a process and run; the stitcher asks it (stitch/edits/case.py, CalibrationTexts).

    objectives: the run's objectives with their examples in seeded order; none where there is no run. folder: where
    texts are kept; none: nowhere. known: texts that came from elsewhere, by digest. window: tokens that
    the models read at most.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        objectives: Callable[[], Sequence[OpenBenchmark]],
        seed: int,
        folder: Path | None = None,
        known: Mapping[str, list[list[int]]] | None = None,
        window: int = TEXT_TOKENS,
    ) -> None:
        self._length = min(TEXT_TOKENS, window)
        self._tokenizer, self._objectives, self._seed, self._folder = tokenizer, objectives, seed, folder
        self.known: dict[str, list[list[int]]] = dict(known or {})
        self._named: dict[tuple[str, int], Texts] = {}
        self.told: Callable[[str, float], None] = lambda _what, _share: None
        """Told while the base writes, which takes long."""

    def __call__(self, asked: Texts, dense: Dense) -> list[list[int]]:
        """Token ids of the texts that an edit names. Raises UserError where they are not there any more."""
        if asked.digest not in self.known and (kept := self._kept(asked.digest)) is not None:
            self.known[asked.digest] = kept
        if asked.digest not in self.known:
            found = self.named(asked.source, asked.n_tokens, dense)
            if found.digest != asked.digest:
                raise UserError(
                    f"edits: {asked.source} gives other texts now (digest {found.digest}) than those that the plan was "
                    f"edited with ({asked.digest}); put them back, or repair the plan anew"
                )
        return self.known[asked.digest]

    def named(self, source: str, n_tokens: int, dense: Dense) -> Texts:
        """At most n_tokens tokens of a source, or of several joined by +, as a plan names them. Raises UserError."""
        if (source, n_tokens) in self._named:
            return self._named[source, n_tokens]
        sources = source.split("+")
        share = max(1, n_tokens // len(sources))
        texts = [text for one in sources for text in _first(self._read(one, share, dense), share)]
        if not texts:
            raise UserError(f"texts: {source} holds none")
        digest = digest_of(texts)
        self.keep(digest, texts)
        self._named[source, n_tokens] = Texts(source, n_tokens, digest)
        return self._named[source, n_tokens]

    def _read(self, source: str, n_tokens: int, dense: Dense) -> Iterable[list[int]]:
        kind, _, name = source.partition(":")
        if kind == "objectives":
            benchmarks = self._objectives()
            n = sum(benchmark.n_examples for benchmark in benchmarks)
            return calibration_batches(benchmarks, n, self._tokenizer, self._length)
        if kind == "base":
            return written(dense(), self._tokenizer, n_tokens, self._seed, self._told_of_writing)
        if kind == "file":
            return self._encoded(_documents(Path(name).expanduser(), n_tokens))
        if kind == "hub":
            return self._encoded(_hub(name))
        raise UserError(f"texts: {source!r} must be objectives, base, file:PATH or hub:DATA_SET")

    def _told_of_writing(self, share: float) -> None:
        self.told("the base writes texts", share)

    def _encoded(self, documents: Iterable[str]) -> Iterator[list[int]]:
        for document in documents:
            tokens = self._tokenizer(document)["input_ids"]
            yield from (tokens[start : start + self._length] for start in range(0, len(tokens), self._length))

    def _kept(self, digest: str) -> list[list[int]] | None:
        """From the run's folder; what was changed there does not count."""
        if self._folder is None:
            return None
        try:
            texts = json.loads(self._path(digest).read_text(encoding="utf-8"))
            return texts if digest_of(texts) == digest else None
        except (OSError, ValueError, TypeError):
            return None

    def keep(self, digest: str, texts: list[list[int]]) -> None:
        """Remember texts, in the run's folder too where there is one."""
        self.known[digest] = texts
        if self._folder is not None and self._folder.is_dir() and not self._path(digest).exists():
            self._path(digest).parent.mkdir(exist_ok=True)
            write_atomically(self._path(digest), json.dumps(texts, separators=(",", ":")))

    def _path(self, digest: str) -> Path:
        assert self._folder is not None
        if not digest.isalnum():
            raise UserError(f"edits: {digest[:40]!r} is no digest of texts")
        return self._folder / "texts" / f"{digest}.json"


def digest_of(texts: Sequence[Sequence[int]]) -> str:
    canonical = json.dumps([[int(token) for token in text] for text in texts], separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def _first(texts: Iterable[list[int]], n_tokens: int) -> Iterator[list[int]]:
    """Texts of n_tokens tokens together; the last one is cut."""
    left = n_tokens
    for text in texts:
        if left <= 0:
            return
        if text:
            yield list(text[:left])
            left -= len(text)


def _documents(path: Path, n_tokens: int) -> Iterator[str]:
    """Of a .jsonl file its rows' texts; of another the whole, as far as it can be needed. Raises UserError."""
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix != ".jsonl":
                yield file.read(min(MAX_FILE, BYTES_PER_TOKEN * n_tokens))
                return
            for number, line in enumerate(file, start=1):
                text = json.loads(line).get("text") if line.strip() else None
                if line.strip() and not isinstance(text, str):
                    raise UserError(f'texts: {path}, line {number}: expected an object with a "text"')
                yield text or ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"texts: {path} cannot be read as UTF-8 text: {error}") from error
    except (json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"texts: {path}: not one JSON object a line: {error}") from error


def _hub(name: str) -> Iterator[str]:
    """The texts of a data set's train split, read as they are needed. Raises UserError."""
    from datasets import load_dataset

    data_set, _, config = name.partition(":")
    try:
        rows = load_dataset(data_set, config or None, split="train", streaming=True)
        first: Any = next(iter(rows), {})
    except Exception as error:  # the hub's client has many errors and no class of its own for them
        raise UserError(f"texts: the data set {data_set} cannot be opened: {error}") from error
    if not isinstance(first.get("text"), str):
        raise UserError(f'texts: the rows of {data_set} have no "text"; they have {", ".join(map(str, first))}')
    for row in rows:
        yield str(row["text"])


@torch.no_grad()
def written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    n_tokens: int,
    seed: int,
    told: Callable[[float], None] = lambda _share: None,
) -> Iterator[list[int]]:
    """Texts that a model writes from its first token on, each token drawn as likely as the model has it.

    Where a text ends, the next one begins in the same row, as in the rows that models are trained on: no row waits for
    the longest. told: the share that is done. Of one device, seed and version the same; another device rounds
    otherwise, so the digest tells them apart.
    """
    config = model.config.get_text_config()
    starts = (tokenizer.bos_token_id, config.bos_token_id, tokenizer.eos_token_id)
    start = next((token for token in starts if token is not None), padding_token(tokenizer))
    length = min(TEXT_TOKENS, int(getattr(config, "max_position_embeddings", None) or TEXT_TOKENS), n_tokens)
    row_bytes = 2 * length * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    rows = max(1, min(WRITTEN_ROWS, WRITTEN_BYTES // row_bytes, -(-n_tokens // length)))
    ends = {start, tokenizer.eos_token_id, padding_token(tokenizer)}
    done = 0

    def step(ids: torch.Tensor, _scores: torch.Tensor) -> torch.Tensor:
        told(min(1.0, (done + ids.numel()) / n_tokens))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    for batch in count(seed):  # as many as are asked for
        for row in _written_rows(model, rows, length, start, batch, step):
            yield from ([start, *text] for text in _between(row, ends))
            done += len(row)


def _written_rows(
    model: PreTrainedModel, rows: int, length: int, start: int, seed: int, step: Callable[..., torch.Tensor]
) -> list[list[int]]:
    """Rows of `length` token ids that a model writes behind `start`, whatever ends a text. step: asked after each."""
    generator: Any = model
    usual, generator.generation_config = generator.generation_config, GenerationConfig(pad_token_id=start)
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            found = generator.generate(
                input_ids=torch.full((rows, 1), start, device=model.device),
                attention_mask=torch.ones(rows, 1, dtype=torch.long, device=model.device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_length=length,
                use_cache=True,
                stopping_criteria=StoppingCriteriaList([step]),
            )
    finally:
        generator.generation_config = usual
    return found.tolist()


def _between(row: Sequence[int], ends: set[int | None]) -> Iterator[list[int]]:
    """What stands between the ends of texts in a row."""
    return (list(text) for is_end, text in groupby(row, lambda token: token in ends) if not is_end)
