"""`sa3-bench`: costs as torch counts them, figures and tables, exit codes. No test looks at a time."""

import importlib
import json
import re
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.golden import GOLDEN
from sa3train.bench import adapters, decode, encode, generate, load, measure, peers, roofline, tasks
from sa3train.bench.checkpoints import build_model_config, make_random_checkpoint
from sa3train.bench.figures import Figure, Options, Record, _format_number, render_table, update_page
from sa3train.cli import bench
from sa3train.core.errors import ConfigError, SA3Error
from sa3train.models.checkpoint import build_modules, collect_state_dict, load_checkpoint
from sa3train.models.dit import DiT
from sa3train.models.parse import parse_model
from sa3train.models.text_source import TextEncoderSource


@pytest.mark.parametrize("arch", ["nano", pytest.param("small", marks=pytest.mark.slow), "medium"])
def test_counted_work_grows_with_steps_and_length(arch: str) -> None:
    config = parse_model(build_model_config(arch), arch)
    dit = replace(config.dit, depth=2)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in DiT(dit).parameters())
    one, three = (roofline.count_dit_sampling(dit, 10, 7, steps) for steps in (1, 3))
    step = (three.flops - one.flops) / 2
    assert (one.weights, three.weights) == (weights, 3 * weights)
    assert 0 < step < one.flops < 2 * step, "conditions are counted once, and are less than a step"
    assert 2 * step < roofline.count_dit_training(dit, 10, 7).flops < 4 * step
    for decodes in (False, True) if arch != "medium" else ():
        short, long = (roofline.count_same(config.autoencoder, frames, decodes) for frames in (40, 80))
        assert 1.9 * short.flops < long.flops < 2.1 * short.flops and short.weights == long.weights


@pytest.mark.parametrize("arch", ["small", "medium"])
def test_architectures_are_the_released_ones(arch: str) -> None:
    manifest = json.loads((GOLDEN / "state_dict_manifests.json").read_text(encoding="utf-8"))[arch]
    modules = build_modules(parse_model(build_model_config(arch), arch), TextEncoderSource((), ()))
    found = {name: list(tensor.shape) for name, tensor in collect_state_dict(modules).items()}
    shapes = {name: entry["shape"] if isinstance(entry, dict) else entry for name, entry in manifest.items()}
    assert found == {name: list(shape) for name, shape in shapes.items()}


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match="huge"):
        build_model_config("huge")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_random_checkpoint_is_made_once_and_generates(dtype: torch.dtype) -> None:
    folder = make_random_checkpoint("nano", dtype)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert make_random_checkpoint("nano", dtype) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    model = load_checkpoint(folder)
    start_BCT, conditions = generate.make_inputs(model, 1.0, "cpu")
    latents_BCT = generate.denoise(model, start_BCT, conditions, 2)
    assert latents_BCT.shape == start_BCT.shape
    assert 0.01 < latents_BCT.std() < 100
    counts = model.conditioner.count_tokens(["abc"])
    assert model.conditioner.encode_prompts(["abc"]).hidden_BLD.shape[:2] == (1, *counts)


def test_the_roofline_is_the_slower_of_computing_and_reading() -> None:
    rates = roofline.Rates(flops=100.0, weights=5.0)
    assert roofline.Cost(1000.0, 1.0).compute_seconds(rates) == 10.0
    assert roofline.Cost(1.0, 1000.0).compute_seconds(rates) == 200.0


def test_rates_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sa3train.bench.roofline._SHAPES", ((8, 16, 16),))
    rates = roofline.measure_rates(Options(dtype="fp32", repeats=1))
    assert rates.flops > 0
    assert rates.weights > 0


def test_tasks_run_in_turn_and_warm_up_is_not_measured() -> None:
    calls: list[str] = []
    timings = measure.time_interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2, warm_up=1
    )
    assert calls == ["a", "b"] * 3
    assert {name: len(rounds) for name, rounds in timings.rounds.items()} == {"a": 2, "b": 2}


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    rounds = {"a": [1.0, 2.0, 30.0], "b": [2.0, 2.0, 10.0]}
    timings = measure.Timings(rounds, rounds)
    assert timings.median("a") == 2.0
    assert timings.best("b") == 2.0
    figure = timings.compare("name", "a", "b", 1.5)
    assert (figure.name, figure.value, figure.target) == ("name", 1.0, 1.5)
    assert figure.note == "2.00 s against 2.00 s; rounds 0.5 to 3, in processor time 1"


def test_peak_of_allocated_bytes_counts_what_is_alive_together() -> None:
    size = 4 * 2**20

    def task() -> None:
        first = torch.empty(2**20)
        del first
        torch.empty(2**20).add_(1)

    assert size <= measure.measure_peak_allocation(task) < 2 * size


def test_memory_of_the_process_is_seen_to_rise() -> None:
    with measure.PeakMemory() as memory:
        held = torch.ones(2**24)  # to the end of the block, for the sampler to see
    assert held.all() and (memory.bytes == 0 or memory.bytes > 2**25)  # 0 where the system does not tell


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with measure.use_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_subprocess_returns_its_result_or_its_error() -> None:
    assert measure.run_in_subprocess(textwrap.wrap, "some words", 5) == ["some", "words"]
    with pytest.raises(SA3Error, match="JSONDecodeError"):
        measure.run_in_subprocess(json.loads, "{")
    with pytest.raises(SA3Error, match="stopped after"):
        measure.run_in_subprocess(time.sleep, 60, timeout=0.2)


def test_figures_know_their_target() -> None:
    assert Figure("f", 0.3, "×", 0.4).reached is True
    assert Figure("f", 0.5, "×", 0.4).reached is False
    assert Figure("f", 25.0, "", 20.0, ">=").reached is True
    assert Figure("f", 1.0, "s").reached is None
    text = render_table([Figure("fast", 0.312, "×", 0.4), Figure("slow", 1234.5, "s", note="why")])
    assert "| fast   | ≤ 0.4 × | 0.312 ×: reached |" in text
    assert "| slow   |         | 1234 s           |" in text
    assert text.endswith("- slow: why")
    assert [_format_number(value) for value in (0.01234, 12.3456, 123.4)] == ["0.0123", "12.3", "123"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let every benchmark return the given figures."""

    def answer(*figures: Figure) -> None:
        module = SimpleNamespace(run=lambda options: list(figures))
        monkeypatch.setattr("importlib.import_module", lambda name: module)

    return answer


@pytest.mark.parametrize(
    ("value", "flags", "code"), [(1.0, [], 0), (3.0, [], 0), (1.0, ["--check"], 0), (3.0, ["--check"], 1)]
)
def test_check_exits_with_1_when_a_target_is_missed(
    value: float, flags: list[str], code: int, measured: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    measured(Figure("time", value, "s", 2.0))
    assert bench.main(["decode", *flags]) == code
    out = capsys.readouterr().out
    assert "| time   | ≤ 2 s  |" in out
    assert ("missed targets: time" in out) == (value > 2)


def test_a_benchmark_that_fails_is_a_row_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- cpu: begin -->\n<!-- cpu: end -->\n", encoding="utf-8")

    def run(task: Callable[..., Any], name: str, options: dict[str, Any], timeout: float) -> dict[str, Any]:
        if name != "train":
            raise SA3Error("trace\nerror: no such thing" if name == "decode" else f"stopped after {timeout:g} s")
        machine = {"processor": "p", "load": 1, "cores": 2, "torch": "t", "python": "3"}
        return Record(name, Options(), [Figure("time", 1.0, "s", 2.0)], machine).as_json()

    monkeypatch.setattr(bench, "BENCHMARKS", dict.fromkeys(("decode", "load", "train"), "text"))
    monkeypatch.setattr(measure, "run_in_subprocess", run)
    assert bench.main(["all", "--update", str(page)]) == 0
    assert bench.main(["all", "--check"]) == 1
    out = capsys.readouterr().out
    assert "measuring decode ..." in out
    text = page.read_text(encoding="utf-8")
    assert all(part in text for part in ("not measured", "error: no such thing", "stopped after", "1 s: reached"))
    assert "missed targets: decode; load" in out


def test_figures_are_written_as_json(measured: Callable[..., None], tmp_path: Path) -> None:
    measured(Figure("time", 3.0, "s", 2.0, note="why"))
    assert bench.main(["decode", "--json", str(tmp_path / "a.json"), "--arch", "nano", "--repeats", "3"]) == 0
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert content["bench"] == "decode"
    assert content["options"]["arch"] == "nano"
    assert content["options"]["repeats"] == 3
    assert {"processor", "load", "torch", "command"} <= content["machine"].keys()
    assert content["figures"] == [
        {"name": "time", "value": 3.0, "unit": "s", "target": 2.0, "sense": "<=", "note": "why", "reached": False}
    ]


def test_a_page_keeps_what_was_not_measured_now(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- cpu: begin -->\nold\n<!-- cpu: end -->\nafter\n", encoding="utf-8")
    where = {"command": "c", "processor": "p", "load": 1, "cores": 2, "torch": "t", "python": "3"}
    update_page(page, [Record("decode", Options(), [Figure("first", 1.0, "s")], where)])
    update_page(page, [Record("load", Options(), [Figure("second", 2.0, "s")], where)])
    update_page(page, [Record("decode", Options(arch="nano"), [Figure("third", 3.0, "s")], where)])
    update_page(page, [Record("load", Options(), [Figure("fourth", 4.0, "s")], where)])
    update_page(page, [Record("load", Options(dtype="fp32"), [Figure("fifth", 5.0, "s")], where)])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- cpu: begin -->\n\n### decode\n")
    assert text.endswith("<!-- cpu: end -->\nafter\n")
    assert all(name in text for name in ("first", "third", "fourth", "fifth", "### decode, nano", "### load, fp32"))
    assert "second" not in text
    assert "old" not in text
    with pytest.raises(SA3Error, match="no section for cuda"):
        update_page(page, [Record("decode", Options(device="cuda"), [], where)])


def test_figures_replace_no_file_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "take.wav").write_text("precious")
    assert bench.main(["decode", "--json", str(tmp_path / "take.wav")]) == 1
    assert "must end in .json" in capsys.readouterr().err
    assert (tmp_path / "take.wav").read_text() == "precious"


def test_every_listed_benchmark_can_be_run() -> None:
    help_text = bench.build_parser().format_help()
    for name in bench.BENCHMARKS:
        assert f"  {name} " in help_text
        assert callable(importlib.import_module(f"sa3train.bench.{name}").run)


@pytest.mark.parametrize("flags", ["nothing", "", "decode --threads x", "decode --arch huge", "decode --dtype int4"])
def test_misuse_of_the_command_line_exits_with_2(flags: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(flags.split())
    assert stopped.value.code == 2


def test_a_missing_device_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        return
    assert bench.main(["decode", "--device", "cuda"]) == 1
    assert "device=cuda is not available" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--threads 0", "--repeats 99999", "--seconds nan", "--adapter-types diff",
                                   "--json /nowhere/x.json", "--json /", "--update /nowhere.md", "--update /bin/sh",
                                   "--steps 4"])  # fmt: skip
def test_options_are_checked_before_anything_is_measured(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["decode", *flags.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and flags.split()[0][2:] in error + "json update"


def test_a_benchmark_refuses_exactly_the_options_that_it_does_not_use() -> None:
    """What a benchmark reads of its options stands in its module, or in `measure_rates`."""
    modules = {name: Path(str(importlib.import_module(f"sa3train.bench.{name}").__file__)) for name in bench.BENCHMARKS}
    read = {name: set(re.findall(r"options\.(\w+)", path.read_text())) for name, path in modules.items()}
    for name, names in read.items():
        rates = {"device", "dtype", "repeats"} if "measure_rates" in modules[name].read_text() else set()
        names |= rates | ({"device"} if "is_cuda" in names else set())
    fields = set(Options.__dataclass_fields__)
    assert {name: fields - names for name, names in read.items()} == bench.UNUSED


def test_a_benchmark_runs_apart_with_its_options(measured: Callable[..., None]) -> None:
    measured(Figure("time", 1.0, "s", 2.0))
    options = json.loads(json.dumps(asdict(QUICK)))
    assert tasks.measure_benchmark("decode", options)["options"] == asdict(QUICK)


def test_flags_give_the_same_options_again() -> None:
    options = Options(arch="nano", repeats=2, adapter_types=("lora", "bora"), seconds=1.5)
    arguments = bench.build_parser().parse_args(["adapters", *bench._make_flags("adapters", options)])
    assert bench._make_options(arguments) == options


QUICK = Options(arch="nano", threads=1, repeats=1, seconds=0.5, steps=1, adapter_types=("lora",))


def run_here(task: Callable[..., Any], *arguments: object) -> Any:
    """Do what `run_in_subprocess` does, in this process."""
    with measure.use_threads(1):
        return json.loads(json.dumps(task(*json.loads(json.dumps(arguments)))))


@pytest.fixture
def quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (decode, encode, generate, adapters):
        monkeypatch.setattr(module, "measure_rates", lambda *_: roofline.Rates(1e11, 1e10))
    for module in (generate, load):
        monkeypatch.setattr(module, "run_in_subprocess", run_here)


@pytest.mark.usefixtures("quick_rates")
@pytest.mark.parametrize("module", [decode, encode, generate, adapters, load], ids=lambda module: module.__name__[-8:])
def test_benchmarks_run_on_nano(module: SimpleNamespace) -> None:
    figures = module.run(QUICK)
    assert len({figure.name for figure in figures}) == len(figures) >= 2
    assert all(figure.value == figure.value for figure in figures)
    assert all(
        figure.target is None for figure in figures if "memory" not in figure.name
    )  # they are for small and medium


@pytest.mark.slow
def test_peers_compute_the_same_and_a_missing_one_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_audio_3", None)
    figures = {figure.name: figure for figure in peers.run(replace(QUICK, dtype="fp32"))}
    missing = figures.pop("official / ours")
    assert missing.value is None and "stable_audio_3" in missing.note
    ratios = {name: figure for name, figure in figures.items() if " / ours" in name}
    assert len(ratios) == 5 and len(figures) == 8, "denoiser, frozen, lora, dora-rows, OpenVINO; memory of the training"
    for name, figure in ratios.items():
        assert f"{name.split(' / ')[0].lower()} 0." in figure.note or "openvino 20" in figure.note
        assert figure.sense == ">=" and figure.target is None
        assert float(re.findall(r"outputs (\S+) apart", figure.note)[0]) < 1e-5
