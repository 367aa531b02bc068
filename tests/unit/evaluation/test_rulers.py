"""Rulers of prompts: nano's on clips whose answer is known, CLAP on a tiny random model."""

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ClapAudioConfig,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapProcessor,
    ClapTextConfig,
    PreTrainedTokenizerFast,
)

from sa3train.audio.io import read_audio
from sa3train.core.errors import ConfigError
from sa3train.evaluation.rulers import AttributeRuler, ClapRuler, ClassRuler, list_rulers, measure_agreement
from sa3train.models.nano import ASSETS

RATE = 44100


def make_tone(frequency: float) -> torch.Tensor:
    wave = torch.sin(2 * math.pi * frequency * torch.arange(2 * RATE) / RATE)
    return 0.3 * wave.expand(2, -1)


def test_a_clip_agrees_with_its_own_name_and_not_with_another() -> None:
    audio_CN, _ = read_audio(ASSETS / "held_out" / "electric_piano.ogg")
    ruler = ClassRuler()
    own = ruler.measure(audio_CN, RATE, "A soft electric piano, chords")
    other = ruler.measure(audio_CN, RATE, "hi-hat loop")
    assert own is not None and other is not None and own > 0.3 > 0.1 > other
    assert ruler.measure(audio_CN, RATE, "warm vibes for a rainy day") is None, "nothing that it knows"
    assert ruler.measure(audio_CN, RATE, "Electric Pianos") is None, "whole words"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("low register, mono", 1.0),
        ("high register, mono", 0.5),
        ("bright, noisy", 0.0),
        ("from mono to stereo", None),
        ("a low volume", None),
    ],
)
def test_attributes_are_those_that_the_prompt_names(prompt: str, expected: float | None) -> None:
    assert AttributeRuler().measure(make_tone(110), RATE, prompt) == expected


@pytest.fixture(scope="module")
def clap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLAP model with random weights, and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("clap")
    vocabulary = {token: n for n, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    text = ClapTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=66, projection_dim=8,
    )  # fmt: skip
    audio = ClapAudioConfig(
        hidden_size=32, patch_embeds_hidden_size=8, depths=[1, 1, 1], num_attention_heads=[1, 2, 2], projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=8))
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_max_length=64,
    )  # fmt: skip
    ClapProcessor(ClapFeatureExtractor(), fast).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_clap_measures_the_similarity_of_clip_and_prompt(clap: Path) -> None:
    rulers = list_rulers(clap)
    ruler = rulers[-1]
    low, high = (ruler.measure(make_tone(f), RATE, "piano") for f in (110, 3000))
    assert low is not None and high is not None and -1 <= low <= 1 and low != high
    assert ruler.measure(make_tone(110), RATE, "drums") != low
    assert ruler.measure(make_tone(110), RATE, " ") is None
    assert set(measure_agreement(rulers, make_tone(110), RATE, "low register")) == {"attributes", "clap"}


def test_a_folder_without_a_clap_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no CLAP model"):
        ClapRuler(tmp_path)
