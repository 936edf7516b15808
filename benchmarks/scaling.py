"""What runs on many GPUs would take, on paper: the tables of docs/scaling.md. Nothing is measured here.

    python -m benchmarks.scaling     # writes benchmarks/results/scaling.json and the tables of docs/scaling.md

The sizes are those of Qwen2.5-7B and Llama-3.1-70B; the arithmetic is `gvpo_lightning.estimate`.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import AutoConfig

from benchmarks.recording import RESULTS
from benchmarks.scaling_page import PAGE, ROOM, sections, updated_page
from gvpo_lightning.estimate import (
    H100,
    H200,
    Hardware,
    ModelSizes,
    RunFacts,
    Workload,
    estimate_memory,
    estimate_seconds,
    estimate_traffic,
    model_sizes,
)
from gvpo_lightning.estimate.facts import with_adapters
from gvpo_lightning.estimate.times import call_seconds, engine_parallel

QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3_584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18_944,
    "vocab_size": 152_064,
    "tie_word_embeddings": False,
}
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8_192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28_672,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Plan:
    """A model on so many GPUs, and the ways of spreading it, as arguments of `facts_of`."""

    name: str
    config: dict[str, Any]
    num_gpus: int
    workload: Workload
    ways: dict[str, dict[str, Any]]


PLANS = (
    Plan(
        "Qwen2.5-7B on 8 GPUs",
        QWEN_7B,
        8,
        Workload(256, 1024, prompts_per_rollout=64, prompts_per_update=16),
        {
            "DDP": {"accumulate": 2},
            "DDP, LoRA of rank 16": {"accumulate": 2, "lora_rank": 16},
            "FSDP1": {"strategy": "fsdp1", "accumulate": 2},
            "FSDP2": {"strategy": "fsdp2", "accumulate": 2},
            "TP 2 × FSDP2": {"strategy": "fsdp2", "tensor_parallel": 2, "accumulate": 4},
        },
    ),
    Plan(
        "Llama-3.1-70B on 64 GPUs (8 × 8)",
        LLAMA_70B,
        64,
        Workload(256, 1024, prompts_per_rollout=256, prompts_per_update=64),
        {
            "DDP": {},
            "FSDP1": {"strategy": "fsdp1"},
            "FSDP2": {"strategy": "fsdp2"},
            "TP 8 × FSDP2": {"strategy": "fsdp2", "tensor_parallel": 8, "accumulate": 8},
        },
    ),
)


def facts_of(
    sizes: ModelSizes, workload: Workload, num_gpus: int, *, accumulate: int = 1, lora_rank: int = 0, **spread: Any
) -> tuple[ModelSizes, RunFacts]:
    """Float32 weights and AdamW, bf16 matmuls, gradients sent in float32, frozen reference, layers computed again."""
    facts = RunFacts(replace(workload, accumulate=accumulate), num_gpus, **spread)
    if not lora_rank:
        return sizes, facts
    query, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    shapes = [(sizes.hidden, width) for width in (query, keys, keys, query, *[sizes.intermediate] * 3)]
    adapters = lora_rank * sizes.num_layers * sum(a + b for a, b in shapes)
    return with_adapters(sizes, adapters), replace(facts, trained_parameters=adapters, reference="adapter_off")


def estimate_row(sizes: ModelSizes, facts: RunFacts) -> dict[str, Any]:
    """All numbers of one way: bytes and seconds."""
    memory, calls = estimate_memory(sizes, facts), estimate_traffic(sizes, facts)
    return {
        "micro_batch": facts.micro_batch,
        "phases": memory.phases,
        "host": memory.host,
        "traffic": [asdict(c) | {"moved": c.moved, "between_nodes": c.between_nodes} for c in calls],
        "wire_seconds": sum(call_seconds(call, H100) for call in calls),
        "seconds": estimate_seconds(sizes, facts),
        "engine_seconds": {card.name: estimate_seconds(sizes, facts, card, "vllm")["rollout"] for card in (H100, H200)},
    }


def turning_points(sizes: ModelSizes, plan: Plan) -> dict[str, float]:
    """Where another way is better, on H100s.

    * `fewest_gpus`: for FSDP2 training with one group a micro-batch, engines sampling elsewhere.
    * `engine_gpus`: over which an engine spreads the model; `engine_completions`: of a rollout on each GPU, below
      which sampling with `generate` takes more than half an update of FSDP2.
    """
    counts = (2**power for power in range(12))
    fewest = next(count for count in counts if _training_fits(sizes, plan.workload, count))
    completions = next(
        per_gpu * plan.workload.group_size
        for per_gpu in range(1, 1_000)
        if 2 * _generate_share(sizes, plan, per_gpu) <= 1
    )
    return {"fewest_gpus": fewest, "engine_gpus": engine_parallel(sizes, H100), "engine_completions": completions}


def _training_fits(sizes: ModelSizes, workload: Workload, num_gpus: int) -> bool:
    work = replace(workload, prompts_per_rollout=num_gpus, prompts_per_update=num_gpus, generates=False)
    memory = estimate_memory(sizes, RunFacts(work, num_gpus, strategy="fsdp2"))
    return memory.peak <= ROOM * H100.memory


def _generate_share(sizes: ModelSizes, plan: Plan, prompts_per_gpu: int) -> float:
    prompts = prompts_per_gpu * plan.num_gpus
    work = replace(plan.workload, prompts_per_rollout=prompts, prompts_per_update=prompts, accumulate=prompts_per_gpu)
    seconds = estimate_seconds(sizes, RunFacts(work, plan.num_gpus, strategy="fsdp2"))
    return seconds["rollout"] / sum(seconds.values())


def break_even(hardware: Hardware = H100, compute: int = 2, reduce: int = 4) -> dict[str, float]:
    """Tokens that a micro-batch must have on a GPU for FSDP's collectives to hide behind its matmuls.

    With 8 operations a parameter and token, and weights gathered twice and gradients reduced once a micro-batch.
    """
    token = 8 / (hardware.flops * hardware.matmul_share)  # seconds a parameter
    sent = 2 * compute + reduce  # bytes a parameter
    widths = {
        "in one machine": hardware.link,
        "over whole machines": min(hardware.link, 8 * hardware.network),  # eight adapters fetch one copy
        "over one GPU of each machine": hardware.network,
    }
    return {where: sent / (width * hardware.link_share) / token for where, width in widths.items()}


def estimates() -> dict[str, Any]:
    """Every plan and way, with the hardware's numbers."""
    plans = []
    for plan in PLANS:
        sizes = model_sizes(AutoConfig.for_model(**plan.config))
        spread = {name: facts_of(sizes, plan.workload, plan.num_gpus, **way) for name, way in plan.ways.items()}
        ways = {name: estimate_row(*run) for name, run in spread.items()}
        row = {"name": plan.name, "sizes": asdict(sizes), "workload": asdict(plan.workload), "ways": ways}
        plans.append(row | {"turning_points": turning_points(sizes, plan)})
    cards = {card.name: asdict(card) for card in (H100, H200)}
    return {"measured": False, "hardware": cards, "plans": plans, "break_even_tokens": break_even()}


def main() -> None:
    """Estimate, write, print."""
    record = estimates()
    (RESULTS / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    if PAGE.exists():
        PAGE.write_text(updated_page(PAGE.read_text(), record))
    print(sections(record))


if __name__ == "__main__":
    main()
