"""Trains two updates on recorded completions; prints bytes at the peak. Run by test_memory, in a process of its own."""

import json
import sys
from pathlib import Path

import lightning as L
import torch

from gvpo_lightning import FileSettings, GVPOModule, RolloutLoader, RolloutSettings, SourceSettings


def resident(name: str) -> int:
    """`VmRSS`, bytes resident now, or `VmHWM`, the most since the mark was reset."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def main(model: str, file: str, reference: str) -> None:
    torch.set_num_threads(1)
    rows = [{"prompt": json.loads(line)["prompt"]} for line in Path(file).read_text().splitlines()]
    module = GVPOModule(
        model,
        reference=reference,
        sources=SourceSettings(policy=0, file=FileSettings(file)),
        rollout=RolloutSettings(prompts_per_rollout=2, prompts_per_update=1),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = RolloutLoader(rows, module)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the mark
    trainer.fit(module, loader)
    weights = sum(p.numel() * p.element_size() for p in module.policy.parameters())
    print(json.dumps({"weights": weights, "peak": resident("VmHWM") - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
