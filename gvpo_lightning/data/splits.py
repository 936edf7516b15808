"""Splits of a Hugging Face dataset, wherever it lies."""

from pathlib import Path

from datasets import Dataset, DatasetDict, ReadInstruction, load_dataset, load_from_disk


def load_splits(path: str, name: str | None = None, key: str = "data.path", revision: str | None = None) -> DatasetDict:
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
            loaded = load_dataset(path, name, revision=revision)
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
