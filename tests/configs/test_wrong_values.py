"""Every setting refuses what it cannot use, by its name: the values to try are derived from the declarations."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sa3train.bench.figures import Options
from sa3train.cli import encode, train
from sa3train.cli.encode import EncodeConfig
from sa3train.cli.hydra_app import register_resolvers
from sa3train.cli.train_config import TrainConfig
from sa3train.core.config import MAX_TEXT, Setting, build, list_settings
from sa3train.core.errors import SA3Error
from sa3train.studio.server.access import AccessSettings

HUGE = 10**400
NEEDED: dict[str, tuple[type, list[str]]] = {
    "train": (TrainConfig, ["data.dir=latents", "data.more=[{path: other}]"]),
    "encode": (EncodeConfig, ["source=audio", "out=latents"]),
    "bench": (Options, []),
    "studio": (AccessSettings, []),
}
Declared = tuple[str, Any, Setting]


def list_declared(schema: Any, prefix: str = "") -> Iterator[Declared]:
    """List the key, type and declaration of every setting, those of list items as `key[0].name`."""
    hints = typing.get_type_hints(schema)
    declarations = list_settings(schema)
    for field in dataclasses.fields(schema):  # in order, since test workers compare what they collect
        key, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from list_declared(kind, f"{key}.")
            continue
        assert field.name in declarations, f"{key} is not declared by `setting`"
        yield key, kind, declarations[field.name]
        item = typing.get_args(kind)[0] if typing.get_origin(kind) in (list, tuple) else None
        if dataclasses.is_dataclass(item):
            yield from list_declared(item, f"{key}[0].")


DECLARED = {job: list(list_declared(schema)) for job, (schema, _) in NEEDED.items()}


def list_types(kind: Any) -> tuple[Any, ...]:
    """List the types that a single value may have, without containers around it."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(found for option in typing.get_args(kind) for found in list_types(option))
    if typing.get_origin(kind) is dict:
        return list_types(typing.get_args(kind)[1])
    if typing.get_origin(kind) in (list, tuple):
        return list_types(typing.get_args(kind)[0])
    return (type(None),) if kind is None else (kind,)


def wrap(kind: Any, declared: Setting, value: Any) -> Any:
    """Put a wrong item into the list or mapping that a setting takes."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    for option in options:
        if typing.get_origin(option) is dict:
            return {"to_q": value}
        if typing.get_origin(option) in (list, tuple):
            return [value] * max(1, declared.items[0])
    return value


def list_wrong_numbers(found: tuple[Any, ...], declared: Setting) -> Iterator[Any]:
    """List numbers that a setting must refuse."""
    yield from (math.nan, math.inf, -math.inf, HUGE, -HUGE)
    if declared.min is not None or declared.max is not None:
        step = 1 if int in found else 1e-6
        yield from (limit + sign * step * max(1, abs(limit)) for limit, sign in ((declared.min, -1), (declared.max, 1))
                    if limit is not None)  # fmt: skip
    yield from (limit for limit in (declared.above, declared.below) if limit is not None)
    if int in found and float not in found:
        yield 1.5


def list_wrong_texts(declared: Setting) -> Iterator[str]:
    """List texts that a setting must refuse."""
    yield from ("x" * (min(declared.characters, MAX_TEXT) + 1), "a\0b", "a\ud800")
    if declared.text != "any":
        yield from ("", "  ")
    if declared.text == "path":
        yield from ("x" * 300, "folder/" + "x" * 300, "folder/" * 1000)


def list_wrong_values(kind: Any, declared: Setting) -> Iterator[Any]:
    """List values that a setting must refuse, as its declaration says."""
    found = list_types(kind)
    if dataclasses.is_dataclass(found[0]):
        yield from (3, "text", {}, [3], [None], [{"unknown": 1}], None)
        return
    literal = typing.Literal in map(typing.get_origin, found)
    if Any in found:  # options of a library: only what no library takes
        yield from ({"x": math.nan}, {"x": [math.inf]}, 3, "text", None)
        return
    if int in found or float in found:
        yield from (wrap(kind, declared, value) for value in list_wrong_numbers(found, declared))
        yield from (wrap(kind, declared, value) for value in (True, {}, [[]]))
    if str in found and not declared.choices:
        yield from (wrap(kind, declared, text) for text in list_wrong_texts(declared))
    if str not in found:
        yield from ("no such value", "")
    if literal or declared.choices:
        yield from ([], "no such value") if wrap(kind, declared, 0) != [0] else (["no such value"], "text")
    if bool in found:
        yield from ("yes", 1, [], math.nan)
    if float not in found and int not in found and bool not in found:
        yield from (3, 1.5, True)
    if type(None) not in found:
        yield None
    low, high = declared.items
    if isinstance(wrap(kind, declared, 0), list):
        yield from ([] if low else [None], ["x"] * (high + 1))


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    """The shipped configurations, composed once."""
    register_resolvers()
    with pytest.MonkeyPatch.context() as patch, initialize_config_module("sa3train.conf", version_base="1.3"):
        patch.setenv("SA3TRAIN_RUN_STAMP", "stamp")
        return {
            job: OmegaConf.to_container(compose(job, needed), resolve=True) if needed else dataclasses.asdict(schema())
            for job, (schema, needed) in NEEDED.items()
        }


def replace_value(values: Any, key: str, value: Any) -> Any:
    """Copy nested values with another value at a key such as `data.more[0].path`."""
    name, _, rest = key.partition(".")
    name, bracket, _ = name.partition("[")
    if not rest:
        return values | {name: value}
    if bracket:
        return values | {name: [replace_value(values[name][0], rest, value)]}
    return values | {name: replace_value(values[name], rest, value)}


every_setting = pytest.mark.parametrize(
    ("job", "key", "kind", "declared"),
    [pytest.param(job, *found, id=f"{job}:{found[0]}") for job, listed in DECLARED.items() for found in listed],
)


@every_setting
def test_wrong_values_are_refused_by_the_name_of_their_setting(
    job: str, key: str, kind: Any, declared: Setting, composed: dict[str, Any]
) -> None:
    for value in list_wrong_values(kind, declared):
        try:
            build(NEEDED[job][0], replace_value(composed[job], key, value))
        except SA3Error as error:
            message = str(error)
        else:
            pytest.fail(f"{key}={str(value)[:80]} is accepted")
        assert key.replace("[0]", "").rpartition(".")[2] in message, f"{message} does not name {key}"
        assert len(message) < 2000, "a message is no place for a huge value"


def test_every_number_has_a_declared_range() -> None:
    numbers = [each for listed in DECLARED.values() for each in listed if {int, float} & set(list_types(each[1]))]
    unlimited = [key for key, _, found in numbers if found.min is None and found.above is None]
    unlimited += [key for key, _, found in numbers if found.max is None and found.below is None]
    assert numbers and unlimited == []


def test_the_declared_defaults_are_allowed(composed: dict[str, Any]) -> None:
    assert build(TrainConfig, composed["train"]).data.more[0].path == "other"
    assert build(EncodeConfig, composed["encode"]).shard_mb == 512


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_number_inside_its_range_is_taken_and_one_outside_is_not(data: st.DataObject) -> None:
    declared = [(key, kind, found) for found_job in DECLARED.values() for key, kind, found in found_job]
    key, _, found = data.draw(st.sampled_from([each for each in declared if each[2].describe_range()]))
    number = data.draw(st.floats() | st.integers())
    low = found.min if found.min is not None else found.above
    high = found.max if found.max is not None else found.below
    assert low is not None and high is not None
    inside = low <= number <= high and number not in (found.above, found.below)
    assert (found.find_problem(number) == "") == inside, key


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["trainer.threads=99999999999999"], "trainer.threads"),
        (["seed=-1"], "seed"),
        (["seed=" + "9" * 30], "seed"),
        (["seed=" + "9" * 5000], "seed"),
        (["adapter.rank_pattern={a:" + "9" * 5000 + "}"], "adapter.rank_pattern"),
        (["adapter.rank_pattern={a:1}", "adapter.rank_pattern.b=2"], "adapter.rank_pattern"),
        (["data.crop_seconds=inf"], "data.crop_seconds"),
        (["optimizer.lr=nan"], "optimizer.lr"),
        (["loss.weighting=[0,0]"], "loss.weighting"),
        (["loss.inpainting={full:nan}"], "loss.inpainting"),
        (["adapter.rank_pattern={to_q:0}"], "adapter.rank_pattern"),
        (['adapter.rank_pattern={"layers[0-1]": 1.5}'], "adapter.rank_pattern"),
        (["data.more=[{path: x, repeats: 1.5}]"], "data.more[0].repeats"),
        (["data.more=[{path: x, repeat: 1}]"], "data.more[0].repeats"),
        (["data.more=[{repeats: 1}]"], "data.more[0].path"),
        (['data.prompts.separator=""'], "separator"),
        (["trainer.max_steps=010"], "trainer.max_steps"),
        (["trainer.compile=yes"], "trainer.compile"),
        (["run_dir=" + "x" * 300], "run_dir"),
        (["allow_resume_changes=[trainer.max_step]"], "trainer.max_steps"),
    ],
)  # fmt: skip
def test_the_command_says_what_is_wrong_in_one_line_and_writes_nothing(
    arguments: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = [] if arguments[0].startswith("run_dir") else ["run_dir=out"]
    assert train.main(["data=latents", "model=nano-base", *run_dir, *arguments]) == 1
    error = capsys.readouterr().err
    assert "error: " in error and name in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("override", ["split=nan", "threads=" + "9" * 20, "batch_seconds=1e-9", "fixes=[dc,dc]"])
def test_encode_refuses_too(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert encode.main(["source=audio", "out=latents", "model=nano", override]) == 1
    assert override.partition("=")[0] in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "find", "expected"),
    [
        ("trainer.max_steps=1e6", lambda config: config.trainer.max_steps, 10**6),
        ("trainer.max_steps=1_000", lambda config: config.trainer.max_steps, 1000),
        ("optimizer.options={eps:1e-6}", lambda config: config.optimizer.options, {"eps": 1e-6}),
        ("optimizer.options.eps=1e-6", lambda config: config.optimizer.options, {"eps": 1e-6}),
        ("adapter.rank_pattern={to_q:4}", lambda config: config.adapter.rank_pattern, {"to_q": 4}),
        ('adapter.rank_pattern={"layers[0-1]": 4}', lambda config: config.adapter.rank_pattern, {"layers[0-1]": 4}),
        (r'callbacks.demos.prompts=["\${b}"]', lambda config: list(config.callbacks.demos.prompts), ["${b}"]),
        ("adapter.alpha_pattern={}", lambda config: config.adapter.alpha_pattern, {}),
        ("loss.inpainting={full: 1}", lambda config: config.loss.inpainting, {"full": 1.0}),
        ("loss.inpainting.full=0.5", lambda config: config.loss.inpainting["segments"], 0.1),
    ],
)  # fmt: skip
def test_numbers_and_mappings_are_set_as_people_write_them(
    override: str, find: Any, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TrainConfig] = []
    monkeypatch.chdir(tmp_path)
    Path("latents").mkdir()
    monkeypatch.setattr(train, "train", lambda config: seen.append(config))
    assert train.main(["data=latents", "model=nano-base", "run_dir=out", override]) == 0
    assert find(seen[0]) == expected
