"""Forward and backward passes on two ranks; prints the bytes that each collective was given. Run by test_traffic."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import _functional_collectives as functional_collectives
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.train_step_paths import make_batch
from gvpo_lightning.distributed.sharding import root_stays_gathered, split_parameters, split_tensors
from gvpo_lightning.policy.head import completion_logprobs, completion_loss
from gvpo_lightning.policy.prepare import prepare_policy

RANKS = 2
payload: dict[str, int] = {}  # bytes of whole tensors by kind of collective


def add(kind, tensor):
    payload[kind] = payload.get(kind, 0) + tensor.nbytes


def watch(module, names, kind, place, keyword):
    """Count the whole tensor of every call, argument `place` or `keyword`: callers look functions up in `module`."""
    for name in names:
        if original := getattr(module, name, None):

            def counted(*args, original=original, **kwargs):
                add(kind, kwargs[keyword] if keyword in kwargs else args[place])
                return original(*args, **kwargs)

            setattr(module, name, counted)


def data_parallel(model):
    """The model within DDP, whose forward pass is the loss of a batch."""
    whole = torch.nn.ModuleDict({"policy": model})
    whole.forward = lambda batch: completion_loss(model, batch, 0.1).loss
    wrapped = DistributedDataParallel(whole)

    def hook(state, bucket):
        add("all-reduce", bucket.buffer())
        return allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, hook)
    return wrapped


def measure(case):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case["model"]))
    prepare_policy(model)
    if case["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = make_batch(4, (8, 16), case["model"]["vocab_size"], "cpu")
    if case["mode"] == "tensor parallel":
        split_tensors(model, init_device_mesh("cpu", (RANKS,)))
    if case["mode"].startswith("fsdp2"):
        split_parameters(model, init_device_mesh("cpu", (RANKS,)), mixed=case["mode"] == "fsdp2-mixed")
    with torch.no_grad():
        completion_logprobs(model, batch)  # a model's first call finds out what it does to its logits
    payload.clear()
    if case["mode"] == "ddp":
        wrapped = data_parallel(model)  # kept: without it nothing is reduced
        wrapped(batch).backward()
        return dict(payload)
    if case["scored"]:
        with torch.no_grad():
            for _ in range(case["accumulate"]):
                completion_logprobs(model, batch)
    for _ in range(case["accumulate"]):
        with root_stays_gathered(model):
            loss = completion_loss(model, batch, 0.1).loss
        loss.backward()
    return dict(payload)


def main(rank, cases, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    watch(functional_collectives, ("all_reduce",), "all-reduce", 0, "self")
    watch(dist, ("all_gather_into_tensor", "all_gather_single"), "all-gather", 0, "output_tensor")
    watch(dist, ("reduce_scatter_tensor", "reduce_scatter_single"), "reduce-scatter", 1, "input")
    measured = [measure(case) for case in cases]
    if rank == 0:
        Path(folder, "measured.json").write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # forked: everything has been imported once
    mp.start_processes(main, (json.loads(sys.argv[1]), sys.argv[2]), nprocs=RANKS, start_method="fork")
