"""Build TensorRT engines from a folder of `sa3-export`, with a timing cache (docs/export.md says what was not run)."""

import argparse
import json
import re
from pathlib import Path

import onnx

SIZE = re.compile(r"(?:(\d+)\*)?(\w+)(?: \+ (\d+))?")
MIN_PAIRS = 2


def list_shapes(path, **sizes):
    """List the shape of each input of a graph for given sizes: `rows`, `pairs` of frames and `tokens` of a prompt."""

    def compute(dim):
        if dim.HasField("dim_value"):
            return dim.dim_value
        found = SIZE.fullmatch(dim.dim_param)
        if not found or found[2] not in sizes:
            raise SystemExit(f"{path}: cannot compute the size {dim.dim_param!r} from {', '.join(sizes)}. Report this.")
        return int(found[1] or 1) * sizes[found[2]] + int(found[3] or 0)

    graph = onnx.load(path, load_external_data=False).graph
    return {each.name: tuple(map(compute, each.type.tensor_type.shape.dim)) for each in graph.input}


def build_engine(path, target, cache, profiles):
    """Build the engine of a graph, for the smallest, the usual and the largest shapes of its inputs."""
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    network, config = builder.create_network(), builder.create_builder_config()
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise SystemExit("\n".join(str(parser.get_error(index)) for index in range(parser.num_errors)))
    known = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
    config.set_timing_cache(known, ignore_mismatch=False)
    profile = builder.create_optimization_profile()
    for name, smallest in profiles[0].items():
        profile.set_shape(name, smallest, profiles[1][name], profiles[2][name])
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise SystemExit(f"TensorRT cannot build {path}. What it misses is above.")
    target.write_bytes(engine)
    cache.write_bytes(config.get_timing_cache().serialize())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path, help="folder for NAME.engine and timing.cache")
    parser.add_argument("--seconds", type=float, default=30, help="usual length of a clip (default: 30)")
    parser.add_argument("--rows", type=int, default=1, help="usual clips of a step, twice as many with guidance")
    options = parser.parse_args(argv)
    path = options.folder / "manifest.json"
    facts = json.loads(path.read_bytes()) if path.is_file() else {}
    if facts.get("format") != "sa3train-onnx":
        parser.error(f"{options.folder} is not a folder of ONNX files. Give one of sa3-export --to onnx.")
    seconds = options.seconds + facts["tail_seconds"]
    pairs = -(-int(seconds * facts["sample_rate"]) // (2 * facts["samples_per_frame"]))
    longest, tokens = facts["frames"]["max"] // 2, facts["max_tokens"]
    if not MIN_PAIRS <= pairs <= longest:
        parser.error(f"--seconds with {facts['tail_seconds']} s of room must fit into {facts['max_seconds']:.1f} s")
    options.output.mkdir(parents=True, exist_ok=True)
    for path in sorted(options.folder.glob("*.onnx")):
        profiles = [
            list_shapes(path, rows=1, pairs=MIN_PAIRS, tokens=1),
            list_shapes(path, rows=options.rows, pairs=pairs, tokens=min(16, tokens)),
            list_shapes(path, rows=2 * options.rows, pairs=longest, tokens=tokens),
        ]
        build_engine(path, options.output / f"{path.stem}.engine", options.output / "timing.cache", profiles)


if __name__ == "__main__":
    main()
