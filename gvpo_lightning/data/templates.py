r"""Prompt templates that maths models are evaluated with, as text around a problem.

As in the evaluation of Dr. GRPO (github.com/sail-sg/understand-r1-zero). Text reaches the tokenizer as it is, so a
model's own chat template plays no part; ChatML's marks become special tokens where the tokenizer has them.
"""

from collections.abc import Callable


def qwen_math(problem: str) -> str:
    r"""Qwen-Math's ChatML, which asks for steps and an answer in \boxed{}."""
    return (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        f"<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
    )


def r1(problem: str) -> str:
    """DeepSeek-R1-Zero's conversation; completions begin within <think>, which the prompt has opened already.

    They end at </answer>, so set generation.stop_strings to that.
    """
    return (
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
        "Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
        "The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> "
        "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n"
        f"User: {problem}\nAssistant: <think>"
    )


TEMPLATES: dict[str, Callable[[str], str]] = {"qwen_math": qwen_math, "r1": r1}
