"""What is asked of context encoders, rlkit's part in it, and files that define one."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import math
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np

CUSTOM_CLASS = "CustomContextEncoder"
"""The class that a file with a context encoder defines."""


class PyTorchModule(nn.Module):
    """A module that remembers its constructor's arguments, as rlkit's: the base of a context encoder."""

    IS_RECURRENT: bool = False
    """Whether contexts have to be whole trajectories in their order; they are independent draws otherwise."""

    def save_init_params(self, params: Mapping[str, Any]) -> None:
        """Keeps the arguments as ``init_params``, from which ``type(self)(**self.init_params)`` makes another one.

        As in rlkit it is the first statement of a constructor, before ``super().__init__()``; of the calls in a class
        and its bases the first counts, that of the class itself.

        Args:
            params: the constructor's ``locals()``.

        Examples:
            >>> class Encoder(PyTorchModule):
            ...     def __init__(self, size, **kwargs):
            ...         self.save_init_params(locals())
            ...         super().__init__()
            >>> Encoder(3, rate=0.5).init_params
            {'size': 3, 'rate': 0.5}
        """
        arguments = {name: value for name, value in params.items() if name not in ("self", "__class__")}
        arguments |= arguments.pop("kwargs", {})
        # Not by assignment: before its own constructor ran, torch's module refuses some values.
        self.__dict__.setdefault("init_params", arguments)

    def reset(self, num_tasks: int = 1) -> None:
        """Forgets what was kept between calls, which by default is nothing.

        Args:
            num_tasks: number of tasks in the contexts to come.
        """


def fanin_init(weight: torch.Tensor) -> torch.Tensor:
    """Draws a weight from U(-1/sqrt(n), 1/sqrt(n)) in place, ``n`` as rlkit counts a matrix's "fan in".

    That is its number of *output* units, ``weight.size(0)``: torch stores the transpose of what rlkit was written for.
    Networks of PEARL's code are so initialised, and a copy with the inputs' number learns differently.

    Args:
        weight: ``[out, in]``.

    Returns:
        The weight itself.

    Raises:
        ValueError: it is no matrix.

    Examples:
        >>> 0.45 < fanin_init(torch.empty(4, 1000)).abs().max().item() <= 0.5
        True
    """
    if weight.ndim != 2:
        raise ValueError(f"fanin_init: weight must be a matrix, got shape {list(weight.shape)}. Draw it otherwise.")
    bound = 1 / math.sqrt(weight.size(0))
    return nn.init.uniform_(weight, -bound, bound)


def encode_context(encoder: nn.Module, context: torch.Tensor) -> torch.Tensor:
    """Calls an encoder, and sees to it that its output is the parameters of Gaussians.

    A recurrent one computes without autocast. Early in training PEARL's large values drive the states of its LSTM to 1;
    the gradient that float32 leaves there leads out again, while half precision rounds it to zero for good.

    Args:
        encoder: as :class:`~torchrl_mouse.modules.ContextEncoder`, or one of somebody's own.
        context: ``[tasks, N, input_size]``, ``tasks`` and ``N`` at least 1.

    Returns:
        ``[tasks, N, output_size]``, or ``[tasks, 1, output_size]`` of an encoder that gives one for each task.

    Raises:
        TypeError: the output is no tensor.
        ValueError: the output is of another shape.
    """
    tasks, num, _ = context.shape
    device = context.device.type
    low = torch.is_autocast_enabled(device) and not getattr(encoder, "IS_RECURRENT", False)
    with torch.autocast(device, enabled=low):
        output: torch.Tensor = encoder(context)
    if not isinstance(output, torch.Tensor):
        raise TypeError(
            f"{type(encoder).__name__}: output must be a tensor, got {type(output).__name__}. Return the parameters of "
            f"the Gaussians alone."
        )
    size = int(encoder.output_size)  # type: ignore[arg-type]
    shape = tuple(output.shape)
    # A file of one's own may leave tasks and transitions flattened, as those for PEARL's code may.
    if shape not in ((tasks, num, size), (tasks, size), (tasks, 1, size), (tasks * num, size)):
        raise ValueError(
            f"{type(encoder).__name__}: output must be [tasks, N, output_size] or [tasks, output_size] with tasks, N "
            f"and output_size {tasks}, {num} and {size}, got {list(shape)}. Change its forward."
        )
    # A file of one's own may keep its last state as it is: without this, the next backward pass would go on into it.
    for module in encoder.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.requires_grad:
                setattr(module, name, buffer.detach())
    return output.reshape(tasks, -1, size)


def load_encoder(path: str | Path, hidden_sizes: Sequence[int], input_size: int, output_size: int) -> nn.Module:
    """Runs a Python file, makes its ``CustomContextEncoder``, and tries it on a context of zeros.

    The file may import ``rlkit.torch.core`` and ``rlkit.torch.pytorch_util``. Where rlkit is not installed there are
    stand-ins while the file runs and the encoder is made, with ``PyTorchModule``; ``fanin_init``, ``device``,
    ``identity``, ``zeros``, ``ones``, ``FloatTensor``, ``from_numpy`` and ``get_numpy``. Buffers whose shape changes
    with the number of tasks are states, and are left out of the ``state_dict``.

    .. note:: Running a file is running a program: load only those that you trust. The stand-in's ``device`` is torch's
        default device at the time of loading.

    Args:
        path: of the file.
        hidden_sizes: the first argument of the class.
        input_size: the second, size of a transition.
        output_size: the third, and an attribute of the encoder.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: it asks for more of rlkit, or defines no such class.
        TypeError: the class is no ``torch.nn.Module``, is made by other arguments, or has no method ``reset``, or the
            encoder's output is no tensor.
        ValueError: the encoder's attribute ``output_size``, or the shape of its output, is another one, or what it
            gives for zeros is not finite.
    """
    sizes = (list(hidden_sizes), input_size, output_size)
    with _rlkit(path):
        kind = _encoder_class(Path(path))
        try:
            inspect.signature(kind).bind(*sizes)
        except TypeError as error:
            raise TypeError(
                f"make_context_encoder: {CUSTOM_CLASS} of {path} must be made by (hidden_sizes, input_size, "
                f"output_size), got a constructor with {error}. Let it take these three."
            ) from None
        encoder = kind(*sizes)
    if (found := getattr(encoder, "output_size", None)) != output_size:
        raise ValueError(
            f"make_context_encoder: output_size of the encoder in {path} must be {output_size}, got {found}. "
            f"Set self.output_size = output_size in its constructor."
        )
    if not callable(getattr(encoder, "reset", None)):
        raise TypeError(
            f"make_context_encoder: the encoder in {path} must have a method reset, got none. Derive it from "
            f"rlkit.torch.core.PyTorchModule, or define reset(self, num_tasks=1)."
        )
    trial = copy.deepcopy(encoder).eval()  # What it remembers of the trial goes with the copy.
    with torch.no_grad():
        trial.reset(num_tasks=2)  # type: ignore[operator]
        output = encode_context(trial, torch.zeros(2, 3, input_size))
    if not output.isfinite().all():
        raise ValueError(
            f"make_context_encoder: output of the encoder in {path} must be finite for a context of zeros, got "
            f"{output[~output.isfinite()][0].item()}. Change its forward."
        )
    for name, buffer in list(encoder.named_buffers()):
        if trial.get_buffer(name).shape != buffer.shape:  # A state, of a size that no checkpoint could be read with.
            owner, _, name = name.rpartition(".")
            encoder.get_submodule(owner).register_buffer(name, buffer, persistent=False)
    return encoder


def _encoder_class(path: Path) -> type[nn.Module]:
    if not path.is_file():
        raise FileNotFoundError(f"make_context_encoder: {path} must be a file, got none there. Correct the path.")
    module = ModuleType(f"encoder file {path.stem}")  # a name that hides no other module
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # Decorators such as dataclass look there; and so does pickle.
    # Not by the import system, which would leave a compiled copy beside the file and take it for a changed one.
    # Nor with what this file imports from the future.
    exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), vars(module))
    found = vars(module).get(CUSTOM_CLASS)
    if found is None:
        classes = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise ImportError(
            f"make_context_encoder: {path} must define {CUSTOM_CLASS}, got {', '.join(classes) or 'no class'}. "
            f"Rename the encoder's class."
        )
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise TypeError(
            f"make_context_encoder: {CUSTOM_CLASS} of {path} must be a class of torch.nn.Module, got {found!r}. "
            f"Derive it from rlkit.torch.core.PyTorchModule."
        )
    return found


@contextmanager
def _rlkit(path: str | Path) -> Iterator[None]:
    """Makes rlkit importable for the file at ``path``, by stand-ins if it is not installed."""
    if importlib.util.find_spec("rlkit") is not None:
        yield
        return
    root, torch_, core = ModuleType("rlkit"), ModuleType("rlkit.torch"), ModuleType("rlkit.torch.core")
    util = ModuleType("rlkit.torch.pytorch_util")
    root.__path__, torch_.__path__ = [], []
    vars(root).update(torch=torch_)
    vars(torch_).update(core=core, pytorch_util=util)
    vars(core).update(PyTorchModule=PyTorchModule)
    device = torch.get_default_device()

    def float_tensor(*data: Any) -> torch.Tensor:
        return torch.FloatTensor(*data).to(device)

    def from_numpy(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, torch.float32)

    vars(util).update(
        fanin_init=fanin_init,
        device=device,
        identity=_identity,
        zeros=partial(torch.zeros, device=device),
        ones=partial(torch.ones, device=device),
        FloatTensor=float_tensor,
        from_numpy=from_numpy,
        get_numpy=_get_numpy,
    )
    modules = {module.__name__: module for module in (root, torch_, core, util)}
    sys.modules.update(modules)
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "rlkit":
            raise
        raise ImportError(
            f"make_context_encoder: {path} must ask of rlkit for what its stand-ins have only, got: {error}. "
            f"Install rlkit, or define in the file what it needs."
        ) from error
    finally:
        for name in modules:
            sys.modules.pop(name, None)


def _identity(value: torch.Tensor) -> torch.Tensor:
    return value


def _get_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
