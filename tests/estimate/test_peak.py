"""The estimated peak of a micro-batch against the resident memory of a real one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Qwen2ForCausalLM

from benchmarks import train_step_paths
from gvpo_lightning.estimate import RunFacts, Workload, estimate_memory, model_sizes
from gvpo_lightning.estimate.facts import count_parameters, with_adapters
from tests.estimate.peak_script import COMPLETION, CONFIG, MODES, PROMPT


def test_peak_of_a_micro_batch_is_the_resident_memory(record_property):
    pytest.importorskip("peft")
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "peak_script.py")],
        # freed tensors go back at once
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    measured = json.loads(result.stdout.splitlines()[-1])
    sizes, ratios = model_sizes(CONFIG), {}
    adapters = count_parameters(train_step_paths.with_adapters(Qwen2ForCausalLM(CONFIG)), trained=True)
    for mode in MODES:
        half = mode == "LoRA, bfloat16 beneath"
        facts = RunFacts(
            Workload(PROMPT, COMPLETION, prompts_per_rollout=1, prompts_per_update=1, generates=False),
            weight_bytes=2 if half else 4,
            compute_bytes=2 if half else 4,
            trained_parameters=adapters if mode.startswith("LoRA") else None,
            trained_bytes=4,
            checkpointing=mode == "layers again",
            cuda=False,
        )
        memory = estimate_memory(with_adapters(sizes, adapters) if mode.startswith("LoRA") else sizes, facts)
        held = memory.phases["backward"]["parameters"] + memory.phases["backward"]["optimizer"]
        peak = max(memory.total(phase) for phase in ("head", "backward", "last unit")) - held
        ratios[mode] = round(peak / measured[mode], 3)
    record_property("estimated over measured", ratios)
    print(ratios)
    assert ratios == {mode: pytest.approx(1.0, abs=0.2) for mode in MODES}
