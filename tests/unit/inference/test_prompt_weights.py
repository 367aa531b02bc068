"""Weights of phrases: what is one, which tokens it reaches, and the formula of the released MLX tools."""

from collections.abc import Callable

import pytest
import torch

from sa3train.inference import Generator
from sa3train.inference.prompt_weights import (
    encode_prompts,
    find_nested_weight,
    find_unread_weight,
    parse_prompt_weights,
)


@pytest.mark.parametrize(
    ("prompt", "text", "phrases"),
    [
        ("a (driving pulse:2) in the mix", "a driving pulse in the mix", {"driving pulse": 2.0}),
        ("(rhythm:2) and (silence:0.3)", "rhythm and silence", {"rhythm": 2.0, "silence": 0.3}),
        ("pad (low end :-1.5)", "pad low end ", {"low end": -1.5}),
        ("kick (909) and (warm) pads", "kick (909) and (warm) pads", {}),
        ("loop (tempo:120)", "loop (tempo:120)", {}),
        (r"the text \(pad:2\)", "the text (pad:2)", {}),
        ("(unclosed and (no weight)", "(unclosed and (no weight)", {}),
        ("sparse ((rhythm:2):3) tail", "sparse (rhythm:3) tail", {"rhythm": 2.0}),
        ("a:1.3) and ((b:1.3)", "a:1.3) and (b", {"b": 1.3}),
    ],
)
def test_a_group_that_ends_in_a_number_is_a_weight(prompt: str, text: str, phrases: dict[str, float]) -> None:
    clean, spans = parse_prompt_weights(prompt)
    assert clean == text
    assert {clean[start:end]: weight for start, end, weight in spans} == phrases


@pytest.mark.parametrize(
    ("prompt", "outer"),
    [
        ("sparse ((rhythm:2):3) tail", "((rhythm:2):3)"),
        ("(low (hum:2) and bells:0.5)", "(low (hum:2) and bells:0.5)"),
        ("(low (hum:2) and bells)", None),
        (r"\(take (hum:2):3\)", None),
        ("(hum:2) (bells:3)", None),
    ],
)
def test_a_weight_around_another_is_named(prompt: str, outer: str | None) -> None:
    assert find_nested_weight(prompt) == outer


@pytest.mark.parametrize(
    ("prompt", "unread"),
    [
        ("(koto:1.3", "(koto:1.3"),
        ("slow (koto:1.3, soft and (drums:2)", "(koto:1.3, soft and"),
        ("(koto: 1.3) solo", "(koto: 1.3)"),
        ("(koto:.8)", "(koto:.8)"),
        ("(mood: calm:1.3)", "(mood: calm:1.3)"),
        ("(koto:1.3) and (drums:2)", None),
        ("kick (909) and (warm pads, (unclosed", None),
        ("(tempo:120", None),
        ("(warm: and soft) at 1.3", None),
        (r"\(koto:1.3", None),
        ("sparse ((rhythm:2):3) tail", None),
    ],
)
def test_what_looks_like_a_weight_and_is_text_is_named(prompt: str, unread: str | None) -> None:
    assert find_unread_weight(prompt) == unread


def test_only_the_tokens_of_the_phrase_move_along_the_line_to_the_empty_embedding(gen: Generator) -> None:
    conditioner = gen.model.conditioner
    plain = encode_prompts(conditioner, ["low hum and bells", "rain"]).hidden_BLD
    weighted = encode_prompts(conditioner, ["low (hum:1.5) and bells", "rain"]).hidden_BLD
    encoding = conditioner.text_encoder.tokenizer.encode("low hum and bells", add_special_tokens=False)
    inside = torch.tensor([start < 7 and end > 4 for start, end in encoding.offsets])
    assert 0 < inside.sum() < len(inside)
    padding = conditioner.conditioners["prompt"].padding_embedding
    assert torch.equal(weighted[0, : len(inside)][~inside], plain[0, : len(inside)][~inside])
    assert torch.equal(weighted[1], plain[1])
    expected = padding + 1.5 * (plain[0, : len(inside)][inside] - padding)
    assert torch.allclose(weighted[0, : len(inside)][inside], expected, atol=1e-5)


def test_a_weight_of_one_or_none_changes_nothing(make: Callable[..., Generator]) -> None:
    conditioner = make().model.conditioner
    plain = conditioner.encode_prompts(["low hum"]).hidden_BLD
    assert torch.equal(encode_prompts(conditioner, ["low hum"]).hidden_BLD, plain)
    assert torch.equal(encode_prompts(conditioner, ["low (hum:1)"]).hidden_BLD, plain)
