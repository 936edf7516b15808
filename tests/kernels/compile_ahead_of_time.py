"""Compile the kernels that can be launched, for GPUs that need not be here, and print what they use as JSON.

    python tests/kernels/compile_ahead_of_time.py 80 90 100

Run without TRITON_INTERPRET: an interpreted kernel cannot be compiled in the same process.
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gvpo_kernels import triton_group_loss, triton_logits

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HALF = ("bf16", "fp16")


@dataclass(frozen=True)
class Case:
    name: str
    kernel: triton.runtime.JITFunction
    types: dict  # argument -> type, but for compile-time constants
    constants: dict
    options: dict

    def source(self) -> ASTSource:
        names = self.kernel.arg_names
        signature = {name: "constexpr" if name in self.constants else self.types[name] for name in names}
        # what a launch finds: allocations and most strides divide by 16, which is what vector loads need
        aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name.endswith("stride")]
        attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
        constants = {(names.index(name),): value for name, value in self.constants.items()}
        return ASTSource(self.kernel, signature, constants, attributes)


def tiled(name: str, kernel, types: dict, constants: dict) -> Case:
    launch = triton_logits.tile_launch()
    options = {"num_warps": launch.pop("num_warps")}
    scalars = {"temperature": "fp32", "softcap": "fp32", "targets": "*i64"}
    integers = ("num_rows", "num_columns", "first_column", "slice_columns", "logits_stride", "grad_stride")
    scalars |= dict.fromkeys((*integers, "exponentials_stride", "stash_stride", "scales_stride"), "i32")
    floats = dict.fromkeys(kernel.arg_names, "*fp32")
    return Case(name, kernel, floats | scalars | types, constants | launch, options)


def head_cases() -> Iterator[Case]:
    for dtype, bias, softcap in itertools.product(("fp32", *HALF), (False, True), (False, True)):
        flags = {"HAS_BIAS": bias, "SOFTCAP": softcap}
        pointers = {"bias": f"*{dtype}" if bias else "*fp32"}
        label = f"{dtype}{' bias' * bias}{' softcap' * softcap}"
        for entropy, store in itertools.product((False, True), (False, True)):
            yield tiled(
                f"statistics {label}{' entropy' * entropy}{' store' * store}",
                triton_logits._statistics_kernel,
                pointers | {"exponentials": f"*{dtype}" if store else "*fp32"},
                flags | {"ENTROPY": entropy, "STORE": store},
            )
        kernel = triton_logits._grad_logits_kernel
        yield tiled(f"grad_logits {label}", kernel, pointers | {"grad": f"*{dtype}"}, flags)
    for dtype in ("fp32", *HALF):
        kernel = triton_logits._stash_gradients_kernel
        yield tiled(f"stash_gradients {dtype}", kernel, {"stash": f"*{dtype}"}, {})


def group_cases() -> Iterator[Case]:
    sizes = [2**i for i in range(1, 10)]
    for dtype, offsets in itertools.product(("fp32", "fp64", *HALF), ("i32", "i64")):
        wide = "fp64" if dtype == "fp64" else "fp32"
        types = {
            "token_logprobs": f"*{dtype}",
            "reference_logprobs": f"*{dtype}",
            "cu_seqlens": f"*{offsets}",
            "members": "*i64",
            "group_starts": "*i64",
            "grad_token_logprobs": f"*{dtype}",
            "grad_loss": f"*{wide}",
        }
        kernel = triton_group_loss._forward_kernel
        floats = dict.fromkeys(kernel.arg_names, f"*{wide}")
        for size in sizes:
            launch = triton_group_loss.forward_launch(size)
            options = {"num_warps": launch.pop("num_warps")}
            name = f"group forward {dtype} {offsets} {size}"
            yield Case(name, kernel, floats | types, launch, options)
        kernel = triton_group_loss._backward_kernel
        constants = {"BLOCK_TOKENS": triton_group_loss.BACKWARD_BLOCK}
        yield Case(f"group backward {dtype} {offsets}", kernel, {"coefficients": f"*{wide}"} | types, constants, {})


def compiled(case: Case, capability: int) -> dict:
    binary = triton.compile(case.source(), target=GPUTarget("cuda", capability, 32), options=case.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    counts = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    dots = "tt.dot" in binary.asm["ttir"]
    return {"name": case.name, "capability": capability, "shared": binary.metadata.shared, "matmul": dots} | counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capabilities", type=int, nargs="+")
    arguments = parser.parse_args()
    for case in (*head_cases(), *group_cases()):
        for capability in arguments.capabilities:
            print(json.dumps(compiled(case, capability)), flush=True)


if __name__ == "__main__":
    main()
