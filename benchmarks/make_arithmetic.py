"""Makes what configs/arithmetic.yaml starts from: the sums, the character tokenizer and the reference policy.

    python -m benchmarks.make_arithmetic          # writes configs/arithmetic/, about 5 minutes on 2 cores

The policy is warmed up on NOISY answers: each is right with probability 0.4, else a random number. It so
samples the right answer about 40% of the time, while its greedy answer is nearly always right: what a
pretrained model is to reinforcement learning. The result is shipped, so that everyone starts from the
same bits; running this again makes an equivalent one.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

LARGEST = 19  # sums of two numbers below 20
PROBABILITY_RIGHT = 0.4
NUM_VALIDATION = 80


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """About 0.6 million parameters."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def warm_up(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> None:
    """Supervised training on noisy answers, fresh noise in every batch of all sums."""
    rng = random.Random(seed)
    sums = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    model.train()
    for step in range(steps):
        rows = []
        for a, b in rng.sample(sums, 256):
            answer = a + b if rng.random() < PROBABILITY_RIGHT else rng.randint(0, 2 * LARGEST)
            prompt = tokenizer(f"{a}+{b}=")["input_ids"]
            rows.append((prompt, [*tokenizer(str(answer))["input_ids"], tokenizer.eos_token_id]))
        width = max(len(p) + len(c) for p, c in rows)
        ids = torch.tensor([p + c + [tokenizer.pad_token_id] * (width - len(p) - len(c)) for p, c in rows])
        labels = torch.full_like(ids, -100)
        for row, (p, c) in enumerate(rows):
            labels[row, len(p) : len(p) + len(c)] = torch.tensor(c)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}", flush=True)


def write_sums(folder: Path, seed: int) -> None:
    """The 400 sums, shuffled and split, as JSON lines with `prompt` and `answer`."""
    sums = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    random.Random(seed).shuffle(sums)
    for name, part in (("validation", sums[:NUM_VALIDATION]), ("train", sums[NUM_VALIDATION:])):
        lines = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a, b in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("configs/arithmetic"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_sums(arguments.folder, arguments.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, arguments.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    warm_up(model, tokenizer, arguments.steps, arguments.seed)
    tokenizer.save_pretrained(arguments.folder / "model")
    model.half().save_pretrained(arguments.folder / "model")


if __name__ == "__main__":
    main()
