"""Heads solved in closed form are scikit-learn's, and none learns from or judges what it must not see."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import settings
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

import efficientnet_b3 as program

LABELS = torch.arange(3).repeat_interleave(8)


def features(views=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, views, 5, generator=generator) + 2 * torch.randn(3, 5, generator=generator)[LABELS][:, None]


def heads_for(labels, options, *extra, classes=3, width=5):
    return program.Heads(torch.nn.Linear(width, classes), labels, settings(options, *extra))


def test_solved_heads_are_linear_discriminant_analysis_without_their_fold(options):
    heads = heads_for(LABELS, options, "--folds", "4")
    heads.solve(features(), 0.3)
    for number in range(5):
        kept = heads.folds != number
        reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3)
        reference.fit(features()[kept].flatten(0, 1).numpy(), LABELS[kept].repeat_interleave(2).numpy())
        factor = heads.weight[number].norm().item() / np.linalg.norm(reference.coef_)
        np.testing.assert_allclose(heads.weight[number].detach(), factor * reference.coef_, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(heads.bias[number].detach(), factor * reference.intercept_, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shrinkage", [0.01, 0.3, 1.0])
def test_discriminant_is_scikit_learns_on_the_rows_that_count(shrinkage):
    rows = torch.tensor([0, 3, 5, 9, 10, 11, 12, 16, 17, 23])
    weight, bias = program.discriminant(*program.moments(features(), LABELS, rows, 3), shrinkage)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    reference.fit(features()[rows].flatten(0, 1).numpy(), LABELS[rows].repeat_interleave(2).numpy())
    np.testing.assert_allclose(weight, reference.coef_, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(bias, reference.intercept_, rtol=1e-3, atol=1e-4)


def test_the_temperature_is_the_best_one_for_left_out_images(options):
    generator = torch.Generator().manual_seed(1)
    heads, data = heads_for(LABELS, options), features() + 2 * torch.randn(24, 2, 5, generator=generator)
    heads.solve(data, 0.3)
    logits = heads.judge_all(data, heads.folds)
    best = F.cross_entropy(logits, LABELS)
    assert all(best < F.cross_entropy(factor * logits, LABELS) for factor in (0.5, 0.9, 1.1, 2))


def test_heads_are_never_more_confident_than_the_analysis_or_than_they_were_on_a_frozen_backbone(options):
    """Where all left-out images are right, ever larger logits would have ever lower cross-entropy."""
    def confidence(heads, data):
        raw, _ = program.discriminant(*program.moments(data, LABELS, torch.arange(24), 3), 0.3)
        return (heads.weight[-1].norm() / raw.norm()).item()

    generator = torch.Generator().manual_seed(1)
    noisy = features() + 2 * torch.randn(24, 2, 5, generator=generator)
    clear = features() + 50 * F.one_hot(LABELS, 5)[:, None]
    heads = heads_for(LABELS, options)
    heads.solve(clear, 0.3)
    assert confidence(heads, clear) <= 1.001
    heads = heads_for(LABELS, options)
    heads.solve(noisy, 0.3)
    before = confidence(heads, noisy)
    heads.solve(clear, 0.3)
    assert confidence(heads, clear) <= 1.001 * before and before < 0.9


def test_every_class_is_dealt_evenly_and_every_image_left_out_once(options):
    heads = heads_for(LABELS, options, "--folds", "4")
    assert torch.equal(heads.targets[-1], LABELS)
    assert ((heads.targets[:-1] == -100).sum(0) == 1).all()
    for number in range(4):
        assert torch.equal(heads.targets[number] == -100, heads.folds == number)
        assert LABELS[heads.folds == number].bincount().tolist() == [2, 2, 2]
    assert not torch.equal(heads.folds, heads_for(LABELS, options, "--folds", "4", "--seed", "1").folds)


def test_a_classs_only_image_is_seen_by_every_head(options):
    heads = heads_for(torch.tensor([0] * 6 + [1]), options, classes=2)
    assert (heads.targets[:, 6] == 1).all()
    assert ((heads.targets[:-1, :6] == -100).sum(0) == 1).all()  # of two heads, each image is left out by one


def test_no_head_learns_from_its_fold_and_no_block_from_a_heads_loss(options):
    heads, data = heads_for(LABELS, options), features()[:, 0].requires_grad_()
    images = (heads.folds == 0).nonzero().flatten()
    heads.loss(data[images], images).backward()
    moved = heads.weight.grad.abs().sum((1, 2)) > 0
    assert moved.tolist() == [False, True, True] and data.grad is None


def test_blocks_learn_from_the_head_that_has_not_seen_the_image(options):
    heads, data = heads_for(LABELS, options), features()[:, 0].requires_grad_()
    heads.solve(features(), 0.3)
    assert torch.equal(heads.judges, heads.folds)
    logits = heads.judge(data, heads.judges)
    expected = torch.stack([F.linear(x, heads.weight[k], heads.bias[k]) for x, k in zip(data, heads.folds)])
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert data.grad.abs().sum() > 0 and heads.weight.grad is None and heads.bias.grad is None


def test_without_cross_fitting_the_head_of_all_images_judges(options):
    assert (heads_for(LABELS, options, "--no-cross-fit").judges == 2).all()


def test_all_heads_start_as_the_models_own(options):
    linear = torch.nn.Linear(5, 3)
    heads = program.Heads(linear, LABELS, settings(options, "--folds", "4"))
    assert all(torch.equal(weight, linear.weight) for weight in heads.weight) and len(heads.weight) == 5
    assert all(torch.equal(bias, linear.bias) for bias in heads.bias)


def test_images_that_are_all_alike_can_be_solved(options):
    heads = heads_for(LABELS, options)
    heads.solve(torch.ones(24, 2, 5), 0.3)
    assert torch.isfinite(heads.weight).all() and torch.isfinite(heads.bias).all()
