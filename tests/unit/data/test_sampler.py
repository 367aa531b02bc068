"""What loading draws for a seed stays what it is, or says that it has changed."""

from pathlib import Path

from helpers.shards import make_data_module, make_store
from sa3train.data.loading.prompts import PromptSettings
from sa3train.data.loading.sampler import DRAWS_VERSION


def test_the_draws_are_those_of_their_version(tmp_path: Path) -> None:
    """Order, crops and prompts of a seed; a resumed run continues with these very draws."""
    store = make_store(tmp_path / "a", [12, 9, 14, 11, 10, 13], caption="a{}, b, c".format)
    prompts = PromptSettings(shuffle_tags=True, tag_dropout=0.3)
    loader = make_data_module(store, 2, seed=5, crop_frames=6, pool=2, prompts=prompts).train_dataloader()
    batches = [batch for batch, _ in zip(loader, range(2), strict=False)]
    found = [
        (*entry, int(start))
        for batch in batches
        for *entry, start in zip(
            batch["keys"], batch["prompts"], batch["seeds"], batch["latents_BCT"][:, 1, 0], strict=True
        )
    ]
    expected = [
        ("clip-000", "a0", 3282712781050596985, 0), ("clip-004", "a4, c", 207437624247114499, 0),
        ("clip-005", "b, c, a5", 2947299326548299508, 7), ("clip-003", "b", 1801654762565066287, 0),
    ]  # fmt: skip
    assert DRAWS_VERSION == 1 and found == expected, (
        "loading draws otherwise for the same seed, so older runs cannot be resumed exactly: raise "
        "sa3train.data.loading.sampler.DRAWS_VERSION, and pin the new values here"
    )
