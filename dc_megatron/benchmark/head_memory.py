"""Peak memory of the vocabulary head, ours against Megatron's: forward and backward, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

from dc_megatron.benchmark import machine
from dc_megatron.errors import UserError

LIMIT = 0.3  # ours / stock
HEADS = ("stock", "ours")


def benchmark_head_memory(
    vocabulary: int = 128_256,
    positions: int = 8192,
    supervised: float = 0.15,
    hidden: int = 512,
    dtype: str = "bfloat16",
) -> dict:
    """Measure both heads; returns plain values. UserError: sizes that are none, a process that fails."""
    if min(vocabulary, positions, hidden) < 1 or not 0 < supervised <= 1:
        raise UserError("head-memory: sizes are whole numbers above 0, --supervised a share from 0 to 1")
    peaks = {}
    for head in HEADS:
        words = [head, str(vocabulary), str(positions), str(supervised), str(hidden), dtype]
        path = os.pathsep.join(filter(None, (machine.ROOT, os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "dc_megatron.benchmark.head_memory", *words],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError(f"head-memory, {head}: ended with {done.returncode}\n{done.stderr[-2000:]}")
        peaks[head] = json.loads(done.stdout.splitlines()[-1])
    ratio = peaks["ours"]["peak_bytes"] / peaks["stock"]["peak_bytes"]
    difference = abs(peaks["ours"]["loss"] - peaks["stock"]["loss"])
    return {
        "benchmark": "head-memory",
        **machine.describe(tempfile.gettempdir()),
        "gpu": machine.gpu(),
        "sizes": {
            "vocabulary": vocabulary,
            "positions": positions,
            "supervised": supervised,
            "hidden": hidden,
            "dtype": dtype,
        },
        "heads": peaks,
        "loss_difference": difference,
        "ours_over_stock": {"ratio": ratio, "at_most": LIMIT, "holds": ratio <= LIMIT},
    }


def _peak_of(head_name: str, vocabulary: int, positions: int, supervised: float, hidden: int, dtype: str) -> dict:
    """Peak memory above what weight, input and their gradients take, of one forward and backward pass."""
    import torch

    from dc_megatron.runtime import device, parallel, patches

    patches.apply()
    parallel.start()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    from dc_megatron.benchmark.stock_head import stock_head
    from dc_megatron.config import LanguageConfig
    from dc_megatron.model.language_model import Layout, transformer_config
    from dc_megatron.model.loss_head import IGNORED, HeadRequest, head

    shape = {"hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": 1, "num_attention_heads": 1}
    language = LanguageConfig.from_config({"model_type": "llama", "vocab_size": vocabulary, **shape}, "head-memory")
    config = transformer_config(language, Layout(params_dtype=getattr(torch, dtype)))
    layer = ColumnParallelLinear(
        hidden, vocabulary, config=config, init_method=torch.nn.init.zeros_, bias=False, gather_output=False
    )
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(positions, 1, hidden, generator=generator).to(config.params_dtype).to(device.device())
    with torch.no_grad():
        layer.weight.copy_(torch.randn(vocabulary, hidden, generator=generator) * 0.02)
    labels = torch.randint(vocabulary, (1, positions), generator=generator)
    labels[torch.rand(1, positions, generator=generator) >= supervised] = IGNORED
    states.requires_grad_()
    states.grad, layer.weight.grad = torch.zeros_like(states), torch.zeros_like(layer.weight)
    request = HeadRequest(vocabulary, parallel_state.get_tensor_model_parallel_group(), labels.to(device.device()))
    function = {"ours": head, "stock": stock_head}[head_name]
    before = _reset_peak()
    losses = function(hidden_states=states, output_layer=layer, output_weight=None, context=request, config=config)
    losses.sum().backward()
    return {"peak_bytes": _peak() - before, "loss": float(losses.mean()), "targets": losses.numel()}


def _reset_peak() -> int:
    """Bytes that are held now, on the GPU or resident; from here on ``_peak`` counts."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    return _status("VmRSS")


def _peak() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


def as_text(result: dict) -> str:
    """The result for people."""
    sizes, ratio = result["sizes"], result["ours_over_stock"]
    share = 100 * sizes["supervised"]
    lines = [
        f"head of {sizes['vocabulary']} words over {sizes['positions']} positions, {share:.0f} % of them with a target,"
        f" {sizes['dtype']}"
    ]
    lines += [f"  {name:6} {of['peak_bytes'] / 1e9:7.2f} GB at its peak" for name, of in result["heads"].items()]
    lines.append(
        f"{'holds' if ratio['holds'] else 'FAILS'}: ours / stock {ratio['ratio']:.3f} (at most {ratio['at_most']});"
        f" mean losses differ by {result['loss_difference']:.1e}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    name, vocabulary, positions, supervised, hidden, dtype = sys.argv[1:]
    print(json.dumps(_peak_of(name, int(vocabulary), int(positions), float(supervised), int(hidden), dtype)))
