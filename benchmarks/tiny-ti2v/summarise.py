"""The page's figures from its results: the table, the paired wins, the motion, and `frontier.png`.

python benchmarks/tiny-ti2v/summarise.py
"""

from __future__ import annotations

import gzip
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
TASKS = {"text": "Text-to-video", "image": "Image-to-video"}
SHARES = (0.75, 0.5, 0.25)


def results(task: str) -> dict[str, Any]:
    """A task's results.json, see docs/compare.md."""
    with gzip.open(HERE / f"{task}.json.gz") as file:
        return json.load(file)


def psnr(record: dict[str, Any]) -> float:
    """dB; identical videos have no finite one."""
    return 100.0 if record["psnr"] is None else record["psnr"]


def nearest(task: dict[str, Any], method: str, share: float) -> dict[int, dict[str, Any]]:
    """A method's records by prompt, at the dial whose mean cost is nearest to the share."""
    points = next(line["points"] for line in task["curves"] if line["method"] == method)
    value = min(points, key=lambda point: abs(point["evaluations"]["mean"] - share))["value"]
    return {r["prompt"]: r for r in task["generations"] if r["method"] == method and r["value"] == value}


def table(task: dict[str, Any], figure: str, digits: int) -> None:
    """Print a figure at each share: ~ is interpolated, - not reached, then the method's cheapest point."""
    print(f"\n{figure}, mean over the videos")
    for method in task["methods"]:
        cells = []
        for row in task["frontier"]:
            mine = next(r for r in row["rows"] if r["method"] == method["name"])
            if mine[figure] is None:
                points = next(line["points"] for line in task["curves"] if line["method"] == method["name"])
                last = min(points, key=lambda point: point["evaluations"]["mean"])
                cells.append(f"- ({last['evaluations']['mean']:.2f}: {last[figure]['mean']:.{digits}f})")
            else:
                mark = "~" if mine["interpolated"] else ""
                cells.append(f"{mark}{mine[figure]:.{digits}f}")
        print(f"  {method['name']:18s}", " | ".join(cells))


def against(task: dict[str, Any], method: str, peer: str, share: float) -> None:
    """Print the mean difference in PSNR over the same videos, its standard error, and how many each wins."""
    mine, theirs = nearest(task, method, share), nearest(task, peer, share)
    gaps = [psnr(mine[p]) - psnr(theirs[p]) for p in sorted(mine)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    cost = statistics.mean(r["evaluations"] for r in theirs.values())
    won = sum(gap > 0 for gap in gaps)
    print(
        f"  {share:g} {method} - {peer} (at {cost:.2f}): {statistics.mean(gaps):+.1f} ± {error:.2f} dB, "
        f"ahead in {won} of {len(gaps)}"
    )


def draw(tasks: dict[str, dict[str, Any]], path: Path) -> None:
    """PSNR against token evaluations, a panel a task."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.4), layout="constrained")
    for panel, (name, task) in zip(panels, tasks.items()):
        for number, line in enumerate(task["curves"]):
            points = sorted((point["evaluations"]["mean"], point["psnr"]["mean"]) for point in line["points"])
            points = [point for point in points if point[0] < 0.95]
            own, bound = line["method"] == "heterostep", line["method"] in ("tokens-oracle", "tokens-fresh")
            panel.plot(
                *zip(*points), "-osd^vP*"[1 + number % 7], linestyle="--" if bound else "-", label=line["method"],
                linewidth=3 if own else 1.2, color=f"C{number % 10}", markerfacecolor="none" if bound else None,
                zorder=3 if own else 2,
            )  # fmt: skip
        chance = statistics.mean(psnr(record) for record in task["chance"])
        panel.axhline(chance, color="grey", linestyle=":")
        panel.text(0.94, chance, "dense from another noise", ha="right", va="bottom", color="grey")
        panel.set(title=TASKS[name], xlabel="token evaluations, dense = 1", ylabel="PSNR to dense, dB")
        panel.set_xlim(0.1, 0.95)
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(path, dpi=110)


def paired(mine: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]], prompts: list[int]) -> str:
    """The mean difference in PSNR over these videos and its standard error."""
    gaps = [psnr(mine[p]) - psnr(theirs[p]) for p in prompts]
    return f"{statistics.mean(gaps):+.2f} ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.2f}"


def synchronisation(tasks: dict[str, dict[str, Any]]) -> None:
    """Print what K and V held, in drift and fresh give single tokens, and whole steps by the former slope."""
    for name, former in tasks.items():
        task = results(f"sync-{name}")
        count = len(task["prompts"])
        assert former["prompts"][:count] == task["prompts"]
        everyone = list(range(count))
        panning = [p for p in everyone if "camera" in task["prompts"][p]["prompt"]]
        print(
            f"\n{TASKS[name]}: {count} videos a setting, the camera pans in {len(panning)}; PSNR, and to heterostep's"
        )
        for share in SHARES:
            own = nearest(task, "heterostep", share)
            before = nearest(former, "heterostep", share)
            print(f"  {share:g} to heterostep with half a slope over sigma: {paired(own, before, everyone)}")
            for method in (each["name"] for each in task["methods"]):
                mine = nearest(task, method, share)
                captions = [statistics.mean(v for v in r["caption"].values() if v is not None) for r in mine.values()]
                print(
                    f"  {share:g} {method:15s} {statistics.mean(map(psnr, mine.values())):.1f} "
                    f"({paired(mine, own, everyone)}; panning {paired(mine, own, panning)}), "
                    f"caption {statistics.mean(captions):.3f}"
                )


def main() -> None:
    tasks = {name: results(name) for name in TASKS}
    for name, task in tasks.items():
        print(f"\n{TASKS[name]}: {len(task['prompts'])} videos a setting, {task['machine']['gpu']}")
        for figure, digits in (("psnr", 1), ("ssim", 4), ("caption", 3)):
            table(task, figure, digits)
        print()
        for share in SHARES:
            for peer in ("steps", "easycache", "magcache"):
                against(task, "heterostep", peer, share)
            against(task, "tokens", "heterostep", share)
            against(task, "tokens", "tokens-random", share)
            against(task, "tokens-oracle", "tokens", share)
            against(task, "tokens-fresh", "tokens", share)
            against(task, "tokens-fresh", "heterostep", share)
        for share in SHARES:
            spread = statistics.stdev(map(psnr, nearest(task, "heterostep", share).values()))
            print(f"  {share:g} heterostep: standard deviation over the videos {spread:.1f} dB")
        for who in ("dense", "chance"):
            captions = [statistics.mean(v for v in r["caption"].values() if v is not None) for r in task[who]]
            print(f"  {who}: {statistics.mean(map(psnr, task[who])):.1f} dB, caption {statistics.mean(captions):.3f}")
        moved = [r["displacement"] for r in nearest(task, "heterostep", 0.25).values() if r["displacement"] is not None]
        dense = [r["displacement"] for r in task["dense"] if r["displacement"] is not None]
        print(f"  displacement at 0.25: {statistics.mean(moved):.1f} px, dense {statistics.mean(dense):.1f} px")
    synchronisation(tasks)
    draw(tasks, HERE / "frontier.png")


if __name__ == "__main__":
    main()
