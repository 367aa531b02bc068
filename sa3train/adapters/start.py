"""Check whether training can continue an adapter, as far as that needs no model."""

from sa3train.adapters.adapter import Adapter, Part
from sa3train.adapters.spec import BASES, BIAS_CHANGE, INFERENCE_ONLY_TYPES, KINDS, AdapterSpec
from sa3train.core.errors import AdapterError

_MAKE_LORA = "Make it a plain lora first: sa3-adapter merge FILE -o NEW.safetensors --model NAME --rank R"


def check_start(adapter: Adapter, spec: AdapterSpec, part: Part) -> None:
    """Check that training can continue an adapter: its part, type, ranks and scales, and what its tensors are.

    Args:
        adapter: The adapter to continue from.
        spec: The adapter that is trained.
        part: The part of the model that it is trained on.

    Raises:
        AdapterError: If it differs.
    """
    if adapter.part != part:
        where = ("the DiT", "the autoencoder's decoder")[adapter.part == "decoder"]
        raise AdapterError(
            f"{adapter.source} is on {where}, and this training is not. Only recipe=decoder trains the "
            "autoencoder's decoder."
        )
    kind = adapter.spec.adapter_type
    if kind != spec.adapter_type:
        raise AdapterError(
            f"{adapter.source} is {kind}, but this training is of {spec.adapter_type}. {_advise_on_type(kind)}"
        )
    for path, tensors in adapter.tensors.items():
        if foreign := [name for name in (*BASES, BIAS_CHANGE, "diff") if name in tensors]:
            raise AdapterError(
                f"{adapter.source} has {', '.join(foreign)} at {path}, which training does not continue: bases of its "
                f"own, changes of biases or full weight deltas. {_MAKE_LORA}"
            )
        if kind not in KINDS:
            continue
        check_rank(adapter, spec, path)
        if abs(adapter.spec.get_scale(path) - spec.get_scale(path)) > 1e-9:
            raise AdapterError(
                f"{adapter.source} has the scale {adapter.spec.get_scale(path):g} (alpha / rank) at {path}, but "
                f"training has {spec.get_scale(path):g}. Set adapter.alpha to match."
            )


def check_rank(adapter: Adapter, spec: AdapterSpec, path: str) -> None:
    """Check that an adapter has the rank of training at a layer.

    Args:
        adapter: The adapter to continue from.
        spec: The adapter that is trained.
        path: Module path of the layer.

    Raises:
        AdapterError: If it has another.
    """
    rank, wanted = adapter.spec.get_rank(path), spec.get_rank(path)
    if rank != wanted:
        raise AdapterError(
            f"{adapter.source} has rank {rank} at {path}, but training has {wanted}. Set adapter.rank={rank} (and "
            "adapter.rank_pattern, where layers differ)."
        )


def _advise_on_type(kind: str) -> str:
    if kind in INFERENCE_ONLY_TYPES:
        return f"This type is not trained. {_MAKE_LORA}"
    return f"Set adapter={kind}." if kind in KINDS else f"Set adapter.adapter_type={kind}."
