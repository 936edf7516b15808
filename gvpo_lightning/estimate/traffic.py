"""Bytes that one GPU receives from others in one optimizer update, by collective."""

import math
from dataclasses import dataclass
from typing import Literal

from gvpo_lightning.estimate.facts import RunFacts
from gvpo_lightning.estimate.sizes import ModelSizes


@dataclass(frozen=True)
class Collective:
    """All calls of one kind in an update (those of a rollout divided by its updates).

    Attributes:
        phase: what it is a part of.
        what: what is sent.
        kind: "all-gather", "reduce-scatter" or "all-reduce".
        payload: bytes of the whole tensors, summed over the calls.
        ranks: GPUs that take part.
        ranks_per_node: of them, in one machine.
        overlapped: whether matmuls run at the same time.
    """

    phase: Literal["train", "rollout", "reference"]
    what: str
    kind: Literal["all-gather", "reduce-scatter", "all-reduce"]
    payload: int
    ranks: int
    ranks_per_node: int
    overlapped: bool = True

    @property
    def moved(self) -> int:
        """Bytes into one GPU, by a ring or anything as good."""
        return int(self._rounds * self.payload * (self.ranks - 1) / self.ranks)

    @property
    def between_nodes(self) -> int:
        """Of one GPU's share of what must come into its machine."""
        nodes = math.ceil(self.ranks / self.ranks_per_node)
        return int(self._rounds * self.payload * (nodes - 1) / nodes / self.ranks_per_node)

    @property
    def _rounds(self) -> int:
        return 2 if self.kind == "all-reduce" else 1


def estimate_traffic(sizes: ModelSizes, facts: RunFacts) -> list[Collective]:
    """The collectives of one update; empty on one GPU. Metrics and the update plan's sizes are too small to count."""
    return [c for c in (*_data_parallel(sizes, facts), *_tensor_parallel(sizes, facts)) if c.ranks > 1 and c.payload]


def _data_parallel(sizes: ModelSizes, facts: RunFacts) -> list[Collective]:
    work, layers = facts.workload, sizes.layers // facts.tensor_parallel
    whole = layers + sizes.root
    trained = whole if facts.trained_parameters is None else whole * facts.trained_parameters // sizes.parameters
    per_node = max(1, min(facts.num_gpus, facts.gpus_per_node) // facts.tensor_parallel)
    ranks = (facts.data_parallel, per_node)
    if not facts.sharded:  # no_sync: once an update, whatever is accumulated
        return [Collective("train", "gradients", "all-reduce", trained * facts.weight_bytes, *ranks)]
    compute, updates = facts.compute_bytes, work.updates_per_rollout
    passes = 2 if facts.two_passes else 1
    calls = [
        Collective("train", "weights, forward", "all-gather", passes * work.accumulate * whole * compute, *ranks),
        # the root unit stays whole from the forward to the backward pass
        Collective("train", "weights, backward", "all-gather", work.accumulate * layers * compute, *ranks),
        Collective("train", "gradients", "reduce-scatter", work.accumulate * trained * facts.reduce_bytes, *ranks),
    ]
    if work.generates:
        width = facts.weight_bytes if facts.strategy == "fsdp1" else compute
        calls.append(Collective("rollout", "weights", "all-gather", whole * width // updates, *ranks, False))
    if facts.num_scorings:
        batches = facts.num_scorings * math.ceil(facts.rollout_completions / facts.micro_batch)
        calls.append(Collective("reference", "weights", "all-gather", batches * whole * compute // updates, *ranks))
    return calls


def _tensor_parallel(sizes: ModelSizes, facts: RunFacts) -> list[Collective]:
    """All-reduces of the residual stream, in each layer two forward and two backward, which take two things.

    Matrices that read the same tensor must share the all-reduce of its gradient (`PrepareModuleInput`), or there are
    five backward. A layer that is computed again needs one more: it stops before its last (`use_reentrant=False`).
    """
    work = facts.workload
    token = sizes.num_layers * sizes.hidden * facts.compute_bytes
    trained = facts.micro_batch * work.accumulate * work.tokens
    rollout = facts.rollout_completions * work.tokens // work.updates_per_rollout
    ranks = (facts.tensor_parallel, facts.tensor_parallel)
    count = 4 + facts.checkpointing + 2 * facts.two_passes
    calls = [Collective("train", "activations", "all-reduce", count * trained * token, *ranks, False)]
    if work.generates:
        calls.append(Collective("rollout", "activations", "all-reduce", 2 * rollout * token, *ranks, False))
    if facts.num_scorings:
        scored = facts.num_scorings * rollout
        calls.append(Collective("reference", "activations", "all-reduce", 2 * scored * token, *ranks, False))
    return calls
