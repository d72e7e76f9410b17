"""Pure tensor maths against loops and closed forms."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from torchrl_mouse.functional import (
    SP_LOSSES,
    SV_LOSSES,
    conservative_penalty,
    episode_discount,
    greedy_vector,
    masked_moments,
    normalize_reward,
    rope_rotate,
    td_target,
    teacher_cross_entropy,
    vec_dqn_cost,
    vec_dqn_scores,
)

INF, NAN = float("inf"), float("nan")
property_test = settings(max_examples=60, deadline=None, database=None)


def test_td_target_by_hand():
    reward, value = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])
    y = td_target(reward, value, torch.tensor([0.5, 0.9, 0.0]), scale=2.0, shift=0.25)
    assert torch.allclose(y, torch.tensor([7.25, 14.25, 6.25]))


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_td_target_never_reads_what_counts_for_nothing(garbage):
    reward = torch.ones(2, requires_grad=True)
    y = td_target(reward, torch.tensor([garbage, 1.0], requires_grad=True), torch.tensor([0.0, 0.5]))
    assert y.tolist() == [1.0, 1.5]
    assert not y.requires_grad


values = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=6)


@property_test
@given(values, st.data())
def test_conservative_penalty_closed_form(row, data):
    taken = data.draw(st.integers(0, len(row) - 1))
    action_value = torch.tensor(row, dtype=torch.float64)
    penalty = conservative_penalty(action_value, action_value[taken])
    closed = math.log(math.fsum(math.exp(value - row[taken]) for value in row))
    assert penalty.item() == pytest.approx(closed, abs=1e-9)
    assert penalty.item() >= 0


def test_conservative_penalty_gradient_is_softmax_minus_taken():
    action_value = torch.tensor([[0.3, -1.0, 2.0]], requires_grad=True)
    conservative_penalty(action_value, action_value[:, 1]).sum().backward()
    expected = action_value.detach().softmax(-1) - torch.tensor([[0.0, 1.0, 0.0]])
    assert torch.allclose(action_value.grad, expected, atol=1e-6)


def random_teacher(seed=0, rows=16, actions=5):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, actions, generator=generator) * 3
    return logits, torch.randn(rows, actions, generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_equals_torchs(smoothing):
    logits, q_star = random_teacher()
    expected = F.cross_entropy(logits, q_star.argmax(-1), reduction="none", label_smoothing=smoothing)
    assert torch.allclose(teacher_cross_entropy(logits, q_star, smoothing), expected, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_padding_equals_the_smaller_action_space(smoothing):
    logits, q_star = random_teacher()
    padded = q_star.clone()
    padded[:, 3:] = -INF
    assert torch.allclose(
        teacher_cross_entropy(logits, padded, smoothing),
        teacher_cross_entropy(logits[:, :3], q_star[:, :3], smoothing),
        atol=1e-6,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_padded_actions_get_no_gradient(smoothing):
    logits, q_star = random_teacher()
    q_star[:, 1] = -INF
    logits[:, 1] = 30.0  # Would swallow all the probability.
    logits.requires_grad_()
    cost = teacher_cross_entropy(logits, q_star, smoothing)
    cost.sum().backward()
    assert (logits.grad[:, 1] == 0).all()
    assert (logits.grad[:, [0, 2, 3, 4]] != 0).all()
    assert torch.allclose(logits.grad.sum(-1), torch.zeros(len(logits)), atol=1e-5)


def test_ties_share_the_label_evenly():
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0]])
    q_star = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    expected = -logits.log_softmax(-1)[0, [0, 1, 3]].mean()
    assert teacher_cross_entropy(logits, q_star).item() == pytest.approx(expected.item(), abs=1e-6)


def test_nan_entries_are_no_teacher():
    logits, q_star = random_teacher()
    expected = q_star.clone()
    q_star[:, 2], expected[:, 2] = NAN, -INF
    assert torch.equal(teacher_cross_entropy(logits, q_star), teacher_cross_entropy(logits, expected))


@pytest.mark.parametrize("nothing", [[-INF, -INF, -INF], [NAN, NAN, NAN], [NAN, -INF, NAN]])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_rows_without_teacher_cost_nothing(nothing, smoothing):
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    cost = teacher_cross_entropy(logits, torch.tensor([nothing, [0.0, 2.0, 1.0]]), smoothing)
    assert cost[0] == 0
    assert cost[1] > 0
    with torch.autograd.set_detect_anomaly(True):  # No NaN on the way either.
        cost.sum().backward()
    assert (logits.grad[0] == 0).all()
    assert logits.grad[1].isfinite().all()
    assert (logits.grad[1] != 0).all()


def policy_divergences(logits, q_star, temperature, smoothing):
    """Every variant with torch's own divergences."""
    p = (1 - smoothing) * (q_star / temperature).softmax(-1) + smoothing / q_star.shape[-1]
    q = logits.softmax(-1)
    middle = (p + q) / 2

    def kl(one, other):
        return F.kl_div(other.log(), one, reduction="none").sum(-1)

    return {
        "ce": F.cross_entropy(logits, q_star.argmax(-1), reduction="none", label_smoothing=smoothing),
        "ce-soft-fwd": F.cross_entropy(logits, p, reduction="none"),
        "ce-soft-bwd": -(q * p.log()).sum(-1),
        "kl-fwd": kl(p, q),
        "kl-bwd": kl(q, p),
        "js": (kl(p, middle) + kl(q, middle)) / 2,
    }


soft_losses = pytest.mark.parametrize("loss_type", SP_LOSSES)


@pytest.mark.parametrize("options", [(1.0, 0.0), (0.5, 0.2), (2.0, 0.0)])
def test_policy_losses_equal_torchs(options):
    logits, q_star = (entry.double() for entry in random_teacher())
    expected = policy_divergences(logits, q_star, *options)
    assert expected.keys() == SP_LOSSES.keys()
    for name, loss in SP_LOSSES.items():
        cost = loss(logits, q_star, temperature=options[0], label_smoothing=options[1])
        torch.testing.assert_close(cost, expected[name], msg=name)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@soft_losses
def test_policy_losses_give_padding_no_probability(loss_type, smoothing):
    logits, q_star = random_teacher()
    padded = q_star.clone()
    padded[:, 3:] = -INF
    logits[:, 4] = 30.0  # Would swallow all the probability.
    logits.requires_grad_()
    options = {"temperature": 0.5, "label_smoothing": smoothing}
    cost = SP_LOSSES[loss_type](logits, padded, **options)
    torch.testing.assert_close(cost, SP_LOSSES[loss_type](logits[:, :3], q_star[:, :3], **options))
    cost.sum().backward()
    assert (logits.grad[:, 3:] == 0).all()
    assert (logits.grad[:, :3] != 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@soft_losses
def test_policy_losses_cost_nothing_without_a_teacher(loss_type, smoothing):
    logits, q_star = random_teacher()
    logits.requires_grad_()
    q_star[0], q_star[1], q_star[2, :4] = -INF, NAN, -INF
    cost = SP_LOSSES[loss_type](logits, q_star, label_smoothing=smoothing)
    assert (cost[:3] == 0).all(), "with one action, there is nothing to learn either"
    assert (cost[3:] > 0).all()
    with torch.autograd.set_detect_anomaly(True):
        cost.sum().backward()
    assert (logits.grad[:2] == 0).all()
    assert logits.grad.isfinite().all()


@soft_losses
def test_policy_losses_are_finite_for_sharp_policies(loss_type):
    logits = torch.tensor([[0.0, 1e4], [1e4, 0.0]], requires_grad=True)
    cost = SP_LOSSES[loss_type](logits, torch.tensor([[1e4, 0.0], [1e4, 0.0]]))
    cost.sum().backward()
    assert cost.isfinite().all()
    assert cost[0] > 0.6  # log 2 at least
    assert cost[1].item() == pytest.approx(0.0, abs=1e-6)
    assert logits.grad.isfinite().all()


@soft_losses
def test_policy_losses_leave_the_teacher_alone(loss_type):
    logits, q_star = random_teacher()
    q_star.requires_grad_()
    SP_LOSSES[loss_type](logits.requires_grad_(), q_star).sum().backward()
    assert q_star.grad is None


def test_value_losses_are_means_over_finite_entries():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], requires_grad=True)
    q_star = torch.tensor([[3.0, 2.0, -INF], [NAN, INF, -INF], [7.0, 9.0, 12.0]])
    assert SV_LOSSES["mse"](values, q_star).tolist() == pytest.approx([2.0, 0.0, 10 / 3])
    assert SV_LOSSES["mae"](values, q_star).tolist() == pytest.approx([1.0, 0.0, 4 / 3])
    with torch.autograd.set_detect_anomaly(True):
        SV_LOSSES["mse"](values, q_star).sum().backward()
    expected = torch.tensor([[-2.0, 0, 0], [0, 0, 0], [0, -2 / 3, -2.0]])
    assert torch.allclose(values.grad, expected)


@pytest.mark.parametrize("loss_type", SV_LOSSES)
def test_value_losses_leave_the_teacher_alone(loss_type):
    values, q_star = random_teacher()
    q_star.requires_grad_()
    SV_LOSSES[loss_type](values.requires_grad_(), q_star).sum().backward()
    assert q_star.grad is None


def test_masked_moments_equal_torchs():
    values = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[0, 4:], valid[1, 1:], valid[2] = False, False, False
    mean, std = masked_moments(values.masked_fill(~valid, NAN), valid)
    assert torch.allclose(mean.squeeze(-1), torch.stack([values[0, :4].mean(), values[1, 0], torch.zeros(())]))
    assert torch.allclose(std.squeeze(-1), torch.stack([values[0, :4].std(), torch.zeros(()), torch.zeros(())]))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("std", [False, True])
def test_normalize_reward_is_per_sequence(mean, std):
    reward = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)) + 3
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 5:] = False
    options = {"normalize_reward_mean": mean, "normalize_reward_std": std, "normalize_reward_std_target": 2.0}
    out = normalize_reward(reward.masked_fill(~valid, NAN), valid, normalize_reward_eps=0.1, **options)
    for row, length in enumerate((9, 5)):
        known = reward[row, :length]
        expected = known - known.mean() if mean else known
        expected = expected / (known.std() + 0.1) * 2.0 if std else expected
        assert torch.allclose(out[row, :length], expected, atol=1e-6)
        assert (out[row, length:] == 0).all()


def test_normalize_reward_without_spread():
    reward, valid = torch.tensor([[2.0, 9.0], [0.0, 0.0]]), torch.tensor([[True, False], [True, True]])
    out = normalize_reward(reward, valid, normalize_reward_std=True, normalize_reward_std_target=5.0)
    assert out.tolist() == [[2.0, 0.0], [0.0, 0.0]], "one reward has no spread; no reward stays none"


@pytest.mark.parametrize("gamma", [0.5, torch.tensor(0.5)])
def test_episode_discount(gamma):
    terminated = torch.tensor([True, False, False, True])
    truncated = torch.tensor([False, True, False, True])
    assert episode_discount(terminated, truncated, gamma=gamma).tolist() == [0.0, 0.5, 0.5, 0.0]
    options = {"gamma_terminal": 0.25, "gamma_truncated": 0.0}
    assert episode_discount(terminated, truncated, gamma=gamma, **options).tolist() == [0.25, 0.0, 0.5, 0.25]


@pytest.fixture(scope="module")
def reference():
    """Vectors of size 2 and 4, their scores and their rotations by ``theta``, computed by MOUSE."""
    return load_file(Path(__file__).parent / "reference_vec_dqn" / "scores.safetensors")


@pytest.mark.parametrize("size", [2, 4])
def test_rotations_and_scores_equal_mouses(reference, size):
    vectors = reference[f"vecs{size}"]
    rotated = rope_rotate(vectors, reference["theta"])
    torch.testing.assert_close(rotated, reference[f"rotated{size}"], atol=1e-5, rtol=0)
    torch.testing.assert_close(vec_dqn_scores(vectors), reference[f"scores{size}"], atol=1e-5, rtol=0)


def random_vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signed_angle(start, end):
    """The second of two actions is ahead of the first by their angle."""
    return vec_dqn_scores(torch.stack((start, end), -2))[..., 1]


vectors_of_actions = st.tuples(st.integers(1, 5), st.sampled_from([2, 4, 6]), st.integers(0, 10_000)).map(
    lambda drawn: random_vectors(7, drawn[0], drawn[1], seed=drawn[2])
)
angles = st.floats(-10, 10)


@property_test
@given(vectors_of_actions, angles)
def test_rotation_keeps_the_norm_and_has_an_inverse(vectors, theta):
    theta = torch.full(vectors.shape[:-1], theta, dtype=vectors.dtype)
    rotated = rope_rotate(vectors, theta)
    torch.testing.assert_close(rotated.norm(dim=-1), vectors.norm(dim=-1))
    torch.testing.assert_close(rope_rotate(rotated, -theta), vectors)


@property_test
@given(vectors_of_actions, angles, angles)
def test_rotations_add_up(vectors, first, second):
    first, second = (torch.full(vectors.shape[:-1], angle, dtype=vectors.dtype) for angle in (first, second))
    torch.testing.assert_close(rope_rotate(rope_rotate(vectors, first), second), rope_rotate(vectors, first + second))


@property_test
@given(vectors_of_actions, angles)
def test_rotating_a_vector_shifts_its_angle_to_the_others(vectors, theta):
    other = random_vectors(*vectors.shape, seed=20_000)
    rotated = rope_rotate(vectors, torch.tensor(theta, dtype=vectors.dtype).expand(vectors.shape[:-1]))
    shift = signed_angle(other, rotated) - signed_angle(other, vectors) - theta
    torch.testing.assert_close(shift.cos(), torch.ones_like(shift))  # a whole number of turns
    torch.testing.assert_close(shift.sin(), torch.zeros_like(shift))


@property_test
@given(vectors_of_actions)
def test_scores_are_sums_of_signed_angles(vectors):
    pairs = [[signed_angle(i, a) for a in vectors.unbind(-2)] for i in vectors.unbind(-2)]
    angle = torch.stack([torch.stack(row, -1) for row in pairs], -2)
    torch.testing.assert_close(angle, -angle.mT)
    scores = vec_dqn_scores(vectors)
    torch.testing.assert_close(scores, angle.sum(-2))
    torch.testing.assert_close(scores.sum(-1), torch.zeros_like(scores.sum(-1)), atol=1e-10, rtol=0)


@property_test
@given(vectors_of_actions, st.floats(0.01, 100), angles)
def test_scores_depend_on_relative_directions_only(vectors, length, theta):
    everything = torch.full(vectors.shape[:-1], theta, dtype=vectors.dtype)
    torch.testing.assert_close(vec_dqn_scores(rope_rotate(length * vectors, everything)), vec_dqn_scores(vectors))


def test_actions_that_are_not_allowed_move_no_score():
    vectors, mask = random_vectors(4, 5, 4), torch.tensor([True, False, True, True, False])
    scores = vec_dqn_scores(vectors, mask.expand(4, 5))
    torch.testing.assert_close(scores[:, mask], vec_dqn_scores(vectors[:, mask]))
    assert not torch.allclose(vec_dqn_scores(vectors)[:, mask], scores[:, mask])
    torch.testing.assert_close(vec_dqn_scores(vectors, torch.ones(4, 5, dtype=torch.bool)), vec_dqn_scores(vectors))
    rows = torch.stack([mask, ~mask, mask, mask])  # Every row has a mask of its own.
    torch.testing.assert_close(vec_dqn_scores(vectors, rows)[1, ~mask], vec_dqn_scores(vectors[1, ~mask]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [0.0, 1e-40, 1e-20])
def test_vectors_without_direction_do_no_harm(length, dtype):
    vectors = random_vectors(3, 4, 2).to(dtype)
    vectors[:, :2] *= length
    vectors.requires_grad_()
    scores = vec_dqn_scores(vectors)
    with torch.autograd.set_detect_anomaly(True):
        scores.square().sum().backward()
    assert scores.isfinite().all()
    assert vectors.grad.isfinite().all()
    assert (vectors.grad[:, 2:] != 0).all()
    if length == 0:
        assert (scores[:, :2] == 0).all()
        assert (vectors.grad[:, :2] == 0).all()


@property_test
@given(vectors_of_actions)
def test_greedy_vector_has_the_highest_score(vectors):
    scores, greedy = vec_dqn_scores(vectors), greedy_vector(vectors)
    for row in range(len(vectors)):
        assert torch.equal(greedy[row], vectors[row, scores[row].argmax()])


@property_test
@given(st.integers(0, 10_000), angles)
def test_vec_dqn_cost_is_one_minus_the_cosine_and_does_not_move_the_target(seed, theta):
    vectors, following = random_vectors(5, 3, 2, seed=seed), random_vectors(5, 2, seed=seed + 1).requires_grad_()
    vectors.requires_grad_()
    action, turn = torch.tensor([0, 1, 2, 1, 0]), torch.full((5,), theta, dtype=torch.float64)
    cost = vec_dqn_cost(vectors, action, following, turn)
    angle = [torch.atan2(*pair.flip(-1).unbind(-1)) for pair in (vectors[range(5), action], following)]
    torch.testing.assert_close(cost, 1 - (angle[0] - angle[1] - turn).cos())
    cost.sum().backward()
    assert following.grad is None
    taken = torch.nn.functional.one_hot(action, 3).bool()
    assert (vectors.grad[~taken] == 0).all()


def test_greedy_vector_is_of_an_allowed_action():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    for action in range(3):
        allowed = torch.arange(3) == action
        assert torch.equal(greedy_vector(vectors, allowed), vectors[action])
