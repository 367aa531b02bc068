"""The text encoder loads when it is needed, from any T5Gemma file, and stays out of the adaptable model."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.golden import PLAIN
from sa3train.core.errors import CheckpointError
from sa3train.models.checkpoint import StableAudio3, load_checkpoint
from sa3train.models.conditioners import Conditioner, TextEmbedding, TextEncoder
from sa3train.models.text_source import TextEncoderSource


@pytest.fixture(scope="module")
def model() -> StableAudio3:
    return load_checkpoint(PLAIN, parts=("dit", "conditioner"))


def encoder_at(folder: Path) -> TextEncoder:
    return TextEncoder(TextEncoderSource((folder,), ()), 24)


def test_the_text_encoder_is_never_a_submodule(model: StableAudio3) -> None:
    conditioner = model.conditioner
    names = [f"conditioners.{name}" for name, _ in conditioner.conditioners.named_parameters()]
    conditioner(["a hum"], [3.0])
    assert conditioner.text_encoder.is_loaded
    assert names == [
        "conditioners.prompt.padding_embedding",
        "conditioners.seconds_total.embedder.embedding.1.weight",
        "conditioners.seconds_total.embedder.embedding.1.bias",
    ]
    assert {name for name, _ in conditioner.named_parameters()} == set(names)
    root = model.get_adapter_root()
    modules = dict(root.named_modules())
    assert root is model.get_adapter_root()
    assert isinstance(modules["model.transformer.layers.0.self_attn.to_qkv"], torch.nn.Linear)
    assert isinstance(modules["conditioners.seconds_total.embedder.embedding.1"], torch.nn.Linear)
    assert not any("T5" in type(module).__name__ for module in modules.values())


def test_cached_embeddings_never_load_it() -> None:
    conditioner = load_checkpoint(PLAIN, parts=("conditioner",)).conditioner
    text = TextEmbedding.join([torch.randn(5, 768), torch.randn(0, 768), torch.randn(24, 768)])
    found = conditioner.condition(text, torch.tensor([1.0, 2.0, 3.0]))
    assert not conditioner.text_encoder.is_loaded
    assert found.cross_attn_cond_BLD.shape == (3, 25, 768)
    assert found.prompt_mask_BL.sum(1).tolist() == [5, 0, 24]
    padding = conditioner.conditioners["prompt"].padding_embedding
    assert torch.equal(found.cross_attn_cond_BLD[1, :24], padding.expand(24, -1))


def test_split_and_join_are_inverse_and_batching_changes_nothing(model: StableAudio3) -> None:
    prompts = ["a slow low hum", "", "bells"]
    together = model.conditioner.encode_prompts(prompts)
    assert together.hidden_BLD.shape == (3, 14, 768)
    parts = together.split()
    again = TextEmbedding.join(parts)
    assert torch.equal(again.hidden_BLD, together.hidden_BLD)
    assert torch.equal(again.mask_BL, together.mask_BL)
    for prompt, part in zip(prompts, parts, strict=True):
        alone = model.conditioner.encode_prompts([prompt]).split()[0]
        torch.testing.assert_close(alone, part, atol=1e-5, rtol=0)


def test_long_prompts_can_be_told(model: StableAudio3) -> None:
    prompts = ["short", "x" * 24, "y" * 25]
    assert model.conditioner.max_length == 24
    assert model.conditioner.count_tokens(prompts) == [5, 24, 25]
    assert model.conditioner.count_tokens([]) == []
    assert model.conditioner.encode_prompts(prompts).mask_BL.sum(1).tolist() == [5, 24, 24]


def test_seconds_are_clamped(model: StableAudio3) -> None:
    seconds = model.conditioner.conditioners["seconds_total"]
    found = seconds(torch.tensor([-3.0, 0.0, 384.0, 1000.0]))
    assert found.shape == (4, 1, 768)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])


def test_released_files_hold_a_decoder_too_and_bf16(tmp_path: Path) -> None:
    """The released folder is a whole T5Gemma in BF16: the encoder is taken out of it and runs in BF16."""
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

    encoder = encoder_at(PLAIN / "t5gemma")
    config = T5GemmaConfig.from_pretrained(PLAIN / "t5gemma")
    whole = T5GemmaForConditionalGeneration(config)
    whole.model.encoder.load_state_dict(encoder.model(torch.device("cpu")).weights)
    whole.to(torch.bfloat16).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PLAIN / "t5gemma" / name, tmp_path)
    found = encoder_at(tmp_path)(["a slow low hum"], torch.device("cpu")).hidden_BLD
    wanted = encoder(["a slow low hum"], torch.device("cpu")).hidden_BLD
    assert found.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(found.float().flatten(), wanted.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_encoder_is_transformers_own(tmp_path: Path, dtype: torch.dtype) -> None:
    """Two layers, one with a window shorter than the prompt, keys shared by heads, random norms."""
    from transformers import AutoTokenizer, T5GemmaConfig, T5GemmaEncoderModel

    text = {
        **{"vocab_size": 260, "hidden_size": 96, "intermediate_size": 112, "num_hidden_layers": 2, "head_dim": 32},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 48, "sliding_window": 5},
        **{"layer_types": ["sliding_attention", "full_attention"], "attn_logit_softcapping": 0.5},
    }
    config = T5GemmaConfig(encoder=text, decoder=dict(text), is_encoder_decoder=False, vocab_size=260)
    torch.manual_seed(0)
    theirs = T5GemmaEncoderModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.to(dtype).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PLAIN / "t5gemma" / name, tmp_path)
    prompts = ["a slow low hum", "", "Glöckchen, leise"]
    found = encoder_at(tmp_path)(prompts, torch.device("cpu"))
    tokens = AutoTokenizer.from_pretrained(tmp_path)(
        prompts, add_special_tokens=False, padding="longest", padding_side="right", return_tensors="pt"
    )
    assert torch.equal(found.mask_BL, tokens.attention_mask.bool())
    with torch.no_grad():
        wanted = theirs(input_ids=tokens.input_ids.long(), attention_mask=tokens.attention_mask).last_hidden_state
    assert found.hidden_BLD.dtype == dtype
    wanted = torch.where(found.mask_BL[..., None], wanted, 0).float()
    torch.testing.assert_close(found.hidden_BLD.float(), wanted, atol=1e-4 if dtype == torch.float32 else 0.05, rtol=0)


def test_another_text_encoder_is_refused(tmp_path: Path) -> None:
    shutil.copytree(PLAIN / "t5gemma", tmp_path, dirs_exist_ok=True)
    config = tmp_path / "config.json"
    for old, new in (("gelu_pytorch_tanh", "silu"), ('"num_attention_heads"', '"heads"'), ("{", "[")):
        shutil.copy(PLAIN / "t5gemma" / "config.json", config)
        config.write_text(config.read_text().replace(old, new))
        with pytest.raises(CheckpointError, match="Copy the released folder"):
            encoder_at(tmp_path)(["hum"], torch.device("cpu"))


def test_release_gives_the_memory_back(model: StableAudio3) -> None:
    before = model.conditioner.encode_prompts(["bells"]).hidden_BLD
    model.conditioner.text_encoder.release()
    assert not model.conditioner.text_encoder.is_loaded
    assert torch.equal(model.conditioner.encode_prompts(["bells"]).hidden_BLD, before)


def test_bf16_conditioner_over_an_fp32_text_encoder() -> None:
    half: Conditioner = load_checkpoint(PLAIN, dtype=torch.bfloat16, parts=("conditioner",)).conditioner
    assert half.encode_prompts(["hum"]).hidden_BLD.dtype == torch.float32
    found = half(["hum"], [3.0])
    assert found.cross_attn_cond_BLD.dtype == found.global_cond_BD.dtype == torch.bfloat16


def test_wrong_inputs_are_refused(model: StableAudio3) -> None:
    with pytest.raises(ValueError, match="prompts is empty"):
        model.conditioner.encode_prompts([])
    long = TextEmbedding(torch.zeros(1, 25, 768), torch.ones(1, 25, dtype=torch.bool))
    with pytest.raises(ValueError, match="do not fit 24 tokens"):
        model.conditioner.condition(long, torch.ones(1))


def test_a_broken_text_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the text encoder is not in"):
        encoder_at(tmp_path)(["hum"], torch.device("cpu"))
    shutil.copytree(PLAIN / "t5gemma", tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        encoder_at(tmp_path)(["hum"], torch.device("cpu"))
    state = load_file(PLAIN / "t5gemma" / "model.safetensors")
    del state["encoder.norm.weight"]
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors of a T5Gemma encoder, such as encoder\.norm\.weight"):
        encoder_at(tmp_path)(["hum"], torch.device("cpu"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        encoder_at(tmp_path)(["hum"], torch.device("cpu"))
