"""`gvpo reference`: log-probs of recorded completions under the reference, written beside them."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from rich.progress import track
from torch import nn

from gvpo_lightning.data.batch import collate_completions
from gvpo_lightning.policy.head_check import check_logprob_head
from gvpo_lightning.policy.loading import check_attention
from gvpo_lightning.policy.prepare import load_policy, prepare_policy, stop_token_ids
from gvpo_lightning.policy.prompts import encode_prompt
from gvpo_lightning.policy.score import score
from gvpo_lightning.reference.cache import cache_identity
from gvpo_lightning.sources.offline import OfflineFile, row_completions

if TYPE_CHECKING:
    from gvpo_lightning.module import GVPOModule


def fill_cache(module: "GVPOModule", trainer: Trainer, output: str | None = None) -> Path:
    """Score the completions of `sources.file` under the reference; write its rows with log-probs.

    Args:
        output: where to; default: the file itself, which is replaced when all rows are done.

    Rows are written as they come to `<output>.partial`; a run that was stopped goes on there.

    Raises:
        ValueError: there is no file in the settings, it can't be replaced, or several devices.
    """
    settings = module.sources.settings.file
    if settings is None:
        raise ValueError("gvpo reference scores recorded completions: set model.sources.file.path.")
    target = Path(output or settings.path)
    if target.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"The output must be a .jsonl or .parquet file, got {str(target)!r}: give --output FILE.")
    if output is None and "[" in settings.split:
        raise ValueError(
            f"sources.file.split={settings.split!r} is a part of {settings.path!r}, which would lose the rest: "
            "give --output FILE."
        )
    if trainer.world_size > 1:
        raise ValueError(f"gvpo reference runs on one device, got {trainer.world_size}: set trainer.devices=1.")
    file = OfflineFile(settings.path, settings.split, module.tokenizer, module.vocab_size())
    source = module.reference_settings.model or module.policy_source
    check_attention(module.loading, trainer.strategy.root_device, str(trainer.precision))
    model: Any = load_policy(source, module.loading_of(source)) if isinstance(source, str) else source
    prepare_policy(model)
    identity = cache_identity(module, trainer, model, source if isinstance(source, str) else type(source).__name__)
    trainer.precision_plugin.convert_module(nn.ModuleList([model]))  # transformers refuses if it is quantized
    model.to(trainer.strategy.root_device)

    partial = target.with_name(target.name + ".partial")
    done = finished_rows(partial, identity, file.rows)
    rest = (file.rows[number] for number in range(done, len(file.rows)))
    with partial.open("a", encoding="utf-8") as lines, trainer.precision_plugin.forward_context():
        check_logprob_head(model, module.loss_implementation, padding_free=module.padding_free)
        for row in track(rest, "reference log-probs", total=len(file.rows) - done):
            columns = _scored(row, module, model) | {"reference": identity, "of": row_hash(row)}
            lines.write(json.dumps(columns) + "\n")
    finished = target.with_name(target.name + ".finished")
    _join(file.rows, partial, finished, target.suffix)
    os.replace(finished, target)
    partial.unlink()
    return target


def _scored(row: dict[str, Any], module: "GVPOModule", model: Any) -> dict[str, Any]:
    """The token ids of the row's completions and their log-probs."""
    completions = list(row_completions(row, module.tokenizer, stop_token_ids(model, module.tokenizer)))
    ids = [completion.token_ids for completion in completions]
    columns: dict[str, Any] = {"token_ids": [i.tolist() for i in ids], "reference_logprobs": []}
    if ids:
        prompts = [encode_prompt(row["prompt"], module.tokenizer)] * len(ids)
        batch = collate_completions(prompts, ids, [False] * len(ids), [0] * len(ids), 0).to(model.device)
        values = score(
            model,
            batch,
            temperature=module.temperature,
            batch_size=module.rollout_settings.micro_batch_size or module.generation.batch_size,
            implementation=module.loss_implementation,
            padding_free=module.padding_free,
        )
        columns["reference_logprobs"] = [v[: len(i)].tolist() for v, i in zip(values, ids, strict=True)]
    return columns


def row_hash(row: Mapping[str, Any]) -> str:
    """Changes with what a row's log-probs depend on."""
    parts = [row["prompt"], row["completions"], row.get("token_ids"), row.get("truncated")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def finished_rows(partial: Path, identity: Mapping[str, Any], rows: Iterable[Any]) -> int:
    """How many of the rows a stopped run of the same reference has scored; cuts the file after the last whole one."""
    if not partial.exists():
        return 0
    lines = partial.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line end was cut off
    done = 0
    for line, row in zip(lines, rows, strict=False):
        written = json.loads(line)
        if written["of"] != row_hash(row) or written["reference"] != identity:
            break
        done += 1
    partial.write_text("".join(line + "\n" for line in lines[:done]), encoding="utf-8")
    return done


def _join(rows: Any, partial: Path, finished: Path, suffix: str) -> None:
    """The rows with their new columns, as one file; all other columns as they were."""
    if suffix == ".jsonl":
        with partial.open(encoding="utf-8") as lines, finished.open("w", encoding="utf-8") as file:
            for row, line in zip(rows, lines, strict=True):
                columns = {name: value for name, value in json.loads(line).items() if name != "of"}
                file.write(json.dumps(dict(row) | columns, ensure_ascii=False, default=str) + "\n")
        return
    from datasets import Dataset, concatenate_datasets

    columns = Dataset.from_json(str(partial), keep_in_memory=True).remove_columns("of")
    kept = rows.remove_columns([name for name in columns.column_names if name in rows.column_names])
    concatenate_datasets([kept, columns], axis=1).to_parquet(str(finished))
