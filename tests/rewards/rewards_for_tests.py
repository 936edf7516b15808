"""Rewards that worker processes import."""

import asyncio
import ctypes
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time


def child_of(asking: int) -> list[str]:
    """The command of a child that the reward starts for the process that asks it."""
    return ["sleep", f"1000.{asking}"]


def by_text(prompts, completions, answer, **columns):
    """What a completion says is what becomes of it."""
    return [_meet(completion, a) for completion, a in zip(completions, answer, strict=True)]


def _meet(completion, answer):
    if completion == "raise":
        raise KeyError("no such answer")
    if completion == "hang":
        while True:
            pass
    if completion == "hang in C":  # and hold the interpreter's lock
        re.match(r"(a+)+$", "a" * 40 + "b")
    if completion == "hang with a child":
        subprocess.run(child_of(os.getppid()), check=True)
    if completion == "die":
        os._exit(3)
    if completion == "crash":
        ctypes.string_at(0)
    if completion == "exit":
        sys.exit(1)
    special = {"nan": math.nan, "infinite": -math.inf, "none": None}
    return special[completion] if completion in special else float(completion == answer)


async def patient(prompts, completions, answer, **columns):
    """As `by_text`, but it sleeps where the other hangs."""
    if completions[0].startswith("hang"):
        await asyncio.sleep(1000)
    await asyncio.sleep(0.01 * (len(completions[0]) % 3))
    return by_text(prompts, completions, answer)


def process_id(prompts, completions, **columns):
    """Where it runs."""
    time.sleep(0.01)
    return [float(os.getpid()) for _ in completions]


def modules(prompts, completions, **columns):
    """How many of these heavy modules the process has imported."""
    return [float(sum(name in sys.modules for name in ("torch", "transformers", "lightning"))) for _ in completions]


def batch_size(prompts, completions, **columns):
    """How many completions it is asked for at once."""
    return [float(len(completions))] * len(completions)


def hangs_where_told(prompts, completions, **columns):
    """The environment says on which text."""
    while completions[0] == os.environ["HANGS"]:
        pass
    return [float(len(completions[0]))]


def ends_a_child(prompts, completions, **columns):
    """How a child ends that is told to, by the way that the completion names: minus the signal's number."""
    if completions[0] == "pool":
        with multiprocessing.get_context("fork").Pool(1) as pool:
            return [float(pool.apply(len, ["four"]))]
    if completions[0] == "popen":
        process = subprocess.Popen(["sleep", "100"])
        process.send_signal(signal.SIGINT)
        return [float(process.wait())]
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,))
    child.start()
    child.terminate()
    child.join()
    return [float(child.exitcode)]


def forks(prompts, completions, **columns):
    """The status of a child that goes on where its parent does, in the way that the completion names."""
    pid = os.fork()
    if pid:
        return [float(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))]
    if completions[0] == "exit":
        sys.exit(3)
    if completions[0] == "raise":
        raise KeyError
    return [99.0]


def rolls(prompts, completions, **columns):
    """Drawn from the global random numbers of Python and, imported here, numpy."""
    import numpy

    if completions[0] == "die":
        os._exit(3)
    return [random.random() + numpy.random.random() for _ in completions]


def spoils(prompts, completions, answer, **columns):
    """Changes all that it is given, the messages in place; its value is what it has found."""
    found = [
        float(len(prompt)) + len(completion) + 10 * len(right)
        for prompt, completion, right in zip(prompts, completions, answer, strict=True)
    ]
    for prompt, right in zip(prompts, answer, strict=True):
        prompt[0]["content"] = "spoilt"
        prompt.append({"role": "assistant", "content": "spoilt"})
        right.clear()
    for given in (prompts, completions, answer, *columns.values()):
        given.clear()
    if found[0] != found[-1]:
        raise ValueError(found)
    return found


async def spoils_later(prompts, completions, **columns):
    """The same, async."""
    return spoils(prompts, completions, **columns)


def sees_messages(completions, **columns):
    """As reward functions for TRL's conversations are written."""
    return [float(completion == [{"role": "assistant", "content": "7"}]) for completion in completions]


async def sees_messages_later(completions, **columns):
    """The same, async."""
    return sees_messages(completions, **columns)


def is_whole(prompts, completions, answer, **columns):
    """Whether prompts and answers are those that the completions name."""
    rows = zip(prompts, completions, answer, strict=True)
    return [float(p == [{"role": "user", "content": f"{c}+"}] and right == [c]) for p, c, right in rows]


def is_text(completions, **columns):
    """Whether completions are text."""
    return [float(isinstance(completion, str)) for completion in completions]
