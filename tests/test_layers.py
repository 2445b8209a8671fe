"""The layout's rules, read from the source: who may import whom, and what must not stand in it.

Each check is a function from a tree to its violations; it runs on this repository and on seeded violations.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("graphopt", "passes", "backends")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".html", ".j2", ".css", ".js", ".txt", ".jsonl", ""}
GENERATED = {"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "graphopt.egg-info"}

# What nothing below imports: the front door, and the demo, which uses it as a user does.
FRONT = ("graphopt.api", "graphopt.cli", "graphopt.demo")

# All that the intermediate representation may import of ours: it knows nothing of what works on it.
BELOW_IR = ("graphopt.errors", "graphopt.files", "graphopt.ir", "graphopt.quantization")

# A distribution and the module that it is imported by, where the two differ.
MODULE_OF = {"cuda-bindings": "cuda", "pyyaml": "yaml", "scikit-learn": "sklearn"}

# As class names spell them; lower and upper case follow. Common words (clip, phi, opt) are left out.
ARCHITECTURES = """
    AlexNet BERT BLOOM ConvNeXt DeBERTa DeiT DenseNet DistilBERT ELECTRA EfficientNet Falcon GPT GPTNeoX Gemma
    Inception Llama LLaMA MPNet Mamba MiniLM Mistral Mixtral MobileNet MobileViT OLMo Qwen RegNet ResNet
    ResNeXt RoBERTa SegFormer ShuffleNet SqueezeNet Swin T5 UNet VGG ViT VisionTransformer Whisper XLNet YOLO
""".split()  # noqa: SIM905 (readable and sortable as one text)

# Written so that this file does not match itself.
MACHINE_PATH = re.compile(
    r"(?<![\w.~$}/-])/(?:home|root|Users|work|tmp|mnt|opt)" + r"/[\w.]|\b[A-Z]:\\{1,2}Users"
)


@dataclass(frozen=True)
class Import:
    """`module`, a module under the name it is imported by, imports `target`; `where` is path:line."""

    module: str
    target: str
    where: str


def _files(tree: Path, folders: tuple[str, ...]) -> Iterator[Path]:
    """Text files of `folders`, each once: the links in graphopt/ are not followed."""
    for folder in folders:
        for parent, directories, names in os.walk(tree / folder):
            directories[:] = sorted(set(directories) - GENERATED)
            yield from (Path(parent) / name for name in sorted(names) if Path(name).suffix in TEXT_SUFFIXES)


def _module_name(path: Path, tree: Path) -> str:
    parts = list(path.relative_to(tree).with_suffix("").parts)
    if parts[0] in ("passes", "backends"):
        parts.insert(0, "graphopt")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: Path, folders: tuple[str, ...]) -> list[Import]:
    """Every import statement, also inside functions; `from a import b` counts as importing a and a.b."""
    found = []
    for path in _files(tree, folders):
        if path.suffix != ".py":
            continue
        module = _module_name(path, tree)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    above = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*above, base] if base else above)
                targets = [base, *(f"{base}.{alias.name}" for alias in node.names)]
            else:
                continue
            where = f"{path.relative_to(tree)}:{node.lineno}"
            found += [Import(module, target, where) for target in targets]
    return found


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def imports_across_layers(tree: Path) -> list[str]:
    """The core imports neither passes nor backends, these not one another; nothing below imports the front.

    One exception: graphopt/__init__.py names graphopt.passes, which loads lazily, for `graphopt.passes.X`.
    """
    violations = []
    for entry in imports(tree, PRODUCT):
        upper = [name for name in ("passes", "backends") if _within(entry.module, (f"graphopt.{name}",))]
        layer = upper[0] if upper else "the core"
        for other in ("passes", "backends"):
            exempt = (entry.module, entry.target) == ("graphopt", "graphopt.passes")
            if _within(entry.target, (f"graphopt.{other}",)) and layer != other and not exempt:
                violations.append(f"{entry.where}: {layer} must not import {entry.target}")
        at_front = entry.module in ("graphopt", "graphopt.__main__") or _within(entry.module, FRONT)
        if _within(entry.target, FRONT) and not at_front:
            violations.append(f"{entry.where}: only the front door may import {entry.target}")
    return violations


def imports_of_the_ir(tree: Path) -> list[str]:
    """graphopt/ir imports nothing of ours but what is listed as below it."""
    return [
        f"{entry.where}: graphopt.ir must not import {entry.target}"
        for entry in imports(tree, PRODUCT)
        if _within(entry.module, ("graphopt.ir",))
        and _within(entry.target, ("graphopt",))
        and entry.target != "graphopt"  # `from graphopt import x` is judged as graphopt.x
        and not _within(entry.target, BELOW_IR)
    ]


def plain_imports(tree: Path) -> list[str]:
    """`import passes` would load a second copy of every pass, under a name that is never installed."""
    return [
        f"{entry.where}: import graphopt.{entry.target} instead of {entry.target}"
        for entry in imports(tree, (*PRODUCT, "tests", "tools"))
        if _within(entry.target, ("passes", "backends"))
    ]


HOME_OF_EXTRA = {"cuda": "graphopt.backends.cuda", "demo": "graphopt.demo", "ray": "graphopt.search.pool"}


def undeclared_imports(tree: Path) -> list[str]:
    """What the product imports is the standard library, itself, or declared; extras where they belong."""
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]

    def modules(requirements: list[str]) -> set[str]:
        names = (re.split(r"[^\w.-]", requirement)[0].lower() for requirement in requirements)
        return {MODULE_OF.get(name, name.replace("-", "_")) for name in names}

    declared = modules(project["dependencies"]) | set(sys.stdlib_module_names) | {"graphopt", "__future__"}
    extras = project["optional-dependencies"]
    optional = {home: modules(extras.get(name, [])) for name, home in HOME_OF_EXTRA.items()}
    undeclared = {
        f"{entry.where}: {top} is not among the dependencies"
        for entry in imports(tree, PRODUCT)
        if (top := entry.target.split(".")[0]) not in declared
        and not any(top in known and _within(entry.module, (home,)) for home, known in optional.items())
        and not _within(entry.target, ("passes", "backends"))  # plain_imports says what is wrong with these
    }
    return sorted(undeclared)


def _architecture_pattern() -> re.Pattern[str]:
    words = "|".join(form for name in ARCHITECTURES for form in (name.lower(), name.upper()))
    classes = "|".join(form for name in ARCHITECTURES for form in (name, name.capitalize()))
    # A word ends where the letters end; a class name may go on with a capital, as in ResNetConfig. GPTQ is a method.
    return re.compile(rf"(?<![A-Za-z])(?:{words})(?![A-Za-z])|(?<![A-Z])(?:{classes})(?![a-z])(?!(?<=GPT)Q\b)")


def architecture_names(tree: Path) -> list[str]:
    """The engine knows operators, not models: the name of one is a special case or its start."""
    pattern = _architecture_pattern()
    return [
        f"{path.relative_to(tree)}:{number}: names an architecture: {found.group()}"
        for path in _files(tree, PRODUCT)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (found := pattern.search(line))
    ]


def machine_paths(tree: Path) -> list[str]:
    """Absolute paths that exist on one machine only."""
    folders = (*PRODUCT, "tests", "tools", "docs", ".ci")
    files = [*_files(tree, folders), *tree.glob("*.md"), *tree.glob("*.toml"), *tree.glob("*.txt")]
    return [
        f"{path.relative_to(tree)}:{number}: a path of one machine: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]


def packages_without_init(tree: Path) -> list[str]:
    """A folder of modules without __init__.py works in the checkout and is missing from the wheel."""
    folders = {path.parent for path in _files(tree, PRODUCT) if path.suffix == ".py"}
    bare = sorted(folder for folder in folders if not (folder / "__init__.py").exists())
    return [f"{folder.relative_to(tree)} has no __init__.py" for folder in bare]


CHECKS = (
    imports_across_layers,
    imports_of_the_ir,
    plain_imports,
    undeclared_imports,
    architecture_names,
    machine_paths,
    packages_without_init,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_repository_keeps_the_rule(check: Callable[[Path], list[str]]) -> None:
    assert check(ROOT) == []


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_the_links_are_relative(name: str) -> None:
    link = ROOT / "graphopt" / name
    assert link.is_symlink(), "git on this system did not make symbolic links; see CONTRIBUTING"
    assert link.readlink() == Path("..") / name


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree that keeps every rule and comes close to breaking each."""
    project = {
        "pyproject.toml": (
            '[project]\ndependencies = ["torch>=2", "PyYAML"]\n'
            'optional-dependencies.demo = ["scikit-learn"]\n'
        ),
        "graphopt/__init__.py": "from graphopt.api import optimize\nfrom graphopt import passes\n",
        "graphopt/api.py": "import torch\nfrom graphopt.ir import program\n",
        "graphopt/cli.py": "from . import api\n",
        "graphopt/ir/__init__.py": "",
        "graphopt/ir/program.py": (
            "import json, yaml\n# converts, Vitals, FLOAT5, unetched; saved to runs/work/x and ~/.cache\n"
        ),
        "graphopt/demo/__init__.py": "def f():\n    import sklearn\n",
        "passes/__init__.py": "from .fold import norm\n",
        "passes/fold/__init__.py": "",
        "passes/fold/norm.py": "from graphopt.passes import fold\nfrom ...ir import program\n",
        "backends/__init__.py": "",
        "backends/onnx/__init__.py": "import torch\n",
        "tests/test_x.py": "import graphopt.passes.fold\nfrom transformers import ResNetConfig\n",
    }
    for path, text in project.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    for name in ("passes", "backends"):
        (tmp_path / "graphopt" / name).symlink_to(Path("..") / name)
    return tmp_path


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_check_accepts_a_good_tree(check: Callable[[Path], list[str]], tree: Path) -> None:
    assert check(tree) == []


BAD = [
    (imports_across_layers, "graphopt/ir/bad.py", "import graphopt.passes"),
    (imports_across_layers, "graphopt/ir/bad.py", "from graphopt import backends"),
    (imports_across_layers, "graphopt/ir/bad.py", "from .. import passes"),
    (imports_across_layers, "graphopt/ir/bad.py", "from ..backends.onnx import lower"),
    (imports_across_layers, "graphopt/ir/bad.py", "def f():\n    import graphopt.passes.fold"),
    (imports_across_layers, "graphopt/api.py", "from graphopt.passes.fold import norm"),
    (imports_across_layers, "graphopt/__init__.py", "from graphopt.passes import fold"),
    (imports_across_layers, "graphopt/__init__.py", "from graphopt import backends"),
    (imports_across_layers, "passes/fold/bad.py", "from graphopt.backends import onnx"),
    (imports_across_layers, "passes/fold/bad.py", "from ...backends import onnx"),
    (imports_across_layers, "backends/onnx/bad.py", "from graphopt.passes.fold import norm"),
    (imports_across_layers, "graphopt/ir/bad.py", "from graphopt.api import optimize"),
    (imports_across_layers, "graphopt/ir/bad.py", "from graphopt import cli"),
    (imports_across_layers, "passes/fold/bad.py", "import graphopt.demo"),
    (imports_of_the_ir, "graphopt/ir/bad.py", "from graphopt import pipeline"),
    (imports_of_the_ir, "graphopt/ir/bad.py", "from ..capture import capture"),
    (plain_imports, "passes/fold/bad.py", "import passes.fold"),
    (plain_imports, "backends/onnx/bad.py", "from backends import onnx"),
    (plain_imports, "tests/test_bad.py", "from passes.fold import norm"),
    (undeclared_imports, "graphopt/ir/bad.py", "import pandas"),
    (undeclared_imports, "passes/fold/bad.py", "from sklearn import datasets"),
    (architecture_names, "passes/fold/bad.py", "if name == 'resnet50': pass"),
    (architecture_names, "graphopt/ir/bad.py", "x = BertSelfAttention"),
    (architecture_names, "backends/onnx/bad.py", "# as in a ViT"),
    (architecture_names, "graphopt/ir/bad.py", "def fix_llama_mask(): ..."),
    (architecture_names, "graphopt/ir/bad.py", "LlamaRMSNorm = 1"),
    (architecture_names, "graphopt/ir/bad.py", "x = is_vgg16"),
    (architecture_names, "graphopt/recipes/bad.yaml", "only: ['*gpt2*']"),
    (machine_paths, "docs/bad.md", "open('" + "/home" + "/me/model.pt2')"),
    (machine_paths, "tools/bad", "cd /" + "root/checkout"),
    (machine_paths, "tests/test_bad.py", 'x = "/' + 'tmp/out.onnx"'),
    (packages_without_init, "graphopt/new/module.py", "x = 1"),
]


@pytest.mark.parametrize(("check", "path", "text"), BAD)
def test_the_check_finds_a_violation(
    check: Callable[[Path], list[str]], path: str, text: str, tree: Path
) -> None:
    (tree / path).parent.mkdir(parents=True, exist_ok=True)
    (tree / path).write_text(text + "\n")
    violations = check(tree)
    assert violations, f"{check.__name__} let this pass: {text}"
    assert all(str(Path(path).parent) in violation for violation in violations)
