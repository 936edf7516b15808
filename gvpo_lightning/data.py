"""`PromptDataModule`: prompts from a Hugging Face dataset, wherever it lies."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from datasets import Dataset, DatasetDict, ReadInstruction, load_dataset, load_from_disk
from torch.utils.data import DataLoader

from gvpo_lightning.rollout.loader import RolloutLoader, Row


class PromptDataModule(L.LightningDataModule):
    """Prompts for training and evaluation.

    Args:
        path: a dataset's hub name, a folder saved with `save_to_disk`, or a .jsonl, .json or .parquet file.
        name: the hub dataset's configuration, such as gsm8k's "main".
        prompt_column: the column with the prompt: text, or a list of {"role", "content"} messages.
        prompt_template: a format string over the row's columns, such as "Question: {question}"; replaces the
            text of the prompt column.
        conversational: turn text prompts into one user message, for the tokenizer's chat template.
        system_prompt: a system message in front of it (implies `conversational`).
        train_split, validation_split, test_split: split expressions in the datasets library's notation, such
            as "train[:7473]"; None = no such split. `predict` runs on the test split, or else on validation's.
        batch_size: prompts in one batch of validation, test and predict.

    All other columns reach the reward as keyword arguments, by name.

    Raises:
        ValueError: at setup, before anything is trained: no such data, split or column, an empty split, a row
            whose prompt is missing or unusable, or a prompt longer than the model's context allows.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        prompt_column: str = "prompt",
        prompt_template: str | None = None,
        conversational: bool = False,
        system_prompt: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        self.path, self.name = path, name
        self.prompt_column, self.prompt_template = prompt_column, prompt_template
        self.conversational, self.system_prompt = conversational or system_prompt is not None, system_prompt
        self.splits = {"train": train_split, "validation": validation_split, "test": test_split}
        self.batch_size = batch_size
        self._rows: dict[str, Dataset] = {}

    def setup(self, stage: str) -> None:
        """Load, cut and check every split that the stage needs."""
        needed = {
            "fit": ["train", "validation"],
            "validate": ["validation"],
            "test": ["test"],
            "predict": ["test"] if self.splits["test"] else ["validation"],
        }[stage]
        available = load_splits(self.path, self.name)
        for role in needed:
            if self.splits[role] is None and stage == "fit":
                continue
            self._rows[role] = self._prepare(role, available)
            if role == "train":
                self._train_loader = RolloutLoader(self._rows[role], self._module)  # checks its prompts
            else:
                self._module.check_prompts(self._rows[role])

    @property
    def _module(self) -> Any:
        assert self.trainer is not None
        return self.trainer.lightning_module

    def _prepare(self, role: str, available: DatasetDict) -> Dataset:
        expression = self.splits[role]
        if expression is None:
            raise ValueError(f"There is no {role} data: set data.{role}_split to one of {sorted(available)}.")
        dataset = cut_split(available, expression)
        if not len(dataset):
            raise ValueError(f"data.{role}_split={expression!r} of {self.path!r} is empty.")
        if self.prompt_column not in dataset.column_names and self.prompt_template is None:
            raise ValueError(
                f"data.prompt_column={self.prompt_column!r} is not a column of {self.path!r}: "
                f"it has {dataset.column_names}."
            )
        make = partial(
            with_prompt,
            column=self.prompt_column,
            template=self.prompt_template,
            conversational=self.conversational,
            system_prompt=self.system_prompt,
        )
        try:
            # in memory: a cache file would land in the user's own folder, which may be read-only or shared by ranks
            return dataset.map(make, with_indices=True, keep_in_memory=True)
        except ValueError as error:
            raise ValueError(f"data.path={self.path!r}, {expression!r}: {error}") from error

    def train_dataloader(self) -> RolloutLoader:
        """The training prompts, in seeded order."""
        return self._train_loader

    def val_dataloader(self) -> Any:
        """The validation prompts, in the dataset's order."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> Any:
        """The test prompts, in the dataset's order."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> Any:
        """The test prompts, or else the validation prompts."""
        return self._evaluation_loader("test" if "test" in self._rows else "validation")

    def _evaluation_loader(self, role: str) -> Any:
        rows = self._rows.get(role)
        return [] if rows is None else DataLoader(rows, batch_size=self.batch_size, collate_fn=list)


def with_prompt(
    row: Row, number: int, *, column: str, template: str | None, conversational: bool, system_prompt: str | None
) -> Row:
    """The row's `prompt`, made from its column or from the template.

    Raises:
        ValueError: an empty prompt, or a template that names a column which the row lacks.
    """
    try:
        prompt: Any = row[column] if template is None else template.format(**row)
    except (KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"prompt_template={template!r} asks for {error}, the rows have {sorted(row)}.") from error
    if not prompt:
        raise ValueError(f"row {number} has an empty prompt.")
    if conversational and isinstance(prompt, str):
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        prompt = [*system, {"role": "user", "content": prompt}]
    return {"prompt": prompt}


def load_splits(path: str, name: str | None = None, key: str = "data.path") -> DatasetDict:
    """Every split of a dataset: hub name, `save_to_disk` folder, JSON lines or parquet file.

    Raises:
        ValueError: nothing readable is there.
    """
    location, builders = Path(path), {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    try:
        if (location / "dataset_dict.json").exists() or (location / "state.json").exists():
            loaded = load_from_disk(path)
        elif location.suffix in builders:
            loaded = load_dataset(builders[location.suffix], data_files=path)
        else:
            loaded = load_dataset(path, name)
    except Exception as error:  # the libraries beneath raise dozens of types; the user needs one line
        if location.is_file() and not location.stat().st_size:
            raise ValueError(f"{key}={path!r} is an empty file.") from error
        reasons = [error, *causes(error)]
        chain = "; ".join(f"{type(reason).__name__}: {reason}" for reason in reasons)
        raise ValueError(f"{key}={path!r} can't be read as a dataset: {chain}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)


def causes(error: BaseException) -> list[BaseException]:
    """What an error was raised from, outermost first."""
    return [] if error.__cause__ is None else [error.__cause__, *causes(error.__cause__)]


def cut_split(available: DatasetDict, expression: str) -> Dataset:
    """The rows that a split expression such as "train[:80%]" or "test[10:20]" names.

    Raises:
        ValueError: no such split, or not an expression.
    """
    try:
        parts = ReadInstruction.from_spec(expression).to_absolute({k: len(v) for k, v in available.items()})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{expression!r} names no split; there are {sorted(available)}: {error}") from error
    if len(parts) != 1:
        raise ValueError(f"{expression!r} joins several splits; name one, or a slice of one.")
    dataset = available[parts[0].splitname]
    rows = range(len(dataset))[parts[0].from_ : parts[0].to]
    return dataset.select(rows or [])  # an empty range that starts past the end is refused
