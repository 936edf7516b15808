"""The pages' code: Python runs as it stands, configs are instantiated, commands are run or their options exist.

In docs/*.md a block of ```python is run, those of one page after another with the same names; one of ```yaml is
written to the file that its first line names (`# run.yaml`), laid over the GSM8K config, and everything in it is built;
of one of ```bash the lines that call `gvpo` are run. Of indented commands, which have placeholders, the options and the
shipped configs must exist.
"""

import functools
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from gvpo_lightning.cli import GVPOTrainer, main

DOCS = Path(__file__).parent.parent / "docs"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^ {4}(?:srun )?gvpo ((?:.*\\\n)*.*)", flags=re.MULTILINE)
BASE = ["--config", "configs/gsm8k_tiny.yaml", "--config", "configs/gsm8k_folder.yaml"]


@pytest.fixture
def workplace(root, tmp_path, monkeypatch):
    """The current folder, with the shipped configs in it; what is imported from there is forgotten."""
    (tmp_path / "configs").symlink_to(root / "configs")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [path.stem for path in tmp_path.glob("*.py")]:
        sys.modules.pop(name, None)


def build_without_fitting(arguments, monkeypatch):
    """Everything that `gvpo fit` builds before it trains."""

    @functools.wraps(Trainer.fit)
    def fit(self, *args, **kwargs):
        return None

    with monkeypatch.context() as patch:
        patch.setattr(GVPOTrainer, "fit", fit)
        main(["fit", *arguments])


def run_block(language, code, names, page, data, monkeypatch):
    if language == "python":
        exec(compile(code, page, "exec"), names)
    elif language == "yaml":
        file = re.match(r"# (\S+\.yaml)\n", code)
        path = Path(file[1] if file else "block.yaml")
        path.write_text(code)
        build_without_fitting([*BASE, f"--data.path={data / 'gsm_8k'}", "--config", str(path)], monkeypatch)
    elif language == "bash":
        for line in code.replace("\\\n", " ").splitlines():
            if line.startswith("gvpo "):
                main(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_blocks_of_a_page_run(page, workplace, shared_data, monkeypatch):
    names = {"__name__": "__main__"}
    for language, code in FENCED.findall((DOCS / page).read_text()):
        try:
            run_block(language, code, names, page, shared_data, monkeypatch)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"this block of {page} fails:\n{code}") from error


@pytest.mark.parametrize("page", ["../README.md", *sorted(path.name for path in DOCS.glob("*.md"))])
def test_commands_of_a_page_exist(page, root, capsys):
    text = FENCED.sub("", (DOCS / page).read_text())
    for command in COMMAND.findall(text):
        words = shlex.split(command.replace("\\\n", " "), comments=True)
        with pytest.raises(SystemExit):
            main([words[0], "--help"])
        known = set(re.findall(r"--([\w.-]+)", capsys.readouterr().out))
        for word in words[1:]:
            if word.startswith("--"):
                option = word[2:].split("=")[0].split(".init_args")[0]
                assert option in known, f"gvpo {words[0]} has no --{option}: {command}"
            if word.startswith("configs/"):
                assert (root / word).exists(), command


def test_memory_page_quotes_the_measured_steps(root):
    rows = json.loads((root / "benchmarks" / "results" / "train_step_cpu.json").read_text())["rows"]
    quoted = re.findall(r"^\| [^|]+ \| ([\d.]+) \| ([\d,]+) \|$", (DOCS / "memory.md").read_text(), flags=re.MULTILINE)
    tiny = [row for row in rows if row["model"] == "tiny"]
    expected = {(f"{row['peak_bytes'] / 1e9:.2f}", f"{row['tokens_per_second']:,.0f}") for row in tiny}
    assert set(quoted) == expected
