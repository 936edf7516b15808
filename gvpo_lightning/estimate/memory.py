"""Bytes on one GPU in each phase of a run, and in host memory.

| phase        | when it is largest                                                                               |
|--------------|--------------------------------------------------------------------------------------------------|
| rollout      | the last token of a batch of completions; the weights are whole, the last update's gradients     |
|              | gone but for DDP's buckets                                                                       |
| reference    | scoring under a model of its own, which comes to the device for it                               |
| forward      | the end of the decoder layers, before the head                                                   |
| head         | the fused loss at work, forward or backward                                                      |
| backward     | the last decoder layer's, with all that the others have saved                                    |
| last unit    | the end of it: all gradients, with FSDP those of embedding and head whole and on their way       |
| update       | the optimizer's, with AdamW's temporary copy                                                     |
"""

from dataclasses import dataclass

from gvpo_kernels.fused_loss import STREAM_BYTES
from gvpo_kernels.head import SLICE_BYTES, TILE_BYTES
from gvpo_kernels.torch_head import CHUNK_BYTES
from gvpo_lightning.estimate.facts import ModelSizes, RunFacts

TERMS = (
    "parameters",
    "gradients",
    "optimizer",
    "reward models",
    "whole weights",
    "activations",
    "head",
    "key-value cache",
)
UNITS = {"MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Memory:
    """Bytes by phase and by term of `TERMS` on one GPU, and by term in the host memory of one node."""

    phases: dict[str, dict[str, int]]
    host: dict[str, int]

    def total(self, phase: str) -> int:
        """Bytes of a phase."""
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(map(self.total, self.phases))


def estimate_memory(sizes: ModelSizes, facts: RunFacts) -> Memory:
    """What each phase of the run takes, beside what the CUDA context, NCCL and the allocator's gaps take."""
    held = held_bytes(sizes, facts)
    fresh = held if facts.workload.accumulate > 1 else held | {"gradients": _buckets(held, facts)}
    saved, working = activation_bytes(sizes, facts)
    head_saved, head_working = head_bytes(sizes, facts)
    head_gradient = _trained_head(sizes, facts) * facts.compute_bytes
    whole, backward, last = _whole_weights(sizes, facts)
    phases = {}
    if facts.workload.generates:
        cache, sampling = generation_bytes(sizes, facts)
        phases["rollout"] = held | {
            "gradients": _buckets(held, facts),
            "whole weights": rollout_weights(sizes, facts),
            "activations": sampling,
            "key-value cache": cache,
        }
    if facts.reference_parameters:
        other = int(facts.reference_parameters * _frozen_bytes(sizes, facts))
        phases["reference"] = held | {
            "gradients": _buckets(held, facts),
            "whole weights": other,
            "activations": working,
        }
    phases["forward"] = held | {"whole weights": whole, "activations": saved}
    phases["head"] = fresh | {
        "whole weights": whole,
        "activations": saved,
        "head": head_saved + head_working + head_gradient,
    }
    phases["backward"] = fresh | {"whole weights": backward, "activations": saved + working, "head": head_gradient}
    phases["last unit"] = held | {"whole weights": last, "activations": 0 if facts.sharded else working}
    roots = held["optimizer"] // 2 if facts.optimizer_bytes >= 8 and facts.cuda else 0  # AdamW's, of all second moments
    phases["update"] = held | {"optimizer": held["optimizer"] + roots}
    return Memory(phases, host_bytes(sizes, facts))


def held_bytes(sizes: ModelSizes, facts: RunFacts) -> dict[str, int]:
    """Parameters, gradients and optimizer state on one GPU; DDP's gradients exist twice, once in its buckets."""
    own, trained = _own_parameters(sizes, facts)
    return {
        "parameters": int((own - trained) * _frozen_bytes(sizes, facts)) + trained * facts.bytes_trained,
        "gradients": trained * facts.bytes_trained * (2 if _has_buckets(facts) else 1),
        "optimizer": trained * facts.optimizer_bytes,
    } | ({"reward models": facts.reward_bytes} if facts.reward_bytes else {})


def _own_parameters(sizes: ModelSizes, facts: RunFacts) -> tuple[int, int]:
    """Parameters on one GPU, and how many of them are trained."""
    own = (_layer(sizes, facts) * sizes.num_layers + sizes.root) // facts.shards
    return own, int(own * _trained_share(sizes, facts))


def _frozen_bytes(sizes: ModelSizes, facts: RunFacts) -> float:
    """Of one parameter beneath an adapter, the mean over quantized layers and the rest."""
    if facts.layer_bytes is None:
        return facts.weight_bytes
    frozen = sizes.parameters - (facts.trained_parameters or 0)
    return ((frozen - sizes.root) * facts.layer_bytes + sizes.root * facts.weight_bytes) / frozen


def rollout_weights(sizes: ModelSizes, facts: RunFacts) -> int:
    """What a rollout holds beside the shards: the model gathered once, by FSDP1 uncast; or autocast's casts."""
    if not facts.sharded:
        return _cast_weights(sizes, facts) + (sizes.head * facts.compute_bytes if facts.autocast else 0)
    whole = _layer(sizes, facts) * sizes.num_layers + sizes.root
    return whole * (facts.weight_bytes if facts.strategy == "fsdp1" else facts.compute_bytes)


def activation_bytes(sizes: ModelSizes, facts: RunFacts) -> tuple[int, int]:
    """Saved by the decoder layers for a micro-batch's backward pass; and one layer's memory while it is worked on."""
    tokens = facts.micro_batch * facts.workload.tokens
    layer = _layer_activations(sizes, facts)
    stream = tokens * sizes.hidden * facts.stream_bytes
    norm = tokens * sizes.hidden * (4 + (facts.stream_bytes if facts.trained_parameters is None else 0))
    gradients = tokens * 3 * sizes.intermediate * facts.compute_bytes // facts.tensor_parallel + 2 * stream
    if facts.checkpointing:
        return sizes.num_layers * stream + norm + facts.mask_pairs, layer + gradients
    return sizes.num_layers * layer + norm + facts.mask_pairs, gradients


def head_bytes(sizes: ModelSizes, facts: RunFacts) -> tuple[int, int]:
    """Saved by the fused loss for the backward pass, and what it works in beside dWeight; see kernels/README.md."""
    tokens = facts.micro_batch * facts.workload.completion_tokens
    compute, weight = facts.compute_bytes, sizes.head
    wide, statistics = 4 * tokens * sizes.hidden, 24 * tokens
    saved = tokens * sizes.hidden * facts.stream_bytes + statistics
    if facts.autocast and facts.cuda:
        saved += (tokens * sizes.hidden + weight) * compute  # cast for the head's matmuls
    chunk = TILE_BYTES if facts.cuda else 3 * min(CHUNK_BYTES, 4 * tokens * sizes.vocab_size)
    if not _trained_head(sizes, facts):
        return saved + wide, chunk
    if facts.two_passes:
        return saved + wide + 4 * weight, chunk + min(STREAM_BYTES, tokens * sizes.vocab_size * compute)
    if facts.cuda:
        return saved, wide + chunk + min(SLICE_BYTES, tokens * sizes.vocab_size * compute)
    return saved, tokens * sizes.hidden * compute + chunk + (4 * weight if compute < 4 else 0)


def generation_bytes(sizes: ModelSizes, facts: RunFacts) -> tuple[int, int]:
    """The key-value cache of a batch, full, with the copy that growing one layer makes; prefill and sampling."""
    work = facts.workload
    rows = min(work.generation_batch, facts.rollout_completions)
    keys = sizes.num_kv_heads * sizes.head_dim // facts.tensor_parallel
    layer = rows * work.tokens * keys * (facts.stream_bytes + facts.compute_bytes)  # autocast leaves keys as they are
    features = 3 * sizes.intermediate * facts.compute_bytes // facts.tensor_parallel
    prefill = rows * work.prompt_tokens * (features + 2 * sizes.hidden * facts.stream_bytes)
    sampling = rows * sizes.vocab_size * (facts.compute_bytes + 3 * 4)  # logits, as float32, scaled, probabilities
    return (sizes.num_layers + 1) * layer, max(prefill, sampling)


def host_bytes(sizes: ModelSizes, facts: RunFacts) -> dict[str, int]:
    """One node's: the reference's copy of what is trained, the policy's own values while the reference is asked, and
    the model as each process reads it from its file; FSDP2's read in turns, if need be one after the other."""
    processes = min(facts.num_gpus, facts.gpus_per_node)
    host = {}
    if facts.reference_parameters:
        host["reference"] = int(processes * facts.reference_parameters * _frozen_bytes(sizes, facts))
    elif facts.reference in ("frozen", "every_n_steps", "ema"):
        _, trained = _own_parameters(sizes, facts)
        host["reference"] = processes * trained * max(facts.bytes_trained, 4 * (facts.reference == "ema"))
        host["policy while scoring"] = processes * trained * facts.bytes_trained
    at_once = 1 if facts.strategy == "fsdp2" else processes
    return host | {"loading": at_once * sizes.parameters * facts.weight_bytes}


def _whole_weights(sizes: ModelSizes, facts: RunFacts) -> tuple[int, int, int]:
    """Weights held beside the optimizer's own, and gradients on their way: in the forward pass, backward, at its end.

    FSDP's root unit stays whole from the forward to the backward pass, and the next layer is fetched ahead. Autocast
    forgets its casts after the forward pass; but what is not computed again has been saved.
    """
    layer, compute = _layer(sizes, facts), facts.compute_bytes
    if not facts.sharded:
        whole = _cast_weights(sizes, facts)
        return whole, layer * compute if facts.autocast and facts.checkpointing else whole, 0
    in_flight = _trained_share(sizes, facts) * (compute + facts.reduce_bytes)
    whole = (sizes.root + 2 * layer) * compute
    return whole, whole + int(layer * in_flight), sizes.root * compute + int(sizes.root * in_flight)


def _has_buckets(facts: RunFacts) -> bool:
    """DDP on several ranks keeps a second set of gradients, which it sends."""
    return facts.strategy == "ddp" and facts.data_parallel > 1


def _buckets(held: dict[str, int], facts: RunFacts) -> int:
    return held["gradients"] // 2 if _has_buckets(facts) else 0


def _layer(sizes: ModelSizes, facts: RunFacts) -> int:
    return sizes.layer // facts.tensor_parallel


def _trained_share(sizes: ModelSizes, facts: RunFacts) -> float:
    return 1.0 if facts.trained_parameters is None else facts.trained_parameters / sizes.parameters


def _trained_head(sizes: ModelSizes, facts: RunFacts) -> int:
    """Parameters of the head, 0 where it is frozen: adapters are not on the head."""
    return sizes.head if facts.trained_parameters is None else 0


def _cast_weights(sizes: ModelSizes, facts: RunFacts) -> int:
    """Autocast's copies of the decoder layers' matrices; of quantized ones, the largest at work."""
    if facts.layer_bytes is not None:
        return sizes.hidden * sizes.intermediate * facts.compute_bytes
    if not facts.autocast:
        return 0
    # while the policy is trained or scored the head has a cast of its own
    return _layer(sizes, facts) * sizes.num_layers * facts.compute_bytes


def _layer_activations(sizes: ModelSizes, facts: RunFacts) -> int:
    """What one layer saves: two norms, attention with padding in the batch, and the MLP."""
    compute, stream = facts.compute_bytes, facts.stream_bytes
    tokens, hidden = facts.micro_batch * facts.workload.tokens, sizes.hidden
    full = facts.trained_parameters is None
    # a norm saves its input in float32 and, if its weight is trained, its value before that; then what the matrices
    # read, which autocast casts once for each of them
    matrices = 5 if sizes.gated else 4
    read = 4 * matrices if facts.casts_to_adapters else compute * (matrices if facts.autocast else 2)
    norms = hidden * (2 * 4 + (2 * stream if full else 0) + read)
    # with a mask, keys and values are repeated for all heads; the mask is turned into numbers in each layer
    copies = 4 if facts.casts_to_adapters else 0  # of what the attention's and the MLP's last matrix read
    attention = sizes.num_heads * (sizes.head_dim * (4 * compute + copies) + 4)
    mask = facts.mask_pairs * compute
    mlp = sizes.intermediate * ((4 if sizes.gated else 2) * compute + copies)
    return tokens * (norms + (attention + mlp) // facts.tensor_parallel) + mask


def describe(estimate: Memory, facts: RunFacts) -> str:
    """Memory per GPU as a table of at most ten lines: a row a term, a column a phase."""
    name = "GiB" if estimate.peak >= 2**30 else "MiB"
    unit = UNITS[name]
    spread = f"each of {facts.num_gpus} devices, {facts.strategy}" if facts.num_gpus > 1 else "one device"
    if facts.tensor_parallel > 1:
        spread += f", tensor parallel over {facts.tensor_parallel}"
    lines = [f"Estimated peak on {spread}: {estimate.peak / unit:.2f} {name}, of which"]
    lines.append(" " * 16 + "".join(f"{phase:>11}" for phase in estimate.phases))
    for term in TERMS:
        values = [phase.get(term, 0) for phase in estimate.phases.values()]
        if any(values):
            lines.append(f"{term:<16}" + "".join(f"{value / unit:11.2f}" if value else " " * 11 for value in values))
    host = ", ".join(f"{term} {value / unit:.2f}" for term, value in estimate.host.items())
    return "\n".join([line.rstrip() for line in lines] + [f"In a machine's own memory: {host}"])
