r"""Weights of phrases in a prompt, `(phrase:1.3)`, as the MLX tools of Stable Audio 3 read and apply them.

Only a group that ends in a number within ±10 is a weight: a prompt that merely has parentheses stays as it is, and
`\(phrase:1.3\)` is the text itself. A weight w moves the text encoder's output e of a phrase's tokens to p + w (e - p),
where p is the model's learned embedding of an empty position. (ComfyUI computes the same with the encoder's output for
empty tokens as p, and reads a bare `(phrase)` as 1.1.) A token that reaches over the edge of a phrase, as where that
begins within a word, counts as inside; the MLX tools leave such a phrase unweighted.
"""

import re
from collections.abc import Sequence

from torch import Tensor

from sa3train.models.conditioners import Conditioner, TextEmbedding

MAX_WEIGHT = 10.0
_NUMBER = r"[+-]?\d+(?:\.\d+)?"
_GROUP = re.compile(rf"(?<!\\)\(([^():]+):({_NUMBER})\)|\\([()])")
_LIKE_GROUP = re.compile(r"(?<!\\)\([^()]+:\s*([+-]?\d*\.?\d+)\s*(?:\)|[^()]*(?=\(|$))")
_NESTED = re.compile(rf"(?<!\\)\([^()]*\([^():]+:{_NUMBER}\)[^()]*:{_NUMBER}\)")


def parse_prompt_weights(prompt: str) -> tuple[str, list[tuple[int, int, float]]]:
    """Parse the weights of a prompt.

    Args:
        prompt: The prompt as it was given.

    Returns:
        The prompt without weights, and (start, end, weight) of each phrase in its characters.
    """
    text, spans, read = "", list[tuple[int, int, float]](), 0
    for found in _GROUP.finditer(prompt):
        phrase = found[1] or found[3]
        if found[1] and abs(float(found[2])) > MAX_WEIGHT:  # such as (tempo:120)
            continue
        text, read = text + prompt[read : found.start()], found.end()
        if found[1]:
            start = len(text) + len(phrase) - len(phrase.lstrip())
            spans.append((start, len(text) + len(phrase.rstrip()), float(found[2])))
        text += phrase
    return text + prompt[read:], spans


def find_nested_weight(prompt: str) -> str | None:
    """Find a weight around another one, which is text: only the inner one counts, as in the MLX tools.

    Args:
        prompt: The prompt as it was given.

    Returns:
        The outer group; None where there is none.
    """
    found = _NESTED.search(prompt)
    return found and found[0]


def find_unread_weight(prompt: str) -> str | None:
    """Find what looks like a weight and is text: one that is not closed, or not written as `(phrase:1.3)`.

    Args:
        prompt: The prompt as it was given.

    Returns:
        The text; None where there is none.
    """
    like = (found for found in _LIKE_GROUP.finditer(prompt) if abs(float(found[1])) <= MAX_WEIGHT)
    return next((found[0].strip() for found in like if not _GROUP.fullmatch(found[0])), None)


def encode_prompts(conditioner: Conditioner, prompts: Sequence[str]) -> TextEmbedding:
    """Encode prompts, with their weights applied.

    Args:
        conditioner: The model's conditioner.
        prompts: Prompts as they were given.

    Returns:
        Hidden states; those of prompts without weights exactly as `Conditioner.encode_prompts` gives them.
    """
    parsed = [parse_prompt_weights(prompt) for prompt in prompts]
    texts = [text for text, _ in parsed]
    embedding = conditioner.encode_prompts(texts)
    if not any(spans for _, spans in parsed):
        return embedding
    hidden_BLD = embedding.hidden_BLD.float().clone()
    padding = conditioner.conditioners["prompt"].padding_embedding
    assert isinstance(padding, Tensor)
    padding_D = padding.detach().to(hidden_BLD)
    tokens = conditioner.text_encoder.tokenizer.encode_batch(texts, add_special_tokens=False)
    for hidden_LD, encoding, (_, spans) in zip(hidden_BLD, tokens, parsed, strict=True):
        for index, (first, last) in enumerate(encoding.offsets[: conditioner.max_length]):
            for start, end, weight in spans:
                if first < end and last > start and weight != 1.0:  # a token that straddles the edge counts as inside
                    hidden_LD[index] = padding_D + weight * (hidden_LD[index] - padding_D)
    return TextEmbedding(hidden_BLD, embedding.mask_BL)
