"""Decoding against the cache equals the full pass at every step, whatever collects the steps."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tensordict.nn import TensorDictSequential
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import Compose, EnvBase, GymEnv, InitTracker, ParallelEnv, RewardSum, SerialEnv, TransformedEnv
from torchrl.modules import EGreedyModule, set_recurrent_mode
from torchrl.modules.utils.utils import _compute_missing_env_transforms

from torchrl_mouse import schema
from torchrl_mouse.envs import DarkRoomEnv, StreamTracker, TaskEnv
from torchrl_mouse.models import MouseModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tensordict import TensorDict, TensorDictBase

FRAMES = 48  # per row, several tasks of each row


def make_task_env(row: int, rows: int | None = None) -> TaskEnv:
    """One worker's environment: episodes and tasks of another length in each, also between the rows of one."""
    size = () if rows is None else rows
    base = DarkRoomEnv(range(9), batch_size=size, size=3, max_steps=3 + row, seed=row)
    return TaskEnv(base, episodes_per_task=1 + row % 3)


def workers(number: int) -> list[Callable[[], TaskEnv]]:
    return [partial(make_task_env, row + 1) for row in range(number)]


@pytest.fixture(scope="module")
def parallel_env() -> Iterator[ParallelEnv]:
    env = ParallelEnv(2, workers(2))
    try:
        yield env
    finally:
        env.close(raise_if_closed=False)


@pytest.fixture
def model(make_model: Callable[..., MouseModel]) -> MouseModel:
    return make_model()


@pytest.fixture
def check_parity(
    model: MouseModel, full_pass: Callable[..., torch.Tensor]
) -> Callable[[list[TensorDictBase] | TensorDictBase], None]:
    """Compares ``hidden`` in collected batches with the full pass over each row's tasks."""

    def check(batches: list[TensorDictBase] | TensorDictBase, *, rows: int) -> None:
        steps = torch.cat(batches, -1) if isinstance(batches, list) else batches
        steps = steps.reshape(-1, steps.shape[-1]).to("cpu")
        streams = steps[schema.STREAM].squeeze(-1)
        assert (streams == streams[:, :1]).all(), "a row must keep its stream"
        assert streams[:, 0].unique().numel() == rows == len(steps)
        starts = steps[schema.IS_INIT].squeeze(-1)
        assert (starts.sum(-1) >= 3).all(), "each row must go through several tasks"
        assert not (starts[:, 1:].any(-1) & starts[:, 1:].all(-1)).any(), "tasks must be longer than a step"
        assert rows == 1 or len({tuple(row) for row in starts.tolist()}) == rows, "rows must reset at different times"
        model.trunk.reset_cache()
        expected = full_pass(model.trunk.cpu(), steps)
        torch.testing.assert_close(steps[schema.HIDDEN], expected, atol=1e-5, rtol=0)
        frames = steps.select(*model.trunk.in_keys).set(schema.IS_INIT, torch.ones_like(steps[schema.IS_INIT]))
        with set_recurrent_mode(True), torch.no_grad():
            without_past = model.trunk(frames)[schema.HIDDEN]
        assert (without_past - expected).abs().max() > 0.1, "hidden states must depend on the past"

    return check


def collect(env: EnvBase, policy: Any, *, batches: int = 3, close_env: bool = True, **options: Any) -> list[TensorDict]:
    """Collects ``FRAMES`` steps of each row; windows begin in the middle of tasks."""
    frames = FRAMES * env.batch_size.numel()
    collector = Collector(env, policy, frames_per_batch=frames // batches, total_frames=frames, **options)
    try:
        return [batch.clone() for batch in collector]
    finally:
        collector.shutdown(close_env=close_env)


def actor_of(model: MouseModel, env: EnvBase) -> Any:
    return model.actor(env.action_spec_unbatched, temperature=1.0)


LOCAL_ENVS = {
    "single": lambda: make_task_env(1),
    "serial": lambda: SerialEnv(3, workers(3)),
    "batched": lambda: make_task_env(2, rows=4),
    "serial of batched": lambda: SerialEnv(2, [partial(make_task_env, row + 1, rows=2) for row in range(2)]),
    "transformed serial": lambda: TransformedEnv(SerialEnv(3, workers(3)), RewardSum()),
}


@pytest.mark.parametrize("kind", LOCAL_ENVS)
def test_rollout_equals_full_pass(kind, model, check_parity):
    env = LOCAL_ENVS[kind]()
    steps = env.rollout(FRAMES, actor_of(model, env), break_when_any_done=False)
    check_parity(steps, rows=env.batch_size.numel())


@pytest.mark.parametrize("kind", LOCAL_ENVS)
def test_collector_equals_full_pass(kind, model, check_parity):
    env = LOCAL_ENVS[kind]()
    rows = env.batch_size.numel()
    check_parity(collect(env, actor_of(model, env)), rows=rows)


@pytest.mark.parametrize(
    "options",
    [
        {"policy_device": "cpu", "env_device": "cpu", "storing_device": "cpu"},
        {"device": "cpu"},
        {"use_buffers": False},
        {"compact_obs": True},
    ],
    ids=str,
)
def test_collector_options_do_not_disturb_contexts(options, model, check_parity):
    env = SerialEnv(3, workers(3))
    check_parity(collect(env, actor_of(model, env), **options), rows=3)


POLICY_ON_CUDA = {"policy_device": "cuda", "env_device": "cpu", "storing_device": "cpu"}


@pytest.mark.parametrize("kind", ["single", "serial"])
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_policy_on_another_device_than_the_environment(kind, model, check_parity):
    env = LOCAL_ENVS[kind]()
    rows = env.batch_size.numel()
    model.cuda()
    check_parity(collect(env, actor_of(model, env).cuda(), **POLICY_ON_CUDA), rows=rows)


def test_policy_in_float64_reads_float32_steps(model, check_parity):
    model.double()
    env = SerialEnv(3, workers(3))
    batches = collect(env, actor_of(model, env))
    assert batches[0][schema.HIDDEN].dtype == torch.float64
    check_parity(batches, rows=3)


def test_collector_into_a_replay_buffer(model, check_parity):
    env = SerialEnv(3, workers(3))
    buffer = ReplayBuffer(storage=LazyTensorStorage(3 * FRAMES, ndim=2), batch_size=4)
    collector = Collector(
        env,
        actor_of(model, env),
        replay_buffer=buffer,
        frames_per_batch=FRAMES,
        total_frames=3 * FRAMES,
    )
    try:
        assert list(collector) == [None] * 3
    finally:
        collector.shutdown()
    check_parity(buffer[:], rows=3)


def test_epsilon_greedy_in_a_collector(model, check_parity):
    env = SerialEnv(3, workers(3))
    explore = EGreedyModule(spec=env.action_spec, eps_init=0.5, eps_end=0.5, annealing_num_steps=1)
    policy = TensorDictSequential(model.actor(env.action_spec_unbatched), explore)
    batches = collect(env, policy)
    check_parity(batches, rows=3)
    steps = torch.cat(batches, -1)
    greedy = steps["dqn"].argmax(-1) == steps[schema.ACTION]
    # half the actions are drawn from five: the best one is expected in 60 % of 144 steps, standard deviation 4 %
    assert 0.4 < greedy.float().mean() < 0.8


def test_environment_without_tasks(make_model, full_pass):
    embedding = {"max_num_actions": 5, "max_num_obs_continuous": 2, "include_action_token": False, "std": 1.0}
    model = make_model(embedding_kwargs={**embedding, "include_reward_token": False, "include_done_token": False})
    env = TransformedEnv(
        DarkRoomEnv(range(9), batch_size=3, size=3, max_steps=6, seed=0), Compose(InitTracker(), StreamTracker())
    )
    steps = torch.cat(collect(env, actor_of(model, env)), -1)
    starts = steps[schema.IS_INIT].squeeze(-1)
    assert len({tuple(row) for row in starts.tolist()}) == 3
    torch.testing.assert_close(steps[schema.HIDDEN], full_pass(model.trunk, steps), atol=1e-5, rtol=0)


def gym_env():
    return GymEnv("CartPole-v1")


@pytest.mark.parametrize("make_env", [gym_env, partial(SerialEnv, 2, gym_env)])
def test_streams_and_starts_are_registered_by_torchrl(make_env, make_model, full_pass):
    embedding = {"max_num_actions": 2, "max_num_obs_continuous": 4, "include_action_token": False, "std": 1.0}
    embedding |= {"include_reward_token": False, "include_done_token": False}
    model, env = make_model(embedding_kwargs=embedding), make_env()
    steps = torch.cat(collect(env, actor_of(model, env), auto_register_policy_transforms=True), -1)
    steps = steps.reshape(-1, steps.shape[-1])
    assert steps[schema.IS_INIT].sum() > len(steps)
    assert steps[schema.STREAM].unique().numel() == len(steps)
    torch.testing.assert_close(steps[schema.HIDDEN], full_pass(model.trunk, steps), atol=1e-5, rtol=0)


def test_registration_leaves_task_environments_as_they_are(model, check_parity):
    env = SerialEnv(3, workers(3))
    check_parity(collect(env, actor_of(model, env), auto_register_policy_transforms=True), rows=3)
    assert _compute_missing_env_transforms(env, model) == []


@pytest.mark.timeout(120)
def test_bare_parallel_env(parallel_env, model, check_parity):
    actor = actor_of(model, parallel_env)
    check_parity(parallel_env.rollout(FRAMES, actor, break_when_any_done=False), rows=2)
    check_parity(collect(parallel_env, actor, close_env=False), rows=2)


@pytest.mark.timeout(120)
def test_transformed_parallel_env(parallel_env, model, check_parity):
    env = TransformedEnv(parallel_env, RewardSum())
    actor = actor_of(model, env)
    check_parity(env.rollout(FRAMES, actor, break_when_any_done=False), rows=2)
    check_parity(collect(env, actor, close_env=False, policy_device="cpu", env_device="cpu"), rows=2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.timeout(120)
def test_parallel_env_and_policy_on_different_devices(parallel_env, model, check_parity):
    actor = actor_of(model, parallel_env).cuda()
    check_parity(collect(parallel_env, actor, close_env=False, **POLICY_ON_CUDA), rows=2)


def collect_in_workers(policy: Any, **options: Any) -> list[TensorDict]:
    """Collects with two workers, in batches of shape ``[workers, rows, T]``."""
    collector = MultiSyncCollector(
        [partial(SerialEnv, 2, workers(4)[:2]), partial(SerialEnv, 2, workers(4)[2:])],
        policy,
        frames_per_batch=4 * FRAMES // 3,
        total_frames=4 * FRAMES,
        cat_results="stack",
        **options,
    )
    try:
        return [batch.clone() for batch in collector]
    finally:
        collector.shutdown()
        del collector  # one that a failed test keeps alive until the interpreter exits hangs it there


@pytest.mark.timeout(180)
def test_multi_sync_collector(model, check_parity):
    env = SerialEnv(2, workers(2))
    actor = actor_of(model, env)
    env.rollout(3, actor, break_when_any_done=False)  # a used model: its cache must not reach the workers
    check_parity(collect_in_workers(actor), rows=4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.timeout(180)
def test_multi_sync_collector_with_policy_on_another_device(model, check_parity):
    actor = actor_of(model, make_task_env(1)).cuda()
    check_parity(collect_in_workers(actor, **POLICY_ON_CUDA), rows=4)


def test_two_collectors_that_take_turns_on_one_module(model, check_parity):
    envs = [SerialEnv(3, workers(3)), make_task_env(2, rows=4)]
    rows = [env.batch_size.numel() for env in envs]
    collectors = [
        Collector(env, actor_of(model, env), frames_per_batch=8 * num, total_frames=FRAMES * num)
        for env, num in zip(envs, rows, strict=True)
    ]
    try:
        turns = [[batch.clone() for batch in pair] for pair in zip(*collectors, strict=True)]
    finally:
        for collector in collectors:
            collector.shutdown()
    assert len(turns) == 6
    assert len(model.trunk._cache) == sum(rows)  # one module holds the contexts of both
    for batches, num in zip(zip(*turns, strict=True), rows, strict=True):
        check_parity(list(batches), rows=num)
