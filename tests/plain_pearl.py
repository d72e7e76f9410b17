"""PEARL's gradient step as a plain loop over networks: what ours must equal, and is timed against.

It does what the published code does at each step (arXiv 1903.08254): one network after the other, an optimizer for
each, a KL divergence and a product of Gaussians for each task, and gradients of the critics' weights in
the actor's loss, which are thrown away.
"""

import copy

import torch
from tensordict import TensorDict
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional
from torchrl.objectives import SoftUpdate

from torchrl_mouse.modules import ContextPosterior, latent_actor, latent_qvalue, latent_value, make_context_encoder
from torchrl_mouse.objectives import PEARLLoss

LATENT, TAU, LEARNING_RATE = 5, 0.005, 3e-4
GAMMA, REWARD_SCALE, KL_WEIGHT, REGULARIZATION = 0.99, 100.0, 0.1, 1e-3


def make_loss(observation_dim=2, action_dim=2, *, encoder="mlp", width=300, seed=0):
    torch.manual_seed(seed)
    size = observation_dim + action_dim + 1
    hidden = [width] * 3
    encoder = make_context_encoder(encoder, hidden_sizes=[200] * 3, input_size=size, output_size=2 * LATENT)
    loss = PEARLLoss(
        ContextPosterior(encoder),
        latent_actor(observation_dim, action_dim, LATENT, hidden_sizes=hidden),
        [latent_qvalue(observation_dim, action_dim, LATENT, hidden_sizes=hidden) for _ in range(2)],
        latent_value(observation_dim, LATENT, hidden_sizes=hidden),
        gamma=GAMMA,
        reward_scale=REWARD_SCALE,
        kl_weight=KL_WEIGHT,
        regularization=REGULARIZATION,
    )
    SoftUpdate(loss, tau=TAU)  # A loss warns that has no updater.
    return loss


def make_batch(observation_dim=2, action_dim=2, *, tasks=16, rows=256, context=64, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def frames(num):
        observation = torch.randn(tasks, num, observation_dim, generator=generator)
        return {"observation": observation, "action": torch.rand(tasks, num, action_dim, generator=generator) * 2 - 1}

    def reward(num):
        return -torch.rand(tasks, num, 1, generator=generator)

    following = {
        "observation": torch.randn(tasks, rows, observation_dim, generator=generator),
        "reward": reward(rows),
        "terminated": torch.rand(tasks, rows, 1, generator=generator) < 0.1,
    }
    seen = TensorDict({**frames(context), "reward": reward(context)}, [tasks, context])
    return TensorDict({**frames(rows), "next": following, "context": seen}, [tasks])


def plain(network):
    """Copies a network's layers into plain ones."""
    layers = []
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            linear = nn.Linear(layer.in_features, layer.out_features)
            linear.load_state_dict(layer.state_dict())
            layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class PlainPEARL:
    """Starts at a loss's weights."""

    def __init__(self, loss):
        self.encoder = plain(loss.posterior.encoder)
        with loss.actor_network_params.to_module(loss.actor_network):
            self.actor = plain(loss.actor_network)
        self.critics = []
        for params in loss.qvalue_network_params.unbind(0):
            with params.to_module(loss.qvalue_network):
                self.critics.append(plain(loss.qvalue_network))
        with loss.value_network_params.to_module(loss.value_network):
            self.value = plain(loss.value_network)
        self.target = copy.deepcopy(self.value)
        networks = {"encoder": self.encoder, "actor": self.actor, "value": self.value}
        networks |= {f"critic_{index}": critic for index, critic in enumerate(self.critics)}
        self.optimizers = {
            name: torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, foreach=False)
            for name, network in networks.items()
        }

    def infer(self, context):
        read = self.encoder(torch.cat([context[key] for key in ("observation", "action", "reward")], -1))
        loc, scale = [], []
        for task in read.unbind(0):
            variance = functional.softplus(task[:, LATENT:]).clamp(min=1e-7)
            product = 1 / (1 / variance).sum(0)
            loc.append(product * (task[:, :LATENT] / variance).sum(0))
            scale.append(product.sqrt())
        return torch.stack(loc), torch.stack(scale)

    def step(self, batch):
        """Makes a gradient step; returns the losses."""
        rows = batch["observation"].shape[1]
        loc, scale = self.infer(batch["context"])
        latent = loc + scale * torch.randn_like(scale)
        prior = Normal(torch.zeros(()), torch.ones(()))
        kl = sum(kl_divergence(Normal(*task), prior).sum() for task in zip(loc, scale, strict=True))
        latent = torch.cat([task.repeat(rows, 1) for task in latent])

        observation, action = batch["observation"].flatten(0, 1), batch["action"].flatten(0, 1)
        following = {key: batch["next", key].flatten(0, 1) for key in ("observation", "reward", "terminated")}
        with torch.no_grad():
            value = self.target(torch.cat([following["observation"], latent], -1))
        target = REWARD_SCALE * following["reward"] + GAMMA * (1 - following["terminated"].float()) * value
        steps = torch.cat([observation, action, latent], -1)
        loss_qvalue = sum((critic(steps) - target).square().mean() for critic in self.critics)
        frames = torch.cat([observation, latent.detach()], -1)
        mean, log_scale = self.actor(frames).chunk(2, -1)
        log_scale = log_scale.clamp(-20, 2)
        before = mean + log_scale.exp() * torch.randn(mean.shape)
        action = before.tanh()
        log_prob = Normal(mean, log_scale.exp()).log_prob(before) - (1 - action.square() + 1e-6).log()
        log_prob = log_prob.sum(-1, keepdim=True)
        value = self.value(frames)

        self._learn(KL_WEIGHT * kl + loss_qvalue, "encoder", "critic_0", "critic_1")
        steps = torch.cat([observation, action, latent.detach()], -1)
        least = torch.minimum(*(critic(steps) for critic in self.critics))
        loss_value = (value - (least - log_prob).detach()).square().mean()
        self._learn(loss_value, "value")
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.value.parameters(), strict=True):
                slow.copy_((1 - TAU) * slow + TAU * fast)
        penalty = REGULARIZATION * (mean.square().mean() + log_scale.square().mean())
        loss_actor = (log_prob - least).mean() + penalty
        self._learn(loss_actor, "actor")
        losses = {"loss_kl": KL_WEIGHT * kl, "loss_qvalue": loss_qvalue}
        return {**losses, "loss_value": loss_value, "loss_actor": loss_actor}

    def _learn(self, loss, *names):
        for name in names:
            self.optimizers[name].zero_grad()
        loss.backward()
        for name in names:
            self.optimizers[name].step()
