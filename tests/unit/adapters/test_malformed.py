"""Files that lie, are cut short or mean harm: refused with a message, quickly, unread and unexecuted."""

import json
import os
import pickle
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.small_model import Small, train_adapter
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.formats.comfy_write import write_comfy
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.spec import AdapterSpec
from sa3train.adapters.tools.service import merge_adapters
from sa3train.core.errors import AdapterError
from sa3train.core.safetensors_file import MAX_HEADER

EXAMPLES = 2100
PATH = "model.transformer.layers.0.ff.up"
Header = dict[str, Any]

HOSTILE = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1e308, -0.5, "", "4", "F16", "lora", "dora", [], [[]], {}, {"a": [1]},
    [-1], [0, 0], [2**40, 2**40], ["4"], [True, 3], [3.0, 4], "[0-99999999999]", "[1-", "a" * 5000, ["[0-9]" * 60],
    "\x00", "٣", "²", "../../x", float("nan"), float("inf"), "lokr", "diff", "fourierft", [None], {"": ""},
]  # fmt: skip
KEYS = [
    "../../../etc/passwd", "/etc/passwd", "a\\b", "", ".", "..", "a..b", "__class__", "model.__dict__.x", "a b", "ü",
    "model\x00x", "x" * 600, "con", "model.model.x", "diffusion_model.x.diff", "diffusion_model.x.lora_up.weight",
    "base_model.model.x.lora_A.weight", f"{PATH}.parametrizations.weight.0.lora_C", "lora_unet_x.alpha",
    f"{PATH}.parametrizations.weight.0.", ".parametrizations.weight.0.lora_A", f"{PATH}.parametrizations.weight.0.M_xs",
]  # fmt: skip


def parts_of(data: bytes) -> tuple[Header, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entries(header: Header) -> list[str]:
    return [key for key in header if key != "__metadata__"]


# Each mutation takes a valid file and a source of chance, and returns another file.


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def longer(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.randrange(1, 64))


def flipped_bytes(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 9)):
        changed[draw.randrange(min(len(data), draw.choice([16, 2000, len(data)])))] = draw.randrange(256)
    return bytes(changed)


def other_header_length(data: bytes, draw: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    lengths = [
        0, 1, 2, length - 1, length + 1, len(data) - 8, len(data), 2**31, 2**40, 2**63, 2**64 - 1, MAX_HEADER + 1
    ]  # fmt: skip
    return struct.pack("<Q", draw.choice(lengths)) + data[8:]


def other_entry(data: bytes, draw: random.Random) -> bytes:
    header, body = parts_of(data)
    entry = header[draw.choice(entries(header))]
    name = draw.choice(["dtype", "shape", "data_offsets", "extra"])
    dtypes = ["F64", "F32", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "f16", "F128"]
    entry[name] = draw.choice(dtypes if name == "dtype" and draw.random() < 0.8 else HOSTILE)
    if draw.random() < 0.2:
        del entry[draw.choice(list(entry))]
    return joined(header, body)


def moved_offsets(data: bytes, draw: random.Random) -> bytes:
    header, body = parts_of(data)
    one, two = (draw.choice(entries(header)) for _ in range(2))
    begin, end = header[two]["data_offsets"]
    shift = draw.choice([0, 0, 2, -2, 2**20, 2**50, -(2**40)])
    header[one]["data_offsets"] = draw.choice([[begin + shift, end + shift], [end, begin], [begin, end + shift]])
    if draw.random() < 0.5:
        header[one]["shape"] = header[two]["shape"]
    return joined(header, body)


def gigabytes(data: bytes, draw: random.Random) -> bytes:
    header, body = parts_of(data)
    key, count = draw.choice(entries(header)), draw.choice([2**20, 2**31, 2**40, 2**47])
    header[key]["shape"] = [count, draw.choice([1, 2, 2**16])]
    if draw.random() < 0.7:
        begin = header[key]["data_offsets"][0]
        header[key]["data_offsets"] = [begin, begin + 2 * count * header[key]["shape"][1]]
    return joined(header, body)


def other_key(data: bytes, draw: random.Random) -> bytes:
    header, body = parts_of(data)
    old = draw.choice(entries(header))
    header[draw.choice([*KEYS, old + draw.choice(KEYS), old.replace("0", "7"), old.replace("lora_A", "lora_Z")])] = (
        header.pop(old)
    )
    return joined(header, body)


def dropped_layers(data: bytes, draw: random.Random) -> bytes:
    """Consistent, but some tensors are gone."""
    header, body = parts_of(data)
    gone = set(draw.sample(entries(header), draw.randrange(1, len(entries(header)) + 1)))
    kept, blocks, position = {}, [], 0
    for key, entry in sorted(((k, header[k]) for k in entries(header)), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if key not in gone:
            kept[key] = entry | {"data_offsets": [position, position + end - begin]}
            blocks.append(body[begin:end])
            position += end - begin
    return joined({"__metadata__": header.get("__metadata__", {})} | kept, b"".join(blocks))


def other_setting(data: bytes, draw: random.Random) -> bytes:
    header, body = parts_of(data)
    config = json.loads(header["__metadata__"].get("lora_config", "{}"))
    names = ["rank", "alpha", "adapter_type", "dropout", "include", "exclude", "rslora", "rank_pattern"]
    name = draw.choice([*names, "alpha_pattern", "alpha_of_rslora", "options"])
    config[name] = draw.choice(HOSTILE)
    if name.endswith("pattern") and draw.random() < 0.7:
        config[name] = {draw.choice(["layers.1", "layers[0-11]", "(a+)+$", "[", ""]): draw.choice(HOSTILE)}
    if name == "options" and draw.random() < 0.7:
        options = [
            "decompose_factor", "decompose_both", "init_weights", "n_frequency", "rank_dropout", "r", "peft_type"
        ]  # fmt: skip
        config[name] = {draw.choice(options): draw.choice(HOSTILE)}
    header["__metadata__"]["lora_config"] = json.dumps(config)
    return joined(header, body)


def other_metadata(data: bytes, draw: random.Random) -> bytes:
    header, body = parts_of(data)
    texts = ["", "{", "null", "[]", "3", "[" * 5000, '{"rank": 4, "rank": 5}', '{"a":' * 20 + "1" + "}" * 20, "NaN"]
    choice = draw.randrange(4)
    if choice == 0:
        header["__metadata__"] = draw.choice(HOSTILE)
    elif choice == 1:
        header["__metadata__"][draw.choice(["lora_config", "base_dtype", "base_architecture"])] = draw.choice(HOSTILE)
    elif choice == 2:
        header["__metadata__"]["lora_config"] = draw.choice(texts)
    else:
        names = ["float16", "int8", "load", "nn", "__class__", "float8_e4m3fn"]
        header["__metadata__"]["base_dtype"] = draw.choice(names)
    return joined(header, body)


def other_json(data: bytes, draw: random.Random) -> bytes:
    header, body = parts_of(data)
    text = json.dumps(header).encode()
    key = json.dumps(entries(header)[0]).encode()
    deep = draw.choice([9, 100, 50_000])
    versions = [
        b"", b"{", b"[]", b"null", b"{}", text[:-1], text + b" ", b" " + text, b"\xef\xbb\xbf" + text, text + text,
        b"[" * deep + b"]" * deep, b'{"a":' * deep + b"1" + b"}" * deep, text[:-1] + b"," + key + b":" + b"{}}",
        text.replace(b"F16", b"\xff\xfe"), text.replace(b"[0, ", b"[NaN, ", 1), text.replace(b"[0,", b"[1e400,", 1),
        text.replace(b"shape", b"\\u0073hape"), text.replace(b'"', b"'"), text.decode().encode("utf-16"),
    ]  # fmt: skip
    return joined(draw.choice(versions), body)


def other_values(data: bytes, draw: random.Random) -> bytes:
    header, body = parts_of(data)
    changed = bytearray(body)
    begin = draw.randrange(len(body))
    changed[begin : begin + 40] = draw.choice([draw.randbytes(40), b"\xff" * 40, b"\x00\x7c" * 20])[: len(body) - begin]
    return joined(header, bytes(changed))


def noise(data: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(draw.randrange(0, 300))


MUTATIONS = [
    cut, longer, flipped_bytes, other_header_length, other_entry, moved_offsets, gigabytes, other_key, dropped_layers,
    other_setting, other_metadata, other_json, other_values, noise,
]  # fmt: skip


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Valid files of several kinds and layouts."""
    folder = tmp_path_factory.mktemp("valid")
    names = ("lora", "bora", "dora-cols-xs", "lokr")
    found = {name: train_adapter(AdapterSpec(name, rank=2, include=["layers[0-1]"]), Small()) for name in names}
    for name, adapter in found.items():
        save_adapter(folder / f"{name}.safetensors", adapter)
    write_comfy(folder / "comfy.safetensors", found["lora"])
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


@pytest.fixture(scope="module")
def model() -> Any:
    return Small()


def refusal(act: Callable[[], Any]) -> str | None:
    """The message when `act` refuses; any error that is no `AdapterError` goes on and fails the test."""
    try:
        act()
    except AdapterError as error:
        return str(error)
    return None


def loads_or_is_refused(path: Path, model: Any) -> bool:
    """Whether the file loads; played, it must fit or be refused too."""
    found: list[Adapter] = []
    message = refusal(lambda: found.append(load_adapter(path)))
    if message is not None:
        assert 20 < len(message) < 1000, message
        return False
    (adapter,) = found
    size = sum(tensor.nbytes for params in adapter.tensors.values() for tensor in params.values())
    assert size <= path.stat().st_size
    message = refusal(lambda: AdapterStack(model).add(adapter))
    assert message is None or 20 < len(message) < 2000, message
    return True


@pytest.mark.slow
def test_thousands_of_mutations(valid: list[bytes], model: Any, tmp_path: Path) -> None:
    outcomes = {mutation.__name__: [0, 0] for mutation in MUTATIONS}
    path = tmp_path / "mutated.safetensors"

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(range(len(valid))), st.sampled_from(MUTATIONS), st.integers(0, 2**32 - 1))
    def mutate(which: int, mutation: Callable[[bytes, random.Random], bytes], seed: int) -> None:
        path.write_bytes(mutation(valid[which], random.Random(seed)))
        outcomes[mutation.__name__][loads_or_is_refused(path, model)] += 1

    mutate()
    refused, loaded = (sum(counts[index] for counts in outcomes.values()) for index in range(2))
    assert refused + loaded >= 2000
    assert refused > 1000
    assert loaded > 100
    assert min(map(sum, outcomes.values())) > 30
    for name in ("cut", "longer", "gigabytes", "noise"):
        assert outcomes[name][1] == 0, name


def test_the_valid_files_are_valid(valid: list[bytes], model: Any, tmp_path: Path) -> None:
    for data in valid:
        (tmp_path / "a.safetensors").write_bytes(data)
        assert AdapterStack(model).add(load_adapter(tmp_path / "a.safetensors")).matched


def entry(dtype: str = "F16", shape: Any = (2, 2), offsets: Any = (0, 8)) -> Header:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ENTRY, EMPTY = json.dumps(entry()).encode(), entry(shape=(0,), offsets=(0, 0))
A, B = (f"{PATH}.parametrizations.weight.0.lora_{name}" for name in "AB")
NAMED = {
    "empty": (b"", "it is empty"),
    "seven bytes": (b"1234567", "header too small"),
    "header longer than the file": (struct.pack("<Q", 5000) + b"{}", "invalid header length"),
    "header of exabytes": (struct.pack("<Q", 2**63) + b"{}", "header claims 9223372036854775808 bytes"),
    "no JSON": (joined(b"hello", b""), "invalid JSON"),
    "no object": (joined(b"[1]", b""), "invalid JSON"),
    "broken JSON": (joined(b'{"a": ', b""), "invalid JSON"),
    "deep JSON": (joined(b'{"a":' * 10**5 + b"1" + b"}" * 10**5, b""), "recursion limit"),
    "a tensor twice": (joined(b'{"a": %s, "\\u0061": %s}' % ((ENTRY,) * 2), b"0" * 8), "a key occurs twice"),
    "metadata twice": (
        joined(b'{"__metadata__": {"a": "1", "a": "2"}, "b": %s}' % ENTRY, b"0" * 8),
        "a key occurs twice",
    ),
    "too many tensors": (joined({str(index): EMPTY for index in range(100_001)}, b""), "lists 100001 tensors"),
    "no entries": (joined(b'{"a": 1}', b""), "expected struct TensorInfo"),
    "no tensors": (joined({}, b""), "none of its 0 tensors"),
    "truncated": (joined({A: entry()}, b"1234567"), "not fully covered"),
    "bytes behind": (joined({A: entry()}, b"123456789"), "not fully covered"),
    "overlap": (joined({A: entry(), B: entry(offsets=(4, 12))}, b"0" * 12), "invalid offset"),
    "shared": (joined({A: entry(), B: entry()}, b"0" * 8), "invalid offset"),
    "hole": (joined({A: entry(), B: entry(offsets=(10, 18))}, b"0" * 18), "invalid offset"),
    "backwards": (joined({A: entry(offsets=(8, 0))}, b"0" * 8), "invalid offset"),
    "negative": (joined({A: entry(offsets=(-8, 0))}, b"0" * 8), "expected usize"),
    "gigabytes in the shape": (joined({A: entry(shape=(2**20, 2**20))}, b"0" * 8), "invalid shape"),
    "gigabytes at the end": (
        joined({A: entry(shape=(2**20, 2**20), offsets=(0, 2**41))}, b"0" * 8),
        "not fully covered",
    ),
    "overflowing shape": (joined({A: entry(shape=(2**33, 2**33))}, b"0" * 8), "overflow"),
    "negative shape": (joined({A: entry(shape=(-2, -2))}, b"0" * 8), "expected usize"),
    "many dimensions": (joined({A: entry(shape=(1,) * 9, offsets=(0, 2))}, b"00"), "has 9 dimensions"),
    "whole numbers": (joined({A: entry("I16")}, b"0" * 8), "must be F16, BF16, F32 or F64"),
    "unknown dtype": (joined({A: entry("F12")}, b"0" * 8), "unknown variant `F12`"),
    "dtype against bytes": (joined({A: entry("F32")}, b"0" * 8), "invalid shape"),
    "path upwards": (joined({f"../../{A}": entry()}, b"0" * 8), "is not a module path"),
    "absolute path": (joined({f"/etc/{A}": entry()}, b"0" * 8), "is not a module path"),
    "NUL": (joined({f"model\x00{A}": entry()}, b"0" * 8), "is not a module path"),
    "dunder": (joined({f"model.__class__.{A}": entry()}, b"0" * 8), "is not a module path"),
    "endless key": (joined({"a" * 10**5: entry()}, b"0" * 8), "is not a module path"),
    "metadata of numbers": (joined({"__metadata__": {"a": 1}, A: entry()}, b"0" * 8), "expected a string"),
    "half a layer": (joined({A: entry()}, b"0" * 8), "incomplete or damaged lora"),
    "a checkpoint": (joined({"model.model.x": entry()}, b"0" * 8), "whole checkpoint"),
}


@pytest.mark.parametrize("name", NAMED)
def test_refusals_say_what_is_wrong(name: str, tmp_path: Path) -> None:
    data, message = NAMED[name]
    path = tmp_path / "style.safetensors"
    path.write_bytes(data)
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(path)
    assert "style.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (struct.pack("<Q", 2**35), "header claims 34359738368 bytes"),
        (struct.pack("<Q", MAX_HEADER + 1), "header claims"),
        (joined({A: entry(shape=(2**20, 2**20), offsets=(0, 2**41))}, b""), "not fully covered"),
        (joined({A: entry("I16", (2**18, 2**17), (0, 2**36))}, b""), "must be F16, BF16, F32"),
    ],
)  # fmt: skip
def test_a_large_file_is_refused_without_being_read(start: bytes, message: str, tmp_path: Path) -> None:
    """A sparse file of 64 GiB: reading what it claims would take minutes and all memory."""
    path = tmp_path / "large.safetensors"
    path.write_bytes(start)
    os.truncate(path, len(start) + 2**36)
    tracemalloc.start()
    with pytest.raises(AdapterError, match=message):
        load_adapter(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".bin"])
@pytest.mark.parametrize("form", ["zip", "legacy", *range(2, 6)])
def test_pickles_are_never_run(form: str | int, suffix: str, tmp_path: Path) -> None:
    path, target = tmp_path / f"style{suffix}", tmp_path / "executed"
    if isinstance(form, int):
        path.write_bytes(pickle.dumps({"lora": Payload(target)}, protocol=form))
    else:
        torch.save({"lora": Payload(target)}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(AdapterError, match=r"pickle.*sa3-adapter convert|not a safetensors file"):
        load_adapter(path)
    assert not target.exists()


def test_a_small_comfyui_file_cannot_ask_for_all_memory(model: Any, tmp_path: Path) -> None:
    """Factors of 2¹⁷ rows and columns are half a megabyte; their product is 64 GiB, and a LoKr's is computed."""
    wide = {"shape": [2**17, 1], "data_offsets": [0, 2**18]}, {"shape": [1, 2**17], "data_offsets": [2**18, 2**19]}
    path = tmp_path / "style.safetensors"
    for names, act in (
        (("lokr_w1", "lokr_w2"), lambda: load_adapter(path)),
        (("lora_up.weight", "lora_down.weight"), lambda: AdapterStack(model).add(load_adapter(path))),
        (("lora_up.weight", "lora_down.weight"), lambda: merge_adapters([(path, 1.0)], tmp_path / "m", model)),
    ):
        header = {f"diffusion_model.a.{name}": {"dtype": "F16"} | each for name, each in zip(names, wide, strict=True)}
        header["diffusion_model.b.diff"] = entry(offsets=(2**19, 2**19 + 8))
        path.write_bytes(joined(header, b"0" * (2**19 + 8)))
        assert refusal(act) is not None


def test_a_folder_with_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": Payload(tmp_path / "executed")}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="sa3-adapter convert"):
        load_adapter(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_mutated_peft_configs(model: Any, tmp_path: Path) -> None:
    save_adapter(tmp_path / "peft", train_adapter(AdapterSpec("dora-rows", rank=2, alpha=3), Small()))
    file = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(file.read_text())
    names = [*config, "peft_type", "modules_to_save", "auto_mapping", "target_parameters"]
    texts = [json.dumps(config | {name: value}) for name in names for value in HOSTILE]
    texts += [
        json.dumps(config | {"alpha_pattern": {key: value}}) for key in ("layers.0", "(a+)+") for value in HOSTILE
    ]
    texts += ["", "[]", "3", "{", "[" * 10**5, '{"a":' * 30 + "1" + "}" * 30, '{"r": 1, "r": 2}', " " * (2**22 + 1)]
    for text in texts:
        file.write_text(text, encoding="utf-8")
        message = refusal(lambda: AdapterStack(model).add(load_adapter(tmp_path / "peft")))
        assert message is None or 20 < len(message) < 2000, message
