"""The house: a file imports downwards, no circle is closed, and nobody is handed the whole module."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest

from gvpo_lightning import GVPOModule

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gvpo_lightning"
# From the top of the house to its ground; what stands on one floor does not import each other.
FLOORS = (
    {"cli"},
    {"callbacks", "commands"},
    {"module"},
    {"datamodule", "export"},
    {"updates", "evaluation", "checks", "checkpointing"},
    {"rollout", "estimate"},
    {"reference", "sources"},
    {"policy", "objectives"},
    {"data", "distributed", "rewards"},
    {"seeding", "guard", "atomic"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# A package's names are imported when they are first used; under TYPE_CHECKING it says which ones it has.
LAZY = {"gvpo_lightning", "gvpo_lightning.rewards"}


def name_of(path: Path, root: Path) -> str:
    """A file's dotted name; a package's for its __init__."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(folder: Path, root: Path) -> dict[str, Path]:
    return {name_of(path, root): path for path in sorted(folder.rglob("*.py"))}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Those of the known modules that a file imports, for types and within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: an import must name its whole path"
            own = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in own}
    return found & known.keys()


def graph(folder: Path, root: Path) -> dict[str, set[str]]:
    known = modules(folder, root)
    return {name: imports(path, known) for name, path in known.items() if name not in LAZY}


def room(name: str) -> str:
    return name.split(".")[1]


HOUSES = {
    "gvpo_lightning": (PACKAGE, ROOT),
    "gvpo_kernels": (ROOT / "kernels" / "gvpo_kernels", ROOT / "kernels"),
    "benchmarks": (ROOT / "benchmarks", ROOT),
}


@pytest.mark.parametrize("house", HOUSES)
def test_no_imports_close_a_circle(house):
    arrows = graph(*HOUSES[house])
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(arrows.get(name, ())):
                walk(other, (*way, name))
            done.add(name)

    for name in arrows:
        walk(name, ())


def test_every_import_goes_downwards():
    arrows = graph(*HOUSES["gvpo_lightning"])
    assert {room(name) for name in arrows} == FLOOR.keys()
    upwards = [
        f"{name} -> {other}"
        for name, others in arrows.items()
        for other in others - LAZY
        if room(other) != room(name) and FLOOR[room(other)] <= FLOOR[room(name)]
    ]
    assert not upwards


def test_the_page_on_the_architecture_draws_these_floors():
    picture = re.search(r"```text\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), flags=re.DOTALL)
    floors = [set(re.findall(r"(\w+)(?:/|\.py)(?=\s)", line)) for line in picture[1].splitlines()]
    assert floors[:-1] == list(FLOORS)


def test_only_packages_import_for_types_alone():
    for name, path in modules(PACKAGE, ROOT).items():
        assert name in LAZY or "TYPE_CHECKING" not in path.read_text(), path


class Definition:
    """A function, and the classes and functions that it lies in."""

    def __init__(self, path: Path, node: ast.FunctionDef, around: tuple[ast.AST, ...]) -> None:
        self.path, self.node, self.around = path, node, around

    def __str__(self) -> str:
        names = [getattr(part, "name", "") for part in (*self.around, self.node)]
        return f"{self.path.relative_to(ROOT)}: {'.'.join(names)}"

    @property
    def owner(self) -> ast.ClassDef | None:
        return self.around[-1] if self.around and isinstance(self.around[-1], ast.ClassDef) else None


def functions() -> list[Definition]:
    def walk(path: Path, node: ast.AST, around: tuple[ast.AST, ...]) -> Iterator[Definition]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield Definition(path, child, around)
            inside = (*around, child) if isinstance(child, (ast.ClassDef, ast.FunctionDef)) else around
            yield from walk(path, child, inside)

    return [found for path in sorted(PACKAGE.rglob("*.py")) for found in walk(path, ast.parse(path.read_text()), ())]


def overrides_a_hook(function: Definition) -> bool:
    """Whether this method is one of Lightning's own, by name, of a callback or a command's Trainer."""
    from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint

    names = {"Callback": L.Callback, "ModelCheckpoint": ModelCheckpoint, "BasePredictionWriter": BasePredictionWriter}
    bases = [ast.unparse(base).split(".")[-1] for base in (function.owner.bases if function.owner else ())]
    return any(hasattr(names[base], function.node.name) for base in bases if base in names)


# LightningCLI hands the model to the functions of its subcommands.
HANDED_BY_LIGHTNING = {"GVPOTrainer.reference", "GVPOTrainer.export", "GVPOTrainer.debug_batch"}
WHOLE = {"LightningModule", "GVPOModule", "Trainer"}


def takes_the_whole(function: Definition) -> bool:
    arguments = function.node.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        annotation = "" if argument.annotation is None else ast.unparse(argument.annotation)
        words = set(annotation.replace(".", " ").replace("|", " ").replace("'", " ").replace("[", " ").split())
        if words & WHOLE or argument.arg in ("trainer", "pl_module"):
            return True
    return False


def test_nobody_is_handed_the_module_or_the_trainer():
    found = []
    for function in functions():
        owner = "" if function.owner is None else f"{function.owner.name}."
        is_placement = owner == "Placement." and function.node.name in ("__init__", "of")
        allowed = function.path == PACKAGE / "module.py" or is_placement or overrides_a_hook(function)
        if takes_the_whole(function) and not allowed and f"{owner}{function.node.name}" not in HANDED_BY_LIGHTNING:
            found.append(str(function))
    assert not found


# What torch, transformers, peft and Lightning are told by assignment, since they have no other way.
LIBRARIES_OWN = {
    *("parameter.grad", "module.p", "layer.support_avx512bf16_for_cpu", "config.recompile_limit"),
    *("handle._sharding_strategy", "strategy.checkpoint_io", "connector._sigterm_notifier_fn"),
    "trainer.should_stop",
    *("scheduler._last_lr", "part.base_lrs", "setattr(part, key, new[key])", "setattr(holder, name, 0.0)"),
    *("setattr(holder, name, False)", "config.output_router_logits"),
    *("generation_config.do_sample", "config.dtype", "config.architectures", "config.revision"),
    *("trainer.validating", "trainer.training", "validation.restarting", "validation._has_run"),
    *("config.base_model_name_or_path", "model.peft_config['default'].revision", "head.head_request"),
    *("model.config.pad_token_id", "policy.frozen_fingerprint", "head.logit_map"),
    *("adapter.inference_mode", "config.inference_mode", "reward.advance"),
}


def assigned(function: Definition) -> Iterator[str]:
    """Attributes that a function assigns of what it has not made itself."""
    made = {"self", "cls"}
    own = [n for n in ast.walk(function.node) if not isinstance(n, ast.Lambda)]
    for node in own:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Call):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            made |= {
                n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
    for node in own:
        targets = getattr(node, "targets", None) or ([node.target] if hasattr(node, "target") else [])
        for target in targets if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) else ():
            for part in ast.walk(target):
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                    root = part.value
                    name = root.id if isinstance(root, ast.Name) else None
                    if name not in made:
                        yield ast.unparse(part)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr" and ast.unparse(node.args[0]) not in made:
            yield ast.unparse(node)


def test_nobody_assigns_anothers_attribute():
    found = [
        f"{function}: {what}"
        for function in functions()
        if function.path != PACKAGE / "module.py"
        for what in assigned(function)
        if what not in LIBRARIES_OWN
    ]
    assert not found, "\n".join(found)


def test_the_rooms_are_of_a_size_to_be_read():
    assert len(list(PACKAGE.glob("*.py"))) <= 8
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
    for function in functions():
        assert (function.node.end_lineno or 0) - function.node.lineno < 60, function


def test_the_module_is_lightnings_and_nothing_else():
    assert GVPOModule.__bases__ == (L.LightningModule,)


def test_every_module_starts_without_triton():
    """As beside a torch for CPUs, which brings none along."""
    names = [name for name in modules(PACKAGE, ROOT) if not name.endswith(".worker")]
    script = f"import importlib, sys; sys.modules['triton'] = None; [importlib.import_module(n) for n in {names}]"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def test_no_file_knows_what_lies_beside_the_repository():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for path in listed:
        if path.endswith((".py", ".md", ".yaml", ".toml")) or path == "Makefile":
            assert "../shared" not in (ROOT / path).read_text() or path == "tests/test_house.py", path
