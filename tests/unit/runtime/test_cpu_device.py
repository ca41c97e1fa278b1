"""The wrappers that translate CUDA devices to the CPU, each around torch's own function and none installed."""

from __future__ import annotations

import pytest
import torch

from dc_megatron.runtime import cpu_device

CUDA_SPELLINGS = ["cuda", "cuda:0", "cuda:3", torch.device("cuda"), torch.device("cuda", 1)]
OTHERS = ["cpu", torch.device("cpu"), torch.device("meta"), "meta", None, torch.float16, "cudagraph", 3]


@pytest.mark.parametrize("spelling", CUDA_SPELLINGS, ids=str)
def test_every_spelling_of_a_cuda_device_means_the_cpu(spelling):
    assert cpu_device.as_cpu(spelling) == torch.device("cpu")


@pytest.mark.parametrize("value", OTHERS, ids=str)
def test_everything_else_stays(value):
    assert cpu_device.as_cpu(value) is value


@pytest.mark.parametrize("where", [*CUDA_SPELLINGS, 0, 5, torch.device("cpu"), None], ids=str)
def test_factories_make_tensors_on_the_cpu(where):
    zeros = cpu_device.with_device_on_cpu(torch.zeros)(2, 3, dtype=torch.int32, device=where)
    assert (zeros.device.type, zeros.dtype, zeros.shape) == ("cpu", torch.int32, (2, 3))


def test_factories_leave_the_meta_device():
    assert cpu_device.with_device_on_cpu(torch.empty)(2, device="meta").device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "keywords", "dtype"),
    [
        (("cuda",), {}, torch.float32),
        ((torch.float64,), {}, torch.float64),
        (("cuda:1", torch.bfloat16), {}, torch.bfloat16),
        ((torch.device("cuda"), torch.float64, True), {"copy": True}, torch.float64),
        ((), {"device": "cuda", "dtype": torch.int64, "non_blocking": True}, torch.int64),
        (("cuda",), {"dtype": torch.float16}, torch.float16),
        ((torch.zeros(1, dtype=torch.int8),), {}, torch.int8),
        ((0,), {}, torch.float32),
        ((), {"device": 0}, torch.float32),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_tensor_moves_to_the_cpu_and_takes_the_dtype(arguments, keywords, dtype):
    to = cpu_device.moved_on_cpu(torch.Tensor.to)
    moved = to(torch.tensor([1.0, 2.0]), *arguments, **keywords)
    assert (moved.device.type, moved.dtype, moved.tolist()) == ("cpu", dtype, [1, 2])


@pytest.mark.parametrize(
    ("arguments", "keywords", "dtype"),
    [
        (("cuda",), {}, torch.float32),
        ((torch.bfloat16,), {}, torch.bfloat16),
        ((torch.device("cuda", 0), torch.float64), {}, torch.float64),
        ((), {"device": "cuda", "dtype": torch.bfloat16}, torch.bfloat16),
        ((0,), {}, torch.float32),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_module_moves_to_the_cpu_and_takes_the_dtype(arguments, keywords, dtype):
    to = cpu_device.moved_on_cpu(torch.nn.Module.to)
    module = torch.nn.Linear(2, 2)
    assert to(module, *arguments, **keywords) is module
    assert (module.weight.device.type, module.weight.dtype) == ("cpu", dtype)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "torch.cuda.FloatTensor"), (torch.bfloat16, "torch.cuda.BFloat16Tensor")]
)
def test_type_names_are_those_of_cuda_tensors(dtype, name):
    type_of = cpu_device.cuda_type_names(torch.Tensor.type)
    assert type_of(torch.zeros(1, dtype=dtype)) == name


@pytest.mark.parametrize("wanted", [torch.float64, "torch.DoubleTensor", "torch.cuda.DoubleTensor"], ids=str)
def test_type_with_an_argument_converts(wanted):
    converted = cpu_device.cuda_type_names(torch.Tensor.type)(torch.ones(2), wanted)
    assert (converted.dtype, converted.tolist()) == (torch.float64, [1.0, 1.0])


def test_there_is_one_random_generator():
    state = torch.get_rng_state()
    try:
        cpu_device.manual_seed(7)
        kept = cpu_device.get_rng_state("cuda")
        first = torch.rand(3)
        cpu_device.set_rng_state(kept, graph_safe=True)
        assert torch.equal(torch.rand(3), first)
    finally:
        torch.set_rng_state(state)


def test_streams_and_events_are_always_done():
    stream = cpu_device.Stream(priority=-1)
    event = stream.record_event()
    stream.wait_event(event)
    stream.wait_stream(cpu_device.current_stream())
    stream.synchronize()
    assert event.query()
    assert event is stream.record_event(event)
    with cpu_device.stream_context(stream):
        assert cpu_device.current_stream() is cpu_device.current_stream()
