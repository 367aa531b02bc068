#!/usr/bin/env python
"""Generate audio from a folder of `sa3-export`, with numpy, onnxruntime and tokenizers alone (docs/export.md).

python inference/onnx_generate.py nano-onnx -p "solo cello" --duration 5 --seed 7 -o cello.wav
python inference/onnx_generate.py nano-onnx -p "drum fill" --inpaint-audio in.wav --inpaint 2 4 -o out.wav
"""

import argparse
import hashlib
import json
import wave
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

DEFAULTS = {"duration": 30.0, "seed": 0, "init_noise_level": 0.9}
FLAGS = {"duration": float, "seed": int, "steps": int, "cfg_scale": float, "init_noise_level": float}
FLAGS |= {"init_audio": Path, "inpaint_audio": Path, "latents": Path}


def draw(rng, *shape, is_noisy=True):
    """The numbers of `torch.randn` on the CPU: Mersenne Twister, Box-Muller in blocks of 16."""
    if not is_noisy:
        return np.zeros(shape, np.float32)
    size = int(np.prod(shape))
    raw = rng.randint(0, 2**32, size, np.uint32)
    if size % 16:  # the last 16 are drawn again
        raw = np.concatenate((raw[: size // 16 * 16], rng.randint(0, 2**32, 16, np.uint32)))
    uniform = (raw & 0xFFFFFF).astype(np.float32).reshape(-1, 2, 8) / np.float32(1 << 24)
    radius, angle = np.sqrt(-2 * np.log(1 - uniform[:, 0])), np.float32(2 * np.pi) * uniform[:, 1]
    out = np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1).astype(np.float32).reshape(-1)
    return np.concatenate((out[: size - 16], out[-16:])).reshape(shape)


class Model:
    """The graphs of a folder, which must be those that its manifest lists."""

    def __init__(self, folder):
        self.facts = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if (self.facts["format"], self.facts["version"]) != ("sa3train-onnx", 1):
            raise SystemExit(f"{folder} is not an export that this script reads.")
        for name, digest in self.facts["files"].items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                raise SystemExit(f"{folder / name} has changed since the export. Export the model again.")
        self.folder, self.sessions = folder, {}
        self.rate, self.ratio = self.facts["sample_rate"], self.facts["samples_per_frame"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation(), self.tokenizer.no_padding()

    def run(self, name, *inputs):
        if name not in self.sessions:
            self.sessions[name] = onnxruntime.InferenceSession(self.folder / f"{name}.onnx")
        names = (each.name for each in self.sessions[name].get_inputs())
        return self.sessions[name].run(None, dict(zip(names, inputs, strict=True)))

    def convert(self, side, given, rng):
        """Audio to latents ("encoder") or back ("decoder"), in overlapping chunks, each of which draws its noise."""
        noises, chunks, encodes = self.facts["noise"], self.facts["chunks"], side == "encoder"
        inner, outer = (self.ratio, 1) if encodes else (1, self.ratio)
        frames, overlap = given.shape[2] // inner, chunks["overlap"]
        size = chunks["size"] if chunks["enabled"] and frames > chunks["size"] else frames
        out = np.empty((1, self.facts["latent_channels"] if encodes else 2, frames * outer), np.float32)
        for start in sorted({*range(0, frames - size + 1, size - overlap), frames - size}):
            kept = overlap // 2 if start else 0  # where the part begins that this chunk contributes
            inputs = [np.ascontiguousarray(given[..., start * inner : (start + size) * inner])]
            if not encodes:
                inputs.append(draw(rng, *inputs[0].shape, is_noisy=noises["latent_noise"]))
            inputs.append(draw(rng, size, *noises[side]["token_shape"], is_noisy=noises[side]["token_noise"]))
            out[..., (start + kept) * outer : (start + size) * outer] = self.run(side, *inputs)[0][..., kept * outer :]
        return out


def sample(model, options, rng):
    """Latents (1, C, T) and the count of real frames."""
    facts, rate, ratio, seconds = model.facts, model.rate, model.ratio, options.duration
    frames = -(-int((seconds + facts["tail_seconds"]) * rate) // ratio)
    frames = min(frames + frames % 2, facts["frames"]["max"])
    real = min(-(-int(seconds * rate) // ratio) + int(facts["tail_seconds"] * rate / ratio), frames)
    x, sigma = draw(rng, 1, facts["latent_channels"], frames), options.init_noise_level if options.init_audio else 1.0
    if options.init_audio:
        init = model.convert("encoder", read_wav(options.init_audio, rate, frames * ratio), rng)
        x = init * np.float32(1 - sigma) + x * np.float32(sigma)
    local = np.zeros((1, 1 + x.shape[1], frames), np.float32)
    if options.inpaint_audio:
        kept = np.arange(frames * ratio) < int(seconds * rate)
        kept[int(options.inpaint[0] * rate) : int(options.inpaint[1] * rate)] = False
        context = model.convert("encoder", read_wav(options.inpaint_audio, rate, frames * ratio), rng)
        local[0, 0], local[0, 1:] = kept[::ratio], context[0] * kept[::ratio]
    ids = model.tokenizer.encode(options.prompt, add_special_tokens=False).ids[: facts["max_tokens"]]
    tokens = np.array([ids or [0]]), np.array([[bool(ids)] * max(1, len(ids))])
    cross, total = model.run("conditions", *tokens, np.array([seconds], np.float32))
    rows, cross = (1, cross) if options.cfg_scale == 1 else (2, np.concatenate((cross, 0 * cross)))
    prepared = model.run("prepare", cross, np.repeat(total, rows, 0), np.repeat(local, rows, 0))
    mask = np.repeat(np.arange(frames)[None] < real, rows, 0)
    low, high = facts["schedule"]["at_data"], facts["schedule"]["at_noise"]
    sigmas = 1 / (1 + np.exp(np.linspace(low + sigma * (high - low), low, options.steps + 1, dtype=np.float32)))
    sigmas[[0, -1]] = sigma, 0
    for t, after in np.stack((sigmas[:-1], sigmas[1:]), axis=1):
        v = model.run("step", np.repeat(x, rows, 0), np.full(rows, t), mask, *prepared)[0]
        if rows == 2:  # classifier-free guidance with adaptive projection, over the real frames
            v, difference = v[:1], v[1:] - v[:1]
            along = (x - t * v).astype(np.float64) * mask[:1, None]
            along /= max(np.linalg.norm(along), 1e-12)
            difference -= ((difference * mask[:1, None] * along).sum() * along).astype(np.float32)
            v = v - np.float32(options.cfg_scale - 1) * difference
        x = x - t * v + after * (v if options.sampler == "euler" else draw(rng, *x.shape) - (x - t * v))
    return x, real


def read_wav(path, rate, length):
    with wave.open(str(path)) as file:
        if (file.getframerate(), file.getsampwidth()) != (rate, 2) or file.getnchannels() not in (1, 2):
            raise SystemExit(f"{path} must be 16-bit WAV of {rate} Hz, mono or stereo. Convert it first.")
        samples = np.frombuffer(file.readframes(length), "<i2").reshape(-1, file.getnchannels()).T / np.float32(32768)
        return np.pad(np.broadcast_to(samples, (2, samples.shape[1])), ((0, 0), (0, length - samples.shape[1])))[None]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("-p", "--prompt", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--sampler", choices=("euler", "pingpong"))
    for name, kind in FLAGS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind)
    parser.add_argument("--inpaint", type=float, nargs=2, metavar=("START", "END"), help="seconds to regenerate")
    options = parser.parse_args(argv)
    model = Model(options.folder)
    defaults = (DEFAULTS | model.facts["defaults"]).items()
    vars(options).update({name: value for name, value in defaults if getattr(options, name) is None})
    seconds = model.facts["frames"]["max"] * model.ratio / model.rate
    if not (0 < options.duration <= seconds and options.steps > 0 and 0 < options.init_noise_level <= 1):
        parser.error(f"--duration is at most {seconds:.1f}, --steps at least 1, --init-noise-level within (0, 1]")
    if (options.inpaint_audio is None) != (options.inpaint is None):
        parser.error("--inpaint-audio and --inpaint START END belong together")
    rng = np.random.RandomState(options.seed & 0xFFFFFFFF)
    latents, real = sample(model, options, rng)
    audio = model.convert("decoder", latents, rng)[0, :, : int(options.duration * model.rate)]
    audio[:, real * model.ratio :] = 0
    if options.latents:
        np.save(options.latents, latents)
    with wave.open(str(options.output), "wb") as file:
        file.setnchannels(2), file.setsampwidth(2), file.setframerate(model.rate)
        file.writeframes(np.round(np.clip(audio.T, -1, 1) * 32767).astype("<i2").tobytes())


if __name__ == "__main__":
    main()
