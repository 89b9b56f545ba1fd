"""The public names, and the directions in which modules may import each other."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import heterostep
from small import run, small_pipeline

SOURCE = Path(heterostep.__file__).parent
# A module imports from the floors below its own, and from its own package.
FLOORS = [
    {"errors"},
    {"addresses", "files", "grid", "launch", "sigmas", "metrics", "interrupts", "precision"},
    {"config", "compat", "configs", "devices", "kernels", "video"},
    {"kv", "parallel", "plan_picture", "policy", "viz"},
    {"models", "sampling"},
    {"engine", "checkpoints"},
    {"pipeline"},
    {"planning", "progress", "tiny"},
    {"bench", "compare", "making"},
    {"order"},
    {"workers"},
    {"batch", "service", "ui"},
    {"cli"},
    {"__main__", "__init__"},
]
# These load no diffusers. The rest of the engine, which runs models, does.
PURE = (
    "config", "grid", "kernels", "kv.cache", "policy", "policy.auto", "sampling", "sigmas", "engine.budget",
    "engine.generation", "engine.ranking", "engine.report", "engine.schedule", "engine.steps", "engine.trajectory",
    "engine.velocity",
)  # fmt: skip


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _from_package(path):
    """What is imported as in `from heterostep import x`."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in nodes if node.module == "heterostep" for alias in node.names}


def module_files(name):
    path = SOURCE / name
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def test_public_names():
    assert sorted(heterostep.__all__) == [
        "HSAConfig",
        "HeterostepError",
        "Plan",
        "Report",
        "StepInfo",
        "disable",
        "enable",
        "enabled",
        "plan",
        "register_family",
        "register_policy",
        "report",
    ]
    for name in heterostep.__all__:
        assert getattr(heterostep, name).__doc__


def test_modules_import_downwards_only():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    assert set(floor) == {
        path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    for name in floor:
        for path in module_files(name):
            used = {m.split(".")[1] for m in imports(path) if m.startswith("heterostep.")}
            used |= _from_package(path) & set(floor)
            too_high = {other for other in used - {name} if floor[other] >= floor[name]}
            assert name == "__init__" or not too_high, f"{path.relative_to(SOURCE)} imports {too_high}"


def test_modules_of_a_package_do_not_go_in_circles():
    for package in ("engine", "kv", "policy", "planning", "cli", "models", "workers", "batch", "service"):
        needs = {}
        for path in module_files(package):
            tree = ast.parse(path.read_text())
            # What is imported for annotations alone is no need.
            for node in ast.walk(tree):
                if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
                    node.body = []
            prefix = f"heterostep.{package}"
            found = set()
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(prefix):
                    below = node.module[len(prefix) + 1 :]
                    found |= {below.split(".")[0]} if below else {alias.name for alias in node.names}
            needs[path.stem] = found
        needs.pop("__init__")
        left = {name: found & set(needs) for name, found in needs.items()}
        while left:
            free = [name for name, found in left.items() if not found & set(left)]
            assert free, f"{package}: {left} import each other"
            for name in free:
                del left[name]


# Of the command, of the comparison's page, of the page in the browser, of videos and pictures.
BESIDE = {"typer", "rich", "jinja2", "torchmetrics", "matplotlib", "starlette", "uvicorn", "multipart", "av", "PIL"}
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "numpy", "peft", "ftfy", "safetensors", "psutil"}


def _loaded_by(code):
    command = [sys.executable, "-c", f"{code}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_algorithm_runs_without_diffusers():
    modules = [f"heterostep.{name}" for name in PURE]
    loading = f"import importlib, sys\nfor name in {modules}:\n    importlib.import_module(name)\n"
    loading += "    if 'diffusers' in sys.modules: sys.exit(name)"
    made = subprocess.run([sys.executable, "-c", loading], capture_output=True, text=True)
    assert made.returncode == 0, f"diffusers is loaded by {made.stderr}"


def test_importing_the_package_is_quick_and_light():
    assert not _loaded_by("import heterostep") & (BESIDE | HEAVY)


def test_the_library_loads_nothing_of_the_command_and_the_pages():
    pipelines = "from diffusers import WanPipeline; import sys; before = {*sys.modules}"
    ours = "import heterostep; heterostep.enable, heterostep.report, heterostep.HSAConfig"
    # Of what diffusers has loaded nothing is said.
    assert not _loaded_by(f"{pipelines}; {ours}; [sys.modules.pop(name) for name in before]") & BESIDE


def test_report_as_json_has_the_documented_keys():
    pipe = small_pipeline()
    heterostep.enable(pipe, runtime=0.6)
    run(pipe)
    report = json.loads(heterostep.report(pipe).to_json())
    assert report["schema"] == 3 and report["pipeline"] == "WanPipeline" and report["num_inference_steps"] == 12
    assert set(report["runtime"]) == {"target", "achieved", "seconds", "dense_seconds", "warmup_seconds"}
    assert set(report["share"]) == {"target", "achieved", "unspent"}
    assert set(report["steps"]) == {"mean", "min", "max"}
    assert set(report["memory"]) == {"kv_cache_bytes", "kv_host_bytes", "kv_store", "peak_bytes", "fell_back"}
    assert len(report["active_share"]) == 12 and report["seed"] is None
