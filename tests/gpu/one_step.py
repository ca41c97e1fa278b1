"""One forward and backward pass of the tiny model on the device that DC_DEVICE names; a program of its own.

The device and the patches belong to a process, so that CPU and CUDA cannot be compared within one.
"""

from __future__ import annotations

import sys

import torch

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig, padded_vocab_size
from dc_megatron.runtime import device, parallel, patches
from tests.multirank import parity


def main(language_folder: str, vision_folder: str, dtype: str, implementation: str, output: str) -> None:
    """Writes ``{"device", "loss", "gradients"}`` to ``output``: the mean loss and fp32 gradients by name."""
    patches.apply()
    from dc_megatron.inference.assemble import build_model, global_name, load_language_model, load_vision_tower
    from dc_megatron.model.language_model import Layout, transformer_config
    from dc_megatron.training.forward_step import to_device

    # The patch embedding is a convolution, which CUDA would round to 10 bits of mantissa.
    torch.backends.cudnn.allow_tf32 = False
    parallel.start()
    language, vision = LanguageConfig.from_folder(language_folder), VisionConfig.from_folder(vision_folder)
    connector = ConnectorConfig("dci")
    fused = implementation == "transformer_engine"
    layout = Layout(params_dtype=getattr(torch, dtype), transformer_engine=fused)
    rows = padded_vocab_size(language.vocab_size, 1)
    model = build_model(
        language,
        vision,
        connector,
        transformer_config(language, layout),
        vocab_rows=rows,
        max_sequence_length=2048,
        transformer_engine=fused,
        seed=1,
    )
    load_language_model(model, language, rows)
    load_vision_tower(model, vision, connector)
    model.connector.load_state_dict(parity.connector_state(vision, connector, language.hidden_size))
    model.set_trainable({"connector", "llm"})
    model.to(device=device.device(), dtype=layout.params_dtype)
    (batch,) = parity.make_step([[1, 3]], vision, connector)
    loss = model(to_device(batch, device.device())).mean()
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part, rest = name.split(".", 1)
            # Transformer Engine keeps the two norms inside the linear layers behind them.
            rest = rest.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
            rest = rest.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
            key = global_name(model, rest) if part == "language_model" else name
            gradients[key] = parameter.grad.float().cpu()
    torch.save({"device": loss.device.type, "loss": loss.item(), "gradients": gradients}, output)
    parallel.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
