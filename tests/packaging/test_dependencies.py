"""What pyproject.toml declares is what the package imports, and constraints.txt pins it."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator

from house_metrics import ROOT, iterate_modules
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {
    "axe-playwright-python": "axe_playwright_python",
    "flash-attn": "flash_attn",
    "huggingface-hub": "huggingface_hub",
    "hydra-core": "hydra",
    "import-linter": "importlinter",
    "pillow": "PIL",
    "pytorch-optimizer": "pytorch_optimizer",
    "pyyaml": "yaml",
    "typing-extensions": "typing_extensions",
}
"""Top-level module of each distribution that is not named like it."""
UNSEEN = {
    "bitsandbytes": "by name, in training/optim.py",
    "pytorch_optimizer": "by name, in training/optim.py",
    "hydra-submitit-launcher": "a plugin of Hydra, in conf/launcher/slurm.yaml",
    "onnx": "through torch.onnx",
    "onnxscript": "through torch.onnx",
    "tensorboard": "through torch.utils.tensorboard",
    "transformers": "PEFT imports it; recipes/nano makes text encoders with it",
    "webdataset": "users read our shards with it; tests/unit/data/test_shards.py does",
}
"""Declared for users without an import in the package's code, and why."""


def list_requirements(*groups: str) -> dict[str, Requirement]:
    """List the declared requirements by the module that they provide, of the package itself or of extras."""
    optional = PROJECT["optional-dependencies"]
    texts = [text for group in groups for text in optional[group]] if groups else PROJECT["dependencies"]
    requirements = [Requirement(text) for text in texts]
    return {MODULES.get(one.name.lower(), one.name): one for one in requirements if one.name != PROJECT["name"]}


def iterate_imports(folder: str) -> Iterator[str]:
    """Yield the top-level name of each module that the files below a folder import."""
    for path in iterate_modules(folder):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]


def list_foreign_imports(folder: str) -> set[str]:
    """List the imported modules that belong neither to Python nor to us."""
    return set(iterate_imports(folder)) - sys.stdlib_module_names - {"sa3train", "helpers"}


EXTRAS = [name for name in PROJECT["optional-dependencies"] if name != "dev"]


def test_every_import_of_the_package_is_declared() -> None:
    optional = {*list_requirements("ui", "coreml", "export", "flash", "gguf", "openvino", "peers", "sweep", "mcp")}
    no_package = {"stable_audio_3"}  # bench/peers.py measures a clone of the official implementation
    assert list_foreign_imports("sa3train") - list_requirements().keys() - optional == no_package


def test_every_requirement_is_imported() -> None:
    declared = {*list_requirements(), *list_requirements(*EXTRAS)}
    assert declared - list_foreign_imports("sa3train") - UNSEEN.keys() == set()
    assert UNSEEN.keys() <= declared


def test_what_tests_import_is_declared() -> None:
    modules = [path for folder in ("tests", "recipes", "datasets") for path in iterate_modules(folder)]
    own = {name for path in modules for name in (path.stem, path.parent.name)}
    declared = {*list_requirements(), *list_requirements(*EXTRAS), *list_requirements("dev")}
    through_others = {"packaging", "torchgen"}  # of pytest, of torch
    imported = list_foreign_imports("tests") | list_foreign_imports("recipes") | list_foreign_imports("datasets")
    assert imported - own - declared - through_others == set()


def test_every_requirement_has_a_lower_bound_and_a_pin_within_its_bounds() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    not_pinned = {"flash-attn", "bitsandbytes"}  # for CUDA machines only
    for requirement in [*list_requirements().values(), *list_requirements(*EXTRAS).values()]:
        name = requirement.name.lower().replace("_", "-")
        assert any(part.operator == ">=" for part in requirement.specifier), f"{name} has no lower bound"
        if name not in not_pinned:
            assert name in pins, f"{name} is not in constraints.txt"
            assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]} is outside {requirement.specifier}"
