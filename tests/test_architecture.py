"""The house: who may import whom, where each library comes in, and how long a thing may get."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trilemma

ROOT = Path(trilemma.__file__).parent
MODULES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8")) for path in ROOT.rglob("*.py")}

#: From the top down. Within one room anything goes; rooms of one floor do not know each other.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"cli_ledger"},
    {"cli_options"},
    {"study", "report"},
    {"results"},
    {"federation", "evaluation"},
    {"privacy", "robustness"},
    {"attacks", "compression"},
    {"models"},
    {"data"},
    {"spec", "randomness", "atomic", "monai_bridge"},
    {"errors"},
    {"__init__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

DOORS = {
    "tomllib": {"study/load.py"},
    "sqlite3": {"study/store.py"},
    "onnxruntime": {"compression/session.py"},
    "onnx": {
        "compression/export.py",
        "compression/onnx_weights.py",
        "compression/packing.py",
        "compression/shipping.py",
    },
    "monai": {"monai_bridge.py"},
    "pydicom": {"monai_bridge.py"},
    "opacus": {"privacy/accounting.py"},
    "plotly": {"report/figures.py"},
    "h5py": {"data/pcam.py"},
    "zstandard": {"federation/codecs/frames.py", "compression/packing.py"},
    "PIL": {"data/images.py"},
    "torchvision": set(),
    "dill": set(),
    "cloudpickle": set(),
    "dp_accounting": set(),
    "sklearn": set(),
}


def room_of(module: str) -> str:
    return module.partition("/")[0].removesuffix(".py")


def imports_of(tree: ast.AST) -> set[str]:
    """Dotted names of all that a module imports, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def functions_of(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_every_room_has_a_floor():
    assert {room_of(module) for module in MODULES} <= FLOOR.keys()
    assert len(MODULES) > 80


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_downwards(module):
    here = room_of(module)
    for name in imports_of(MODULES[module]):
        package, _, rest = name.partition(".")
        if package != "trilemma":
            continue
        there = rest.partition(".")[0]
        there = there if there in FLOOR else "__init__"
        assert there == here or FLOOR[there] > FLOOR[here], f"{module} imports {name}"


@pytest.mark.parametrize("library", sorted(DOORS))
def test_one_door_per_library(library):
    users = {
        module
        for module, tree in MODULES.items()
        if any(name == library or name.startswith(f"{library}.") for name in imports_of(tree))
    }
    assert users <= DOORS[library]
    assert users or not DOORS[library], f"nobody imports {library} any more"


def test_torch_exports_by_one_door_too():
    users = {module for module, tree in MODULES.items() if "torch.onnx.export" in called(tree)}
    assert users == {"compression/export.py"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_gets_too_long(module):
    source = (ROOT / module).read_text("utf-8")
    assert len(source.splitlines()) <= 400
    for function in functions_of(MODULES[module]):
        body = function.body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body = body[1:]
        length = function.end_lineno - body[0].lineno + 1 if body else 0
        assert length <= 50, f"{module}: {function.name} has {length} lines"


def called(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_is_unpickled_or_evaluated(module):
    tree = MODULES[module]
    assert not imports_of(tree) & {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal", "shelve"}
    forbidden = {"eval", "exec", "pickle.load", "pickle.loads", "torch.load", "marshal.loads", "joblib.load", "compile"}
    assert not called(tree) & forbidden
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_draws_from_a_global_generator(module):
    if module == "randomness.py":
        return
    for name in called(MODULES[module]):
        assert not name.startswith(("random.", "numpy.random.")), f"{module} calls {name}"
        assert name not in {"torch.manual_seed", "np.random.seed", "np.random.rand", "np.random.randn"}
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "torch.rand",
            "torch.randn",
            "torch.randint",
            "torch.randperm",
        }:
            assert any(k.arg == "generator" for k in node.keywords), f"{module}: {ast.unparse(node)}"


def test_the_command_line_answers_without_the_heavy_libraries():
    code = "import sys, trilemma.cli; print([m for m in ('torch', 'pydantic', 'numpy', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
