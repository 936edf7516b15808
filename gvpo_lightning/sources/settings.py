"""How many completions of a group come from where."""

from dataclasses import dataclass
from typing import Literal

Count = int | float


@dataclass(frozen=True)
class ReplaySettings:
    """Completions that this run has sampled for the same prompt in earlier rollouts.

    Attributes:
        count: completions of each group (a whole number), or a fraction of the group (with a point: 0.5).
        capacity: groups that are remembered; the oldest are forgotten first. Less than the prompts of one pass
            over the data, and most prompts find nothing when they come back.
        selection: "uniform" over all that is remembered of the prompt, or "recent", the newest first.
    """

    count: Count
    capacity: int = 4096
    selection: Literal["uniform", "recent"] = "uniform"

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"sources.replay.capacity must be at least 1 group, got {self.capacity}.")
        if self.selection not in ("uniform", "recent"):
            raise ValueError(f"sources.replay.selection must be 'uniform' or 'recent', got {self.selection!r}.")


@dataclass(frozen=True)
class DemonstrationSettings:
    """Completions of people or teachers from a column of the training data.

    Attributes:
        column: its name; a text, a list of texts, or one assistant message. An empty one is no demonstration.
        count: as in `ReplaySettings`; of a longer list, so many are drawn anew in every rollout.
        reward_column: a column with their rewards, a number or a list; without it the reward is asked for them.
    """

    column: str
    count: Count = 1
    reward_column: str | None = None


@dataclass(frozen=True)
class FileSettings:
    """Completions recorded earlier, in the offline format: see `gvpo_lightning.sources.offline`.

    Attributes:
        path: a .jsonl or .parquet file, a `save_to_disk` folder or a hub id, with a row for each prompt.
        count: as in `DemonstrationSettings`; None = all that are recorded, where there is no other source.
        split: the split of a folder or hub id.
    """

    path: str
    count: Count | None = None
    split: str = "train"


@dataclass(frozen=True)
class SourceSettings:
    """The sources that are mixed in every group. The default is fresh completions alone.

    Attributes:
        policy: fresh completions of the policy; None = the rest of the group. 0 without replay samples nothing
            at all while training, and no reward is needed where all completions bring theirs along.
        replay, demonstrations, file: the other sources, each with its count; all counts add up to group_size.

    Where a source has less than its count for a prompt, fresh completions fill the group up; where nothing is
    sampled, the group is smaller.
    """

    policy: Count | None = None
    replay: ReplaySettings | None = None
    demonstrations: DemonstrationSettings | None = None
    file: FileSettings | None = None

    @property
    def generates(self) -> bool:
        """Whether training samples completions."""
        if self.replay is not None or self.policy is not None:
            return self.replay is not None or self.policy != 0
        return self.file is None or self.file.count is not None

    def check_policy_alone(self, objective: str) -> None:
        """Raise ValueError where completions may come from elsewhere than the current policy."""
        others = [name for name in ("replay", "demonstrations", "file") if getattr(self, name) is not None]
        if others or self.policy == 0:
            raise ValueError(
                f"objective: {objective} trains on the current policy's own completions alone, since it takes ratios "
                f"to the policy that has sampled them, got sources {others or 'without the policy'}: leave "
                "model.sources out, or choose gvpo, dpo or sft, which take completions from anywhere."
            )

    def counts(self, group_size: int) -> dict[str, int | None]:
        """Completions of each source in a group of `group_size`; None = all that are recorded.

        Raises:
            ValueError: counts that do not add up to the group.
        """
        given = {
            name: part.count
            for name in ("replay", "demonstrations", "file")
            if (part := getattr(self, name)) is not None
        }
        if "file" in given and given["file"] is None:
            if len(given) > 1 or self.policy:
                raise ValueError(
                    "sources.file.count may be left out only where the file is the only source (policy: 0): "
                    f"set sources.file.count, so that all counts add up to group_size={group_size}."
                )
            return {"policy": 0, "file": None}
        counts = {name: whole_count(f"sources.{name}.count", count, group_size) for name, count in given.items()}
        rest = group_size - sum(counts.values())
        policy = rest if self.policy is None else whole_count("sources.policy", self.policy, group_size, least=0)
        if policy < 0 or policy != rest:
            asked = counts if self.policy is None else {"policy": policy} | counts
            shown = " and ".join(f"{name} {count}" for name, count in asked.items())
            raise ValueError(
                f"The sources' counts must add up to rollout.group_size={group_size}, got {shown}: "
                f"set rollout.group_size={sum(asked.values())}, or change the counts."
            )
        return {"policy": policy, **counts}


def whole_count(name: str, count: Count | None, group_size: int, least: int = 1) -> int:
    """A count as it is, a fraction of the group rounded to whole completions.

    Raises:
        ValueError: neither a count of at least `least` nor a fraction in (0, 1].
    """
    assert count is not None
    if isinstance(count, float):
        if not (0 < count <= 1 or count == least == 0):
            raise ValueError(f"{name} must be a whole number, or a fraction in (0, 1] of the group, got {count}.")
        return max(round(count * group_size), least)
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}.")
    return count
