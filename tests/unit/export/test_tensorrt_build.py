"""inference/tensorrt_build.py: the shapes that it asks for. TensorRT itself needs a GPU."""

from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper

from helpers.onnx_runner import load_script

SHAPES: dict[str, list[int | str]] = {
    "strength": [],
    "local": [3, "rows", "2*pairs + 16", 256],
    "audio": [1, 2, "8192*pairs"],
    "ids": ["rows", "tokens"],
}


def test_each_graph_gets_a_profile_of_its_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("tensorrt_build")
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in SHAPES.items()]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [])
    graph = helper.make_graph([helper.make_node("Identity", ["strength"], ["out"])], "step", inputs, [output])
    onnx.save(helper.make_model(graph), tmp_path / "step.onnx")
    facts = (
        '{"tail_seconds": 6, "sample_rate": 44100, "samples_per_frame": 4096, "max_tokens": 64, "max_seconds": 99.1, '
    )
    facts += '"frames": {"max": 1024}, "format": "sa3train-'
    arguments = [str(tmp_path), str(tmp_path / "engines")]
    for found in ("coreml", "onnx"):
        (tmp_path / "manifest.json").write_text(f'{facts}{found}"}}', encoding="utf-8")
        if found == "coreml":
            with pytest.raises(SystemExit):
                script.main(arguments)
            assert "sa3-export --to onnx" in capsys.readouterr().err and not (tmp_path / "engines").exists()
    built = SimpleNamespace(calls=[])
    monkeypatch.setattr(script, "build_engine", lambda *given: built.calls.append(given))
    script.main([str(tmp_path), str(tmp_path / "engines"), "--seconds", "10", "--rows", "2"])
    ((path, target, _, profiles),) = built.calls
    assert (path.name, target.name) == ("step.onnx", "step.engine")
    assert [each["strength"] for each in profiles] == [(), (), ()]
    assert [each["local"] for each in profiles] == [(3, 1, 20, 256), (3, 2, 190, 256), (3, 4, 1040, 256)]
    assert [each["audio"][2] for each in profiles] == [16384, 8192 * 87, 8192 * 512]
    assert [each["ids"] for each in profiles] == [(1, 1), (2, 16), (4, 64)]
    with pytest.raises(SystemExit):
        script.main([str(tmp_path), str(tmp_path / "engines"), "--seconds", "100"])
    for size in ("pairs//2", "clips"):
        inputs[0].type.tensor_type.shape.dim.add().dim_param = size
        onnx.save(helper.make_model(helper.make_graph([], "step", inputs[:1], [output])), tmp_path / "step.onnx")
        with pytest.raises(SystemExit, match=f"step.onnx: cannot compute the size '{size}' from rows, pairs, tokens"):
            script.main([str(tmp_path), str(tmp_path / "engines"), "--seconds", "10"])
        inputs[0].type.tensor_type.shape.dim.pop()
