"""The model card of an exported policy: what it was made from, how, and with which results."""

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCard, ModelCardData
from lightning.pytorch.cli import SaveConfigCallback

from gvpo_lightning.objectives.settings import ObjectiveSettings
from gvpo_lightning.policy.loading import adapter_base, is_installed
from gvpo_lightning.policy.source import PolicySource

Kind = Literal["model", "adapter", "merged"]
CONFIG, SUMMARY = "config.yaml", "summary.json"
PACKAGES = ("gvpo-lightning", "torch", "lightning", "transformers", "peft", "bitsandbytes")
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
FILE = re.compile(r"\.(jsonl?|parquet|csv|tsv|txt|ya?ml|arrow|gz|zst|pt|pth|ckpt|bin|gguf|safetensors)$", re.IGNORECASE)
# no one's names on the hub
FOLDERS = frozenset(["checkpoints", "configs", "data", "datasets", "models", "output", "outputs", "run", "runs"])
# what of a config may be shown to everyone
SECRET = re.compile(r"key|secret|passw|credential|auth|bearer|token", re.IGNORECASE)
NOT_SECRET = re.compile(
    r"(.*_env|(eos|bos|pad|unk)_token|.*_token_i\w+|stop_.*|(.*_)?tokens|tokenizer.*|token_logprobs)", re.IGNORECASE
)
URL = re.compile(r"([A-Za-z][\w+.-]*)://(?:[^/\s]*@)?([^\s?#]*)(?:[?#]\S*)?")
PATH = re.compile(r"(?:(?<![^=,:])(?:/|~|[A-Za-z]:[\\/])|(?<![^=,:])[^=,:]*\.\.[\\/])[^=,]*")

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


@dataclass(frozen=True)
class Origin:
    """What a model card tells of how a policy came about.

    Attributes:
        settings: what it was trained with, `objective` among them; shown where there is no config.
        config: the run's, as LightningCLI saves it.
        summary: the run's results, as `RunSummary` writes them.
    """

    settings: Mapping[str, Any]
    config: Mapping[str, Any] | None
    summary: Mapping[str, Any] | None


def write_card(folder: str | Path, source: PolicySource, kind: Kind, origin: Origin) -> None:
    """Write README.md into an exported folder.

    `kind`: what lies there: a whole model, an adapter, or a model that an adapter was merged into.
    """
    given: Any = source.given
    base: str = given if isinstance(given, str) else given.name_or_path
    beneath = adapter_base(base, source.loading) if isinstance(given, str) else None
    base = base if beneath is None else beneath[0]
    objective = origin.settings.get("objective", ObjectiveSettings())
    dataset: Any = ((origin.config or {}).get("data") or {}).get("path")
    data = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        datasets=[dataset] if _is_hub_id(dataset) else None,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=[
            *([objective.kind] if objective.kind in ("dpo", "sft") else [objective.kind, "reinforcement-learning"]),
            *([] if kind == "model" else ["lora"]),
        ],
    )
    name = Path(base).name or source.shown
    kinds = {
        "model": name,
        "adapter": f"A LoRA adapter for {name},",
        "merged": f"{name}, with a LoRA adapter merged in,",
    }
    shown = yaml.safe_dump(publishable(origin.config or _plain(origin.settings)), sort_keys=False, allow_unicode=True)
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=f"{name}-{objective.kind}",
        origin=kinds[kind],
        objective=str(objective),
        kind=objective.kind,
        code=_loading_code(base if _is_hub_id(base) else "BASE", kind, _brings_code(source)),
        results="\n".join(f"| {key} | {value} |" for key, value in _numbers(origin.summary or {})),
        config=shown,
        fence="`" * (1 + max([2, *(len(ticks) for ticks in re.findall("`+", shown))])),  # no value ends the block
        versions=", ".join(
            [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in PACKAGES if is_installed(p))]
        ),
    )
    Path(folder, "README.md").write_text(str(card), encoding="utf-8")


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is set, as values that YAML has."""
    return {
        name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for name, value in settings.items()
        if value is not None
    }


def run_config(callbacks: Iterable[object]) -> dict[str, Any] | None:
    """The config that LightningCLI runs with, None where a script has built all."""
    for saver in callbacks:
        if isinstance(saver, SaveConfigCallback):
            config: dict[str, Any] = yaml.safe_load(saver.parser.dump(saver.config, skip_none=False))
            return config
    return None


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


def _brings_code(source: PolicySource) -> bool:
    """Whether the model is a class that lies beside its weights."""
    if not isinstance(source.given, str):
        return getattr(source.given, "_auto_class", None) is not None
    return source.loading.trust_remote_code and bool(getattr(source.config(), "auto_map", None))


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


def publishable(value: Any, key: str = "") -> Any:
    """A config without what is not set or is secret; absolute paths, which are of one machine, by their last part.

    A key that sounds like a secret hides all that is under it. URLs lose user, password and query.
    """
    if value is None or isinstance(value, bool):
        return value
    if SECRET.search(key) and not NOT_SECRET.fullmatch(key):
        return "(left out)"
    if isinstance(value, Mapping):
        shown = {str(publishable(name)): publishable(part, str(name)) for name, part in value.items()}
        return {name: part for name, part in shown.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [publishable(part, key) for part in value]
    if isinstance(value, Path):
        return _last_part(str(value))
    if isinstance(value, (int, float)):
        return value
    return _publishable_text(str(value))


def _publishable_text(text: str) -> str:
    if re.match(r"[/~]", text) and os.path.exists(os.path.expanduser(text)):  # a path even if it has spaces
        return _last_part(text)
    text = URL.sub(lambda url: _last_part(url[2]) if url[1] == "file" else f"{url[1]}://{url[2]}", text)
    if "://" in text or re.search(r"[\s{}]", text):  # such as a prompt's template
        return text
    return PATH.sub(lambda path: _last_part(path[0]), text)


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
