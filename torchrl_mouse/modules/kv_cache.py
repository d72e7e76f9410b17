"""The context of every stream: keys, values, and the raw steps that they came from."""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_MOVED_AT_ONCE = 2**22
"""Bytes that are set aside while contexts are moved: next to nothing, and still few steps."""

_Method = TypeVar("_Method", bound="Callable[..., Any]")


class Lock:
    """Lets one thread in at a time, and the same one several times; a copy or a pickle is a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def alone(method: _Method) -> _Method:
    """Makes a method run in one thread at a time, by its object's ``_lock``: contexts are read and written there."""

    @wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast("_Method", locked)


class KeyValues(NamedTuple):
    """Cached keys and values, as a backbone reads and writes them.

    Attributes:
        key: per layer ``[slots, kv_heads, capacity, head_dim]``, each with memory of its own.
        value: the same shapes.
        rows: int64 ``[B]``, the slot of each row of the batch; ``None`` where row ``i`` is slot ``i``.

    Examples:
        >>> pool = KeyValues((torch.zeros(3, 2, 8, 4),), (torch.zeros(3, 2, 8, 4),))
        >>> pool.map(lambda part: part[:2]).key[0].shape
        torch.Size([2, 2, 8, 4])
    """

    key: tuple[torch.Tensor, ...]
    value: tuple[torch.Tensor, ...]
    rows: torch.Tensor | None = None

    @property
    def pools(self) -> tuple[torch.Tensor, ...]:
        """The keys and the values of all layers."""
        return self.key + self.value

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> KeyValues:
        """Returns the results of a function for the keys and the values of each layer."""
        return self._replace(key=tuple(map(function, self.key)), value=tuple(map(function, self.value)))

    def of_rows(self, some: slice) -> KeyValues:
        """Returns views of the contexts of a part of the batch."""
        return self.map(lambda pool: pool[some]) if self.rows is None else self._replace(rows=self.rows[some])


class KVCache:
    """A pool of contexts, one slot per stream, found by the stream's address.

    The tensordict carries the address (``stream``), this object the numbers, so nothing large travels through
    collectors, and rows may come in any order, any subset and from any number of collectors. Slots are added as
    streams appear, up to ``max_streams``; then the least recently used one is forgotten.

    The memory of a layer is taken whole, for contexts of full length, and laid out for about what they hold: those of
    the rows then lie one behind the other. Gaps between them would be as slow to read as what is there, since memory is
    fetched ahead. An eighth more is laid out at a time, so the cost of a step is flat in between.

    Args:
        new_kv_cache: allocates keys and values, contiguous and all zero, for a number of slots.
        window: number of steps a context holds.
        max_streams: largest number of slots; may be raised later.

    Examples:
        >>> def allocate(slots):
        ...     return KeyValues(*((torch.zeros(slots, 1, 4, 2),) for _ in "kv"))
        >>> cache = KVCache(allocate, window=4, max_streams=2)
        >>> cache.locate([11, 22], [True, True]).tolist()
        [0, 1]
        >>> cache.locate([22], [True]).tolist()
        [1]
        >>> cache.locate([33], [True]).tolist()  # 11 was used least recently
        [0]
        >>> cache.locate([11], [False])
        Traceback (most recent call last):
            ...
        RuntimeError: KVCache: a row in the middle of a task must have a context, got none for row 0 (stream 11)...
    """

    def __init__(self, new_kv_cache: Callable[[int], KeyValues], *, window: int, max_streams: int) -> None:
        self.window = window
        self.max_streams = max_streams
        self.length = torch.zeros(0, dtype=torch.int64)
        """Steps in each slot's context, int64 ``[slots]``; on the CPU, so that no step waits for a device."""
        self.version = torch.zeros(0, dtype=torch.int64)
        """Version of the weights that each slot's keys were computed with, int64 ``[slots]``, on the CPU."""
        self._new_kv_cache = new_kv_cache
        self._slots: OrderedDict[int, int] = OrderedDict()  # stream -> slot, least recently used first
        self._key_values: KeyValues | None = None
        self._laid_out: KeyValues | None = None  # views of these, as long as the contexts need
        self._steps: dict[str, torch.Tensor] = {}
        self._last: tuple[list[int], torch.Tensor] | None = None

    def __len__(self) -> int:
        """Number of streams with a context."""
        return len(self._slots)

    def locate(self, streams: Sequence[int], starts: Sequence[bool]) -> torch.Tensor:
        """Finds the slot of each row; a row that starts a task gets an empty context.

        Args:
            streams: the address of each row.
            starts: whether the row is at the first step of its task.

        Returns:
            int64 ``[B]``, on the CPU.

        Raises:
            ValueError: two rows have one address, or there are more rows than ``max_streams``.
            RuntimeError: a row in the middle of a task has no context here, or an empty one.
        """
        streams, start = list(streams), torch.tensor(starts, dtype=torch.bool)
        rows = self._last[1] if self._last is not None and streams == self._last[0] else None
        if rows is None or bool((self.length[rows] == 0).logical_and_(~start).any()):  # the latter for the error
            self._check(streams, starts)
            rows = torch.tensor(self._take(streams))
            self._last = streams, rows
        if any(starts):
            self.clear(rows[start])
        return rows

    def clear(self, rows: torch.Tensor) -> None:
        """Empties contexts.

        Their memory is set to zero, once a task: what is out of sight has a weight of zero, and zero times NaN is NaN.

        Args:
            rows: int64 ``[B]`` slots, on the CPU.
        """
        assert self._laid_out is not None
        self.length[rows] = 0
        rows = rows.to(self._laid_out.key[0].device)
        for pool in self._laid_out.pools:
            pool.index_fill_(0, rows, 0)

    def forget(self, streams: Iterable[int]) -> None:
        """Frees the slots of streams for others.

        Args:
            streams: their addresses; unknown ones are ignored.
        """
        for stream in streams:
            self._slots.pop(stream, None)
        self._last = None

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Gives streams copies of others' contexts, all at once; what they had is lost.

        Args:
            sources: addresses of the contexts to copy.
            targets: addresses of the copies, as many; they may be among the sources.

        Raises:
            KeyError: a source has no context.
            ValueError: there is no room for all of these.
        """
        for stream in sources:
            if stream not in self._slots:
                raise KeyError(f"KVCache: the source must have a context, got none for stream {stream}.")
        streams = list(dict.fromkeys((*sources, *targets)))
        if len(streams) > self.max_streams:
            raise ValueError(
                f"KVCache: sources and targets must be at most max_streams={self.max_streams} streams, got "
                f"{len(streams)}. Raise max_streams."
            )
        slots = dict(zip(streams, self._take(streams), strict=True))
        old, new = ([slots[stream] for stream in some] for some in (sources, targets))
        self._last = None
        assert self._laid_out is not None
        for pool in (self.length, self.version, *self._laid_out.pools, *self._steps.values()):
            pool[new] = pool[old]

    def _check(self, streams: list[int], starts: Sequence[bool]) -> None:
        if len(set(streams)) < len(streams):
            twice = next(stream for stream in streams if streams.count(stream) > 1)
            raise ValueError(
                f"KVCache: stream must be unique in a batch, got {twice} more than once. Each environment row needs an "
                "address of its own: let TaskEnv or StreamTracker write it."
            )
        if len(streams) > self.max_streams:
            raise ValueError(
                f"KVCache: a batch must have at most max_streams={self.max_streams} rows, got {len(streams)}. "
                "Raise max_streams."
            )
        for row, (stream, start) in enumerate(zip(streams, starts, strict=True)):
            # Empty: the call in which the task began failed.
            if not start and (stream not in self._slots or self.length[self._slots[stream]] == 0):
                raise RuntimeError(
                    "KVCache: a row in the middle of a task must have a context, got none for "
                    f"row {row} (stream {stream}). Its earlier steps did not pass through this module (a random "
                    "phase, another policy, a copy of the module, a call that failed, or more streams than max_streams="
                    f"{self.max_streams}): reset the environment, or append the missed steps (`Trunk.append`)."
                )

    def _take(self, streams: list[int]) -> list[int]:
        for stream in streams:
            if stream in self._slots:
                self._slots.move_to_end(stream)
        missing = [stream for stream in streams if stream not in self._slots]
        self._grow(min(len(self._slots) + len(missing), self.max_streams))
        free = sorted(set(range(len(self.length))) - set(self._slots.values()))
        for stream in missing:
            slot = free.pop(0) if free else self._slots.popitem(last=False)[1]
            self._slots[stream] = slot
        return [self._slots[stream] for stream in streams]

    def _grow(self, slots: int) -> None:
        more = slots - len(self.length)
        if more <= 0:
            return
        # Tensors made inside inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            whole, old = self._new_kv_cache(slots), self._laid_out
            length = _room(1) if old is None else old.key[0].shape[-2]
            new = whole.map(lambda pool: _lay_out(pool, length))
            for pool, part in zip(new.pools, () if old is None else old.pools, strict=old is not None):
                pool[: len(part)] = part
            self._key_values, self._laid_out = whole, new
            self.length = torch.cat([self.length, self.length.new_zeros(more)])
            self.version = torch.cat([self.version, self.version.new_zeros(more)])
            for name, steps in self._steps.items():
                self._steps[name] = torch.cat([steps, steps.new_zeros((more, *steps.shape[1:]))])

    def key_values(self, rows: torch.Tensor, length: int, *, contiguous: bool = False) -> KeyValues:
        """Returns the keys and values of some slots, up to a number of positions or a little more.

        Args:
            rows: int64 ``[B]`` slots, on the CPU.
            length: positions that are needed, at most the capacity.
            contiguous: whether those of a run of slots shall lie one behind the other, up to what any other context
                needs, too.
        """
        pool = self._reach(length, len(rows) == len(self._slots), narrow=not contiguous)
        device = pool.key[0].device
        if not _is_run(rows):
            return pool._replace(rows=rows.to(device))
        if len(rows) == len(self.length):
            return pool
        first = int(rows[0])
        return pool.map(lambda part: part[first : first + len(rows)])  # A view: no copy of contexts at each step.

    def _reach(self, length: int, everyone: bool, *, narrow: bool) -> KeyValues:
        """Returns views of the first ``length`` positions or a little more; nothing is kept beyond if everyone's."""
        assert self._key_values is not None
        assert self._laid_out is not None
        most, now = self._key_values.key[0].shape[-2], self._laid_out.key[0].shape[-2]
        need = min(_room(length), most)
        if need > now or (everyone and 2 * need <= now):
            try:
                with torch.inference_mode(False):
                    for pool, part in zip(self._key_values.pools, self._laid_out.pools, strict=True):
                        _move(part, _lay_out(pool, need))
                    self._laid_out = self._key_values.map(lambda pool: _lay_out(pool, need))
            except BaseException:
                self.length.zero_()  # Layers disagree: no context is an error, half of one would not be seen.
                raise
            now = need
        return self._laid_out if need == now or not narrow else self._laid_out.map(lambda part: part[:, :, :need])

    def remember(self, rows: torch.Tensor, steps: Mapping[str, torch.Tensor], counts: torch.Tensor) -> None:
        """Keeps the raw steps that were just encoded, and advances the contexts' lengths.

        Args:
            rows: int64 ``[B]`` slots, on the CPU.
            steps: by modality, ``[B, T, ...]``, all on one device.
            counts: int64 ``[B]``, how many of the ``T`` steps of each row are real, on the CPU.
        """
        num = next(iter(steps.values())).shape[1]
        device = next(iter(steps.values())).device
        at = (self.length[rows].unsqueeze(-1) + torch.arange(num)).to(device)
        slots = rows.unsqueeze(-1).to(device)
        for name, values in steps.items():
            if name not in self._steps:
                with torch.inference_mode(False):
                    self._steps[name] = values.new_zeros((len(self.length), self.window, *values.shape[2:]))
            self._steps[name].index_put_((slots, at), values.to(self._steps[name].dtype))
        self.length[rows] += counts

    def recall(self, rows: torch.Tensor, counts: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the newest steps of some slots, oldest first; what lies beyond a row's count repeats its last step.

        Args:
            rows: int64 ``[B]`` slots, on the CPU.
            counts: int64 ``[B]``, how many steps of each, at least 1, on the CPU.

        Returns:
            By modality, ``[B, max(counts), ...]``.
        """
        length = self.length[rows].unsqueeze(-1)
        at = length - counts.unsqueeze(-1) + torch.arange(int(counts.max()))
        at = torch.minimum(at, length - 1)
        return {
            name: steps[rows.unsqueeze(-1).to(steps.device), at.to(steps.device)] for name, steps in self._steps.items()
        }


def _is_run(rows: torch.Tensor) -> bool:
    return len(rows) == 1 or bool((rows.diff() == 1).all())


def run_order(rows: torch.Tensor) -> torch.Tensor | None:
    """Returns the order in which slots follow one another, so that their contexts need not be copied.

    Args:
        rows: int64 ``[B]``, on the CPU.

    Returns:
        int64 ``[B]``; ``None`` where they do so already, or in no order.

    Examples:
        >>> run_order(torch.tensor([2, 3])), run_order(torch.tensor([3, 1])), run_order(torch.tensor([3, 2]))
        (None, None, tensor([1, 0]))
    """
    if _is_run(rows):
        return None
    order = rows.argsort()
    return order if _is_run(rows[order]) else None


def _room(length: int) -> int:
    """Returns the number of positions to lay out for ``length``: at most an eighth or 16 more."""
    step = max(16, (1 << length.bit_length() - 1) // 8)
    return -(-length // step) * step


def _lay_out(pool: torch.Tensor, length: int) -> torch.Tensor:
    """Returns the beginning of a pool's memory as contexts of ``length`` positions, one behind the other."""
    slots, heads, capacity, width = pool.shape
    length = min(length, capacity)
    return pool.view(-1)[: slots * heads * length * width].view(slots, heads, length, width)


def _move(old: torch.Tensor, new: torch.Tensor) -> None:
    """Moves contexts from one layout of a pool's memory to another."""
    kept = min(old.shape[2], new.shape[2])
    some = max(1, _MOVED_AT_ONCE // (old[0].numel() * old.element_size()))
    chunks = [slice(begin, begin + some) for begin in range(0, len(old), some)]
    # In the order in which none is written over before it has been moved.
    for chunk in reversed(chunks) if new.shape[2] > old.shape[2] else chunks:
        contexts = old[chunk, :, :kept].clone()
        new[chunk, :, :kept] = contexts
        new[chunk, :, kept:] = 0  # What was another row's must not be seen, not even as NaN.
