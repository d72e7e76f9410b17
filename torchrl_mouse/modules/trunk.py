"""The trunk: embedder and backbone as one TensorDictModule, over windows or step by step."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, Literal

import torch
from tensordict.nn import TensorDictModuleBase, dispatch
from torchrl.modules.tensordict_module.rnn import recurrent_mode

from torchrl_mouse import schema
from torchrl_mouse.modules.backbone import CausalBackbone
from torchrl_mouse.modules.checks import check_size
from torchrl_mouse.modules.embedding import MODALITIES, TableEmbedder
from torchrl_mouse.modules.kv_cache import KVCache, Lock, alone, run_order
from torchrl_mouse.modules.recurrent import GRUBackbone
from torchrl_mouse.modules.segments import segment_mask, segment_positions
from torchrl_mouse.streams import StreamTracker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tensordict import TensorDictBase
    from tensordict.utils import NestedKey

    from torchrl_mouse.modules.embedding import StepEmbedder


class Trunk(TensorDictModuleBase):
    """Turns what was seen so far into a hidden state per step.

    It runs in TorchRL's two modes (:class:`~torchrl.modules.set_recurrent_mode`). They agree at every step as long as
    the context holds the whole task (up to ``window`` steps); after an overflow the sequential mode agrees with a fresh
    pass over the steps that were kept.

    - **recurrent** (training; every ``LossModule`` switches it on): one pass over a window ``[*, T]``. Attention is
      causal and never crosses ``is_init``; index 0 begins a context. Padding belongs at a window's end, where no real
      step can see it. Gradients flow.
    - **sequential** (collection): one new step per row against a key-value cache. The tensordict carries the address of
      each row's context (``stream``), the trunk the numbers; ``is_init`` restarts a row. No gradients flow.

    .. note:: In sequential mode every step of a task must pass through the module. A row in the middle of a task that
        has no context is an error; but steps that bypass the module while the row's context lives (a random phase in
        mid-task) cannot be seen, and are missing from it; the embedded times are data, and not compared.

    Args:
        embedder: the step embedder.
        backbone: the causal backbone, or a :class:`GRUBackbone`; ``None`` reads out each step by itself.
        window: number of steps a context holds in sequential mode; a GRU's is never full.
        keys: overrides of :data:`~torchrl_mouse.schema.MODALITY_KEYS`.
        overflow: what happens at a full context: ``"rebuild"`` goes on with the newest half, encoded afresh from the
            raw steps, so positions restart; ``"error"`` raises. To slide is no choice: keys that were computed with
            older steps in sight are not those of a window that begins later, which is what training sees.
        on_weight_update: what happens to contexts after :meth:`mark_weight_update`: ``"rebuild"`` encodes their steps
            afresh with the new weights, ``"keep"`` (a GRU's default and only choice) goes on with what they hold.
        max_streams: largest number of contexts; the least recently used is forgotten first.
        compile: run the backbone's part of a sequential step through :func:`torch.compile`; all else stays as it is.
            It takes 10 to 20 seconds at the first step, and again for a single row, rows beyond the first contexts,
            another architecture, inference or training mode, autocast and other types of weights. With 4 layers of
            width 64 on one CPU core, that part is then 2 to 3 times as fast, and a whole step about 1.4 times, while
            the contexts of all rows hold about 2,000 tokens; beyond, attention takes the time. ``compiled`` may change.

    Raises:
        TypeError: ``window`` or ``max_streams`` is no integer.
        ValueError: a window longer than the backbone's positions, an embedder of another width than the backbone's, a
            size below 1, an unknown option, or ``"rebuild"`` with a GRU, or ``compile`` without a transformer.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.modules import set_recurrent_mode
        >>> from torchrl_mouse.modules import CausalBackbone, StepEmbedder
        >>> embedder = StepEmbedder(16, max_num_obs_continuous=2, include_reward_token=False, include_done_token=False)
        >>> trunk = Trunk(embedder, CausalBackbone(16, num_layers=1, num_heads=2), window=8)
        >>> steps = TensorDict({"observation": torch.randn(1, 3, 2)}, [1, 3])
        >>> steps["is_init"] = torch.tensor([[[True], [False], [False]]])
        >>> steps["stream"] = torch.full((1, 3, 1), 7)
        >>> with set_recurrent_mode(True):
        ...     window = trunk(steps.clone())["hidden"]
        >>> sequential = torch.stack([trunk(steps[:, t])["hidden"] for t in range(3)], 1)
        >>> torch.allclose(window, sequential, atol=1e-6)
        True
    """

    def __init__(
        self,
        embedder: StepEmbedder,
        backbone: CausalBackbone | GRUBackbone | None,
        *,
        window: int,
        keys: Mapping[str, NestedKey] | None = None,
        overflow: Literal["rebuild", "error"] = "rebuild",
        on_weight_update: Literal["rebuild", "keep"] | None = None,
        max_streams: int = 1024,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self._recurrent = gru = isinstance(backbone, GRUBackbone)  # A context is a state: never full, without steps.
        if on_weight_update is None:
            on_weight_update = "keep" if gru else "rebuild"
        for name, value, known in (
            ("overflow", overflow, ("rebuild", "error")),
            ("on_weight_update", on_weight_update, ("rebuild", "keep")[gru:]),
        ):
            if value not in known:
                raise ValueError(f"Trunk: {name} must be one of {', '.join(known)}{' for a GRU' * gru}, got {value!r}.")
        for name, size in (("window", window), ("max_streams", max_streams)):
            check_size("Trunk", name, size)
        if compile and not isinstance(backbone, CausalBackbone):
            kind = "no backbone" if backbone is None else "a GRU"
            raise ValueError(f"Trunk: compile must be false with {kind}, got {compile!r}. Leave it out.")
        if unknown := set(keys or {}) - set(MODALITIES):
            raise ValueError(f"Trunk: keys must name modalities ({', '.join(MODALITIES)}), got {sorted(unknown)}.")
        for name, key in (keys or {}).items():
            parts = key if isinstance(key, tuple) else (key,)
            if not parts or not all(isinstance(part, str) and part for part in parts):
                raise ValueError(f"Trunk: keys must hold a name, or a tuple of names, for {name!r}, got {key!r}.")
        self.embedder = embedder
        self.backbone = backbone
        self.window = window
        self.overflow = overflow
        self.on_weight_update = on_weight_update
        self.max_streams = max_streams
        self.compiled = compile  # `compile` is a method of every module.
        self.keys = {name: (keys or {}).get(name, schema.MODALITY_KEYS[name]) for name in embedder.modalities}
        if backbone is not None:
            self._check_fits(window)
            if embedder.hidden_dim != backbone.hidden_dim:
                raise ValueError(
                    f"Trunk: the embedder must have the backbone's hidden_dim={backbone.hidden_dim}, got "
                    f"{embedder.hidden_dim}. Build both with one."
                )
        # A buffer, so that it travels with the weights to collectors in other processes.
        self.register_buffer("weight_version", torch.zeros((), dtype=torch.int64))
        self._newest_version = torch.zeros((), dtype=torch.int64)
        self.register_load_state_dict_pre_hook(_loading)
        self.register_load_state_dict_post_hook(_loaded)
        self._cache: KVCache | None = None
        self._lock = Lock()  # An evaluator may run beside a collector, in a thread of its own.
        self.in_keys = [
            *(key for name, key in self.keys.items() if name != "done"),
            *(self._end_keys() if "done" in self.keys else ()),
            schema.IS_INIT,
            schema.STREAM,
        ]
        self.out_keys = [schema.HIDDEN]

    def _end_keys(self) -> tuple[NestedKey, NestedKey]:
        parent = self.keys["done"]
        parent = parent if isinstance(parent, tuple) else (parent,)
        return (*parent, "terminated"), (*parent, "truncated")

    def _check_fits(self, steps: int) -> None:
        if self.backbone is not None and steps * self.embedder.tokens_per_step > self.backbone.max_seq_len:
            raise ValueError(
                f"Trunk: a window must fit max_position_embeddings={self.backbone.max_seq_len} tokens, got {steps} "
                f"steps of {self.embedder.tokens_per_step}. Shorten the window, or give the backbone more positions."
            )

    def __getstate__(self) -> dict[str, Any]:
        # A cache that is pickled goes through shared memory: the workers of a collector would write to one another's.
        return {**self.__dict__, "_cache": None}

    def _apply(self, *args: Any, **kwargs: Any) -> Trunk:
        def kind() -> tuple[torch.device, torch.dtype]:
            weight = next(self.parameters())
            return weight.device, weight.dtype

        before = kind()
        super()._apply(*args, **kwargs)
        if kind() != before:  # Keys and values of another device or precision do not fit the weights.
            self.reset_cache()
        return self

    @alone
    def reset_cache(self) -> None:
        """Forgets every context and frees its memory."""
        self._cache = None

    @alone
    def forget(self, streams: torch.Tensor) -> None:
        """Forgets the contexts of environments that are done with; their memory serves others.

        Args:
            streams: int64 of any shape, their addresses; unknown ones are ignored.
        """
        if self._cache is not None:
            self._cache.forget(streams.reshape(-1).tolist())

    @alone
    def copy_context(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copies contexts to other streams, so that a task can be played on in two ways.

        A copied environment has streams of its own; without this, its rows are in the middle of an unknown task.

        Args:
            sources: int64 ``[*]``, addresses of contexts.
            targets: int64, the same shape, addresses of the copies.

        Raises:
            KeyError: a source has no context.
            ValueError: the shapes differ, or there is no room for all of these contexts.
        """
        if sources.shape != targets.shape:
            raise ValueError(
                f"Trunk: sources and targets must have one shape, got {tuple(sources.shape)} and "
                f"{tuple(targets.shape)}."
            )
        if self._cache is None:
            raise KeyError("Trunk: sources must have contexts, got none at all.")
        self._cache.copy(sources.reshape(-1).tolist(), targets.reshape(-1).tolist())

    def mark_weight_update(self) -> None:
        """Says that the weights have changed; contexts are then treated as ``on_weight_update`` says.

        :meth:`load_state_dict` needs no call: it draws a version that no weights had, which travels to workers as the
        weights do. That of a loss does. See :func:`~torchrl_mouse.recipes.update_weights`.
        """
        # An older checkpoint brings its number back: the next one must still be new.
        self._newest_version = self._newest_version.to(self.weight_version).maximum(self.weight_version) + 1
        self.weight_version.copy_(self._newest_version)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes ``hidden`` ``[*, D]``.

        Args:
            tensordict: steps ``[*, T]`` in recurrent, ``[*]`` in sequential mode.

        Raises:
            KeyError: an entry is missing.
            TypeError: an entry's type is of another kind.
            ValueError: a window does not fit, ids are out of range or of an unknown encoding.
            RuntimeError: (sequential) a row in the middle of a task has no context.
        """
        _require_steps(tensordict)
        if recurrent_mode():
            return tensordict.set(schema.HIDDEN, self._window(tensordict))
        hidden = self._append(tensordict, 1)
        return tensordict.set(schema.HIDDEN, hidden.reshape(*tensordict.shape, -1))

    def append(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Appends several steps to each row's context at once, as stepping through them would, in few passes.

        An agent is so shown a history that it did not play: of a demonstrator, of a random phase, or its own after
        its contexts were lost.

        Args:
            tensordict: steps ``[*, T]``, none of them padding; a row's ``stream`` is constant, tasks may end in it.

        Returns:
            The same, with ``hidden`` ``[*, T, D]``.

        Raises:
            ValueError: no time dimension, or a row holds several streams; and as in sequential mode. After an error in
                the middle the rows have no context.
        """
        if tensordict.ndim == 0:
            raise ValueError("Trunk: steps must be [*, T] to be appended, got no time dimension.")
        _require_steps(tensordict)
        hidden = self._append(tensordict, tensordict.shape[-1])
        return tensordict.set(schema.HIDDEN, hidden.reshape(*tensordict.shape, -1))

    def make_tensordict_primer(self) -> StreamTracker:
        """Returns what an environment without streams needs, for TorchRL's automatic registration."""
        return StreamTracker()

    def read(self, steps: TensorDictBase) -> dict[str, torch.Tensor]:
        """Reads the modalities of steps ``[*]``: ids and codes int64 ``[*]``, ``reward`` ``[*]``, others ``[*, C]``.

        The previous action is an id, or numbers ``[*, C]``, as the embedder has it. Numbers get the weights' type, at
        least float32; images keep theirs, since a context keeps its steps.
        """
        values = {}
        dtype = torch.promote_types(next(self.embedder.parameters()).dtype, torch.float32)
        for name, embedder in self.embedder.modalities.items():
            key = self.keys[name]
            if name == "done":
                terminated, truncated = (schema.require(steps, end, "bool") for end in self._end_keys())
                values[name] = schema.done_code(terminated, truncated).reshape(steps.shape)
                continue
            value = schema.require(steps, key)
            if name == "reward":
                values[name] = value.reshape(steps.shape).to(dtype)
            elif isinstance(embedder, TableEmbedder):
                values[name] = schema.to_ids(value, self.embedder.num_ids(name), steps.ndim, key)
            else:
                value = value.flatten(steps.ndim) if value.ndim > steps.ndim else value.unsqueeze(-1)
                values[name] = value if name == "image" else value.to(dtype)
        return values

    def _window(self, steps: TensorDictBase) -> torch.Tensor:
        if steps.ndim == 0:
            raise ValueError("Trunk: a window must be [*, T] in recurrent mode, got no time dimension.")
        num = steps.shape[-1]
        self._check_fits(num)
        embed = self.embedder(self.read(steps)).reshape(-1, num, *self._token_shape)  # (B, T, N, D)
        positions, mask = self._contexts(schema.require(steps, schema.IS_INIT, "bool").reshape(-1, num))
        out = embed.flatten(1, 2)
        if self.backbone is not None:
            out, _ = self.backbone(out, positions, mask)
        return self._read_out(out, num).reshape(*steps.shape, -1)

    def _contexts(self, is_init: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        # One context per row is the rule, and needs no mask; to look would make an accelerator wait.
        if is_init.device.type == "cpu" and not torch.compiler.is_compiling() and not is_init[:, 1:].any():
            return None, None
        per_step = self.embedder.tokens_per_step
        is_init = torch.cat([torch.ones_like(is_init[:, :1]), is_init[:, 1:]], 1)
        first = torch.zeros(per_step, dtype=torch.bool, device=is_init.device)
        first[0] = True
        is_init = (is_init.unsqueeze(-1) & first).flatten(1)  # (B, T * N)
        return segment_positions(is_init), None if self._recurrent else segment_mask(is_init)

    @property
    def _token_shape(self) -> tuple[int, int]:
        return self.embedder.tokens_per_step, self.embedder.hidden_dim

    def _read_out(self, tokens: torch.Tensor, num: int) -> torch.Tensor:
        return tokens.reshape(len(tokens), num, -1, tokens.shape[-1])[:, :, -1]  # (B, T, D)

    @alone
    @torch.no_grad()
    def _append(self, steps: TensorDictBase, num: int) -> torch.Tensor:
        """Appends ``num`` steps to the context of each row, and returns hidden states ``[B, num, D]``."""
        values = {  # Each entry by itself: to reshape the tensordict would go through those that are not read.
            name: value.reshape(-1, num, *value.shape[steps.ndim :]) for name, value in self.read(steps).items()
        }
        if self.backbone is None:
            return self._read_out(self.embedder(values).flatten(1, 2), num)
        if self._cache is None:
            self._cache = KVCache(self._new_kv_cache, window=self.window, max_streams=self.max_streams)
        self._cache.max_streams = self.max_streams  # it may have been raised
        version = int(self.weight_version)  # Before any weight is used: a worker's may change in the middle.
        embed = self.embedder(values)  # All ids are looked at before any context changes.
        stream = schema.require(steps, schema.STREAM, "integer").reshape(-1, num).cpu()
        if num > 1 and (other := stream != stream[:, :1]).any():
            row, step = other.nonzero()[0].tolist()
            raise ValueError(
                f"Trunk: stream must be the same at all steps of a row, got {stream[row, 0]} and {stream[row, step]} "
                f"in row {row}. Append each stream's steps in a row of their own."
            )
        streams, starts = stream[:, 0].tolist(), schema.require(steps, schema.IS_INIT, "bool").reshape(-1, num).cpu()
        hidden, begin = [], 0
        try:
            while begin < num:  # In one pass what lies before the next task's start or full context in any row.
                rows = self._cache.locate(streams, starts[:, begin].tolist())
                self._make_room(rows, streams, version)
                end = num
                if num > 1:
                    room = num if self._recurrent else self.window - int(self._cache.length[rows].max())
                    end = min(num, begin + room)
                    later = starts[:, begin + 1 : end].any(0).nonzero()
                    end = begin + 1 + int(later[0]) if len(later) else end
                some = values if end - begin == num else {name: value[:, begin:end] for name, value in values.items()}
                hidden.append(self._encode(rows, some, embed[:, begin:end], torch.full_like(rows, end - begin)))
                begin = end
        except BaseException:
            if begin:  # Half a context would be gone on with: none is an error.
                self._cache.forget(streams)
            raise
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden, 1)

    def _make_room(self, rows: torch.Tensor, streams: list[int], version: int) -> None:
        """Brings contexts up to date with the weights, and leaves room for a step in each."""
        if self._recurrent:
            return
        cache = self._cache
        assert cache is not None
        if (cache.version[rows] != version).any():
            cache.version[rows[cache.length[rows] == 0]] = version
            if self.on_weight_update == "rebuild":
                self._rebuild(rows[cache.version[rows] != version], self.window)
                cache.version[rows] = version
        full = cache.length[rows] == self.window
        if full.any():
            if self.overflow == "error":
                row = int(full.nonzero()[0])
                raise RuntimeError(
                    f"Trunk: a context must hold at most window={self.window} steps, got one more for row {row} "
                    f"(stream {streams[row]}). Raise window, or choose overflow='rebuild'."
                )
            self._rebuild(rows[full], self.window // 2)

    def _new_kv_cache(self, slots: int) -> Any:
        assert self.backbone is not None
        return self.backbone.new_kv_cache(slots, capacity=self.window * self.embedder.tokens_per_step)

    def _encode(
        self, rows: torch.Tensor, values: Mapping[str, torch.Tensor], embed: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """Appends steps ``[B, T]``, embedded ``[B, T, N, D]``, to contexts.

        Only the first ``counts[i]`` of row ``i`` are real and stay visible.
        """
        assert self.backbone is not None
        assert self._cache is not None
        num = embed.shape[1]
        tokens = embed.flatten(1, 2)
        slots, order = rows, run_order(rows)
        if order is not None:
            slots, tokens = rows[order], tokens[order.to(tokens.device)]
        begin = self._cache.length[slots] * self.embedder.tokens_per_step
        positions = (begin.unsqueeze(-1) + torch.arange(tokens.shape[1])).to(tokens.device)
        compiled = self.compiled and num == 1
        kv_cache = self._cache.key_values(slots, int(begin.max()) + tokens.shape[1], contiguous=compiled)
        if compiled:
            assert isinstance(self.backbone, CausalBackbone)
            out = self.backbone.step(tokens, positions, kv_cache)
        else:
            out, _ = self.backbone(tokens, positions, kv_cache=kv_cache)
        if order is not None:
            out = out[order.argsort().to(out.device)]
        if self._recurrent:
            self._cache.length[rows] += counts
        else:
            self._cache.remember(rows, values, counts)
        return self._read_out(out, num)

    def _rebuild(self, rows: torch.Tensor, keep: int) -> None:
        """Encodes the newest ``keep`` remembered steps of contexts afresh."""
        if not len(rows):
            return
        assert self._cache is not None
        counts = self._cache.length[rows].clamp(max=keep)
        kept, counts = rows[counts > 0], counts[counts > 0]
        values = self._cache.recall(kept, counts) if len(kept) else {}
        self._cache.clear(rows)
        if values:
            self._encode(kept, values, self.embedder(values), counts)


def _loading(_: Trunk, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    if (name := f"{prefix}weight_version") in state_dict:  # With `assign` the entry becomes the buffer: not theirs.
        state_dict[name] = state_dict[name].clone()


def _loaded(trunk: Trunk, _: Any) -> None:
    # The loaded number may be that of other weights here, and one counted on from it that of a trainer's next ones.
    trunk.weight_version.fill_(secrets.randbits(62))


def _require_steps(tensordict: TensorDictBase) -> None:
    if 0 in tensordict.shape:
        raise ValueError(f"Trunk: there must be at least one step, got a batch of shape {tuple(tensordict.shape)}.")
