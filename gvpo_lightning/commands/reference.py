"""`gvpo reference`: log-probs of recorded completions under the reference, written beside them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import Strategy
from rich.progress import track
from torch import nn
from transformers import PreTrainedTokenizerBase

from gvpo_lightning.atomic import appearing
from gvpo_lightning.data.batch import collate_completions
from gvpo_lightning.data.rows import encode_prompt
from gvpo_lightning.policy.head import Scoring, score
from gvpo_lightning.policy.loading import check_attention
from gvpo_lightning.policy.prepare import load_policy, prepare_policy, stop_token_ids
from gvpo_lightning.policy.probe import probe_policy
from gvpo_lightning.policy.source import PolicySource
from gvpo_lightning.reference.kinds import cache_identity
from gvpo_lightning.rewards.values import as_text, json_line
from gvpo_lightning.sources.offline import OfflineFile, row_completions
from gvpo_lightning.sources.settings import FileSettings


def fill_cache(
    file_settings: FileSettings | None,
    source: PolicySource,
    model_name: str | None,
    scoring: Scoring,
    batch_size: int,
    strategy: Strategy,
    output: str | None = None,
) -> Path:
    """Score the completions of `sources.file` under the reference; write its rows with log-probs.

    Args:
        file_settings: which completions.
        source: the policy's, whose tokenizer encodes them.
        model_name: a reference of its own; None: the policy as it is loaded.
        scoring, batch_size: how, and how many at once.
        strategy: the Trainer's, of one device.
        output: where to; default: the file itself, which is replaced when all rows are done.

    Rows are written as they come to `<output>.partial`; a run that was stopped goes on there.

    Raises:
        ValueError: there is no file in the settings, it can't be replaced, or several devices.
    """
    if file_settings is None:
        raise ValueError("gvpo reference scores recorded completions: set model.sources.file.path.")
    target = _target(file_settings, output)
    num_devices = getattr(strategy, "world_size", 1)
    if num_devices > 1:
        raise ValueError(f"gvpo reference runs on one device, got {num_devices}: set trainer.devices=1.")
    file = OfflineFile(file_settings.path, file_settings.split, source.tokenizer, source.vocab_size())
    plugin = strategy.precision_plugin
    check_attention(source.loading, strategy.root_device, str(plugin.precision))
    given = model_name or source.given
    model: Any = load_policy(given, source.loading_of(given)) if isinstance(given, str) else given
    prepare_policy(model)
    name = source.shown if model_name is None else model_name
    identity = cache_identity(model, name, source, scoring.temperature, str(plugin.precision))
    plugin.convert_module(nn.ModuleList([model]))  # transformers refuses if it is quantized
    model.to(strategy.root_device)

    partial = target.with_name(target.name + ".partial")
    done = finished_rows(partial, identity, file.rows)
    rest = (file.rows[number] for number in range(done, len(file.rows)))
    with partial.open("a", encoding="utf-8") as lines, plugin.forward_context():
        probe_policy(model, scoring)
        for row in track(rest, "reference log-probs", total=len(file.rows) - done):
            columns = _scored(row, source.tokenizer, model, scoring, batch_size)
            lines.write(json.dumps(columns | {"reference": identity, "of": row_hash(row)}) + "\n")
    with appearing(target) as finished:
        _join(file.rows, partial, finished, target.suffix)
    partial.unlink()
    return target


def _target(settings: FileSettings, output: str | None) -> Path:
    target = Path(output or settings.path)
    if target.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"The output must be a .jsonl or .parquet file, got {str(target)!r}: give --output FILE.")
    if output is None and "[" in settings.split:
        raise ValueError(
            f"sources.file.split={settings.split!r} is a part of {settings.path!r}, which would lose the rest: "
            "give --output FILE."
        )
    return target


def _scored(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, model: Any, scoring: Scoring, batch_size: int
) -> dict[str, Any]:
    """The token ids of the row's completions and their log-probs."""
    completions = list(row_completions(row, tokenizer, stop_token_ids(model, tokenizer)))
    ids = [completion.token_ids for completion in completions]
    columns: dict[str, Any] = {"token_ids": [i.tolist() for i in ids], "reference_logprobs": []}
    if ids:
        prompts = [encode_prompt(row["prompt"], tokenizer)] * len(ids)
        batch = collate_completions(prompts, ids, [False] * len(ids), [0] * len(ids), 0).to(model.device)
        values = score(model, batch, scoring, batch_size=batch_size)
        columns["reference_logprobs"] = [v[: len(i)].tolist() for v, i in zip(values, ids, strict=True)]
    return columns


def row_hash(row: Mapping[str, Any]) -> str:
    """Changes with what a row's log-probs depend on."""
    parts = [row["prompt"], row["completions"], row.get("token_ids"), row.get("truncated")]
    return hashlib.sha256(json.dumps(parts, default=as_text).encode()).hexdigest()[:16]


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
                file.write(json_line(dict(row) | columns))
        return
    from datasets import Dataset, concatenate_datasets

    columns = Dataset.from_json(str(partial), keep_in_memory=True).remove_columns("of")
    kept = rows.remove_columns([name for name in columns.column_names if name in rows.column_names])
    concatenate_datasets([kept, columns], axis=1).to_parquet(str(finished))
