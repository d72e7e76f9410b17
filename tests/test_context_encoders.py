"""Context encoders: what they read, what they say before they are trained, what they remember."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_encoders import HIDDEN, INPUT, KINDS, OUTPUT, PER_TRANSITION, make, seeded  # noqa: F401
from torch import nn
from torch.nn import functional as F

from torchrl_mouse.modules import CONTEXT_ENCODERS, BayesianContextEncoder, PyTorchModule, fanin_init

# --- the base


def test_init_params_are_the_arguments_of_the_class_itself():
    class Base(PyTorchModule):
        def __init__(self, sizes, **kwargs):
            self.save_init_params(locals())
            super().__init__()
            self.inner = nn.Linear(1, 1)

    class Derived(Base):
        def __init__(self, first, **kwargs):
            self.save_init_params(locals())
            super().__init__([first], **kwargs)

    module = Derived(3, rate=0.5)
    assert module.init_params == {"first": 3, "rate": 0.5}
    assert set(module.state_dict()) == {"inner.weight", "inner.bias"}
    assert Base([1]).init_params == {"sizes": [1]}


@pytest.mark.parametrize("kind", KINDS)
def test_init_params_make_another_one(kind):
    kwargs = {"attention": {"num_heads": 2}, "bayesian": {"size": 8}}.get(kind, {})
    encoder = make(kind, **kwargs)
    assert encoder.init_params.items() >= kwargs.items()
    other = type(encoder)(**encoder.init_params)
    other.load_state_dict(encoder.state_dict())
    rows = torch.randn(2, 4, INPUT)
    assert torch.equal(other.eval()(rows), encoder(rows))


def test_fanin_counts_the_outputs():
    weight = fanin_init(torch.empty(16, 4000))
    assert 0.249 < weight.max() <= 0.25
    assert -0.25 <= weight.min() < -0.249
    assert abs(weight.mean()) < 2e-3


def test_fanin_is_of_matrices():
    with pytest.raises(ValueError, match=r"weight must be a matrix, got shape \[3\]"):
        fanin_init(torch.empty(3))


# --- the encoders


@pytest.mark.parametrize("kind", KINDS)
def test_initialisation(kind):
    encoder = CONTEXT_ENCODERS[kind]([200, 100, 40], 27, 10)
    linears = [layer for layer in getattr(encoder, "hidden_layers", ()) if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linears] == (
        [] if kind == "linear" else [(200, 27), (100, 200), (40, 100)]
    )
    for layer in linears:
        bound = 1 / math.sqrt(layer.out_features)
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert torch.equal(layer.bias, torch.full_like(layer.bias, 0.1))
    for parameter in encoder.last_fc.parameters() if kind != "bayesian" else ():
        assert 1e-3 < parameter.abs().max() <= 3e-3
    assert (encoder.hidden_sizes, encoder.input_size, encoder.output_size) == ([200, 100, 40], 27, 10)


def test_sizes_of_the_baselines():
    recurrent, attention = (CONTEXT_ENCODERS[kind]([200] * 3, 5, 10) for kind in ("recurrent", "attention"))
    assert (recurrent.lstm.input_size, recurrent.lstm.hidden_size, recurrent.lstm.num_layers) == (200, 200, 1)
    assert (attention.attention.embed_dim, attention.attention.num_heads) == (200, 4)
    assert attention.norm.normalized_shape == (200,)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bayesian"])
def test_untrained_encoders_say_nothing(kind, training):
    encoder = CONTEXT_ENCODERS[kind]([200] * 3, 5, 10).train(training)
    mean, spread = encoder(torch.randn(16, 30, 5)).chunk(2, -1)
    assert mean.abs().max() < 0.1
    assert (F.softplus(spread) - math.log(2)).abs().max() < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_output_shapes(kind):
    encoder = make(kind)
    expected = (4, 7, OUTPUT) if kind in PER_TRANSITION else (4, OUTPUT)
    rows = torch.randn(4, 7, INPUT)
    output = encoder(rows)
    assert output.shape == expected
    encoder.reset(4)
    for each in encoder(rows, return_preactivations=True):
        torch.testing.assert_close(each, output)


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_without_tasks_is_one_task(kind):
    encoder, rows = make(kind), torch.randn(3, 7, INPUT)
    together = encoder(rows)
    for row, expected in zip(rows, together, strict=True):
        encoder.reset()
        torch.testing.assert_close(encoder(row), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_do_not_see_each_other(kind):
    encoder, rows = make(kind), torch.randn(3, 7, INPUT)
    before = encoder(rows)
    rows[1] += 1
    encoder.reset(3)
    after = encoder(rows)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]])
    assert (after[1] - before[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["linear", "mlp", "attention", "bayesian"])
def test_order_does_not_matter(kind):
    encoder, rows = make(kind), torch.randn(3, 7, INPUT)
    order = torch.randperm(7)
    output, shuffled = encoder(rows), encoder(rows[:, order])
    torch.testing.assert_close(shuffled, output[:, order] if kind in PER_TRANSITION else output)


def test_attention_is_added_to_what_reads():
    encoder, rows = make("attention"), torch.randn(3, 7, INPUT)
    embed = encoder.hidden_layers(rows)
    attended, _ = encoder.attention(embed, embed, embed)
    expected = F.layer_norm(embed + attended, (HIDDEN[-1],), encoder.norm.weight, encoder.norm.bias)
    torch.testing.assert_close(encoder(rows), encoder.last_fc(expected))


def test_attention_reads_all_transitions():
    encoder, rows = make("attention"), torch.randn(1, 7, INPUT, requires_grad=True)
    encoder(rows)[:, 0].sum().backward()
    assert (rows.grad.abs().amax(-1) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_all_parameters_learn(kind):
    encoder, rows = make(kind).train(), torch.randn(4, 7, INPUT)
    rows[0, :, -1] = 0  # "bayesian" has parameters for contexts without rewards
    (encoder(rows) - 1).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_is_copied_and_saved_after_a_call(kind):
    encoder, rows = make(kind), torch.randn(4, 7, INPUT)
    shapes = {name: value.shape for name, value in encoder.state_dict().items()}
    encoder(rows).sum().backward()
    twin = copy.deepcopy(encoder)
    assert {name: value.shape for name, value in encoder.state_dict().items()} == shapes
    torch.testing.assert_close(twin(rows), encoder(rows))  # State and all.
    fresh = make(kind)
    fresh.load_state_dict(encoder.state_dict())
    encoder.reset(4)
    torch.testing.assert_close(fresh(rows), encoder(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_calls_in_a_row_can_be_trained(kind):
    encoder = make(kind)
    for _ in range(2):  # A graph that is kept would fail in the second backward pass.
        encoder(torch.randn(4, 7, INPUT)).sum().backward()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (([0], 5, 6), "hidden_sizes must be at least 1, got 0"),
        (([8], 0, 6), "input_size must be at least 1, got 0"),
        (([8], 5, -1), "output_size must be at least 1, got -1"),
    ],
)
def test_sizes_are_checked(sizes, message):
    with pytest.raises(ValueError, match=message):
        CONTEXT_ENCODERS["mlp"](*sizes)


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="width must be a multiple of num_heads, got 6 and 4"):
        CONTEXT_ENCODERS["attention"]([8, 6], INPUT, OUTPUT)


# --- recurrent


def test_recurrent_is_an_lstm_from_the_hidden_state_and_no_cell_state():
    encoder, rows = make("recurrent"), torch.randn(3, 7, INPUT)
    hidden = torch.zeros(1, 3, HIDDEN[-1])
    for part in (rows[:, :4], rows[:, 4:]):
        out, (hidden, _) = encoder.lstm(encoder.hidden_layers(part), (hidden, torch.zeros_like(hidden)))
        torch.testing.assert_close(encoder(part), encoder.last_fc(out[:, -1]))
        torch.testing.assert_close(encoder.hidden, hidden)


def test_recurrent_reads_in_order():
    encoder, rows = make("recurrent"), torch.randn(3, 7, INPUT)
    forwards = encoder(rows)
    encoder.reset(3)
    assert (encoder(rows.flip(1)) - forwards).abs().max() > 1e-3


def test_recurrent_remembers_until_the_reset():
    encoder, rows = make("recurrent"), torch.randn(3, 7, INPUT)
    first = encoder(rows)
    assert (encoder(rows) - first).abs().max() > 1e-3
    encoder.reset(3)
    assert torch.equal(encoder(rows), first)
    assert not encoder.hidden.requires_grad


def test_recurrent_refuses_other_tasks_between_resets():
    encoder = make("recurrent")
    encoder(torch.randn(3, 7, INPUT))
    with pytest.raises(RuntimeError, match=r"number of tasks must not change between resets, got 2 after 3"):
        encoder(torch.randn(2, 7, INPUT))
    encoder.reset(2)
    assert encoder(torch.randn(2, 7, INPUT)).shape == (2, OUTPUT)


def test_only_recurrent_ones_ask_for_trajectories():
    assert [kind for kind in KINDS if CONTEXT_ENCODERS[kind].IS_RECURRENT] == ["recurrent"]


# --- bayesian


def test_bayesian_belief_is_that_of_linear_regression():
    """Against the definition, one measurement after the other (a Kalman filter's updates), in plain numbers."""
    encoder = BayesianContextEncoder(HIDDEN, INPUT, OUTPUT, num_measurements=2, size=3)
    context = torch.randn(1, 7, INPUT)
    measured = encoder.measure(context).detach().double().reshape(14, 4)
    mean, covariance = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    for *what, much in measured:
        what = torch.stack(what)
        gain = covariance @ what / (what @ covariance @ what + 1)
        mean, covariance = mean + gain * (much - what @ mean), covariance - gain.outer(what @ covariance)
    project = encoder.projection.weight.detach().double()
    project = project / project.norm(dim=1, keepdim=True)
    loc, spread = encoder(context)[0].detach().double().chunk(2)
    torch.testing.assert_close(loc, project @ mean, rtol=1e-5, atol=1e-6)
    variance = (project @ covariance @ project.mT).diagonal()
    torch.testing.assert_close(nn.functional.softplus(spread), variance, rtol=1e-5, atol=1e-7)


@given(num=st.integers(1, 40), more=st.integers(1, 1000), seed=st.integers(0, 99), scale=st.sampled_from([0.01, 1, 30]))
@settings(max_examples=25, deadline=None)
def test_bayesian_belief_only_gets_surer(num, more, seed, scale):
    torch.manual_seed(seed)
    encoder, context = BayesianContextEncoder(HIDDEN, INPUT, OUTPUT), scale * torch.randn(2, num + more, INPUT)
    before, after = (
        nn.functional.softplus(encoder(seen).chunk(2, -1)[1].detach()) for seen in (context[:, :num], context)
    )
    assert (before <= 1 + 1e-5).all()  # the prior's
    assert (after <= before * (1 + 1e-4) + 1e-7).all()
    assert after.isfinite().all()


def test_no_reward_measures_nothing():
    encoder, rows = make("bayesian"), torch.randn(3, 9, INPUT)
    rows[:, ::2, -1] = 0
    torch.testing.assert_close(encoder(rows), encoder(rows[:, 1::2]))


def test_without_rewards_beliefs_of_training_are_tried_out():
    encoder, rows = make("bayesian").train(), torch.randn(6, 9, INPUT)
    rows[4:, :, -1] = 0
    nn.init.normal_(encoder.codes)
    beliefs = encoder(rows)
    other = make("bayesian")
    other.load_state_dict(encoder.state_dict())
    several = torch.cat([rows[:1], rows[4:5].expand(9999, -1, -1)])
    tried = other(several)
    torch.testing.assert_close(tried[0], encoder.eval()(rows[:1])[0])
    assert {tuple(row) for row in tried[1:].tolist()} == {tuple(row) for row in encoder.known.tolist()}
    assert torch.equal(encoder.known[:6], beliefs)
    mean, spread = encoder.known[6:].chunk(2, -1)
    assert (mean == 0).all(), "the prior, before anything is known"
    torch.testing.assert_close(nn.functional.softplus(spread), torch.ones_like(spread))


def test_contexts_without_rewards_are_learned_by_heart():
    encoder = make("bayesian").train()
    rows, goals = torch.randn(8, 100, INPUT), torch.randn(8, OUTPUT)
    rows[..., -1] = 0
    optimizer = torch.optim.Adam([encoder.codes], lr=1e-3)

    def drawn():
        return rows[torch.arange(8).unsqueeze(1), torch.randint(100, (8, 50))]  # in any order, some of them twice

    for _ in range(500):
        optimizer.zero_grad()
        (encoder(drawn()) - goals).square().mean().backward()
        optimizer.step()
    assert (encoder(drawn()) - goals).abs().max() < 0.3
    strangers = torch.randn_like(rows)
    strangers[..., -1] = 0
    assert encoder(strangers).abs().mean() < 0.1 * goals.abs().mean(), "in a table nearly empty, new ones say nothing"
    mixed = torch.randn(4, 9, INPUT)
    mixed[1::2, :, -1] = 0
    assert torch.equal(encoder(mixed)[::2], encoder(mixed[::2])), "codes are not read beside rewards"


def test_codes_are_those_of_whole_transitions():
    encoder = make("bayesian")
    number = torch.arange(len(encoder.codes), dtype=torch.float32)
    encoder.codes.data.copy_(number.unsqueeze(1).expand(-1, OUTPUT))
    for first in range(INPUT - 1):
        rows = torch.zeros(10_000, 1, INPUT)
        rows[:, 0, first : first + 2] = torch.cartesian_prod(torch.arange(100.0), torch.arange(100.0))
        assert len(encoder.recall(rows)[:, 0].unique()) > 9000, "9276 by chance"
    near = torch.ones(INPUT, 1, INPUT)
    alike = encoder.recall(near)
    near[:, 0].diagonal().copy_(torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)))
    assert (encoder.recall(near) != alike).any(1).all(), "the smallest difference counts"


def test_dense_rewards_leave_the_codes_alone():
    encoder = make("bayesian").train()
    encoder(torch.randn(6, 9, INPUT)).sum().backward()
    assert encoder.codes.grad is None


def test_some_rewards_are_read_in_training_where_they_are_sparse():
    encoder, rows = make("bayesian"), torch.randn(8000, 64, INPUT)
    rows[1:, 32:, -1] = 0
    with torch.no_grad():
        assert (encoder.measure(rows[1:]).any(-1).sum(1) == 32).all(), "all in evaluation"
        read = encoder.train().measure(rows).any(-1)
    assert read[0].all(), "all where none is zero, whatever other tasks have"
    read = read[1:]
    assert not read[:, 32:].any()
    number = read.sum(1)
    for low in (1, 2, 4, 8, 16):  # a fifth each, if they were uniform in their logarithm
        assert 0.13 < ((number >= low) & (number < 2 * low)).double().mean() < 0.3
    assert number.max() <= 32
    assert (read[:, :32].double().mean(0) - number.double().mean() / 32).abs().max() < 0.03


def test_dense_rewards_move_no_random_state():
    encoder, rows = make("bayesian"), torch.randn(6, 9, INPUT)
    before = torch.get_rng_state()
    for mode in (True, False):
        encoder.train(mode)(rows)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_not_finite_is_not_tried_out():
    encoder, rows = make("bayesian").train(), torch.randn(6, 9, INPUT)
    rows[2, 3, -1] = float("nan")
    encoder(rows)
    assert encoder.known.isfinite().all()
    assert (encoder.known[:5] != encoder.known[5]).any(1).all(), "the other five are"


def test_what_is_known_is_of_the_last_updates():
    encoder = make("bayesian").train()
    for _ in range(30):
        beliefs = encoder(torch.randn(16, 9, INPUT))
    assert len(encoder.known) == 256
    torch.testing.assert_close(encoder.known[:16], beliefs)
    assert not encoder.known.requires_grad


@pytest.mark.parametrize("name", ["num_measurements", "size"])
def test_bayesian_sizes(name):
    with pytest.raises(ValueError, match=f"BayesianContextEncoder: {name} must be at least 1, got 0"):
        BayesianContextEncoder(HIDDEN, INPUT, OUTPUT, **{name: 0})
