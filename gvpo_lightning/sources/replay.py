"""`ReplayBuffer`: completions of earlier rollouts, by prompt."""

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch

from gvpo_lightning.data.batch import Completion
from gvpo_lightning.seeding import seeded_permutation
from gvpo_lightning.sources.settings import ReplaySettings


class ReplayBuffer:
    """The last `capacity` groups that were sampled, the same on every rank."""

    def __init__(self, settings: ReplaySettings) -> None:
        self.settings = settings
        self._groups: dict[str, deque[list[Completion]]] = {}  # by prompt, oldest first
        self._order: deque[str] = deque()  # the prompts of all groups, oldest first
        self.last_rollout = -1  # whose groups were the last to be added

    def __len__(self) -> int:
        return len(self._order)

    def add(self, groups: Iterable[tuple[str, list[Completion]]], rollout: int) -> None:
        """Remember a rollout's completions of prompts, given by their keys; forget the oldest beyond the capacity."""
        self.last_rollout = rollout
        for key, completions in groups:
            self._groups.setdefault(key, deque()).append(completions)
            self._order.append(key)
            if len(self._order) > self.settings.capacity:
                oldest = self._order.popleft()
                self._groups[oldest].popleft()
                if not self._groups[oldest]:
                    del self._groups[oldest]

    def draw(self, key: str, count: int, seed: int) -> list[Completion]:
        """Up to `count` different completions of a prompt; the same seed draws the same ones."""
        newest_first = [c for group in reversed(self._groups.get(key, ())) for c in group]
        if self.settings.selection == "recent":
            return newest_first[:count]
        return [newest_first[i] for i in seeded_permutation(len(newest_first), seed, "replay")[:count]]

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and lists: a few large tensors, however many completions there are."""
        seen: dict[str, int] = {}
        groups = []
        for key in self._order:
            groups.append(self._groups[key][seen.setdefault(key, 0)])
            seen[key] += 1
        completions = [c for group in groups for c in group]
        empty = [torch.zeros(0)]
        return {
            "last_rollout": self.last_rollout,
            "keys": list(self._order),
            "group_sizes": [len(group) for group in groups],
            "lengths": [len(c.token_ids) for c in completions],
            "token_ids": torch.cat([c.token_ids for c in completions] or [torch.zeros(0, dtype=torch.int64)]),
            "reference_logprobs": torch.cat([c.reference_logprobs for c in completions] or empty),  # type: ignore[misc]
            "versions": [c.reference_version for c in completions],
            "texts": [c.text for c in completions],
            "truncated": [c.truncated for c in completions],
            "rewards": [c.reward for c in completions],
            "components": [c.components for c in completions],
        }

    def load_state_dict(self, state: dict[str, Any], *, keep_logprobs: bool = True) -> None:
        """Take up what `state_dict` left; beyond a smaller capacity the oldest are forgotten.

        Without `keep_logprobs` they count as those of another version of the reference.
        """
        self._groups, self._order, self.last_rollout = {}, deque(), state["last_rollout"]
        columns = zip(
            state["token_ids"].split(state["lengths"]),
            state["texts"],
            state["truncated"],
            state["rewards"],
            state["components"],
            state["reference_logprobs"].split(state["lengths"]),
            state["versions"],
            strict=True,
        )
        completions = (
            Completion(
                token_ids=ids.clone(),
                text=text,
                source="replay",
                truncated=truncated,
                reward=reward,
                components=components,
                reference_logprobs=logprobs.clone(),
                reference_version=version if keep_logprobs else -1,
            )
            for ids, text, truncated, reward, components, logprobs, version in columns
        )
        for key, size in zip(state["keys"], state["group_sizes"], strict=True):
            self.add([(key, [next(completions) for _ in range(size)])], self.last_rollout)
