import copy

import lightning as L
import pytest
import torch
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from gvpo_lightning.data.rows import rows_of
from gvpo_lightning.distributed.ranks import DataRanks
from gvpo_lightning.module import GVPOModule
from gvpo_lightning.rollout.epoch import Epoch
from gvpo_lightning.rollout.loader import RolloutLoader
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings


def rows(count):
    return [{"prompt": f"{n}+1=", "number": n, "half": n / 2} for n in range(count)]


def reward(prompts, completions, **columns):
    return [0.0] * len(completions)


@pytest.fixture
def make_module(tiny_policy, tokenizer):
    """Builds a real module attached to a real Trainer; `ranks` is the only thing pretended."""

    def build(prompts_per_rollout=4, prompts_per_update=2, ranks=None, **settings) -> GVPOModule:
        class Module(GVPOModule):
            data_ranks = ranks or DataRanks()
            world_size, global_rank = data_ranks.size, data_ranks.rank

        module = Module(
            tiny_policy(),
            settings.pop("reward", reward),
            settings.pop("tokenizer", tokenizer),
            rollout=RolloutSettings(2, prompts_per_rollout, prompts_per_update),
            generation=GenerationSettings(max_new_tokens=4),
            **settings,
        )
        module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
        return module

    return build


def epoch(loader):
    """One epoch as the fit loop runs it: the module counts."""
    batches = []
    for batch in loader:
        batches.append(batch)
        loader.module.run.microstep += 1
    return batches


def numbers(batches):
    """The `number` of each row, by rollout."""
    return [[row["number"] for row in batch["rows"]] for batch in batches if batch["rows"] is not None]


def stream(loader, epochs):
    return [number for _ in range(epochs) for rollout in numbers(epoch(loader)) for number in rollout]


SOURCES = {
    "list": rows,
    "Dataset": lambda count: Dataset.from_list(rows(count)),
    "DataLoader": lambda count: DataLoader(rows(count), batch_size=3, shuffle=True),
    "DataLoader of a Dataset": lambda count: DataLoader(Dataset.from_list(rows(count)), batch_size=3, shuffle=True),
    "DataLoader of lists": lambda count: DataLoader(rows(count), batch_size=4, shuffle=True, collate_fn=list),
    "DataLoader with a generator": lambda count: DataLoader(
        rows(count), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(7)
    ),
    "DataLoader with a batch sampler": lambda count: DataLoader(
        rows(count), batch_sampler=BatchSampler(torch.utils.data.RandomSampler(range(count)), 4, drop_last=False)
    ),
}


@pytest.fixture(params=SOURCES)
def source(request):
    return SOURCES[request.param]


def test_an_epoch_is_micro_batches_of_whole_rollouts(make_module, source):
    loader = RolloutLoader(source(10), make_module())
    assert loader.rollouts_per_epoch == 2
    assert len(loader) == 4  # two updates a rollout
    batches = epoch(loader)
    assert [(b["rollout"], b["slot"]) for b in batches] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [b["rows"] is None for b in batches] == [False, True, False, True]
    assert [len(b["rows"]) for b in batches[::2]] == [4, 4]
    for row in batches[0]["rows"]:
        assert row == {"prompt": f"{row['number']}+1=", "number": row["number"], "half": row["number"] / 2}
        assert type(row["number"]) is int


@pytest.mark.parametrize("count", [8, 10, 11])
def test_every_prompt_comes_once_a_pass(make_module, source, count):
    """Also where a pass is not a whole number of rollouts: what is left over opens the next rollout."""
    loader = RolloutLoader(source(count), make_module())
    seen = stream(loader, 12)
    passes = [seen[start : start + count] for start in range(0, len(seen) - count + 1, count)]
    assert len(passes) >= 8
    assert all(sorted(p) == list(range(count)) for p in passes)
    assert len({tuple(p) for p in passes}) == len(passes)  # each in an order of its own
    assert passes[0] != sorted(passes[0])


def test_a_rollout_may_hold_more_prompts_than_there_are(make_module, source):
    loader = RolloutLoader(source(3), make_module(prompts_per_rollout=8))
    assert loader.rollouts_per_epoch == 1
    (rollout,) = numbers(epoch(loader))
    assert sorted(rollout[:3]) == sorted(rollout[3:6]) == [0, 1, 2]
    assert len(rollout) == 8


def test_a_restarted_run_has_the_same_order_and_a_new_seed_another(make_module, source, monkeypatch):
    torch.manual_seed(1)
    first = stream(RolloutLoader(source(10), make_module()), 4)
    state = torch.get_rng_state()
    torch.rand(3)
    assert stream(RolloutLoader(source(10), make_module()), 4) == first
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    torch.set_rng_state(state)
    assert stream(RolloutLoader(source(10), make_module()), 4) != first
    assert torch.equal(torch.get_rng_state(), state)  # the order draws from nobody else's numbers


def test_a_users_generator_is_left_as_it_was(make_module):
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    stream(RolloutLoader(DataLoader(rows(10), shuffle=True, generator=generator), make_module()), 2)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("says_where_epochs_began", [True, False], ids=["", "of an earlier version"])
@pytest.mark.parametrize("position", range(1, 9))
def test_the_position_is_the_modules(make_module, source, position, says_where_epochs_began):
    """A resumed run goes on where it was, in the middle of an epoch and at its end."""
    whole = RolloutLoader(source(10), make_module())
    expected = [batch for _ in range(4) for batch in epoch(whole)]
    resumed = RolloutLoader(source(10), make_module())
    saved = {"start": (position - 1) // 4 * 4, "length": 4, "num_prompts": 10, "first_rollout": 0}
    resumed.module.run.epoch = Epoch.of(saved if says_where_epochs_began else None)
    resumed.module.run.microstep = position
    rest = epoch(resumed)
    assert len(rest) == (4 - position % 4)  # to the end of this epoch; a finished epoch's successor is whole
    assert rest == expected[position : position + len(rest)]
    assert epoch(resumed) == expected[position + len(rest) : position + len(rest) + 4]
    assert resumed.state_dict() == {}


class EverySecondThenTheRest(Sampler):
    def __len__(self):
        return 10

    def __iter__(self):
        return iter([*range(0, 10, 2), *range(1, 10, 2)])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, list(range(10))),
        ({"sampler": EverySecondThenTheRest()}, [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]),
        ({"sampler": [3, 1, 3]}, [3, 1, 3]),
        ({"batch_size": 4, "drop_last": True}, list(range(8))),
        ({"batch_sampler": [[5, 6], [1], [9, 8, 7]]}, [5, 6, 1, 9, 8, 7]),
    ],
    ids=["its own order", "sampler", "list as sampler", "whole batches", "batch sampler"],
)
def test_a_dataloaders_own_order_is_kept(make_module, arguments, expected):
    loader = RolloutLoader(DataLoader(rows(10), **arguments), make_module())
    assert loader.num_prompts == len(expected)
    seen = stream(loader, 6)
    assert seen == (expected * 10)[: len(seen)]


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_every_rank_is_given_the_same_whole_rollouts(make_module, source, ranks):
    """The ranks share the sampling, completion by completion; which prompts there are does not depend on them."""
    sizes = {"prompts_per_rollout": 5, "prompts_per_update": 2}
    alone = RolloutLoader(source(10), make_module(**sizes))
    assert len(alone) == 6  # two rollouts of three updates
    expected = [epoch(alone), epoch(alone)]
    assert [len(rollout) for rollout in numbers(expected[0])] == [5, 5]
    for rank in range(ranks):
        loader = RolloutLoader(source(10), make_module(ranks=DataRanks(rank, ranks), **sizes))
        assert [epoch(loader), epoch(loader)] == expected


def test_conversations_need_collate_fn_list(make_module, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}="
    talks = [{"prompt": [{"role": "user", "content": "1"}], "number": n} for n in range(4)]
    kept = RolloutLoader(DataLoader(talks, batch_size=2, collate_fn=list), make_module(tokenizer=tokenizer))
    assert numbers(epoch(kept)) == [[0, 1, 2, 3]]
    for batch_size in (1, 2):
        with pytest.raises(ValueError, match="collate_fn=list"):
            RolloutLoader(DataLoader(talks, batch_size=batch_size), make_module(tokenizer=tokenizer))


def test_default_collate_would_mix_up_columns_of_lists(make_module):
    data = [{"prompt": "1+1=", "alternatives": ["2", "two"]}, {"prompt": "1+2=", "alternatives": ["3", "three"]}]
    with pytest.raises(ValueError, match=r"\['alternatives'\].*collate_fn=list"):
        RolloutLoader(DataLoader(data, batch_size=2), make_module())


class WithoutIndexError(torch.utils.data.Dataset):
    """An ordinary torch dataset: computed rows and a length; iterating over it would never end."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"prompt": f"{index}+1=", "number": index}


def test_a_dataset_without_index_error_is_read_by_its_length(make_module):
    loader = RolloutLoader(DataLoader(WithoutIndexError(), batch_size=4), make_module())
    assert loader.num_prompts == 8
    assert RolloutLoader(WithoutIndexError(), make_module()).num_prompts == 8


class CountingDataset(WithoutIndexError):
    reads = 0

    def __getitem__(self, index):
        CountingDataset.reads += 1
        return super().__getitem__(index)


def test_a_pass_over_a_dataloader_is_read_once(make_module):
    loader = RolloutLoader(DataLoader(CountingDataset(), batch_size=1, shuffle=True), make_module())
    before = CountingDataset.reads
    epoch(loader)
    assert CountingDataset.reads - before == 8


class Endless(IterableDataset):
    def __iter__(self):
        yield from rows(4)


LONG = "1" * 61  # and 4 new tokens, in a context of 64


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "the dataset is empty"),
        (Dataset.from_list([]), "the dataset is empty"),
        (DataLoader(rows(3), batch_size=4, drop_last=True), "the dataset is empty"),
        (Endless(), "must have a length"),
        (iter(rows(3)), "must have a length"),
        (DataLoader(Endless()), "must have a length"),
        (DataLoader(rows(3), batch_size=None), "give it a batch_size"),
        (DataLoader(rows(3), sampler=DistributedSampler(rows(3), 2, 0)), "in place of a DistributedSampler"),
        ([*rows(2), {"number": 2, "half": 1.0}], r"Row 2 has no 'prompt': its columns are \['half', 'number'\]"),
        ([*rows(2), {"prompt": "1+1="}], r"Row 2 has the columns \['prompt'\], but row 0 has"),
        (["1+1="], "Row 0 of the prompts must be a dict with a 'prompt', got str"),
        ([{"prompt": "1+1="}, {"prompt": ""}], "Row 1: A prompt must have at least one token"),
        ([{"prompt": "1+1="}, {"prompt": 5}], "Row 1: A prompt must be a string"),
        ([{"prompt": "1+1="}, {"prompt": [{"role": "user", "content": "1"}]}], "Row 1: .*no chat template"),
        ([{"prompt": "1" * 60}, {"prompt": LONG}], "Row 1: the prompt's 61 tokens and .*=4 exceed the model's .* 64"),
        (DataLoader([{"prompt": "1"}, {"prompt": LONG}]), "Row 1: the prompt's 61 tokens"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else type(value).__name__,
)
def test_unusable_prompts_are_refused_before_anything_is_sampled(make_module, prompts, message):
    with pytest.raises(ValueError, match=message):
        RolloutLoader(prompts, make_module())


def test_a_reward_that_needs_a_missing_column_is_refused(make_module):
    module = make_module(reward=lambda prompts, completions, answer, **columns: [0.0] * len(completions))
    with pytest.raises(ValueError, match=r"needs the columns \['answer'\]"):
        RolloutLoader(rows(3), module)


def test_a_sampler_that_gives_fewer_prompts_than_it_promised_is_noticed(make_module):
    class Short(EverySecondThenTheRest):
        def __iter__(self):
            return iter(range(6))

    loader = RolloutLoader(DataLoader(rows(10), sampler=Short()), make_module())
    with pytest.raises(ValueError, match="gave 6 prompts, but its sampler promised 10"):
        stream(loader, 2)


def test_rows_of_columns_and_of_rows():
    batch = {"prompt": ["a", "b"], "number": torch.tensor([1, 2]), "pair": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    assert rows_of(batch) == [
        {"prompt": "a", "number": 1, "pair": [1.0, 2.0]},
        {"prompt": "b", "number": 2, "pair": [3.0, 4.0]},
    ]
    assert rows_of(rows(3)) == rows_of(Dataset.from_list(rows(3))) == rows(3)
    with pytest.raises(ValueError, match="Row 1 of the prompts must be a dict with a 'prompt', got tuple"):
        rows_of([{"prompt": "a"}, ("b",)])
