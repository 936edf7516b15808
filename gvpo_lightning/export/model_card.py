"""The model card of an exported policy: what it was made from, how, and with which results."""

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from huggingface_hub import ModelCard, ModelCardData
from lightning.pytorch.cli import SaveConfigCallback

from gvpo_lightning.export.publishable import publishable
from gvpo_lightning.objectives.settings import ObjectiveSettings
from gvpo_lightning.policy.loading import adapter_base, is_installed

if TYPE_CHECKING:
    from gvpo_lightning.policy_module import PolicyModule


Kind = Literal["model", "adapter", "merged"]
CONFIG, SUMMARY = "config.yaml", "summary.json"
PACKAGES = ("gvpo-lightning", "torch", "lightning", "transformers", "peft", "bitsandbytes")
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
FILE = re.compile(r"\.(jsonl?|parquet|csv|tsv|txt|ya?ml|arrow|gz|zst|pt|pth|ckpt|bin|gguf|safetensors)$", re.IGNORECASE)
# no one's names on the hub
FOLDERS = frozenset(["checkpoints", "configs", "data", "datasets", "models", "output", "outputs", "run", "runs"])

HYPERPARAMETERS = (
    *("objective_settings", "beta", "temperature", "loading", "lora"),
    *("reference_settings", "rollout_settings", "generation"),
)

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{% if objective != "gvpo" %}{{ origin }} trained with the objective **{{ objective }}** of `gvpo_lightning`.
{% else %}{{ origin }} trained with **GVPO**, Group Variance Policy Optimization
([arXiv 2504.19599](https://arxiv.org/abs/2504.19599)). For every prompt a group of completions is sampled and rewarded;
the policy is trained such that its implicit rewards, `beta * log(policy / reference)`, differ within the group as the
rewards do. The one optimum of that loss is the reference, reweighted by `exp(reward / beta)`: the solution of
KL-constrained reward maximisation.
{% endif %}
## How to load it

```python
{{ code }}
```
{% if results %}
## Results

| | |
|---|---|
{{ results }}
{% endif %}
## How it was trained

{{ fence }}yaml
{{ config }}{{ fence }}

Versions: {{ versions }}.
{% if kind == "gvpo" %}
## Citation

```bibtex
@inproceedings{zhang2025gvpo,
  title     = {{ '{{' }}GVPO}: Group Variance Policy Optimization for Large Language Model Post-Training},
  author    = {Zhang, Kaichen and Hong, Yuzhong and Bao, Junwei and Jiang, Hongfei and Song, Yang and Hong, Dingqian and
               Xiong, Hui},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025},
  url       = {https://arxiv.org/abs/2504.19599}
}
```
{% endif %}"""


def write_card(
    folder: str | Path,
    module: "PolicyModule",
    kind: Kind,
    config: Mapping[str, Any] | None,
    summary: Mapping[str, Any] | None,
) -> None:
    """Write README.md into an exported folder.

    Args:
        kind: what lies there: a whole model, an adapter, or a model that an adapter was merged into.
        config: the run's, as LightningCLI saves it; None = the module's hyperparameters.
        summary: the run's results, as `RunSummary` writes them.
    """
    policy: Any = module.policy_source
    source: str = policy if isinstance(policy, str) else policy.name_or_path
    beneath = adapter_base(source, module.loading) if isinstance(policy, str) else None
    source = source if beneath is None else beneath[0]
    objective = getattr(module, "objective_settings", ObjectiveSettings())
    dataset: Any = ((config or {}).get("data") or {}).get("path")
    data = ModelCardData(
        base_model=source if _is_hub_id(source) else None,
        datasets=[dataset] if _is_hub_id(dataset) else None,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=[
            *([objective.kind] if objective.kind in ("dpo", "sft") else [objective.kind, "reinforcement-learning"]),
            *([] if kind == "model" else ["lora"]),
        ],
    )
    name = Path(source).name or type(module.policy_source).__name__
    origin = {
        "model": name,
        "adapter": f"A LoRA adapter for {name},",
        "merged": f"{name}, with a LoRA adapter merged in,",
    }
    shown = yaml.safe_dump(publishable(config or hyperparameters(module)), sort_keys=False, allow_unicode=True)
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=f"{name}-{objective.kind}",
        origin=origin[kind],
        objective=str(objective),
        kind=objective.kind,
        code=_loading_code(source if _is_hub_id(source) else "BASE", kind, _brings_code(module)),
        results="\n".join(f"| {key} | {value} |" for key, value in _numbers(summary or {})),
        config=shown,
        fence="`" * (1 + max([2, *(len(ticks) for ticks in re.findall("`+", shown))])),  # no value ends the block
        versions=", ".join(
            [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in PACKAGES if is_installed(p))]
        ),
    )
    Path(folder, "README.md").write_text(str(card), encoding="utf-8")


def hyperparameters(module: "PolicyModule") -> dict[str, Any]:
    """What the module was built with, where no config says it."""
    source = module.policy_source
    found: dict[str, Any] = {"policy": source if isinstance(source, str) else type(source).__name__}
    for name in HYPERPARAMETERS:
        value: Any = getattr(module, name, None)
        if value is not None:
            found[name.removesuffix("_settings")] = asdict(value) if is_dataclass(value) else value  # type: ignore[arg-type]
    return found


def run_config(trainer: Any) -> dict[str, Any] | None:
    """The config that LightningCLI runs with, None where a script has built all."""
    savers = [part for part in getattr(trainer, "callbacks", []) if isinstance(part, SaveConfigCallback)]
    if not savers:
        return None
    return yaml.safe_load(savers[0].parser.dump(savers[0].config, skip_none=False))


def files_of_run(checkpoint: Path, step: int | None) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Config and summary that a run has left beside a checkpoint or its folder; a summary of that step alone."""
    config = summary = None
    for folder in (checkpoint.resolve().parent, checkpoint.resolve().parent.parent):
        if config is None and (folder / CONFIG).is_file():
            config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        if summary is None and (folder / SUMMARY).is_file():
            summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    return config, summary if summary and summary.get("steps") == step else None


def _numbers(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Every number of a summary, nested ones with the path to them."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found += _numbers(value, f"{name} / ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)))
    return found


def _is_hub_id(name: Any) -> bool:
    """Whether a name is one of the hub's, and no file or folder, here or where the run was started."""
    if not isinstance(name, str) or HUB_ID.fullmatch(name) is None or FILE.search(name):
        return False
    first = Path(name).parts[0]
    return first not in FOLDERS and not Path(first).exists()


def _brings_code(module: "PolicyModule") -> bool:
    """Whether the model is a class that lies beside its weights."""
    policy = module.policy_source
    if not isinstance(policy, str):
        return getattr(policy, "_auto_class", None) is not None
    return module.loading.trust_remote_code and bool(getattr(module.model_config(), "auto_map", None))


def _loading_code(source: str, kind: Kind, brings_code: bool) -> str:
    trust = ", trust_remote_code=True" if brings_code else ""
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if kind == "adapter":
        lines = ["from peft import PeftModel", *lines]
        lines.append(f'base = AutoModelForCausalLM.from_pretrained("{source}"{trust})')
        lines.append('model = PeftModel.from_pretrained(base, "FOLDER")  # this one')
    else:
        lines.append(f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})  # this one')
    return "\n".join([*lines, 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'])
