"""TorchRL's own actor-critic losses train the trunk, on point-robot."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ValueOperator, set_recurrent_mode
from torchrl.objectives import ClipPPOLoss, LossModule, SACLoss, SoftUpdate

from torchrl_mouse import schema
from torchrl_mouse.envs import DecisionMask, PointRobotEnv, TaskEnv
from torchrl_mouse.models import MouseModel
from torchrl_mouse.modules import SwiGLUHead
from torchrl_mouse.modules.actors import gaussian_policy
from torchrl_mouse.objectives import CombinedLoss

ROWS, EPISODES = 64, 2
HIDDEN = 32


def make_env(seed=0):
    return TaskEnv(PointRobotEnv([[0.8, -0.6]], batch_size=ROWS, seed=seed), episodes_per_task=EPISODES)


def make_model(env):
    torch.manual_seed(0)
    return MouseModel.from_specs(
        env,
        hidden_dim=HIDDEN,
        embedding_kwargs={"std": 0.5, "continuous_encoder": "linear", "fourier_in_min": 1.0, "max_num_time_steps": 21},
        backbone_kwargs={"num_layers": 2, "num_heads": 2},
        gaussian_head_kwargs={"hidden_dim": HIDDEN, "scale": 0.1},
    )


# Starts are random, so what the next episode is worth is noise to the actions of this one: no bootstrapping from it.
ENDS = {"done": schema.PREVIOUS_TRUNCATED, "terminated": schema.PREVIOUS_TRUNCATED}


class ActionValue(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = SwiGLUHead(HIDDEN + 2, 1, hidden_dim=HIDDEN)

    def forward(self, hidden, action):
        return self.head(torch.cat([hidden, action], -1))


def ppo(model, env):
    actor = gaussian_policy(model.head("gaussian"), env.action_spec_unbatched)
    critic = ValueOperator(SwiGLUHead(HIDDEN, 1, hidden_dim=HIDDEN), in_keys=[schema.HIDDEN])
    loss = ClipPPOLoss(actor, critic, entropy_coeff=1e-3, critic_coeff=0.1, normalize_advantage=True)
    loss.make_value_estimator(gamma=0.9, lmbda=0.9)
    loss.set_keys(**ENDS)
    return loss


class TrunkSACLoss(SACLoss):
    """The critic alone moves the trunk (Yarats et al. 2021, arXiv:1910.01741): the actor would flatter the values."""

    def actor_loss(self, tensordict):
        return super().actor_loss(tensordict.detach())


def sac(model, env):
    actor = gaussian_policy(model.head("gaussian"), env.action_spec_unbatched)
    value = ValueOperator(ActionValue(), in_keys=[schema.HIDDEN, schema.ACTION])
    options = {"num_qvalue_nets": 2, "alpha_init": 0.01, "fixed_alpha": True}
    loss = TrunkSACLoss(actor, value, action_spec=env.action_spec_unbatched, **options)
    loss.make_value_estimator(gamma=0.9)
    loss.set_keys(**ENDS)
    return loss


LOSSES = {"ppo": ppo, "sac": sac}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_reach_trunk_and_heads(name):
    env = make_env()
    model = make_model(env)
    part = LOSSES[name](model, env)
    target = SoftUpdate(part, tau=0.02) if name == "sac" else None  # SAC warns without one
    loss = CombinedLoss(model.trunk, {name: part})
    with torch.no_grad():
        steps = env.rollout(41, model.actor(env.action_spec_unbatched), break_when_any_done=False)
    out = loss(steps)
    total = sum(value for key, value in out.items() if key.startswith("loss"))
    total.backward()
    gradients = {key: weight.grad for key, weight in model.named_parameters() if weight.requires_grad}
    missing = [key for key, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()]
    assert not missing
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    parameters = list(loss.parameters())
    assert len({id(parameter) for parameter in parameters}) == len(parameters)
    assert target is None or target.initialized


def test_what_comes_next_is_seen_after_all_that_came_before():
    env = make_env()
    model = make_model(env)
    steps = env.rollout(30, model.actor(env.action_spec_unbatched), break_when_any_done=False)
    seen = {}

    class Spy(TrunkSACLoss):
        def forward(self, tensordict):
            seen.update(root=tensordict["hidden"], following=tensordict["next", "hidden"])
            return super().forward(tensordict)

    part = sac(model, env)
    part.__class__ = Spy
    target = SoftUpdate(part, tau=0.02)
    loss = CombinedLoss(model.trunk, {"sac": part})
    loss(steps)
    target.step()
    assert ("next", schema.OBSERVATION) in loss.in_keys
    assert schema.HIDDEN not in loss.in_keys
    loss(steps.select(*loss.in_keys))  # it reads no more than it says
    # each next frame by itself at the end of what came before it
    for length in (1, 7, 30):
        frames = steps[:, :length].select(*model.trunk.in_keys)
        frames = torch.cat([frames, steps["next"].select(*model.trunk.in_keys)[:, length - 1 : length]], 1)
        with set_recurrent_mode(True):
            expected = model.trunk(frames)[schema.HIDDEN]
        torch.testing.assert_close(seen["following"][:, length - 1], expected[:, -1])
        torch.testing.assert_close(seen["root"][:, length - 1], expected[:, -2])


def test_a_missing_next_frame_is_named():
    env = make_env()
    model = make_model(env)
    loss = CombinedLoss(model.trunk, {"ppo": ppo(model, env)})
    with torch.no_grad():
        steps = env.rollout(5, model.actor(env.action_spec_unbatched))
    with pytest.raises(KeyError, match=r"'next', 'observation'"):
        loss(steps.exclude(("next", "observation")))


def test_losses_do_not_read_what_others_leave():
    env = make_env()
    model = make_model(env)

    class Leaving(LossModule):
        in_keys = (schema.HIDDEN,)
        out_keys = ("loss_leaving",)

        def forward(self, tensordict):
            tensordict["advantage"] = torch.full_like(tensordict["next", "reward"], 100.0)
            return TensorDict({"loss_leaving": tensordict[schema.HIDDEN].sum()})

    parts = {"leaving": Leaving(), "ppo": ppo(model, env)}
    with torch.no_grad():
        steps = env.rollout(41, model.actor(env.action_spec_unbatched))
    together = CombinedLoss(model.trunk, parts)(steps)
    alone = CombinedLoss(model.trunk, {"ppo": parts["ppo"]})(steps)
    torch.testing.assert_close(together["loss_objective"], alone["loss_objective"])
    assert "advantage" not in steps


def mean_return(model, env):
    """The return of the last of a task's episodes, without chance in the actions."""
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        steps = env.rollout(21 * EPISODES - 1, model.actor(env.action_spec_unbatched), break_when_any_done=False)
    return steps["next", "reward"][:, -20:].sum(1).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_the_trunk_learns(name):
    env = make_env()
    model = make_model(env)
    part = LOSSES[name](model, env)
    loss = CombinedLoss(model.trunk, {name: part})
    target = SoftUpdate(part, tau=0.05) if name == "sac" else None
    optimizer = torch.optim.AdamW(loss.parameters(), lr=3e-3)
    task = 21 * EPISODES - 1
    buffer = ReplayBuffer(storage=LazyTensorStorage(20 * ROWS), batch_size=16)
    before = mean_return(model, make_env(1))
    actor = model.actor(env.action_spec_unbatched)
    frames = {"frames_per_batch": ROWS * task, "total_frames": ROWS * task * 30}
    for batch in Collector(env, actor, postproc=DecisionMask(), **frames):
        batch["next", "reward"] += 1.0  # values near zero are learned sooner
        buffer.extend(batch)
        for _ in range(16 if name == "sac" else 5):
            losses = loss(buffer.sample() if name == "sac" else batch)
            sum(value for key, value in losses.items() if key.startswith("loss")).backward()
            torch.nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if target is not None:
                target.step()
        model.trunk.mark_weight_update()
    after = mean_return(model, make_env(1))
    # Standing still costs 26 on average, walking straight to the goal and waiting there 8.
    assert before < -20
    assert after > -13, (before, after)
