"""Bytes that one GPU receives from others in one optimizer update, and the update's expected seconds.

Every efficiency in here is an assumption.
"""

import math
from dataclasses import dataclass
from typing import Literal

from gvpo_lightning.estimate.facts import ModelSizes, RunFacts
from gvpo_lightning.estimate.memory import held_bytes


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


@dataclass(frozen=True)
class Hardware:
    """A GPU in a machine of eight, from data sheets, and the shares of it that are assumed to be reached.

    Attributes:
        memory: bytes a GPU.
        flops: dense bf16 a second.
        bandwidth: of its memory, bytes/s.
        link, network, host_link: to GPUs of its machine, of others (its own adapter), and to host memory; bytes/s, one
            way.
        matmul_share: of `flops` in training and scoring (Llama 3's pre-training: 0.38 to 0.43, arXiv 2407.21783).
        bandwidth_share, link_share: of the bandwidths.
        generate_layer: seconds that transformers' eager `generate` takes for a layer of one decoding step, however
            few the completions: Python and kernel launches. 28 layers then give 36 tokens/s a completion.
        engine_layer: the same of an engine with CUDA graphs, such as vLLM.
        cache_passes: times that `generate` moves the whole key-value cache in a step: attention, and `torch.cat`
            reading and writing it.
        small_call: seconds of an all-reduce that has next to nothing to send.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float = 989e12
    link: float = 450e9
    network: float = 50e9
    host_link: float = 50e9
    matmul_share: float = 0.4
    bandwidth_share: float = 0.7
    link_share: float = 0.7
    generate_layer: float = 1e-3
    engine_layer: float = 5e-5
    cache_passes: int = 3
    small_call: float = 2e-5


H100 = Hardware("H100 SXM", memory=80 * 2**30, bandwidth=3.35e12)
H200 = Hardware("H200 SXM", memory=141 * 10**9, bandwidth=4.8e12)


def estimate_seconds(
    sizes: ModelSizes, facts: RunFacts, hardware: Hardware = H100, engine: Literal["generate", "vllm"] = "generate"
) -> dict[str, float]:
    """Seconds an update: "rollout" and "reference" (a rollout's, divided by its updates), "train", "communication".

    Communication is what matmuls do not hide: overlapped collectives cost what they take beyond the matmuls of their
    phase, the others all of it. Rewards, the optimizer's arithmetic and the loading of data are left out.
    """
    work, calls = facts.workload, estimate_traffic(sizes, facts)
    matmuls, updates = hardware.flops * hardware.matmul_share, work.updates_per_rollout
    decode = _generate_seconds if engine == "generate" else _engine_seconds
    rollout = decode(sizes, facts, hardware) / updates if work.generates else 0.0
    reference = facts.num_scorings * facts.rollout_completions * _forward_flops(sizes, facts) / matmuls / updates
    train = facts.micro_batch * work.accumulate * _train_flops(sizes, facts) / matmuls
    if engine == "vllm":  # which is given the weights once a rollout; what it sends itself is in its own time
        calls = [call for call in calls if (call.phase, call.what) != ("rollout", "activations")]
    exposed = 0.0
    for phase, compute in (("rollout", 0.0), ("reference", reference), ("train", train)):
        seconds = [(call_seconds(call, hardware), call.overlapped) for call in calls if call.phase == phase]
        exposed += sum(value for value, overlapped in seconds if not overlapped)
        exposed += max(0.0, sum(value for value, overlapped in seconds if overlapped) - compute)
    if facts.reference in ("frozen", "every_n_steps", "ema") and facts.scores:
        held = held_bytes(sizes, facts)["parameters"]
        share = 1.0 if facts.trained_parameters is None else facts.trained_parameters / sizes.parameters
        reference += 2 * held * share / (hardware.host_link * hardware.link_share) / updates  # there and back
    return {"rollout": rollout, "reference": reference, "train": train, "communication": exposed}


def call_seconds(call: Collective, hardware: Hardware) -> float:
    """Seconds of a collective: links within and between machines work at the same time."""
    slowest = max(call.moved / hardware.link, call.between_nodes / hardware.network)
    return slowest / hardware.link_share


def _forward_flops(sizes: ModelSizes, facts: RunFacts, *, head: bool = True) -> float:
    """Of one completion with its prompt, on one GPU; with padding in the batch, attention computes all pairs."""
    work = facts.workload
    layers = 2 * sizes.layers * work.tokens
    layers += 4 * sizes.num_layers * sizes.num_heads * sizes.head_dim * work.tokens**2
    return layers / facts.tensor_parallel + (2 * sizes.head * work.completion_tokens if head else 0)


def _train_flops(sizes: ModelSizes, facts: RunFacts) -> float:
    """Forward, backward (without weight gradients half of it), layers again, and the loss fused with the head."""
    full = facts.trained_parameters is None
    passes = (3 if full else 2) + facts.checkpointing + facts.two_passes
    head_passes = (3 if facts.two_passes else 4) if full else 2
    head_passes += facts.two_passes
    head = 2 * sizes.head * facts.workload.completion_tokens
    return passes * _forward_flops(sizes, facts, head=False) + head_passes * head


def engine_parallel(sizes: ModelSizes, hardware: Hardware) -> int:
    """GPUs over which an engine spreads the model: the fewest, by doubling, whose memory it fills at most by half."""
    parts = 1
    while sizes.parameters * 2 / parts > hardware.memory / 2:
        parts *= 2
    return parts


def _generate_seconds(sizes: ModelSizes, facts: RunFacts, hardware: Hardware) -> float:
    """Of one rollout in the training processes, batch after batch, every completion with a prompt of its own."""
    rows = min(facts.workload.generation_batch, facts.rollout_completions)
    step = _step_seconds(sizes, facts, hardware, rows, facts.tensor_parallel, hardware.cache_passes)
    step = max(step, sizes.num_layers * hardware.generate_layer)
    prefill = _prefill_seconds(sizes, facts, hardware, rows, facts.tensor_parallel)
    return math.ceil(facts.rollout_completions / rows) * (facts.workload.completion_tokens * step + prefill)


def _engine_seconds(sizes: ModelSizes, facts: RunFacts, hardware: Hardware) -> float:
    """Of one rollout by an engine on the same GPUs: all completions at once, the prompt of a group computed once."""
    parts = min(engine_parallel(sizes, hardware), facts.num_gpus)
    rows = math.ceil(facts.rollout_completions * facts.data_parallel * parts / facts.num_gpus)
    step = _step_seconds(sizes, facts, hardware, rows, parts, 1)
    step = max(step, sizes.num_layers * hardware.engine_layer)
    if parts > 1:
        step += 2 * sizes.num_layers * hardware.small_call
    prefill = _prefill_seconds(sizes, facts, hardware, rows / facts.workload.group_size, parts)
    return facts.workload.completion_tokens * step + prefill


def _step_seconds(
    sizes: ModelSizes, facts: RunFacts, hardware: Hardware, rows: int, parts: int, cache_passes: int
) -> float:
    """A decoding step's reading of weights and half-full cache, or its matmuls, on one of `parts` GPUs."""
    work, weights = facts.workload, sizes.layers / parts + sizes.head
    keys = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * facts.compute_bytes / parts
    cache = rows * (work.prompt_tokens + work.completion_tokens / 2) * keys * cache_passes
    read = (weights * facts.compute_bytes + cache) / (hardware.bandwidth * hardware.bandwidth_share)
    return max(read, 2 * rows * weights / (hardware.flops * hardware.matmul_share))


def _prefill_seconds(sizes: ModelSizes, facts: RunFacts, hardware: Hardware, rows: float, parts: int) -> float:
    operations = 2 * sizes.layers / parts * facts.workload.prompt_tokens * rows
    return operations / (hardware.flops * hardware.matmul_share)
