"""What does each part of the recipe buy? Makes a table of it from one command, and is where to try a new one.

    python tests/ablation.py --data-dir data --weights FILE [--seeds 0 1 2 3 4] [--rows NAME ...] [any other option]

Random halves: recipes that are chosen on fixed validation images learn these images; 0.8 points gained there were 0.3
on test. So each seed deals the labelled images (train and val) anew, half of each class to train on, half to judge;
seed 0 keeps the official split. Rows are compared on the same halves, by the paired gain ± its standard error, at the
end of the run: the best epoch is chosen by the judging images. Single runs differ by a point without any cause: decide
by five seeds, and what gains less than two standard errors is not worth a constant.

All rows of a seed share its activations, in OUT_DIR (default runs/ablation). results.csv there keeps what is known, so
that an interrupted table goes on; its key is of all constants, the program's code, device and precision: what was
edited is run again. What the files of images and weights hold is not in it: use another OUT_DIR for others.
To try a lever, add a constant to the program and a row here.
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

DEFAULT = "+ blocks at ten times the head's rate (default)"
# Name of a row, the row that it is compared with, its options.
PLAIN = ["--head-init", "random", "--no-refit-head", "--no-cross-fit", "--blocks-lr-factor", "1"]
RECIPES = {
    "plain: random head, one rate": (None, PLAIN),
    "+ head solved in closed form": ("plain: random head, one rate", PLAIN[2:]),
    "+ refits of the head": ("+ head solved in closed form", PLAIN[3:]),
    "+ cross-fitting": ("+ refits of the head", PLAIN[4:]),
    DEFAULT: ("+ cross-fitting", []),
    "- training from refitted heads": (DEFAULT, ["--refitted-epochs", "0"]),
}
CURVE = ["epoch 0", "stage 1", "first of stage 2", "end", "best"]  # validation accuracies of a run


def find_halves(cfg, find_images=program.find_images):
    """The program's find_images, but for another seed than 0 the images of train and val are dealt anew."""
    data = find_images(cfg)
    if cfg.seed:
        labelled = pd.concat([data.tables["train"], data.tables["val"]], ignore_index=True)
        half = labelled.groupby("label").sample(frac=0.5, random_state=program.mix_seed(cfg.seed, "halves") % 2**32)
        trains = labelled.index.isin(half.index)
        data.tables.update(train=labelled[trains].assign(split="train"), val=labelled[~trains].assign(split="val"))
    return data


def run(options, seed, folder):
    """The validation accuracies of one run of the program, in percent, by the names in CURVE."""
    name = f"seed{seed}"
    argv = [*options, "--seed", str(seed), "--run-name", name, "--out-dir", str(folder), "--eval-splits", "val"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = program.main(argv)
    if code:
        sys.exit(f"seed {seed}, {' '.join(options)}: the program ended with code {code}")
    for old in folder.glob(f"{name}_old*"):
        shutil.rmtree(old)
    history = pd.read_csv(folder / f"{name}_history.csv")
    accuracy = 100 * history.val_acc
    return dict(zip(CURVE, (accuracy[0], accuracy[history.stage == 1].iloc[-1],
                            accuracy[history.stage == 2][:1].mean(), accuracy.iloc[-1], accuracy.max())))


def table(rows):
    """{name: accuracies by seed} as a table: means ± standard deviations, gains ± standard errors."""
    lines = [f"| recipe | options | {' | '.join(CURVE)} | gain at the end | seeds |", "| --- " * (4 + len(CURVE)) + "|"]
    for name, (before, options) in RECIPES.items():
        known = rows[name].dropna(how="all")
        if known.empty:
            continue
        gain = (rows[name].end - rows[before].end).dropna() if before else ()
        gained = f"{gain.mean():+.2f} ± {gain.sem():.2f}" if len(gain) > 1 else ""
        figures = " | ".join(f"{known[key].mean():.2f} ± {known[key].std():.2f} %" for key in CURVE)
        lines.append(f"| {name} | `{' '.join(options)}` | {figures} | {gained} | {len(known)} |")
    return "\n".join(lines).replace("``", "").replace(" ± nan", "").replace("nan %", "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="NAME",
                        help=f"of {'; '.join(RECIPES)}")
    parser.add_argument("--out-dir", type=Path, default=Path("runs/ablation"))
    args, options = parser.parse_known_args()
    program.find_images = find_halves
    program.report = lambda *_args: None  # figures take time, and only the history is read here
    args.out_dir.mkdir(parents=True, exist_ok=True)
    file, code = args.out_dir / "results.csv", program.code_of()
    configs = {(name, seed): program.parse_command_line([*options, *own, "--seed", str(seed)])
               for name, (_, own) in RECIPES.items() for seed in args.seeds}
    for cfg in configs.values():
        program.choose_device(cfg)
    keys = {place: program.digest([code, vars(cfg)]) for place, cfg in configs.items()}
    results = pd.read_csv(file, index_col="key") if file.exists() else pd.DataFrame(columns=["recipe", "seed", *CURVE])
    for seed in args.seeds:
        for name in args.rows:
            if keys[name, seed] in results.index:
                continue
            accuracies = run([*options, *RECIPES[name][1]], seed, args.out_dir)
            results.loc[keys[name, seed]] = {"recipe": name, "seed": seed, **accuracies}
            results.to_csv(file, index_label="key")
            print(f"{name}, seed {seed}:", *(f" {key} {value:.2f}" for key, value in accuracies.items()), flush=True)
    by_seed = {name: results.reindex([keys[name, seed] for seed in args.seeds]) for name in RECIPES}
    print(table({name: rows[CURVE].astype(float).set_axis(args.seeds) for name, rows in by_seed.items()}))


if __name__ == "__main__":
    main()
