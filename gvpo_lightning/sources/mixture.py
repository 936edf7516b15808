"""`SourceMixture`: the completions that a rollout's groups start from, before fresh ones fill them up."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from gvpo_lightning.data.batch import Completion
from gvpo_lightning.data.rows import Row, completion_text, encode_prompt
from gvpo_lightning.policy.config_check import RowLimit
from gvpo_lightning.seeding import derive_seed, seeded_permutation
from gvpo_lightning.sources.offline import OfflineFile, encode_completion, prompt_key
from gvpo_lightning.sources.replay import ReplayBuffer
from gvpo_lightning.sources.settings import SourceSettings


class SourceMixture:
    """Draws recorded completions for prompts, and remembers fresh ones.

    Args:
        settings, group_size: how many completions of a group come from where.
        cached: recorded log-probs are the reference's, and all completions must have them.
        has_reward: there is a reward to ask for completions that bring none.
        max_tokens: longer completions from demonstrations and files are cut, and count as truncated; None = never.
    """

    def __init__(
        self, settings: SourceSettings, group_size: int, *, cached: bool, has_reward: bool, max_tokens: int | None
    ) -> None:
        self.settings, self.group_size = settings, group_size
        self.counts, self.generates = settings.counts(group_size), settings.generates
        self.cached, self.has_reward, self.max_tokens = cached, has_reward, max_tokens
        self.largest_group = group_size
        self.replay = None if settings.replay is None else ReplayBuffer(settings.replay)
        self.file: OfflineFile | None = None
        self.stops: tuple[int, ...] = ()  # the policy's, once it is loaded
        if settings.generates and not has_reward:
            raise ValueError(
                "A reward is needed for completions that are sampled: set model.reward, or train offline on "
                "completions with rewards of their own (sources.policy: 0)."
            )
        if cached and (settings.file is None or set(self.counts) - {"policy", "file"} or settings.generates):
            raise ValueError(
                "reference: cached needs completions that bring log-probs along, so sources.file as the only source: "
                "set sources: {policy: 0, file: {path: …}}, or another reference."
            )

    @property
    def names(self) -> list[str]:
        """Every source that a completion of this run can come from; a completion's source id counts them."""
        recorded = sorted(self.file.source_names) if self.file is not None else ["file"]
        return ["policy", "replay", "demonstrations", *recorded]

    def recorded_references(self) -> tuple[list[dict[str, Any]], str]:
        """What made the log-probs that the file's rows bring along, and the file's path."""
        assert self.settings.file is not None
        return self.references, self.settings.file.path

    @property
    def references(self) -> list[dict[str, Any]]:
        """What made the log-probs that the file's rows bring along."""
        return [] if self.file is None else self.file.references

    def open(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        """Read and check the file, once."""
        self.tokenizer = tokenizer
        file = self.settings.file
        if file is not None and self.file is None:
            self.file = OfflineFile(file.path, file.split, tokenizer, vocab_size)
            if self.cached and self.file.num_without_logprobs:
                raise ValueError(
                    f"{self.file.num_without_logprobs} of the {len(self.file.rows)} rows of {file.path!r} have no "
                    "reference_logprobs, but reference: cached needs them: run `gvpo reference` with this config."
                )

    def end_with(self, stops: tuple[int, ...]) -> None:
        """Take the policy's end tokens, which end what must be tokenized; ValueError where there are none."""
        if not stops:
            raise ValueError(
                "The policy has no end-of-sequence token: set generation_config.eos_token_id or tokenizer.eos_token."
            )
        self.stops = stops

    def check(self, rows: Sequence[Row], limit: RowLimit) -> None:
        """Raise ValueError, before anything is trained, where these prompts can't be given completions.

        `limit`: of what the policy can be trained with.
        """
        demonstrations, file = self.settings.demonstrations, self.file
        unrewarded = self.settings.generates or (demonstrations is not None and demonstrations.reward_column is None)
        if not self.has_reward and (unrewarded or (file is not None and file.num_without_rewards)):
            raise ValueError(
                "A reward is needed unless every completion brings its own: set model.reward, or train offline on "
                "completions with rewards (sources.policy: 0)."
            )
        most = 0
        for number, row in enumerate(rows) if demonstrations is not None or file is not None else ():
            try:
                self._check_length(row, limit)
                most = max(most, len(self._demonstration_texts(row)) if demonstrations is not None else 0)
            except ValueError as error:
                raise ValueError(f"Row {number}: {error}") from error
        if demonstrations is not None and most < (self.counts["demonstrations"] or 0):
            rank_zero_warn(
                f"sources.demonstrations.count={demonstrations.count} is more than any row has in the column "
                f"{demonstrations.column!r}, {most}: lower it, or put lists of texts there."
            )
        if self.settings.replay is not None and self.settings.replay.capacity < len(rows):
            rank_zero_warn(
                f"sources.replay.capacity={self.settings.replay.capacity} groups is less than the {len(rows)} prompts "
                "of one pass: most prompts find nothing when they come back. Raise it."
            )
        if file is not None:
            self._check_file(rows)
        shown = ", ".join(f"{name} {'all' if count is None else count}" for name, count in self.counts.items())
        rank_zero_info(f"Completions of a group: {shown}.")

    def _check_length(self, row: Row, limit: RowLimit) -> None:
        """Raise ValueError for recorded completions that are unusable or too long."""
        stops = [self.tokenizer.eos_token_id or 0]  # which of a model's end tokens stands there changes no length
        recorded = [] if self.file is None else self.file.completions(row["prompt"], stops)
        lengths = [len(completion.token_ids) for completion in recorded]
        if self.settings.demonstrations is not None:
            lengths += [len(shown.token_ids) for shown in self._demonstrations(row, stops)]
        longest = min(max(lengths, default=0), self.max_tokens or math.inf)
        prompt = len(encode_prompt(row["prompt"], self.tokenizer))
        if limit.tokens is not None and prompt + longest > limit.tokens:
            raise ValueError(
                f"the prompt's {prompt} tokens and a recorded completion of {longest} exceed {limit.reason} of "
                f"{limit.tokens}: set rollout.max_completion_tokens={max(limit.tokens - prompt, 1)}, or leave the row "
                "out."
            )

    def _check_file(self, rows: Sequence[Row]) -> None:
        assert self.file is not None
        sizes = [self.file.group_size(row["prompt"]) for row in rows]
        found = sum(size > 0 for size in sizes)
        if not found:
            raise ValueError(
                f"None of the {len(rows)} prompts has a row in sources.file.path={self.file.path!r}: the prompts must "
                f"be the same, such as {str(self.file.rows[0]['prompt'])[:80]!r}."
            )
        if found < len(rows):
            rank_zero_warn(f"{len(rows) - found} of the {len(rows)} prompts have no row in {self.file.path!r}.")
        if self.counts.get("file", 0) is None:  # groups are as large as the file has them
            self.largest_group = max(sizes)
        if self.largest_group < 2:
            raise ValueError(
                f"No prompt has two completions in {self.file.path!r}: GVPO compares the completions of one prompt "
                "with each other."
            )

    def draw(self, rows: Sequence[Row], purpose: tuple[int | str, ...], version: int) -> list[list[Completion]]:
        """Recorded completions for each prompt; log-probs under other versions of the reference are left out.

        `purpose`: what the draws' seed is derived from.
        """
        if self.counts.keys() == {"policy"}:
            return [[] for _ in rows]
        seed, keys = derive_seed(*purpose), [prompt_key(row["prompt"]) for row in rows]
        return [self._draw(row, key, derive_seed(seed, key), version) for row, key in zip(rows, keys, strict=True)]

    def num_fresh(self, groups: Sequence[Sequence[Completion]]) -> list[int]:
        """Completions to be sampled for each prompt: what fills its group up."""
        return [max(self.group_size - len(group), 0) if self.generates else 0 for group in groups]

    def _draw(self, row: Row, key: str, seed: int, version: int) -> list[Completion]:
        group: list[Completion] = []
        if self.replay is not None:
            for stored in self.replay.draw(key, self.counts["replay"] or 0, seed):
                is_current = stored.reference_version == version
                logprobs = stored.reference_logprobs if is_current else None
                group.append(_copy(stored, "replay", logprobs))
        if self.settings.demonstrations is not None:
            shown = self._demonstrations(row, self.stops)
            group += [self._cut(c) for c in self._some(shown, self.counts["demonstrations"], seed, "demonstrations")]
        if self.file is not None:
            recorded = self.file.completions(row["prompt"], self.stops)
            if not self.cached:
                recorded = [_copy(c, c.source, None) for c in recorded]
            group += [self._cut(c) for c in self._some(recorded, self.counts["file"], seed, "file")]
        return group

    @staticmethod
    def _some(completions: list[Completion], count: int | None, seed: int, purpose: str) -> list[Completion]:
        if count is None or len(completions) <= count:
            return completions
        return [completions[i] for i in sorted(seeded_permutation(len(completions), seed, purpose)[:count])]

    def _cut(self, completion: Completion) -> Completion:
        """At most `max_tokens`; what is left is rewarded anew, where there is a reward to ask."""
        limit = self.max_tokens
        if limit is None or len(completion.token_ids) <= limit:
            return completion
        ids, logprobs = completion.token_ids[:limit], completion.reference_logprobs
        return Completion(
            token_ids=ids,
            text=completion_text(ids.tolist(), self.tokenizer, self.stops),
            source=completion.source,
            truncated=True,
            reward=None if self.has_reward else completion.reward,
            reference_logprobs=None if logprobs is None else logprobs[:limit],
        )

    def _demonstrations(self, row: Row, stops: Sequence[int]) -> list[Completion]:
        """The row's demonstrations, tokenized behind its prompt."""
        return [
            Completion(
                token_ids=encode_completion(text, self.tokenizer, stops, prompt=row["prompt"]),
                text=text,
                source="demonstrations",
                truncated=False,
                reward=reward,
            )
            for text, reward in self._demonstration_texts(row)
        ]

    def _demonstration_texts(self, row: Row) -> list[tuple[str, float | None]]:
        """The row's demonstrations and their rewards; none where the column is empty."""
        settings = self.settings.demonstrations
        assert settings is not None
        for column in (settings.column, settings.reward_column):
            if column is not None and column not in row:
                raise ValueError(f"there is no column {column!r} with demonstrations, only {sorted(row)}.")
        value = row[settings.column]
        is_message = isinstance(value, list) and value and isinstance(value[0], dict)
        texts = value if isinstance(value, list) and not is_message else [value]
        texts = [_text_of(text, settings.column) for text in texts if text]
        rewards: list[float | None] = [None] * len(texts)
        if settings.reward_column is not None:
            given = row[settings.reward_column]
            rewards = given if isinstance(given, list) else [given] * len(texts)
            if len(rewards) != len(texts) or not all(isinstance(r, (int, float)) for r in rewards):
                raise ValueError(
                    f"{settings.reward_column!r} must hold one number for each of the {len(texts)} demonstrations, "
                    f"got {given!r}."
                )
        return list(zip(texts, rewards, strict=True))

    def remember(self, rollout: int, prompts: Sequence[Any], groups: Sequence[Sequence[Completion]]) -> None:
        """Keep a rollout's fresh completions, of all ranks, for replay."""
        if self.replay is None or self.replay.last_rollout == rollout:  # a fit that was stopped within it, again
            return
        fresh = (
            (prompt_key(prompt), [c for c in group if c.source == "policy" and c.reference_logprobs is not None])
            for prompt, group in zip(prompts, groups, strict=True)
        )
        self.replay.add(((key, completions) for key, completions in fresh if completions), rollout)

    def state_dict(self, precision: str) -> dict[str, Any]:
        """For a checkpoint: the replay buffer, whose log-probs are of this precision, and what made cached ones."""
        state: dict[str, Any] = {}
        if self.replay is not None:
            state["replay"] = self.replay.state_dict() | {"precision": precision}
        return state | {"cache": self.references} if self.cached else state

    def load_state_dict(self, state: dict[str, Any], precision: str) -> None:
        """Take up the replay buffer that `state_dict` left, if one is wanted; one without is of a run that had none."""
        if self.replay is None:
            return
        if "replay" in state:
            self.replay.load_state_dict(state["replay"], keep_logprobs=state["replay"]["precision"] == precision)
        else:
            self.replay = ReplayBuffer(self.replay.settings)

    def check_cache(self, state: dict[str, Any]) -> None:
        """Raise ValueError where a checkpoint was trained on cached log-probs of another reference."""
        if self.cached and self.references != state["cache"]:
            raise ValueError(
                f"This checkpoint was trained on cached log-probs from {state['cache']}, {self.settings.file} has some "
                f"from {self.references}."
            )


def _copy(completion: Completion, source: str, reference_logprobs: torch.Tensor | None) -> Completion:
    """The same completion under another name, with other log-probs."""
    return replace(completion, source=source, reference_logprobs=reference_logprobs, reference_version=0)


def _text_of(demonstration: Any, column: str) -> str:
    if isinstance(demonstration, str):
        return demonstration
    messages = demonstration if isinstance(demonstration, list) else [demonstration]
    if len(messages) == 1 and isinstance(messages[0], dict) and isinstance(messages[0].get("content"), str):
        return messages[0]["content"]
    raise ValueError(f"{column!r} must hold a text, a list of texts or one message, got {str(demonstration)[:80]!r}.")
