"""`PromptDataModule`: prompts from a Hugging Face dataset, wherever it lies."""

from functools import partial
from string import Formatter
from typing import Any

import lightning as L
from datasets import Dataset, DatasetDict
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from gvpo_lightning.data.rows import Row, cut_split, encode_prompt, load_splits
from gvpo_lightning.data.templates import TEMPLATES
from gvpo_lightning.distributed.placement import data_ranks
from gvpo_lightning.evaluation.benchmarks import Benchmark, ProblemLoader, ProblemSet, check_shares, load_problems
from gvpo_lightning.rewards.values import as_written, is_missing
from gvpo_lightning.rollout.loader import RolloutLoader


class PromptDataModule(L.LightningDataModule):
    """Prompts for training and evaluation.

    Args:
        path: a dataset's hub name, a folder saved with `save_to_disk`, or a .jsonl, .json or .parquet file; not
            needed where benchmarks alone are tested.
        name: the hub dataset's configuration, such as gsm8k's "main".
        prompt_column: the column with the prompt: text, or a list of {"role", "content"} messages.
        prompt_template: a format string over the row's columns, such as "Question: {question}"; replaces the
            text of the prompt column; literal braces are doubled. Or the name of a template around that text:
            "qwen_math" or "r1" (`gvpo_lightning.data.templates`), which no chat template goes around.
        conversational: turn text prompts into one user message, for the tokenizer's chat template.
        system_prompt: a system message in front of it (implies `conversational`), and of prompts that are messages
            already; those that have a system message of their own are refused.
        train_split, validation_split, test_split: split expressions in the datasets library's notation, such
            as "train[:7473]"; None = no such split. `predict` runs on the test split, or else on validation's.
        batch_size: prompts in one batch of validation, test and predict.
        benchmarks: suites by name, which `test` measures instead of the test split; null leaves out one that an
            earlier config has. Their prompts are made as the settings above say, from `problem` and `answer`.
        max_prompt_tokens: longer prompts are left out, of benchmarks none; default: they are an error where the
            model's context has no room for them.

    All other columns reach the reward as keyword arguments, by name.

    Raises:
        ValueError: a `prompt_template` without a column, or a named one within a conversation; at setup, before
            anything is trained: no such data, split or column, an empty split, a row whose prompt is missing or
            unusable, or needs a value that is null, or a prompt longer than the model's context allows.
    """

    def __init__(
        self,
        path: str | None = None,
        name: str | None = None,
        prompt_column: str = "prompt",
        prompt_template: str | None = None,
        conversational: bool = False,
        system_prompt: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        batch_size: int = 32,
        benchmarks: dict[str, Benchmark | None] | None = None,
        max_prompt_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.path, self.name = path, name
        self.prompt_column, self.prompt_template = prompt_column, prompt_template
        self.conversational, self.system_prompt = conversational or system_prompt is not None, system_prompt
        if prompt_template is not None:
            check_template(prompt_template, self.conversational)
        self.splits = {"train": train_split, "validation": validation_split, "test": test_split}
        self.batch_size, self.max_prompt_tokens = batch_size, max_prompt_tokens
        self.benchmarks = {name: suite for name, suite in (benchmarks or {}).items() if suite is not None}
        self.problem_sets: list[ProblemSet] = []
        self._rows: dict[str, Dataset] = {}

    def setup(self, stage: str) -> None:
        """Load, cut and check every split that the stage needs."""
        needed = {
            "fit": ["train", "validation"],
            "validate": ["validation"],
            "test": ["test"],
            "predict": ["test"] if self.splits["test"] else ["validation"],
        }[stage]
        if stage == "test" and self.benchmarks:
            self._load_benchmarks()
            return
        if self.path is None:
            raise ValueError(f"{stage} needs data.path: a hub name, a folder or a file.")
        available = load_splits(self.path, self.name)
        for role in needed:
            if self.splits[role] is None and stage == "fit":
                continue
            self._rows[role] = self._prepare(role, available)
            if role == "train":
                self._train_loader = RolloutLoader(self._rows[role], self._module)  # checks its prompts
            else:
                self._module.prompts.check(self._rows[role])

    def _load_benchmarks(self) -> None:
        self.problem_sets = []  # or those of an earlier test would be measured again
        for name, benchmark in self.benchmarks.items():
            problems = load_problems(name, benchmark)
            make = self._prompt_maker("problem")
            try:
                for number, row in enumerate(problems):
                    row |= make(row, number)
                self._module.prompts.check(problems)
            except ValueError as error:
                raise ValueError(f"data.benchmarks.{name}: {error}") from error
            self.problem_sets.append(ProblemSet(name, problems, benchmark.num_samples))

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
        if self.prompt_column not in dataset.column_names and self.prompt_template in (None, *TEMPLATES):
            raise ValueError(
                f"data.prompt_column={self.prompt_column!r} is not a column of {self.path!r}: "
                f"it has {dataset.column_names}."
            )
        make = self._prompt_maker(self.prompt_column)
        try:
            # in memory: a cache file would land in the user's own folder, which may be read-only or shared by ranks
            rows = dataset.map(make, with_indices=True, keep_in_memory=True)
            return rows if self.max_prompt_tokens is None else self._short_enough(rows, expression)
        except ValueError as error:
            raise ValueError(f"data.path={self.path!r}, {expression!r}: {error}") from error

    def _short_enough(self, rows: Dataset, expression: str) -> Dataset:
        tokenizer, limit = self._module.tokenizer, self.max_prompt_tokens or 0
        lengths = [len(encode_prompt(prompt, tokenizer)) for prompt in rows["prompt"]]
        kept = [number for number, length in enumerate(lengths) if length <= limit]
        if not kept:
            raise ValueError(f"all prompts exceed data.max_prompt_tokens={limit}: the shortest has {min(lengths)}.")
        if len(kept) < len(rows):
            rank_zero_info(
                f"{len(rows) - len(kept)} of the {len(rows)} prompts of {expression!r} are longer than "
                f"data.max_prompt_tokens={limit} and left out."
            )
        return rows.select(kept)

    def _prompt_maker(self, column: str) -> Any:
        return partial(
            with_prompt,
            column=column,
            template=self.prompt_template,
            conversational=self.conversational,
            system_prompt=self.system_prompt,
        )

    def train_dataloader(self) -> RolloutLoader:
        """The training prompts, in seeded order."""
        return self._train_loader

    def val_dataloader(self) -> Any:
        """The validation prompts, in the dataset's order."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> Any:
        """The problems of the benchmarks, or the test prompts, in the dataset's order; none twice, on any rank.

        Raises:
            ValueError: benchmarks under FSDP1, whose ranks must have equally many batches; a rank without a problem.
        """
        assert self.trainer is not None
        if isinstance(self.trainer.strategy, FSDPStrategy):
            if self.problem_sets:
                raise ValueError(
                    "Ranks have different numbers of a benchmark's problems, and FSDPStrategy needs all ranks for each "
                    "token: use one device, DDP or FSDP2 (ModelParallelStrategy)."
                )
            return self._evaluation_loader("test")  # with Lightning's sampler, which repeats some prompts
        sets = self.problem_sets or [ProblemSet("test", self._rows["test"], None)]
        ranks = data_ranks(self.trainer.strategy)
        check_shares(sets, ranks.size)
        return ProblemLoader(sets, self.batch_size, ranks)

    def predict_dataloader(self) -> Any:
        """The test prompts, or else the validation prompts."""
        return self._evaluation_loader("test" if "test" in self._rows else "validation")

    def _evaluation_loader(self, role: str) -> Any:
        rows = self._rows.get(role)
        return [] if rows is None else DataLoader(rows, batch_size=self.batch_size, collate_fn=list)


def check_template(template: str, conversational: bool) -> None:
    """Raise ValueError for a template that makes all prompts alike, or that would be put inside another one."""
    if template in TEMPLATES:
        if conversational:
            raise ValueError(
                f"data.prompt_template={template!r} is a whole prompt already, and data.conversational or "
                "data.system_prompt would put it inside a user message: set conversational: false and "
                "system_prompt: null, or prompt_template: null."
            )
        return
    if all(field is None for _, field, _, _ in Formatter().parse(template)):
        raise ValueError(
            f"data.prompt_template={template!r} names no column, so all prompts would be the same: put one in, such "
            f"as 'Question: {{question}}', or give the name of a template, one of {sorted(TEMPLATES)}."
        )


def with_prompt(
    row: Row, number: int, *, column: str, template: str | None, conversational: bool, system_prompt: str | None
) -> Row:
    """The row's `prompt`, made from its column or from the template.

    Raises:
        ValueError: an empty prompt, a template that names a column which the row lacks or has a null in, or a system
            prompt beside messages that have one.
    """
    around = TEMPLATES.get(template or "")
    is_format = template is not None and around is None
    try:
        prompt: Any = ColumnFormatter().format(template or "", **row) if is_format else row[column]
    except (KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"prompt_template={template!r} asks for {error}, the rows have {sorted(row)}. Braces that are meant "
            r"literally are doubled: \boxed{{}}."
        ) from error
    except NullColumn as error:
        raise ValueError(
            f"row {number}: prompt_template={template!r} asks for {error}, which is null: leave the row out, or give "
            "it a value."
        ) from error
    if not prompt:
        raise ValueError(f"row {number} has an empty prompt.")
    if around is not None:
        if not isinstance(prompt, str):
            raise ValueError(f"row {number}: prompt_template={template!r} goes around text, got {str(prompt)[:80]!r}.")
        prompt = around(prompt)
    if conversational and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    # What is neither text nor messages is refused where prompts are checked.
    if system_prompt and isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        if any(message.get("role") == "system" for message in prompt):
            raise ValueError(
                f"row {number} has a system message already, beside which data.system_prompt={system_prompt[:80]!r} "
                "would be a second one: set system_prompt: null, or take the message out of the data."
            )
        prompt = [{"role": "system", "content": system_prompt}, *prompt]
    return {"prompt": prompt}


class NullColumn(Exception):
    """A template asks for a value that is null; the message names the column."""


class ColumnFormatter(Formatter):
    """`str.format`, but a number stands in the text as in the data, and nothing reads None.

    Raises:
        NullColumn: a value is null.
    """

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        """The value that a field names."""
        value, key = super().get_field(field_name, args, kwargs)
        if is_missing(value):
            raise NullColumn(repr(field_name))
        return as_written(value), key
