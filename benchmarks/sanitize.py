"""Every path of the kernels on small ragged shapes under NVIDIA's compute-sanitizer: memcheck, then racecheck.

python -m benchmarks.sanitize             # on a machine with a GPU and the CUDA toolkit; says so elsewhere
python -m benchmarks.sanitize --bare      # the same work without the tool
"""

import argparse
import os
import re
import shutil
import subprocess
import sys

import torch

from benchmarks.loss_problem import Shape, make_problem
from benchmarks.loss_providers import ours

SHAPES = (Shape(208, 123, 517), Shape(160, 64, 4_099))
FINISHED = "every path ran"
SECONDS = 220  # for each tool


def work(device: str) -> None:
    """One forward and backward pass of every mode in every dtype."""
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            problem = make_problem(shape, dtype, device)
            for provider in ours("triton" if device == "cuda" else "torch"):
                leaves = problem.leaves(provider.frozen_head)
                with torch.set_grad_enabled(provider.backward):
                    result = provider.run(leaves)
                if provider.backward:
                    result.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    print(FINISHED, flush=True)


def find_tool() -> str | None:
    """compute-sanitizer on the path or where the toolkit puts it."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def verdict(output: str) -> tuple[bool, str]:
    """Whether a tool's output is without a finding, and what it said in a line."""
    found = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    count = sum(int(number) for pair in found for number in pair if number)
    last = output.strip().splitlines()[-1] if output.strip() else "no output"
    if count:
        return False, f"{count} findings"
    if FINISHED in output:
        return True, "no findings" if found else f"the work ran, but the tool reported nothing ({last})"
    if "Traceback" in output:
        return False, f"the work failed: {last}"
    return True, f"refused by this machine, nothing was checked: {last}"


def run_tool(tool: str, name: str) -> bool:
    """Run the work under one tool; False if it found something."""
    command = [tool, "--tool", name, sys.executable, "-m", "benchmarks.sanitize", "--bare"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor its own allocation, with edges
    try:
        result = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped after {SECONDS} s without a verdict")
        return True
    clean, text = verdict(result.stdout)
    print(f"{name}: {text}")
    if not clean:
        print(result.stdout[-6000:])
    return clean


def main() -> int:
    """Command line; 1 if a tool found something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bare", action="store_true", help="only the work")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if parser.parse_args().bare:
        work(device)
        return 0
    tool = find_tool()
    if tool is None or device == "cpu":
        print(f"This machine has no {'GPU' if device == 'cpu' else 'compute-sanitizer'}: nothing was checked.")
        return 0
    clean = [run_tool(tool, name) for name in ("memcheck", "racecheck")]
    return int(not all(clean))


if __name__ == "__main__":
    sys.exit(main())
