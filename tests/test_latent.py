"""Networks that a latent tells the task: PEARL's sizes, initialisation and bounds."""

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from torchrl_mouse.modules import latent_actor, latent_qvalue, latent_value


@pytest.mark.parametrize(
    ("make", "inputs", "outputs", "last"),
    [
        (lambda: latent_actor(20, 6, 5), 25, 12, 1e-3),
        (lambda: latent_qvalue(20, 6, 5), 31, 1, 3e-3),
        (lambda: latent_value(20, 5), 25, 1, 3e-3),
    ],
)
def test_weights_begin_as_pearls(make, inputs, outputs, last):
    weights = [parameter.detach() for parameter in make().parameters()]
    assert [list(weight.shape) for weight in weights] == [
        *([300, inputs], [300]),
        *([300, 300], [300]) * 2,
        *([outputs, 300], [outputs]),
    ]
    *hidden, head, bias = weights
    for weight in hidden[::2]:  # uniform, by the number of outputs: 300 whatever is read
        bound = 300**-0.5
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert all((values == 0.1).all() for values in hidden[1::2])
    assert 0.95 * last < head.abs().max() <= last
    assert 0 < bias.abs().max() <= last


@pytest.mark.parametrize(("output", "log_scale"), [(-30.0, -20.0), (-3.0, -3.0), (1.5, 1.5), (7.0, 2.0)])
def test_scale_of_actions_is_bounded(output, log_scale):
    actor = latent_actor(2, 3, 5, hidden_sizes=(8,))
    *_, head, bias = actor.parameters()
    head.data.zero_()
    bias.data = torch.tensor([9.0, -0.5, 0.0, output, output, output])
    steps = TensorDict({"observation": torch.randn(4, 2), "latent": torch.randn(4, 5)}, [4])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        actor(steps)
    torch.testing.assert_close(steps["scale"], torch.full((4, 3), math.exp(log_scale)))
    torch.testing.assert_close(steps["loc"], bias.data[:3].expand(4, 3))
    torch.testing.assert_close(steps["action"], bias.data[:3].tanh().expand(4, 3), atol=1e-5, rtol=0)
