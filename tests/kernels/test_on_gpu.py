"""What only a GPU can show: bfloat16 at full size, memory beyond inputs and gradients, 65,536 rows and more."""

import pytest
import torch

from gvpo_kernels import fused_gvpo_loss, linear_logprob
from tests.kernels.head_problems import (
    assert_within_budget,
    logprob_results,
    loss_results,
    make_completions,
    make_problem,
)

pytestmark = pytest.mark.gpu
MODES = [{"mode": "recompute"}, {"mode": "stash"}, {"trained": ("hidden",)}, {"drop_below": 0.0}]


@pytest.mark.parametrize("shape", [(252, 507, 123), (193, 70, 517), (1937, 152_064, 3584)])
@pytest.mark.parametrize("head", [{}, {"bias": True, "softcap": 30.0, "temperature": 0.8}])
def test_error_budget_in_bfloat16(shape, head):
    problem = make_problem(*shape, device="cuda", **head).to(torch.bfloat16)
    truth = logprob_results(problem.to(torch.float64), "reference")
    eager = logprob_results(problem, "reference")
    assert_within_budget(logprob_results(problem, "triton"), eager, truth, factor=2.0)


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_modes(options, dtype):
    options = dict(options)
    trained = options.pop("trained", ("hidden", "weight"))
    problem = make_problem(1937, 32_000, 512, device="cuda", trained=trained).to(dtype)
    batch = make_completions([600, 700, 337, 300], [0, 1, 0, 1], device="cuda", level=-10.0)
    truth = loss_results(problem.to(torch.float64), batch, "reference")
    eager = loss_results(problem, batch, "reference")
    assert_within_budget(loss_results(problem, batch, "triton", **options), eager, truth, factor=2.0)


def reference_shape():
    generator = torch.Generator(device="cuda").manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    hidden = torch.randn(16_384, 3_584, **options).requires_grad_()
    weight = (torch.randn(152_064, 3_584, **options) / 60).requires_grad_()
    targets = torch.randint(152_064, (16_384,), device="cuda", generator=generator)
    return hidden, weight, targets, make_completions([1024] * 16, [0] * 8 + [1] * 8, device="cuda", level=-12.5)


def test_memory_and_determinism_at_full_size():
    hidden, weight, targets, batch = reference_shape()
    gradients = []
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused_gvpo_loss(hidden, weight, targets, *vars(batch).values(), mode="recompute").loss.backward()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes
        assert extra <= 0.6e9
        gradients.append((hidden.grad, weight.grad))
        hidden.grad = weight.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_many_rows():
    problem = make_problem(131_072, 600, 64, device="cuda").to(torch.bfloat16)
    truth = logprob_results(problem.to(torch.float64), "reference")
    eager = logprob_results(problem, "reference")
    assert_within_budget(logprob_results(problem, "triton"), eager, truth, factor=2.0)


def test_auto_takes_the_kernels():
    problem = make_problem(100, 300, 32, device="cuda").to(torch.bfloat16)
    columns = (problem.hidden, problem.weight, problem.targets)
    assert torch.equal(linear_logprob(*columns), linear_logprob(*columns, implementation="triton"))
