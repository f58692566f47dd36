"""Greedy continuations, as lm-eval's HFLM writes them: left-padded batches, its stop rules, its trimming."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from gptailor.evaluate.examples import Encoder, Prompt
from gptailor.evaluate.scoring import NonFinite

Batch = tuple[int, ...]


def batches_of(prompts: Sequence[Prompt], encoder: Encoder, max_tokens: int) -> list[Batch]:
    """Prompts of equal settings and similar length together: indices, at most max_tokens tokens with their answers."""
    lengths = [len(ids) for ids in encoder.encode([prompt.text for prompt in prompts])]
    order = sorted(range(len(prompts)), key=lambda i: (str(_settings(prompts[i])), -lengths[i], i))
    batches: list[list[int]] = []
    for index in order:
        first = batches[-1][0] if batches else None
        fits = (
            first is not None
            and _settings(prompts[first]) == _settings(prompts[index])
            and (lengths[first] + prompts[first].max_new_tokens) * (len(batches[-1]) + 1) <= max_tokens
        )
        if fits:
            batches[-1].append(index)
        else:
            batches.append([index])
    return [tuple(batch) for batch in batches]


@torch.inference_mode()
def continue_prompts(model: PreTrainedModel, prompts: Sequence[Prompt], encoder: Encoder) -> list[str]:
    """The texts that greedy decoding writes after prompts of equal settings, cut at the first stop string."""
    from lm_eval.models.utils import postprocess_generated_text
    from lm_eval.models.utils_hf import stop_sequences_criteria

    tokenizer, settings = encoder.tokenizer, prompts[0]
    room = encoder.max_length - settings.max_new_tokens
    rows = [ids[-room:] for ids in encoder.encode([prompt.text for prompt in prompts])]
    width = max(len(ids) for ids in rows)
    padding = padding_token(tokenizer)
    ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    generator: Any = model  # the mixin's type is unknown to type checkers
    written = generator.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_length=width + settings.max_new_tokens,
        stopping_criteria=stop_sequences_criteria(tokenizer, list(settings.until), width, len(rows)),
        logits_processor=LogitsProcessorList([_OnlyFinite()]),
        pad_token_id=padding,
        use_cache=True,
        **dict(settings.settings),
    )
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in written[:, width:].tolist()]
    return [postprocess_generated_text(text, list(settings.until), None) for text in texts]


class _OnlyFinite(LogitsProcessor):
    """Passes scores on. Raises NonFinite: greedy decoding would make a text of NaN, too."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:  # noqa: ARG002 (transformers' signature)
        if not bool((scores < torch.inf).all()):  # minus infinity is how settings forbid a token
            raise NonFinite("the model's logits are not finite")
        return scores


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token HFLM pads with (lm_eval.models.utils.configure_pad_token)."""
    choices = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
    return next((token for token in choices if token is not None), 0)


def run_batches(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    batches: Sequence[Batch],
    encoder: Encoder,
    between: Callable[[], None],
) -> list[str]:
    """All prompts' continuations, batch by batch; `between` is called before each and may raise."""
    answers = [""] * len(prompts)
    for batch in batches:
        between()
        texts = continue_prompts(model, [prompts[i] for i in batch], encoder)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text
    return answers


def _settings(prompt: Prompt) -> tuple[object, ...]:
    return (prompt.until, prompt.max_new_tokens, prompt.settings)
