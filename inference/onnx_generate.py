"""Generate audio from a folder of `sa3-export`, with numpy, onnxruntime and tokenizers alone (docs/export.md).

python inference/onnx_generate.py nano-onnx -p "solo cello" --duration 5 --seed 7 -o cello.wav
"""

import argparse
import functools
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
    raw = rng.randint(0, 2**32, size + 16 * (size % 16 > 0), np.uint32)
    raw = np.delete(raw, slice(size // 16 * 16, size))  # an incomplete block is drawn again
    uniform = (raw & 0xFFFFFF).astype(np.float32).reshape(-1, 2, 8) / np.float32(1 << 24)
    radius, angle = np.sqrt(-2 * np.log(1 - uniform[:, 0])), np.float32(2 * np.pi) * uniform[:, 1]
    out = np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1).astype(np.float32).reshape(-1)
    return np.concatenate((out[: size - 16], out[-16:])).reshape(shape)


class Model:
    """The graphs of a folder, which must be those that its manifest lists."""

    def __init__(self, folder):
        manifest = folder / "manifest.json"
        self.facts = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
        if (self.facts.get("format"), self.facts.get("version")) != ("sa3train-onnx", 1):
            raise SystemExit(f"{folder} is not an export that this script reads. Give a folder of sa3-export.")
        for name, digest in self.facts["files"].items():
            if not (folder / name).is_file() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                raise SystemExit(f"{folder / name} has changed since the export. Export the model again.")
        self.rate, self.ratio = self.facts["sample_rate"], self.facts["samples_per_frame"]
        self.open = functools.cache(lambda name: onnxruntime.InferenceSession(folder / f"{name}.onnx"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation(), self.tokenizer.no_padding()

    def run(self, name, *inputs):
        return self.open(name).run(None, {i.name: x for i, x in zip(self.open(name).get_inputs(), inputs, strict=True)})

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
            inputs += [] if encodes else [draw(rng, *inputs[0].shape, is_noisy=noises["latent_noise"])]
            inputs.append(draw(rng, size, *noises[side]["token_shape"], is_noisy=noises[side]["token_noise"]))
            out[..., (start + kept) * outer : (start + size) * outer] = self.run(side, *inputs)[0][..., kept * outer :]
        return out


def sample(model, options, rng):
    """Latents (1, C, T) and the count of real frames."""
    facts, rate, ratio, seconds = model.facts, model.rate, model.ratio, options.duration
    frames = min(-(-int((seconds + facts["tail_seconds"]) * rate) // (2 * ratio)) * 2, facts["frames"]["max"])
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
            share = (difference * along).sum() / max((along**2).sum(), 1e-24)
            v = v - np.float32(options.cfg_scale - 1) * (difference - (share * along).astype(np.float32))
        x = x - t * v + after * (v if options.sampler == "euler" else draw(rng, *x.shape) - (x - t * v))
    return x, real


def read_wav(path, rate, length):
    try:
        with wave.open(str(path)) as file:
            channels = {(1, 2, rate): 1, (2, 2, rate): 2}[file.getparams()[:3]]
            samples = np.frombuffer(file.readframes(length), "<i2").reshape(-1, channels).T / np.float32(32768)
    except (OSError, EOFError, KeyError, ValueError, wave.Error):
        raise SystemExit(f"{path} is missing or not 16-bit WAV of {rate} Hz, mono or stereo. Convert it.") from None
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
    given = {name for name, value in vars(options).items() if value is not None}
    if ("inpaint_audio" in given) != ("inpaint" in given) or ("init_noise_level" in given) > ("init_audio" in given):
        parser.error("--inpaint-audio and --inpaint START END belong together, --init-noise-level needs --init-audio")
    if not all(each.parent.is_dir() and not each.is_dir() for each in (options.output, options.latents) if each):
        parser.error("--output and --latents must be files in folders that exist")
    model = Model(options.folder)
    vars(options).update({k: v for k, v in (DEFAULTS | model.facts["defaults"]).items() if k not in given})
    seconds = model.facts["frames"]["max"] * model.ratio / model.rate
    start, end = options.inpaint or (0, options.duration)
    if not (0 < options.duration <= seconds and options.steps > 0 and 0 < options.init_noise_level <= 1):
        parser.error(f"--duration is at most {seconds:.1f}, --steps at least 1, --init-noise-level within (0, 1]")
    if not 0 <= start < end <= options.duration:
        parser.error("--inpaint needs START before END, both from 0 to --duration")
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
