"""What must hold of prompts before anything is trained."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from gvpo_lightning.data.rows import Row, encode_prompt
from gvpo_lightning.guard import Guard
from gvpo_lightning.policy.config_check import RowLimit, check_router_loss, context_limit, training_limit
from gvpo_lightning.policy.loading import load_config
from gvpo_lightning.policy.source import PolicySource
from gvpo_lightning.rewards import reward_columns
from gvpo_lightning.rewards.run import Rewards
from gvpo_lightning.rewards.values import as_json
from gvpo_lightning.rollout.settings import GenerationSettings
from gvpo_lightning.sources.mixture import SourceMixture
from gvpo_lightning.sources.offline import prompt_key


@dataclass
class PromptCheck:
    """Whether a run's prompts can be given to its models, rewards and sources.

    `longest`: tokens of the longest training prompt, once there are some.
    """

    source: PolicySource
    generation: GenerationSettings
    rewards: Rewards | None
    sources: SourceMixture
    reference_model: str | None
    longest: int = 0
    guard: Guard = field(default_factory=Guard)

    def check(self, rows: Sequence[Row]) -> None:
        """Raise ValueError, naming the row, for prompts that completions can't be sampled for.

        Prompts that are there again with another answer are told of, once.
        """
        self._check(rows, context_limit(self.source.config()), self.generation.max_new_tokens)
        self._tell_of_other_answers(rows)

    def check_training(self, rows: Sequence[Row]) -> None:
        """Raise ValueError for prompts that can't be trained on, or can't be given completions."""
        source, sources = self.source, self.sources
        least_room = self.generation.max_new_tokens if sources.settings.generates else 1
        check_router_loss(source.config())
        limit = training_limit(source.config())
        self.longest = self._check(rows, limit, least_room)
        self._tell_of_other_answers(rows)
        sources.open(source.tokenizer, source.vocab_size())
        if self.reference_model is not None:
            own = training_limit(check_reference_model(self.reference_model, source))
            if own.shorter(limit) != limit:
                limit = own
                try:
                    self._check(rows, limit, least_room)
                except ValueError as error:
                    raise ValueError(f"reference.model={self.reference_model!r}: {error}") from error
        sources.check(rows, limit)

    def _tell_of_other_answers(self, rows: Sequence[Row]) -> None:
        columns = self.rewards.needed_columns(rows[0]) if self.rewards is not None and len(rows) else []
        answers: dict[str, list[str]] = {}
        for row in rows if columns else ():
            answers.setdefault(prompt_key(row["prompt"]), []).append(json.dumps([as_json(row[c]) for c in columns]))
        several = {key: different for key, different in answers.items() if len(set(different)) > 1}
        if several:
            message = (
                f"{len(several)} prompts, on {sum(map(len, several.values()))} of the {len(rows)} rows, are there "
                f"several times with different values in {columns}, such as {next(iter(several))[-200:]!r}: what one "
                "row rewards another does not, and the policy can't tell them apart. Keep one row of each prompt."
            )
            self.guard.say(message, message)

    def _check(self, rows: Iterable[Row], limit: RowLimit, max_new_tokens: int) -> int:
        return check_prompts(rows, self.source.tokenizer, limit, self.rewards, max_new_tokens)


def check_prompts(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    limit: RowLimit,
    rewards: Rewards | None,
    max_new_tokens: int,
) -> int:
    """Raise ValueError, naming the row, for prompts that a policy with this limit can't be given.

    That is: no `prompt`, a prompt that is neither text nor messages, no room for max_new_tokens within the
    limit, rows without the columns that the rewards need, or without a value that one can't do without.

    Returns:
        the longest prompt's tokens.
    """
    longest = 0
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"Row {number} of the prompts must be a dict with a 'prompt', got {type(row).__name__}.")
        if "prompt" not in row:
            raise ValueError(f"Row {number} has no 'prompt': its columns are {sorted(row)}.")
        if number == 0:
            columns = set(row)
            if rewards is not None:
                rewards.check_columns(set(reward_columns(row)))
        if set(row) != columns:
            raise ValueError(f"Row {number} has the columns {sorted(row)}, but row 0 has {sorted(columns)}.")
        try:
            length = len(encode_prompt(row["prompt"], tokenizer))
            if rewards is not None:
                rewards.check_row(row)
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}") from error
        if limit.tokens is not None and length + max_new_tokens > limit.tokens:
            raise ValueError(
                f"Row {number}: the prompt's {length} tokens and generation.max_new_tokens={max_new_tokens} exceed "
                f"{limit.reason} of {limit.tokens}: shorten the prompt or max_new_tokens, or leave the row out."
            )
        longest = max(longest, length)
    return longest


def check_reference_model(name: str, source: PolicySource) -> PretrainedConfig:
    """The config of the model `name`; ValueError where it can't score what the policy says."""
    config = load_config(name, source.loading_of(name), setting="reference.model")
    vocab_size = config.get_text_config().vocab_size
    if vocab_size < source.vocab_size():
        raise ValueError(
            f"reference.model={name!r} has {vocab_size} token ids, fewer than the policy's {source.vocab_size()}: it "
            "can't score what the policy says. Take a model of the same family, with the policy's tokenizer."
        )
    return config
