"""Whoever edits anything can trust the next run: code that decides results is part of a run, other code is not."""
import ast
import importlib.util
import io
import linecache
import math
import re
import shutil
import tokenize
from functools import cache
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torchvision
from conftest import activations, checkpoint, draw_splits, execute, history_of, options_for, same, small_efficientnet

import efficientnet_b3 as program

SOURCE = Path(program.__file__).read_text()
# of activations:
UPSTREAM = {"Data", "Model", "Frozen activations", "Decoding", "Fast passes", "Activation files", "Fingerprints",
            "Helpers"}
DECIDING = UPSTREAM | {"Heads", "Training", "Closed form", "Whole run"}  # a closed form may be upstream, or not
STORY = {"Data", "Model", "Frozen activations", "Heads", "Training"}
MINE = "raise RuntimeError('mine')"
FUNCTIONS = (ast.FunctionDef, ast.ClassDef)


# Edits


def definitions(source):
    """[(room, name, node)] of all statements below a banner; a class's methods are listed too, under its name."""
    banners = [(number, line[7:].rstrip("- ")) for number, line in enumerate(source.splitlines(), 1)
               if line.startswith("# ---- ")]
    found = []
    for node in ast.parse(source).body:
        room = [name for number, name in banners if number < node.lineno][-1:]
        if isinstance(node, (*FUNCTIONS, ast.Assign, ast.AnnAssign)) and room:
            target = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
            name = getattr(node, "name", "") or ast.unparse(target)
            found += [(*room, name, part) for part in ast.walk(node) if part is node or isinstance(part, FUNCTIONS)]
    return found


def with_lines(source, line, *added):
    """The source with lines put before one of its lines."""
    lines = source.split("\n")
    return "\n".join([*lines[:line - 1], *added, *lines[line - 1:]])


def edited(source, node, statement="edited = True"):
    """The source with a statement at the start of a definition's body, or with an assigned value in a function."""
    if not isinstance(node, FUNCTIONS):
        lines, value = source.split("\n"), node.value
        lines[value.end_lineno - 1] = (lines[value.end_lineno - 1].encode()[:value.end_col_offset] + b")" +
                                       lines[value.end_lineno - 1].encode()[value.end_col_offset:]).decode()
        first = lines[value.lineno - 1].encode()
        first = first[:value.col_offset] + b"(lambda same: same)(" + first[value.col_offset:]
        return "\n".join([*lines[:value.lineno - 1], first.decode(), *lines[value.lineno:]])
    body = node.body[ast.get_docstring(node) is not None:]
    if not body:  # a docstring alone
        return with_lines(source, node.end_lineno + 1, node.body[0].col_offset * " " + statement)
    return with_lines(source, body[0].lineno, body[0].col_offset * " " + statement)


def edit_of(source, name, statement="edited = True"):
    """The source with a statement at the start of the function of that name."""
    node, = [node for _, found, node in definitions(source) if found == getattr(node, "name", "") == name]
    return edited(source, node, statement)


def load(source, folder):
    """The edited program as a module, as an import makes it; a small network stands for B3."""
    path = folder / f"edited_{len(list(folder.glob('edited_*.py')))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.efficientnet_b3, module.code_of = small_efficientnet, cache(module.code_of)
    return module


def fingerprint(module, **constants):
    """Under which name the module would keep and look for activations."""
    cfg = module.parse_command_line([])
    vars(cfg).update(constants, device=torch.device("cpu"), dtype=torch.float32, out_dir="nowhere")
    asked, module.compute_once = [], lambda name, *_args: asked.append(name)
    module.frozen_activations(pd.DataFrame({"path": ["a.png"], "label": [0], "sha256": ["0"]}),
                              SimpleNamespace(digest="0"), 2, cfg)
    return asked[0]


def changes(module, before):
    """The names whose code differs from that of another module."""
    after, before = module.code_of(), before.code_of()
    return {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    module = load(SOURCE, tmp_path_factory.mktemp("original"))
    module.fingerprint = fingerprint(module)
    return module


# What counts


def test_an_edit_of_any_definition_that_decides_results_counts_as_that_definition(original, tmp_path):
    """Functions, methods and values alike, all of the story's and two of each other room, also of those to come."""
    tried = [(room, name, node) for room, name, node in definitions(SOURCE) if room in STORY]
    for room in DECIDING - STORY:
        of_room = [(room, name, node) for found, name, node in definitions(SOURCE) if found == room]
        tried += [of_room[0], of_room[-1]]
    for room, name, node in tried:
        module = load(edited(SOURCE, node), tmp_path)
        assert changes(module, original) == {name}, f"{name}, line {node.lineno}"
        if room != "Closed form":
            assert (fingerprint(module) != original.fingerprint) == (room in UPSTREAM), name
        tmp_path.joinpath(Path(module.__file__).name).write_text("")


def test_an_edit_of_a_definition_of_any_other_room_counts_as_nothing(original, tmp_path):
    """The first and the last function of each: of reports, figures, prediction, drawn flowers, command line, ..."""
    rooms = {}
    for room, name, node in definitions(SOURCE):
        if isinstance(node, ast.FunctionDef) and room not in DECIDING:
            rooms.setdefault(room, []).append(node)
    assert rooms.keys() >= {"Images and weights", "Reports", "Prediction", "Drawn flowers", "Command line"}
    for room, nodes in rooms.items():
        for node in (nodes[0], nodes[-1]):
            module = load(edited(SOURCE, node), tmp_path)
            assert not changes(module, original) and fingerprint(module) == original.fingerprint, (room, node.name)


def test_a_definition_counts_whatever_its_name(original, tmp_path):
    """Not like a constant, which counts by its value, if only its letters are those of one."""
    line = SOURCE[:SOURCE.index("# ---- Data -")].count("\n") + 1
    added = load(with_lines(SOURCE, line + 1, "", "def crop(x):", "    return x", ""), tmp_path)
    assert changes(added, original) == {"crop"} and fingerprint(added) != original.fingerprint


def with_other_comments(source):
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# ----"):
            lines[token.start[0] - 1] = token.line[:token.start[1]] + "# edited"
    return "\n".join(lines)


def with_other_docstrings(source):
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (*FUNCTIONS, ast.Module)) and ast.get_docstring(node):
            number = node.body[0].lineno - 1
            lines[number] = lines[number].replace('"""', '"""Edited. ', 1)
    return "\n".join(lines)


def with_other_layout(source):
    """Each function and class as Python itself would lay it out."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, FUNCTIONS):
            first = min(part.lineno for part in (node, *node.decorator_list))
            lines[first - 1:node.end_lineno] = ["", *ast.unparse(node).split("\n"), ""]
    return "\n".join(lines)


@pytest.mark.parametrize("change", [with_other_comments, with_other_docstrings, with_other_layout])
def test_comments_docstrings_and_layout_count_as_nothing(change, original, tmp_path):
    source = change(SOURCE)
    module = load(source, tmp_path)
    assert sum(map(str.__ne__, source.splitlines(), SOURCE.splitlines())) > 50
    assert not changes(module, original) and fingerprint(module) == original.fingerprint


@pytest.mark.parametrize("room", sorted(DECIDING))
def test_what_is_added_to_a_room_or_taken_out_of_it_counts(room, original, tmp_path):
    line = SOURCE[:SOURCE.index(f"# ---- {room} -")].count("\n") + 1
    added = load(with_lines(SOURCE, line + 1, "", "def added(x):", "    return x", "", "addition = 3", ""), tmp_path)
    assert changes(added, original) == changes(original, added) == {"added", "addition"}
    assert room not in UPSTREAM or fingerprint(added) != original.fingerprint


def test_which_epoch_is_the_best_counts(original, tmp_path):
    line = "names if best_row([*run[\"history\"], row]) is row else ()"
    assert SOURCE.count(line) == 1
    assert changes(load(SOURCE.replace(line, "names"), tmp_path), original) == {"end_epoch"}


def test_another_import_under_a_name_that_decides_results_counts(original, tmp_path):
    line = "from torch.optim.lr_scheduler import PolynomialLR"
    other = load(SOURCE.replace(line, "from torch.optim.lr_scheduler import LinearLR as PolynomialLR"), tmp_path)
    assert changes(other, original) == {"import PolynomialLR"} and fingerprint(other) == original.fingerprint
    other = load(SOURCE.replace("import Image, ImageOps", "import Image, ImageDraw as ImageOps"), tmp_path)
    assert changes(other, original) == {"import ImageOps"} and fingerprint(other) != original.fingerprint
    for news in ("import csv", "import torch.hub"):
        assert not changes(load(SOURCE.replace(line, f"{line}\n{news}"), tmp_path), original)
    swapped = SOURCE.replace("import numpy as np\n", "").replace(line, f"import numpy as np\n{line}")
    swapped = load(swapped, tmp_path)
    assert not changes(swapped, original) and fingerprint(swapped) == original.fingerprint


def test_a_module_of_the_users_own_counts_where_it_is_used(tmp_path):
    """What it holds, as Python leaves it to the import."""
    source = SOURCE.replace("import numpy as np\n", "import numpy as np\nimport tints\nfrom tints import sepia\n")
    source = source.replace("resize(load_image(path))", "resize(sepia(load_image(path)))")
    prints, sys_path = [], str(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(sys_path)
        for number in (1, 2):
            (tmp_path / "tints.py").write_text(f"def sepia(image):\n    return image  # {number}\n")
            module = load(source, tmp_path)
            assert "import sepia" in module.code_of() and "import tints" not in module.code_of()
            prints.append(fingerprint(module))
    assert prints[0] != prints[1]


def test_a_statement_between_imports_and_constants_counts(original, tmp_path):
    line = "# ---- Configuration"
    other = load(SOURCE.replace(line, f"torch.set_float32_matmul_precision('highest')\n\n{line}", 1), tmp_path)
    assert len(changes(other, original)) == 1 and fingerprint(other) != original.fingerprint


def test_a_room_that_is_added_counts(original, tmp_path):
    line = SOURCE[:SOURCE.index("# ---- Files of a run -")].count("\n") + 1
    banner = f"# ---- Losses {'-' * 106}"
    module = load(with_lines(SOURCE, line, banner, "def focal_loss():", "    pass"), tmp_path)
    assert changes(module, original) == {"focal_loss"}


def with_hue(source, name):
    """The source with a constant HUE, which make_transforms reads by that name."""
    assert source.count("hue=0.2") == source.count("# Model\n") == 1
    return source.replace("hue=0.2", f"hue={name}").replace("# Model\n", "HUE = 0.2  # of colours\n\n# Model\n")


@pytest.mark.parametrize("name", ["cfg.hue", "HUE", "getattr(cfg, 'hue')", "(lambda config: config.hue)(cfg)"])
def test_a_constant_that_is_added_counts_upstream_where_it_is_read_there(name, tmp_path):
    source = with_hue(SOURCE, name)
    module = load(source, tmp_path)
    other = load(source.replace("HUE = 0.2", "HUE = 0.4"), tmp_path)
    assert not changes(other, module) and "hue" in module.CONSTANTS
    assert fingerprint(other) != fingerprint(module)
    unread = load(source.replace(f"hue={name}", "hue=0.2"), tmp_path)
    unread_other = load(source.replace(f"hue={name}", "hue=0.2").replace("HUE = 0.2", "HUE = 0.4"), tmp_path)
    assert fingerprint(unread) == fingerprint(unread_other)


def test_an_option_that_the_code_would_not_hear_is_refused(tmp_path, capsys):
    """HUE is read by its own name there, and stays what it is whatever the option says; a message may name it."""
    for name, refused in (("HUE", True), ("cfg.hue", False), ("cfg.hue or len('lower HUE')", False)):
        module = load(with_hue(SOURCE, name), tmp_path)
        module.parse_command_line(["--hue", "0.2"])
        if refused:
            with pytest.raises(SystemExit):
                module.parse_command_line(["--hue", "0.4"])
            assert "read cfg.hue" in capsys.readouterr().err
        else:
            assert module.parse_command_line(["--hue", "0.4"]).hue == 0.4


def test_a_layer_counts_upstream_whatever_room_its_class_stands_in(tmp_path):
    start = SOURCE.index("class Heads(")
    digests = []
    for factor in (1, 3):
        layer = f"class Extra(nn.Module):\n    def forward(self, x):\n        return x * {factor}\n\n\n"
        module = load(SOURCE[:start] + layer + SOURCE[start:], tmp_path)
        cfg = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, img_size=(40, 40), crop=0)
        digests.append(module.FrozenLayers(torch.nn.Sequential(module.Extra()), cfg).digest)
    assert digests[0] != digests[1]


def test_what_stands_beside_the_constants_and_is_none_counts(original, tmp_path):
    """A table, say, which make_transforms reads."""
    sources = [SOURCE.replace("# Model\n", f"JITTER = {{'hue': {hue}}}\n\n# Model\n", 1).replace("hue=0.2", "**JITTER")
               for hue in (0.2, 0.4)]
    one, other = (load(source, tmp_path) for source in sources)
    assert changes(one, other) and fingerprint(one) != fingerprint(other)


# Whole runs


@pytest.fixture(scope="module")
def run_once(tmp_path_factory):
    """A folder with own images and a run of the program as it is, over."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    module = load(SOURCE, folder)
    write = module.write_file
    module.write_file = lambda path, content: None if path.suffix == ".png" else write(path, content)
    assert module.main(run_options(draw_splits(folder / "own"), folder / "runs")) == 0
    return folder


def run_options(images, runs):
    return [*options_for(images, runs), "--epochs-stage1", "1", "--epochs-stage2", "0"]


@pytest.fixture
def runs(run_once, tmp_path, undrawn):
    """A copy of that run's files, to go on with."""
    shutil.copytree(run_once / "runs", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def again(run_once, runs, tmp_path):
    """Runs an edited program as the same command; returns the exit code."""
    return lambda source, *extra: load(source, tmp_path).main([*run_options(run_once / "own", runs), *extra])


def news(text):
    return "".join(line for line in text.splitlines() if line.startswith("new run"))


def test_an_edit_of_the_training_trains_again_and_uses_the_activations(again, runs, capsys):
    before = activations(runs)
    with pytest.raises(RuntimeError, match="mine"):
        again(edit_of(SOURCE, "train_one_epoch", MINE))
    printed = capsys.readouterr().out
    assert "changed: code of train_one_epoch;" in news(printed) and str(runs / "t_old1") in news(printed)
    assert "accuracy" not in printed and not (runs / "t_report.txt").exists()
    assert before.items() <= activations(runs).items() and "frozen     part" not in printed


def test_an_edit_of_the_decoding_computes_activations_anew(again, runs, capsys):
    """One after the other, each of which is another program."""
    before, source = activations(runs), SOURCE
    for name in ("load_image", "make_transforms"):
        source = edit_of(source, name)
        assert again(source) == 0
        printed = capsys.readouterr().out
        assert f"changed: code of {name};" in news(printed) and "frozen     part" in printed
        assert printed.index("new run") < printed.index("frozen     part")  # told before the long pass
        assert len(activations(runs).keys() - before.keys()) >= 2
        before = activations(runs)


def test_an_edited_view_is_seen_by_the_training(again, runs):
    """What is trained on is what the edited function makes, not only another name for the old."""
    grey = "return np.full((1 + num_views, *cfg.img_size, 3), 128, np.uint8)"
    assert again(edit_of(SOURCE, "load_views", grey)) == 0
    for row in history_of(runs):  # no image differs from another
        assert row["val_loss"] == pytest.approx(math.log(3), abs=0.01)


def test_an_edit_of_reports_and_comments_does_neither(run_once, again, runs, capsys):
    before = activations(runs)
    source = edit_of(edit_of(SOURCE, "plot_confusion_matrix"), "draw_flower")
    source = source.replace("most confused", "oftenest confused")
    source = with_other_comments(with_other_docstrings(source))
    line = source[:source.index("# ---- Whole run -")].count("\n")
    assert again(with_lines(source, line, "train_one_epoch = None")) == 0  # in a room that decides nothing
    printed = capsys.readouterr().out
    assert not news(printed) and "frozen     part" not in printed and "val: oftenest confused" in printed
    assert activations(runs) == before and same(checkpoint(runs, "last"), checkpoint(run_once / "runs", "last"))


def test_a_bug_in_an_edited_report_is_a_traceback_and_costs_no_training(again, runs, monkeypatch, capsys):
    before = (runs / "t_last.pth").read_bytes()
    with pytest.raises(ZeroDivisionError):
        again(edit_of(SOURCE, "report", "1 / 0"))
    assert (runs / "t_last.pth").read_bytes() == before and not news(capsys.readouterr().out)


def test_another_rule_for_the_best_epoch_is_not_answered_by_the_old_best(again, runs):
    """Which epoch the report is of is a result."""
    old = checkpoint(runs, "best")["history"][-1]["epoch"]
    assert again(edit_of(SOURCE, "best_row", f"return history[{-1 if old == 0 else 0}]")) == 0
    assert checkpoint(runs, "best")["history"][-1]["epoch"] == 1 - old


MISTAKES = {"no_such_name": NameError, "open('no_such_file')": FileNotFoundError, "{}['no_such_key']": KeyError,
            "torch.zeros(2) @ torch.zeros(3)": RuntimeError}


@pytest.mark.parametrize("name, mistake", [*zip(
    ["load_image", "find_images", "build_model", "load_pretrained", "compute_once", "take_up_run", "train_one_epoch",
     "save_epoch", "report"], cycle(MISTAKES))])
def test_a_mistake_in_edited_code_is_a_traceback_in_every_phase(name, mistake, again, capsys):
    """Whatever kind of error it is, no advice about something else stands in its place."""
    extra = ["--fresh"] if name == "save_epoch" else []
    with pytest.raises(MISTAKES[mistake], match="no_such|size"):
        again(edit_of(SOURCE, name, mistake), *extra)
    assert not capsys.readouterr().err


def test_a_mistake_in_edited_code_is_a_traceback_from_a_worker(again):
    with pytest.raises(NameError, match="no_such_name"):
        again(edit_of(SOURCE, "load_views", "no_such_name"), "--num-workers", "1")


def test_the_file_may_be_edited_while_a_run_goes_on(run_once, runs, tmp_path, capsys):
    """What counts is the code that runs, not the file as it stands by then."""
    module, epochs = load(SOURCE, tmp_path), []
    real = module.train_one_epoch
    broken = edit_of(SOURCE, "train_one_epoch", MINE)

    def edit_meanwhile(*args):
        Path(module.__file__).write_text(broken)
        linecache.checkcache()
        epochs.append(args)
        return real(*args)

    module.train_one_epoch = edit_meanwhile
    assert module.main([*run_options(run_once / "own", runs), "--fresh"]) == 0 and len(epochs) == 1
    assert same(checkpoint(runs, "last"), checkpoint(run_once / "runs", "last"))
    with pytest.raises(RuntimeError, match="mine"):
        load(broken, tmp_path).main(run_options(run_once / "own", runs))
    assert "changed: code of train_one_epoch;" in news(capsys.readouterr().out)


# Notebooks

CONSTANTS = {"DATA_DIR": '"own"', "WEIGHTS": '"none"', "IMG_SIZE": "(40, 40)", "VIEWS": "2", "FOLDS": "2",
             "EPOCHS_STAGE1": "1", "EPOCHS_STAGE2": "0", "NUM_WORKERS": "0", "RUN_NAME": '"t"', "DEVICE": '"cpu"',
             "EVAL_SPLITS": '("val",)'}


@pytest.fixture
def cell(run_once, tmp_path, monkeypatch, undrawn):
    """Executes the program, with small constants, as a cell of a notebook; it trains at once."""
    monkeypatch.chdir(tmp_path)
    Path("own").symlink_to(run_once / "own")
    monkeypatch.setattr(torchvision.models.efficientnet, "efficientnet_b3", small_efficientnet)
    monkeypatch.setattr("sys.argv", ["ipykernel_launcher.py", "-f", "kernel.json"])

    def execute_small(source, name):
        for constant, value in CONSTANTS.items():
            source, count = re.subn(rf"^{constant} = .*?  #", f"{constant} = {value}  #", source, flags=re.MULTILINE)
            assert count == 1
        execute(source, name, {"__name__": "__main__"})

    return execute_small


def test_a_cell_that_is_edited_and_run_again_trains_again(cell, tmp_path, capsys):
    runs = tmp_path / "runs"
    cell(SOURCE, "<cell 1>")
    assert "new run" not in capsys.readouterr().out and (runs / "t_report.txt").exists()
    whole, before = checkpoint(runs, "last"), activations(runs)
    cell(SOURCE, "<cell 2>")
    assert "new run" not in capsys.readouterr().out and same(checkpoint(runs, "last"), whole)
    assert activations(runs) == before
    with pytest.raises(RuntimeError, match="mine"):
        cell(edit_of(SOURCE, "train_one_epoch", MINE), "<cell 3>")
    assert "changed: code of train_one_epoch;" in news(capsys.readouterr().out) and activations(runs) == before
    with pytest.raises(RuntimeError, match="mine"):  # it is not yet computed where the cells before left it
        cell(edit_of(SOURCE, "load_views", MINE), "<cell 4>")
