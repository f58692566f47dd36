"""The pictures of the documentation, taken anew: `make pictures`.

The demo search is run and judged as the tutorial does it, and its pages are photographed in a headless Chromium. The
verdict's chart is drawn from the table in docs/proof.md, so that picture and table cannot disagree. A few minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import altair as alt
import pandas as pd
import vl_convert
from helpers.browser import CHROMIUM, Server, Visitor
from playwright.sync_api import sync_playwright

from gptailor.results.charts.theme import MAIN, MUTED
from gptailor.store.folder import RunFolder, run_folders

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
PROOF = ROOT / "docs" / "proof.md"
EXPERIMENTS = ROOT / "docs" / "experiments.md"
FEW = alt.Axis(tickCount=6, format=".3~f")
PAGES = {"Home": 500, "Launch": 900, "Progress": 920, "Trade-offs": 1060, "Layers": 860, "Models": 720}
"""Page, and how much of it is in the picture, in pixels from its top."""


def main() -> None:
    """Take every picture."""
    if not CHROMIUM.exists():
        sys.exit(f"{CHROMIUM} is not installed; tests/install_chromium.sh installs it on Debian")
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "verdict.png").write_bytes(vl_convert.vegalite_to_png(verdict().to_json(), scale=2))
    for name, table in experiment_tables(EXPERIMENTS.read_text(encoding="utf-8")).items():
        (PICTURES / f"{name}.png").write_bytes(vl_convert.vegalite_to_png(seeds_of(table).to_json(), scale=2))
    with tempfile.TemporaryDirectory() as place:
        runs = Path(place) / "runs"
        photograph(runs, demo(runs))
    print(*sorted(path.name for path in PICTURES.iterdir()))


# --- the verdict ------------------------------------------------------------------------------------------------------


def verdict_table(text: str) -> pd.DataFrame:
    """The rows of the verdict: method, seeds (a list), held_out, ahead and error (NaN for the search itself)."""
    [table] = re.findall(r"^\| method \| seeds \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = []
    for line in table.replace("*", "").splitlines():
        method, seeds, held_out, lead = (cell.strip() for cell in line.strip("|").split("|"))
        ahead, error = map(float, lead.split("±")) if lead else (None, None)
        rows.append((method, [float(seed) for seed in seeds.split(",") if seed], float(held_out), ahead, error))
    return pd.DataFrame(rows, columns=["method", "seeds", "held_out", "ahead", "error"])


def verdict() -> alt.HConcatChart:
    """At the left each seed and their mean, at the right how far the search is ahead with one standard error."""
    text = PROOF.read_text(encoding="utf-8")
    table, [dense_base] = verdict_table(text), re.findall(r"The dense base has ([\d.]+)\.", text)
    order = list(table["method"])
    up = alt.Y("method:N", sort=order, title=None, axis=alt.Axis(labelLimit=220))
    across = alt.X("held_out:Q", title="held-out average", scale=alt.Scale(domain=[0.445, 0.48]), axis=FEW)
    seeds = table.explode("seeds").dropna(subset=["seeds"]).assign(held_out=lambda frame: frame["seeds"].astype(float))
    colour = alt.condition(alt.datum.method == "search", alt.value(MAIN), alt.value(MUTED))
    means = alt.Chart(table.drop(columns="seeds")).mark_tick(thickness=3, size=18).encode(across, up, color=colour)
    each = alt.Chart(seeds.drop(columns="seeds")).mark_circle(size=45, opacity=0.55).encode(across, up, color=colour)
    dense = (
        alt.Chart(pd.DataFrame({"held_out": [float(dense_base)]}))
        .mark_rule(strokeDash=[4, 3], color=MUTED)
        .encode(across)
    )
    rivals = table.drop(columns="seeds").dropna(subset=["ahead"])
    rivals = rivals.assign(low=rivals["ahead"] - rivals["error"], high=rivals["ahead"] + rivals["error"])
    bare = alt.Y("method:N", sort=order, title=None, axis=None, scale=alt.Scale(domain=order))
    lead = alt.Chart(rivals).encode(bare)
    bars = lead.mark_rule(color=MAIN, strokeWidth=2).encode(
        x=alt.X(
            "low:Q", title="search ahead by (± one standard error)", scale=alt.Scale(domain=[-0.002, 0.03]), axis=FEW
        ),
        x2="high:Q",
    )
    points = lead.mark_point(color=MAIN, filled=True, size=70).encode(x="ahead:Q")
    zero = alt.Chart(pd.DataFrame({"x": [0.0]})).mark_rule(color=MUTED).encode(x="x:Q")
    left = (dense + each + means).properties(width=300, height=190, title="Seeds, mean (tick), dense base (dashed)")
    right = (zero + bars + points).properties(width=300, height=190, title="The search's lead on the same rows")
    return alt.hconcat(left, right).configure_view(strokeOpacity=0.3).configure_title(fontSize=12)


# --- the experiments --------------------------------------------------------------------------------------------------


def experiment_tables(text: str) -> dict[str, pd.DataFrame]:
    """By experiment, the rows of its table of seeds: run, seeds (a list), held_out, error."""
    pattern = r"^## (\w+): .*?^\| run \| seeds \| held-out \| ± \|\n\|[-|]+\n((?:\|[^\n]*\n)+)"
    found = {}
    for section in re.split(r"^(?=## )", text, flags=re.MULTILINE):
        for name, table in re.findall(pattern, section, re.MULTILINE | re.DOTALL):
            cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
            rows = [
                (run, [*map(float, seeds.split(","))], float(mean), float(error)) for run, seeds, mean, error in cells
            ]
            found[name] = pd.DataFrame(rows, columns=["run", "seeds", "held_out", "error"])
    return found


def seeds_of(table: pd.DataFrame) -> alt.LayerChart:
    """A row a run: a dot a seed, a tick their mean, a bar one standard error."""
    order = list(table["run"])
    up = alt.Y("run:N", sort=order, title=None, axis=alt.Axis(labelLimit=260))
    across = alt.X("held_out:Q", title="held-out average", scale=alt.Scale(zero=False, padding=10), axis=FEW)
    means = table.drop(columns="seeds").assign(
        low=table["held_out"] - table["error"], high=table["held_out"] + table["error"]
    )
    each = table.explode("seeds").assign(held_out=lambda frame: frame["seeds"].astype(float)).drop(columns="seeds")
    bars = (
        alt.Chart(means)
        .mark_rule(color=MAIN, strokeWidth=2)
        .encode(alt.X("low:Q", title="held-out average"), up, x2="high:Q")
    )
    ticks = alt.Chart(means).mark_tick(color=MAIN, thickness=3, size=16).encode(across, up)
    dots = alt.Chart(each).mark_circle(color=MUTED, size=45, opacity=0.7).encode(across, up)
    return (bars + dots + ticks).properties(width=420, height=26 * len(order)).configure_view(strokeOpacity=0.3)


# --- the pages --------------------------------------------------------------------------------------------------------


def demo(runs: Path) -> RunFolder:
    """The demo search, judged on its held-out benchmarks."""
    environment = {**os.environ, "GPTAILOR_RUNS": str(runs), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "gptailor"]
    subprocess.run([*command, "search", "data/presets/demo.yaml"], cwd=ROOT, env=environment, check=True)
    [folder] = run_folders(runs)
    subprocess.run([*command, "evaluate", folder.run_id], cwd=ROOT, env=environment, check=True)
    return folder


def photograph(runs: Path, run: RunFolder) -> None:
    """Each page's upper part, as a newcomer sees it."""
    server = Server(runs)
    server.start()
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
            for title, height in PAGES.items():
                visitor = Visitor(browser, server.url)
                visitor.page.set_viewport_size({"width": 1280, "height": height})
                visitor.open(title, **({} if title in ("Home", "Launch") else {"run": run.run_id}))
                visitor.page.wait_for_timeout(600)  # drawing has no end that a page tells
                visitor.settle()
                visitor.page.screenshot(path=PICTURES / f"{title.lower()}.png")
                visitor.close()
            browser.close()
    finally:
        server.kill()


if __name__ == "__main__":
    main()
