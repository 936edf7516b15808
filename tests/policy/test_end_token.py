"""The end token is part of the completion: its log-prob counts. The mutation that forgets it turns the check red."""

import pytest
import torch

import gvpo_lightning.rollout.generate as generation
from gvpo_lightning.policy.head import completion_logprobs
from gvpo_lightning.policy.prepare import prepare_policy
from gvpo_lightning.rollout.generate import generate_completions
from gvpo_lightning.rollout.settings import GenerationSettings
from tests.error_budget import assert_within, logprob_budget


def check_that_the_end_token_counts(policy, tokenizer):
    """Every sampled completion's log-prob is that of its text AND of ending there."""
    assert tokenizer.eos_token_id == 1
    prepare_policy(policy)
    batch = generate_completions(policy, tokenizer, [[3, 4, 5]], 64, GenerationSettings(max_new_tokens=6), seed=0)
    finished = ~batch.truncated
    assert 10 < finished.sum() < 64
    last = batch.completion_ids.gather(1, (batch.lengths - 1).clamp(min=0)[:, None]).squeeze(1)
    assert (last[finished] == 1).all()
    assert (last[~finished] != 1).all()

    sequence_logprobs = completion_logprobs(policy, batch)[0].sum(dim=1)
    for row in finished.nonzero().flatten().tolist()[:8]:
        written = [i for i in batch.completion_ids[row][batch.completion_mask[row]].tolist() if i != 1]
        ids = torch.tensor([[3, 4, 5, *written, 1]])
        logits = policy(ids).logits[0, 2:-1]
        logprobs = torch.log_softmax(logits, dim=-1)
        expected = logprobs.gather(1, ids[0, 3:, None]).sum()
        assert_within(sequence_logprobs[row], expected, len(logits) * logprob_budget(logits))


def test_the_end_token_counts(tiny_policy, tokenizer):
    check_that_the_end_token_counts(tiny_policy(), tokenizer)


def test_an_uncounted_end_token_is_noticed(tiny_policy, tokenizer, monkeypatch):
    def without_the_stop_token(ids, stops):
        return [token for token in cut(ids, stops) if token not in stops]

    cut = generation.cut_after_stop
    monkeypatch.setattr(generation, "cut_after_stop", without_the_stop_token)
    with pytest.raises(AssertionError):
        check_that_the_end_token_counts(tiny_policy(), tokenizer)
