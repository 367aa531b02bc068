"""What a load says, and which adapters are refused: counts and fix in every message, the model left as it was."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.small_model import Small, train_adapter
from sa3train.adapters.adapter import Adapter, hash_architecture
from sa3train.adapters.apply.layer_weight import get_layer_adapter
from sa3train.adapters.apply.load_report import LoadReport, get_layer_group
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.adapters.spec import KINDS, AdapterSpec
from sa3train.core.errors import AdapterError

CONDITIONER = "conditioners.seconds_total.embedder.embedding.1"


@dataclass
class Base:
    """A loaded model, as far as a report goes."""

    name: str
    hash: str
    sibling: str | None = None

    def fingerprint(self) -> str:
        return self.hash


@pytest.fixture
def model() -> Any:
    return Small()


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return replace(train_adapter(AdapterSpec("lora", rank=3), Small()), source="style.safetensors")


def edited(adapter: Adapter, edit: Callable[[dict[str, dict[str, Tensor]]], Any]) -> Adapter:
    tensors = {
        path: {name: tensor.clone() for name, tensor in params.items()} for path, params in adapter.tensors.items()
    }
    edit(tensors)
    return replace(adapter, tensors=tensors)


def refused(model: Any, adapter: Adapter, **settings: Any) -> str:
    """The message of the refusal; the stack and the model are as they were."""
    before = {path: layer.weight.detach().clone() for path, layer in find_adaptable_layers(model).items()}  # type: ignore[operator]
    stack = AdapterStack(model)
    with pytest.raises(AdapterError) as caught:
        stack.add(adapter, **settings)
    assert len(stack) == 0
    assert not stack.apply()
    assert all(torch.equal(layer.weight, before[path]) for path, layer in find_adaptable_layers(model).items())  # type: ignore[arg-type]
    assert "style.safetensors" in str(caught.value)
    return str(caught.value)


def renamed(tensors: dict[str, Any], count: int) -> None:
    for path in list(tensors)[:count]:
        tensors[path.replace("ff.", "mlp.").replace("embedder", "table")] = tensors.pop(path)


def reshaped(tensors: dict[str, Any], count: int) -> None:
    for path in list(tensors)[:count]:
        tensors[path]["lora_A"] = torch.ones(3, 5)


class TestReport:
    def test_it_tells_kind_rank_alpha_targets_and_layers(self, model: Any, adapter: Adapter) -> None:
        report = AdapterStack(model).add(adapter)
        assert isinstance(report, LoadReport)
        assert (report.adapter_type, report.rank, report.alpha) == ("lora", "3", "3")
        assert (report.include, report.exclude) == (None, None)
        assert sorted(report.matched) == sorted(find_adaptable_layers(model))
        assert report.missing == report.unexpected == report.not_finite == []
        assert report.mismatched == {}
        assert json.loads(json.dumps(report.to_dict()))["matched"] == report.matched
        assert report.summary.startswith("lora, rank 3, alpha 3: 9 of 9 layers fit, changes the weights by ")

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_effect_is_measured(self, model: Any, kind: str) -> None:
        adapter = train_adapter(AdapterSpec(kind, rank=3), model)
        report = AdapterStack(model).add(adapter, strength=0.3)
        sums: dict[str, list[Tensor]] = {}
        for path, layer in find_adaptable_layers(model).items():
            W: Tensor = layer.weight.detach()  # type: ignore[operator, assignment]
            changed = get_layer_adapter(adapter, path, W).weight(W) - W
            assert report.layer_effect[path] == pytest.approx((changed.norm() / W.norm()).item(), rel=1e-4)
            for group in (get_layer_group(path), "all"):
                sums.setdefault(group, []).append(torch.stack([changed.square().sum(), W.square().sum()]))
        assert report.effect.keys() == sums.keys() == {"feed-forward", "conditioner", "all"}
        for group, parts in sums.items():
            change, weight = torch.stack(parts).sum(dim=0)
            assert report.effect[group] == pytest.approx((change / weight).sqrt().item(), rel=1e-4)

    def test_layers_the_spec_names_and_the_file_lacks_are_missing(self, model: Any, adapter: Adapter) -> None:
        path = "model.transformer.layers.1.ff.up"
        report = AdapterStack(model).add(edited(adapter, lambda tensors: tensors.pop(path)))
        assert report.missing == [path]
        assert "8 of 8 layers fit; it lacks 1 of 9 layers that its settings include" in report.summary
        only = replace(adapter, spec=replace(adapter.spec, exclude=["layers.1."]))
        report = AdapterStack(model).add(edited(only, lambda tensors: tensors.pop(path)))
        assert report.missing == []

    @pytest.mark.parametrize("by_hash", [True, False])
    def test_the_base_is_compared_by_name_architecture_and_hash(
        self, model: Any, adapter: Adapter, caplog: pytest.LogCaptureFixture, by_hash: bool
    ) -> None:
        known = replace(adapter, metadata=dict(adapter.metadata) | {"base_model": "nano-base", "base_hash": "ab" * 32})
        with caplog.at_level(logging.WARNING, "sa3train"):
            report = AdapterStack(model).add(known, base="cd" * 32 if by_hash else Base("nano", "cd" * 32))
        architecture = hash_architecture(model)
        assert report.base == {"name": "nano-base", "architecture": architecture, "hash": "ab" * 32}
        loaded = {"architecture": architecture, "hash": "cd" * 32} | ({} if by_hash else {"name": "nano"})
        assert report.base_loaded == loaded
        assert len(report.warnings) == 1
        assert "trained on nano-base (hash abababababab)" in report.warnings[0]
        sibling = AdapterStack(model).add(known, base=Base("nano", "cd" * 32, "nano-base"))
        assert not sibling.warnings, "an adapter is for its base and the base's sibling"
        same = AdapterStack(model).add(known, base=Base("nano-base", "ab" * 32))
        assert same.warnings == []

    def test_bases_of_fp32_weights_on_a_bf16_model_are_pointed_out(self) -> None:
        adapter = train_adapter(AdapterSpec("lora-xs", rank=3), Small())
        assert "bases are those of float32" in AdapterStack(Small(dtype=torch.bfloat16)).add(adapter).warnings[0]
        assert AdapterStack(Small()).add(adapter).warnings == []


class TestRefusals:
    def test_nothing_matched(self, model: Any, adapter: Adapter) -> None:
        strange = edited(replace(adapter, metadata={}), lambda tensors: renamed(tensors, 9))
        for allow in (False, True):
            message = refused(model, strange, allow_partial=allow)
            assert "no layer matches" in message
            assert "0 of its 9 layers fit, 0 have another shape, 9 are not in the model" in message
            assert ".mlp." in message

    def test_another_width(self, model: Any, adapter: Adapter) -> None:
        wrong = edited(replace(adapter, metadata={"base_model": "medium"}), lambda tensors: reshaped(tensors, 9))
        for allow in (False, True):
            message = refused(model, wrong, allow_partial=allow)
            assert "another architecture (medium)" in message
            assert "0 of its 9 layers fit, 9 have another shape, 0 are not" in message
            assert "lora_A is [3, 5], needs [3, 12]" in message

    @pytest.mark.parametrize("count", [0, 1, 9])
    def test_another_architecture_by_its_record(self, model: Any, adapter: Adapter, count: int) -> None:
        """Even where every layer of the adapter happens to fit: a deeper model has all layers of a shallower one."""
        other = replace(adapter, metadata={"base_architecture": "0123456789abcdef", "base_model": "medium"})
        message = refused(model, edited(other, lambda tensors: renamed(tensors, count)), allow_partial=True)
        assert "another architecture (medium)" in message
        assert f"{9 - count} of its 9 layers fit" in message

    @pytest.mark.parametrize("spoil", [renamed, reshaped])
    def test_partial_unless_allowed(self, model: Any, adapter: Adapter, spoil: Callable[..., None]) -> None:
        partial = edited(adapter, lambda tensors: spoil(tensors, 2))
        message = refused(model, partial)
        assert "only some of its layers fit" in message
        assert "7 of its 9 layers fit" in message
        assert "allow_partial" in message
        stack = AdapterStack(model)
        report = stack.add(partial, allow_partial=True)
        assert report.is_partial
        assert len(report.matched) == 7
        assert len(report.unexpected) + len(report.mismatched) == 2
        assert stack.apply()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("kind", KINDS)
    def test_not_finite(self, model: Any, kind: str, value: float) -> None:
        name = KINDS[kind].parameters[-1]

        def spoil(tensors: dict[str, dict[str, Tensor]]) -> None:
            tensors[CONDITIONER][name].reshape(-1)[-1] = value

        adapter = replace(train_adapter(AdapterSpec(kind, rank=2), model), source="style.safetensors")
        message = refused(model, edited(adapter, spoil), allow_partial=True)
        assert "1 of its tensors hold NaN or infinity" in message
        assert f"{CONDITIONER} {name}" in message

    def test_weights_that_overflow(self, model: Any, adapter: Adapter) -> None:
        large = edited(adapter, lambda tensors: [t.fill_(1e30) for params in tensors.values() for t in params.values()])
        assert "overflow" in refused(model, large)

    @pytest.mark.parametrize("kind", ["lora", "dora-rows", "bora"])
    def test_a_layer_of_zeros_as_after_a_download_that_broke_off(self, model: Any, kind: str) -> None:
        adapter = replace(train_adapter(AdapterSpec(kind, rank=2), model), source="style.safetensors")
        empty = edited(adapter, lambda tensors: [tensor.zero_() for tensor in tensors[CONDITIONER].values()])
        if kind == "lora":
            assert CONDITIONER in " ".join(AdapterStack(model).add(empty).warnings)
        else:
            assert "broke off" in refused(model, empty)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("what", ["all zero", "untrained"])
    def test_without_effect(self, model: Any, kind: str, what: str) -> None:
        from sa3train.adapters.layers.inject import inject

        if what == "untrained":
            injected = inject(model, AdapterSpec(kind, rank=2))
            adapter = injected.export()
            injected.remove()
            adapter = edited(adapter, lambda tensors: round_to_half(tensors))  # as a file would hold it
        else:
            adapter = train_adapter(AdapterSpec(kind, rank=2), model)
            adapter = edited(
                adapter, lambda tensors: [t.zero_() for params in tensors.values() for t in params.values()]
            )
        message = refused(model, replace(adapter, source="style.safetensors"))
        assert "changes nothing" in message
        assert "9 layers" in message

    def test_a_refused_adapter_leaves_the_one_that_plays(self, model: Any, adapter: Adapter) -> None:
        stack = AdapterStack(model)
        stack.add(adapter)
        stack.apply()
        playing = model()
        with pytest.raises(AdapterError, match="no layer matches"):
            stack.add(edited(replace(adapter, metadata={}), lambda tensors: renamed(tensors, 9)))
        assert not stack.apply()
        assert torch.equal(model(), playing)


def round_to_half(tensors: dict[str, dict[str, Tensor]]) -> None:
    for params in tensors.values():
        for name, tensor in params.items():
            params[name] = tensor.half()
