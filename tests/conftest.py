"""Shared by all tests: few threads, no network, a cache of its own, no deadlines; files that are slow."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


SLOW = ("integration/*.py", "standin_gpu/*.py", "standin_mps/*.py", "studio/*.py", "packaging/test_wheel.py")
SLOW += tuple(
    f"unit/{name}.py"
    for name in (
        "adapters/test_comfy_export", "adapters/test_odd_tensors", "adapters/test_peft_methods", "bench/test_bench",
        "cli/test_adapter", "cli/test_data", "cli/test_encode", "cli/test_generate", "cli/test_mcp",
        "cli/test_precedence", "cli/test_runtime", "cli/test_sweep", "cli/test_train", "data/test_encode",
        "data/test_imported", "data/test_stream", "export/test_onnx_files", "inference/test_cuda_graphs",
        "inference/test_generator",
        "inference/test_generator_adapters", "inference/test_golden_generate", "inference/test_loops_and_windows",
        "inference/test_openvino",
        "models/test_fp16_check", "models/test_hub", "nano/test_recipe", "reports/test_run_report",
        "studio/play/test_player", "studio/test_adapter_actions", "training/test_quantization", "training/test_resume",
        "training/test_validation",
    )
)  # fmt: skip
"""Files whose tests run whole commands, models, the stand-ins for GPUs or a browser: 0.2 s and more each on average."""


def is_slow(path: Path) -> bool:
    """Tell whether all tests of a file are slow."""
    return any(path.match(f"tests/{pattern}") for pattern in SLOW)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import slow files in the fast tier: the studio alone takes seconds."""
    return True if config.option.markexpr == "not slow" and is_slow(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow files."""
    for item in items:
        if is_slow(item.path):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Let the library cache (nano, text embeddings, SVD bases) in a folder of this session."""
    cache = tmp_path_factory.mktemp("cache")
    os.environ["SA3TRAIN_CACHE"] = str(cache)
    return cache


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """Start Debian's Chromium once for the session: playwright refuses a second one."""
    from helpers.chromium import launch_chromium

    with launch_chromium() as found:
        yield found
