"""Training on an offline file with cached reference log-probs holds one model, against a frozen reference two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gvpo_lightning.cli import GVPOTrainer
from gvpo_lightning.module import GVPOModule
from gvpo_lightning.sources.settings import FileSettings, SourceSettings


@pytest.fixture
def offline(tiny_policy, tokenizer, tmp_path):
    """A model of about 110 MB and a file with its cached log-probs."""
    policy = tiny_policy(hidden_size=768, intermediate_size=3072, num_hidden_layers=3)
    policy.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{n}+1=", "completions": ["7", "12", "3"], "rewards": [0.0, 1.0, 0.5]} for n in range(2)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = GVPOModule(str(tmp_path / "model"), sources=SourceSettings(policy=0, file=FileSettings(str(path))))
    GVPOTrainer(accelerator="cpu", logger=False, enable_checkpointing=False).reference(module)
    return str(tmp_path / "model"), str(path)


def test_a_cached_reference_peaks_at_one_model(offline, record_property):
    peaks = {}
    for reference in ("cached", "frozen"):
        result = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "memory_script.py"), *offline, reference],
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # freed tensors go back at once
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        measured = json.loads(result.stdout.splitlines()[-1])
        peaks[reference] = measured["peak"] / measured["weights"]
        record_property(f"peak over weights, {reference}", round(peaks[reference], 2))
        print(f"peak memory over the weights' size, {reference}: {peaks[reference]:.2f}")
    # weights and gradients, whatever else; then one model more for the frozen reference
    assert peaks["cached"] < 2.6
    assert peaks["frozen"] - peaks["cached"] == pytest.approx(1.0, abs=0.35)
