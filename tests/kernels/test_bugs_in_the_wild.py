"""Mistakes that fused losses elsewhere have made, each as a test of every implementation."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.utils.checkpoint import checkpoint

from gvpo_kernels import fused_gvpo_loss, group_loss, linear_logprob
from tests.kernels.head_problems import (
    assert_close,
    assert_rounded_alone,
    assert_within_budget,
    logprob_results,
    loss_results,
    make_completions,
    make_problem,
)

pytestmark = [
    pytest.mark.usefixtures("_small_pieces"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton"),  # numpy, on lanes that are masked
]


@pytest.fixture(params=["torch", "triton"])
def implementation(request):
    return request.param


def small_batch(device="cpu", dtype=torch.float32):
    problem = make_problem(60, 150, 11, device=device, trained=("hidden", "weight")).to(dtype)
    return problem, make_completions([20, 10, 29, 1], [0, 0, 1, 1], device=device)


def columns(batch):
    return batch.reference_logprobs, batch.cu_seqlens, batch.rewards, batch.group_ids, batch.beta


# 1: an upstream gradient that is not the same for every token
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")])
def test_uneven_upstream_gradients(trained, implementation, device):
    problem = make_problem(70, 130, 9, bias=True, trained=trained, device=device).to(torch.float32)
    upstream = torch.randn(70, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 2, 70)
    upstream = upstream.to(device)
    truth = logprob_results(problem.to(torch.float64), "reference", upstream)
    ours, eager = (logprob_results(problem, name, upstream) for name in (implementation, "reference"))
    assert_within_budget(ours, eager, truth)


# 2: a vocabulary that is no multiple of the tile, and a softmax that is all in one place
@pytest.mark.parametrize("vocab_size", [1, 127, 129, 255, 257, 300])
@pytest.mark.parametrize("scale", [1.0, 25.0])
def test_ragged_vocabulary_and_peaked_softmax(vocab_size, scale, implementation, device):
    problem = make_problem(50, vocab_size, 9, scale=scale, device=device).to(torch.float32)
    truth = logprob_results(problem.to(torch.float64), "reference")
    # triton's logits of the backward pass may differ by a rounding from those that p was normalised with
    factor = 8.0 if implementation == "triton" and scale > 1 else 1.5
    assert_within_budget(logprob_results(problem, implementation), logprob_results(problem, "reference"), truth, factor)


# 3: a running maximum that does not start at -inf
@pytest.mark.parametrize("offset", [-1e4, -200.0, 1e4])
def test_large_common_offset(offset, implementation, device):
    problem = make_problem(50, 300, 9, bias=True, device=device)
    problem = replace(problem, bias=problem.bias + offset).to(torch.float32)
    truth = logprob_results(problem.to(torch.float64), "reference")
    ours = logprob_results(problem, implementation)
    assert_within_budget(ours, logprob_results(problem, "reference"), truth, factor=2.0)


# 3: the maximum and the logarithm of the sum added up before the logits are subtracted
@pytest.mark.parametrize("offset", [-(2**20), 2**20])
def test_exact_logits_with_a_large_offset(offset, implementation, device):
    problem = make_problem(50, 300, 1, device=device)
    levels = torch.arange(300, device=device).remainder(7)[:, None].double()
    problem = replace(problem, hidden=torch.ones_like(problem.hidden), weight=levels, trained=("weight",))
    plain, shifted = (
        logprob_results(replace(problem, weight=levels + shift).to(torch.float32), implementation)
        for shift in (0, offset)
    )
    for name in ("logprobs", "entropies", "grad_weight"):
        torch.testing.assert_close(shifted[name], plain[name], rtol=1e-5, atol=1e-5)


# 4: 1 - p of a nearly certain token, lost when it is computed from a rounded p
def test_nearly_certain_targets(implementation, device):
    gaps = torch.linspace(5, 22, 30, dtype=torch.float64, device=device)
    weight = torch.zeros(200, 2, dtype=torch.float64, device=device)
    weight[7, 0] = 1.0
    problem = make_problem(30, 200, 2, device=device)
    hidden = torch.stack([gaps, torch.ones_like(gaps)], dim=1)
    problem = replace(problem, hidden=hidden, weight=weight, targets=torch.full_like(problem.targets, 7))
    problem = problem.to(torch.float32)
    upstream = torch.ones(30, device=device)
    ours, truth = (
        logprob_results(p, name, upstream)
        for p, name in ((problem, implementation), (problem.to(torch.float64), "reference"))
    )
    assert float(truth["logprobs"].abs().min()) < 1e-7
    # 1 - p is e^-gap, and as exact as the gap is: 22 times eps is 2.6e-6
    for name in ("logprobs", "grad_hidden"):
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=2e-5, atol=0)


# 4: p rounded to 1 does not make a token droppable
def test_a_certain_token_is_not_dropped(implementation, device):
    weight = torch.tensor([[0.0], [-90.0]], device=device, requires_grad=True)
    logprobs = linear_logprob(
        torch.ones(1, 1, device=device),
        weight,
        torch.zeros(1, dtype=torch.long, device=device),
        implementation=implementation,
    )
    logprobs.backward(torch.ones(1, device=device))
    assert float(logprobs.detach().exp()) == 1.0
    assert weight.grad.flatten().tolist() == pytest.approx([8.19e-40, -8.19e-40], rel=1e-2)


# 5: offsets beyond 2^31 elements
def test_offsets_beyond_int32(tmp_path, device):
    if device != "cpu":
        pytest.skip("test_large_gpu_problem covers it")
    from gvpo_kernels import torch_head, triton_logits
    from gvpo_kernels.head import HeadCall

    stride, rows, width = 2**30 + 64, 3, 140
    sparse = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + width, dtype=torch.float32)
    logits = sparse.as_strided((rows, width), (stride, 1))
    values = make_problem(rows, width, 1).hidden.float() * torch.linspace(-2, 2, width)
    logits.copy_(values)
    call = HeadCall(values, torch.zeros(width, width), torch.tensor([0, 139, 5]))
    running = triton_logits.RunningStatistics.start(call)
    triton_logits.update_statistics(call, running, logits, slice(0, rows), 0)
    assert torch.equal(running.raw_target, values.gather(1, call.targets[:, None]).squeeze(1))
    statistics, _ = torch_head.forward(replace(call, weight=torch.eye(width)))
    triton_logits.grad_logits(call, statistics, torch.ones(rows), values, 0, logits)
    expected = torch.nn.functional.one_hot(call.targets, width) - values.softmax(-1)
    torch.testing.assert_close(logits.clone(), expected, rtol=1e-5, atol=1e-6)


# 5: more rows than a CUDA grid's second axis holds; interpreted, no grid has a limit and they take long
INTERPRETED = () if torch.cuda.is_available() else (pytest.mark.slow,)


@pytest.mark.parametrize("implementation", ["torch", pytest.param("triton", marks=INTERPRETED)])
def test_more_than_65535_rows(implementation, device, monkeypatch):
    monkeypatch.undo()  # the budgets that ship: few launches
    problem = make_problem(66_000, 5, 2, device=device).to(torch.float32)
    truth = logprob_results(problem.to(torch.float64), "reference")
    assert_rounded_alone(logprob_results(problem, implementation), truth, problem)


# 6: sums over thousands of tokens or vocabulary entries in the inputs' dtype
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_wide(dtype, implementation, device):
    hidden = torch.ones(4096, 1, dtype=dtype, device=device)
    weight = torch.zeros(3, 1, dtype=dtype, device=device, requires_grad=True)
    targets = torch.zeros(4096, dtype=torch.long, device=device)
    linear_logprob(hidden, weight, targets, implementation=implementation).sum().backward()
    assert float(weight.grad[0, 0]) == pytest.approx(4096 * 2 / 3, rel=5e-3)  # a bfloat16 sum would stall at 256

    wide = torch.ones(4096, 1, dtype=dtype, device=device)
    leaf = torch.ones(1, 1, dtype=dtype, device=device, requires_grad=True)
    linear_logprob(leaf, wide.detach().neg(), targets[:1], implementation=implementation).backward(
        torch.ones(1, device=device)
    )
    assert abs(float(leaf.grad)) < 5e-3  # w - mean w: 4,096 terms of 1 / 4096 against one of 1


# 7: soft cap after the temperature, or bias after the soft cap
def test_order_of_bias_soft_cap_and_temperature(implementation, device):
    problem = make_problem(20, 30, 5, bias=True, scale=4.0, device=device).to(torch.float32)
    logits = 2.0 * torch.tanh((problem.hidden @ problem.weight.T + problem.bias) / 2.0) / 0.5
    expected = logits.log_softmax(-1).gather(-1, problem.targets[:, None]).squeeze(-1)
    actual = linear_logprob(
        problem.hidden,
        problem.weight,
        problem.targets,
        bias=problem.bias,
        softcap=2.0,
        temperature=0.5,
        implementation=implementation,
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# 8: a head whose weight is computed (LoRA), or shared with the embedding
def test_head_with_low_rank_update_and_tied_embedding(implementation, device):
    problem, _ = small_batch(device)

    def gradients(name):
        base = problem.weight.clone().requires_grad_()
        down = torch.full((2, 11), 0.1, device=device).requires_grad_()
        up = torch.linspace(-1, 1, 300, device=device).view(150, 2).requires_grad_()
        hidden = base[problem.targets] * 0.5
        linear_logprob(hidden, base + up @ down, problem.targets, implementation=name).sum().backward()
        return {"base": base.grad, "down": down.grad, "up": up.grad}

    assert_close(gradients(implementation), gradients("reference"), 1e-4)


@pytest.fixture
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# 9: a sharded weight's local part taken for the whole
@pytest.mark.usefixtures("_one_process")
def test_sharded_weights_are_refused_by_name():
    problem, batch = small_batch()
    weight = DTensor.from_local(problem.weight, init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"weight must be a plain tensor, got a DTensor: pass weight.full_tensor()"):
        linear_logprob(problem.hidden, weight, problem.targets)
    with pytest.raises(ValueError, match=r"weight must be a plain tensor"):
        fused_gvpo_loss(problem.hidden, weight, problem.targets, *columns(batch))
    full = linear_logprob(problem.hidden, weight.full_tensor(), problem.targets)
    assert torch.equal(full, linear_logprob(problem.hidden, problem.weight, problem.targets))


class Model(torch.nn.Module):
    def __init__(self, problem, batch, options):
        super().__init__()
        self.body = torch.nn.Linear(11, 11)
        self.head = torch.nn.Linear(11, 150, bias=False)
        self.problem, self.batch, self.options = problem, batch, options

    def forward(self):
        hidden = self.body(self.problem.hidden)
        return fused_gvpo_loss(
            hidden, self.head.weight, self.problem.targets, *columns(self.batch), **self.options
        ).loss


# 9: gradients written past autograd, where data-parallel hooks do not see them
@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("mode", ["recompute", "stash"])
def test_hooks_of_data_parallel_training_fire(mode, implementation):
    problem, batch = small_batch()
    model = Model(problem, batch, {"implementation": implementation, "mode": mode})
    fired = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    seen = []

    def hook(state, bucket):
        seen.extend(p.shape for p in bucket.parameters())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    parallel.register_comm_hook(None, hook)
    parallel().backward()
    assert sorted(fired) == ["body.bias", "body.weight", "head.weight"]
    assert model.head.weight.shape in seen


# 10: views of inputs that lose requires_grad inside the function
def test_flattened_inputs_keep_their_gradient(implementation, device):
    problem, batch = small_batch(device)
    hidden = problem.hidden.view(4, 15, 11).clone().requires_grad_()
    flat = linear_logprob(
        hidden.flatten(0, 1), problem.weight, problem.targets.view(4, 15).flatten(), implementation=implementation
    )
    assert flat.requires_grad
    group_loss(flat.view(4, 15).flatten(), *columns(batch), implementation=implementation).loss.backward()
    assert float(hidden.grad.abs().sum()) > 0


# 11: a compiled caller, to whom a Python float is a float64
@pytest.mark.parametrize("mode", ["recompute", "stash"])
def test_compiled_caller(mode, implementation, device):
    torch._dynamo.reset()
    problem, batch = small_batch(device)

    def step(hidden, weight, temperature):
        record = fused_gvpo_loss(
            hidden * 1.5,
            weight,
            problem.targets,
            *columns(batch),
            temperature=temperature,
            mode=mode,
            implementation=implementation,
        )
        return record.loss * 2.0

    results = []
    for function in (step, torch.compile(step, backend="eager")):
        for temperature in (0.7, 0.9):
            leaves = problem.leaves()
            loss = function(leaves["hidden"], leaves["weight"], temperature)
            loss.backward()
            results.append([loss.detach(), leaves["hidden"].grad, leaves["weight"].grad])
    for plain, compiled in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))


# 12: one giant chunk where a lot of memory is free
def test_pieces_follow_budgets_and_not_free_memory(monkeypatch):
    monkeypatch.undo()  # the budgets that ship
    from gvpo_kernels import torch_head, triton_head
    from gvpo_kernels.head import HeadCall

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: pytest.fail("asked how much memory is free"))
    for num_tokens, vocab_size in [(1024, 32_000), (16_384, 152_064), (131_072, 256_000)]:
        shapes = {"hidden": (num_tokens, 8), "weight": (vocab_size, 8)}
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
        call = HeadCall(**tensors, targets=torch.empty(num_tokens, device="meta"))
        rows, width = triton_head._tile_shape(call)
        assert rows * width * 4 <= triton_head.TILE_BYTES
        assert num_tokens * triton_head._slice_columns(call) * 2 <= triton_head.SLICE_BYTES
        chunk = torch_head._chunks(num_tokens, vocab_size, torch.float32)[0]
        assert (chunk.stop - chunk.start) * vocab_size * 4 <= torch_head.CHUNK_BYTES


# 13: autocast, with hidden states in bfloat16 and a float32 weight
@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_with_mixed_inputs(frozen, implementation, device):
    problem, batch = small_batch(device)
    hidden = problem.hidden.bfloat16()
    both = {}
    for mixed in (True, False):
        leaf, weight = hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_(not frozen)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
            record = fused_gvpo_loss(
                leaf,
                weight if mixed else weight.bfloat16(),
                problem.targets,
                *columns(batch),
                implementation=implementation,
            )
            record.loss.backward()
        assert record.loss.dtype == torch.float32
        both[mixed] = [record.loss.detach(), leaf.grad, weight.grad]
    assert frozen or both[True][2].dtype == torch.float32
    assert all(a is b or torch.equal(a, b) for a, b in zip(*both.values(), strict=True))


# 13: autocast does not round what is already of one dtype
def test_autocast_leaves_one_dtype_alone(implementation, device):
    problem, batch = small_batch(device)
    plain = loss_results(problem, batch, implementation)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = loss_results(problem, batch, implementation)
    assert all(torch.equal(inside[name], value) for name, value in plain.items())


# 14: a batch in which nothing counts
@pytest.mark.parametrize(("lengths", "groups"), [([], []), ([0, 0], [0, 0]), ([3, 2], [0, 1]), ([5, 0], [0, 0])])
@pytest.mark.parametrize("options", [{}, {"mode": "stash"}, {"drop_below": 0.5}, {"trained": ("hidden",)}])
def test_nothing_that_counts_is_a_connected_zero(options, lengths, groups, implementation, device):
    trained = options.get("trained", ("hidden", "weight"))
    options = {name: value for name, value in options.items() if name != "trained"}
    problem = make_problem(sum(lengths), 150, 11, device=device, trained=trained).to(torch.float32)
    results = loss_results(problem, make_completions(lengths, groups, device=device), implementation, **options)
    assert results["loss"] == 0
    assert results["dropped_mass"] == 0
    for name in trained:
        assert results[f"grad_{name}"].abs().sum() == 0


# 15: a second copy of the loss that drifts away from the first
@pytest.mark.parametrize("mode", ["recompute", "stash"])
def test_there_is_one_loss(mode, implementation, monkeypatch):
    from gvpo_kernels import fused_batch

    problem, batch = small_batch()
    plain = loss_results(problem, batch, implementation, mode=mode)

    def doubled(*args, **kwargs):
        record = group_loss(*args, **kwargs)
        return replace(record, loss=2 * record.loss)

    monkeypatch.setattr(fused_batch, "group_loss", doubled)
    other = loss_results(problem, batch, implementation, mode=mode)
    for name in ("loss", "grad_hidden", "grad_weight"):
        torch.testing.assert_close(other[name], 2 * plain[name])


# 16: a graph that is kept gives the same again where it can, and is refused where its gradients are used up
@pytest.mark.parametrize("mode", ["recompute", "stash"])
def test_second_backward(mode, implementation, device):
    problem, batch = small_batch(device)
    leaves = problem.leaves()
    loss = fused_gvpo_loss(
        leaves["hidden"], leaves["weight"], problem.targets, *columns(batch), mode=mode, implementation=implementation
    ).loss
    loss.backward(retain_graph=True)
    first = leaves["weight"].grad.clone()
    if mode == "stash":
        with pytest.raises(RuntimeError, match=r"used up by one backward pass: use mode='recompute'"):
            loss.backward()
        return
    loss.backward()
    assert torch.equal(leaves["weight"].grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


# 16: gradients of gradients
@pytest.mark.parametrize("options", [{"mode": "recompute"}, {"mode": "stash"}])
def test_second_derivative_is_refused(options, implementation, device):
    problem, batch = small_batch(device)
    leaves = problem.leaves()
    loss = fused_gvpo_loss(
        leaves["hidden"], leaves["weight"], problem.targets, *columns(batch), implementation=implementation, **options
    ).loss
    (grad,) = torch.autograd.grad(loss, leaves["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


# 16: an upstream gradient that is not 1, up to a gradient scaler's in float16
@pytest.mark.parametrize("options", [{}, {"mode": "stash"}, {"trained": ("hidden",)}], ids=str)
def test_scaled_loss_in_float16(options, implementation, device):
    problem, batch = small_batch(device, torch.float16)
    options = dict(options)
    problem = replace(problem, trained=options.pop("trained", ("hidden", "weight")))
    batch = replace(batch, beta=1e-7)  # unscaled, the gradients would all be below what float16 can hold
    truth = loss_results(problem.to(torch.float64), batch, "reference", upstream=2.0**16)
    ours = loss_results(problem, batch, implementation, upstream=2.0**16, **options)
    for name in [name for name in truth if name.startswith("grad")]:
        assert 0 < float(truth[name].abs().max()) / 2.0**16 < 6e-8
        error = (ours[name].double() - truth[name]).norm() / truth[name].norm()
        assert float(error) < 5e-3, name


# 17: rows of an output that nobody wrote
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("mode", ["recompute", "stash"])
def test_rows_without_gradient_are_zero(mode, implementation, device):
    problem = make_problem(60, 150, 11, device=device).to(torch.float32)
    batch = make_completions([20, 30, 10], [0, 0, 1], device=device)
    grad = loss_results(problem, batch, implementation, mode=mode)["grad_hidden"]
    assert grad[50:].abs().sum() == 0
    assert bool((grad[:50].abs().sum(1) > 0).all())


# 18: strides
def test_non_contiguous_inputs(implementation, device):
    problem, batch = small_batch(device)
    plain = loss_results(problem, batch, implementation)
    strided = replace(
        problem,
        hidden=problem.hidden.T.contiguous().T,
        weight=problem.weight.repeat_interleave(2, dim=1)[:, ::2],
        targets=problem.targets.repeat_interleave(3)[::3],
    )
    other = {
        "reference_logprobs": batch.reference_logprobs.repeat_interleave(2)[::2],
        "rewards": batch.rewards.repeat_interleave(2)[::2],
        "cu_seqlens": batch.cu_seqlens.repeat_interleave(2)[::2],
        "group_ids": batch.group_ids.repeat_interleave(2)[::2],
    }
    assert_close(loss_results(strided, replace(batch, **other), implementation), plain, 1e-5)


# 18: few tokens
@pytest.mark.parametrize("lengths", [[1, 1], [1, 0, 1], [1, 40, 1]])
def test_one_token_completions(lengths, implementation, device):
    problem = make_problem(sum(lengths), 150, 11, device=device).to(torch.float32)
    batch = make_completions(lengths, [3] * len(lengths), device=device)
    truth = loss_results(problem.to(torch.float64), batch, "reference")
    assert_close(loss_results(problem, batch, implementation), truth, 1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["recompute", "stash"])
def test_gradient_checkpointing_around_it(mode, reentrant, implementation, device):
    problem, batch = small_batch(device)
    plain = loss_results(problem, batch, implementation, upstream=1.0, mode=mode)
    leaves = problem.leaves()

    def run(hidden):
        return fused_gvpo_loss(
            hidden * 1.0, leaves["weight"], problem.targets, *columns(batch), mode=mode, implementation=implementation
        ).loss

    checkpoint(run, leaves["hidden"], use_reentrant=reentrant).backward()
    assert torch.equal(leaves["hidden"].grad, plain["grad_hidden"])
    assert torch.equal(leaves["weight"].grad, plain["grad_weight"])
