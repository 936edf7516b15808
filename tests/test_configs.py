"""Every shipped config parses and runs `fast_dev_run`."""

import pytest

from gvpo_lightning.cli import main
from tests.test_run_configs import RUNS

DATA = {"gsm8k_tiny.yaml": "gsm8k_folder.yaml"}  # configs whose data come from the hub, and the overlay with a folder
OVERLAYS = {"arithmetic_replay.yaml", "arithmetic_demonstrations.yaml", "arithmetic_offline.yaml"}  # of arithmetic.yaml


def test_every_config_is_tested(root):
    names = {path.name for path in (root / "configs").glob("*.yaml")}
    assert names == {"arithmetic.yaml", "gsm8k_tiny.yaml", "gsm8k_folder.yaml"} | OVERLAYS | set(RUNS)


@pytest.mark.parametrize("name", ["arithmetic.yaml", "gsm8k_tiny.yaml"])
def test_config_runs_fast_dev_run(root, name, request, monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(root)  # the configs name their policies relative to the repository
    arguments = ["fit", "--config", f"configs/{name}"]
    if name in DATA:
        folder = request.getfixturevalue("shared_data") / "gsm_8k"
        arguments += ["--config", f"configs/{DATA[name]}", f"--data.path={folder}"]
    caplog.set_level("INFO", logger="lightning.pytorch")
    main([*arguments, "--trainer.fast_dev_run=true", f"--trainer.default_root_dir={tmp_path}"])
    assert "`Trainer.fit` stopped: `max_steps=1` reached." in caplog.text
    assert not (tmp_path / "summary.json").exists()  # a trial overwrites nothing that a run has left


@pytest.mark.parametrize(
    "overlay", sorted(OVERLAYS - {"arithmetic_offline.yaml"})
)  # that one: tests/commands/test_offline.py
def test_arithmetic_overlay_trains_across_a_pass(root, overlay, monkeypatch, tmp_path):
    monkeypatch.chdir(root)
    short = ["--trainer.max_epochs=2", "--data.train_split=train[:32]", "--data.validation_split=validation[:4]"]
    quiet = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", "--config", "configs/arithmetic.yaml", "--config", f"configs/{overlay}", *short, *quiet])
    header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    source = overlay.removeprefix("arithmetic_").removesuffix(".yaml")
    column = header.split(",").index(f"source/{source}/fraction")
    expected = {"replay": 0.5, "demonstrations": 0.125}[source]
    assert {float(value) for line in lines if (value := line.split(",")[column])} == {expected}


def test_gsm8k_runs_the_whole_path(root, shared_data, monkeypatch, tmp_path):
    monkeypatch.chdir(root)
    data = ["--config", "configs/gsm8k_folder.yaml", f"--data.path={shared_data / 'gsm_8k'}"]
    common = ["--config", "configs/gsm8k_tiny.yaml", *data, f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *common, "--trainer.enable_progress_bar=false"])
    export = f"--model.policy={tmp_path / 'export'}"
    main(["predict", *common, export, "--trainer.limit_predict_batches=1"])
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 16


def test_gsm8k_conversations_are_recorded_cached_and_trained_on_offline(root, shared_data, monkeypatch, tmp_path):
    monkeypatch.chdir(root)
    common = ["--config", "configs/gsm8k_tiny.yaml", "--config", "configs/gsm8k_folder.yaml"]
    common += [f"--data.path={shared_data / 'gsm_8k'}", f"--trainer.default_root_dir={tmp_path}"]
    main(["predict", *common, "--trainer.limit_predict_batches=2"])
    file = f"{{policy: 0, file: {{path: {tmp_path / 'predictions.jsonl'}}}}}"
    offline = [*common, "--model.reference=cached", f"--model.sources={file}"]
    main(["reference", *offline])
    recorded = "--data.train_split=train[7473:7505]"  # the two batches of 16 that were recorded
    main(["fit", *offline, recorded, "--trainer.max_steps=4", "--trainer.limit_val_batches=0"])
    header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    ratios = [float(line.split(",")[header.split(",").index("log_ratio/file.policy/max")]) for line in lines]
    assert len(ratios) == 4
    assert ratios[0] < 1e-3 < ratios[-1]  # the cache is the start itself, and then the policy moves
