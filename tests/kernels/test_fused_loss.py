"""fused_gvpo_loss in every mode against plain float64 autograd."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gvpo_kernels import fused_gvpo_loss, group_loss, linear_logprob
from tests.kernels.head_problems import assert_close, assert_within_budget, loss_results, make_completions, make_problem

IMPLEMENTATIONS = ["torch", "triton"]
LENGTHS, GROUPS = [15, 0, 27, 1, 50, 13, 0, 29, 40], [4, 4, 7, 2, 2, 9, 9, 4, 7]
MODES = {
    "recompute": {},
    "stash": {"mode": "stash"},
    "frozen head": {"trained": ("hidden",)},
    "frozen body": {"trained": ("weight",)},
    "stash, frozen body": {"trained": ("weight", "bias"), "mode": "stash"},
    "known coefficients": {"known": True},
    "known coefficients, recomputed": {"known": True, "mode": "recompute"},
    "compaction": {"drop_below": 1.2},
    "compaction, known coefficients": {"drop_below": 0.7, "known": True},
    "compaction, frozen head": {"drop_below": 1.2, "trained": ("hidden",)},
    "another denominator": {"num_groups": 5},
    "another denominator, stash": {"num_groups": 5, "mode": "stash"},
}


def known_coefficients(device):
    return torch.linspace(-1, 2, len(LENGTHS), dtype=torch.float64, device=device)


def case(options: dict, device: str, **head):
    options = dict(options)
    trained = options.pop("trained", ("hidden", "weight", "bias"))
    if options.pop("known", False):
        options["sequence_coefficients"] = known_coefficients(device)
    problem = make_problem(sum(LENGTHS), 300, 23, scale=2.0, device=device, trained=trained, **head)
    return problem, make_completions(LENGTHS, GROUPS, device=device), options


@pytest.mark.usefixtures("_small_pieces", "_poisoned")
@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("head", [{}, {"bias": True, "softcap": 3.0, "temperature": 0.7}], ids=["plain", "capped"])
def test_torch_is_exact_in_float64(options, head, device):
    problem, batch, options = case(options, device, **head)
    truth = loss_results(problem, batch, "reference", **{**options, "mode": "auto"})
    assert_close(loss_results(problem, batch, "torch", **options), truth, 1e-11)


@pytest.mark.usefixtures("_small_pieces", "_poisoned")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_error_budget(options, dtype, implementation, device):
    problem, batch, options = case(options, device, bias=True, softcap=3.0, temperature=0.7)
    problem, plain = problem.to(dtype), {**options, "mode": "auto"}
    truth = loss_results(problem.to(torch.float64), batch, "reference", **plain)
    eager = loss_results(problem, batch, "reference", **plain)
    assert_within_budget(loss_results(problem, batch, implementation, **options), eager, truth, factor=2.0)


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(data=st.data())
@settings(max_examples=15)
def test_any_batch(data, implementation, device):
    lengths = data.draw(st.lists(st.integers(0, 30), max_size=7), "lengths")
    groups = data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)), "groups")
    options = data.draw(st.sampled_from([{}, {"mode": "stash"}, {"drop_below": 0.5}]), "options")
    trained = data.draw(st.sampled_from([("hidden",), ("weight",), ("hidden", "weight")]), "trained")
    vocab_size = data.draw(st.integers(1, 150), "vocabulary")
    problem = make_problem(sum(lengths), vocab_size, 7, device=device, trained=trained).to(torch.float32)
    batch = make_completions(lengths, groups, device=device)
    truth = loss_results(problem.to(torch.float64), batch, "reference", **{**options, "mode": "auto"})
    ours = loss_results(problem, batch, implementation, **options)
    for results in (ours, truth):
        results.pop("dropped_mass")  # 0 / 0 apart from rounding where every target is certain
    # with one vocabulary entry, or equal residuals, what is compared is rounding alone
    for name, expected in truth.items():
        torch.testing.assert_close(ours[name].double(), expected.double(), rtol=1e-3, atol=1e-4, msg=name)


def test_is_the_composition_of_its_parts():
    problem, batch, _ = case({}, "cpu")
    leaves = problem.leaves()
    logprobs = linear_logprob(leaves["hidden"], leaves["weight"], problem.targets)
    columns = (batch.reference_logprobs, batch.cu_seqlens, batch.rewards, batch.group_ids, batch.beta)
    parts = group_loss(logprobs, *columns)
    (parts.loss * 3).backward()
    whole = loss_results(problem, batch, "torch")
    torch.testing.assert_close(whole["loss"], parts.loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(whole["grad_weight"], leaves["weight"].grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_known_coefficients_of_a_first_update_give_the_same_gradient(implementation, device):
    """Where all log-ratios are 0 the coefficients are -beta A / (n (k - 1)), known before the forward pass."""
    problem = make_problem(60, 90, 11, device=device).to(torch.float32)
    batch = make_completions([20, 10, 30], [0, 0, 0], device=device)
    with torch.no_grad():
        logprobs = linear_logprob(problem.hidden, problem.weight, problem.targets, implementation=implementation)
    batch = replace(batch, reference_logprobs=logprobs)
    plain = loss_results(problem, batch, implementation)
    coefficients = -batch.beta * (batch.rewards - batch.rewards.mean()) / 2
    known = loss_results(problem, batch, implementation, sequence_coefficients=coefficients)
    for name in ("grad_hidden", "grad_weight"):
        torch.testing.assert_close(known[name], plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_group_cut_into_pieces_has_the_gradient_of_the_whole(implementation, device):
    problem = make_problem(60, 90, 11, device=device).to(torch.float32)
    batch = make_completions([20, 10, 30], [0, 0, 0], device=device)
    whole = loss_results(problem, batch, implementation, upstream=1.0)
    coefficients = batch.beta * whole["residuals"] / 2
    total = torch.zeros_like(problem.weight)
    for first, last in ((0, 1), (1, 3)):
        start, stop = (int(batch.cu_seqlens[i]) for i in (first, last))
        rows = slice(start, stop)
        piece = replace(problem, hidden=problem.hidden[rows], targets=problem.targets[rows])
        part = replace(
            batch,
            reference_logprobs=batch.reference_logprobs[rows],
            cu_seqlens=batch.cu_seqlens[first : last + 1] - start,
            rewards=None,
            group_ids=None,
        )
        options = {"sequence_coefficients": coefficients[first:last], "upstream": 1.0}
        total += loss_results(piece, part, implementation, **options)["grad_weight"]
    torch.testing.assert_close(total, whole["grad_weight"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
def test_dropped_tokens_are_those_below_the_bound_and_their_mass_is_reported(implementation, device):
    problem = make_problem(60, 90, 11, scale=6.0, device=device).to(torch.float32)
    batch = make_completions([20, 10, 30], [0, 0, 0], device=device)
    exact = loss_results(problem, batch, implementation)
    some = loss_results(problem, batch, implementation, drop_below=1.0)
    coefficient = torch.repeat_interleave(batch.beta * exact["residuals"] / 2, batch.cu_seqlens.diff())
    bound = 2 * coefficient.abs() * (1 - exact["token_logprobs"].exp())
    small = bound < coefficient.abs().max()
    assert 0 < int(small.sum()) < 60
    assert exact["dropped_mass"] == 0
    torch.testing.assert_close(
        some["dropped_mass"], bound[small].sum() / bound.sum(), rtol=1e-4, atol=0, check_dtype=False
    )
    assert torch.equal(some["loss"], exact["loss"])
    assert some["grad_hidden"][small].abs().sum() == 0
    torch.testing.assert_close(some["grad_hidden"][~small], exact["grad_hidden"][~small], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_what_is_dropped_does_not_move_with_the_scale_of_the_loss(scale, implementation, device):
    problem = make_problem(60, 90, 11, scale=6.0, device=device).to(torch.float32)
    batch = make_completions([20, 10, 30], [0, 0, 0], device=device)
    coefficients = torch.tensor([1.0, -2.0, 0.5], device=device)
    masses = [
        loss_results(problem, batch, implementation, drop_below=0.5, sequence_coefficients=c)["dropped_mass"]
        for c in (coefficients, coefficients * scale)
    ]
    assert 0 < masses[0] < 1
    torch.testing.assert_close(*masses, rtol=1e-5, atol=0)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.size = max(self.size, value.numel() * value.itemsize)
        return result


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"trained": ("hidden",)}, {"drop_below": 0.5}, {"known": True}])
def test_no_tensor_of_the_logits_size_is_made(options, implementation):
    problem, batch, options = case(options, "cpu")
    problem = problem.to(torch.float32)
    with LargestTensor() as largest:
        loss_results(problem, batch, implementation, **options)
    assert largest.size < 0.5 * len(problem.targets) * 300 * 4


@pytest.mark.parametrize("mode", ["recompute", "stash"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_are_bitwise_equal(mode, implementation, device):
    problem, batch, options = case({"mode": mode}, device)
    runs = [loss_results(problem.to(torch.float32), batch, implementation, **options) for _ in range(2)]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_without_gradient(without, implementation, device):
    trained = () if without is torch.enable_grad else ("hidden", "weight")
    problem, batch, _ = case({"trained": trained}, device)
    leaves = problem.to(torch.float32).leaves()
    with without():
        hidden, weight = leaves["hidden"] * 1.0, leaves["weight"] * 1.0
        record = fused_gvpo_loss(
            hidden, weight, problem.targets, *vars(batch).values(), implementation=implementation, mode="stash"
        )
    assert not record.loss.requires_grad
    truth = loss_results(case({}, device)[0], batch, "reference")
    for name in ("loss", "token_logprobs", "log_ratios", "residuals"):
        torch.testing.assert_close(getattr(record, name).double(), truth[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("options", [{}, {"trained": ("hidden",)}], ids=["recompute", "frozen head"])
def test_entropies(options, implementation, device):
    problem, batch, _ = case(options, device)
    problem = problem.to(torch.float32)
    leaves = problem.leaves()
    arguments = (leaves["hidden"], leaves["weight"], problem.targets, *vars(batch).values())
    record = fused_gvpo_loss(*arguments, implementation=implementation, return_entropy=True)
    logits = (leaves["hidden"] @ leaves["weight"].T).double()
    truth = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(record.entropies.double(), truth, rtol=1e-4, atol=1e-4)
    assert not record.entropies.requires_grad
    assert fused_gvpo_loss(*arguments, implementation=implementation).entropies is None


WRONG = {
    "entropy of a stash": ({"mode": "stash", "return_entropy": True}, "return_entropy must be False"),
    "mode": ({"mode": "fast"}, "mode must be one of auto, recompute, stash, got 'fast'"),
    "bound": ({"drop_below": -0.1}, "drop_below must be >= 0, got -0.1"),
    "bound with stash": ({"mode": "stash", "drop_below": 0.1}, r"drop_below must be 0 with mode='stash', got 0.1"),
    "coefficient count": ({"sequence_coefficients": torch.zeros(2)}, r"sequence_coefficients must be floating \(9,\)"),
    "coefficients": ({"sequence_coefficients": torch.full((9,), torch.inf)}, "sequence_coefficients must be finite"),
    "rewards": ({"rewards": None}, "rewards must be a tensor, got None"),
    "reward values": ({"rewards": torch.full((9,), torch.nan)}, "rewards must be finite"),
    "offsets": ({"cu_seqlens": torch.arange(10)}, "cu_seqlens must rise from 0 to the number of tokens 175"),
    "targets": ({"targets": torch.full((175,), 300)}, r"targets must be token ids in \[0, 300\), got 300"),
    "denominator": ({"num_groups": 0}, "num_groups must be >= 1"),
    "implementation": ({"implementation": "cuda"}, "implementation must be one of"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(change, message):
    problem, batch, _ = case({}, "cpu")
    arguments = {"hidden": problem.hidden, "weight": problem.weight.requires_grad_(), "targets": problem.targets}
    with pytest.raises(ValueError, match=message):
        fused_gvpo_loss(**{**arguments, **vars(batch), **change})
