"""The public names, and the directions in which modules may import each other."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import heterostep
from small import run, small_pipeline

SOURCE = Path(heterostep.__file__).parent
PURE = {
    "config",
    "scoring",
    "allocation",
    "schedule",
    "kv_cache",
    "kernels",
    "state",
    "timing",
    "reports",
    "policy",
    "runner",
    "trajectory",
    "wrapping",
}


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


def test_the_algorithm_runs_without_diffusers():
    for name in sorted(PURE):
        for path in module_files(name):
            assert not any(used.split(".")[0] == "diffusers" for used in imports(path)), path.name


def test_modules_import_downwards_only():
    above = {
        "config": {"errors"},
        "scoring": set(),
        "allocation": set(),
        "trajectory": set(),
        "policy": {"config", "errors", "policy"},
        "schedule": {"allocation", "config", "errors", "policy"},
        "kernels": {"kernels"},
        "kv_cache": {"kernels"},
        "compat": set(),
        "replay": {"compat", "errors"},
        "state": {"adapters", "kv_cache", "memory", "policy", "replay", "schedule", "trajectory"},
        "direct": {"adapters", "errors", "kv_cache", "replay"},
        "memory": {"direct", "errors", "kv_cache"},
        "placement": {"config", "errors", "memory"},
        "configs": {"errors"},
        "rehearsal": {"adapters", "checkpoints", "configs", "errors", "pipeline"},
        "planning": {
            "adapters",
            "config",
            "configs",
            "direct",
            "errors",
            "kv_cache",
            "memory",
            "policy",
            "rehearsal",
        }
        | {"schedule", "timings"},
        "timings": set(),
        "bench": {"configs", "direct", "errors", "kv_cache", "rehearsal", "replay", "timings"},
        "timing": set(),
        "reports": set(),
        "adapters": {"adapters", "errors", "kernels", "kv_cache"},
        "runner": {
            "adapters",
            "allocation",
            "compat",
            "config",
            "errors",
            "kernels",
            "memory",
            "reports",
            "schedule",
            "scoring",
        }
        | {"kv_cache", "placement", "policy", "replay", "state", "timing", "trajectory", "wrapping"},
        "wrapping": {"errors"},
        "pipeline": {"adapters", "compat", "config", "errors", "policy", "reports", "runner", "wrapping"},
        "checkpoints": {"adapters", "errors"},
        "compare": {"adapters", "allocation", "compare", "config", "errors", "files", "metrics", "pipeline", "schedule"}
        | {"tiny", "video", "viz", "wrapping"},
    }
    for name, allowed in above.items():
        for path in module_files(name):
            used = {m.split(".")[1] for m in imports(path) if m.startswith("heterostep.")}
            used |= _from_package(path)
            assert used <= allowed, f"{path.name} imports {used - allowed}"


def test_importing_the_package_is_quick_and_light():
    code = "import sys, heterostep; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


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
