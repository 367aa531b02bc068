"""Generate audio from a folder of `sa3-export`, with numpy, onnxruntime and tokenizers alone (docs/export.md)."""

import argparse
import functools
import hashlib
import json
import wave
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

DEFAULTS = {"duration": 30.0, "seed": 0, "init_noise_level": 0.9, "lora_strength": 1.0}
FLAGS = {int: "seed steps", float: "duration cfg-scale init-noise-level lora-strength"}
FLAGS |= {Path: "init-audio inpaint-audio latents lora"}
NEEDS = "inpaint inpaint_audio", "inpaint_audio inpaint", "init_noise_level init_audio", "lora_strength lora"


class Model:
    def __init__(self, folder):
        self.facts = json.loads(path.read_bytes()) if (path := folder / "manifest.json").is_file() else {}
        if (self.facts.get("format"), self.facts.get("version")) != ("sa3train-onnx", 3):
            raise SystemExit(f"{folder} is not an export that this script reads. Export with --to onnx.")
        for name, digest in self.facts["files"].items():
            if not (folder / name).is_file() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                raise SystemExit(f"{folder / name} has changed since the export. Export the model again.")
        self.rate, self.ratio = self.facts["sample_rate"], self.facts["samples_per_frame"]
        self.open = functools.cache(lambda name: onnxruntime.InferenceSession(folder / f"{name}.onnx"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def adapt(self, path, strength):
        """Set the inputs of an export with --lora-inputs: those in a file of `sa3-export scales`, zeros without one."""
        inputs, data = self.facts["lora_inputs"], memoryview(path.read_bytes() if path and path.is_file() else b"")
        if path and not (inputs["shapes"] and path.is_file()):
            raise SystemExit(f"{path} is missing." if inputs["shapes"] else "For --lora, export with --lora-inputs.")
        start = 8 + int.from_bytes(data[:8], "little")
        tensors = json.loads(bytes(data[8:start]) if data[8:9] == b"{" else "{}")
        needed = inputs["metadata"] | ({} if strength in (0, 1) else {"fixed": "false"})
        if path and (wrong := sorted(dict(needed.items() - tensors.pop("__metadata__", {}).items()))):
            raise SystemExit(f"{path} is not of this export and strength ({', '.join(wrong)}): use sa3-export scales.")
        self.lora = {name: np.full(size, 0 if size else strength, "<f4") for name, size in inputs["shapes"].items()}
        for name, each in tensors.items():
            self.lora[name] = np.frombuffer(data[start:][slice(*each["data_offsets"])], "<f4").reshape(each["shape"])

    def run(self, name, *inputs):
        names = [each.name for each in self.open(name).get_inputs()]
        given = dict(zip((each for each in names if each not in self.lora), inputs, strict=True))
        return self.open(name).run(None, given | {each: self.lora[each] for each in names if each in self.lora})

    def draw(self, *shape, is_noisy=True):
        """The numbers of `torch.randn` on the CPU: Mersenne Twister, Box-Muller in blocks of 16, the last one whole."""
        if not is_noisy:
            return np.zeros(shape, np.float32)
        size = int(np.prod(shape))
        raw = self.rng.randint(0, 2**32, size + 16 * (size % 16 > 0), np.uint32)
        uniform = np.delete(raw & 0xFFFFFF, slice(size // 16 * 16, size)).astype(np.float32).reshape(-1, 2, 8) / 2**24
        radius, angle = np.sqrt(-2 * np.log(1 - uniform[:, 0])), np.float32(2 * np.pi) * uniform[:, 1]
        out = np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1).astype(np.float32).reshape(-1)
        return np.concatenate((out[: size - 16], out[-16:])).reshape(shape)

    def convert(self, side, given):
        """Audio to latents ("encoder") or back ("decoder"), in overlapping chunks, each of which draws its noise."""
        noises, chunks, encodes = self.facts["noise"], self.facts["chunks"], side == "encoder"
        inner, outer = (self.ratio, 1) if encodes else (1, self.ratio)
        frames, overlap = given.shape[2] // inner, chunks["overlap"]
        size = chunks["size"] if chunks["enabled"] and frames > chunks["size"] else frames
        out = np.empty((1, self.facts["latent_channels"] if encodes else 2, frames * outer), np.float32)
        for start in sorted({*range(0, frames - size + 1, size - overlap), frames - size}):
            kept = overlap // 2 if start else 0  # where the part begins that this chunk contributes
            inputs = [np.ascontiguousarray(given[..., start * inner : (start + size) * inner])]
            inputs += [] if encodes else [self.draw(*inputs[0].shape, is_noisy=noises["latent_noise"])]
            inputs.append(self.draw(size, *noises[side]["token_shape"], is_noisy=noises[side]["token_noise"]))
            out[..., (start + kept) * outer : (start + size) * outer] = self.run(side, *inputs)[0][..., kept * outer :]
        return out

    def encode(self, path, frames):
        try:
            with wave.open(str(path)) as file:
                channels = {(1, 2, self.rate): 1, (2, 2, self.rate): 2}[file.getparams()[:3]]
                samples = np.frombuffer(file.readframes(frames * self.ratio), "<i2").reshape(-1, channels).T
        except (OSError, EOFError, KeyError, ValueError, wave.Error):
            raise SystemExit(f"{path} is missing or not 16-bit WAV of {self.rate} Hz. Convert it.") from None
        audio = np.pad(samples / np.float32(32768), ((0, 0), (0, frames * self.ratio - samples.shape[1])))
        return self.convert("encoder", np.broadcast_to(audio, (1, 2, audio.shape[1])))

    def sample(self, options):
        facts, rate, ratio, seconds = self.facts, self.rate, self.ratio, options.duration
        frames = min(-(-int((seconds + facts["tail_seconds"]) * rate) // (2 * ratio)) * 2, facts["frames"]["max"])
        real = min(-(-int(seconds * rate) // ratio) + int(facts["tail_seconds"] * rate / ratio), frames)
        sigma = np.float32(options.init_noise_level if options.init_audio else 1)
        x = self.draw(1, facts["latent_channels"], frames)
        if options.init_audio:
            x = self.encode(options.init_audio, frames) * (1 - sigma) + x * sigma
        local = np.zeros((1, 1 + x.shape[1], frames), np.float32)
        if options.inpaint_audio:
            at, (start, end) = np.arange(frames) * ratio, (int(each * rate) for each in options.inpaint)
            local[0, 0] = (at < int(seconds * rate)) & ((at < start) | (at >= end))
            local[0, 1:] = self.encode(options.inpaint_audio, frames)[0] * local[0, 0]
        ids = self.tokenizer.encode(options.prompt, add_special_tokens=False).ids[: facts["max_tokens"]]
        tokens = np.array([ids or [0]]), np.array([[bool(ids)] * max(1, len(ids))])
        cross, total = self.run("conditions", *tokens, np.array([seconds], np.float32))
        rows, cross = (1, cross) if options.cfg_scale == 1 else (2, np.concatenate((cross, 0 * cross)))
        prepared = self.run("prepare", cross, np.repeat(total, rows, 0), np.repeat(local, rows, 0))
        mask, (low, high) = np.repeat(np.arange(frames)[None] < real, rows, 0), facts["schedule"]["ends"]
        sigmas = 1 / (1 + np.exp(np.linspace(low + sigma * (high - low), low, options.steps + 1, dtype=np.float32)))
        sigmas[[0, -1]] = sigma, 0
        for t, after in np.stack((sigmas[:-1], sigmas[1:]), axis=1):
            v = self.run("step", np.repeat(x, rows, 0), mask, *prepared, np.full(rows, t))[0]
            if rows == 2:  # classifier-free guidance with adaptive projection, over the real frames
                v, difference = v[:1], v[1:] - v[:1]
                along = (x - t * v).astype(np.float64) * mask[:1, None]
                share = (difference * along).sum() / max((along**2).sum(), 1e-24)
                v = v - np.float32(options.cfg_scale - 1) * (difference - (share * along).astype(np.float32))
            x = x - t * v + after * (v if options.sampler == "euler" else self.draw(*x.shape) - (x - t * v))
        return x


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("-p", "--prompt", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--sampler", choices=("euler", "pingpong"))
    for kind, name in [(kind, name) for kind, names in FLAGS.items() for name in names.split()]:
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--inpaint", type=float, nargs=2, metavar=("START", "END"), help="seconds to regenerate")
    values = vars(options := parser.parse_args(argv))
    if lacking := [f"--{a} needs --{b}" for a, b in map(str.split, NEEDS) if values[a] is not None is values[b]]:
        parser.error(lacking[0].replace("_", "-"))
    if not all(each.parent.is_dir() and not each.is_dir() for each in (options.output, options.latents) if each):
        parser.error("--output and --latents must be files in folders that exist")
    model = Model(options.folder)
    values.update({k: v for k, v in (DEFAULTS | model.facts["defaults"]).items() if values[k] is None})
    longest, (start, end) = model.facts["max_seconds"], options.inpaint or (0, options.duration)
    if not (0 <= start < end <= options.duration <= longest and options.steps > 0 < options.init_noise_level <= 1):
        parser.error(f"need --steps > 0, 0 < --init-noise-level <= 1, 0 <= START < END <= --duration <= {longest:.1f}")
    model.rng = np.random.RandomState(options.seed & 0xFFFFFFFF)
    model.adapt(options.lora, options.lora_strength)
    latents = model.sample(options)
    audio = model.convert("decoder", latents)[0, :, : int(options.duration * model.rate)]
    if options.latents:
        np.save(options.latents, latents)
    with wave.open(str(options.output), "wb") as file:
        file.setnchannels(2), file.setsampwidth(2), file.setframerate(model.rate)
        file.writeframes(np.round(np.clip(audio.T, -1, 1) * 32767).astype("<i2").tobytes())


if __name__ == "__main__":
    main()
