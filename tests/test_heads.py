"""Heads in closed form are scikit-learn's, and none learns from or judges what it must not see."""
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import call, draw, draw_classes, figures_of, history_of, settings
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

import efficientnet_b3 as program

LABELS = torch.arange(3).repeat_interleave(8)
UNEQUAL = torch.tensor([0] * 16 + [1] * 6 + [2] * 2)


def features(labels=LABELS, views=2):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(labels), views, 5, generator=generator)
    return noise + 2 * torch.randn(3, 5, generator=generator)[labels][:, None]


def heads_for(labels, options, *extra, classes=3, width=5):
    return program.Heads(torch.nn.Linear(width, classes), labels, settings(options, *extra))


def assert_same_direction(weight, bias, reference):
    """Equal but for one factor, the temperature."""
    factor = weight.norm().item() / np.linalg.norm(reference.coef_)
    np.testing.assert_allclose(weight.detach(), factor * reference.coef_, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(bias.detach(), factor * reference.intercept_, rtol=1e-3, atol=1e-4)


# Closed form


@pytest.mark.parametrize("shrinkage", [0.01, 0.3, 1.0])
def test_heads_in_closed_form_are_linear_discriminant_analysis_without_their_fold(shrinkage, options):
    """View 0 counts as often as there are augmented ones."""
    heads, data = heads_for(LABELS, options, "--folds", "4", "--shrinkage", shrinkage), features(views=4)
    heads.fit_closed_form(data)
    counted = torch.cat([data, data[:, :1], data[:, :1]], 1)
    for number in range(5):
        kept = heads.targets[number] != -100
        reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
        reference.fit(counted[kept].flatten(0, 1).numpy(), LABELS[kept].repeat_interleave(6).numpy())
        assert_same_direction(heads.weight[number], heads.bias[number], reference)


def test_so_they_are_for_classes_of_unlike_sizes(options):
    heads = heads_for(UNEQUAL, options)
    heads.fit_closed_form(features(UNEQUAL))
    for head, kept in enumerate(heads.targets != -100):
        reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3)
        reference.fit(features(UNEQUAL)[kept].flatten(0, 1).numpy(), UNEQUAL[kept].repeat_interleave(2).numpy())
        assert_same_direction(heads.weight[head], heads.bias[head], reference)


@pytest.mark.parametrize("count", [1, 2])
def test_so_few_images_that_nothing_varies_within_a_class_are_told_apart(count, options):
    """Of two images each, those heads see one that leave out the other; rounding is no covariance."""
    labels = torch.arange(20).repeat_interleave(count)
    seen = torch.randn(len(labels), 1, 50, generator=torch.Generator().manual_seed(0)).abs()
    heads = heads_for(labels, options, classes=20, width=50)
    heads.fit_closed_form(seen)
    for number in range(3):
        kept = heads.targets[number] != -100
        logits = heads.logits(seen[kept, 0], torch.full((int(kept.sum()),), number))
        assert (logits.argmax(1) == labels[kept]).all(), f"head {number}"


def test_images_that_are_all_alike_have_a_closed_form(options):
    heads = heads_for(LABELS, options)
    heads.fit_closed_form(torch.ones(24, 2, 5))
    assert torch.isfinite(heads.weight).all() and torch.isfinite(heads.bias).all()


# Temperature


def test_the_temperature_is_the_best_one_for_left_out_images(options):
    generator = torch.Generator().manual_seed(1)
    heads, data = heads_for(LABELS, options), features() + 3 * torch.randn(24, 2, 5, generator=generator)
    heads.fit_closed_form(data)
    logits = heads.logits(data[:, 0], heads.unseen_by)
    best = F.cross_entropy(logits, LABELS)
    assert all(best < F.cross_entropy(factor * logits, LABELS) for factor in (0.5, 0.9, 1.1, 2))


def test_heads_are_never_more_confident_than_the_analysis_or_than_they_were_on_a_frozen_backbone(options):
    """Where all left-out images are right, ever larger logits would have ever lower cross-entropy."""
    def confidence(heads, data):
        reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3)
        reference.fit(data.flatten(0, 1).numpy(), LABELS.repeat_interleave(2).numpy())
        return heads.weight[-1].norm().item() / np.linalg.norm(reference.coef_)

    generator = torch.Generator().manual_seed(1)
    noisy = features() + 4 * torch.randn(24, 2, 5, generator=generator)
    clear = features() + 50 * F.one_hot(LABELS, 5)[:, None]
    heads = heads_for(LABELS, options)
    heads.fit_closed_form(clear)
    assert confidence(heads, clear) <= 1.001
    heads = heads_for(LABELS, options)
    heads.fit_closed_form(noisy)
    before = confidence(heads, noisy)
    heads.fit_closed_form(clear)
    assert confidence(heads, clear) <= 1.001 * before and before < 0.9


@pytest.mark.usefixtures("small_network", "undrawn")
def test_one_photograph_of_each_species_leaves_nothing_to_calibrate_by(options, tmp_path):
    """Heads that have seen all images are right about them whatever their confidence, and about others they are not."""
    names = [f"species {number}" for number in range(20)]
    for split, count in (("train", 1), ("val", 2)):
        draw_classes(tmp_path / "one" / split, count, names)
    assert call([*options, "--data-dir", tmp_path / "one", "--epochs-stage2", "0"]) == 0
    shares = pd.read_csv(tmp_path / "runs" / "t_predictions.csv").probability
    assert figures_of(tmp_path / "runs")["accuracy"] < 0.5  # of 20 species in three colours
    assert shares.mean() < 0.8 and all(row["val_loss"] < 10 for row in history_of(tmp_path / "runs"))


def test_single_images_among_others_do_not_spoil_the_temperature(options):
    labels = torch.cat([LABELS, torch.tensor([3])])
    data = torch.cat([features(), 100 + torch.zeros(1, 2, 5)])
    heads = heads_for(labels, options, classes=4)
    heads.fit_closed_form(data)
    logits, others = heads.logits(data[:, 0], heads.unseen_by), labels < 3
    best = F.cross_entropy(logits[others], labels[others])
    assert all(best <= F.cross_entropy(factor * logits[others], labels[others]) for factor in (0.5, 0.9))


# Folds


def test_every_class_is_dealt_evenly_and_every_image_left_out_once(options):
    heads = heads_for(LABELS, options, "--folds", "4")
    assert torch.equal(heads.targets[-1], LABELS)
    assert ((heads.targets[:-1] == -100).sum(0) == 1).all()
    for number in range(4):
        left_out = heads.targets[number] == -100
        assert torch.equal(left_out, heads.unseen_by == number)
        assert LABELS[left_out].bincount().tolist() == [2, 2, 2]
    assert not torch.equal(heads.targets, heads_for(LABELS, options, "--folds", "4", "--seed", "1").targets)


def test_folds_are_of_equal_size_where_classes_have_no_multiple_of_them(options):
    """Classes of six among five folds: no fold has a second image of each."""
    sizes = heads_for(torch.arange(20).repeat(6), options, "--folds", "5", classes=20).unseen_by.bincount()
    assert sizes.sum() == 120 and sizes.max() - sizes.min() <= 1


def test_a_classs_only_image_is_seen_by_every_head(options):
    heads = heads_for(torch.tensor([0] * 6 + [1]), options, classes=2)
    assert (heads.targets[:, 6] == 1).all()
    assert ((heads.targets[:-1, :6] == -100).sum(0) == 1).all()  # of two heads, each image is left out by one


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("counts", [(2, 2, 2), (2, 3, 9), (1, 1, 1), (1, 2, 1), (1, 7, 1)])
def test_more_folds_than_images_of_a_class(counts, options):
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    heads = heads_for(labels, options, "--folds", "5")
    seen = heads.targets != -100
    assert seen[-1].all() and (~seen[:-1]).sum(0).tolist() == [int(counts[label] > 1) for label in labels]
    assert all(labels[row].unique().tolist() == [0, 1, 2] for row in seen)


# Who learns from what


def test_no_head_learns_from_its_fold(options):
    heads, data = heads_for(LABELS, options), features()[:, 0]
    images = (heads.unseen_by == 0).nonzero().flatten()
    heads.loss(data[images], images).backward()
    assert (heads.weight.grad.abs().sum((1, 2)) > 0).tolist() == [False, True, True]


@pytest.mark.parametrize("extra", ["--cross-fit", "--no-cross-fit"])
def test_blocks_learn_from_the_head_that_has_not_seen_the_image_and_from_no_other(extra, options):
    heads, data = heads_for(LABELS, options, extra), features()[:, 0].requires_grad_()
    heads.fit_closed_form(features())
    fold = heads.targets[:-1] == -100
    teachers = fold.int().argmax(0) if extra == "--cross-fit" else torch.full((24,), 2)
    expected = torch.stack([F.linear(x, heads.weight[k], heads.bias[k]) for x, k in zip(data, teachers)]).detach()
    heads.loss(data, torch.arange(24)).backward()
    gradient = torch.stack([(expected[i].softmax(0) - F.one_hot(LABELS[i], 3)) @ heads.weight[teachers[i]] / 24
                            for i in range(24)])
    torch.testing.assert_close(data.grad, gradient.detach())


def test_all_heads_start_as_the_models_own(options):
    linear = torch.nn.Linear(5, 3)
    heads = program.Heads(linear, LABELS, settings(options, "--folds", "4"))
    assert all(torch.equal(weight, linear.weight) for weight in heads.weight) and len(heads.weight) == 5
    assert all(torch.equal(bias, linear.bias) for bias in heads.bias)


# Classes of unlike sizes


def test_balanced_heads_are_discriminant_analysis_with_equal_priors(options):
    heads = heads_for(UNEQUAL, options, "--balance")
    heads.fit_closed_form(features(UNEQUAL))
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3, priors=[1 / 3] * 3)
    reference.fit(features(UNEQUAL).flatten(0, 1).numpy(), UNEQUAL.repeat_interleave(2).numpy())
    assert_same_direction(heads.weight[-1], heads.bias[-1], reference)


def test_balance_changes_nothing_where_classes_are_alike(options):
    plain, balanced = heads_for(LABELS, options), heads_for(LABELS, options, "--balance")
    for heads in (plain, balanced):
        heads.fit_closed_form(features())
    torch.testing.assert_close(balanced.weight, plain.weight)
    torch.testing.assert_close(balanced.bias, plain.bias)


def test_balanced_losses_are_those_of_a_folder_where_the_images_of_small_classes_stand_several_times(options):
    labels, copies = torch.tensor([0] * 40 + [1] * 4), torch.tensor([1] * 40 + [10] * 4)
    data = torch.randn(44, 5, generator=torch.Generator().manual_seed(0))
    linear, gradients = torch.nn.Linear(5, 2), []
    for times, extra in ((torch.ones(44).int(), "--balance"), (copies, "--no-balance")):
        inputs, targets = data.repeat_interleave(times, 0).requires_grad_(), labels.repeat_interleave(times)
        heads = program.Heads(linear, targets, settings(options, extra))  # all heads start alike
        heads.loss(inputs, torch.arange(len(targets))).backward()
        of_blocks = [inputs.grad[targets == label].sum(0) for label in (0, 1)]
        gradients.append(torch.stack([*heads.weight.grad[-1], *of_blocks]))  # of the head that sees all images
    torch.testing.assert_close(*gradients)


def test_the_temperature_of_balanced_heads_is_the_best_one_by_the_balanced_loss(options):
    generator = torch.Generator().manual_seed(1)
    data = features(UNEQUAL) + 2 * torch.randn(24, 2, 5, generator=generator)
    heads = heads_for(UNEQUAL, options, "--balance")
    heads.fit_closed_form(data)
    logits = heads.logits(data[:, 0], heads.unseen_by)

    def loss(factor):
        each = F.cross_entropy(factor * logits, UNEQUAL, reduction="none")
        return sum(each[UNEQUAL == label].mean() for label in range(3))

    assert all(loss(1) < loss(factor) for factor in (0.5, 0.9, 1.1, 2))


@pytest.fixture
def forty_and_four(tmp_path):
    """Two classes that overlap, of 40 and 4 images; ten of each for validation."""
    for split, counts in (("train", (40, 4)), ("val", (10, 10))):
        for name, count, mean in zip(("many", "few"), counts, ((200, 60, 60), (120, 100, 60))):
            for number in range(count):
                colour = np.random.default_rng((number, mean[0], count)).normal(mean, 25)
                draw(tmp_path / "unequal" / split / name / f"{number}.png", colour, number)
    return tmp_path / "unequal"


def test_a_folder_of_40_and_4_images(small_network, options, forty_and_four, tmp_path, undrawn):
    found = {}
    for extra in ("--no-balance", "--balance"):
        runs = tmp_path / extra
        command = [*options, "--data-dir", forty_and_four, "--out-dir", runs, extra, "--no-amp", "--views", "1"]
        assert call([*command, "--epochs-stage1", "3", "--epochs-stage2", "0"]) == 0
        table = pd.read_csv(runs / "t_predictions.csv")
        found[extra] = (table.predicted == "few").sum()
    assert found["--balance"] > found["--no-balance"]
