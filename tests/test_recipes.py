"""Offline training through TorchRL's trainer: what is stepped when, checkpoints, resuming."""

import itertools
import math
import random

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.objectives import SoftUpdate
from torchrl.record.loggers import Logger

from torchrl_mouse.data import AugmentScalarSpec, AugmentTokensConfig, TokenAugmenter
from torchrl_mouse.data.offline import OfflineSource
from torchrl_mouse.models import MouseConfig, MouseModel
from torchrl_mouse.objectives import CombinedLoss, MouseDQNLoss, SupervisedPolicyLoss
from torchrl_mouse.recipes import claim, offline_trainer, run, warmup_cosine
from torchrl_mouse.schema import from_mouse_records

NUM_ACTIONS = 3


def make_buffer(sampler=None, windows=12):
    generator = torch.Generator().manual_seed(11)
    shape = (windows, 4)
    records = {
        "action": torch.randint(NUM_ACTIONS, shape, generator=generator),
        "reward": torch.randn(shape, generator=generator),
        "done": torch.tensor([0, 0, 1, 0]).repeat(windows, 1),
        "time": torch.tensor([0, 1, 2, 0]).repeat(windows, 1),
        "q_star": torch.randn(*shape, NUM_ACTIONS, generator=generator),
    }
    options = {} if sampler is None else {"sampler": sampler}
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(windows), batch_size=4, **options)
    buffer.extend(from_mouse_records(TensorDict(records, shape)))
    return buffer


class Recorder(Logger):
    """Keeps what a trainer logs."""

    def __init__(self):
        self.scalars = []
        super().__init__(exp_name="test", log_dir="")

    def _create_experiment(self):
        return None

    def log_scalar(self, name, value, step=None):
        self.scalars.append((name, float(value), step))

    def log_video(self, name, video, step=None, **kwargs):
        raise NotImplementedError

    def log_hparams(self, cfg):
        raise NotImplementedError

    def log_histogram(self, name, data, **kwargs):
        raise NotImplementedError

    def log_str(self, name, value, step=None):
        raise NotImplementedError

    def __repr__(self):
        return "Recorder()"


class Training:
    """A tiny training run and its parts."""

    def __init__(self, directory, updates=20, seed=0, init=0, sampler=None, **options):
        torch.manual_seed(init)
        model = MouseModel(
            MouseConfig(
                hidden_dim=8,
                embedding_kwargs={"max_num_actions": NUM_ACTIONS},
                backbone_kwargs=None,
                dqn_head_kwargs={"hidden_dim": 4},
                sp_head_kwargs={"num_layers": 1},
            )
        )
        self.model = model
        dqn = MouseDQNLoss(model.head("dqn"), cql_weight=0.1)
        self.loss = CombinedLoss(model.trunk, {"dqn": dqn, "sp": SupervisedPolicyLoss(model.head("sp"))})
        self.updater = Counted(SoftUpdate(dqn, tau=0.1))
        self.optimizer = torch.optim.AdamW(self.loss.parameters(), lr=1e-2)
        self.scheduler = warmup_cosine(self.optimizer, updates, warmup=5)
        self.buffer = make_buffer(sampler)
        self.trainer = offline_trainer(
            self.loss,
            self.buffer,
            self.optimizer,
            updates=updates,
            directory=directory,
            target_updaters=(self.updater.updater,),
            scheduler=self.scheduler,
            seed=seed,
            progress_bar=False,
            **options,
        )

    def steps(self):
        return {int(state["step"]) for state in self.optimizer.state_dict()["state"].values()}

    def weights(self):
        return {name: value.clone() for name, value in self.loss.state_dict().items()}


class Counted:
    """Counts the steps of a target updater."""

    def __init__(self, updater):
        self.updater, self.count, step = updater, 0, updater.step

        def counted():
            self.count += 1
            step()

        updater.step = counted


def same(one, other):
    assert set(one) == set(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def checkpoints(directory):
    return sorted(path.name for path in (directory / "checkpoints").iterdir() if path.is_dir())


@pytest.mark.parametrize("updates", [1, 7])
def test_counts_are_exact(tmp_path, updates):
    training = Training(tmp_path, updates)
    before = training.weights()
    assert run(training.trainer) is True
    assert training.steps() == {updates}
    assert training.updater.count == updates
    assert training.scheduler.last_epoch == updates
    assert training.trainer.collected_frames == updates
    assert not same(training.weights(), before)


def test_every_update_draws_a_batch_of_its_own(tmp_path):
    training, drawn = Training(tmp_path, 6), []
    training.loss.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[0].clone()))
    run(training.trainer)
    assert [batch.shape for batch in drawn] == [(4, 4)] * 6
    assert any(
        (first["next", "reward"] != second["next", "reward"]).any() for first, second in itertools.pairwise(drawn)
    )


def test_learns(tmp_path):
    training = Training(tmp_path, 150)
    batch = training.buffer[:]
    before = training.loss(batch)["loss_sp"].item()
    run(training.trainer)
    assert training.loss(batch)["loss_sp"].item() < 0.9 * before


def test_schedule_by_hand():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine(optimizer, 6, warmup=2, floor=0.1)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    cosine = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * part / 4)) / 2) for part in range(5)]
    assert rates == pytest.approx([1.0, 2.0, *cosine, 0.2])


@pytest.mark.parametrize(("clip_norm", "largest"), [(0.01, 0.01), (None, math.inf)])
def test_clipping(tmp_path, clip_norm, largest):
    training, norms = Training(tmp_path, 3, clip_norm=clip_norm), []
    parameters = training.optimizer.param_groups[0]["params"]

    def record(*_):
        gradients = [parameter.grad.norm() for parameter in parameters if parameter.grad is not None]
        norms.append(torch.stack(gradients).norm().item())

    training.optimizer.register_step_pre_hook(record)
    run(training.trainer)
    assert len(norms) == 3
    assert max(norms) <= largest + 1e-6
    assert min(norms) > 0.009


def test_keeps_the_newest_two_checkpoints(tmp_path):
    run(Training(tmp_path, 11, checkpoint_interval=4).trainer)
    assert [int(name.rpartition("-")[2]) for name in checkpoints(tmp_path)] == [8, 11]


def test_checkpoints_at_their_interval(tmp_path):
    training, counts = Training(tmp_path, 7, checkpoint_interval=2), []
    save = training.trainer._save_trainer
    training.trainer._save_trainer = lambda: (counts.append(training.trainer.collected_frames), save())
    run(training.trainer)
    assert counts == [2, 4, 6, 7]


class PowerCutError(Exception):
    pass


def crash_at_update_14(training, **options):
    calls = []

    def crash(*_):
        calls.append(1)
        if len(calls) == 14:
            raise PowerCutError("lights out")

    training.loss.register_forward_pre_hook(crash)
    with pytest.raises(PowerCutError, match="lights out"):
        run(training.trainer, **options)


def test_resuming_after_a_crash_equals_never_stopping(tmp_path):
    whole = Training(tmp_path / "whole", checkpoint_interval=5)
    run(whole.trainer)
    crash_at_update_14(Training(tmp_path / "crashing", checkpoint_interval=5))
    resumed = Training(tmp_path / "crashing", init=5, checkpoint_interval=5)
    assert run(resumed.trainer) is True
    assert resumed.updater.count == 10
    assert same(resumed.weights(), whole.weights())


@pytest.mark.parametrize("sampler", [None, SamplerWithoutReplacement])
def test_resuming_equals_never_stopping(tmp_path, sampler):
    def training(name):
        return Training(tmp_path / name, checkpoint_interval=5, sampler=sampler and sampler())

    whole = training("whole")
    run(whole.trainer)
    stopped = training("stopped")
    stopped.trainer.total_frames = 10  # Stops at half, with the schedule of the whole run.
    run(stopped.trainer)
    assert stopped.steps() == {10}

    torch.manual_seed(99)
    resumed = Training(tmp_path / "stopped", init=5, checkpoint_interval=5, sampler=sampler and sampler())
    assert not same(resumed.weights(), stopped.weights())
    assert run(resumed.trainer) is True
    assert resumed.updater.count == 10
    assert resumed.steps() == {20}
    assert same(resumed.weights(), whole.weights())
    assert resumed.scheduler.state_dict()["last_epoch"] == 20
    assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


def test_a_finished_run_is_left_alone(tmp_path):
    finished = Training(tmp_path, 6)
    run(finished.trainer)
    names = checkpoints(tmp_path)
    again = Training(tmp_path, 6, init=3)
    assert run(again.trainer) is False
    assert same(again.weights(), finished.weights())
    assert again.updater.count == 0
    assert checkpoints(tmp_path) == names


def test_beginning_anew(tmp_path):
    first = Training(tmp_path, 6)
    run(first.trainer)
    second = Training(tmp_path, 6)
    assert run(second.trainer, resume=False) is True
    assert second.updater.count == 6
    assert same(second.weights(), first.weights())


def test_beginning_anew_leaves_nothing_of_the_old_run(tmp_path):
    run(Training(tmp_path, 20, checkpoint_interval=5).trainer)
    crash_at_update_14(Training(tmp_path, 20, checkpoint_interval=5, seed=1), resume=False)
    resumed = Training(tmp_path, 20, checkpoint_interval=5, seed=1)
    assert run(resumed.trainer) is True
    assert resumed.updater.count == 10  # From the new run's update 10, not from the old run's end.


def test_contexts_are_told_of_every_update(tmp_path):
    training = Training(tmp_path, 7)
    run(training.trainer)
    assert int(training.model.trunk.weight_version) == 7


@pytest.mark.parametrize("option", ["updates", "log_interval", "checkpoint_interval"])
def test_counts_of_zero(tmp_path, option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        Training(tmp_path, **{option: 0})


def test_seeds_reproduce(tmp_path):
    def weights(name, seed):
        torch.manual_seed(len(name))  # Whatever was drawn before.
        training = Training(tmp_path / name, 5, seed=seed)
        run(training.trainer)
        return training.weights()

    first = weights("first", 0)
    assert same(weights("again", 0), first)
    assert not same(weights("other", 1), first)


def test_logs_every_loss(tmp_path):
    logger = Recorder()
    training = Training(tmp_path, 6, logger=logger, log_interval=2)
    run(training.trainer)
    for key in (*training.loss.out_keys, "grad_norm"):
        values = [(value, step) for name, value, step in logger.scalars if name == key]
        assert [step for _, step in values] == [2, 4, 6], key
        assert all(math.isfinite(value) for value, _ in values), key


def test_history_holds_no_graph(tmp_path):
    training = Training(tmp_path, 3)
    run(training.trainer)
    history = [item for values in training.trainer._log_dict.values() for item in values]
    assert len([item for item in history if isinstance(item, torch.Tensor)]) >= 3 * len(training.loss.out_keys)
    assert not any(isinstance(item, torch.Tensor) and item.requires_grad for item in history)


def test_source_gives_batches_on_the_device():
    source = OfflineSource(make_buffer(), device=torch.device("meta"))
    assert source.sample(TensorDict())["action"].device.type == "meta"


@pytest.mark.parametrize("sampler", [None, SamplerWithoutReplacement])
def test_source_draws_from_a_generator_of_its_own(sampler):
    batches = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        source = OfflineSource(make_buffer(sampler and sampler()))
        source.set_seed(3)
        batches.append(torch.stack([source.sample(TensorDict()) for _ in range(5)]))
    assert (batches[0] == batches[1]).all()


def test_source_restores_its_draws():
    source = OfflineSource(make_buffer(SamplerWithoutReplacement()))
    assert source.set_seed(3) == 3
    source.sample(TensorDict())
    state = source.state_dict()
    expected = [source.sample(TensorDict()) for _ in range(5)], torch.rand(2)
    other = OfflineSource(make_buffer(SamplerWithoutReplacement()))
    other.load_state_dict(state)
    for batch in expected[0]:
        assert (other.sample(TensorDict()) == batch).all()
    assert torch.equal(torch.rand(2), expected[1])


def test_source_restores_what_transforms_draw():
    def make_source():
        buffer = make_buffer()
        augment = AugmentTokensConfig(scale_reward=AugmentScalarSpec(1.0, 0.5))
        buffer.append_transform(TokenAugmenter(augment, 0, 0, "cpu", torch.Generator().manual_seed(1)))
        return OfflineSource(buffer)

    source = make_source()
    source.sample(TensorDict())
    state = source.state_dict()
    expected = [source.sample(TensorDict()) for _ in range(3)], random.random()
    other = make_source()
    other.load_state_dict(state)
    for batch in expected[0]:
        assert (other.sample(TensorDict()) == batch).all()
    assert random.random() == expected[1]


def test_a_run_is_a_folder(tmp_path):
    (tmp_path / "notes").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(ValueError, match=r"claim: .*notes must be a folder, got a file"):
            claim(tmp_path / "notes", {"updates": 1}, restart=restart)
    assert (tmp_path / "notes").read_text() == "years of work"


def test_restart_deletes_runs_only(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"must hold a run to be deleted, got no options.json in it"):
        claim(tmp_path, {"updates": 1}, restart=True)
    assert (tmp_path / "thesis.tex").exists()
    claim(tmp_path / "run", {"updates": 1})
    (tmp_path / "run/model").touch()
    claim(tmp_path / "run", {"updates": 2}, restart=True)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["options.json"]
