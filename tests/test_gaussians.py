"""Beliefs: products of Gaussians, and their divergence from the prior."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from torchrl_mouse.functional import gaussian_product, standard_normal_kl

property_test = settings(max_examples=80, deadline=None, database=None)

number = st.floats(-20, 20, width=32)
spread = st.floats(-6, 3).map(lambda power: 10**power)
factors = st.lists(st.tuples(number, spread), min_size=1, max_size=8)


def tensors(rows):
    """Means and variances ``[N, 1]``."""
    return torch.tensor(rows, dtype=torch.float64).unsqueeze(-1).unbind(1)


@property_test
@given(factors, st.randoms())
def test_product_does_not_depend_on_the_order(rows, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    for one, other in zip(gaussian_product(*tensors(rows)), gaussian_product(*tensors(shuffled)), strict=True):
        torch.testing.assert_close(one, other)


@property_test
@given(factors, st.integers(1, 7))
def test_product_of_products_is_the_product(rows, cut):
    """One belief after another, or all at once."""
    parts = [gaussian_product(*tensors(part)) for part in (rows[:cut], rows[cut:]) if part]
    together = gaussian_product(*(torch.stack(each) for each in zip(*parts, strict=True)))
    for one, other in zip(gaussian_product(*tensors(rows)), together, strict=True):
        torch.testing.assert_close(one, other)


@property_test
@given(factors)
def test_product_is_never_wider_than_its_narrowest_factor_nor_outside(rows):
    mean, variance = gaussian_product(*tensors(rows))
    narrowest = min(spread for _, spread in rows)
    assert narrowest / len(rows) * (1 - 1e-9) <= variance.item() <= narrowest * (1 + 1e-9)
    means = [mean for mean, _ in rows]
    assert min(means) - 1e-9 <= mean.item() <= max(means) + 1e-9


@property_test
@given(number, spread, number, spread)
def test_product_of_two_is_the_closed_form(m, v, n, w):
    mean, variance = gaussian_product(*tensors([(m, v), (n, w)]))
    assert mean.item() == pytest.approx((m * w + n * v) / (v + w), rel=1e-9, abs=1e-9)
    assert variance.item() == pytest.approx(v * w / (v + w), rel=1e-9)


@property_test
@given(number, spread, number, spread, number)
def test_product_is_the_density_of_the_product(m, v, n, w, x):
    """Up to a constant, which two points show to be the same."""
    points = torch.tensor([x, x + 0.5], dtype=torch.float64)
    rows = tensors([(m, v), (n, w)])
    expected = Normal(rows[0], rows[1].sqrt()).log_prob(points).sum(0)
    mean, variance = gaussian_product(*rows)
    found = Normal(mean, variance.sqrt()).log_prob(points)
    torch.testing.assert_close(found.diff(), expected.diff(), rtol=1e-6, atol=1e-4)


def test_one_factor_is_itself_without_the_prior():
    mean, variance = gaussian_product(torch.tensor([[2.0, -1.0]]), torch.tensor([[4.0, 0.25]]))
    torch.testing.assert_close(mean, torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(variance, torch.tensor([4.0, 0.25]))


@pytest.mark.parametrize(("shape", "dim"), [((0, 5), -2), ((3, 0, 5), -2), ((3, 0, 5), 1), ((3, 5, 0), -1)])
def test_empty_product_is_the_prior(shape, dim):
    mean, variance = gaussian_product(torch.zeros(shape), torch.zeros(shape), dim)
    assert mean.shape == variance.shape == torch.empty(shape).sum(dim).shape
    assert (mean == 0).all()
    assert (variance == 1).all()


@pytest.mark.parametrize("dim", [0, 1, -2, -1])
def test_product_is_over_the_given_dimension(dim):
    generator = torch.Generator().manual_seed(0)
    mean, variance = torch.randn(3, 4, generator=generator), torch.rand(3, 4, generator=generator) + 0.1
    found = gaussian_product(mean, variance, dim)
    rows = zip(mean.unbind(1 - dim % 2), variance.unbind(1 - dim % 2), strict=True)
    for at, (m, v) in enumerate(rows):
        alone = gaussian_product(m.unsqueeze(-1), v.unsqueeze(-1))
        torch.testing.assert_close((found[0][at], found[1][at]), (alone[0][0], alone[1][0]))


def test_factors_count_with_a_variance_of_1e_7_at_least():
    mean, variance = gaussian_product(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1e-12]]))
    assert mean.item() == pytest.approx(1.0)
    assert variance.item() == pytest.approx(0.5e-7, rel=1e-5)


@pytest.mark.parametrize("variance", [0.0, 1e-30, 1e-7, 1.0, 1e30])
def test_gradients_are_finite(variance):
    mean = torch.tensor([[3.0], [-2.0]], requires_grad=True)
    spread = torch.tensor([[variance], [1.0]], requires_grad=True)
    product = gaussian_product(mean, spread)
    (standard_normal_kl(*product).sum() + product[1].sqrt().sum()).backward()
    assert mean.grad.isfinite().all()
    assert spread.grad.isfinite().all()
    assert (mean.grad != 0).any()


def test_product_refuses_shapes_that_would_be_expanded():
    with pytest.raises(ValueError, match=r"one shape, got \[4, 2\] and \[4, 1\]"):
        gaussian_product(torch.zeros(4, 2), torch.ones(4, 1))


@property_test
@given(number, spread)
def test_kl_equals_torchs(mean, variance):
    one, other = (torch.tensor(value, dtype=torch.float64) for value in (mean, variance))
    expected = kl_divergence(Normal(one, other.sqrt()), Normal(torch.zeros_like(one), 1.0))
    torch.testing.assert_close(standard_normal_kl(one, other), expected)
    assert standard_normal_kl(one, other) >= -1e-12


def test_kl_of_the_prior_is_zero_and_its_least():
    mean, variance = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    divergence = standard_normal_kl(mean, variance)
    assert divergence.tolist() == [0.0, 0.0, 0.0]
    divergence.sum().backward()
    assert mean.grad.tolist() == variance.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("num", "expected"), [(64, 141.4), (100, 159.1), (256, 196.6), (1024, 251.9)])
def test_kl_of_an_ignorant_encoders_product(num, expected):
    """16 tasks and 5 dimensions of transitions that all say N(0, softplus(0)): PEARL's first update."""
    shape = (16, num, 5)
    belief = gaussian_product(torch.zeros(shape), torch.full(shape, math.log(2)))
    assert standard_normal_kl(*belief).sum().item() == pytest.approx(expected, abs=0.1)
