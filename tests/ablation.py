"""What does each part of the recipe buy? Makes the README's table from one command, and is where to try a new one.

    python tests/ablation.py --data-dir data --weights FILE [--seeds 0 1 2 3 4] [--rows NAME ...] [any other option]

Each row of RECIPES is a run of the program with that row's options, over several seeds. A seed's activations are
computed once, by its first run, and lie in OUT_DIR (default runs/ablation); results.csv there keeps what is known, so
that an interrupted table goes on. To try a lever, add a constant to the program and a row here. Decide by the paired
gain over five seeds: single runs differ by up to a point without any cause.
"""
import argparse
import contextlib
import io
import shutil
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
import efficientnet_b3 as program  # noqa: E402

# Name of a row, the row that it is compared with, its options.
PLAIN = ["--head-init", "random", "--no-refit-head", "--no-cross-fit", "--blocks-lr-factor", "1", "--clip-norm", "1e9"]
RECIPES = {
    "plain: random head, one rate": (None, PLAIN),
    "+ head solved in closed form": ("plain: random head, one rate", PLAIN[2:]),
    "+ refit of the head": ("+ head solved in closed form", PLAIN[3:]),
    "+ cross-fitting": ("+ refit of the head", PLAIN[4:]),
    "+ blocks at ten times the head's rate": ("+ cross-fitting", PLAIN[6:]),
    "+ clipped gradients (default)": ("+ blocks at ten times the head's rate", []),
}


def run(options, seed, folder):
    """The program's history of one run: a table with a row per epoch."""
    name = f"seed{seed}"
    argv = [*options, "--seed", str(seed), "--run-name", name, "--out-dir", str(folder), "--eval-splits", "val"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = program.main(argv)
    if code:
        sys.exit(f"seed {seed}, {' '.join(options)}: the program ended with code {code}")
    for old in folder.glob(f"{name}_old*"):
        shutil.rmtree(old)
    return pd.read_csv(folder / f"{name}_history.csv")


def table(results):
    """The results as the README shows them: mean ± standard deviation, and the paired gain ± its standard error."""
    lines = ["| recipe | options | validation | last epoch | epoch 0 | gain | seeds |", "| --- | --- | --- | --- | --- | --- | --- |"]
    best = results.pivot(index="seed", columns="recipe", values="best")
    for name, (before, options) in RECIPES.items():
        rows = results[results.recipe == name]
        if rows.empty:
            continue
        gain = (best[name] - best[before]).dropna() if before in best else pd.Series(dtype=float)
        gained = f"{gain.mean():+.1f} ± {gain.std() / len(gain) ** 0.5:.1f}" if len(gain) > 1 else ""
        figures = " | ".join(f"{rows[key].mean():.2f} ± {rows[key].std():.2f} %" for key in ("best", "last", "epoch0"))
        lines.append(f"| {name} | `{' '.join(options)}` | {figures} | {gained} | {len(rows)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="NAME")
    parser.add_argument("--out-dir", type=Path, default=Path("runs/ablation"))
    args, options = parser.parse_known_args()
    program.report = lambda *_args: None  # figures take time, and only the history is read here
    args.out_dir.mkdir(parents=True, exist_ok=True)
    file = args.out_dir / "results.csv"
    columns = ["recipe", "options", "seed", "best", "last", "epoch0"]
    results = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=columns)
    for seed in args.seeds:
        for recipe in args.rows:
            all_options = [*options, *RECIPES[recipe][1]]
            if ((results.options == " ".join(all_options)) & (results.seed == seed)).any():
                continue
            accuracy = 100 * run(all_options, seed, args.out_dir).val_acc
            row = {"recipe": recipe, "options": " ".join(all_options), "seed": seed, "best": accuracy.max(),
                   "last": accuracy.iloc[-1], "epoch0": accuracy.iloc[0]}
            results = pd.concat([results, pd.DataFrame([row])], ignore_index=True)
            results.to_csv(file, index=False)
            print(f"{recipe}, seed {seed}: {row['best']:.2f} %", flush=True)
    print(table(results[results.options.isin([" ".join([*options, *recipe]) for _, recipe in RECIPES.values()])]))


if __name__ == "__main__":
    main()
