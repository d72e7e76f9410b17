"""Transforms: streams, decision masks, cleared contexts."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import GymEnv, InitTracker, ParallelEnv, SerialEnv, TransformedEnv
from torchrl.envs.utils import RandomPolicy, check_env_specs

from torchrl_mouse.envs import ClearContext, DarkRoomEnv, DecisionMask, StreamTracker, TaskEnv

torch.set_num_threads(1)


def cart_pole():
    return TransformedEnv(GymEnv("CartPole-v1"), InitTracker()).append_transform(StreamTracker())


def dark_room():
    # the first goal is met by chance only, the second by any step that stays
    return TaskEnv(DarkRoomEnv([0, 4], size=3, max_steps=4), episodes_per_task=3)


def gym_cart_pole():
    return GymEnv("CartPole-v1")


def masked():
    return TransformedEnv(dark_room(), DecisionMask()).append_transform(ClearContext())


@pytest.mark.parametrize("make_env", [cart_pole, masked])
@pytest.mark.parametrize("workers", [None, SerialEnv])
def test_specs(make_env, workers):
    env = make_env() if workers is None else workers(2, make_env)
    check_env_specs(env)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("workers", "inside"), [(SerialEnv, True), (SerialEnv, False), (ParallelEnv, True)])
def test_stream_is_constant_per_row_and_unique(workers, inside):
    if inside:
        env = workers(2, cart_pole)
    else:
        env = TransformedEnv(workers(2, gym_cart_pole), InitTracker())
        env = env.append_transform(StreamTracker())
    try:
        steps = env.rollout(40, break_when_any_done=False)
        assert steps["is_init"].sum() > 2
        assert (steps["stream"] == steps["stream"][:, :1]).all()
        assert torch.equal(steps["stream"], steps["next", "stream"])
        assert steps["stream"].unique().numel() == 2
        assert torch.equal(env.reset()["stream"], steps["stream"][:, 0])
    finally:
        env.close()


def test_streams_differ_between_environments_copies_and_equal_seeds():
    streams = []
    for _ in range(2):
        torch.manual_seed(0)
        env = cart_pole()
        env.set_seed(0)
        streams += [env.reset()["stream"], copy.deepcopy(env).reset()["stream"]]
    assert torch.stack(streams).unique().numel() == 4


def test_stream_tracker_refuses_a_buffer():
    with pytest.raises(NotImplementedError, match="must be a transform of an environment"):
        StreamTracker()(TensorDict({}, [2]))


def terminal(steps):
    return (steps["previous", "terminated"] | steps["previous", "truncated"]).squeeze(-1)


@pytest.mark.parametrize("wrap", ["inside", "outside", "batched"])
def test_decision_mask(wrap):
    if wrap == "batched":
        env = TransformedEnv(dark_room(), DecisionMask())
    elif wrap == "inside":
        env = SerialEnv(2, lambda: TransformedEnv(dark_room(), DecisionMask()))
    else:
        env = TransformedEnv(SerialEnv(2, dark_room), DecisionMask())
    steps = env.rollout(30, break_when_any_done=False)
    assert steps["collector", "mask"].shape == steps.shape
    assert torch.equal(steps["collector", "mask"], ~terminal(steps))
    assert torch.equal(steps["next", "collector", "mask"], ~terminal(steps["next"]))
    assert 0 < terminal(steps).sum() < steps.numel() / 2


def test_decision_mask_on_stored_steps():
    flags = torch.tensor([[False], [True]])
    steps = TensorDict({"previous": {"terminated": flags, "truncated": ~flags & False}}, [2])
    assert DecisionMask()(steps)["collector", "mask"].tolist() == [True, False]


def test_clear_context_marks_every_episode_and_changes_nothing_else():
    def trace(*transforms):
        torch.manual_seed(0)
        env = dark_room()
        for transform in transforms:
            env = TransformedEnv(env, transform)
        return env.rollout(40, break_when_any_done=False).exclude("stream", ("next", "stream"))

    plain, cleared = trace(), trace(ClearContext())
    assert torch.equal(cleared["is_init"], plain["episode_step"] == 0)
    assert cleared["is_init"].sum() > plain["is_init"].sum()
    without = [entry.exclude("is_init", ("next", "is_init")) for entry in (plain, cleared)]
    assert (without[0] == without[1]).all()


def test_partial_reset_keeps_the_other_rows():
    env = masked()
    frame = env.reset()
    for _ in range(4):
        frame = env.step(frame.set("action", torch.tensor([4, 1])))["next"].exclude("reward")
    assert terminal(frame)[0]
    before = frame.clone()
    frame = env.reset(frame.set("_reset", torch.tensor([[False], [True]])))
    assert (frame[0] == before[0]).all()
    assert frame["collector", "mask"].tolist() == [False, True]
    assert frame["is_init"].squeeze(-1).tolist() == [False, True]


def collect(env, **keywords):
    policy = RandomPolicy(env.action_spec)
    collector = Collector(env, policy, frames_per_batch=40, total_frames=80, **keywords)
    try:
        return torch.cat([batch.clone() for batch in collector], -1)
    finally:
        collector.shutdown()


def test_collector():
    for steps in (
        collect(TransformedEnv(dark_room(), ClearContext()), postproc=DecisionMask()),
        collect(masked(), track_traj_ids=False),
    ):
        assert torch.equal(steps["collector", "mask"], ~terminal(steps))
        assert torch.equal(steps["is_init"], steps["episode_step"] == 0)
        assert terminal(steps).any()


def test_collector_that_would_overwrite_the_mask():
    with pytest.raises(RuntimeError, match=r"a collector that tracks trajectories overwrites .* postproc=DecisionMask"):
        collect(masked())
