"""Rules of the tree that nothing else would notice."""

import ast
import subprocess
import sys
from pathlib import Path

STAND_IN = """
import sys
from importlib.machinery import PathFinder
sys.path.insert(0, {repository!r})
sys.path.append({site!r})
import transformers.utils.import_utils as utils
from transformers import AutoModelForCausalLM
import kernels
assert kernels.__file__ and kernels.STAND_IN, "the repository's kernels/ folder shadows the distribution"
AutoModelForCausalLM.from_pretrained({model!r})
print("loaded")
"""


def test_kernels_folder_is_no_package(root):
    assert not (root / "kernels" / "__init__.py").exists()


def test_model_loads_from_the_root_beside_a_stand_in_kernels_distribution(root, arithmetic, tmp_path):
    """A stand-in for Hugging Face's `kernels` package, installed after the repository on sys.path."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("STAND_IN = True\n__version__ = '99.0'\n")
    metadata = tmp_path / "kernels-99.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 99.0\n")
    script = STAND_IN.format(repository=str(root), site=str(tmp_path), model=str(arithmetic / "model"))
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert result.stdout.strip().endswith("loaded"), result.stderr[-2000:]


def imported_modules(path: Path) -> set[str]:
    """Top-level names that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


def test_the_kernels_import_torch_and_triton_alone(root):
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "gvpo_kernels"}
    for path in (root / "kernels" / "gvpo_kernels").rglob("*.py"):
        assert imported_modules(path) <= allowed, path


def test_importing_the_kernels_loads_no_lightning_and_no_transformers():
    script = (
        "import sys, gvpo_kernels; print([m for m in ('lightning', 'transformers', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_no_setting_of_the_readme_test_command_hides_a_package(root):
    """Every package of the tree is listed for installation."""
    listed = (root / "pyproject.toml").read_text()
    for init in (root / "gvpo_lightning").rglob("__init__.py"):
        name = ".".join(init.parent.relative_to(root).parts)
        assert f'"{name}"' in listed, name
