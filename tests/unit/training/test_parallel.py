"""Two ranks train what one does; ranks that do not see each other are an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sa3train.adapters.spec import AdapterSpec
from sa3train.training.settings import JudgeSettings

Make = Callable[..., Any]


def test_two_ranks_with_half_the_batch_equal_one(trial: Make, shard_maker: Make, helpers: Any) -> None:
    shards = shard_maker("equal", [12] * 8, heldout=2)
    values = {"shards": shards, "max_steps": 5, "loop": {"accumulate": 2}, "spec": AdapterSpec("bora", rank=4)}
    values["judge"] = JudgeSettings(every=5, clips=3)
    one, two = trial("one", batch_size=4, **values), trial("two", batch_size=2, **values)
    assert helpers.outcome(helpers.in_child(one.run)) == 0
    assert [helpers.outcome(pid) for pid in helpers.two_ranks(two)] == [0, 0]
    expected, found = helpers.adapter_of(one.run_dir), helpers.adapter_of(two.run_dir)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), atol=1e-5, rtol=1e-3)
    for step, loss in helpers.losses_of(one.run_dir).items():
        assert float(helpers.losses_of(two.run_dir)[step]) == pytest.approx(float(loss), abs=1e-5)
