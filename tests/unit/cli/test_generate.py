"""`sa3-generate`: all modes, sidecars that make the same bytes again, and every kind of bad input."""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from helpers.audio import tone, write_clip
from helpers.golden import GOLDEN
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.cli.generate import main
from sa3train.cli.generate_args import build_parser, parse_adapters, parse_output
from sa3train.core.errors import GenerationError, SA3Error
from sa3train.core.files import hash_file
from sa3train.inference import Generator, generator, outputs
from sa3train.inference.settings import GenerationSettings

MODEL = str(GOLDEN / "plain")
ADAPTERS = GOLDEN / "plain" / "adapters"
LORA, DORA = ADAPTERS / "lora.safetensors", ADAPTERS / "dora-rows.safetensors"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*flags: Any, model: str = MODEL) -> int:
    quick = ["--model", model, "--duration", "0.3", "--steps", "2", "--seed", "3", "--device", "cpu"]
    return main([*quick, *(str(flag) for flag in flags)])


def replay_error(capsys: pytest.CaptureFixture[str], *flags: str, name: str = "a.wav.json") -> str:
    """The message with which a sidecar is refused."""
    capsys.readouterr()
    assert main(["--from", name, *flags]) == 1
    return capsys.readouterr().err


def fail_at(monkeypatch: pytest.MonkeyPatch, prompt: str | None) -> list[str]:
    """Let the generation of a prompt fail; the prompts that were asked for."""
    generate, asked = Generator.generate_from, list[str]()

    def fail(self: Generator, settings: GenerationSettings, **options: Any) -> Any:
        asked.append(settings.prompt[0])
        if settings.prompt[0] == prompt:
            raise GenerationError("no more")
        return generate(self, settings, **options)

    monkeypatch.setattr(Generator, "generate_from", fail)
    return asked


def sidecar(name: str = "a.wav.json") -> dict[str, Any]:
    return dict(json.loads(Path(name).read_text()))


def make_again(name: str = "a", suffix: str = ".wav") -> None:
    """Remove the audio, make it from its sidecar, and compare every byte."""
    before = Path(name + suffix).read_bytes()
    Path(name + suffix).unlink()
    assert main(["--from", f"{name}{suffix}.json"]) == 0
    assert Path(name + suffix).read_bytes() == before


# Every mode


def test_text_to_audio_and_again_from_its_sidecar(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-p", "low hum", "-o", "a.wav") == 0
    assert "a.wav: 0.30 s, seed 3, sidecar a.wav.json" in capsys.readouterr().out
    info = soundfile.info("a.wav")
    assert (info.samplerate, info.channels, info.frames, info.subtype) == (44100, 2, 13230, "PCM_16")
    record = sidecar()
    assert record["sha256"] == hash_file("a.wav")
    assert record["settings"] | {"steps": 2, "seed": 3, "cfg_scale": 7.0, "prompt": ["low hum"]} == record["settings"]
    assert record["environment"]["torch"] == torch.__version__
    make_again()
    assert "identical to the recorded file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "suffix", "subtype"),
    [
        (("--format", "wav24"), ".wav", "PCM_24"),
        (("--format", "wav32f"), ".wav", "FLOAT"),
        (("--format", "flac"), ".flac", "PCM_24"),
        (("-o", "output.flac"), ".flac", "PCM_24"),
    ],
)
def test_formats(flags: tuple[str, ...], suffix: str, subtype: str) -> None:
    assert run("-p", "low hum", *flags) == 0
    assert soundfile.info(f"output{suffix}").subtype == subtype
    make_again("output", suffix)


def test_a_random_seed_is_recorded() -> None:
    assert run("-p", "low hum", "--seed", "-1", "-o", "a.wav") == 0
    assert sidecar()["seed"] >= 0
    make_again()


def test_a_batch_with_a_prompt_negative_prompt_and_duration_each() -> None:
    flags = (
        "-p",
        "hum",
        "-p",
        "bells",
        "--negative-prompt",
        "harsh",
        "--negative-prompt",
        "thin",
        "--duration",
        "0.2",
        "0.4",
    )
    assert run(*flags, "-o", "a.wav") == 0
    assert [soundfile.info(f"a_{index}.wav").frames for index in range(2)] == [8820, 17640]
    assert sidecar("a_1.wav.json")["item"] == 1
    make_again("a_1")


def test_variations_of_one_prompt_and_prompts_from_a_file() -> None:
    assert run("-p", "hum", "--batch-size", 2, "-o", "a.wav") == 0
    assert Path("a_0.wav").read_bytes() != Path("a_1.wav").read_bytes()
    Path("prompts.txt").write_text("# two\nhum\n\nbells\n")
    assert run("--prompt-file", "prompts.txt", "-o", "b.wav") == 0
    assert sidecar("b_1.wav.json")["settings"]["prompt"] == ["hum", "bells"]


def test_items_at_a_time_are_batches_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("-p", "hum", "-p", "bells", "-p", "rain", "--duration", "0.2", "0.3", "0.4")
    assert run(*given, "--at-a-time", 2, "-o", "a.wav") == 0
    assert [soundfile.info(f"a_{index}.wav").frames for index in range(3)] == [8820, 13230, 17640]
    assert [sidecar(f"a_{index}.wav.json")["settings"]["prompt"] for index in (0, 1, 2)] == [["hum", "bells"]] * 2 + [
        ["rain"]
    ]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(",")[1] for line in said] == [" seed 3", " seed 3", " seed 4"]
    assert run("-p", "rain", "--duration", "0.4", "--seed", 4, "-o", "alone.wav") == 0
    assert Path("a_2.wav").read_bytes() == Path("alone.wav").read_bytes()
    for index in range(3):
        make_again(f"a_{index}")


def test_variations_at_a_time_and_a_limit_that_is_not_reached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sa3train.cli.generate.MANY_ITEMS", 2)
    assert run("-p", "hum", "--batch-size", 3, "--at-a-time", 2, "-o", "a.wav") == 0
    assert [sidecar(f"a_{index}.wav.json")["settings"]["batch_size"] for index in range(3)] == [2, 2, 1]
    assert "items at once" not in capsys.readouterr().err
    assert run("-p", "hum", "--batch-size", 3, "--at-a-time", 9, "-o", "b.wav") == 0
    assert run("-p", "hum", "--batch-size", 3, "-o", "c.wav") == 0
    assert "3 items at once: files are written when the last one is done" in capsys.readouterr().err
    assert Path("b_2.wav").read_bytes() == Path("c_2.wav").read_bytes()


def test_what_was_made_before_an_error_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = fail_at(monkeypatch, "c")
    assert run("-p", "a", "-p", "b", "-p", "c", "-p", "d", "--at-a-time", 1, "-o", "x.wav") == 1
    assert "error: no more" in capsys.readouterr().err
    assert asked == ["a", "b", "c"]
    assert sorted(path.name for path in Path().glob("x_*.wav")) == ["x_0.wav", "x_1.wav"]


def test_a_signal_leaves_whole_files_and_says_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = Generator.generate_from

    def stop(self: Generator, settings: GenerationSettings, **options: Any) -> Any:
        if settings.prompt[0] == "c":
            signal.raise_signal(signal.SIGINT)
        return generate(self, settings, **options)

    monkeypatch.setattr(Generator, "generate_from", stop)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    try:
        assert run("-p", "a", "-p", "b", "-p", "c", "-p", "d", "--at-a-time", 1, "-o", "x.wav") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "complete so far: x_0.wav, x_1.wav" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["x_0.wav", "x_0.wav.json", "x_1.wav", "x_1.wav.json"]
    make_again("x_1")


def test_a_second_run_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-p", "hum", "-o", "a.wav") == 0
    first = Path("a.wav").read_bytes(), Path("a.wav.json").read_bytes()
    assert run("-p", "bells", "-o", "a.wav") == 0
    said = capsys.readouterr()
    assert "a-2.wav: 0.30 s, seed 3, sidecar a-2.wav.json" in said.out
    assert "a.wav exists: saved as a-2.wav" in said.err
    assert (Path("a.wav").read_bytes(), Path("a.wav.json").read_bytes()) == first
    make_again("a-2")
    assert run("-p", "bells", "-o", "a.wav", "--overwrite") == 0
    assert Path("a.wav").read_bytes() == Path("a-2.wav").read_bytes()
    for _ in range(2):
        assert run("-p", "hum", "-p", "bells", "-o", "a.wav") == 0
    assert {"a_0.wav", "a_1.wav", "a-2_0.wav", "a-2_1.wav"} <= {path.name for path in Path().glob("*.wav")}


def test_a_repetition_restores_the_file_and_keeps_what_was_there() -> None:
    assert run("-p", "hum", "-o", "a.wav") == 0
    whole, recipe = Path("a.wav").read_bytes(), Path("a.wav.json").read_bytes()
    Path("a.wav").write_bytes(b"edited by hand")
    assert main(["--from", "a.wav.json"]) == 0
    assert (Path("a.wav").read_bytes(), Path("a-2.wav").read_bytes()) == (b"edited by hand", whole)
    assert main(["--from", "a.wav.json", "--overwrite"]) == 0
    assert (Path("a.wav").read_bytes(), Path("a.wav.json").read_bytes()) == (whole, recipe)
    assert main(["--from", "a.wav.json", "-o", "a.wav"]) == 0
    assert Path("a-3.wav").read_bytes() == whole


@pytest.mark.parametrize("name", ["take.wav", "./take.wav", "symbolic.wav", "hard.wav"])
@pytest.mark.parametrize("flag", ["--init-audio", "--inpaint-audio", "--lora", "--prompt-file"])
def test_no_output_replaces_an_input(flag: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_clip("take.wav", tone(0.3))
    Path("symbolic.wav").symlink_to("take.wav")
    Path("hard.wav").hardlink_to("take.wav")
    before = Path("take.wav").read_bytes()
    region = ("--inpaint-start", 0.1, "--inpaint-end", 0.2) if flag == "--inpaint-audio" else ()
    if flag == "--prompt-file":
        Path("take.wav").write_text("hum")
        before = b"hum"
    prompt = () if flag == "--prompt-file" else ("-p", "x")
    for more in ((), ("--overwrite",)):
        assert run(*prompt, flag, "take.wav", *region, "-o", name, *more) == 1
        assert "would replace the input take.wav" in capsys.readouterr().err
    assert Path("take.wav").read_bytes() == before


def test_prompts_that_an_adapter_carries_are_named_where_none_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter("a.safetensors", replace(load_adapter(LORA), metadata={"prompts": '["solo koto", "it\'s 5"]'}))
    assert run("--lora", "a.safetensors=0.5") == 1
    assert "  -p 'solo koto'\n  -p 'it'\"'\"'s 5'" in capsys.readouterr().err
    assert run("--lora", LORA) == 1
    assert "trained with" not in capsys.readouterr().err


def test_prompt_files_of_other_encodings_and_no_files(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("café\n", encoding="utf-16")
    assert run("--prompt-file", "a.txt", "-o", "a.wav") == 0
    assert sidecar()["settings"]["prompt"] == ["café"]
    Path("b.txt").write_text("  # no prompt\n koto\n")
    assert run("--prompt-file", "b.txt", "-o", "b.wav") == 0
    assert sidecar("b.wav.json")["settings"]["prompt"] == ["koto"]
    os.mkfifo("pipe")
    for path, reason in (("pipe", "named pipe"), ("/dev/zero", "device"), (".", "folder"), ("x" * 300, "be a path")):
        assert run("--prompt-file", path, "-o", "a.wav") == 1
        assert reason in capsys.readouterr().err


def test_files_are_written_while_the_next_items_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, write = fail_at(monkeypatch, None), outputs.write_files

    def wait(*arguments: Any) -> Any:
        """The first file waits for the second item."""
        deadline = time.monotonic() + 60
        while "b" not in asked and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "b" in asked
        return write(*arguments)

    monkeypatch.setattr(outputs, "write_files", wait)
    assert run("-p", "a", "-p", "b", "--at-a-time", 1, "-o", "x.wav") == 0
    assert Path("x_0.wav").exists() and Path("x_1.wav").exists()


@pytest.mark.parametrize("both", [False, True])
def test_an_error_in_writing_is_said(
    both: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(*_: Any) -> None:
        raise SA3Error("cannot write x_0.wav: the disk is full")

    fail_at(monkeypatch, "b" if both else None)
    monkeypatch.setattr(outputs, "write_files", fill)
    assert run("-p", "a", "-p", "b", "--at-a-time", 1, "-o", "x.wav") == 1
    said = capsys.readouterr().err
    assert "cannot write x_0.wav: the disk is full" in said and ("error: no more" in said) == both


def test_audio_to_audio_and_again_after_moving_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip("source.wav", tone(0.3, channels=1, sample_rate=22050), sample_rate=22050)
    assert run("-p", "bossa", "--init-audio", "source.wav", "-o", "a.wav") == 0
    record = sidecar()
    assert record["settings"]["init_noise_level"] == 0.9
    assert record["inputs"]["init_audio"] == {"path": "source.wav", "sha256": hash_file("source.wav")}
    make_again()
    shutil.copytree(tmp_path, tmp_path.parent / "moved")
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path.parent / "moved" / "a.wav").unlink()
    assert main(["--from", "moved/a.wav.json"]) == 0
    assert hash_file("moved/a.wav") == record["sha256"]


def test_inpainting_two_regions_of_a_surround_file() -> None:
    soundfile.write("six.wav", np.repeat(tone(1.0, channels=1), 6, axis=1) * 0.2, 44100)
    regions = ("--inpaint-start", 0.2, "--inpaint-start", 0.6, "--inpaint-end", 0.4, "--inpaint-end", 0.8)
    flags = ("-p", "kick", "--duration", 1, "--inpaint-audio", "six.wav", *regions)
    assert run(*flags, "-o", "a.wav") == 0
    assert sidecar()["settings"]["inpaint_mask_start_seconds"] == [0.2, 0.6]
    make_again()
    assert run(*flags, "--keep-exact", "-o", "b.wav") == 0
    assert Path("a.wav").read_bytes() != Path("b.wav").read_bytes()


def test_continuation_as_the_public_readme_writes_it() -> None:
    write_clip("input.wav", tone(0.5))
    flags = ("--inpaint-audio", "input.wav", "--inpaint-start", 0.5, "--inpaint-end", 1.0, "--duration", 1.0)
    assert run("-p", "dreamy synth outro", *flags, "-o", "out.wav") == 0
    assert soundfile.info("out.wav").duration == 1.0
    assert sidecar("out.wav.json")["warnings"] == []


def test_guidance_sampler_and_decoding_flags_reach_the_sidecar() -> None:
    flags = ("--sampler-type", "dpmpp", "--cfg-scale", 3, "--cfg-interval", 0.2, 0.9, "--cfg-norm-threshold", 4)
    more = ("--scale-phi", 0.4, "--apg-scale", 0.5, "--no-chunked-decode", "--no-half")
    assert run("-p", "hum", *flags, *more, "-o", "a.wav") == 0
    expected = {"sampler_type": "dpmpp", "cfg_scale": 3.0, "cfg_interval": [0.2, 0.9], "cfg_norm_threshold": 4.0}
    expected |= {"scale_phi": 0.4, "apg_scale": 0.5, "chunked_decode": False}
    assert sidecar()["settings"] | expected == sidecar()["settings"]
    assert sidecar()["precision"] == "fp32"
    make_again()


def test_adapters_with_strengths_intervals_and_layers() -> None:
    assert run("-p", "hum", "-o", "bare.wav") == 0
    assert run("-p", "hum", "--lora", f"{LORA}=0", "-o", "off.wav") == 0
    assert Path("off.wav").read_bytes() == Path("bare.wav").read_bytes()
    first = ("--lora", f"{LORA}=0.8@0.5-1", "--conditioner-strength", 0.2)
    second = ("--lora", f"{DORA}=0.5", "--exclude-layers", "layers[1-1], to_global_embed")
    assert run("-p", "hum", *first, *second, "-o", "a.wav") == 0
    one, two = sidecar()["adapters"]
    assert [(each["path"], each["sha256"]) for each in (one, two)] == [(str(p), hash_file(p)) for p in (LORA, DORA)]
    assert (one["strength"], one["interval"], one["conditioner_strength"]) == (0.8, [0.5, 1.0], 0.2)
    assert two["exclude_layers"] == ["layers[1-1]", "to_global_embed"]
    assert Path("a.wav").read_bytes() != Path("bare.wav").read_bytes()
    make_again()


def test_the_public_tool_s_adapter_flags() -> None:
    flags = ("--lora-ckpt-path", LORA, "--lora-ckpt-path", DORA, "--lora-strength", "0.3", "--lora-index", 1)
    assert run("-p", "hum", *flags, "-o", "a.wav") == 0
    assert [entry["strength"] for entry in sidecar()["adapters"]] == [1.0, 0.3]
    assert run("-p", "hum", "--lora-ckpt-path", LORA, "--lora-strength", "0.3", "-o", "b.wav") == 0
    assert [entry["strength"] for entry in sidecar("b.wav.json")["adapters"]] == [0.3]


def test_adapters_keep_the_order_of_the_command_line() -> None:
    flags = "--lora x=1 --lora-ckpt-path y --conditioner-strength 0.1 --lora z --allow-partial"
    parsed = parse_adapters(build_parser().parse_args(flags.split()))
    assert [entry["adapter"] for entry in parsed] == ["x", "y", "z"]
    assert parsed[1]["conditioner_strength"] == 0.1
    assert all(entry["allow_partial"] for entry in parsed)


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from sa3train.cli.generate import build_parser; text = build_parser().format_help(); "
        "assert '--lora PATH' in text; "
        "sys.exit(str({'torch', 'numpy', 'transformers', 'lightning', 'soundfile', 'hydra'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


# What has changed since


def test_a_changed_input_adapter_or_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(MODEL, "model", ignore=shutil.ignore_patterns("cases*", "adapters"))
    shutil.copy(LORA, "style.safetensors")
    write_clip("source.wav", tone(0.3))
    flags = ("-p", "x", "--lora", "style.safetensors", "--init-audio", "source.wav", "-o", "a.wav")
    assert run(*flags, model="model") == 0
    Path("a.wav").unlink()

    shutil.copy(DORA, "style.safetensors")
    assert "adapter style.safetensors has changed" in replay_error(capsys)
    Path("style.safetensors").unlink()
    assert "adapter style.safetensors is missing" in replay_error(capsys)
    shutil.copy(LORA, "style.safetensors")

    write_clip("source.wav", tone(0.3, 441.0))
    assert "input audio source.wav has changed" in replay_error(capsys)
    write_clip("source.wav", tone(0.3))

    weights = load_file("model/model.safetensors")
    weights["model.model.transformer.project_in.weight"] += 1
    save_file(weights, "model/model.safetensors")
    assert "model model has changed" in replay_error(capsys)
    assert not Path("a.wav").exists()
    assert main(["--from", "a.wav.json", "--model", MODEL]) == 0


def test_another_model_plays_the_same_with_the_defaults_of_its_kind() -> None:
    defaults = ["--duration", "0.3", "--seed", "3", "--device", "cpu"]
    assert main(["--model", "nano", "-p", "hum", *defaults, "-o", "a.wav"]) == 0
    assert main(["--from", "a.wav.json", "--model", MODEL, "--steps", "2"]) == 0
    one, other = sidecar()["settings"], sidecar("a-2.wav.json")["settings"]
    assert {name for name in one if one[name] != other[name]} == {"steps", "cfg_scale", "sampler_type"}
    assert (one["steps"], one["cfg_scale"]) == (8, 1.0) and (other["steps"], other["cfg_scale"]) == (2, 7.0)
    assert main(["--from", "a-2.wav.json", "--model", "nano", "-o", "b.wav"]) == 0
    back = sidecar("b.wav.json")["settings"]
    assert {name for name in one if one[name] != back[name]} == {"steps"}, "it was chosen, not a default"


def test_another_result_does_not_overwrite_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-p", "hum", "-o", "a.wav") == 0
    record = sidecar()
    record["sha256"] = record["audio_sha256"] = "0" * 64
    record["environment"]["torch"] = "1.0"
    Path("a.wav.json").write_text(json.dumps(record))
    error = replay_error(capsys)
    assert "differs from the recorded one (torch 1.0 is now" in error
    assert "a.wav was not overwritten" in error
    assert main(["--from", "a.wav.json", "-o", "b.wav"]) == 0
    assert Path("a.wav").read_bytes() == Path("b.wav").read_bytes()


def test_the_same_audio_in_other_bytes_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-p", "hum", "-o", "a.ogg") == 0
    assert main(["--from", "a.ogg.json", "-o", "b.ogg"]) == 0
    assert "same audio, different bytes" in capsys.readouterr().out


def test_what_was_never_a_file_or_a_seed_cannot_be_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    gen = Generator.from_pretrained(MODEL, device="cpu")
    quick: dict[str, Any] = {"prompt": "x", "duration": 0.2, "steps": 1}
    gen.generate(**quick, init_audio=(44100, torch.zeros(2, 4410)), init_noise_level=0.5).save("a.wav")
    assert "input audio was given as an array" in replay_error(capsys)
    gen.generate(**quick, generator=torch.Generator().manual_seed(1)).save("b.wav")
    assert "caller's own generator" in replay_error(capsys, name="b.wav.json")


def test_flags_of_many_items_beside_a_sidecar_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-p", "hum", "-o", "a.wav") == 0
    assert "--at-a-time, --batch-size cannot" in replay_error(capsys, "--batch-size", "4", "--at-a-time", "2")
    assert "prompt has 2 values" in replay_error(capsys, "-p", "a", "-p", "b")
    assert "records a .wav file" in replay_error(capsys, "-o", "a.flac")
    assert "--steps 0 must" in replay_error(capsys, "--steps", "0")


def test_a_sidecar_is_replayed_from_another_folder_and_after_a_move(monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(MODEL, "here/model", ignore=shutil.ignore_patterns("cases*", "adapters"))
    Path("here/out").mkdir()
    shutil.copy(LORA, "here/style.safetensors")
    write_clip("here/source.wav", tone(0.3))
    monkeypatch.chdir("here")
    flags = ("--lora", "style.safetensors", "--init-audio", "source.wav", "-o", "out/a.wav")
    assert run("-p", "hum", *flags, model="model") == 0
    monkeypatch.chdir("out")
    make_again()
    monkeypatch.chdir("../..")
    Path("here").rename("there")
    make_again("there/out/a")


def test_the_same_but_for_what_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    adapters = ("--lora", f"{LORA}=0.8@0.1-1", "--lora", f"{DORA}=0.5")
    assert run("-p", "hum", "-p", "bells", *adapters, "-o", "a.wav") == 0
    Path("elsewhere").mkdir()
    changes = ("--seed", "5", "-p", "rain", "--steps", "3", "--lora", f"{LORA}=0.3", "--format", "flac")
    assert main(["--from", "a_1.wav.json", *changes]) == 0
    record, before = sidecar("a_1.flac.json"), sidecar("a_1.wav.json")
    expected = before["settings"] | {"seed": 5, "prompt": ["hum", "rain"], "steps": 3}
    assert (record["settings"], record["subtype"], record["item"]) == (expected, "PCM_24", 1)
    one, two = record["adapters"]
    assert (one["strength"], one["interval"], two) == (0.3, [0.1, 1.0], before["adapters"][1])
    capsys.readouterr()
    assert main(["--from", "a_1.wav.json", "--seed", "3"]) == 0  # the seed it has: the same audio, as another file
    assert "a_1-2.wav: 0.30 s, seed 3" in capsys.readouterr().out
    assert Path("a_1.wav").read_bytes() == Path("a_1-2.wav").read_bytes()


def test_an_adapter_is_the_recorded_one_by_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, adapter in (("here", LORA), ("there", DORA)):
        Path(folder).mkdir()
        shutil.copy(adapter, f"{folder}/style.safetensors")
    shutil.copy(LORA, "there/copy.safetensors")
    monkeypatch.chdir("here")
    assert run("-p", "hum", "--lora", "style.safetensors", "-o", "a.wav") == 0
    monkeypatch.chdir("../there")
    for name, others, strengths in (("style", [], [0.5]), ("copy", [], [0.5]), ("style", ["copy"], [1.0, 0.5])):
        loras = [word for each in others for word in ("--lora", f"{each}.safetensors")]
        loras += ["--lora", f"{name}.safetensors=0.5", "-o", "b.wav", "--overwrite"]
        assert main(["--from", "../here/a.wav.json", *loras]) == 0
        found = {entry["path"]: entry["strength"] for entry in sidecar("b.wav.json")["adapters"]}
        assert list(found) == [f"{each}.safetensors" for each in (*others, name)]
        assert list(found.values()) == strengths


def test_a_run_folder_is_recorded_as_the_file_that_it_stands_for(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/run.json").write_text("{}")
    for name in ("adapter", "checkpoints/step-00000002"):
        shutil.copy(LORA, f"run/{name}.safetensors")
    assert run("-p", "hum", "--lora", "run", "--lora", "run@2", "-o", "a.wav") == 0
    make_again()
    shutil.copy(DORA, "run/adapter.safetensors")
    make_again()  # with the checkpoint that has the same adapter
    assert main(["--from", "a.wav.json", "--lora", "run=0.5", "-o", "b.wav"]) == 0
    found = [(entry["strength"], entry["fingerprint"]) for entry in sidecar("b.wav.json")["adapters"]]
    assert found == [(0.5, load_adapter(LORA).fingerprint), (1.0, load_adapter(LORA).fingerprint)]
    Path("run/checkpoints/step-00000002.safetensors").unlink()
    assert "adapter run/adapter.safetensors has changed" in replay_error(capsys)
    assert main(["--from", "a.wav.json", "--lora", "run=0.5", "-o", "c.wav"]) == 1, "the other is gone"


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(MODEL, "mine", ignore=shutil.ignore_patterns("cases*", "adapters"))
    assert main(["--list-models"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (shown["nano"], shown["./mine"]) == ("comes with sa3train", "folder")
    assert "huggingface.co" in shown["medium"]


# Bad input


def clip(name: str, bad: float | None = None) -> str:
    samples = tone(0.3)
    if bad is not None:
        samples[5] = bad
    soundfile.write(name, samples, 44100, subtype="FLOAT")
    return name


INPAINT = ("--inpaint-audio", "clip.wav")
BAD: list[tuple[tuple[Any, ...], str]] = [
    (("--model", "small-musik"), "small-musik"),
    (("--model", "nowhere/model"), "nowhere/model"),
    (("--model", "."), "model_config.json"),
    (("--model", "same-only"), "autoencoder"),
    (("--device", "abacus"), "device=abacus is unknown"),
    (("--lora", GOLDEN / "diff" / "adapters" / "lora.safetensors"), "fit"),
    (("--lora", "old.ckpt"), "pickle"),
    (("--lora", GOLDEN), "is no PEFT adapter"),
    (("--lora", "none.safetensors"), "There is no adapter at none.safetensors"),
    (("--lora", f"{LORA}=loud"), "strength 'loud'"),
    (("--lora", f"{LORA}=nan"), "strength 'nan'"),
    (("--lora", f"{LORA}@x-1"), "noise level 'x'"),
    (("--lora", f"{LORA}@0.9-0.1"), "noise levels 0.9 to 0.1 must be two numbers from 0 to 1"),
    (("--lora", LORA, "--conditioner-strength", "much"), "strength 'much' in --conditioner-strength much"),
    (("--lora-ckpt-path", LORA, "--lora-strength", "loud"), "strength 'loud' in --lora-strength loud"),
    (("--lora-ckpt-path", LORA, "--lora-strength", "1", "--lora-index", 3), "--lora-index 3"),
    (("--lora-strength", "1"), "--lora-strength applies to --lora-ckpt-path"),
    (("--lora-index", "0"), "--lora-index has no effect"),
    (("--allow-partial",), "--allow-partial has no effect"),
    (("--lora", LORA, "--exclude-layers", " ,"), "--exclude-layers has no effect"),
    (("--list-models",), "--list-models stands alone"),
    (("--init-audio", "nan.wav"), "NaN or infinite"),
    (("--init-audio", "missing.wav"), "cannot open missing.wav (it does not exist)"),
    (("--init-audio", "text.wav"), "cannot read text.wav"),
    ((*INPAINT, "--inpaint-start", 0.2, "--inpaint-end", 0.1), "ends before it starts"),
    ((*INPAINT, "--inpaint-start", 0.1, "--inpaint-end", 9), "ends after the duration of 0.3 s"),
    ((*INPAINT, "--inpaint-start", 0.1), "--inpaint-start and --inpaint-end"),
    ((*INPAINT, "--inpaint-start", 0, "--inpaint-start", 0.1, "--inpaint-end", 0.1), "2 values of --inpaint-start"),
    (INPAINT, "--inpaint-start and --inpaint-end"),
    (("--inpaint-start", 0.1, "--inpaint-end", 0.2), "no effect without --inpaint-audio"),
    (("--keep-exact",), "--keep-exact has no effect"),
    (("--duration", 0), "must be above 0"),
    (("--duration", -1), "must be above 0"),
    (("--duration", 4000), "--duration 4000"),
    (("--bars", 4), "--bars 4 needs a tempo"),
    (("--bars", 4, "--bpm", 120), "duration and --bars 4 both set the length"),
    (("--bpm", 120), "--bpm 120.0 has no effect without bars"),
    (("--tail", -1), "--tail -1.0 must be from 0 to 60"),
    (("--loop",), "--duration 0.3 is too short for loop"),
    (("--duration", 2, "--loop", *INPAINT, "--inpaint-start", 0, "--inpaint-end", 1), "--loop does not go with"),
    (("--peak", 3), "--peak 3.0 must be from -40 to 0"),
    (("--duration", 4, "--window", 2, "--init-audio", "clip.wav"), "--init-audio"),
    (("--prompt-at", 2, "x"), "--prompt-at 2 lies outside"),
    (("--lora", f"{LORA}=0..1"), "changes from window to window"),
    (("--lora", f"{LORA}=0..1", "--init-audio", "clip.wav"), "remove --init-audio"),
    (("--duration", 1, 2, 3, "-p", "a"), "prompt has 2 values for 3 items"),
    (("--cfg-scale", 1, "--negative-prompt", "x"), "--negative-prompt has no effect with --cfg-scale 1"),
    (("--init-noise-level", 0.5), "no effect without --init-audio"),
    (("--init-noise-level", 0.9), "--init-noise-level 0.9 has no effect without --init-audio"),
    (("--cfg-scale", 1, "--cfg-interval", 0, 1), "--cfg-interval has no effect with --cfg-scale 1"),
    (("--steps", 0), "--steps 0 must be from 1 to 1000"),
    (("--sampler-type", "heun"), "--sampler-type heun"),
    (("--prompt-file", "text.wav"), "exactly one of"),
    (("--at-a-time", "0"), "--at-a-time 0"),
    (("--duration", 1, 2, 3, "-p", "a", "--at-a-time", 1), "prompt has 2 values for 3 items"),
    (("--duration", 1, 1000, "-p", "a"), "--duration 1000"),
    (("-o", "text.wav/a.wav"), "is not a writable folder"),
    (("-o", "same-only"), "same-only: it is a folder"),
    (("-o", "later/"), "later/: it is a folder"),
    (("--no-half", "--precision", "bf16"), "--no-half means --precision fp32"),
    (("-o", "a.xyz"), "unknown suffix '.xyz'"),
    (("-o", "a.flac", "--format", "wav"), "--format wav writes .wav files, but -o names a.flac"),
    (("-o", "theirs.wav", "--overwrite"), "would replace theirs.wav.json"),
    (("--from", "none.json"), "no such sidecar"),
    *(((flag, "x" * 300), f"{flag} 'xxx") for flag in ("-o", "--model", "--device")),
    *(((flag, ""), "must not be empty") for flag in ("-o", "--model", "--device", "--init-audio")),
    (("--lora", "x" * 300), "There is no adapter at xxx"),
    (("--init-audio", "x" * 300), "--init-audio xxx"),
    (("--device", "meta"), "device=meta is unknown"),
    (("--steps", 10**9), "--steps 1000000000 must be from 1 to 1000"),
    (("--seed", 2**64), "--seed 18446744073709551616 must be from -1"),
    (("--duration", "inf"), "duration must be a number"),
    (("--batch-size", 10**9), "--batch-size 1000000000 must be from 1 to"),
    (("-p", "y", "--negative-prompt", "a b", "c", "d"), "prompt has 2 values for 3 items"),
    (("--batch-size", 10**4, "--duration", 120), "Out of memory while generating 10000 items"),
    (("--cfg-interval", 0.1, 0.11), "--cfg-interval 0.1 0.11 would have no effect"),
    (("--lora", f"{LORA}@0.1-0.11"), "noise levels 0.1 to 0.11 of"),
]


NEEDS_THE_MODEL = ("fit", "Out of memory while generating 10000 items")


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_line_and_exit_code_one_before_weights_are_read(
    flags: tuple[Any, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if message not in NEEDS_THE_MODEL:
        monkeypatch.setattr(generator, "load_checkpoint", lambda *_, **__: pytest.fail("weights are read"))
    clip("clip.wav")
    clip("nan.wav", float("nan"))
    Path("text.wav").write_text("this is text")
    Path("theirs.wav.json").write_text("{}")
    torch.save({"a": torch.zeros(1)}, "old.ckpt")
    shutil.copytree(MODEL, "same-only", ignore=shutil.ignore_patterns("cases*", "adapters", "t5gemma"))
    config = Path("same-only/model_config.json")
    model = json.loads(config.read_text())["model"]["pretransform"]["config"]
    config.write_text(json.dumps({"model_type": "autoencoder", "sample_rate": 44100, "model": model}))
    before = sorted(path.name for path in Path().iterdir())
    assert run("-p", "x", "-o", "out.wav", *flags) == 1
    error = capsys.readouterr().err
    assert sum(line.startswith("error: ") for line in error.splitlines()) == 1
    assert message in error
    assert "Traceback" not in error
    assert sorted(path.name for path in Path().iterdir()) == before


def test_nothing_to_generate_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("# none\n")
    for flags, message in (
        (("-o", "a.wav"), "exactly one of"),
        (("--prompt-file", "prompts.txt"), "contains no prompt"),
        (("--prompt-file", "none.txt"), "cannot read prompts from none.txt"),
    ):
        assert run(*flags) == 1
        assert message in capsys.readouterr().err
    assert "no such sidecar" in replay_error(capsys, name="none.json")


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """The process may write no file beyond 10 kB: the system refuses the rest as it does on a full disk."""
    flags = ["-p", "x", "--model", MODEL, "--device", "cpu", "--duration", "0.3", "--steps", "1", "-o", "a.wav"]
    done = subprocess.run(
        [sys.executable, "-m", "sa3train.cli.generate", *flags],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert done.returncode == 1
    assert "error: cannot write a.wav: File too large. Nothing was left behind" in done.stderr
    assert list(tmp_path.iterdir()) == []


def readme_commands() -> list[list[str]]:
    lines = (Path(__file__).parents[3] / "inference" / "README.md").read_text(encoding="utf-8").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("sa3-generate ")]


@pytest.mark.parametrize("flags", readme_commands(), ids=" ".join)
def test_the_readme_s_commands_are_understood(flags: list[str]) -> None:
    arguments = build_parser().parse_args(flags)
    if arguments.sidecar is None:
        assert parse_output(arguments)
        assert len(parse_adapters(arguments)) == sum(flag == "--lora" for flag in flags)


@pytest.mark.parametrize("name", ["music", "instruments", "effects"])
def test_the_prompt_files_hold_prompts(name: str) -> None:
    path = Path(__file__).parents[3] / "inference" / "prompts" / f"{name}.txt"
    prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert len(prompts) == 6


def test_the_script_is_the_command() -> None:
    script = Path(__file__).parents[3] / "inference" / "generate.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "sa3-generate" in done.stdout
