"""Actors in continuous spaces: the Gaussian head with TorchRL's distributions and losses."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import IndependentNormal, TanhNormal, set_recurrent_mode
from torchrl.objectives import ClipPPOLoss, SACLoss, SoftUpdate

from torchrl_mouse import schema
from torchrl_mouse.envs import TaskEnv
from torchrl_mouse.modules import DQNHead, GaussianHead, gaussian_policy, make_actor

BOUNDED = Bounded(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.5]))
CONTINUOUS = {"bounded": BOUNDED, "unbounded": Unbounded(2)}


def head_actor(network, spec, **options):
    """An actor whose hidden state is the observation."""
    trunk = TensorDictModule(torch.nn.Identity(), [schema.OBSERVATION], [schema.HIDDEN])
    return make_actor(trunk, TensorDictModule(network, [schema.HIDDEN], ["head"]), spec, **options)


def act(actor, hidden):
    return actor(TensorDict({schema.OBSERVATION: hidden}, hidden.shape[:-1]))


@pytest.mark.parametrize(("kind", "distribution"), [("bounded", TanhNormal), ("unbounded", IndependentNormal)])
def test_continuous_actions(kind, distribution):
    network, spec = GaussianHead(16, 2, hidden_dim=8), CONTINUOUS[kind]
    actor, hidden = head_actor(network, spec, action_key=("agent", "act")), torch.randn(1000, 16)
    out = act(actor, hidden)
    action = out["agent", "act"]
    assert spec.expand(1000, 2).is_in(action)
    location, scale = out["loc"], out["scale"]
    assert torch.equal(location, network(hidden)[:, :2])
    assert torch.equal(scale, NormalParamExtractor()(network(hidden))[1])
    assert (scale > 0).all()
    policy = actor.get_dist(out)
    assert type(policy) is distribution
    torch.testing.assert_close(out["agent", "act_log_prob"], policy.log_prob(action), atol=1e-3, rtol=1e-3)
    # What the action was before it was squashed into the bounds is standard normal around the location.
    unsquashed = ((action - BOUNDED.space.low) / (BOUNDED.space.high - BOUNDED.space.low) * 2 - 1).atanh()
    noise = ((unsquashed if kind == "bounded" else action) - location) / scale
    torch.testing.assert_close(noise.mean(0), torch.zeros(2), atol=0.12, rtol=0)
    torch.testing.assert_close(noise.std(0), torch.ones(2), atol=0.12, rtol=0)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        still = act(actor, hidden)["agent", "act"]
    expected = torch.tensor([0.0, 0.25]) + torch.tensor([1.0, 0.25]) * location.tanh()
    torch.testing.assert_close(still, expected if kind == "bounded" else location)


def test_continuous_actor_in_both_modes(make_trunk, random_steps):
    trunk, steps = make_trunk(), random_steps(3, 6, [[0, 4], [0], [0, 2]])
    actor = make_actor(trunk, TensorDictModule(GaussianHead(16, 2), [schema.HIDDEN], ["gaussian"]), BOUNDED)
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        with set_recurrent_mode(True):
            window = actor(steps.clone())
        stepped = torch.stack([actor(steps[:, t].clone()) for t in range(6)], 1)
    for key in (schema.ACTION, "action_log_prob"):
        torch.testing.assert_close(stepped[key], window[key], atol=1e-5, rtol=1e-5)
    assert window[schema.ACTION].std() > 0.05


class Drift(EnvBase):
    """A point that is moved by bounded steps."""

    def __init__(self):
        super().__init__(batch_size=[3])
        self.place = torch.zeros(3, 2)
        self.observation_spec = Composite({schema.OBSERVATION: Unbounded((3, 2))}, shape=[3])
        self.action_spec = BOUNDED.expand(3, 2)
        self.reward_spec = Unbounded((3, 1))

    def sample_task(self, mask):
        pass

    def _reset(self, tensordict):
        rows = slice(None) if tensordict is None else tensordict["_reset"].reshape(-1)
        self.place = self.place.clone()
        self.place[rows] = 0
        return TensorDict({schema.OBSERVATION: self.place}, [3])

    def _step(self, tensordict):
        self.place = self.place + tensordict[schema.ACTION]
        distance = self.place.norm(dim=-1, keepdim=True)
        end = {"reward": -distance, "done": distance > 2, "terminated": distance > 2}
        return TensorDict({schema.OBSERVATION: self.place, **end}, [3])

    def _set_seed(self, seed):
        torch.manual_seed(seed or 0)


def test_continuous_actions_in_a_collector(make_trunk):
    env = TaskEnv(Drift(), steps_per_task=20)
    trunk = make_trunk({"max_num_actions": 0, "max_num_obs_discrete": 0, "max_num_time_steps": 0})
    head = TensorDictModule(GaussianHead(16, 2), [schema.HIDDEN], ["gaussian"])
    collector = Collector(env, make_actor(trunk, head, env.action_spec_unbatched), frames_per_batch=120)
    batch = next(iter(collector))
    collector.shutdown()
    assert BOUNDED.expand(3, 40, 2).is_in(batch[schema.ACTION])
    assert batch[schema.ACTION].std(1).min() > 0.05
    assert batch["action_log_prob"].shape == (3, 40)
    with set_recurrent_mode(True), torch.no_grad():  # What a loss that reads the trunk computes again.
        distribution = gaussian_policy(head, BOUNDED).get_dist(trunk(batch.clone()))
    torch.testing.assert_close(
        distribution.log_prob(batch[schema.ACTION]), batch["action_log_prob"], atol=1e-3, rtol=1e-3
    )


class Critic(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(18, 1)

    def forward(self, hidden, action):
        return self.linear(torch.cat([hidden, action], -1))


def test_gaussian_policy_in_torchrls_losses():
    head = GaussianHead(16, 2)
    policy = gaussian_policy(TensorDictModule(head, [schema.HIDDEN], ["gaussian"]), BOUNDED)
    assert policy.in_keys == [schema.HIDDEN]
    batch = policy(TensorDict({schema.HIDDEN: torch.randn(5, 4, 16)}, [5, 4])).detach()
    zeros, flags = torch.zeros(5, 4, 1), torch.zeros(5, 4, 1, dtype=torch.bool)
    batch["next"] = {schema.HIDDEN: torch.randn(5, 4, 16), "reward": zeros, "done": flags, "terminated": flags}
    batch["advantage"], batch["value_target"] = torch.randn(5, 4, 1), zeros
    value = TensorDictModule(torch.nn.Linear(16, 1), [schema.HIDDEN], ["state_value"])
    out = ClipPPOLoss(policy, value)(batch.clone())
    torch.testing.assert_close(out["mean_ratio"], torch.tensor(1.0), atol=1e-3, rtol=0)  # The log-probability is found.
    (out["loss_objective"] + out["loss_entropy"]).backward()
    assert all((parameter.grad != 0).any() for parameter in head.parameters())
    head.zero_grad()
    critic = TensorDictModule(Critic(), [schema.HIDDEN, schema.ACTION], ["state_action_value"])
    sac = SACLoss(policy, critic, action_spec=BOUNDED)
    SoftUpdate(sac, tau=0.01)
    sac(batch.clone())["loss_actor"].backward()
    assert all((parameter.grad != 0).any() for parameter in head.parameters())


def test_continuous_spaces_that_do_not_fit():
    gaussian, scores = GaussianHead(16, 2), DQNHead(16, 2)
    refused = r"spec of a GaussianHead must be Bounded or Unbounded and continuous, got {}\. Act with a head of scores"
    for spec in (Categorical(2), OneHot(2), Bounded(0, 3, shape=(2,), dtype=torch.int64)):
        with pytest.raises(TypeError, match=refused.format(type(spec).__name__)):
            head_actor(gaussian, spec)
    for spec in CONTINUOUS.values():
        found = (
            rf"Categorical or OneHot, got {type(spec).__name__} for a head of type SwiGLUHead\. Continuous .* Gaussian"
        )
        with pytest.raises(TypeError, match=found):
            head_actor(scores, spec)
    with pytest.raises(TypeError, match=r"the head must be a GaussianHead, got SwiGLUHead for BoundedContinuous\."):
        gaussian_policy(TensorDictModule(scores, [schema.HIDDEN], ["dqn"]), BOUNDED)
    for spec in (Unbounded(3), Unbounded((4, 2)), Bounded(-1.0, 1.0, shape=())):
        with pytest.raises(ValueError, match=r"the action spec must have the head's shape \(2,\), got \("):
            head_actor(gaussian, spec)
    with pytest.raises(ValueError, match=r"must be finite, got \[-1\.0, -1\.0\] to \[inf, inf\]\. Use an Unbounded"):
        head_actor(gaussian, Bounded(-1.0, torch.inf, shape=(2,)))


@pytest.mark.parametrize(
    ("option", "got"),
    [
        ({"temperature": 0.5}, "0.5, None and None"),
        ({"num_actions": 2}, "0.0, 2 and None"),
        ({"action_mask_key": "action_mask"}, "0.0, None and 'action_mask'"),
    ],
)
def test_options_of_discrete_spaces_are_refused(option, got):
    with pytest.raises(ValueError, match=rf"must be left out for a GaussianHead, got {got}\. It draws with a spread"):
        head_actor(GaussianHead(16, 2), BOUNDED, **option)
