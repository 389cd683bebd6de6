"""The layers of the package, what its imports name, and what importing it loads."""

import ast
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import skjacobian
import skjacobian.attacks
import skjacobian.objectives
from skjacobian import losses, theory
from skjacobian.datasets import load_mnist, make_separated
from skjacobian.differentiable import as_torch
from skjacobian.jacobian import jacobian_norm

ROOT = Path(skjacobian.__file__).parent
ARCHITECTURE = Path(__file__).parents[1] / "docs" / "architecture.md"

# Layer of each module; of a folder, that of every file in it. A module imports only from
# lower layers, or from its own without cycles.
LAYERS = {
    "_columns": 0,
    "exceptions": 0,
    "_rng": 0,
    "_table": 0,
    "_validation": 0,
    "_version": 0,
    "ascent_steps": 1,
    "averages": 1,
    "datasets": 1,
    "constraints": 1,
    "geometry": 1,
    "intervals": 1,
    "layers": 1,
    "leaves": 1,
    "losses": 1,
    "model_modes": 1,
    "model_outputs": 1,
    "norms": 1,
    "projections": 1,
    "random_points": 1,
    "threat_model": 1,
    "validity": 1,
    "jacobian": 2,
    "attacks": 2,
    "objectives": 3,
    "_net": 4,
    "_preprocessing": 4,
    "_training_data": 4,
    "differentiable": 4,
    "modules": 4,
    "_attacked_columns": 5,
    "_attacked_view": 5,
    "_early_stopping": 5,
    "_domain": 1,
    "_estimator": 5,
    "_prediction": 5,
    "_under_attack": 5,
    "classifiers": 5,
    "_checks": 6,
    "adversarial_examples": 6,
    "capacity": 6,
    "curve": 6,
    "curve_display": 6,
    "jacobian_display": 6,
    "metrics": 6,
    "evaluation": 6,
    "generalization": 6,
    "report": 6,
    "theory": 6,
    "tightness": 6,
    "__init__": 6,
}

# Packages of one layer, which other layers import by the name of the package.
REEXPORTING = tuple(
    f"skjacobian.{name}" for name in ("attacks", "differentiable", "jacobian", "objectives")
)

FILES = sorted(ROOT.rglob("*.py"))
TREES = {file: ast.parse(file.read_text()) for file in FILES}
NAMES = [str(file.relative_to(ROOT)) for file in FILES]


def module_of(file):
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILE_OF = {module_of(file): file for file in FILES}


def place(file):
    """The entry of the table that a file belongs to."""
    return file.relative_to(ROOT).with_suffix("").parts[0]


def imports(file):
    """Yield every import of a file, wherever it stands, as (module, names)."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield node.module, [alias.name for alias in node.names]


def internal_imports(file):
    for module, names in imports(file):
        if module.split(".")[0] == "skjacobian":
            yield module, names


def defined_names(file):
    """What a file itself defines at its top level; not what it imports."""
    names = set()
    for node in TREES[file].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


each_file = pytest.mark.parametrize("file", FILES, ids=NAMES)


def test_the_table_of_layers_names_what_there_is():
    assert {place(file) for file in FILES} == set(LAYERS)


def documented_places():
    """Yield each file or folder in the tables of docs/architecture.md, with its layer."""
    folder = ""
    for line in ARCHITECTURE.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and cells[0].isdigit():
            for path in re.findall("`(.+?)`", cells[1]):
                yield path, int(cells[0])
        elif len(cells) == 2 and cells[0].startswith("file of"):
            (folder,) = re.findall("`(.+?)`", cells[0])
        elif len(cells) == 2:
            for name in re.findall("`(.+?)`", cells[0]):
                yield folder + name, LAYERS[folder.removesuffix("/")]


def test_the_tables_of_the_documentation_have_every_file_once_in_its_layer():
    files = [file.relative_to(ROOT) for file in FILES if file.name != "__init__.py"]
    folders = {f"{file.parts[0]}/": LAYERS[file.parts[0]] for file in files if file.parent.name}
    layers = {file.as_posix(): LAYERS[file.with_suffix("").parts[0]] for file in files}
    assert sorted(documented_places()) == sorted({**folders, **layers}.items())


@each_file
def test_a_module_imports_only_from_its_layer_and_below(file):
    for module, _ in internal_imports(file):
        source = FILE_OF[module]
        assert LAYERS[place(source)] <= LAYERS[place(file)], f"{file.name} imports {module}"


def test_imports_have_no_cycles():
    graph = {module_of(file): {module for module, _ in internal_imports(file)} for file in FILES}
    list(graphlib.TopologicalSorter(graph).static_order())


@each_file
def test_an_internal_import_names_the_file_that_defines(file):
    for module, names in internal_imports(file):
        assert names, f"{file.name} has `import {module}`, but expected `from {module} import …`"
        if module in REEXPORTING and place(file) != module.split(".")[1]:
            assert set(names) <= set(importlib.import_module(module).__all__)
        else:
            assert FILE_OF[module].name != "__init__.py", f"{file.name} imports {module}"
            assert set(names) <= defined_names(FILE_OF[module])


@each_file
def test_only_the_net_imports_skorch(file):
    packages = {module.split(".")[0] for module, _ in imports(file)}
    assert "skorch" not in packages or place(file) == "_net"


@each_file
def test_optional_packages_are_imported_only_inside_functions(file):
    for node in TREES[file].body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or node.names[0].name
            assert module.split(".")[0] not in ("matplotlib", "pandas")


@pytest.mark.parametrize("file", [file for file in FILES if file.name == "__init__.py"])
def test_an_init_file_only_reexports(file):
    docstring, *body = TREES[file].body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value, ast.Constant)
    for node in body:
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert is_all or isinstance(node, ast.ImportFrom), ast.unparse(node)


@pytest.mark.parametrize(
    "package",
    [skjacobian, skjacobian.attacks, skjacobian.objectives],
    ids=lambda package: package.__name__,
)
def test_all_is_sorted_and_every_name_in_it_exists(package):
    def order(name):
        # Constants (and acronyms), then classes, then the rest, as ruff sorts `__all__`.
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

    assert package.__all__ == sorted(set(package.__all__), key=order)
    assert all(hasattr(package, name) for name in package.__all__)


def test_importing_the_package_needs_neither_matplotlib_nor_pandas_and_draws_no_random_numbers():
    # scikit-learn imports pandas itself where it can, so its absence is what can be tested.
    code = (
        "import sys, numpy, torch\n"
        "sys.modules['pandas'] = None\n"
        "before = str(numpy.random.get_state(legacy=False)), torch.get_rng_state().tolist()\n"
        "import skjacobian, skjacobian.attacks, skjacobian.datasets\n"
        "assert 'matplotlib' not in sys.modules\n"
        "after = str(numpy.random.get_state(legacy=False)), torch.get_rng_state().tolist()\n"
        "assert before == after"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# Base classes cannot be used by themselves, and results are not made.
WITHOUT_EXAMPLE = {
    *("Attack", "Objective"),
    *("Found", "ObjectiveValue", "RobustnessReport", "Stage", "__version__"),
}


def public_api():
    for package in (skjacobian, skjacobian.attacks, skjacobian.objectives):
        for name in package.__all__:
            if name not in WITHOUT_EXAMPLE:
                yield pytest.param(getattr(package, name), id=f"{package.__name__}.{name}")
    for function in (jacobian_norm, as_torch, load_mnist, make_separated):
        yield pytest.param(function, id=function.__name__)


def public_functions(module):
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ == module.__name__ and not name.startswith("_"):
            yield pytest.param(function, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize(
    "public", [*public_api(), *public_functions(losses), *public_functions(theory)]
)
def test_the_public_api_is_documented_with_an_example(public):
    assert "Examples\n--------\n>>> " in inspect.getdoc(public)


@pytest.mark.parametrize("public", list(public_api()))
def test_every_parameter_of_the_public_api_is_documented(public):
    _, _, after = inspect.getdoc(public).partition("Parameters\n----------\n")
    section = after.split("\n\n")[0]
    documented = {
        name.strip().lstrip("*")
        for line in section.replace("\\\n", " ").splitlines()
        if not line.startswith("    ")
        for name in line.split(" : ")[0].split(",")
    }
    assert documented == set(inspect.signature(public).parameters)


@each_file
def test_everything_public_has_a_docstring(file):
    for node in TREES[file].body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        assert ast.get_docstring(node), node.name
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    # The setter of a property is documented by its getter.
                    setter = any(
                        ast.unparse(decorator).endswith(".setter")
                        for decorator in method.decorator_list
                    )
                    assert setter or ast.get_docstring(method), f"{node.name}.{method.name}"


# Private names of other libraries, which their next version may drop: a new one is a decision.
PRIVATE = {
    "sklearn.base._fit_context",
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.gaussian_process._gpc.COEFS",
    "sklearn.gaussian_process._gpc.LAMBDAS",
    "sklearn.model_selection._search.BaseSearchCV",
    "sklearn.utils._optional_dependencies.check_matplotlib_support",
    "sklearn.utils._param_validation.HasMethods",
    "sklearn.utils._param_validation.Interval",
    "sklearn.utils._param_validation.RealNotInt",
    "sklearn.utils._param_validation.StrOptions",
    "sklearn.utils._safe_indexing",
    "sklearn.utils.validation._check_n_features",
    "sklearn.utils.validation._check_sample_weight",
    "torch._foreach_add_",
    "torch._fused_adam_",
    "torch.nn.modules.batchnorm._BatchNorm",
    "torch.nn.modules.batchnorm._NormBase",
    "torch.nn.modules.module._has_any_global_hook",
    "torch.optim.optimizer._global_optimizer_post_hooks",
    "torch.optim.optimizer._global_optimizer_pre_hooks",
}


def private_names(tree):
    """Yield the private names of other libraries that a module imports, or takes from torch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch":
            paths = [f"torch.{node.attr}"]
        else:
            continue
        for path in paths:
            first, *rest = path.split(".")
            if first != "skjacobian" and any(part.startswith("_") for part in rest):
                yield path


def test_private_names_of_other_libraries_are_those_that_are_listed():
    files = ROOT.rglob("*.py")
    used = {name for file in files for name in private_names(ast.parse(file.read_text()))}
    assert used == PRIVATE
