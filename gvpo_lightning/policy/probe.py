"""The start-up probe: a policy must give the same log-probs in training, in scoring and in generation.

A log-ratio compares log-probs of the same tokens that were taken in different company: alone, beside longer rows,
behind padding, in training mode and in evaluation mode; and the tokens themselves were drawn step by step through a
key-value cache. `probe_policy` takes those of two rows of random tokens in each of these ways, and refuses the model
by name where two ways differ, with the cause and the mend.

In a batch of another shape the same sums round differently. In 16 bits a router that has two about equal experts may
then take the other one, with which the tokens behind change too, and int8 rounds by the largest of a batch. That is no
fault of the model: of these models it is the median over the tokens that must be small, of all others the largest
difference. And what must not matter, the content of padding and of other rows, is changed without a change of shape,
for which the tolerance is smaller.
"""

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from gvpo_lightning.data.batch import CompletionBatch, collate_completions
from gvpo_lightning.policy.config_check import context_limit
from gvpo_lightning.policy.generation import without_generation_config
from gvpo_lightning.policy.head import Scoring, completion_logprobs
from gvpo_lightning.policy.head_check import PRECISE, compare_head

LONGER, LENGTH, STEPS = 12, 8, 4  # tokens of the two rows, and of those that are drawn through the cache
SAMPLED = 2e-3  # what is drawn need not be exact: it changes no log-ratio
# of the tolerance, where shapes are the same, and with them the order of sums; and where all numbers are, but with
# experts, whose own shapes change with the tokens that others get
SAME_SHAPE, SAME_NUMBERS = 0.2, 0.02

EXPERTS = re.compile("expert|moe|router")  # in names of parameters
TWICE = "in two passes over the same tokens, in training mode,"
NOISE = (
    "it is random, by noise under a name that is not known here, such as a dropout, a jitter or a sampled router: "
    "switch it off in the model's config, or take another model."
)


def probe_policy(
    model: PreTrainedModel, scoring: Scoring = Scoring(), *, gathered: AbstractContextManager[Any] | None = None
) -> float:
    """Compare a model's log-probs with themselves, in every way that training takes them.

    Beside the 3 passes of `check_logprob_head` (6 with `padding_free`) it makes 6 of at most 12 tokens a row, with
    gradients one more, and with `gathered` one more and 4 steps of sampling; on every rank the same number. Weights,
    gradients, buffers, modes and random states stay as they are.

    Args:
        scoring: how the run takes log-probs.
        gathered: of a model that is sampled from, the context in which every rank holds it whole, as in a rollout;
            None: it is not sampled from, as a reference, and its key-value cache is of no concern.

    Returns:
        the largest difference of the fused head from the model's own logits, as `check_logprob_head` gives it.

    Raises:
        ValueError: two ways differ, or the model can't be called in one of them.
    """
    with _no_trace(model):
        model.train()
        with torch.compiler.set_stance("force_eager"), torch.no_grad(), _named(model, ValueError):
            probe = _Probe(model, replace(scoring, temperature=1.0, padding_free=False))
        with _named(model, ValueError):
            error, probe.tolerance = compare_head(model, scoring)
        # the rest is about the model, not about its compiled layers, which would be compiled for each of the cases
        with torch.compiler.set_stance("force_eager"), _named(model, _Refusal):
            probe.check_gradient()
            with torch.no_grad():
                probe.compare_passes()
                if gathered is not None:
                    with gathered:
                        probe.compare_generation()
    return error


class _Refusal(ValueError):
    """The probe's own."""


class _Probe:
    """The comparisons of one model, which is in training mode at first.

    Attributes:
        tolerance: as `compare_head` gives it; to be set before anything is compared.

    Raises:
        ValueError: it draws random numbers, and they count.
    """

    def __init__(self, model: PreTrainedModel, scoring: Scoring) -> None:
        self.model, self.scoring, self.tolerance = model, scoring, PRECISE
        parameters = list(model.named_parameters())
        self._flips = any(EXPERTS.search(name) or value.dtype == torch.int8 for name, value in parameters)
        self.batch = _example_rows(model)
        self.alone = self.batch.select(torch.tensor([0]))
        states = _random_states()
        self.first = self._logprobs(self.alone)
        draws = states != _random_states()
        self.again = self._logprobs(self.alone)
        if draws and not torch.equal(self.first, self.again):  # however small: it could hide among 16 bits' roundings
            raise self._differing(TWICE, float((self.first - self.again).abs().max()), 0.0, NOISE)

    def check_gradient(self) -> None:
        """Of padded rows, by the smallest of the parameters that are trained; nothing where gradients are off."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not trained or not torch.is_grad_enabled():
            return
        smallest = min(trained, key=torch.numel)

        def is_finite(batch: CompletionBatch) -> bool:
            logprobs, _ = completion_logprobs(self.model, batch, self.scoring)
            (gradient,) = torch.autograd.grad(logprobs.sum(), smallest, allow_unused=True)
            return gradient is None or bool(gradient.isfinite().all())

        if not is_finite(self.batch):
            if not is_finite(self.alone):
                raise _refusal(
                    self.model,
                    "its gradient is not finite, with or without padding, as where it overflows float16: use bfloat16 "
                    "or float32 (loading.dtype, trainer.precision), or take another model.",
                )
            raise _refusal(
                self.model,
                "where rows are padded its gradient is not finite, as where it takes the root of the norm of the "
                "padding's embedding, which is 0: give the embedding of token "
                f"{int(self.batch.prompt_ids[0, 0])} other values, or take another model.",
            )

    def compare_passes(self) -> None:
        """The first row in other company, and in evaluation mode, which this leaves the model in."""
        batch, first = self.batch, self.first
        self._check(self.again, first, TWICE, NOISE, SAME_SHAPE)
        self._check(
            self._logprobs(_padded_left(batch)),
            first,
            "alone and padded on the left",
            "it ignores the attention mask or the position ids, as recurrent models do that know no padding: take a "
            "model that honours both.",
        )
        together = self._logprobs(batch)
        self._check(
            together,
            first,
            "alone and beside a longer row",
            "what it makes of a row depends on the others of its batch: take a model that keeps rows apart.",
        )
        self._check(
            self._logprobs(_example_rows(self.model, other_content=True)),
            together,
            "beside one and another row, and behind one and another padding,",
            "it reads padding or other rows: take a model that honours the attention mask and keeps rows apart.",
            SAME_SHAPE if self._flips else SAME_NUMBERS,
            least=PRECISE / 10,
        )
        self.model.eval()
        self._check(
            self._logprobs(self.alone),
            first,
            "in training mode and in evaluation mode",
            "it computes something else, or with noise, while it is trained: switch that off in the model's config, "
            "or take another model.",
            SAME_SHAPE,
        )

    def compare_generation(self) -> None:
        """Both rows, one padded on the left: drawn by `generate`, in evaluation mode, and in one pass."""
        batch = self.batch
        steps = min(STEPS, batch.completion_ids.shape[1] - 1)
        ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
        mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1).to(torch.int64)
        forced = _Forced(ids[:, -steps:])
        expected, _ = completion_logprobs(self.model, batch, self.scoring)
        with without_generation_config(self.model):
            self.model.generate(  # type: ignore[operator]
                input_ids=ids[:, :-steps],
                attention_mask=mask[:, :-steps],
                max_new_tokens=steps,
                do_sample=False,
                logits_processor=LogitsProcessorList([forced]),
                pad_token_id=0,
                synced_gpus=False,
            )
        self._check(
            torch.stack(forced.logprobs, dim=1),
            expected[:, -steps:],
            "step by step through its key-value cache, as completions are drawn, and in one pass, as they are trained,",
            "its cache or its generation loses part of what stands before a token: take another model, or a release "
            "of transformers in which its generation is mended.",
            least=SAMPLED,
        )

    def _logprobs(self, batch: CompletionBatch) -> Tensor:
        """(T,) of the first row's completion."""
        return completion_logprobs(self.model, batch, self.scoring)[0][0]

    def _check(
        self, ours: Tensor, theirs: Tensor, how: str, cause: str, share: float = 1.0, least: float = 0.0
    ) -> None:
        """Raise ValueError where log-probs taken in two ways differ by more than `share` of the tolerance."""
        error, allowed = (ours - theirs).abs() / (1 + theirs.abs().max()), max(share * self.tolerance, least)
        found = float(error.median() if self._flips and self.tolerance > PRECISE else error.max())
        if not found <= allowed:
            raise self._differing(how, found, allowed, cause)

    def _differing(self, how: str, error: float, allowed: float, cause: str) -> _Refusal:
        return _refusal(
            self.model,
            f"its log-probs of the same tokens {how} differ by {error:.2g}, relative to 1 + the largest, where "
            f"{allowed:.2g} is allowed. Log-ratios would be off by as much: {cause}",
        )


def _refusal(model: Any, reason: str) -> _Refusal:
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    return _Refusal(f"{name} can be neither trained nor a reference: {reason}")


@contextmanager
def _named(model: PreTrainedModel, own: type[ValueError]) -> Iterator[None]:
    """What a model raises inside, of padding, positions or caches that it can't take, becomes a refusal by name.

    `own`: what is one already.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.distributed.DistError, own):
        raise
    except Exception as error:
        raise _refusal(
            model,
            "with padding, or through its key-value cache, it has failed on a few tokens with "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]} Take another model.",
        ) from error


def _example_rows(model: PreTrainedModel, *, other_content: bool = False) -> CompletionBatch:
    """Two rows of random tokens, the first padded on the left; `other_content`: another second row, other padding.

    Their completions are as long as each other; the prompt of the first is one token.
    """
    context, num_tokens = context_limit(model.config).tokens, len(model.get_output_embeddings().weight)
    longer = LONGER if context is None else min(LONGER, context)
    length = max(min(LENGTH, longer - 1), 2)
    first, second, third = (
        torch.randint(num_tokens, (size,), generator=torch.Generator().manual_seed(seed)).tolist()
        for seed, size in ((0, length), (1, longer), (2, longer))
    )
    row, split = (third if other_content else second), longer - length + 1
    padding = num_tokens - 1 if other_content else 0
    rows: Sequence[list[int]] = (first[:1], row[:split])
    return collate_completions(rows, [first[1:], row[split:]], [False] * 2, [0, 0], padding).to(model.device)


def _padded_left(batch: CompletionBatch) -> CompletionBatch:
    """The first row alone, with its padding."""
    return CompletionBatch(**{name: tensor[:1] for name, tensor in batch.state_dict().items()})


class _Forced(LogitsProcessor):
    """Lets `generate` take the given (S, T) tokens, and keeps the (S,) log-probs that it had for each of them."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        taken = self.tokens[:, len(self.logprobs), None]
        self.logprobs.append(torch.log_softmax(scores.float(), dim=-1).gather(-1, taken).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter(-1, taken, 0.0)


def _random_states() -> list[Any]:
    """Of all generators that a forward pass may draw from."""
    devices = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [
        *(state.tolist() for state in (torch.get_rng_state(), *devices)),
        str(np.random.get_state()),
        random.getstate(),
    ]


@contextmanager
def _no_trace(model: nn.Module) -> Iterator[None]:
    """Inside, passes of the model change nothing that outlasts them."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    values = [(buffer, buffer.clone()) for _, held in buffers for buffer in held.values() if buffer is not None]
    # positions' frequencies and how far they reach
    leaves = [m for m in model.modules() if m._buffers and not m._modules and not m._parameters]
    attributes = [(leaf, dict(vars(leaf))) for leaf in leaves]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            for leaf, own in attributes:
                vars(leaf).clear()
                vars(leaf).update(own)
            for module, held in buffers:
                module._buffers.clear()
                module._buffers.update(held)
            with torch.no_grad():
                for buffer, value in values:
                    buffer.copy_(value)
            for module, training in modes:
                vars(module)["training"] = training
