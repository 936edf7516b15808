"""Expected seconds of one optimizer update, split; every efficiency in here is an assumption."""

import math
from dataclasses import dataclass
from typing import Literal

from gvpo_lightning.estimate.facts import RunFacts
from gvpo_lightning.estimate.memory import held_bytes
from gvpo_lightning.estimate.sizes import ModelSizes
from gvpo_lightning.estimate.traffic import Collective, estimate_traffic


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
