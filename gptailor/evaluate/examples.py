"""Examples as token ids: exactly the tokens on which lm-eval's HFLM scores the same documents.

Everything here is done once per run; trials only see integers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptailor.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Window:
    """A piece of text the model reads in one go: the last `n_scored` of `tokens` are predicted, the last not read."""

    tokens: tuple[int, ...]
    n_scored: int
    is_cut: bool = False

    @property
    def inputs(self) -> tuple[int, ...]:
        return self.tokens[:-1]


@dataclass(frozen=True)
class Prompt:
    """A text to continue greedily, with lm-eval's generation settings."""

    text: str
    until: tuple[str, ...]
    max_new_tokens: int
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Example:
    """One document of one task with its requests in lm-eval's order.

    Each request is a Prompt, or the windows over which log-likelihoods are summed (one, but for rolling perplexity).
    """

    task: int  # index among the benchmark's tasks
    doc: Any
    instances: tuple[Instance, ...]
    requests: tuple[tuple[Window, ...] | Prompt, ...]

    @property
    def windows(self) -> list[Window]:
        return [window for request in self.requests if isinstance(request, tuple) for window in request]

    @property
    def prompts(self) -> list[Prompt]:
        return [request for request in self.requests if isinstance(request, Prompt)]


class Encoder:
    """HFLM's tokenisation (TemplateLM._encode_pair, HFLM.tok_encode), in batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length
        bos = tokenizer.bos_token_id
        self.prefix_token = bos if bos is not None else tokenizer.eos_token_id
        if self.prefix_token is None:
            raise UserError("the base model's tokenizer has neither a beginning nor an end token; lm-eval needs one")
        self._prefix_text = str(tokenizer.decode(self.prefix_token))

    def encode(self, texts: Sequence[str], special: bool | None = None) -> list[list[int]]:
        """Token ids of each text. `special` as HFLM's add_special_tokens: None leaves it to tokenizer and text."""
        unique = list(dict.fromkeys(texts))
        ids: dict[str, list[int]] = {}
        if special is None:
            prefixed = [text for text in unique if text.startswith(self._prefix_text)]
            plain = [text for text in unique if not text.startswith(self._prefix_text)]
            if prefixed:
                ids.update(zip(prefixed, self.tokenizer(prefixed, add_special_tokens=False)["input_ids"], strict=True))
            if plain:
                ids.update(zip(plain, self.tokenizer(plain)["input_ids"], strict=True))
        elif unique:
            ids.update(zip(unique, self.tokenizer(unique, add_special_tokens=special)["input_ids"], strict=True))
        return [ids[text] for text in texts]

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Window]:
        """(context, continuation) texts as windows, cut from the left to the model's window. Raises UserError."""
        moved = [_move_spaces(context, continuation) for context, continuation in pairs]
        contexts = self.encode([context for context, _ in moved])
        wholes = self.encode([context + continuation for context, continuation in moved])
        bare = self.encode(["" if context else continuation for context, continuation in pairs], special=False)
        windows = []
        for (context, continuation), ids, whole, alone in zip(pairs, contexts, wholes, bare, strict=True):
            if context:
                scored = whole[len(ids) :]
            elif alone and alone[0] == self.prefix_token:
                ids, scored = alone[:1], alone[1:]
            else:
                ids, scored = [self.prefix_token], alone
            windows.append(self._window(ids, scored, continuation))
        return windows

    def _window(self, context: list[int], scored: list[int], text: str) -> Window:
        if not context or not scored:
            raise UserError(f"the answer {text[:60]!r} or its context has no tokens of its own to score")
        if len(scored) > self.max_length:
            raise UserError(
                f"the answer {text[:60]!r} has {len(scored)} tokens, more than the model's window of {self.max_length}"
            )
        whole, most = context + scored, self.max_length + 1
        return Window(tuple(whole[-most:]), len(scored), len(whole) > most)

    def cuts(self, example: Example) -> bool:
        """Whether some of what the example asks does not fit in the window, and is cut off on the left."""
        if any(window.is_cut for window in example.windows):
            return True
        texts = [prompt.text for prompt in example.prompts]
        rooms = [self.max_length - prompt.max_new_tokens for prompt in example.prompts]
        return any(len(ids) > room for ids, room in zip(self.encode(texts), rooms, strict=True))

    def rolling(self, texts: Sequence[str]) -> list[tuple[Window, ...]]:
        """Each text as the disjoint windows of lm-eval's rolling log-likelihood."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        result = []
        for ids in self.encode(texts):
            rolls = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token, max_seq_len=self.max_length, context_len=1
            )
            pairs = [make_disjoint_window(roll) for roll in rolls]
            result.append(tuple(self._window(context, scored, "") for context, scored in pairs))
        return result

    def prompt(self, text: str, settings: dict[str, Any]) -> Prompt:
        """A generation request; settings as in a task's generation_kwargs. Raises UserError for sampling."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        known = dict(normalize_gen_kwargs(settings, 256))
        if known.pop("do_sample", False) or known.pop("temperature", 0.0):
            raise UserError("the task samples its answers (do_sample or temperature); a search needs repeatable scores")
        eos = self.tokenizer.decode(self.tokenizer.eos_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(known.pop("until", None), eos=eos)
        n_new = int(known.pop("max_gen_toks"))
        if n_new >= self.max_length:
            raise UserError(f"the task generates up to {n_new} tokens; the model's window is {self.max_length}")
        return Prompt(text, tuple(until), n_new, tuple(sorted(known.items())))


def build_examples(groups: Sequence[tuple[int, Sequence[Instance]]], encoder: Encoder) -> list[Example]:
    """Tokenise documents, each given as (task index, its instances in order). Raises UserError."""
    scored: list[tuple[str, str]] = []
    rolled: list[str] = []
    for _, instances in groups:
        for instance in instances:
            if instance.request_type == "loglikelihood":
                scored.append((instance.args[0], instance.args[1]))
            elif instance.request_type == "loglikelihood_rolling":
                rolled.append(instance.args[0])
    windows = iter(encoder.pairs(scored))
    rolls = iter(encoder.rolling(rolled))
    read: dict[str, Callable[[Instance], tuple[Window, ...] | Prompt]] = {
        "loglikelihood": lambda _instance: (next(windows),),
        "loglikelihood_rolling": lambda _instance: next(rolls),
        "generate_until": lambda instance: encoder.prompt(*instance.args[:2]),
    }
    return [
        Example(task, instances[0].doc, tuple(instances), tuple(read[i.request_type](i) for i in instances))
        for task, instances in groups
    ]


def chat_renderer(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None) -> Callable[..., str]:
    """HFLM.apply_chat_template for this tokenizer, with HFLM's chat_template_args.

    Raises UserError where it has no chat template, or one that does not read these arguments.
    """
    import jinja2

    if not tokenizer.chat_template:
        raise UserError("chat_template: the base model's tokenizer has no chat template; set chat_template: false")
    _refuse_unread(tokenizer, arguments or {})

    def render(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        settings: dict[str, Any] = {
            **(arguments or {}),
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return str(tokenizer.apply_chat_template(history, **settings))
        except jinja2.exceptions.TemplateError:  # templates without a system role; lm-eval then drops it
            history = [message for message in history if message["role"] != "system"]
            try:
                return str(tokenizer.apply_chat_template(history, **settings))
            except jinja2.exceptions.TemplateError as error:  # also what transformers' sandbox keeps it from doing
                raise UserError(f"chat_template: the base model's chat template cannot be rendered: {error}") from error

    return render


_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""Tags of transformers' own."""
_GIVEN = ("messages", "add_generation_prompt", "tools", "documents", "raise_exception", "strftime_now")
"""What a chat template is given anyway."""


def _refuse_unread(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> None:
    """Raise UserError for an argument that the chat template does not look at: it would change nothing."""
    from jinja2 import Environment, TemplateError, meta

    templates = tokenizer.chat_template
    texts = templates.values() if isinstance(templates, dict) else [templates]
    syntax, read = Environment(extensions=["jinja2.ext.loopcontrols"]), set[str]()  # parsed only, never run
    for text in texts:
        with suppress(TemplateError):  # rendering says what is wrong with it
            read |= meta.find_undeclared_variables(syntax.parse(_MARKS.sub("", text)))
    read -= {*_GIVEN, *tokenizer.special_tokens_map}
    for name in arguments:
        if name not in read:
            there = ", ".join(sorted(read)) or "none"
            raise UserError(
                f"chat_template_args: the base model's chat template reads no {name!r}; settings that it reads: {there}"
            )


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Trailing spaces of the context belong to the continuation (TemplateLM._encode_pair)."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation
