"""Whether the wheel and the sdist in a folder work: `make package`.

The wheel is installed into an environment of its own and makes a small video there, outside of the checkout. The sdist
has every file of the checkout, and the quick tests pass in it.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Of the repository alone.
NOT_IN_SDIST = {".gitignore"}
WEIGHTS = "recipes/rooms/weights/"
USE = """
import torch

import heterostep
from heterostep import tiny

assert "site-packages" in heterostep.__file__, heterostep.__file__
pipe = tiny.load()
heterostep.enable(pipe, share=0.5)
video = pipe(
    "a red circle moving right over blue stripes",
    height=64,
    width=64,
    num_frames=5,
    num_inference_steps=2,
    output_type="np",
    generator=torch.Generator().manual_seed(0),
).frames[0]
assert video.shape == (5, 64, 64, 3)
assert heterostep.report(pipe).share.achieved == 0.5
print("heterostep", heterostep.__version__, "made a video of", *video.shape)
"""


def main(dist: Path) -> None:
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as folder:
        check_sdist(sdist, Path(folder))
        check_wheel(wheel, Path(folder))
    print(f"{wheel.name} and {sdist.name} work")


def run(*command: object, cwd: Path) -> str:
    """A command outside of the checkout; its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, check=True, text=True, stdout=subprocess.PIPE
    ).stdout


def check_sdist(sdist: Path, folder: Path) -> None:
    with tarfile.open(sdist) as archive:
        # Our own archive; Python before 3.11.4 knows no filter.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = folder.glob("heterostep-*")
    tracked = set(run("git", "ls-files", "-z", cwd=ROOT).split("\0")) - {""} - NOT_IN_SDIST
    missing = sorted(name for name in tracked if not name.startswith(WEIGHTS) and not (source / name).is_file())
    assert not missing, f"not in the sdist: {', '.join(missing)}"
    paths = f"--override-ini=pythonpath=tests {source / 'src'}"
    tests = ("tests/test_docs.py", "tests/test_public.py", "-k", "not runs")
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", paths, *tests, cwd=source)


def check_wheel(wheel: Path, folder: Path) -> None:
    bin = folder / "fresh" / "bin"
    run(sys.executable, "-m", "venv", folder / "fresh", cwd=folder)
    # What is not imported need not be compiled.
    run(bin / "pip", "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt", wheel, cwd=folder)
    run(bin / "pip", "check", cwd=folder)
    print(run(bin / "python", "-W", "error::DeprecationWarning:heterostep", "-c", USE, cwd=folder), end="")
    assert "generate" in run(bin / "heterostep", "--help", cwd=folder)
    print(run(bin / "heterostep", "--version", cwd=folder), end="")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
