"""After weights have changed, contexts are rebuilt or kept, whatever changed the weights and whatever collects."""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import AsyncCollector, Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import Transform, TransformedEnv
from torchrl.modules import set_recurrent_mode
from torchrl.trainers import Trainer
from torchrl.weight_update import MultiProcessWeightSyncScheme

from torchrl_mouse import schema
from torchrl_mouse.envs import DarkRoomEnv, TaskEnv
from torchrl_mouse.objectives import MouseDQNLoss
from torchrl_mouse.recipes import update_weights

if TYPE_CHECKING:
    from pathlib import Path

    from torchrl_mouse.models import MouseModel

ROWS, STEPS = 2, 6  # steps of a batch; a task is longer than three
EPISODES = 5
CHOICES = ["rebuild", "keep"]


def make_env(seed: int) -> TaskEnv:
    room = DarkRoomEnv(range(9), batch_size=ROWS, size=3, max_steps=4, terminate_on_goal=False, seed=seed)
    return TaskEnv(room, episodes_per_task=EPISODES)


def actor_of(model: MouseModel) -> Any:
    return model.actor(make_env(0).action_spec_unbatched, temperature=1.0)


def with_choice(model: MouseModel, choice: str) -> MouseModel:
    model.trunk.on_weight_update = choice
    return model


def change_weights(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))


def window(trunk: Any, steps: TensorDict) -> torch.Tensor:
    with set_recurrent_mode(True), torch.no_grad():
        return trunk(steps.select(*trunk.in_keys).clone())[schema.HIDDEN]


def check(trunks: list[Any], batches: list[TensorDict]) -> None:
    """Batches, of the same tasks one after another, ran each with the trunk as it was then."""
    batches = [batch.reshape(-1, batch.shape[-1]) for batch in batches]
    steps = torch.cat(batches, -1)
    assert steps[schema.IS_INIT].sum() == len(steps)
    assert steps[schema.IS_INIT][:, 0].all()
    keeps = copy.deepcopy(trunks[0])  # without contexts
    keeps.on_weight_update = "keep"
    begin = 0
    for trunk, batch in zip(trunks, batches, strict=True):
        rebuilt = window(trunk, steps)[:, begin : begin + batch.shape[-1]]
        keeps.load_state_dict(trunk.state_dict())
        kept = keeps.append(batch.clone())[schema.HIDDEN]
        if begin:
            assert (rebuilt - kept).abs().amax((0, 2)).min() > 1e-2, "the weights must have changed visibly"
        expected = kept if trunk.on_weight_update == "keep" else rebuilt
        torch.testing.assert_close(batch[schema.HIDDEN], expected, atol=1e-5, rtol=1e-5)
        begin += batch.shape[-1]


# What changes the weights, in one process


def by_hand(model, loss):
    change_weights(model)
    model.trunk.mark_weight_update()


def optimize(loss, fused):
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.1, fused=fused)
    steps = make_env(3).rollout(6)
    out = loss(steps)
    sum(value for name, value in out.items() if name.startswith("loss")).backward()
    optimizer.step()
    optimizer.zero_grad()


def by_optimizer(model, loss, fused):
    optimize(loss, fused)
    model.trunk.mark_weight_update()


def by_data(model, loss):
    """Does not move parameters' autograd versions."""
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5
    model.trunk.mark_weight_update()


def by_state_dict(model, loss):
    changed = {name: value * 1.5 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.load_state_dict(changed)


def by_state_dict_of_loss(model, loss):
    trained = dict(loss.named_parameters())
    changed = {name: value * 1.5 if name in trained else value for name, value in loss.state_dict().items()}
    loss.load_state_dict(changed)
    model.trunk.mark_weight_update()


CHANGES = {
    "by hand": by_hand,
    "optimizer": partial(by_optimizer, fused=False),
    "fused optimizer": partial(by_optimizer, fused=True),
    "data": by_data,
    "state_dict": by_state_dict,
    "state_dict of the loss": by_state_dict_of_loss,
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("change", CHANGES)
def test_contexts_after_a_change(change, choice, make_model):
    model = with_choice(make_model(), choice)
    loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk, delay_value=False)
    env, actor = make_env(1), actor_of(model)
    old, before = copy.deepcopy(model.trunk), env.rollout(STEPS, actor)
    CHANGES[change](model, loss)
    after = env.rollout(STEPS, actor, auto_reset=False, tensordict=before[:, -1]["next"].clone())
    check([old, model.trunk], [before, after])


def test_a_checkpoint_with_the_same_number_is_other_weights(make_model):
    """Two models that were never marked are both of version 0."""
    model, other = make_model(), make_model()
    change_weights(other)
    env, actor = make_env(1), actor_of(model)
    old, before = copy.deepcopy(model.trunk), env.rollout(STEPS, actor)
    assert torch.equal(model.trunk.weight_version, other.trunk.weight_version)
    model.load_state_dict(other.state_dict())
    after = env.rollout(STEPS, actor, auto_reset=False, tensordict=before[:, -1]["next"].clone())
    check([old, model.trunk], [before, after])


def test_going_back_to_a_checkpoint_and_on_is_new(make_model):
    """An older checkpoint of a loss brings its version back; the next update must not get a number that was used."""
    model = make_model()
    loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk, delay_value=False)
    env, actor = make_env(1), actor_of(model)
    model.trunk.mark_weight_update()
    checkpoint = {name: value.clone() for name, value in loss.state_dict().items()}
    by_hand(model, loss)
    old, before = copy.deepcopy(model.trunk), env.rollout(STEPS, actor)  # of version 2
    loss.load_state_dict(checkpoint)
    assert int(model.trunk.weight_version) == 1
    model.trunk.mark_weight_update()
    after = env.rollout(STEPS, actor, auto_reset=False, tensordict=before[:, -1]["next"].clone())
    check([old, model.trunk], [before, after])


# Collectors


def unshare(model: MouseModel) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model.trunk.weight_version = model.trunk.weight_version.clone()


def collector_with_policy_of_its_own(model: MouseModel, **options: Any) -> Collector:
    def factory() -> Any:
        own = with_choice(type(model)(model.config), model.trunk.on_weight_update)
        own.load_state_dict(model.state_dict())
        return actor_of(own)

    return Collector(make_env(1), policy_factory=factory, **options)


class Gate(Transform):
    """Holds an environment in another process at the steps for which there is a file, and says so by a second file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.steps = folder, 0

    def _step(self, tensordict: TensorDict, next_tensordict: TensorDict) -> TensorDict:
        hold, here = self.folder / f"hold-{self.steps}", self.folder / f"here-{self.steps}"
        self.steps += 1
        if hold.exists():
            here.touch()
            while hold.exists():
                time.sleep(0.002)
        return next_tensordict


def make_gated_env(folder: Path) -> TransformedEnv:
    return TransformedEnv(make_env(1), Gate(folder))


def make_collector(kind: str, model: MouseModel, folder: Path | None = None) -> tuple[Any, Any]:
    """Returns a collector, and the policy whose weights it is to be given."""
    actor, env = actor_of(model), partial(make_env, 1)
    frames = {"frames_per_batch": ROWS * STEPS, "total_frames": 4 * ROWS * STEPS}
    if "pipes" in kind:
        frames["weight_sync_schemes"] = {"policy": MultiProcessWeightSyncScheme()}
    if kind == "Collector":
        return Collector(env, actor, **frames), actor
    if kind == "Collector, own policy":
        return collector_with_policy_of_its_own(model, **frames), actor
    if "Async" in kind:
        env = partial(make_gated_env, folder)
        if kind == "AsyncCollector":
            return AsyncCollector(env, actor, **frames), actor
        return MultiAsyncCollector([env], actor, **frames), actor
    frames.update({name: 2 * value for name, value in frames.items() if isinstance(value, int)})
    return MultiSyncCollector([env, partial(make_env, 2)], actor, cat_results="stack", **frames), actor


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("kind", "choice"),
    [
        ("Collector", "rebuild"),
        ("Collector", "keep"),
        ("Collector, own policy", "rebuild"),
        ("Collector, own policy", "keep"),
        ("MultiSyncCollector", "rebuild"),
        ("MultiSyncCollector", "keep"),
        ("MultiSyncCollector, not shared", "rebuild"),
        ("MultiSyncCollector, pipes, not shared", "rebuild"),
        ("MultiAsyncCollector", "rebuild"),
        ("MultiAsyncCollector", "keep"),
        ("AsyncCollector", "rebuild"),
    ],
)
def test_changes_while_a_collector_plays(kind, choice, make_model, tmp_path):
    """An optimiser's step, a fused one's and a loaded state, one after another in the same tasks.

    Workers that play on while a batch is looked at are held in the step after it, so that they see a change at a known
    time: its hidden state has been computed then.
    """
    model = with_choice(make_model(), choice)
    plays_on = "Async" in kind
    changes = STEPS + plays_on, 2 * STEPS + plays_on, 3 * STEPS + plays_on
    holds = [tmp_path / f"hold-{step - 1}" for step in changes]
    for hold in holds if plays_on else ():
        hold.touch()
    trunks, batches = [copy.deepcopy(model.trunk)], []
    collector, policy = make_collector(kind, model, tmp_path)
    try:
        if "not shared" in kind:  # TorchRL's workers read the very weights that are trained, unless these are replaced
            unshare(model)
        loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk, delay_value=False)
        for batch in collector:
            batches.append(batch.clone())
            number = len(batches) - 1
            if number == len(changes):
                break
            while plays_on and not holds[number].with_name(f"here-{changes[number] - 1}").exists():
                time.sleep(0.002)
            if number < 2:
                optimize(loss, fused=number == 1)
                update_weights(policy, collector)
            else:  # by TorchRL's own call
                by_state_dict(model, loss)
                collector.update_policy_weights_(TensorDict.from_module(policy) if "own" in kind else None)
            trunks.append(copy.deepcopy(model.trunk))
            holds[number].unlink(missing_ok=True)
    finally:
        for hold in holds:
            hold.unlink(missing_ok=True)
        collector.shutdown()
        del collector  # one that a failed test keeps alive until the interpreter exits hangs it there
    steps = torch.cat(batches, -1)
    check(trunks, list(steps.tensor_split(changes, -1)))


def test_without_the_update_a_collector_goes_on_with_old_keys(make_model):
    """What `update_weights` is for: TorchRL's own call moves the weights and says nothing."""
    model = make_model()
    old = copy.deepcopy(model.trunk)
    collector, _ = make_collector("Collector", model)
    try:
        batches = iter(collector)
        before = next(batches).clone()
        change_weights(model)
        collector.update_policy_weights_()
        after = next(batches).clone()
        check([old, with_choice(model, "keep").trunk], [before, after])
    finally:
        collector.shutdown()


@pytest.mark.filterwarnings("ignore:The '.*' hook stage:FutureWarning")
def test_hook_of_a_trainer(make_model):
    """Updates between batches, each a change of weights: every batch is of the weights of its time."""
    model = make_model()
    collector, policy = make_collector("Collector", model)
    loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk, delay_value=False)
    buffer = ReplayBuffer(storage=LazyTensorStorage(ROWS * 4), batch_size=ROWS)
    trainer = Trainer(
        collector=collector,
        total_frames=3 * ROWS * STEPS,
        frame_skip=1,
        optim_steps_per_batch=2,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=1e-2),
        progress_bar=False,
    )
    batches, weights = [], []

    def keep(batch: TensorDict) -> TensorDict:
        batches.append(batch.clone())
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        return batch

    trainer.register_op("batch_process", keep)
    trainer.register_op("process_optim_batch", lambda batch: buffer.extend(batch) is None or buffer.sample())
    trainer.register_op("post_steps", partial(update_weights, policy, collector))
    trainer.train()
    assert len(batches) == 3
    for number in (1, 2):
        model.load_state_dict(weights[number])
        steps = torch.cat(batches[: number + 1], -1)
        new = steps[schema.HIDDEN][:, number * STEPS :]
        torch.testing.assert_close(new, window(model.trunk, steps)[:, number * STEPS :], atol=1e-5, rtol=0)
