import pytest
import torch

from gvpo_lightning.data.batch import CompletionBatch, collate_completions


@pytest.fixture
def batch():
    return collate_completions(
        prompts=[[5], [6, 7, 8], [0, 9]],
        completions=[[3, 0, 1], [2], [4, 1]],
        truncated=[False, True, False],
        group_ids=[7, 7, 2],
        pad_token_id=0,
    )


def test_collate_pads_prompts_left_and_completions_right(batch):
    assert batch.prompt_ids.tolist() == [[0, 0, 5], [6, 7, 8], [0, 0, 9]]
    assert batch.prompt_mask.tolist() == [[False, False, True], [True, True, True], [False, True, True]]
    assert batch.completion_ids.tolist() == [[3, 0, 1], [2, 0, 0], [4, 1, 0]]
    assert batch.completion_mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert batch.lengths.tolist() == [3, 1, 2]
    assert batch.group_ids.tolist() == [7, 7, 2]
    assert batch.truncated.tolist() == [False, True, False]
    assert batch.rewards.isnan().all()
    assert batch.reference_logprobs.shape == (3, 3)
    assert not batch.reference_logprobs.any()
    assert len(batch) == 3


def test_an_empty_completion_is_a_dropped_one():
    batch = collate_completions([[5], [6]], [[], [2]], [True, False], [0, 0], pad_token_id=0)
    assert batch.kept.tolist() == [False, True]
    assert batch.lengths.tolist() == [0, 1]


def test_collate_without_any_token_keeps_one_column():
    batch = collate_completions([[5]], [[]], [True], [0], pad_token_id=0)
    assert batch.completion_mask.tolist() == [[False]]


@pytest.mark.parametrize(
    ("rows", "prompts", "completions"),
    [
        ([0], [[5]], [[3, 0, 1]]),  # the padding id inside a completion is content
        ([2, 0], [[0, 9], [0, 5]], [[4, 1, 0], [3, 0, 1]]),  # and in front of a prompt
        ([1], [[6, 7, 8]], [[2]]),
        ([1, 1], [[6, 7, 8], [6, 7, 8]], [[2], [2]]),
    ],
)
def test_select_trims_padding_and_no_content(batch, rows, prompts, completions):
    batch.reference_logprobs = -torch.arange(9.0).view(3, 3)
    batch.rewards = torch.tensor([0.5, 1.0, 2.0])
    batch.source_ids = torch.tensor([2, 0, 1])
    part = batch.select(torch.tensor(rows))
    assert part.prompt_ids.tolist() == prompts
    assert part.completion_ids.tolist() == completions
    assert part.lengths.tolist() == batch.lengths[rows].tolist()
    assert part.prompt_mask.sum(dim=1).tolist() == batch.prompt_mask[rows].sum(dim=1).tolist()
    assert torch.equal(part.reference_logprobs, batch.reference_logprobs[rows][:, : part.completion_ids.shape[1]])
    for name in ("rewards", "group_ids", "truncated", "source_ids"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[rows])


def test_select_of_dropped_completions_and_of_none(batch):
    batch.drop(torch.tensor([True, False, False]))
    part = batch.select(torch.tensor([0]))
    assert part.completion_mask.tolist() == [[False]]
    assert part.prompt_ids.tolist() == [[5]]
    assert len(batch.select(torch.tensor([], dtype=torch.int64))) == 0


def test_select_leaves_the_batch_as_it_was(batch):
    before = {name: tensor.clone() for name, tensor in batch.state_dict().items()}
    part = batch.select(torch.tensor([0, 2]))
    part.rewards[:] = 3.0
    part.drop(torch.tensor([True, True]))
    for name, tensor in before.items():
        torch.testing.assert_close(getattr(batch, name), tensor, equal_nan=True)


def test_drop_empties_masks_and_nothing_else(batch):
    ids = batch.completion_ids.clone()
    batch.drop(torch.tensor([False, True, False]))
    batch.drop(torch.tensor([False, False, True]))  # what has been dropped stays so
    assert batch.kept.tolist() == [True, False, False]
    assert batch.lengths.tolist() == [3, 0, 0]
    assert torch.equal(batch.completion_ids, ids)
    assert batch.prompt_mask.any(dim=1).all()


def test_state_dict_and_to_round_trip(batch, tmp_path):
    torch.save(batch.state_dict(), tmp_path / "batch.pt")
    again = CompletionBatch(**torch.load(tmp_path / "batch.pt", weights_only=True))
    moved = batch.to("meta")
    for name, tensor in batch.state_dict().items():
        torch.testing.assert_close(getattr(again, name), tensor, rtol=0, atol=0, equal_nan=True)
        assert getattr(again, name).dtype == tensor.dtype
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == tensor.shape
