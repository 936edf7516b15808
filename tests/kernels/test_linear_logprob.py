"""The chunked path against plain float64 autograd."""

import math

import pytest
import torch

from gvpo_kernels import linear_logprob, torch_head
from gvpo_kernels.reference import linear_logprob_reference
from tests.kernels.head_problems import Problem, assert_rounded_alone

VOCABULARY, HIDDEN = 37, 8


@pytest.fixture(params=[1, 3, 1000], ids=["a token a chunk", "three tokens a chunk", "one chunk"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(torch_head, "CHUNK_BYTES", request.param * VOCABULARY * 8)


def inputs(num_tokens=10, *, bias=False, scale=1.0, dtype=torch.float64, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    targets = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
    tensors = {"hidden": leaf(num_tokens, HIDDEN), "weight": leaf(VOCABULARY, HIDDEN), "targets": targets}
    return tensors | ({"bias": leaf(VOCABULARY)} if bias else {})


def to_float64(tensors: dict) -> dict:
    """The same numbers, exactly, as float64 leaves."""
    return {
        name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in tensors.items()
    }


def value_and_gradients(function, tensors: dict, temperature=1.0) -> dict:
    """The log-probs, and every gradient under a non-uniform upstream one with zeros and both signs in it."""
    logprobs = function(**tensors, temperature=temperature)
    upstream = torch.linspace(-1, 2, len(logprobs), dtype=torch.float64)  # whose rounded values depend on the CPU
    upstream[::4] = 0
    upstream = upstream.to(logprobs.dtype)
    leaves = {name: t for name, t in tensors.items() if t.requires_grad}
    gradients = torch.autograd.grad(logprobs, list(leaves.values()), upstream)
    return {"logprobs": logprobs.detach()} | dict(zip(leaves, gradients, strict=True))


def assert_matches_reference(tensors: dict, temperature=1.0, rtol=1e-10, atol=1e-12):
    actual = value_and_gradients(linear_logprob, tensors, temperature)
    expected = value_and_gradients(linear_logprob_reference, to_float64(tensors), temperature)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name].double(), value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 10])
def test_value_and_gradients(num_tokens, bias, temperature):
    assert_matches_reference(inputs(num_tokens, bias=bias), temperature)


@pytest.mark.usefixtures("_chunks")
def test_gradcheck():
    tensors = inputs(4, bias=True)
    leaves = [tensors["hidden"], tensors["weight"], tensors["bias"]]

    def function(hidden, weight, bias):
        return linear_logprob(hidden, weight, tensors["targets"], bias=bias, temperature=0.7)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(trained):
    tensors = inputs(bias=True)
    for name in {"hidden", "weight", "bias"} - {trained}:
        tensors[name].requires_grad_(False)
    assert_matches_reference(tensors)


def test_no_gradient_asked():
    tensors = {name: t.detach() for name, t in inputs().items()}
    assert not linear_logprob(**tensors).requires_grad


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens_have_the_right_shapes_and_stay_connected(num_tokens):
    tensors = inputs(num_tokens, bias=True)
    logprobs = linear_logprob(**tensors)
    assert logprobs.shape == (num_tokens,)
    logprobs.sum().backward()
    for name in ("hidden", "weight", "bias"):
        assert tensors[name].grad.shape == tensors[name].shape
        assert bool((tensors[name].grad == 0).all()) == (num_tokens == 0)


def test_chunks_bound_the_logits_and_cover_every_token_once(monkeypatch):
    monkeypatch.setattr(torch_head, "CHUNK_BYTES", 100 * VOCABULARY * 4)
    slices = torch_head._chunks(250, VOCABULARY, torch.float32)
    assert [s.stop - s.start for s in slices] == [100, 100, 50]
    assert [row for s in slices for row in range(250)[s]] == list(range(250))
    assert len(torch_head._chunks(5, 10**9, torch.float32)) == 5  # a vocabulary above the budget: token by token


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize(
    ("shift", "scale"),
    [(1e4, 1.0), (-1e4, 1.0), (0.0, 40.0)],
    ids=["large common offset", "all strongly negative", "peaked"],
)
def test_extreme_logits(shift, scale):
    tensors = inputs(bias=True)
    with torch.no_grad():
        tensors["weight"].mul_(scale)
        tensors["bias"].add_(shift)
    assert_matches_reference(tensors, atol=1e-10)


def test_a_certain_token_has_log_prob_zero_and_an_impossible_one_is_very_negative():
    weight = torch.tensor([[1000.0], [0.0], [-1000.0]], requires_grad=True)
    logprobs = linear_logprob(torch.ones(3, 1), weight, torch.tensor([0, 1, 2]))
    assert logprobs.tolist() == [0.0, -1000.0, -2000.0]
    logprobs.sum().backward()
    assert weight.grad.flatten().tolist() == [-2.0, 1.0, 1.0]


def test_vocabulary_entries_switched_off_by_an_infinite_bias():
    tensors = inputs(bias=True)
    tensors["bias"].data[::2] = -math.inf
    tensors["targets"] = tensors["targets"] // 2 * 2 - 1
    tensors["targets"][tensors["targets"] < 0] = 1
    assert_matches_reference(tensors)
    entropy = linear_logprob(**tensors, return_entropy=True)[1]
    assert torch.isfinite(entropy).all()


def as_columns(tensor):
    return tensor.detach().T.contiguous().T.requires_grad_()


def as_every_second(tensor):
    return tensor.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_()


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("layout", [as_columns, as_every_second])
def test_inputs_need_not_be_contiguous(layout):
    tensors = inputs(bias=True)
    strided = tensors | {name: layout(tensors[name]) for name in ("hidden", "weight")}
    strided["targets"] = tensors["targets"].repeat_interleave(2)[::2]
    assert not any(strided[name].is_contiguous() for name in ("hidden", "weight", "targets"))
    assert_matches_reference(strided)


def test_one_hidden_state_expanded_over_the_tokens():
    tensors = inputs(5)
    row = tensors["hidden"].detach()[:1].requires_grad_()
    linear_logprob(row.expand(5, HIDDEN), tensors["weight"], tensors["targets"]).sum().backward()
    exact = row.detach().requires_grad_()
    linear_logprob_reference(exact.expand(5, HIDDEN), tensors["weight"], tensors["targets"]).sum().backward()
    torch.testing.assert_close(row.grad, exact.grad)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_integer_types_of_targets(dtype):
    tensors = inputs()
    assert_matches_reference(tensors)
    expected = linear_logprob(**tensors)
    assert torch.equal(linear_logprob(**tensors | {"targets": tensors["targets"].to(dtype)}), expected)


@pytest.mark.usefixtures("_chunks")
def test_float32_is_float32_accurate():
    tensors = inputs(dtype=torch.float32)
    assert linear_logprob(**tensors).dtype == torch.float32
    names = {"logprobs": "logprobs", "hidden": "grad_hidden", "weight": "grad_weight"}
    ours, truth = (
        {names[name]: value for name, value in value_and_gradients(function, numbers).items()}
        for function, numbers in ((linear_logprob, tensors), (linear_logprob_reference, to_float64(tensors)))
    )
    problem = Problem(tensors["hidden"].detach(), tensors["weight"].detach(), tensors["targets"])
    assert_rounded_alone(ours, truth, problem)


@pytest.mark.usefixtures("_chunks")
def test_bfloat16_is_no_worse_than_eager_bfloat16():
    """Error against float64 of the same rounded numbers: log-probs far below eager's, gradients no more than it."""

    def eager(hidden, weight, targets, temperature):
        logprobs = (hidden @ weight.T / temperature).log_softmax(-1)
        return logprobs.gather(-1, targets[:, None]).squeeze(-1)

    tensors = inputs(64, dtype=torch.bfloat16)
    truth = value_and_gradients(linear_logprob_reference, to_float64(tensors))
    ours, eagers = (value_and_gradients(function, tensors) for function in (linear_logprob, eager))
    assert ours["logprobs"].dtype == torch.float32
    error = {name: [float((r[name].double() - truth[name]).norm()) for r in (ours, eagers)] for name in truth}
    assert error["logprobs"][0] < 1e-3 * error["logprobs"][1]
    for name in ("hidden", "weight"):
        assert ours[name].dtype == torch.bfloat16
        assert error[name][0] <= 1.1 * error[name][1], name


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_of_the_caller_changes_nothing(dtype):
    tensors = inputs(bias=True, dtype=dtype)
    expected = value_and_gradients(linear_logprob, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        everything = value_and_gradients(linear_logprob, tensors)
        logprobs = linear_logprob(**tensors)
    assert logprobs.dtype == torch.float32
    assert torch.equal(logprobs, expected["logprobs"])
    for name, value in expected.items():
        assert torch.equal(everything[name], value), name


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy(temperature):
    tensors = inputs(bias=True)
    logprobs, entropy = linear_logprob(**tensors, temperature=temperature, return_entropy=True)
    logits = (tensors["hidden"] @ tensors["weight"].T + tensors["bias"]) / temperature
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy().detach())
    assert not entropy.requires_grad
    assert torch.equal(logprobs, linear_logprob(**tensors, temperature=temperature))


def test_entropy_of_a_uniform_and_of_a_certain_distribution():
    weight = torch.tensor([[0.0], [0.0], [0.0], [0.0]]), torch.tensor([[0.0], [-1e4], [-1e4], [-1e4]])
    entropies = [linear_logprob(torch.ones(1, 1), w, torch.tensor([0]), return_entropy=True)[1].item() for w in weight]
    assert entropies == pytest.approx([math.log(4), 0.0], abs=1e-6)


def test_gradient_is_the_same_with_the_entropy_asked_for():
    tensors = inputs()
    (plain,) = torch.autograd.grad(linear_logprob(**tensors).sum(), tensors["hidden"])
    logprobs, _ = linear_logprob(**tensors, return_entropy=True)
    (with_entropy,) = torch.autograd.grad(logprobs.sum(), tensors["hidden"])
    assert torch.equal(plain, with_entropy)


def test_a_second_derivative_is_refused():
    tensors = inputs()
    loss = linear_logprob(**tensors).square().sum()
    (grad,) = torch.autograd.grad(loss, tensors["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_second_backward_needs_the_graph_to_be_kept():
    logprobs = linear_logprob(**inputs()).sum()
    logprobs.backward()
    with pytest.raises(RuntimeError, match="second time"):
        logprobs.backward()


def test_a_graph_that_is_kept_gives_the_same_gradient_again():
    tensors = inputs()
    logprobs = linear_logprob(**tensors).sum()
    first, second = (torch.autograd.grad(logprobs, tensors["weight"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_inputs_are_left_as_they_were():
    tensors = inputs(bias=True)
    before = {name: t.detach().clone() for name, t in tensors.items()}
    linear_logprob(**tensors, temperature=0.5).sum().backward()
    assert all(torch.equal(t, before[name]) for name, t in tensors.items())


WRONG_ARGUMENTS = {
    "hidden of three dimensions": ({"hidden": torch.zeros(2, 5, 8)}, r"hidden must be \(N, H\).*\(2, 5, 8\)"),
    "weight of one dimension": ({"weight": torch.zeros(8)}, r"weight \(V, H\).*\(8,\)"),
    "another hidden size": ({"weight": torch.zeros(37, 9)}, r"one H, got \(10, 8\) and \(37, 9\)"),
    "too few targets": ({"targets": torch.zeros(9).long()}, r"targets must be \(10,\) integers.*\(9,\)"),
    "targets of two dimensions": ({"targets": torch.zeros(10, 1).long()}, r"targets must be \(10,\).*\(10, 1\)"),
    "floating targets": ({"targets": torch.zeros(10)}, "targets must be .*float32"),
    "boolean targets": ({"targets": torch.zeros(10).bool()}, "targets must be .*bool"),
    "bias of another length": ({"bias": torch.zeros(36)}, r"bias must be \(37,\), got \(36,\)"),
    "temperature of zero": ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
    "negative temperature": ({"temperature": -1.0}, "temperature must be > 0, got -1.0"),
    "temperature not a number": ({"temperature": math.nan}, "temperature must be > 0, got nan"),
    "target past the vocabulary": ({"targets": torch.full((10,), 37)}, r"\[0, 37\), got 37 … 37"),
    "negative target": ({"targets": torch.full((10,), -100)}, r"\[0, 37\), got -100 … -100"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        linear_logprob(**inputs() | change)
