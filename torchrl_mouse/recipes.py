"""The wiring that examples share, on `torchrl.trainers`."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import DefaultOptimizationStepper

from torchrl_mouse import schema
from torchrl_mouse.data.offline import OfflineSource
from torchrl_mouse.data.saving import replace_json
from torchrl_mouse.modules.trunk import Trunk

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn
    from torch.optim.lr_scheduler import LRScheduler
    from torchrl.collectors import BaseCollector
    from torchrl.data import ReplayBuffer
    from torchrl.modules import EGreedyModule
    from torchrl.objectives import LossModule, TargetNetUpdater
    from torchrl.record.loggers import Logger


class _Stepper(DefaultOptimizationStepper):
    """Updates, then steps targets and schedule: a remote learner takes no hooks, but it does take this object."""

    updates_replay_priority = True  # There are none, and a remote learner need not send them.

    def __init__(self, target_updaters: tuple[TargetNetUpdater, ...], scheduler: LRScheduler | None) -> None:
        super().__init__()
        self.after = {str(number): updater for number, updater in enumerate(target_updaters)}
        if scheduler is not None:
            self.after["scheduler"] = scheduler

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        losses: TensorDictBase = super().step(trainer, sub_batch)
        for stepped in self.after.values():
            stepped.step()
        _mark(trainer.loss_module)
        return losses.detach()  # The trainer's history would keep the graph alive to the end.

    def state_dict(self) -> dict[str, Any]:
        return {name: stepped.state_dict() for name, stepped in self.after.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, stepped in self.after.items():
            stepped.load_state_dict(state_dict[name])


class _Trainer(Trainer):
    """Gives a remote learner's weights to the policy, and the exploration, which the learner lacks, to the workers."""

    exploration_module: EGreedyModule | None = None  # By this name it is part of checkpoints.

    def _execution_weight_publication(self) -> Any:
        return self._compose_execution_weight_publication(self.exploration_module)

    def set_seed(self) -> None:
        super().set_seed()
        if hasattr(self.collector, "reset"):  # It has begun tasks already, which the seed decides, too.
            self.collector.reset()

    def load_from_file(self, file: str | Path, **kwargs: Any) -> Trainer:
        super().load_from_file(file, **kwargs)
        self.fetch()
        if not isinstance(self.collector, OfflineSource):
            # Environments have no state that could be saved: with the old seed they would begin with the old tasks.
            self.seed += self.collected_frames
            self.set_seed()
        return self

    def fetch(self) -> None:
        """Loads a remote learner's weights into the loss, and so into the policy."""
        if self.learner_backend == "ray":
            self.loss_module.load_state_dict(self._execution_backend.state_dict()["ranks"][0]["loss_module"])
            _mark(self.loss_module)


def _mark(loss: LossModule) -> None:
    """Tells the contexts on a loss's trunk that its weights have changed."""
    if (mark := getattr(getattr(loss, "trunk", None), "mark_weight_update", None)) is not None:
        mark()


def update_weights(policy: nn.Module, collector: BaseCollector) -> None:
    """Gives a collector the policy's weights, and says to every trunk in it that they have changed.

    It takes the place of ``collector.update_policy_weights_()`` wherever weights are trained while tasks are played,
    also where collector and optimiser share the weights: keys and values in the contexts are of the old ones. In a
    :class:`~torchrl.trainers.Trainer` it is a hook: ``trainer.register_op("post_steps", partial(update_weights, policy,
    collector))``.

    Args:
        policy: the module that the collector was built with, or one of the same structure where a factory made its own.
        collector: any of TorchRL's.

    Examples:
        >>> from torchrl.collectors import Collector
        >>> from torchrl_mouse.envs import DarkRoomEnv, TaskEnv
        >>> from torchrl_mouse.models import MouseConfig, MouseModel
        >>> sizes = {"max_num_actions": 5, "max_num_obs_discrete": 9}
        >>> model = MouseModel(MouseConfig(hidden_dim=16, embedding_kwargs=sizes, dqn_head_kwargs={}))
        >>> env = TaskEnv(DarkRoomEnv(range(9), batch_size=2, size=3), episodes_per_task=2)
        >>> policy = model.actor(env.action_spec_unbatched)
        >>> collector = Collector(env, policy, frames_per_batch=8, total_frames=16)
        >>> for batch in collector:
        ...     # ... an optimiser step ...
        ...     update_weights(policy, collector)
        >>> int(model.trunk.weight_version)
        2
        >>> collector.shutdown()
    """
    for module in policy.modules():
        if isinstance(module, Trunk):
            module.mark_weight_update()
    # As a tensordict: a collector in this process takes no module.
    collector.update_policy_weights_(TensorDict.from_module(policy))


def warmup_cosine(
    optimizer: torch.optim.Optimizer, updates: int, *, warmup: int = 0, floor: float = 0.0
) -> LRScheduler:
    """Makes a schedule that rises linearly, then falls along a cosine.

    Args:
        optimizer: whose learning rate is scheduled.
        updates: length of the run.
        warmup: updates until the full rate.
        floor: share of the full rate at the end.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = warmup_cosine(optimizer, 4, warmup=2)
        >>> [round(schedule.lr_lambdas[0](update), 2) for update in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / warmup
        progress = min(1.0, (update - warmup) / max(1, updates - warmup))
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def claim(directory: str | Path, options: Mapping[str, Any], *, restart: bool = False) -> None:
    """Makes the folder of a run, and notes its options there; a run that was begun with others is not gone on with.

    Args:
        directory: the run's.
        options: what decides the result, as JSON can hold it.
        restart: delete what is there.

    Raises:
        ValueError: the folder holds a run with other options, or is to be deleted and holds none, or is a file.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     claim(folder, {"updates": 10})
        ...     claim(folder, {"updates": 10})
        ...     claim(folder, {"updates": 20})
        Traceback (most recent call last):
            ...
        ValueError: claim: the run in /... must have been begun with the same options, got updates 20 instead of 10.
        Restart it, or choose another folder.
    """
    directory = Path(directory)
    file = directory / "options.json"
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"claim: {directory} must be a folder, got a file. Choose another.")
    if restart and directory.exists():
        if not file.exists() and any(directory.iterdir()):
            raise ValueError(
                f"claim: {directory} must hold a run to be deleted, got no {file.name} in it. Choose another folder."
            )
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if file.exists():
        before, now = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(options))
        if names := [name for name in before | now if before.get(name) != now.get(name)]:
            others = ", ".join(f"{name} {now.get(name)} instead of {before.get(name)}" for name in names)
            raise ValueError(
                f"claim: the run in {directory} must have been begun with the same options, got {others}. "
                "Restart it, or choose another folder."
            )
    replace_json(file, options)


def offline_trainer(
    loss: LossModule,
    replay_buffer: ReplayBuffer,
    optimizer: torch.optim.Optimizer,
    *,
    updates: int,
    directory: str | Path,
    target_updaters: tuple[TargetNetUpdater, ...] = (),
    scheduler: LRScheduler | None = None,
    clip_norm: float | None = 1.0,
    logger: Logger | None = None,
    log_interval: int = 10,
    checkpoint_interval: int = 500,
    seed: int = 0,
    device: torch.device | None = None,
    progress_bar: bool = True,
) -> Trainer:
    """Builds a :class:`~torchrl.trainers.Trainer` that learns from stored experience.

    Checkpoints hold the loss (trunk, heads, targets), the optimiser, the schedule and all random states;
    :func:`run` resumes from the newest.

    Args:
        loss: what is minimised, the sum of its entries that begin with ``loss``.
        replay_buffer: draws the batches.
        optimizer: over ``loss.parameters()``.
        updates: number of optimiser steps.
        directory: where checkpoints are kept (``directory/checkpoints``, the newest two).
        target_updaters: stepped after every update.
        scheduler: stepped after every update.
        clip_norm: largest norm of the gradient; ``None`` does not clip.
        logger: a TorchRL logger; one frame on its axis is one update.
        log_interval: updates between log entries.
        checkpoint_interval: updates between checkpoints.
        seed: of torch, numpy and the sampling.
        device: where batches are put.
        progress_bar: show one.

    Raises:
        ValueError: a number of updates or an interval is below 1.

    Examples:
        >>> import tempfile
        >>> from torchrl_mouse.data import DatasetStore, replay_buffer
        >>> from torchrl_mouse.models import MouseConfig, MouseModel
        >>> from torchrl_mouse.objectives import MouseDQNLoss
        >>> store = DatasetStore(max_action_dim=3)
        >>> for step in range(8):
        ...     store.append({"action": step % 3, "reward": 1.0, "done": 0, "episode_step": step})
        >>> heads = {"embedding_kwargs": {"max_num_actions": 3}, "dqn_head_kwargs": {}}
        >>> model = MouseModel(MouseConfig(hidden_dim=16, backbone_kwargs=None, **heads))
        >>> loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk, delay_value=False)
        >>> optimizer = torch.optim.SGD(loss.parameters(), lr=0.01)
        >>> buffer = replay_buffer(store, window=4, batch_size=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     options = {"updates": 3, "directory": folder, "progress_bar": False}
        ...     trainer = offline_trainer(loss, buffer, optimizer, **options)
        ...     run(trainer), run(offline_trainer(loss, buffer, optimizer, **options))  # the second has nothing to do
        (True, False)
    """
    _check_counts(
        "offline_trainer", updates=updates, log_interval=log_interval, checkpoint_interval=checkpoint_interval
    )
    source = OfflineSource(replay_buffer, device=device)
    trainer = _make_trainer(
        directory,
        optimization_stepper=_Stepper(target_updaters, scheduler),
        collector=source,
        total_frames=updates,
        optim_steps_per_batch=1,
        loss_module=loss,
        optimizer=optimizer,
        logger=logger,
        clip_norm=clip_norm,
        progress_bar=progress_bar,
        seed=seed,
        # `Trainer` acts once more frames than these have passed.
        save_trainer_interval=checkpoint_interval - 1,
        log_interval=log_interval - 1,
    )
    trainer.register_op("process_optim_batch", source.sample)
    return trainer


def online_trainer(
    loss: LossModule,
    collector: BaseCollector,
    policy: nn.Module,
    replay_buffer: ReplayBuffer,
    optimizer: torch.optim.Optimizer,
    *,
    total_frames: int,
    updates_per_batch: int,
    directory: str | Path,
    target_updaters: tuple[TargetNetUpdater, ...] = (),
    scheduler: LRScheduler | None = None,
    explore: EGreedyModule | None = None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    evaluation_interval: int = 50_000,
    clip_norm: float | None = 1.0,
    logger: Logger | None = None,
    checkpoint_interval: int = 50_000,
    seed: int = 0,
    progress_bar: bool = True,
    learner_backend: Literal["local", "ray"] = "local",
    learner_backend_options: Mapping[str, Any] | None = None,
) -> Trainer:
    """Builds a :class:`~torchrl.trainers.Trainer` that collects, stores and learns in turns.

    Checkpoints hold the loss (trunk, heads, targets), the policy, the optimiser, the schedule and the buffer;
    :func:`run` resumes from the newest, with a seed of its own; tasks that were being played are lost.

    Args:
        loss: what is minimised, the sum of its entries that begin with ``loss``.
        collector: plays; its batches go to the buffer.
        policy: what the collector plays with, given its weights at the beginning and after each batch.
        replay_buffer: of a :class:`~torchrl_mouse.data.DatasetStore`, see
            :func:`~torchrl_mouse.data.replay_buffer`; the first batch has to end a task.
        optimizer: over ``loss.parameters()``.
        total_frames: number of steps to play, over all rows.
        updates_per_batch: optimiser steps after each batch of the collector.
        directory: where checkpoints are kept (``directory/checkpoints``, the newest two).
        target_updaters: stepped after every update.
        scheduler: stepped after every update.
        explore: the exploration in the policy, whose epsilon falls with the frames played.
        evaluate: called every ``evaluation_interval`` frames; returns numbers to log.
        evaluation_interval: in frames, at least 1.
        clip_norm: largest norm of the gradient; ``None`` does not clip.
        logger: a TorchRL logger; its axis is frames.
        checkpoint_interval: frames between checkpoints, at least 1.
        seed: of torch, numpy, environments and sampling.
        progress_bar: show one.
        learner_backend: ``"ray"`` learns in processes of their own, with TorchRL's remote learner. It takes a collector
            with ``backend="ray"``, a buffer with ``service_backend="ray"``, a loss that knows its ``actor``, and as
            policy that actor, followed by ``explore`` where there is one. The loss and the policy here get the learned
            weights before ``evaluate`` and in the end.
        learner_backend_options: TorchRL's, as ``world_size`` (ranks that share a batch) and ``resources_per_rank``.

    Raises:
        ValueError: a number of frames, updates or an interval is below 1, or the remote learner's loss has no actor.

    Examples:
        See ``examples/online_training.py``.
    """
    _check_counts(
        "online_trainer",
        total_frames=total_frames,
        updates_per_batch=updates_per_batch,
        evaluation_interval=evaluation_interval,
        checkpoint_interval=checkpoint_interval,
    )
    if learner_backend == "ray" and not hasattr(loss, "value_network"):
        raise ValueError(
            f"online_trainer: loss must know its actor where learner_backend is 'ray', got {type(loss).__name__} "
            "without. Give it as MouseDQNLoss(actor=)."
        )
    replay_buffer.set_rng(torch.Generator().manual_seed(seed))
    trainer = _make_trainer(
        directory,
        optimization_stepper=_Stepper(target_updaters, scheduler),
        collector=collector,
        total_frames=total_frames,
        optim_steps_per_batch=updates_per_batch,
        loss_module=loss,
        optimizer=optimizer,
        replay_buffer=replay_buffer,
        logger=logger,
        clip_norm=clip_norm,
        progress_bar=progress_bar,
        seed=seed,
        save_trainer_interval=checkpoint_interval - 1,
        log_interval=1,
        learner_backend=learner_backend,
        learner_backend_options=learner_backend_options,
    )
    trainer.exploration_module = explore
    if learner_backend == "local":  # A remote learner does all of this by itself.
        trainer.register_op("batch_process", replay_buffer.extend)
        trainer.register_op("process_optim_batch", lambda _: replay_buffer.sample())
        for stage in ("setup", "post_steps"):
            trainer.register_op(stage, partial(update_weights, policy, collector))

    def after_batch(batch: TensorDictBase) -> dict[str, float]:
        mask = batch.get(schema.MASK, None)
        played = batch.numel() if mask is None else int(mask.sum())  # as the trainer counts
        if explore is not None:
            explore.step(played)
        frames = trainer.collected_frames
        log = {} if explore is None else {"epsilon": float(explore.eps)}
        if evaluate is not None and frames // evaluation_interval > (frames - played) // evaluation_interval:
            trainer.fetch()
            log.update(evaluate())
        return log

    trainer.register_op("post_steps_log", after_batch)
    trainer.register_op("shutdown", trainer.fetch)
    return trainer


def _check_counts(where: str, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{where}: {name} must be at least 1, got {value}.")


def _make_trainer(directory: str | Path, **options: Any) -> _Trainer:
    return _Trainer(
        frame_skip=1,
        clip_grad_norm=True,
        checkpoint=Checkpoint(),
        checkpoint_rotation=CheckpointRotation(Path(directory, "checkpoints"), keep_last=2),
        **options,
    )


def run(trainer: Trainer, *, resume: bool = True) -> bool:
    """Trains to the end, from the newest checkpoint where there is one.

    Args:
        trainer: from :func:`offline_trainer` or :func:`online_trainer`.
        resume: ``False`` begins anew, and removes the checkpoints that are there.

    Returns:
        Whether any update was made: ``False`` where the checkpoint was of a finished run.

    Examples:
        See :func:`offline_trainer`.
    """
    rotation = trainer.checkpoint_rotation
    if not resume:
        # The rotation keeps the furthest checkpoints: old ones would outlive those of a run that begins anew.
        shutil.rmtree(rotation.directory, ignore_errors=True)
    newest = rotation.latest()
    if newest is not None:
        trainer.load_from_file(newest)
    if trainer.collected_frames >= trainer.total_frames:
        trainer.collector.shutdown()
        return False  # `Trainer.train` would make one more update.
    trainer.train()
    return True
