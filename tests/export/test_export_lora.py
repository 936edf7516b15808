"""A policy with an adapter, exported: alone or merged, it gives the log-probs that were trained."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from gvpo_lightning import GVPOModule, LoadingSettings
from gvpo_lightning.cli import main
from gvpo_lightning.policy.loading import load_base_model
from gvpo_lightning.policy.prepare import load_policy, load_tokenizer
from tests.error_budget import assert_within, logprob_budget
from tests.export.exporting import export

peft = pytest.importorskip("peft")
LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
IDS = torch.tensor([[3, 4, 5, 6, 1], [7, 2, 9, 10, 11]])


@pytest.fixture
def base(tokenizer, tmp_path):
    """A folder with a random Llama and the arithmetic tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, temperature=0.7)
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def run(base, tmp_path):
    """Trains a few updates by the CLI: `run(*arguments)` gives the run's folder."""

    def fit(*arguments):
        rows = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(8)]
        (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
        config = {
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 4,
                "default_root_dir": str(tmp_path / "run"),
                "enable_progress_bar": False,
            },
            "model": {
                "policy": str(base),
                "lora": LORA,
                "beta": 0.5,
                "reward": "gvpo_lightning.rewards.ExactAnswer",
                "rollout": {"group_size": 4, "prompts_per_rollout": 8, "prompts_per_update": 4},
                "generation": {"max_new_tokens": 4},
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}},
            },
            "data": {"path": str(tmp_path / "sums.jsonl")},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        main(["fit", f"--config={tmp_path / 'config.yaml'}", *arguments])
        return tmp_path / "run"

    return fit


@torch.no_grad()
def logprobs(model):
    return torch.log_softmax(model.eval()(IDS).logits.double(), dim=-1)


def trained_logprobs(base, checkpoint, loading):
    """From the checkpoint's tensors, put into a peft model by hand."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    model = load_policy(str(base), loading, LORA)
    own = dict(model.named_parameters())
    assert {name.removeprefix("policy.") for name in state} == {n for n, p in own.items() if p.requires_grad}
    assert max(float(value.abs().max()) for name, value in state.items() if "lora_B" in name) > 1e-4
    with torch.no_grad():
        for name, value in state.items():
            own[name.removeprefix("policy.")].copy_(value)
    return logprobs(model)


def load_adapter(base, folder):
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


def test_the_adapter_and_the_merged_model_give_what_was_trained(run, base, tmp_path, capsys):
    folder = run("--run_summary.merge_adapter=true")
    expected = trained_logprobs(base, folder / "checkpoints" / "last.ckpt", LoadingSettings())
    command = ["export", f"--config={folder / 'config.yaml'}", "--ckpt_path=last"]
    main([*command, f"--output={tmp_path / 'adapter'}"])
    main([*command, f"--output={tmp_path / 'merged'}", "--merge=true"])
    main([*command, f"--output={tmp_path / 'half'}", "--merge=true", "--dtype=bfloat16"])
    adapter = logprobs(load_adapter(base, tmp_path / "adapter"))
    assert torch.equal(adapter, expected)
    for name in ("merged", "run/export"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert_within(logprobs(merged), expected, logprob_budget(expected))
        assert not {path.name for path in (tmp_path / name).iterdir()} & {"adapter_config.json"}
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(tmp_path / "half").parameters()} == {torch.bfloat16}
    torch.testing.assert_close(
        logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "half")), expected, atol=0.1, rtol=0
    )
    assert (expected - logprobs(load_policy(str(base)))).abs().max() > 1e-3  # or nothing would have been compared
    for name in ("adapter", "merged", "run/export"):
        assert AutoTokenizer.from_pretrained(tmp_path / name).get_vocab() == load_tokenizer(str(base)).get_vocab()
        assert GenerationConfig.from_pretrained(tmp_path / name).temperature == 0.7


def test_the_card_says_how_and_names_no_folder_of_this_machine(run, tmp_path):
    from huggingface_hub import ModelCard

    folder = run()
    main(["export", f"--config={folder / 'config.yaml'}", "--ckpt_path=last", f"--output={tmp_path / 'adapter'}"])
    summary = json.loads((folder / "summary.json").read_text())
    for path in (folder / "export", tmp_path / "adapter"):
        card = ModelCard.load(path / "README.md")
        assert str(tmp_path) not in str(card)
        assert card.data.library_name == "peft"
        assert {"gvpo", "lora"} <= set(card.data.tags)
        assert card.data.pipeline_tag == "text-generation"
        assert card.data.base_model is None  # a folder here, which nobody else has
        assert f"| steps | {summary['steps']} |" in card.text
        config = yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])
        assert config["model"]["lora"] == LORA
        assert (config["model"]["policy"], config["data"]["path"]) == ("base", "sums.jsonl")
        assert "2504.19599" in card.text


def test_names_on_the_hub_are_in_the_cards_front_matter(run, base, tmp_path, monkeypatch):
    folder = run()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["path"] = "openai/gsm8k"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    module = GVPOModule(str(base), lambda prompts, completions: [0.0], lora=LORA)
    export(module, folder / "checkpoints" / "last.ckpt", tmp_path / "out")
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert front["datasets"] == ["openai/gsm8k"]
    module.source.given = "Qwen/Qwen2.5-0.5B"
    from gvpo_lightning.export.model_card import Origin, write_card

    write_card(tmp_path / "out", module.source, "merged", Origin(module.settings, None, None))
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "Qwen/Qwen2.5-0.5B"
    assert "Results" not in text
    assert yaml.safe_load(text.split("```yaml")[1].split("```")[0])["lora"] == LORA  # of the module, without a config


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_an_adapter_of_quantized_weights_is_merged_into_the_files_own(run, base, tmp_path, quantization):
    pytest.importorskip("bitsandbytes")
    folder = run(f"--model.loading.quantization={quantization}")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    trained = trained_logprobs(base, checkpoint, LoadingSettings(quantization=quantization))
    main(["export", f"--config={folder / 'config.yaml'}", "--ckpt_path=last", f"--output={tmp_path / 'merged'}",
          "--merge=true"])  # fmt: skip
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert getattr(merged.config, "quantization_config", None) is None
    expected = trained_logprobs(base, checkpoint, LoadingSettings())  # over the files' own weights
    error = (logprobs(merged.float()) - expected).abs().mean()
    assert error < 0.01  # of 16 bits; that of nf4 is many times as large, that of int8 smaller
    assert quantization == "int8" or (trained - expected).abs().mean() > 3 * error
    adapter = peft.PeftModel.from_pretrained(
        load_base_model(str(base), LoadingSettings(quantization=quantization)), folder / "export"
    )
    assert_within(logprobs(adapter), trained, logprob_budget(trained))


def test_an_adapters_folder_that_was_trained_further_is_exported_as_the_run_left_it(run, base, tmp_path):
    (run() / "export").rename(tmp_path / "first")
    (tmp_path / "first" / "generation_config.json").unlink()  # as peft leaves an adapter
    folder = run(f"--model.policy={tmp_path / 'first'}", "--model.lora=null")
    expected = logprobs(load_adapter(base, folder / "export"))
    assert (expected - logprobs(load_adapter(base, tmp_path / "first"))).abs().max() > 1e-3
    command = ["export", f"--config={folder / 'config.yaml'}", "--ckpt_path=last"]
    main([*command, f"--output={tmp_path / 'adapter'}"])
    main([*command, f"--output={tmp_path / 'merged'}", "--merge=true"])
    assert torch.equal(logprobs(load_adapter(base, tmp_path / "adapter")), expected)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_within(logprobs(merged), expected, logprob_budget(expected))
    for name in ("adapter", "merged", "run/export"):
        assert GenerationConfig.from_pretrained(tmp_path / name).temperature == 0.7  # the base's
    # weights of the checkpoint that are not trained would be lost
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    name = "base_model.model.model.norm.weight"
    checkpoint["state_dict"][f"policy.{name}"] = torch.ones(64)
    torch.save(checkpoint, tmp_path / "more.ckpt")
    module = GVPOModule(str(tmp_path / "first"), lambda prompts, completions: [0.0])
    for merge in (False, True):
        with pytest.raises(ValueError, match=rf"more\.ckpt has '{name}', which is not trained"):
            export(module, tmp_path / "more.ckpt", tmp_path / "out", merge_adapter=merge)


def test_merging_without_an_adapter_is_refused(run, base, tmp_path, capsys):
    folder = run("--model.lora=null")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["export", f"--config={folder / 'config.yaml'}", "--ckpt_path=last", "--merge=true",
              f"--output={tmp_path / 'out'}"])  # fmt: skip
    assert "There is no adapter to merge" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["export", f"--config={folder / 'config.yaml'}", "--ckpt_path=last", "--model.lora.r=4",
              f"--output={tmp_path / 'out'}"])  # fmt: skip
    assert "has no 'base_model.model.model." in capsys.readouterr().err
