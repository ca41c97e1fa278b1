"""Stand-ins for the pieces of torch.cuda that megatron-core calls, for machines without CUDA.

Names of CUDA devices are translated to the CPU where a tensor is made or moved. A TorchFunctionMode would do the same
in fewer lines, but it is thread-local and slows every torch call; these wrappers touch only the calls that take a
device.
"""

from __future__ import annotations

import contextlib
import functools

import torch

# What stands for CUDA devices; the meta device inside ``on_meta``.
CPU = torch.device("cpu")


@contextlib.contextmanager
def on_meta():
    """Inside, what asks for a CUDA device gets the meta device: shapes without memory. Only under the patches."""
    global CPU
    kept, CPU = CPU, torch.device("meta")
    try:
        yield
    finally:
        CPU = kept


class BuiltOnMeta(torch.overrides.TorchFunctionMode):
    """As ``with torch.device("meta")``, which does not know the factories that the patches have wrapped."""

    def __init__(self):
        super().__init__()
        known = torch.utils._device._device_constructors()
        self._factories = known | {getattr(factory, "__wrapped__", factory) for factory in known}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self._factories and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def as_cpu(value):
    """CPU for any spelling of a CUDA device (``"cuda:1"``, ``torch.device("cuda")``); anything else unchanged."""
    if isinstance(value, torch.device):
        return CPU if value.type == "cuda" else value
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return CPU
    return value


def _place(where):
    """As ``as_cpu``, where an index means a CUDA device as well."""
    return CPU if isinstance(where, int) else as_cpu(where)


def with_device_on_cpu(function):
    """``function`` with its ``device`` keyword translated."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if "device" in kwargs:
            kwargs["device"] = _place(kwargs["device"])
        return function(*args, **kwargs)

    return wrapped


def moved_on_cpu(function):
    """``Tensor.to`` / ``Module.to`` with CUDA devices among the arguments translated."""

    @functools.wraps(function)
    def wrapped(self, *args, **kwargs):
        if args:
            args = (_place(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _place(kwargs["device"])
        return function(self, *args, **kwargs)

    return wrapped


def itself(self, *args, **kwargs):
    """``.cuda()`` of a tensor or module that stays where it is."""
    return self


def cuda_type_names(function):
    """``Tensor.type()`` that calls CPU tensors CUDA ones: the optimizer sorts parameters by that string."""

    @functools.wraps(function)
    def wrapped(self, *args, **kwargs):
        if args and isinstance(args[0], str):
            args = (args[0].replace("torch.cuda.", "torch."), *args[1:])
        name = function(self, *args, **kwargs)
        if isinstance(name, str) and name.startswith("torch.") and not name.startswith("torch.cuda."):
            return "torch.cuda." + name.removeprefix("torch.").removeprefix("meta.")
        return name

    return wrapped


def uncompiled(function=None, **settings):
    """``torch.compile`` that leaves the function as it is, as a call or as a decorator with settings."""
    return function if function is not None else lambda later: later


def nothing(*args, **kwargs):
    """A call that has no effect on a CPU."""


def zero(*args, **kwargs) -> int:
    return 0


def one(*args, **kwargs) -> int:
    return 1


def empty_dictionary(*args, **kwargs) -> dict:
    return {}


def cpu_device(*args, **kwargs) -> torch.device:
    return CPU


def get_rng_state(device=None) -> torch.Tensor:
    """The CPU generator's state stands for the CUDA generator's: there is one generator."""
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device=None, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


class Stream:
    """A stream on which everything has already happened."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream) -> None:
        """Nothing runs behind the caller's back on a CPU."""

    def wait_event(self, event) -> None:
        """As ``wait_stream``."""

    def synchronize(self) -> None:
        """As ``wait_stream``."""

    def record_event(self, event=None) -> Event:
        return event or Event()


class Event:
    """A CUDA event that is always complete."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None) -> None:
        """Complete at once."""

    def wait(self, stream=None) -> None:
        """Complete already."""

    def synchronize(self) -> None:
        """Complete already."""

    def query(self) -> bool:
        return True


_STREAM = Stream()


def current_stream(*args, **kwargs) -> Stream:
    return _STREAM


@contextlib.contextmanager
def stream_context(stream):
    yield


class DeviceProperties:
    """What the engine reads of a device: a name, a compute capability and a memory size in bytes."""

    name = "CPU"
    major = 0
    minor = 0
    multi_processor_count = 1
    total_memory = 0


def device_properties(*args, **kwargs) -> DeviceProperties:
    return DeviceProperties()


def device_capability(*args, **kwargs) -> tuple[int, int]:
    return (0, 0)
