"""The modelling file that goes along with an STI model: stock Llava cannot append pooled tokens of lower layers.

It is text here because nothing in this program runs it; transformers does, where the user allows code in the folder.
"""

from __future__ import annotations

MODELING_FILE = "modeling_dense_connector.py"
MODEL_TYPE = "llava_dense_connector"
ARCHITECTURE = "DenseConnectorForConditionalGeneration"
CONFIGURATION = "DenseConnectorConfig"

MODELING = '''"""Llava with pooled tokens of lower layers behind the final ones: STI of "Dense Connector for MLLMs".

config.json: vision_feature_layer is the final feature; dense_connector_layers are the lower ones, pooled over
dense_connector_pool neighbouring tokens (the remainder dropped) before the shared projector. For transformers 5.
"""

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel


class DenseConnectorConfig(LlavaConfig):
    model_type = "llava_dense_connector"


class DenseConnectorModel(LlavaModel):
    config_class = DenseConnectorConfig

    def get_image_features(self, pixel_values, *args, **kwargs):
        config = self.config
        states = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        first = 1 if config.vision_feature_select_strategy == "default" else 0
        tokens = [states[config.vision_feature_layer][:, first:]]
        for layer in config.dense_connector_layers:
            channels = states[layer][:, first:].transpose(1, 2)
            pooled = nn.functional.avg_pool1d(channels, config.dense_connector_pool, config.dense_connector_pool)
            tokens.append(pooled.transpose(1, 2))
        features = self.multi_modal_projector(torch.cat(tokens, dim=1))
        return BaseModelOutputWithPooling(last_hidden_state=states[-1], pooler_output=list(features))


class DenseConnectorForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = DenseConnectorConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = DenseConnectorModel(config)
        self.post_init()
'''
