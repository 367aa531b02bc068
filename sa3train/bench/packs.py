"""How nano's autoencoder keeps sounds that it was not trained on: packs of samples, rendered scores, held-out clips.

Packs are Debian packages, fetched with apt; scores are those of music21, played by FluidSynth with FluidR3. Where these
are not at hand, a figure says so. Of each pack `CLIPS` files are drawn, `SECONDS` of each at most. Shapes: C channels,
N samples, F bins, T frames of a spectrogram.
"""

import importlib
import random
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sa3train.audio.io import load_audio
from sa3train.audio.metrics import FFT_SIZE, HOP, compute_log_mel_distance
from sa3train.bench.figures import Figure
from sa3train.core.errors import AudioError, ConfigError
from sa3train.core.files import create_staging_dir, get_cache_dir
from sa3train.models.autoencoder import Autoencoder

RATE = 44100
CLIPS, SECONDS, TRIPS = 40, 6, 5
DEBIAN = {"sonic-pi-samples": (".flac",), "hydrogen-drumkits": (".flac", ".wav")}
"""Packages, and the files in them that are drawn from."""
SOUNDFONT = Path("/usr/share/sounds/sf2/FluidR3_GM.sf2")
PROGRAMS = (0, 4, 6, 11, 13, 16, 19, 21, 24, 27, 32, 40, 42, 46, 48, 52, 56, 57, 60, 65, 68, 71, 73, 79, 88, 104)
"""General MIDI programs; each score is played by one of them."""
MEASURES = 16
LEVEL_BAR, SPREAD_BAR, MEL_BAR, CEILING_BAR, RATIO_BAR, TRIPS_BAR = 0.5, 2.0, 4.5, 1.5, 3.0, 1.5  # dB


def measure_packs(autoencoder: Autoencoder, held_out: Path) -> list[Figure]:
    """Measure the autoencoder pack by pack.

    Args:
        autoencoder: The autoencoder.
        held_out: Folder of nano's own held-out clips.

    Returns:
        Figures of each pack, or one without a value for a pack that is not at hand.
    """
    sources: dict[str, Callable[[], list[Path]]] = {
        name: lambda name=name, suffixes=suffixes: draw_files(_fetch_package(name), suffixes)  # type: ignore[misc]
        for name, suffixes in DEBIAN.items()
    }
    sources |= {"music21's scores": _render_scores, "held-out clips": lambda: draw_files(held_out, (".ogg",))}
    figures = []
    for name, list_files in sources.items():
        try:
            figures += _measure_pack(autoencoder, name, list_files())
        except ConfigError as error:
            figures.append(Figure(f"autoencoder, {name}", None, "", note=str(error)))
    return figures


def draw_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Draw files from a folder and those below it, always the same.

    Args:
        folder: The folder.
        suffixes: Endings of the files' names.

    Returns:
        At most `CLIPS` files.
    """
    return draw([path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file()])


def draw(paths: Sequence[Path]) -> list[Path]:
    """Draw paths from those given.

    Args:
        paths: The paths.

    Returns:
        At most `CLIPS` of them.
    """
    return random.Random(0).sample(sorted(paths), min(CLIPS, len(paths)))


def _fetch_package(name: str) -> Path:
    """Fetch a Debian package into the cache, without installing it, and return its folder."""
    final = get_cache_dir() / "packs" / name
    if final.is_dir():
        return final
    try:
        with create_staging_dir(final) as folder:
            _run(["apt-get", "download", name], folder)
            _run(["dpkg-deb", "--extract", *map(str, folder.glob("*.deb")), str(folder / name)], folder)
            (folder / name).rename(final)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"not at hand: {_explain(error)}. Run it where apt-get can download {name}.") from error
    return final


def _render_scores() -> list[Path]:
    """Render the first bars of scores of music21's corpus, each with one instrument, once into the cache."""
    final = get_cache_dir() / "packs" / "scores"
    if not final.is_dir():
        try:
            with create_staging_dir(final) as folder:
                (folder / final.name).mkdir()
                _write_scores(folder / final.name)
                (folder / final.name).rename(final)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            advice = "Run it where music21, FluidSynth and FluidR3 (Debian: fluid-soundfont-gm) are installed."
            raise ConfigError(f"not at hand: {_explain(error)}. {advice}") from error
    return sorted(final.glob("*.wav"))


def _write_scores(folder: Path) -> None:
    music21 = importlib.import_module("music21")  # no requirement of this package
    if not SOUNDFONT.is_file():
        raise FileNotFoundError(f"no file {SOUNDFONT}")
    kinds = [".xml", ".mxl", ".krn", ".musicxml"]
    for number, path in enumerate(draw([Path(path) for path in music21.corpus.getCorePaths(fileExtensions=kinds)])):
        parsed = music21.corpus.parse(path)
        score = parsed.scores[0] if isinstance(parsed, music21.stream.Opus) else parsed
        player = music21.instrument.Instrument()
        player.midiProgram = PROGRAMS[number % len(PROGRAMS)]
        for part in score.parts:
            part.removeByClass("Instrument")
            for measure in part.getElementsByClass("Measure"):
                measure.removeByClass("Instrument")
            part.insert(0, player)
        target = folder / f"{number:02}_{path.stem}.wav"
        with tempfile.NamedTemporaryFile(suffix=".mid") as midi:
            score.measures(0, MEASURES).write("midi", midi.name)
            _run(["fluidsynth", "-ni", "-q", "-r", str(RATE), "-F", str(target), str(SOUNDFONT), midi.name], folder)


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, encoding="utf-8", errors="replace")


def _explain(error: Exception) -> str:
    said = str(getattr(error, "stderr", "") or error).strip().splitlines()
    return said[-1].rstrip(".")


def _measure_pack(autoencoder: Autoencoder, name: str, paths: list[Path]) -> list[Figure]:
    """Measure level, log-mel distance, SI-SDR and what more round trips lose."""
    levels, mels, ceilings, ratios, losses = [], [], [], [], []
    for path in paths:
        try:
            real_CN = load_audio(path)[:, : SECONDS * RATE]
        except AudioError:  # a file of the pack that is broken or no audio
            continue
        if not real_CN.any():
            continue
        trips = [real_CN]
        for seed in range(TRIPS):
            rng = torch.Generator().manual_seed(seed)  # the decoder makes hiss from its noise
            made_CN = autoencoder.decode(autoencoder.encode(trips[-1][None]), generator=rng)[0]
            trips.append(made_CN[:, : real_CN.shape[1]])
        levels.append(compute_level_change(real_CN, trips[1]))
        ratios.append(compute_scaled_sdr(real_CN, trips[1]))
        once, fresh, last = (
            compute_log_mel_distance(real_CN, each_CN, RATE) for each_CN in (trips[1], draw_phases(real_CN), trips[-1])
        )
        mels.append(once)
        ceilings.append(fresh)
        losses.append(last - once)
    low, middle, high = (float(torch.tensor(levels).quantile(share)) for share in (0.1, 0.5, 0.9))
    ceiling = statistics.median(ceilings)
    shown = f"median {middle:.1f} dB, 10% to 90% of {len(levels)} clips {low:.1f} to {high:.1f} dB"
    fresh_note = f"a copy with fresh random phases: {ceiling:.1f} dB"
    title = f"autoencoder, {name}"
    return [
        Figure(f"{title}: level, median from 0", abs(middle), "dB", LEVEL_BAR, note=shown),
        Figure(f"{title}: level, 10% to 90% within", max(abs(low), abs(high)), "dB", SPREAD_BAR),
        Figure(
            f"{title}: log-mel distance, median",
            statistics.median(mels),
            "dB",
            round(max(MEL_BAR, ceiling + CEILING_BAR), 2),
            note=fresh_note,
        ),
        Figure(f"{title}: SI-SDR, median", statistics.median(ratios), "dB", RATIO_BAR, ">="),
        Figure(f"{title}: log-mel lost by {TRIPS} trips over one", statistics.median(losses), "dB", TRIPS_BAR),
    ]


def compute_level_change(real_CN: Tensor, made_CN: Tensor) -> float:
    """Compute the energy of audio over that of a reference.

    Args:
        real_CN: Reference, not silent.
        made_CN: Audio.

    Returns:
        Ratio in dB.
    """
    energies = (made_CN.square().sum().clamp_min(1e-12), real_CN.square().sum())
    return float(10 * torch.log10(energies[0] / energies[1]))


def compute_scaled_sdr(real_CN: Tensor, made_CN: Tensor) -> float:
    """Compute the energy of a reference over that of the reference minus the best scaled audio.

    Args:
        real_CN: Reference, not silent.
        made_CN: Audio of the same shape.

    Returns:
        Ratio in dB, 0 at least.
    """
    scale = (real_CN * made_CN).sum() / made_CN.square().sum().clamp_min(1e-12)
    error = (real_CN - scale * made_CN).square().sum().clamp_min(1e-12)
    return float(10 * torch.log10(real_CN.square().sum() / error))


def draw_phases(audio_CN: Tensor) -> Tensor:
    """Give the spectrogram of audio fresh random phases, the same in all channels, and its former energy.

    Args:
        audio_CN: Audio.

    Returns:
        Audio (C, N).
    """
    window = torch.hann_window(FFT_SIZE)
    spectrum_CFT = torch.stft(audio_CN, FFT_SIZE, HOP, window=window, pad_mode="constant", return_complex=True)
    rng = torch.Generator().manual_seed(0)
    turns_FT = torch.rand(spectrum_CFT.shape[1:], generator=rng)
    fresh_CFT = spectrum_CFT * torch.polar(torch.ones_like(turns_FT), 2 * torch.pi * turns_FT)
    fresh_CN = torch.istft(fresh_CFT, FFT_SIZE, HOP, window=window, length=audio_CN.shape[1])
    return fresh_CN * (audio_CN.square().sum() / fresh_CN.square().sum().clamp_min(1e-12)).sqrt()
