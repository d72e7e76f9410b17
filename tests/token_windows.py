"""Windows to augment, and augmenters of everything; for the tests of token augmentation."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from tensordict import TensorDict

from torchrl_mouse import schema
from torchrl_mouse.data.token_augmentation import TokenAugmenter
from torchrl_mouse.data.token_augmentation_config import AugmentMaskProbConfig, AugmentScalarSpec, AugmentTokensConfig
from torchrl_mouse.schema import from_mouse_records

A, N, P = 5, 9, 6
FRAMES = [
    "observation",
    "observation_discrete",
    "pixels",
    "episode_step",
    ("previous", "action"),
    ("previous", "reward"),
    ("previous", "terminated"),
    ("previous", "truncated"),
]
TARGETS = [
    "action",
    "q_star",
    "action_mask",
    "is_init",
    ("collector", "mask"),
    ("next", "reward"),
    ("next", "done"),
    ("next", "terminated"),
    ("next", "truncated"),
]
ENDS = ("terminated", "truncated")
seeds = st.integers(0, 2**40)
fast = settings(max_examples=25, deadline=None, database=None)


def windows(batch=3, num=8, seed=0, episode=4, valid=A):
    """Random episodes of one length; each task has the first ``valid`` actions."""
    generator = torch.Generator().manual_seed(seed)

    def ids(high, *shape):
        return torch.randint(high, (batch, num, *shape), generator=generator)

    time = (torch.arange(num) % episode).expand(batch, num)
    ends = (time == episode - 1).long()
    records = {
        "action": ids(valid) * (time > 0),
        "reward": torch.randn(batch, num, generator=generator) * (time > 0),
        "done": ends * (1 + ids(2)),
        "time": time.clone(),
        "obs_continuous": torch.randn(batch, num, 2, generator=generator),
        "obs_discrete": ids(N),
        "obs_image": ids(256, P),
        "q_star": torch.randn(batch, num, A, generator=generator),
    }
    records["q_star"][..., valid:] = -torch.inf
    steps = from_mouse_records(TensorDict(records, [batch, num]))
    steps["action_mask"] = (torch.arange(A) < valid).expand(batch, num, A).clone()
    return steps


def build(seed=0, num_actions=A, **options):
    return TokenAugmenter(AugmentTokensConfig(**options), num_actions, N, "cpu", torch.Generator().manual_seed(seed))


def at_next(key):
    return ("next", *(key if isinstance(key, tuple) else (key,)))


def everything(mask=0.3, action="input"):
    uniform = AugmentScalarSpec(1.0, low=0.5, high=2.0)
    normal = AugmentScalarSpec(0.0, std=1.0)
    return {
        "scale_reward": uniform,
        "shift_reward": normal,
        "scale_obs": uniform,
        "shift_obs": normal,
        "scale_obs_image": uniform,
        "shift_obs_image": AugmentScalarSpec(5.0, std=3.0),
        "permute_obs_discrete": True,
        "permute_action": action,
        "permute_done": True,
        "mask_prob": AugmentMaskProbConfig(**dict.fromkeys(vars(AugmentMaskProbConfig()), mask)),
    }


def code(steps, at=()):
    return schema.done_code(steps[(*at, "previous", "terminated")], steps[(*at, "previous", "truncated")])


def assert_same(one, other):
    assert set(one.keys(True, True)) == set(other.keys(True, True))
    for key in one.keys(True, True):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0, equal_nan=True, msg=str(key))
