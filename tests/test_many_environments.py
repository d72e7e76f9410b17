"""Contexts follow their rows: any number of rows, partial resets, other collectors, copies, evaluators alongside."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import gymnasium
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torchrl.collectors import AsyncCollector, Collector, Evaluator, MultiAsyncCollector
from torchrl.envs import GymWrapper, InitTracker, ParallelEnv, SerialEnv
from torchrl.envs.utils import step_mdp

from torchrl_mouse import schema
from torchrl_mouse.envs import DarkRoomEnv, StreamTracker, TaskEnv
from torchrl_mouse.evaluation import evaluate

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensordict import TensorDictBase
    from torchrl.envs import EnvBase

    from torchrl_mouse.models import MouseModel


def make_env(rows: int | tuple[()] = 2, seed: int = 0, episodes: int = 2) -> TaskEnv:
    return TaskEnv(DarkRoomEnv(range(9), batch_size=rows, size=3, max_steps=5, seed=seed), episodes_per_task=episodes)


def actor_of(model: MouseModel) -> Any:
    return model.actor(make_env().action_spec_unbatched, temperature=1.0)


@pytest.fixture
def model(make_model: Callable[..., MouseModel]) -> MouseModel:
    return make_model()


@pytest.fixture
def check(model: MouseModel, full_pass: Callable[..., torch.Tensor]) -> Callable[[TensorDictBase], None]:
    """Compares ``hidden`` of steps ``[*, T]`` with the full pass over each row's tasks."""

    def run(steps: TensorDictBase) -> None:
        steps = steps.reshape(-1, steps.shape[-1])
        expected = full_pass(model.trunk, steps)
        torch.testing.assert_close(steps[schema.HIDDEN], expected, atol=1e-5, rtol=0)

    return run


# Rows


@pytest.mark.parametrize("rows", [1, 7, 256])
def test_rows_of_a_batched_environment(rows, model, check):
    env = make_env(rows)
    steps = 30 if rows < 256 else 15
    collector = Collector(env, actor_of(model), frames_per_batch=5 * rows, total_frames=steps * rows)
    try:
        batches = torch.cat([batch.clone() for batch in collector], -1)
    finally:
        collector.shutdown()
    assert batches.shape == (rows, steps)
    assert batches[schema.IS_INIT].sum() > rows, "tasks must end"
    assert batches[schema.STREAM][:, 0].unique().numel() == rows == len(model.trunk._cache)
    check(batches)


def test_256_environments_in_series(model, check):
    """Tasks of one episode, of three lengths."""

    def worker(row: int) -> TaskEnv:
        room = DarkRoomEnv(range(9), batch_size=(), size=3, max_steps=3 + row % 3, seed=row)
        return TaskEnv(room, episodes_per_task=1)

    env = SerialEnv(256, [partial(worker, row) for row in range(256)])
    steps = env.rollout(8, actor_of(model), break_when_any_done=False)
    assert steps.shape == (256, 8)
    assert steps[schema.IS_INIT].sum((1, 2)).min() > 1, "tasks must end"
    assert steps[schema.STREAM][:, 0].unique().numel() == 256 == len(model.trunk._cache)
    check(steps)


def test_more_rows_than_max_streams(model):
    model.trunk.max_streams = 6
    with pytest.raises(ValueError, match=r"at most max_streams=6 rows, got 7\. Raise max_streams"):
        make_env(7).rollout(2, actor_of(model))


def play_with_resets(env: EnvBase, actor: Any) -> TensorDictBase:
    """Some rows are reset in mid-task: their tasks begin anew, and the others go on."""
    generator = torch.Generator().manual_seed(0)
    frame, frames = env.reset(), []
    with torch.no_grad():
        for t in range(18):
            if t in (4, 7, 13):
                mask = torch.rand(*env.batch_size, 1, generator=generator) < 0.5
                assert mask.any()
                assert not mask.all()
                fresh = env.reset(frame.clone().set("_reset", mask))
                assert torch.equal(fresh[schema.IS_INIT], mask)
                frame = fresh.exclude("_reset")
            step = env.step(actor(frame.clone()))
            frames.append(step.exclude("next").clone())
            frame = step_mdp(step)
    steps = torch.stack(frames, -1)
    assert len({tuple(row) for row in steps[schema.IS_INIT].squeeze(-1).tolist()}) > 2
    return steps


@pytest.mark.parametrize(
    "make", [partial(make_env, 4, episodes=4), partial(SerialEnv, 7, partial(make_env, (), episodes=4))]
)
def test_partial_resets(make, model, check):
    check(play_with_resets(make(), actor_of(model)))


@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_seven_environments_in_parallel(model, check):
    # forked, since to start seven processes afresh takes more than a minute on two cores
    env = ParallelEnv(7, partial(make_env, (), episodes=4), mp_start_method="fork")
    try:
        steps = play_with_resets(env, actor_of(model))
        played = env.rollout(30, actor_of(model), break_when_any_done=False)
    finally:
        env.close(raise_if_closed=False)
    check(steps)
    assert played.shape == (7, 30)
    assert played[schema.STREAM].unique().numel() == 7 == len(model.trunk._cache)
    assert (played[schema.IS_INIT].sum((1, 2)) > 1).any(), "tasks must end"
    check(played)


# Gymnasium's vector environments


class Steps(gymnasium.Env):
    """An episode of ``length`` steps, which observes how many are left."""

    def __init__(self, length: int) -> None:
        self.observation_space = gymnasium.spaces.Box(-100, 100, (2,))
        self.action_space = gymnasium.spaces.Discrete(5)
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.length
        return self._observation(), {}

    def step(self, action):
        self.left -= 1
        return self._observation(), float(action), self.left == 0, False, {}

    def _observation(self):
        return torch.tensor([self.left / 10, self.length / 10]).numpy()


LENGTHS = (3, 5, 8)


def vector_env(mode: AutoresetMode) -> GymWrapper:
    vector = SyncVectorEnv([partial(Steps, length) for length in LENGTHS], autoreset_mode=mode)
    return GymWrapper(vector, categorical_action_encoding=True)


def vector_env_of_processes(mode: AutoresetMode) -> GymWrapper:
    """Of environments whose processes import Gymnasium alone, and so start soon."""
    poles = [partial(gymnasium.make, "CartPole-v1", max_episode_steps=length) for length in LENGTHS]
    return GymWrapper(AsyncVectorEnv(poles, autoreset_mode=mode), categorical_action_encoding=True)


def make_vector_model(make_model: Callable[..., MouseModel], env: EnvBase) -> MouseModel:
    return make_model(
        embedding_kwargs={
            "max_num_actions": env.action_spec.space.n,
            "max_num_obs_continuous": env.observation_spec["observation"].shape[-1],
            "std": 1.0,
            "include_action_token": False,
            "include_reward_token": False,
            "include_done_token": False,
        }
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED], ids=str)
@pytest.mark.parametrize("make", [vector_env, vector_env_of_processes])
def test_vector_environment(make, mode, make_model, full_pass):
    """A task is an episode there; rows reset at different steps."""
    base = make(mode)
    model = make_vector_model(make_model, base)
    env = base.append_transform(InitTracker()).append_transform(StreamTracker())
    actor = model.actor(env.action_spec_unbatched, temperature=1.0)
    collector = Collector(env, actor, frames_per_batch=15, total_frames=90)
    try:
        steps = torch.cat([batch.clone() for batch in collector], -1)
    finally:
        collector.shutdown()
    starts = [row.nonzero().flatten().tolist() for row in steps[schema.IS_INIT].squeeze(-1)]
    assert starts == [list(range(0, 30, length)) for length in LENGTHS]
    torch.testing.assert_close(steps[schema.HIDDEN], full_pass(model.trunk, steps), atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"autoreset_mode": AutoresetMode.NEXT_STEP}], ids=["default", "explicit"])
def test_vector_environment_that_resets_at_the_next_step(options):
    """TorchRL refuses Gymnasium's default: a row's first step would be one whose action is ignored."""
    vector = SyncVectorEnv([partial(Steps, length) for length in LENGTHS], **options)
    with pytest.raises(RuntimeError, match=r"must be one of SAME_STEP or DISABLED .*AutoresetMode\.NEXT_STEP"):
        GymWrapper(vector)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED], ids=str)
def test_vector_environment_cannot_repeat_episodes(mode):
    with pytest.raises(ValueError, match=r"must not be a Gymnasium vector environment.*SerialEnv\(n, lambda: TaskEnv"):
        TaskEnv(vector_env(mode), episodes_per_task=2)


def test_tasks_of_gymnasium_environments(make_model, full_pass):
    """Several tasks at once: one environment for each worker, and not a vector environment."""
    model = make_model(embedding_kwargs={"max_num_actions": 5, "max_num_obs_continuous": 2, "std": 1.0})

    def worker(length: int) -> TaskEnv:
        return TaskEnv(GymWrapper(Steps(length), categorical_action_encoding=True), episodes_per_task=2)

    env = SerialEnv(3, [partial(worker, length) for length in (3, 5, 8)])
    steps = env.rollout(30, actor_of(model), break_when_any_done=False)
    starts = [row.nonzero().flatten().tolist() for row in steps[schema.IS_INIT].squeeze(-1)]
    assert starts == [list(range(0, 30, 2 * length + 1)) for length in (3, 5, 8)]
    torch.testing.assert_close(steps[schema.HIDDEN], full_pass(model.trunk, steps), atol=1e-5, rtol=0)


# Collectors


@pytest.mark.timeout(180)
@pytest.mark.parametrize("workers", [1, 2])
def test_asynchronous_collectors(workers, model, check):
    envs = [partial(make_env, 2, seed + 1) for seed in range(workers)]
    options = {"frames_per_batch": 14, "total_frames": 14 * 4 * workers}
    if workers == 1:
        collector = AsyncCollector(envs[0], actor_of(model), **options)
    else:
        collector = MultiAsyncCollector(envs, actor_of(model), **options)
    try:
        batches = [batch.clone() for batch in collector]
    finally:
        collector.shutdown()
        del collector  # one that a failed test keeps alive until the interpreter exits hangs it there
    by_stream: dict[int, list[TensorDictBase]] = {}
    for batch in batches:
        by_stream.setdefault(int(batch[schema.STREAM][0, 0]), []).append(batch)
    assert len(by_stream) == workers
    for own in by_stream.values():
        check(torch.cat(own, -1))


@pytest.mark.filterwarnings("ignore:split_trajs=True produces:UserWarning")
def test_split_trajectories(model, check):
    """Each row of the result is a task, or what a batch holds of it, padded to the longest."""
    collector = Collector(make_env(3), actor_of(model), frames_per_batch=90, total_frames=90, split_trajs=True)
    try:
        (batch,) = list(collector)
    finally:
        collector.shutdown()
    mask = batch["collector", "mask"]
    assert len(batch) > 3
    assert not mask.all()
    assert (batch[schema.IS_INIT].squeeze(-1)[:, 0]).all()
    for row, real in zip(batch, mask, strict=True):
        assert torch.equal(real, real.sort(descending=True).values), "padding must be at the end"
        check(row[real].unsqueeze(0))


def test_whole_trajectories_per_batch(model, check):
    collector = Collector(
        make_env(3), actor_of(model), frames_per_batch=30, total_frames=-1, trajs_per_batch=4, traj_format="cat"
    )
    batches = []
    try:
        for batch in collector:
            batches.append(batch.clone())
            if len(batches) == 3:
                break
    finally:
        collector.shutdown()
    for batch in batches:
        ends = batch["next", "done"].squeeze(-1).nonzero().flatten().tolist()
        assert len(ends) == 4
        assert ends[-1] == len(batch) - 1
        first = 0
        for last in ends:
            task = batch[first : last + 1]
            assert task[schema.STREAM].unique().numel() == 1
            check(task.unsqueeze(0))
            first = last + 1


def test_inference_mode(model, check):
    env, actor = make_env(3), actor_of(model)
    with torch.inference_mode():
        steps = env.rollout(30, actor, break_when_any_done=False)
    check(steps.clone())
    check(env.rollout(30, actor, break_when_any_done=False))  # the same contexts outside of it


# Copies


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))], ids=["deepcopy", "pickle"]
)
def test_copy_of_the_policy_between_two_steps(copied, model, check):
    env, actor = make_env(2), actor_of(model)
    before = env.rollout(4, actor)
    other = copied(actor)
    frame = step_mdp(before[:, -1])
    stream = int(frame[schema.STREAM][0])
    with pytest.raises(RuntimeError, match=rf"none for row 0 \(stream {stream}\).*a copy of the module.*reset the env"):
        other(frame.clone())
    after = env.rollout(4, actor, auto_reset=False, tensordict=frame)  # the original has lost nothing
    check(torch.cat([before, after], -1))
    check(env.rollout(20, other, break_when_any_done=False))  # at the start of a task


def test_copy_gets_the_history_shown(model, check):
    env, actor = make_env(2), actor_of(model)
    before = env.rollout(4, actor)
    other = copy.deepcopy(model)
    other.trunk.append(before.clone())
    after = env.rollout(4, actor_of(other), auto_reset=False, tensordict=step_mdp(before[:, -1]))
    check(torch.cat([before, after], -1))


# Evaluation beside collection, on one module


def test_evaluation_between_batches(model, check):
    collector = Collector(make_env(3), actor_of(model), frames_per_batch=3 * 7, total_frames=3 * 7 * 4)
    batches = []
    try:
        for batch in collector:  # batches end in mid-task
            batches.append(batch.clone())
            returns = evaluate(actor_of(model), make_env(5, seed=9), 2, progress_bar=False)
            assert returns.shape == (5, 2)
    finally:
        collector.shutdown()
    assert len(model.trunk._cache) == 3  # the evaluations' contexts are gone
    check(torch.cat(batches, -1))


@pytest.mark.timeout(120)
def test_evaluator_in_a_thread_beside_a_collector(model, check):
    """TorchRL's Evaluator acts with the module at the same time, in a thread of its own."""
    played = []

    def keep(batch: TensorDictBase) -> dict[str, float]:
        played.append(batch.clone())
        return {}

    evaluator = Evaluator(
        partial(make_env, 2, 9),
        actor_of(model),
        num_trajectories=2,
        frames_per_batch=20,
        collector_kwargs={"traj_format": "padded"},
        metrics_fn=keep,
    )
    collector = Collector(make_env(3), actor_of(model), frames_per_batch=3 * 7, total_frames=3 * 7 * 12)
    batches = []
    try:
        evaluator.trigger_eval(step=0)
        for step, batch in enumerate(collector):
            batches.append(batch.clone())
            if evaluator.poll() is not None:
                evaluator.trigger_eval(step=step)
        evaluator.wait(timeout=60)
    finally:
        collector.shutdown()
        evaluator.shutdown()
    check(torch.cat(batches, -1))
    assert played
    for batch in played:
        mask = batch["collector", "mask"]
        for row, real in zip(batch, mask, strict=True):
            check(row[real].unsqueeze(0))


@pytest.mark.timeout(60)
def test_a_second_thread_waits(model, random_steps, full_pass, monkeypatch):
    """While one thread encodes a step, another adds rows: the pool grows, and nothing may be written to the old one."""
    trunk = model.trunk
    one, two = random_steps(2, 6), random_steps(3, 6, seed=1)
    two[schema.STREAM] += 100
    expected = full_pass(trunk, one), full_pass(trunk, two)
    forward, threads, hidden = trunk.backbone.forward, [], {}
    trunk(one[:, 0].clone())

    def play() -> None:
        hidden["two"] = torch.stack([trunk(two[:, t].clone())[schema.HIDDEN] for t in range(6)], 1)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if not threads:
            threads.append(threading.Thread(target=play))
            threads[0].start()
            threads[0].join(1.0)  # without a lock it plays to its end here
            assert threads[0].is_alive()
        return forward(*args, **kwargs)

    monkeypatch.setattr(trunk.backbone, "forward", interrupted)
    hidden["one"] = torch.stack([trunk(one[:, t].clone())[schema.HIDDEN] for t in range(1, 6)], 1)
    threads[0].join()
    torch.testing.assert_close(hidden["one"], expected[0][:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden["two"], expected[1], atol=1e-5, rtol=0)
