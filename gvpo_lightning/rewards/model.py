"""Rewards from a model: a Hugging Face sequence classifier with one output."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class RewardModel:
    """The output of an `AutoModelForSequenceClassification` with `num_labels=1` on prompt and completion.

    Conversations are put into the model's own chat template, with the completion as the assistant's message; a text
    is followed by its completion. No special tokens are added to either. A completion that is too long for the
    model's context is not cut: the reward fails on it. The output is that of the completion on its own: what it is
    batched with, and what padding token the tokenizer has, if any, plays no part.

    Each rank loads its own when it is first asked. It stays on the policy's device.

    Args:
        path: a hub id or a folder.
        batch_size: completions at a time.
        dtype: of the weights, such as "bfloat16"; "auto": as they are saved.
        name: in metrics.

    Raises:
        ValueError: the model has not one output.
    """

    in_process = True  # batches, on the policy's device
    takes_text = True

    def __init__(self, path: str, batch_size: int = 16, dtype: str = "auto", name: str = "RewardModel") -> None:
        from transformers import AutoConfig

        if batch_size < 1:
            raise ValueError(f"RewardModel.batch_size must be at least 1, got {batch_size}.")
        num_labels = AutoConfig.from_pretrained(path).num_labels
        if num_labels != 1:
            raise ValueError(f"A reward model has one output (num_labels=1), but {path} has {num_labels}.")
        self.path, self.batch_size, self.dtype = path, batch_size, dtype
        self.name = name
        self.device: Any = "cpu"
        self._model: Any = None
        self._advance: Callable[[int], object] = lambda count: None
        self._tokenizer: Any = None

    def weight_bytes(self) -> int:
        """What its weights take on the device, for an estimate."""
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification

        config = AutoConfig.from_pretrained(self.path)
        dtype = config.dtype or torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        return model.num_parameters() * dtype.itemsize

    def to(self, device: Any) -> None:
        """Be there from now on."""
        self.device = device
        if self._model is not None:
            self._model.to(device)

    def track(self, advance: Callable[[int], object]) -> None:
        """Call this with the number of completions that are done, batch by batch."""
        self._advance = advance

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | Exception]:
        """One reward a completion; an exception for each that is too long."""
        self._load()
        ids = [self._token_ids(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and limit < 0:  # as XLNet says that there is none
            limit = None
        fits = [row for row, tokens in enumerate(ids) if limit is None or len(tokens) <= limit]
        rewards: list[float | Exception] = [
            ValueError(f"its {len(tokens)} tokens with the prompt exceed the reward model's context of {limit}")
            for tokens in ids
        ]
        for rows in self._batches(fits, [len(tokens) for tokens in ids]):
            for row, reward in zip(rows, self._outputs([ids[row] for row in rows]), strict=True):
                rewards[row] = reward
            self._advance(len(rows))
        return rewards

    def _load(self) -> None:
        if self._model is not None:
            return
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(self.path)
        model = AutoModelForSequenceClassification.from_pretrained(self.path, dtype=self.dtype)
        self._model = model.eval().requires_grad_(False).to(self.device)

    def _token_ids(self, prompt: Any, completion: str) -> list[int]:
        if isinstance(prompt, str):
            text = prompt + completion
        else:
            chat = [*prompt, {"role": "assistant", "content": completion}]
            text = self._tokenizer.apply_chat_template(chat, tokenize=False)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _batches(self, rows: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
        """The rows in batches, the shortest first; none has rows of different lengths unless the model may be padded.

        Behind a text padding changes nothing for a causal model that takes the output at the text's last token. Other
        classifiers mix all tokens, or take the output at the last one, whatever it is.
        """
        from transformers.modeling_layers import GenericForSequenceClassification

        may_pad = isinstance(self._model, GenericForSequenceClassification)
        by_length = sorted(rows, key=lambda row: lengths[row])
        for _, group in itertools.groupby(by_length, key=lambda row: may_pad or lengths[row]):
            together = list(group)
            for start in range(0, len(together), self.batch_size):
                yield together[start : start + self.batch_size]

    def _outputs(self, ids: list[list[int]]) -> list[float]:
        """One output for each row of token ids."""
        import torch

        model = self._model
        text_config = model.config.get_text_config()
        width, used = max(map(len, ids)), set(itertools.chain(*ids))
        # A model finds a row's last token as the last one that is not padding: so no row may have the padding in it.
        unused = (token for token in range(getattr(text_config, "vocab_size", 0)) if token not in used)
        padding = next(unused, -1)
        if padding < 0 and any(len(row) < width for row in ids):
            return [output for row in ids for output in self._outputs([row])]
        model.config.pad_token_id = text_config.pad_token_id = padding
        padded = torch.tensor([row + [padding] * (width - len(row)) for row in ids], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=self.device)
        # outside of the run's precision: a step of the Trainer would cast it
        with torch.no_grad(), torch.autocast(torch.device(self.device).type, enabled=False):
            logits = model(input_ids=padded, attention_mask=mask).logits
        return logits[:, 0].float().tolist()
