"""Makes the small policy of configs/gsm8k_tiny.yaml: a byte-level BPE tokenizer and a Qwen2 of 0.4 million parameters.

    python -m benchmarks.make_gsm8k_tiny                                    # from the hub
    python -m benchmarks.make_gsm8k_tiny --path FOLDER --question problem   # from a save_to_disk folder

Both are trained on the official training split, its first 7,473 rows; the model so that it ends its
answers, in numbers that are mostly wrong. It is there to run the whole path, not to reason.
"""

import argparse
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.tiny_policy import save_policy, tiny_qwen2
from benchmarks.warm_up import Pair, warm_up
from gvpo_lightning.data.rows import cut_split, encode_prompt, load_splits
from gvpo_lightning.rewards import last_number

NUM_TRAIN = 7_473
MAX_PROMPT_TOKENS = 192
SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "tie_word_embeddings": True}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 2,048 tokens and a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=512
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="openai/gsm8k")
    parser.add_argument("--name", default=None, help='the configuration, "main" for the hub\'s')
    parser.add_argument("--question", default="question", help="the column with the question")
    parser.add_argument("--folder", type=Path, default=Path("configs/gsm8k_tiny/model"))
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    rows = cut_split(load_splits(arguments.path, arguments.name), f"train[:{NUM_TRAIN}]")
    questions = list(rows[arguments.question])
    tokenizer = make_tokenizer(questions)
    model = tiny_qwen2(tokenizer, seed=0, **SIZES)

    pairs: list[Pair] = []
    for question, answer in zip(questions, rows["answer"], strict=True):
        prompt = encode_prompt([{"role": "user", "content": question}], tokenizer)
        number = last_number(answer)
        if len(prompt) <= MAX_PROMPT_TOKENS and number is not None:
            pairs.append((prompt, [*tokenizer(f"{number:.10g}")["input_ids"], tokenizer.eos_token_id]))
    rng = random.Random(0)
    warm_up(model, lambda: rng.sample(pairs, 32), steps=arguments.steps, lr=2e-3, pad_token_id=tokenizer.pad_token_id)
    save_policy(model, tokenizer, arguments.folder)


if __name__ == "__main__":
    main()
