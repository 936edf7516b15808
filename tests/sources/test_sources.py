"""Completions from anywhere, mixed in one group, trained through the Trainer."""

import json
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from gvpo_lightning.rollout.collect import Collector
from gvpo_lightning.rollout.groups import sample_rollout
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings
from gvpo_lightning.sources.settings import (
    DemonstrationSettings,
    FileSettings,
    ReplaySettings,
    SourceSettings,
)
from tests.small_tokenizers import llama2
from tests.watching import rollouts_of

SHOWN = DemonstrationSettings("answer")


def by_group(rollout):
    groups = [[] for _ in rollout.prompts]
    for row, group in enumerate(rollout.batch.group_ids.tolist()):
        groups[group].append((rollout.sources[row], rollout.completions[row]))
    return groups


@pytest.fixture
def recorded(tmp_path, make_module, prompts, tokenizer):
    """Writes recorded completions of all prompts, ragged groups of 1 to 5, drawn from the policy; returns the path."""

    def write(name="recorded.jsonl", **columns):
        module = make_module()
        module.policy.eval()
        lines = []
        for number, row in enumerate(prompts):
            rollout = sample_rollout(
                module.policy, tokenizer, [row], 1 + number % 5, module.generation, module.rewards, seed=number
            )
            (line,) = rollout.rows()
            lines.append(json.dumps(line | {key: value(line) for key, value in columns.items()}))
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    return write


def test_replay_brings_back_what_the_prompt_was_given_before(make_module, fit):
    module = make_module(sources=SourceSettings(replay=ReplaySettings(2)))
    rollouts = rollouts_of(module)
    fit(module, max_steps=12)  # 24 prompts, 8 a rollout of two updates: two passes
    seen = {}
    for number, rollout in enumerate(rollouts):
        for prompt, group in zip(rollout.prompts, by_group(rollout), strict=True):
            sources = [source for source, _ in group]
            assert sources == (["policy"] * 4 if number < 3 else ["policy"] * 2 + ["replay"] * 2)
            assert {text for source, text in group if source == "replay"} <= seen.get(prompt, set())
            seen.setdefault(prompt, set()).update(text for source, text in group if source == "policy")


def test_policy_0_with_replay_samples_only_what_there_is_nothing_to_replay_for(make_module, fit):
    module = make_module(sources=SourceSettings(policy=0, replay=ReplaySettings(4, selection="recent")))
    rollouts = rollouts_of(module)
    fit(module, max_steps=12)
    kinds = [set(rollout.sources) for rollout in rollouts]
    assert kinds == [{"policy"}] * 3 + [{"replay"}] * 3


@pytest.mark.parametrize("reference", ["frozen", "previous"])
def test_replayed_completions_are_measured_against_the_reference_of_now(make_module, fit, monkeypatch, reference):
    module = make_module(sources=SourceSettings(replay=ReplaySettings(2)), reference=reference)
    scored = []
    original = Collector._score

    def score(collector, policy, batch, groups):
        replayed = [c for group in groups for c in group if c.source == "replay"]
        scored.append([c.reference_logprobs is None for c in replayed])
        original(collector, policy, batch, groups)

    monkeypatch.setattr(Collector, "_score", score)
    fit(module, max_steps=8)
    assert len(scored[3]) == 16
    assert all(scored[3]) == (reference == "previous")  # the frozen reference's log-probs are kept
    assert any(scored[3]) == (reference == "previous")


def test_demonstrations_stand_in_every_group_and_are_rewarded(make_module, fit):
    module = make_module(sources=SourceSettings(demonstrations=SHOWN))
    rollouts = rollouts_of(module)
    trainer = fit(module, max_steps=2)
    rows = {f"{n}+{n % 7}=": str(n + n % 7) for n in range(24)}
    for prompt, group in zip(rollouts[0].prompts, by_group(rollouts[0]), strict=True):
        assert [source for source, _ in group] == ["policy"] * 3 + ["demonstrations"]
        assert group[-1][1] == rows[prompt]
    batch = rollouts[0].batch
    shown = torch.tensor([source == "demonstrations" for source in rollouts[0].sources])
    (reward,) = module.rewards.functions.values()
    expected = reward(None, [text for text, s in zip(rollouts[0].completions, shown, strict=True) if s])
    assert batch.rewards[shown].tolist() == pytest.approx(expected)
    assert all(
        ids[mask][-1] == 1 for ids, mask in zip(batch.completion_ids[shown], batch.completion_mask[shown], strict=True)
    )
    metrics = trainer.callback_metrics
    assert float(metrics["source/policy/fraction"]) == 0.75
    assert float(metrics["source/demonstrations/fraction"]) == 0.25
    assert float(metrics["source/demonstrations/reward_mean"]) == pytest.approx(sum(expected) / len(expected))
    for source in ("policy", "demonstrations"):
        for name in ("mean", "std", "max", "p05", "p50", "p95"):
            assert math.isfinite(float(metrics[f"log_ratio/{source}/{name}"]))
        assert float(metrics[f"residual/{source}/rms"]) > 0
        assert float(metrics[f"source/{source}/kept_fraction"]) == 1
        assert float(metrics[f"source/{source}/length_mean"]) > 0


def test_given_rewards_of_demonstrations_are_used_and_lists_may_be_longer_than_their_count(make_module, fit, prompts):
    rows = [row | {"shown": ["7", "8", "9"], "worth": [5.0, 6.0, 7.0]} for row in prompts]
    settings = DemonstrationSettings("shown", count=2, reward_column="worth")
    module = make_module(sources=SourceSettings(demonstrations=settings))
    rollouts = rollouts_of(module)
    fit(module, rows=rows, max_steps=6)
    drawn = set()
    for rollout in rollouts:
        rewards = rollout.batch.rewards.tolist()
        for text, source, reward in zip(rollout.completions, rollout.sources, rewards, strict=True):
            if source == "demonstrations":
                assert reward == {"7": 5.0, "8": 6.0, "9": 7.0}[text]
                drawn.add(text)
    assert drawn == {"7", "8", "9"}


def test_a_prompt_without_demonstration_gets_a_fresh_completion_instead(make_module, fit, prompts):
    rows = [row | {"shown": None if n % 2 else "7"} for n, row in enumerate(prompts)]
    module = make_module(sources=SourceSettings(demonstrations=DemonstrationSettings("shown")))
    rollouts = rollouts_of(module)
    fit(module, rows=rows, max_steps=2)
    assert all(len(group) == 4 for group in by_group(rollouts[0]))
    assert {sum(s == "demonstrations" for s, _ in group) for group in by_group(rollouts[0])} == {0, 1}


def test_more_demonstrations_than_there_are_is_warned_of(make_module, fit):
    with pytest.warns(UserWarning, match=r"count=2 is more than any row has in the column 'answer', 1"):
        fit(make_module(sources=SourceSettings(demonstrations=DemonstrationSettings("answer", count=2))), max_steps=1)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, DemonstrationSettings("shown"), r"Row 0: there is no column 'shown'"),
        ({"shown": 7}, DemonstrationSettings("shown"), r"Row 0: 'shown' must hold a text"),
        (
            {"worth": "high"},
            DemonstrationSettings("answer", reward_column="worth"),
            r"Row 0: 'worth' must hold one number",
        ),
    ],
)
def test_columns_that_hold_no_demonstrations_are_refused(make_module, fit, prompts, change, settings, message):
    module = make_module(sources=SourceSettings(demonstrations=settings))
    with pytest.raises(ValueError, match=message):
        fit(module, rows=[row | change for row in prompts])


def test_fully_offline_samples_nothing_and_needs_no_reward(make_module, fit, weights, recorded, monkeypatch):
    module = make_module(sources=SourceSettings(policy=0, file=FileSettings(recorded())), reward=None)

    def generate(*_, **__):
        raise AssertionError("nothing is to be generated")

    monkeypatch.setattr(module.policy, "generate", generate)
    before, rollouts = weights(module), rollouts_of(module)
    trainer = fit(module, max_steps=6)
    assert not torch.equal(weights(module), before)
    sizes = sorted(len(group) for rollout in rollouts for group in by_group(rollout))
    assert sizes == sorted(1 + n % 5 for n in range(24))  # ragged, as recorded
    assert float(trainer.callback_metrics["source/file.policy/fraction"]) == 1
    assert "kl/reference" not in trainer.callback_metrics  # these are no samples of the policy


def test_an_offline_row_keeps_its_rewards_and_null_leaves_its_group(make_module, fit, recorded):
    path = recorded(rewards=lambda line: [None if i == 0 else 0.25 * i for i in range(len(line["completions"]))])
    module = make_module(sources=SourceSettings(policy=0, file=FileSettings(path)), reward=None)
    rollouts = rollouts_of(module)
    trainer = fit(module, max_steps=2)
    kept = rollouts[0].batch.kept
    sizes = [len(group) for group in by_group(rollouts[0])]
    assert int(kept.sum()) == sum(size - 1 for size in sizes)
    assert set(rollouts[0].batch.rewards[kept].tolist()) <= {0.25, 0.5, 0.75, 1.0}
    expected = len(sizes) / sum(sizes)
    assert float(trainer.callback_metrics["completion/dropped_unrewarded_fraction"]) == pytest.approx(expected)


def test_a_file_beside_fresh_completions(make_module, fit, recorded):
    module = make_module(sources=SourceSettings(file=FileSettings(recorded(), count=2)))
    rollouts = rollouts_of(module)
    fit(module, max_steps=6)
    for rollout in rollouts:
        for group in by_group(rollout):
            assert len(group) == 4  # where the file has only one, a fresh one stands in
            assert sum(source == "file.policy" for source, _ in group) <= 2


@pytest.mark.parametrize(
    ("sources", "settings", "message"),
    [
        (SourceSettings(), {"reward": None}, "A reward is needed for completions that are sampled"),
        (
            SourceSettings(policy=0, demonstrations=DemonstrationSettings("answer", 4)),
            {"reward": None},
            "A reward is needed",
        ),
        (SourceSettings(demonstrations=SHOWN), {"reference": "cached"}, "reference: cached needs completions"),
        (
            SourceSettings(file=FileSettings("x.jsonl", 4)),
            {"reference": "cached"},
            "reference: cached needs completions",
        ),
    ],
)
def test_sources_that_can_not_work_are_refused(make_module, fit, sources, settings, message):
    with pytest.raises(ValueError, match=message):
        fit(make_module(sources=sources, **settings))


def test_a_file_of_other_prompts_is_refused_and_a_partial_one_is_warned_of(make_module, fit, recorded, prompts):
    path = recorded()
    module = make_module(sources=SourceSettings(policy=0, file=FileSettings(path)))
    with pytest.raises(ValueError, match="None of the 1 prompts has a row"):
        fit(module, rows=[{"prompt": "99+9=", "answer": "108"}])
    with pytest.warns(UserWarning, match="1 of the 25 prompts have no row"):
        fit(module, rows=[*prompts, {"prompt": "99+9=", "answer": "108"}], max_steps=6)


def test_demonstrations_and_recorded_texts_stand_behind_their_prompts(make_module, tiny_policy, fit, tmp_path):
    """With a tokenizer that would begin each of them with a space; what is cut is read in its place too."""
    tokenizer = llama2(pad_token="<unk>")
    rows = [{"prompt": prompt, "shown": "7 ab", "worth": 1.0} for prompt in ("7=", "ab:", "a =", "7:")]
    lines = [{"prompt": row["prompt"], "completions": ["ab:", " ab7="]} for row in rows]
    (tmp_path / "recorded.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    sources = SourceSettings(
        demonstrations=DemonstrationSettings("shown"), file=FileSettings(str(tmp_path / "recorded.jsonl"), count=2)
    )
    rollout = RolloutSettings(group_size=4, prompts_per_rollout=4, prompts_per_update=4, max_completion_tokens=4)
    policy = tiny_policy(vocab_size=len(tokenizer), eos_token_id=2)
    module = make_module(policy=policy, tokenizer=tokenizer, sources=sources, rollout=rollout)
    rollouts = rollouts_of(module)
    fit(module, rows=rows, max_steps=1)
    (found,) = rollouts
    for row, (source, text) in enumerate(zip(found.sources, found.completions, strict=True)):
        if source == "policy":
            continue
        ids = found.batch.completion_ids[row][found.batch.completion_mask[row]].tolist()
        prompt = found.batch.prompt_ids[row][found.batch.prompt_mask[row]].tolist()
        joint = tokenizer.decode([*prompt, *ids], skip_special_tokens=True)
        assert joint == found.prompts[int(found.batch.group_ids[row])] + text
        assert text in {"demonstrations": ("7 ab",), "file": ("ab:", " ab7=", " ab7")}[source]
    assert set(found.sources) == {"policy", "demonstrations", "file"}


def test_recorded_completions_that_are_too_long_are_cut_and_count_as_truncated(make_module, fit, recorded):
    rollout = RolloutSettings(prompts_per_rollout=8, prompts_per_update=8, max_completion_tokens=2, truncated="drop")
    module = make_module(sources=SourceSettings(policy=0, file=FileSettings(recorded())), rollout=rollout)
    rollouts = rollouts_of(module)
    fit(module, max_steps=1)
    batch = rollouts[0].batch
    cut = batch.truncated.tolist()
    (reward,) = module.rewards.functions.values()
    texts = [text for text, is_cut in zip(rollouts[0].completions, cut, strict=True) if is_cut]
    assert all(len(text) <= 2 for text in texts)  # what is left of them is what is rewarded
    assert batch.rewards[batch.truncated].tolist() == pytest.approx(reward(None, texts))
    assert int(batch.completion_ids.shape[1]) == 2
    assert batch.truncated.any()
    assert not (batch.truncated & batch.kept).any()
    assert rollouts[0].dropped["truncated"] == int(batch.truncated.sum())


def test_recorded_completions_beyond_the_context_are_refused(make_module, fit, prompts):
    rows = [row | {"shown": "7" * (70 if n == 3 else 1)} for n, row in enumerate(prompts)]
    sources = SourceSettings(demonstrations=DemonstrationSettings("shown"))
    with pytest.raises(ValueError, match=r"Row 3: .*completion of 71 exceed the model's context of 64"):
        fit(make_module(sources=sources), rows=rows)
    rollout = RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4, max_completion_tokens=9)
    fit(make_module(sources=sources, rollout=rollout), rows=rows, max_steps=1)


def test_a_rollout_that_a_resumed_fit_samples_again_is_remembered_once(make_module, fit, tmp_path):
    """The run has failed in the first forward pass of its second rollout, when that was in the buffer already."""
    sources = SourceSettings(replay=ReplaySettings(2))
    failing = make_module(sources=sources)

    def fail(model, arguments):
        if model.training and failing.microstep == 2:
            raise RuntimeError("out of memory")

    failing.policy.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(failing, callbacks=[OnExceptionCheckpoint(tmp_path, "failed")], enable_checkpointing=True)
    assert len(failing.sources.replay) == 16
    resumed = make_module(sources=sources)
    fit(resumed, max_steps=4, ckpt_path=tmp_path / "failed.ckpt")
    assert len(resumed.sources.replay) == 16


def test_a_resumed_run_without_replay_has_nothing_of_what_the_module_remembers(make_module, fit, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(make_module(), max_steps=2, callbacks=[saver], enable_checkpointing=True)
    module = make_module(sources=SourceSettings(replay=ReplaySettings(2)))
    fit(module, max_steps=4)
    assert len(module.sources.replay) == 16
    fit(module, max_steps=4, ckpt_path=tmp_path / "step=2.ckpt")
    assert len(module.sources.replay) == 8  # of the one rollout since


def test_groups_of_a_file_are_checked_with_their_own_size(make_module, fit, recorded):
    rollout = RolloutSettings(group_size=2, prompts_per_rollout=8, prompts_per_update=4, micro_batch_size=8)
    module = make_module(sources=SourceSettings(policy=0, file=FileSettings(recorded())), rollout=rollout)
    with pytest.raises(ValueError, match="An update has up to 20 completions a rank"):
        fit(module)


@pytest.mark.parametrize("stop", [4, 7, 9])  # a rollout's end and twice within one; the second pass begins at 6
@pytest.mark.parametrize("selection", ["uniform", "recent"])
def test_replay_and_demonstrations_resume_bitwise(make_module, fit, weights, tmp_path, stop, selection):
    settings = {
        "sources": SourceSettings(replay=ReplaySettings(1, selection=selection), demonstrations=SHOWN),
        "reference": "frozen",
    }
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    through = make_module(**settings)
    whole = rollouts_of(through)
    fit(through, callbacks=[saver], enable_checkpointing=True, max_steps=14)
    torch.manual_seed(99)
    resumed = make_module(seed=5, **settings)
    rest = rollouts_of(resumed)
    fit(resumed, ckpt_path=tmp_path / f"step={stop}.ckpt", max_steps=14)
    assert torch.equal(weights(resumed), weights(through))
    for mine, theirs in zip(rest, whole[-len(rest) :], strict=True):
        assert by_group(mine) == by_group(theirs)
    assert len(resumed.sources.replay) == len(through.sources.replay) == 56


def test_zero_variance_groups_can_be_dropped_and_are_counted_either_way(make_module, fit, caplog):
    def reward(prompts, completions, **_):
        return [float(prompt.startswith("1") and i % 2) for i, prompt in enumerate(prompts)]

    fractions, dropped = [], []
    for choice in ("keep", "drop"):
        rollout = RolloutSettings(group_size=4, prompts_per_rollout=24, prompts_per_update=24, zero_variance=choice)
        caplog.clear()
        with caplog.at_level("INFO", logger="lightning.pytorch"):
            trainer = fit(make_module(reward=reward, rollout=rollout), max_steps=1)
        assert ("changes the objective" in caplog.text) == (choice == "drop")
        fractions.append(float(trainer.callback_metrics["group/zero_variance_fraction"]))
        dropped.append(float(trainer.callback_metrics["group/dropped"]))
    assert fractions == pytest.approx([13 / 24] * 2)  # 1, 10 … 19 have a varied reward
    assert dropped == [0, 13]


@pytest.mark.parametrize(
    "settings", [GenerationSettings(max_new_tokens=4, min_p=0.1), GenerationSettings(max_new_tokens=4, temperature=0)]
)
def test_samplers_that_take_support_away_are_warned_of_once(make_module, fit, settings):
    with pytest.warns(UserWarning, match="never draws some of what the reference allows") as caught:
        fit(make_module(generation=settings), max_steps=4)
    assert sum("never draws" in str(w.message) for w in caught) == 1


def test_offline_completions_that_the_reference_would_never_say_are_warned_of(make_module, fit, prompts, tiny_policy):
    policy = tiny_policy()
    with torch.no_grad():
        policy.lm_head.weight.mul_(60)  # a sharp reference, which gives random text next to no probability
    rows = [row | {"shown": ["999", "888", "+=+", "==="]} for row in prompts]
    sources = SourceSettings(policy=0, demonstrations=DemonstrationSettings("shown", count=4))
    with pytest.warns(UserWarning, match="less likely under the reference than random tokens"):
        trainer = fit(make_module(policy=policy, sources=sources), rows=rows, max_steps=1)
    assert float(trainer.callback_metrics["source/demonstrations/negligible_fraction"]) > 0.5


def test_exploding_log_ratios_are_named_while_the_loss_is_finite(make_module, fit):
    module = make_module(optimizer=lambda p: torch.optim.SGD(p, lr=300.0), max_skipped_updates=0)
    losses = []
    original = module.guard.log_ratios

    def log_ratios(implicit, rewards):
        losses.append(float(implicit))
        original(implicit, rewards)

    module.guard.log_ratios = log_ratios
    with pytest.warns(UserWarning, match="Log-ratios are exploding"):
        fit(module, max_steps=3)
    assert all(math.isfinite(value) for value in losses)
