"""`gvpo export`: what is written is what was trained; what does not fit is refused, and leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, Qwen2Config, Qwen2ForCausalLM

from gvpo_lightning import LoadingSettings
from gvpo_lightning.checkpointing.weights import FileWeights, FolderWeights, load_weights
from gvpo_lightning.cli import main
from gvpo_lightning.module import GVPOModule
from gvpo_lightning.policy.prepare import load_tokenizer
from gvpo_lightning.rewards import ExactAnswer
from tests.export import sharded_script
from tests.export.exporting import export
from tests.forked import run_ranks


def script(name, *arguments) -> str:
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parent / name), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def save_policy(folder, arithmetic, **settings):
    """A random Qwen2 with the arithmetic tokenizer."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    size |= {"num_hidden_layers": 2, "vocab_size": 15, "max_position_embeddings": 64}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = Qwen2ForCausalLM(Qwen2Config(**(size | ids | settings)))
    model.save_pretrained(folder)
    load_tokenizer(str(arithmetic / "model")).save_pretrained(folder)
    return model


def save_folder(path, state, root="state_dict"):
    """A distributed checkpoint, as one process would leave it."""
    dcp.save({root: state, "optimizer_0": {"state": {name: torch.ones(3) for name in state}}}, checkpoint_id=path)
    torch.save({"epoch": 0, "gvpo": {}}, path / "meta.pt")
    return path


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def assert_holds(folder, weights):
    """transformers loads exactly these weights from the folder."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = model.state_dict()
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    return model


@pytest.fixture(scope="module")
def trained(request, arithmetic, tmp_path_factory):
    """Folders with a policy, `last.ckpt` and `full.pt`, of a run of two steps over several ranks."""
    root = tmp_path_factory.mktemp(request.param)
    for tied in (False, True):
        save_policy(root / f"{'tied' if tied else 'untied'}", arithmetic, tie_word_embeddings=tied)
    run_ranks(
        root, sharded_script.RANKS[request.param], sharded_script.main, request.param, root / "untied", root / "tied"
    )
    return root


KINDS = ["fsdp2", pytest.param("tp", marks=pytest.mark.slow), pytest.param("fsdp1", marks=pytest.mark.slow)]


@pytest.mark.parametrize("trained", KINDS, indirect=True)
@pytest.mark.parametrize("ties", ["untied", "tied"])
def test_the_export_of_several_ranks_is_the_gathered_policy(trained, ties, tmp_path):
    folder = trained / ties
    module = GVPOModule(str(folder), ExactAnswer())
    full = torch.load(folder / "full.pt", weights_only=True)
    start = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert not any(torch.equal(full[name], start[name]) for name in full if name.endswith("weight"))
    export(module, folder / "last.ckpt", tmp_path / "one")
    assert_holds(tmp_path / "one", full)
    assert [path.name for path in (tmp_path / "one").glob("model*")] == ["model.safetensors"]

    export(module, folder / "last.ckpt", tmp_path / "many", max_shard_size="20KB")
    assert_holds(tmp_path / "many", full)
    shards = sorted((tmp_path / "many").glob("model-*-of-*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(shards) > 5
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert set(index["weight_map"]) == set(full) - ({"lm_head.weight"} if ties == "tied" else set())

    half = {name: value.to(torch.bfloat16) for name, value in full.items()}
    export(module, folder / "last.ckpt", tmp_path / "half", dtype=torch.bfloat16)
    model = assert_holds(tmp_path / "half", half)
    assert model.config.architectures == ["Qwen2ForCausalLM"]
    assert model.generation_config.eos_token_id == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "half")("1+1=")["input_ids"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_only_one_shard_is_alive_at_a_time(arithmetic, tmp_path, monkeypatch, kind):
    state = under("policy.", save_policy(tmp_path / "model", arithmetic).state_dict())
    checkpoint = tmp_path / "ckpt"
    torch.save({"state_dict": state}, checkpoint) if kind == "file" else save_folder(checkpoint, state)
    alive, most = Counter(), 0
    weights = FileWeights if kind == "file" else FolderWeights
    original = weights.load

    def load(*arguments):
        nonlocal most
        loaded = original(*arguments)
        for name, tensor in loaded.items():
            alive[name] = tensor.nbytes
            weakref.finalize(tensor, alive.pop, name)
        most = max(most, alive.total())
        return loaded

    monkeypatch.setattr(weights, "load", load)
    module = GVPOModule(str(tmp_path / "model"), ExactAnswer())
    export(module, checkpoint, tmp_path / "out", max_shard_size="40KB", dtype=torch.bfloat16)
    assert 10_000 < most <= 40_000
    assert sum(tensor.nbytes for tensor in state.values()) > 5 * most


@pytest.mark.slow
def test_resident_memory_grows_by_a_few_shards_not_by_the_model(arithmetic, tmp_path):
    for name, settings in {"small": {}, "large": {"num_hidden_layers": 30, "intermediate_size": 4_000}}.items():
        model = save_policy(tmp_path / name, arithmetic, **settings)
        save_folder(tmp_path / name / "ckpt", under("policy.", model.state_dict()))
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert size > 90e6
    raised = int(script("memory_script.py", tmp_path, "5MB").split()[-1])
    assert raised < 25e6


# -- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def config(arithmetic, tmp_path):
    """A run on a GPU cluster with data and a logger that aren't here."""
    settings = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "gpu",
            "devices": 8,
            "strategy": {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"},
            "logger": {"class_path": "not.installed.Logger"},
            "default_root_dir": str(tmp_path / "run"),
        },
        "model": {"policy": str(arithmetic / "model"), "reward": "gvpo_lightning.rewards.ExactAnswer"},
        "data": {"path": "nowhere"},
        "completions_table": {"every_n_steps": 2},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    return str(tmp_path / "config.yaml")


@pytest.fixture
def saved(arithmetic, tmp_path):
    """A checkpoint file of the arithmetic model with weights of its own."""
    model = AutoModelForCausalLM.from_pretrained(arithmetic / "model", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": under("policy.", model.state_dict()), "gvpo": {}}, tmp_path / "run/checkpoints/last.ckpt")
    return model.state_dict()


def test_the_command_needs_neither_data_nor_gpus_nor_loggers(config, saved, tmp_path, capsys):
    main(["export", "--config", config, "--ckpt_path=last", f"--output={tmp_path / 'a'}", "--dtype=float16"])
    assert_holds(tmp_path / "a", {name: value.half() for name, value in saved.items()})
    assert str(tmp_path / "a") in capsys.readouterr().out
    model_alone = tmp_path / "model.yaml"
    model_alone.write_text(json.dumps({"model": json.loads(Path(config).read_text())["model"]}))
    (tmp_path / "b").mkdir()  # an empty folder is as good as none
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    main(["export", "--config", str(model_alone), f"--ckpt_path={checkpoint}", f"--output={tmp_path / 'b'}"])
    assert_holds(tmp_path / "b", saved)


def test_the_export_of_a_run_by_its_own_config_is_the_one_that_it_left(arithmetic, tmp_path):
    run = tmp_path / "run"
    fit = ["fit", "--config", str(arithmetic.parent / "arithmetic.yaml"), f"--model.policy={arithmetic / 'model'}"]
    fit += [f"--data.path={arithmetic / 'sums'}", f"--trainer.default_root_dir={run}", "--data.train_split=train[:16]"]
    main(
        [*fit, "--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--data.validation_split=validation[:4]"]
    )
    main(["export", f"--config={run / 'config.yaml'}", "--ckpt_path=last", f"--output={tmp_path / 'out'}"])
    for name in ("model.safetensors", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (run / "export" / name).read_bytes(), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", run / "export")]
    assert configs[0] == configs[1]


def test_last_is_also_found_where_the_config_puts_checkpoints(config, saved, tmp_path):
    callback = (
        f"{{class_path: {ModelCheckpoint.__module__}.ModelCheckpoint, init_args: {{dirpath: {tmp_path / 'own'}}}}}"
    )
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "own")
    arguments = ["export", "--config", config, "--ckpt_path=last", f"--output={tmp_path / 'out'}"]
    with pytest.raises(SystemExit):
        main(arguments)
    main([*arguments, f"--trainer.callbacks=[{callback}]"])
    assert_holds(tmp_path / "out", saved)


WRAPPED = {
    "FSDP1": "_fsdp_wrapped_module.policy._fsdp_wrapped_module.",
    "torch.compile": "policy._orig_mod.",
    "both": "_orig_mod._fsdp_wrapped_module.policy.",
}


@pytest.mark.parametrize("prefix", WRAPPED.values(), ids=WRAPPED.keys())
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_names_of_wrappers_are_taken_off(arithmetic, tmp_path, prefix, kind):
    weights = save_policy(tmp_path / "model", arithmetic).state_dict()
    state = {
        prefix + name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."): value
        for name, value in weights.items()
    }
    state["reward_model.weight"] = torch.ones(1)  # what else a module has stays out
    checkpoint = tmp_path / "ckpt"
    torch.save({"state_dict": state}, checkpoint) if kind == "file" else save_folder(checkpoint, state, root="model")
    module = GVPOModule(str(tmp_path / "model"), ExactAnswer())
    export(module, checkpoint, tmp_path / "out")
    assert_holds(tmp_path / "out", weights)


@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"])
def test_experts_are_written_as_their_files_have_them(arithmetic, tmp_path, max_shard_size):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, vocab_size=15, num_hidden_layers=1, num_local_experts=4, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    module = GVPOModule(str(tmp_path / "model"), ExactAnswer(), tokenizer=str(arithmetic / "model"))
    checkpoint = save_folder(tmp_path / "ckpt", under("policy.", model.state_dict()))
    export(module, checkpoint, tmp_path / "out", max_shard_size=max_shard_size)
    assert_holds(tmp_path / "out", model.state_dict())
    model.save_pretrained(tmp_path / "expected", max_shard_size=max_shard_size)
    if max_shard_size == "5GB":
        names = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "expected")]
        assert names[0] == names[1]
    else:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        expected = json.loads((tmp_path / "expected" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == expected["weight_map"].keys()


def test_the_code_that_a_policy_brings_is_exported_with_it(arithmetic, tmp_path):
    weights = save_policy(tmp_path / "model", arithmetic).state_dict()
    (tmp_path / "model" / "own_config.py").write_text(
        "from transformers import Qwen2Config\n\n\nclass OwnConfig(Qwen2Config):\n    model_type = 'own'\n"
    )
    (tmp_path / "model" / "own_model.py").write_text(
        "from transformers import Qwen2ForCausalLM\nfrom .own_config import OwnConfig\n\n\n"
        "class OwnModel(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    checkpoint = save_folder(tmp_path / "ckpt", under("policy.", weights))
    module = GVPOModule(str(tmp_path / "model"), ExactAnswer(), loading=LoadingSettings(trust_remote_code=True))
    export(module, checkpoint, tmp_path / "out")
    shutil.rmtree(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert 'from_pretrained("FOLDER", trust_remote_code=True)' in (tmp_path / "out" / "README.md").read_text()


# -- what is refused --------------------------------------------------------------------------------------


def without_a_layer(state):
    return {name: value for name, value in state.items() if "layers.1.mlp" not in name}


def with_a_layer(state):
    return state | {name.replace("layers.1", "layers.2"): value for name, value in state.items()}


def narrower(state):
    return state | {"model.norm.weight": state["model.norm.weight"][:7]}


def adapter(state):
    return state | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 2)}


MISFITS = {
    without_a_layer: "has no 'model.layers.1.mlp.gate_proj.weight' (3 are missing). Give the policy that",
    with_a_layer: "has 'model.layers.2.input_layernorm.weight', which the policy has not",
    narrower: "has 'model.norm.weight' as (7,), not (64,)",
    adapter: "holds an adapter ('model.layers.0.self_attn.q_proj.lora_A.default.weight')",
    lambda state: {}: "is not a checkpoint of a GVPOModule",
}


def refusal(capsys, folder, checkpoint) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["export", f"--model.policy={folder}", "--model.reward=gvpo_lightning.rewards.ExactAnswer",
              f"--ckpt_path={checkpoint}", f"--output={folder.parent / 'out'}"])  # fmt: skip
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize(("change", "message"), MISFITS.items(), ids=["missing", "more", "shape", "adapter", "none"])
def test_a_checkpoint_of_another_policy_is_refused(arithmetic, tmp_path, capsys, kind, change, message):
    state = under("policy.", change(save_policy(tmp_path / "model", arithmetic).state_dict()))
    checkpoint = tmp_path / "ckpt"
    torch.save({"state_dict": state}, checkpoint) if kind == "file" else save_folder(checkpoint, state)
    assert message in refusal(capsys, tmp_path / "model", checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "model"]


@pytest.mark.parametrize("damage", [".metadata", "meta.pt", "__0_0.distcp", "cut short"])
def test_a_half_written_folder_is_refused(arithmetic, tmp_path, capsys, damage):
    model = save_policy(tmp_path / "model", arithmetic)
    checkpoint = save_folder(tmp_path / "ckpt", under("policy.", model.state_dict()))
    if damage == "cut short":
        file = checkpoint / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[:-100])
    else:
        (checkpoint / damage).unlink()
    message = refusal(capsys, tmp_path / "model", checkpoint)
    assert ("__0_0.distcp" if damage == "cut short" else damage) in message
    assert "earlier" in message


def test_a_half_written_or_absent_file_is_refused(arithmetic, tmp_path, capsys):
    model = save_policy(tmp_path / "model", arithmetic)
    torch.save({"state_dict": under("policy.", model.state_dict())}, tmp_path / "ckpt")
    (tmp_path / "ckpt").write_bytes((tmp_path / "ckpt").read_bytes()[:5000])
    assert "was not written whole" in refusal(capsys, tmp_path / "model", tmp_path / "ckpt")
    assert "does not exist" in refusal(capsys, tmp_path / "model", tmp_path / "absent")


def test_ties_that_came_apart_are_refused(arithmetic, tmp_path, capsys):
    state = dict(save_policy(tmp_path / "model", arithmetic, tie_word_embeddings=True).state_dict())
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    checkpoint = save_folder(tmp_path / "ckpt", under("policy.", state))
    assert "are one tensor in the policy, but differ" in refusal(capsys, tmp_path / "model", checkpoint)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_the_refusal_of_adapters_says_to_do_works(arithmetic, tmp_path, kind):
    peft = pytest.importorskip("peft")

    def build(seed):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))

    save_policy(tmp_path / "model", arithmetic)
    trained = build(1)
    checkpoint, state = tmp_path / "ckpt", under("policy.", trained.state_dict())
    torch.save({"state_dict": state}, checkpoint) if kind == "file" else save_folder(checkpoint, state)
    module = GVPOModule(build(2), ExactAnswer(), tokenizer=str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"load_weights\(module.policy, ckpt_path\) and module.export\(folder\)"):
        export(module, checkpoint, tmp_path / "out")
    load_weights(module.policy, checkpoint)
    module.export(tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, trained.eval()(ids).logits)


def test_a_folder_in_use_is_left_alone(arithmetic, tmp_path, capsys):
    model = save_policy(tmp_path / "model", arithmetic)
    checkpoint = save_folder(tmp_path / "ckpt", under("policy.", model.state_dict()))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert "is not an empty folder" in refusal(capsys, tmp_path / "model", checkpoint)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_export_that_fails_midway_leaves_nothing(arithmetic, tmp_path, monkeypatch):
    model = save_policy(tmp_path / "model", arithmetic)
    checkpoint = save_folder(tmp_path / "ckpt", under("policy.", model.state_dict()))
    (tmp_path / ".out.1.partial").mkdir()
    (tmp_path / ".out.1.partial" / "of a killed one").write_text("")
    module = GVPOModule(str(tmp_path / "model"), ExactAnswer())
    monkeypatch.setattr(module.tokenizer, "save_pretrained", lambda folder: (folder / "config.json").mkdir())
    with pytest.raises(FileExistsError):
        export(module, checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "model"]


def exported_with(module, settings, folder):
    """The exported model, read back, of a policy whose generation config is greedy and has these settings beside it."""
    module.policy.generation_config.do_sample = False
    for name, value in settings.items():
        setattr(module.policy.generation_config, name, value)
    module.export(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "settings",
    [{"top_p": 0.9}, {"top_k": 20, "min_p": 0.1}, {"num_return_sequences": 2}, {"temperature": 0.7}],
    ids=str,
)
def test_settings_of_sampling_are_exported_as_sampling(make_module, tmp_path, settings):
    """transformers refuses to save them beside do_sample=False, which hub models have all the same."""
    found = exported_with(make_module(), settings, tmp_path / "export").generation_config
    assert found.do_sample
    assert {name: getattr(found, name) for name in settings} == settings


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.0}, {"temperature": 0.0, "top_k": 20}, {"length_penalty": 2.0}, {"early_stopping": True}],
    ids=str,
)
def test_a_greedy_model_is_exported_as_greedy(make_module, tmp_path, settings):
    """Temperature 0 is no sampling; settings of beams that there are none of are left out, and lose no export."""
    model = exported_with(make_module(), settings, tmp_path / "export")
    assert not model.generation_config.do_sample
    ids = torch.tensor([[3, 4]])
    with torch.no_grad():
        assert int(model.generate(ids, max_new_tokens=1)[0, -1]) == int(model(ids).logits[0, -1].argmax())
