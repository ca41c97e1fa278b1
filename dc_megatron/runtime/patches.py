"""The table of patches that lets megatron-core 0.19.2 run where its authors did not run it.

Where it runs without a GPU it must not find Transformer Engine and apex; those are hidden first. Then come the rows.
Every row names its target, the replacement, the condition under which it applies and why. ``apply`` installs the rows
whose condition holds, once; ``undo`` takes them out again (tests). A drift test checks that every target exists.
"""

from __future__ import annotations

import functools
import importlib
import os
import queue
import sys
from collections.abc import Callable
from dataclasses import dataclass

from dc_megatron.runtime import cpu_device, device, installed, noise
from dc_megatron.runtime.adam import GroupStepAdam
from dc_megatron.runtime.fp8_states import TE_LAYERS, reading_by_name
from dc_megatron.runtime.fsdp_gathering import data_by_tensor_ranks, gathered_at_once
from dc_megatron.runtime.gradient_scaling import by_a_number
from dc_megatron.runtime.listed_classes import with_listed_classes
from dc_megatron.runtime.rotary import rotating_whole_rows
from dc_megatron.runtime.thread_caller import calling_threads


@dataclass(frozen=True)
class Patch:
    """One replaced attribute. ``replacement`` takes the original and returns what stands in for it."""

    target: str  # "module:attribute.path"
    replacement: Callable
    condition: str  # a key of CONDITIONS
    why: str


def _constant(value) -> Callable:
    return lambda original: value


def _calling(function: Callable) -> Callable:
    """A new function for every row: torch's compiler keeps a table of torch's functions and wants them distinct."""
    return lambda original: lambda *args, **kwargs: function(*args, **kwargs)


CONDITIONS: dict[str, Callable[[], bool]] = {
    "no_cuda": lambda: not device.has_cuda(),
    "cuda": device.has_cuda,
    "no_te_and_no_apex": lambda: not (installed.usable_transformer_engine() or installed.usable_apex()),
    "te_without_apex": lambda: installed.usable_transformer_engine() and not installed.usable_apex(),
    "always": lambda: True,
    "wheel_install": lambda: True,  # megatron-core comes as a wheel here; its pin is in the requirement files
}

_TENSOR_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "full", "full_like", "ones", "ones_like"),
    *("rand", "randint", "randn", "tensor", "zeros", "zeros_like"),
)


def _torch_rows() -> list[Patch]:
    """Stand-ins inside torch, all for machines without CUDA."""
    why_device = "megatron-core writes device='cuda' and passes torch.cuda.current_device()"
    rows = [Patch(f"torch:{name}", cpu_device.with_device_on_cpu, "no_cuda", why_device) for name in _TENSOR_FACTORIES]
    rows += [
        Patch("torch:Tensor.to", cpu_device.moved_on_cpu, "no_cuda", why_device),
        Patch("torch:nn.Module.to", cpu_device.moved_on_cpu, "no_cuda", why_device),
        Patch("torch:Tensor.cuda", _calling(cpu_device.itself), "no_cuda", why_device),
        Patch("torch:nn.Module.cuda", _calling(cpu_device.itself), "no_cuda", why_device),
        Patch("torch:Tensor.pin_memory", _calling(cpu_device.itself), "no_cuda", "there is no pinned memory"),
        Patch(
            "torch:Tensor.type",
            cpu_device.cuda_type_names,
            "no_cuda",
            "the optimizer sorts parameters by 'torch.cuda.FloatTensor' and the like",
        ),
    ]
    rows.append(
        Patch(
            "torch:compile",
            _calling(cpu_device.uncompiled),
            "no_cuda",
            "megatron-core decorates its GPU fusions when it is imported, which loads the compiler: 2 s of every start",
        )
    )
    stand_ins = {
        "current_device": cpu_device.zero,
        "device_count": cpu_device.one,
        "set_device": cpu_device.nothing,
        "synchronize": cpu_device.nothing,
        "empty_cache": cpu_device.nothing,
        "_lazy_init": cpu_device.nothing,
        "ipc_collect": cpu_device.nothing,
        "reset_peak_memory_stats": cpu_device.nothing,
        "current_stream": cpu_device.current_stream,
        "default_stream": cpu_device.current_stream,
        "set_stream": cpu_device.nothing,
        "stream": cpu_device.stream_context,
        "Stream": cpu_device.Stream,
        "Event": cpu_device.Event,
        "manual_seed": cpu_device.manual_seed,
        "manual_seed_all": cpu_device.manual_seed,
        "get_rng_state": cpu_device.get_rng_state,
        "set_rng_state": cpu_device.set_rng_state,
        "random.manual_seed": cpu_device.manual_seed,
        "random.get_rng_state": cpu_device.get_rng_state,
        "random.set_rng_state": cpu_device.set_rng_state,
        "memory_stats": cpu_device.empty_dictionary,
        "memory_allocated": cpu_device.zero,
        "max_memory_allocated": cpu_device.zero,
        "memory_reserved": cpu_device.zero,
        "max_memory_reserved": cpu_device.zero,
        "get_device_properties": cpu_device.device_properties,
        "get_device_capability": cpu_device.device_capability,
    }
    why_cuda = "megatron-core calls it without asking whether there is CUDA"
    for name, value in stand_ins.items():
        replacement = _constant(value) if isinstance(value, type) else _calling(value)
        rows.append(Patch(f"torch.cuda:{name}", replacement, "no_cuda", why_cuda))
    return rows


def _allow_no_cuda(original):
    return functools.partial(original, allow_no_cuda=True)


def _loading_nothing(original):
    """``load_state_dict`` for a rank whose part of the saved state is empty, and therefore on no file."""

    def load_state_dict(self, state_dict):
        inner = state_dict
        if "optimizer" in state_dict:  # in 16 bit the inner optimizer's state lies beside the fp32 parameters
            inner = state_dict["optimizer"]
            state_dict.setdefault("fp32_from_fp16_params", [])
        inner.setdefault("state", {})
        return original(self, state_dict)

    return load_state_dict


_WHY_LOADING_NOTHING = "stage 1 leaves later pipeline stages without parameters that learn; they could not resume"

CORE_ROWS = [
    *_torch_rows(),
    Patch(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        _calling(cpu_device.set_rng_state),
        "no_cuda",
        "it reaches into torch.cuda.default_generators, which is empty",
    ),
    Patch(
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        lambda original: lambda device="cuda", clone=False, graph_safe=False: cpu_device.get_rng_state(),
        "no_cuda",
        "it reads torch.cuda.default_generators, which is empty",
    ),
    Patch(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
        lambda original: lambda mp_mode="spawn": queue.Queue(),
        "no_cuda",
        "a spawned multiprocessing.Manager imports everything anew: 20 s on a small CPU; saves stay in one process",
    ),
    Patch(
        "megatron.core.dist_checkpointing.strategies.async_utils:AsyncCallsQueue._get_async_caller",
        calling_threads,
        "no_cuda",
        "another process would share the tensors that the next step changes (see thread_caller.py)",
    ),
    Patch(
        "torch.distributed.checkpoint.filesystem:pickle",
        with_listed_classes,
        "always",
        "it unpickles .metadata of a checkpoint, whatever that names",
    ),
    Patch(
        "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_thd",
        rotating_whole_rows,
        "always",
        "its backward pass copies a packed row once for every sample in it (see rotary.py)",
    ),
    Patch(
        "megatron.core.optimizer:Adam",
        _constant(GroupStepAdam),
        "no_te_and_no_apex",
        "torch's per-parameter step counters break saving and resuming with the distributed optimizer (see adam.py)",
    ),
    Patch(
        "megatron.core.optimizer:USING_PYTORCH_OPTIMIZER",
        _constant(False),
        "no_te_and_no_apex",
        "selects the class above",
    ),
    Patch(
        "megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE",
        _constant(True),
        "no_te_and_no_apex",
        "the state layout is FusedAdam's",
    ),
    Patch(
        "megatron.core.optimizer.distrib_optimizer:USING_APEX_OPTIMIZER",
        _constant(True),
        "no_te_and_no_apex",
        "aligns the step of parameter groups that are empty on some rank",
    ),
]

CORE_ROWS += [
    Patch(
        "megatron.core.tensor_parallel.layers:_grad_accum_fusion_available",
        _constant(True),
        "te_without_apex",
        "Transformer Engine's layers add weight gradients to the gradient buffer themselves; the output layer asks for"
        " apex's kernel when it is made, and never calls it: the head here is a product of its own",
    ),
    Patch(
        "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer.scale_gradients",
        by_a_number,
        "cuda",
        "a product with a tensor of one element is broadcast slowly (see gradient_scaling.py)",
    ),
]

CORE_ROWS += [
    Patch(
        "megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer:AllGatherPipeline.all_gather_params",
        gathered_at_once,
        "no_cuda",
        "streams and events, which keep memory until a gathering in the background has ended, are stand-ins here",
    ),
    Patch(
        "megatron.core.distributed.fsdp.mcore_fsdp_adapter:_get_dp_tp_mesh",
        _constant(data_by_tensor_ranks),
        "always",
        "einops reshapes a list of ranks there, which only Transformer Engine installs",
    ),
]

CORE_ROWS += [
    Patch(f"megatron.core.optimizer.optimizer:{name}.load_state_dict", _loading_nothing, "always", _WHY_LOADING_NOTHING)
    for name in ("FP32Optimizer", "Float16OptimizerWithFloat16Params")
]

TRAINING_ROWS = [
    Patch(
        "megatron.training.training:initialize_megatron",
        _allow_no_cuda,
        "no_cuda",
        "its first line asserts torch.cuda.is_available()",
    ),
    Patch(
        "megatron.training.training:set_jit_fusion_options",
        _calling(cpu_device.nothing),
        "no_cuda",
        "compiles GPU fusions that no CPU run uses",
    ),
    Patch(
        "megatron.training.initialize:init_persistent_async_worker",
        _calling(cpu_device.nothing),
        "no_cuda",
        "a process for --async-save; here threads write (see thread_caller.py)",
    ),
    Patch(
        "megatron.training.initialize:_compile_dependencies",
        _calling(cpu_device.nothing),
        "wheel_install",
        "runs make where the wheel ships no Makefile; its compiled helper serves GPT data sets, which we do not use",
    ),
]

# Packages that megatron-core takes wherever they can be imported, even for tensors on the CPU, and what tells that
# they can be used here. Its attempts at importing them catch ImportError, and no other error.
OPTIONAL_PACKAGES: tuple[tuple[Callable[[], bool], tuple[str, ...]], ...] = (
    (lambda: installed.usable_transformer_engine(), ("transformer_engine", "transformer_engine_torch")),
    (lambda: installed.usable_apex(), ("apex", "amp_C", "fused_weight_gradient_mlp_cuda")),
)

_hidden: dict[str, object] = {}  # what sys.modules held of the hidden packages
_originals: list[tuple[object, str, object]] = []
_applied: set[str] = set()


def resolve(target: str) -> tuple[object, str]:
    """The object that holds the attribute of ``target`` and the attribute's name."""
    module_name, _, path = target.partition(":")
    holder = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        holder = getattr(holder, parent)
    return holder, name


def _hide_unusable() -> None:
    """Make every later import of a package that cannot be used here raise ModuleNotFoundError.

    ``importlib.util.find_spec`` then answers None, so that transformers, accelerate and peft do not find it either.
    """
    for usable, packages in OPTIONAL_PACKAGES:
        if usable():
            continue
        for package in packages:
            if sys.modules.get(package, package) is None:
                continue
            # A failed or an earlier import leaves submodules behind, which would be found without their parent.
            for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
                _hidden[name] = sys.modules.pop(name)
            _hidden[package] = sys.modules.get(package)
            sys.modules[package] = None


def _show_hidden() -> None:
    for name, module in _hidden.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module
    _hidden.clear()


def _load_weights_only() -> None:
    """No torch.load of this process executes a pickle, whatever its caller asked for.

    torch.distributed.checkpoint asks for the opposite where it reads objects of a checkpoint. torch looks at the
    variable in every call; Megatron's own classes are made known to its weights-only unpickler.
    """
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    importlib.import_module("megatron.core.safe_globals").register_safe_globals()


def _read_fp8_states_by_name() -> None:
    """Transformer Engine's layers execute nothing that a checkpoint's FP8 state holds. No rows: it may be missing."""
    if not installed.usable_transformer_engine():
        return
    layers = importlib.import_module(TE_LAYERS)
    for name, replacement in reading_by_name(layers).items():
        _originals.append((layers, name, getattr(layers, name)))
        setattr(layers, name, replacement)


def apply(training: bool = False) -> list[str]:
    """Install the rows whose condition holds; with ``training`` those of megatron.training as well.

    Returns the targets that are patched now. Calling again adds only what is missing. Modules of megatron are imported
    here, after the packages that cannot be used on this machine have been hidden from them: call this before megatron
    is imported, and before anything is built.
    """
    noise.leave_out_expected()
    _hide_unusable()
    for row in CORE_ROWS + (TRAINING_ROWS if training else []):
        if row.target in _applied or not CONDITIONS[row.condition]():
            continue
        holder, name = resolve(row.target)
        original = getattr(holder, name)
        _originals.append((holder, name, original))
        setattr(holder, name, row.replacement(original))
        _applied.add(row.target)
    # These import megatron-core; the rows for torch must have been there before.
    _load_weights_only()
    _read_fp8_states_by_name()
    return sorted(_applied)


def undo() -> None:
    """Put every original back, last first. What megatron found or missed when it was imported stays as it is."""
    while _originals:
        holder, name, original = _originals.pop()
        setattr(holder, name, original)
    _applied.clear()
    _show_hidden()
