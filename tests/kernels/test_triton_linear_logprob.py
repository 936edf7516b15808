"""Every implementation of linear_logprob against float64, by error budget; the Triton one interpreted on the CPU."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gvpo_kernels.inputs
from gvpo_kernels import linear_logprob
from tests.kernels.head_problems import (
    assert_close,
    assert_rounded_alone,
    assert_within_budget,
    logprob_results,
    make_problem,
)

IMPLEMENTATIONS = ["torch", "triton"]
HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "bias and soft cap": {"bias": True, "softcap": 2.0, "temperature": 1.7},
}
quick = settings(max_examples=20)


@pytest.mark.usefixtures("_small_pieces", "_poisoned")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(252, 507, 23), (93, 70, 57)])
def test_error_budget(shape, dtype, head, implementation, device):
    problem = make_problem(*shape, device=device, scale=3.0, **head).to(dtype)
    truth = logprob_results(problem.to(torch.float64), "reference")
    assert_within_budget(logprob_results(problem, implementation), logprob_results(problem, "reference"), truth)


@pytest.mark.usefixtures("_small_pieces", "_poisoned")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_error_budget_of_bfloat16(implementation, device):
    problem = make_problem(100, 300, 33, device=device, scale=3.0).to(torch.bfloat16)
    truth = logprob_results(problem.to(torch.float64), "reference")
    # the interpreter cuts float32 to bfloat16 off instead of rounding it, which doubles each such error
    factor = 2.5 if implementation == "triton" and device == "cpu" else 1.5
    results = logprob_results(problem, implementation), logprob_results(problem, "reference")
    assert results[0]["logprobs"].dtype == torch.float32
    assert_within_budget(*results, truth, factor)


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(data=st.data())
@quick
def test_any_shape(data, implementation, device):
    num_tokens = data.draw(st.sampled_from([0, 1, 2, 47, 48, 49, 97]) | st.integers(0, 70), "tokens")
    vocab_size = data.draw(st.sampled_from([1, 2, 127, 128, 129, 257]) | st.integers(1, 300), "vocabulary")
    problem = make_problem(
        num_tokens,
        vocab_size,
        data.draw(st.integers(1, 20), "hidden"),
        bias=data.draw(st.booleans(), "bias"),
        softcap=data.draw(st.sampled_from([None, 0.5, 30.0]), "softcap"),
        temperature=data.draw(st.sampled_from([1.0, 0.3, 2.0]), "temperature"),
        trained=data.draw(st.sampled_from([("hidden",), ("weight",), ("hidden", "weight", "bias")]), "trained"),
        device=device,
    ).to(torch.float32)
    truth = logprob_results(problem.to(torch.float64), "reference")
    assert_rounded_alone(logprob_results(problem, implementation), truth, problem)


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
def test_torch_is_exact_in_float64(trained, device):
    problem = make_problem(61, 130, 9, bias=True, softcap=3.0, temperature=0.7, device=device, trained=trained)
    assert_close(logprob_results(problem, "torch"), logprob_results(problem, "reference"), 1e-12)


def test_gradcheck():
    problem = make_problem(4, 11, 3, bias=True, softcap=2.0, temperature=0.7)
    leaves = problem.leaves()

    def function(hidden, weight, bias):
        return linear_logprob(hidden, weight, problem.targets, bias=bias, implementation="torch", **problem.head)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
def test_without_gradient(implementation, device):
    problem = make_problem(5, 7, 3, device=device).to(torch.float32)
    leaves = problem.leaves()
    with torch.no_grad():
        logprobs = linear_logprob(leaves["hidden"], leaves["weight"], problem.targets, implementation=implementation)
    assert logprobs.shape == (5,)
    assert not logprobs.requires_grad


def test_auto_says_once_what_it_chose(caplog):
    gvpo_kernels.inputs._announce.cache_clear()
    problem = make_problem(5, 7, 3)
    with caplog.at_level(logging.DEBUG, logger="gvpo_kernels"):
        for _ in range(3):
            linear_logprob(problem.hidden, problem.weight, problem.targets)
    assert len(caplog.records) == 1
    assert "uses torch" in caplog.text
    assert "float64" in caplog.text


def test_what_is_named_is_never_replaced(monkeypatch):
    problem = make_problem(5, 7, 3)
    with pytest.raises(ValueError, match=r"implementation='triton' cannot run here.*float64.*Use 'torch' or 'auto'"):
        linear_logprob(problem.hidden, problem.weight, problem.targets, implementation="triton")
    problem = problem.to(torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"needs a CUDA device and the input is on cpu"):
        linear_logprob(problem.hidden, problem.weight, problem.targets, implementation="triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"triton package is not installed \(pip install triton\)"):
        linear_logprob(problem.hidden, problem.weight, problem.targets, implementation="triton")
    with pytest.raises(ValueError, match="implementation must be one of auto, triton, torch, reference, got 'fast'"):
        linear_logprob(problem.hidden, problem.weight, problem.targets, implementation="fast")


WRONG = {
    "soft cap": ({"softcap": 0.0}, "softcap must be > 0, got 0.0"),
    "weight dtype": ({"weight": torch.zeros(7, 3)}, "weight must have hidden's dtype torch.float64, got torch.float32"),
    "bias dtype": ({"bias": torch.zeros(7)}, "bias must have hidden's dtype"),
    "integer hidden": ({"hidden": torch.zeros(5, 3).long()}, "hidden must be float16"),
    "no vocabulary": ({"weight": torch.zeros(0, 3).double()}, "weight must have at least one row"),
    "infinite temperature": ({"temperature": float("inf")}, "temperature must be > 0, got inf"),
    "other device": ({"weight": torch.zeros(7, 3, device="meta")}, "weight must be on hidden's device cpu, got meta"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(change, message):
    problem = make_problem(5, 7, 3)
    arguments = {"hidden": problem.hidden, "weight": problem.weight, "targets": problem.targets} | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)
