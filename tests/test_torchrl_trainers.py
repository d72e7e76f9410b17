"""TorchRL's DQN trainer on the in-context loss, and its reward transforms on the way to it."""

from functools import partial

import pytest
import torch
from tensordict.nn import TensorDictSequential
from torchrl.collectors import Collector
from torchrl.envs import RewardScaling, RewardSum, SerialEnv, TransformedEnv, VecNormV2
from torchrl.modules import EGreedyModule
from torchrl.objectives import SoftUpdate
from torchrl.trainers.algorithms import DQNTrainer

from torchrl_mouse import schema
from torchrl_mouse.data import DatasetStore, replay_buffer
from torchrl_mouse.envs import DarkRoomEnv, DecisionMask, TaskEnv
from torchrl_mouse.objectives import MouseDQNLoss

ROWS, MAX_STEPS = 4, 4
TASK = 2 * MAX_STEPS + 1  # two episodes, and a step from the first one's terminal frame
TAU = 0.1

# TorchRL calls its trainer a prototype, and some hooks that it registers itself outdated.
PROTOTYPE = [
    pytest.mark.filterwarnings("ignore:DQNTrainer is an experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:The 'post_loss' hook stage:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'optimizer' hook stage:FutureWarning"),
]
BATCHED = pytest.mark.filterwarnings("ignore:Support of VecNormV2 for containers with non-empty:UserWarning")


def make_env(seed=0):
    room = DarkRoomEnv(range(9), batch_size=ROWS, size=3, max_steps=MAX_STEPS, terminate_on_goal=False, seed=seed)
    return TaskEnv(room, episodes_per_task=2)


def make_store():
    return DatasetStore(max_action_dim=5, max_obs_continuous_dim=2, max_obs_discrete_dim=9)


class Training:
    """A DQN trainer on Dark Room and its parts."""

    def __init__(self, model, *, steps=TASK, batches=3, postproc=None, mark=True):
        env = TransformedEnv(make_env(), RewardSum(["reward"], ["reward_sum"]))
        self.model = model
        self.actor = model.actor(env.action_spec_unbatched, head="dqn")
        self.explore = EGreedyModule(env.action_spec, eps_init=0.5, eps_end=0.1, annealing_num_steps=1000)
        policy = TensorDictSequential(self.actor, self.explore)
        self.collector = Collector(env, policy, frames_per_batch=ROWS * steps, total_frames=-1, postproc=postproc)
        self.loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk, cql_weight=0.1, actor=self.actor)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=1e-2)
        self.buffer = replay_buffer(make_store(), window=6, batch_size=8, seed=0)
        self.trainer = DQNTrainer(
            collector=self.collector,
            total_frames=ROWS * steps * batches,
            frame_skip=1,
            optim_steps_per_batch=2,
            loss_module=self.loss,
            optimizer=self.optimizer,
            replay_buffer=self.buffer,
            target_net_updater=SoftUpdate(self.loss, tau=TAU),
            greedy_module=self.explore,
            progress_bar=False,
            seed=0,
        )
        if mark:
            self.trainer.register_op("post_optim", model.trunk.mark_weight_update)
        self.batches = []
        self.trainer.register_op("batch_process", self._keep)

    def _keep(self, batch):
        self.batches.append((batch.clone(), {name: each.clone() for name, each in self.model.state_dict().items()}))
        return batch


class TestDQNTrainer:
    pytestmark = PROTOTYPE

    def test_trains(self, make_model):
        training = Training(make_model())
        loss, heads = training.loss, []
        targets = loss.target_head_params.clone()
        before = {name: each.clone() for name, each in loss.named_parameters()}
        training.optimizer.register_step_post_hook(lambda *_: heads.append(loss.head_params.data.clone()))
        training.trainer.train()
        assert len(heads) == 6
        for head in heads:
            targets = targets.lerp(head, TAU)
        for name, target in targets.items(True, True):
            torch.testing.assert_close(loss.target_head_params[name], target, msg=str(name))
        changed = {name for name, each in loss.named_parameters() if (each != before[name]).any()}
        assert {name for name in before if "embed_tokens" not in name} == changed
        assert len(training.buffer) == 3 * ROWS * (TASK + 1)  # each task with its last frame
        # epsilon falls by .4 over 1000 frames
        assert training.explore.eps.item() == pytest.approx(0.5 - 0.4 * 3 * ROWS * TASK / 1000, abs=1e-5)

    def test_logs_what_a_task_returned(self, make_model):
        training = Training(make_model())
        training.trainer.train()
        log = training.trainer._log_dict
        for number, (batch, _) in enumerate(training.batches):
            returns = batch["next", "reward"].sum(1)
            assert log["r_total"][number] == returns.max()
            assert log["done_percentage"][number] == pytest.approx(1 / TASK)
        assert all(len(log[key]) == 3 for key in ("loss_dqn", "loss_cql", "q_values_mean"))

    def test_the_policy_is_what_is_trained(self, make_model):
        training = Training(make_model())
        trained = {id(each) for each in training.loss.parameters()}
        assert {id(each) for each in training.actor.parameters()} == trained
        assert len(list(training.loss.parameters())) == len(trained)
        assert not [name for name in training.loss.state_dict() if "value_network" in name]
        training.trainer.train()
        assert {id(each) for each in training.collector.policy.parameters()} >= trained
        assert {id(each) for each in training.loss.parameters()} == trained

    @pytest.mark.parametrize("mark", [True, False])
    def test_contexts_follow_the_weights(self, make_model, full_pass, mark):
        """A batch ends inside a task, whose context is then of older weights."""
        training = Training(make_model(), steps=6, mark=mark)
        training.buffer.extend(make_env(1).rollout(TASK))  # the first batch ends no task that could be learned from
        training.trainer.train()
        (first, _), (second, weights) = training.batches[:2]
        assert not first["next", "done"].any()
        version = training.model.trunk.weight_version
        assert int(version) == (6 if mark else 0)
        training.model.load_state_dict(weights)  # those that played the second batch
        task = torch.cat([first, second], 1)[:, :TASK]
        expected = full_pass(training.model.trunk, task)[:, 6:]
        same = torch.allclose(second[schema.HIDDEN][:, : TASK - 6], expected, atol=1e-5)
        assert same is mark

    def test_a_mask_of_decisions_would_drop_frames(self, make_model):
        """The trainer stores only what the mask marks; the store knows by itself where nothing is decided."""
        training = Training(make_model(), postproc=DecisionMask())
        with pytest.raises(ValueError, match="a stream's step must begin with the frame that its last step led to"):
            training.trainer.train()


# --- scaled rewards


def dqn_loss(model, **options):
    return MouseDQNLoss(model.head("dqn"), trunk=model.trunk, delay_value=False, **options)


def collect(env, frames=3 * TASK):
    torch.manual_seed(1)
    collector = Collector(env, None, frames_per_batch=ROWS * frames, total_frames=ROWS * frames)
    try:
        return next(iter(collector)).clone()
    finally:
        collector.shutdown()


def running_scores(rewards, seen=()):
    """Each time step's rewards ``[B]``, by mean and standard deviation of all rewards up to and with it."""
    seen, scores = list(seen), []
    for reward in rewards.unbind(1):
        seen += reward.tolist()
        every = torch.tensor(seen, dtype=torch.float64)
        scores.append((reward - every.mean()) / every.std(correction=0).clamp_min(1e-4))
    return torch.stack(scores, 1).float()


def check_loss_takes(loss, steps, scaled):
    """The loss of steps whose reward is the entry equals that of steps whose reward was replaced by it."""
    plain = steps.clone()
    expected_raw = loss(plain)["loss_dqn"]
    plain["next", "reward"] = scaled
    expected = loss(plain)["loss_dqn"]
    assert (expected - expected_raw).abs() > 0.01
    loss.set_keys(reward="xformed_reward")
    assert ("next", "xformed_reward") in loss.in_keys
    torch.testing.assert_close(loss(steps)["loss_dqn"], expected, rtol=1e-5, atol=1e-6)


def check_model_sees_raw_rewards(model, steps):
    """Every frame shows the reward that led to it, as the environment gave it."""
    inside = ~steps[schema.IS_INIT][:, 1:] & ~steps["next", "done"][:, :-1]
    shown, given = steps["previous", "reward"][:, 1:], steps["next", "reward"][:, :-1]
    assert torch.equal(shown[inside], given[inside])
    assert set(shown.unique().tolist()) == {0.0, 1.0}
    assert not [key for key in model.trunk.in_keys if "xformed_reward" in key]


@BATCHED
def test_running_scale_from_the_environment_to_the_loss(make_model):
    model = make_model()
    scale = VecNormV2(["reward"], ["xformed_reward"], decay=1.0, reduce_batch_dims=True)
    env = TransformedEnv(make_env(), scale)
    steps = collect(env)
    expected = running_scores(steps["next", "reward"].squeeze(-1))
    torch.testing.assert_close(steps["next", "xformed_reward"].squeeze(-1), expected)
    assert expected.std() > 0.5
    rewards = steps["next", "reward"]
    torch.testing.assert_close(scale.loc["reward"], rewards.mean().reshape(1))
    torch.testing.assert_close(scale.scale["reward"], rewards.std(correction=0).reshape(1))
    check_model_sees_raw_rewards(model, steps)
    check_loss_takes(dqn_loss(model), steps, steps["next", "xformed_reward"])


@BATCHED
def test_running_scale_through_the_store(make_model):
    """A store keeps what frames hold, so the entry has to be one of the frame, beside the reward that led to it."""
    model = make_model()
    keys = [("previous", "reward")], [("previous", "xformed_reward")]
    env = TransformedEnv(make_env(), VecNormV2(*keys, decay=1.0, reduce_batch_dims=True))
    steps = collect(env, TASK)
    # the first frames, before any action, are counted as rewards of zero
    expected = running_scores(steps["next", "reward"].squeeze(-1), seen=[0.0] * ROWS)
    torch.testing.assert_close(steps["next", "previous", "xformed_reward"].squeeze(-1), expected)

    loss = dqn_loss(model)
    loss.set_keys(reward="xformed_reward")
    store = make_store()
    buffer = replay_buffer(store.select(loss.in_keys), window=TASK, batch_size=64, start_share=1.0, seed=0)
    buffer.extend(steps)
    sample = buffer.sample()
    rows = sample["index"][:, 0] // (TASK + 1)  # a task is stored as its steps' frames and its last one
    assert set(rows.tolist()) == set(range(ROWS))
    torch.testing.assert_close(sample["next", "xformed_reward"].squeeze(-1), expected[rows])
    assert torch.equal(sample["previous", "reward"], steps["previous", "reward"][rows])
    assert ("next", "reward") not in sample.keys(True)
    plain = steps[rows].set(("next", "reward"), sample["next", "xformed_reward"])
    expected_loss = dqn_loss(model)(plain)["loss_dqn"]
    torch.testing.assert_close(loss(sample)["loss_dqn"], expected_loss, rtol=1e-5, atol=1e-6)
    assert (expected_loss - dqn_loss(model)(steps[rows])["loss_dqn"]).abs() > 0.01


@pytest.mark.parametrize("place", ["inside", "outside"])
@BATCHED
def test_running_scale_with_rows_that_reset_one_by_one(place):
    """What a frame shows as the reward before it stays what it was when the step ended, or the store would refuse."""

    def scale():
        keys = [("previous", "reward")], [("previous", "xformed_reward")]
        return VecNormV2(*keys, decay=1.0, reduce_batch_dims=place == "outside")

    def worker(row):
        room = DarkRoomEnv(range(9), batch_size=(), size=3, max_steps=3 + row, seed=row)
        env = TaskEnv(room, episodes_per_task=2)
        return TransformedEnv(env, scale()) if place == "inside" else env

    env = SerialEnv(3, [partial(worker, row) for row in range(3)])
    env = TransformedEnv(env, scale()) if place == "outside" else env
    store = make_store()
    torch.manual_seed(0)
    collector = Collector(env, None, frames_per_batch=60, total_frames=180)
    try:
        for batch in collector:
            store.extend(batch)
            ends = batch["next", "done"][:, :-1]
            assert ends.any(0).sum() > ends.all(0).sum()
            shown, given = (
                batch["previous", "xformed_reward"][:, 1:],
                batch["next", "previous", "xformed_reward"][:, :-1],
            )
            assert torch.equal(shown[~ends], given[~ends])
    finally:
        collector.shutdown()
    assert len(store) > 100


@pytest.mark.parametrize("entry", ["reward", "xformed_reward"])
def test_fixed_scale_on_the_replay_buffer(make_model, entry):
    model = make_model()
    steps = collect(make_env(), TASK)
    loss, option = dqn_loss(model), dqn_loss(model, reward_scale=20.0, reward_shift=-1.0)
    loss.set_keys(reward=entry)
    store = make_store()
    # the transform's input has to be read too
    buffer = replay_buffer(store.select([*loss.in_keys, ("next", "reward")]), window=6, batch_size=16, seed=0)
    buffer.append_transform(RewardScaling(-1.0, 20.0, in_keys=[("next", "reward")], out_keys=[("next", entry)]))
    buffer.extend(steps)
    sample = buffer.sample()
    assert set(sample["next", entry].unique().tolist()) == {-1.0, 19.0}
    assert set(sample["previous", "reward"].unique().tolist()) == {0.0, 1.0}
    scaled = loss(sample.clone())["loss_dqn"]
    sample["next", "reward"] = (sample["next", entry] + 1) / 20
    torch.testing.assert_close(scaled, option(sample)["loss_dqn"])
