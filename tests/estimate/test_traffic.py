"""The estimator's bytes of collectives against those that two processes really call."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from gvpo_lightning.estimate import RunFacts, Workload, estimate_traffic, model_sizes

MODEL = {
    "model_type": "qwen2",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
CASES = {
    "ddp": {"mode": "ddp"},
    "fsdp2": {},
    "fsdp2, tied": {"tied": True},
    "fsdp2 in mixed precision, layers again, accumulated": {
        "mode": "fsdp2-mixed",
        "checkpointing": True,
        "accumulate": 2,
    },
    "tensor parallel": {"mode": "tensor parallel"},
    "tensor parallel, layers again": {"mode": "tensor parallel", "checkpointing": True},
    "fsdp2 after scoring": {"scored": True, "accumulate": 2},
}
DEFAULTS = {"mode": "fsdp2", "tied": False, "checkpointing": False, "accumulate": 1, "scored": False}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Payload by kind of collective, from two processes, for every case."""
    cases = [DEFAULTS | case for case in CASES.values()]
    for case in cases:
        case["model"] = MODEL | {"tie_word_embeddings": case["tied"]}
    folder = tmp_path_factory.mktemp("traffic")
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "traffic_script.py"), json.dumps(cases), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(zip(CASES, json.loads((folder / "measured.json").read_text()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_payload_of_an_update_is_what_two_processes_send(name, measured, record_property):
    case, payload = DEFAULTS | CASES[name], measured[name]
    accumulate = case["accumulate"]
    prompts = (1 if case["mode"] == "tensor parallel" else 2) * accumulate
    facts = RunFacts(
        Workload(2, 16, 4, prompts, prompts, accumulate=accumulate, generates=False),
        num_gpus=2,
        strategy="fsdp2" if case["mode"].startswith("fsdp2") else "ddp",
        tensor_parallel=2 if case["mode"] == "tensor parallel" else 1,
        compute_bytes=2 if case["mode"] == "fsdp2-mixed" else 4,
        checkpointing=case["checkpointing"],
        reference="frozen" if case["scored"] else "cached",
    )
    sizes = model_sizes(AutoConfig.for_model(**MODEL | {"tie_word_embeddings": case["tied"]}))
    estimated: dict[str, int] = {}
    for call in estimate_traffic(sizes, facts):
        estimated[call.kind] = estimated.get(call.kind, 0) + call.payload
    assert estimated.keys() == payload.keys()
    ratios = {kind: estimated[kind] / payload[kind] for kind in payload}
    record_property("estimated over measured", ratios)
    print(name, ratios)
    assert ratios == {kind: pytest.approx(1.0, rel=0.05) for kind in payload}
