"""The Dense Connector model of one rank: tower and connector on the first pipeline stage, language model on all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor

from dc_megatron.config import AdaptedLinear, LayerTable, LoraConfig, image_share
from dc_megatron.model.dense_connector import DenseConnector, join_features
from dc_megatron.model.frozen_casts import keep_frozen_casts
from dc_megatron.model.image_shares import gather_shares, image_group
from dc_megatron.model.last_layer import LastLayer, ask_for_rows, wanted_rows
from dc_megatron.model.lora import LoraAdapters
from dc_megatron.model.loss_head import HeadRequest, head
from dc_megatron.model.row_pieces import rounded_up
from dc_megatron.model.vision_tower import VisionTower

TRAINABLE_PARTS = ("connector", "llm", "vision_tower", "lora")
NEWLINE = "image_newline"
TOWER = "vision_tower."
# Transformer Engine's norms announce a state that never holds anything, torch's norms announce none. Left out of
# checkpoints, so that either can load what the other saved; the state of the linears (for FP8) both have.
_IDLE_STATE = "layernorm._extra_state"
# What Transformer Engine's linears keep for FP8.
_EXTRA_STATE = "._extra_state"


class DenseConnectorModel(MegatronModule):
    """``vision_tower`` and ``connector`` are None off the first pipeline stage, and are never built there; the tower is
    everywhere where all stages encode images (``dealt_images.py``).

    image_newline: the start, float32 [h], of the vector that ends every row of patches of an AnyRes picture under
    spatial_unpad; None off the first stage and without that. It is trained with the connector.

    Checkpoint keys: ``language_model.*``, ``connector.*`` and ``image_newline``; ``vision_tower.*`` (Hugging Face's
    names) where the tower has been trained. A tower as it was published is not saved. With adapters ``lora.*`` is saved
    in place of the frozen language model.
    """

    def __init__(
        self,
        language_model: GPTModel,
        vocab_size: int,
        dense_connector_type: str,
        layer_table: LayerTable,
        vision_tower: VisionTower | None,
        connector: DenseConnector | None,
        image_newline: Tensor | None = None,
        packed: bool = False,
    ):
        super().__init__(config=language_model.config)
        self.language_model = language_model
        self.vision_tower = vision_tower
        self.connector = connector
        self.image_newline = None if image_newline is None else torch.nn.Parameter(image_newline)
        self.lora: LoraAdapters | None = None
        self.vocab_size = vocab_size
        self.dense_connector_type = dense_connector_type
        self.layer_table = layer_table
        self.packed = packed
        # Set where the connector (or image_newline) was filled from a projector file, or is to start from random
        # numbers: the next load of a checkpoint then leaves it alone.
        self.connector_is_given = False
        self.newline_is_given = False
        # Set where the parameters are divided over ranks: the connector's tensors in full, as of the last save.
        self.whole_connector: dict[str, Tensor] | None = None
        # Set where checkpoints hold the tower, and where the next one that is loaded does not yet.
        self.tower_is_stored = False
        self.tower_is_given = False
        # What megatron-core's schedules and gradient finalisation read of a model.
        self.pre_process = language_model.pre_process
        self.post_process = language_model.post_process
        self.share_embeddings_and_output_weights = language_model.share_embeddings_and_output_weights
        self.pg_collection = language_model.pg_collection
        self.model_type = language_model.model_type
        self.vp_stage = language_model.vp_stage
        # A last stage may hold the head alone, and then gets all positions from the stage before.
        layers = language_model.decoder.layers
        self.last_layer_chooses = len(layers) > 0 and isinstance(layers[-1], LastLayer)

    def set_input_tensor(self, input_tensor) -> None:
        """Hidden states of the previous stage, set by the schedule."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The tied embedding, for the schedule's gradient reduction between first and last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def add_adapters(self, linears: Sequence[AdaptedLinear], lora: LoraConfig, seed: int) -> None:
        """Put an adapter beside every linear in ``linears`` of this rank's layers."""
        assert self.lora is None, "the model has adapters already"
        self.lora = LoraAdapters(self.language_model, linears, lora, seed)

    def set_trainable(self, parts: set[str], recompute_tower: bool = False) -> None:
        """Freeze everything that ``parts`` (of TRAINABLE_PARTS) does not name."""
        unknown = set(parts) - set(TRAINABLE_PARTS)
        assert not unknown, f"unknown trainable parts {unknown}"
        assert self.lora is not None or "lora" not in parts, "the model has no adapters"
        self.language_model.requires_grad_("llm" in parts)
        keep_frozen_casts(self.language_model)
        if self.connector is not None:
            self.connector.requires_grad_("connector" in parts)
        if self.image_newline is not None:
            self.image_newline.requires_grad_("connector" in parts)
        if self.vision_tower is not None:
            self.vision_tower.set_learning("vision_tower" in parts, recompute_tower)
            self.tower_is_stored |= "vision_tower" in parts
        if self.lora is not None:
            self.lora.requires_grad_("lora" in parts)

    def forward(self, batch: dict, positions: Tensor | None = None, cache=None) -> Tensor:
        """One micro-batch (the batch contract of the data room).

        Last stage: losses [supervised positions] in fp32, row-major; with ``positions`` (indices into the flattened
        b * s) logits [k, vocab_size] instead. Other stages: hidden states for the next one. ``image_features``
        [num_images * tile tokens, h] in the batch stand for pixels that were encoded before, and so does
        ``joined_features`` [num_images, tokens, channels], on which the connector then works. ``image_places`` and
        ``target_places`` (indices into the flattened b * s of images and targets) may be there: looking for them on a
        GPU would make the host wait. ``cache``: an inference context of megatron.core, which keeps keys and values; the
        batch then goes on where it ended. Under context parallelism the batch is a rank's part (see
        ``row_pieces.take_pieces``), and so are losses and hidden states; images are those of the whole row.
        """
        embeddings = self._embed(batch) if self.pre_process else None
        # Questions to a model in training come unpacked, without bounds.
        packed = self._packed_seq_params(batch) if self.packed and "cu_seqlens" in batch else None
        places = batch.get("target_places") if positions is None else positions
        chosen = self.last_layer_chooses and packed is not None and places is not None
        if chosen:
            packed = ask_for_rows(packed, wanted_rows(places, self.config))
        request = HeadRequest(
            vocab_size=self.vocab_size,
            group=self.pg_collection.tp,
            labels=batch["labels"] if positions is None else None,
            positions=places,
            chosen=chosen,
        )
        return self.language_model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=None,
            decoder_input=embeddings,
            packed_seq_params=packed,
            inference_context=cache,
            output_processor=head,
            output_processor_context=request,
        )

    def _packed_seq_params(self, batch: dict) -> PackedSeqParams:
        bounds = batch["cu_seqlens"]
        longest = rounded_up(int(batch["max_seqlen"]))
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        # Of a context-parallel rank; travels with the row as ``wanted_rows`` does.
        packed.pieces = batch.get("row_pieces")
        return packed

    def _embed(self, batch: dict) -> Tensor:
        """Token embeddings with image features in their places, [s, b, h], split under sequence parallelism."""
        embeddings = self.language_model.embedding(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
        if batch["num_images"]:
            features = batch.get("image_features")
            if features is None:
                joined = batch.get("joined_features")
                if joined is None:
                    joined = self.joined_features(batch["pixel_values"], batch["num_images"])
                features = self.connector(joined).flatten(0, 1)
            if self.image_newline is not None:
                # Row num_images * tile tokens of image_feature_index.
                features = torch.cat([features, self.image_newline.to(features.dtype)[None]])
            length, rows, width = embeddings.shape
            places = batch.get("image_places")
            if places is None:
                places = batch["image_mask"].flatten().nonzero().squeeze(-1)
            chosen = features.index_select(0, batch["image_feature_index"]).to(embeddings.dtype)
            flat = embeddings.transpose(0, 1).reshape(rows * length, width).index_copy(0, places, chosen)
            embeddings = flat.view(rows, length, width).transpose(0, 1).contiguous()
        elif self.connector is not None and next(self.connector.parameters()).requires_grad:
            # Every trained parameter must take part in every micro-batch: an overlapped gradient reduction waits for
            # all of a bucket.
            idle = self.connector(self._idle_features()).sum()
            if self.image_newline is not None:
                idle = idle + self.image_newline.sum()
            embeddings = embeddings + idle.to(embeddings.dtype) * 0.0
        if self.config.sequence_parallel:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings, group=self.pg_collection.tp)
        return embeddings

    def _idle_features(self) -> Tensor:
        """Something for the connector where a micro-batch has no images; of a blank one where the tower learns."""
        weight = self.connector.mlp[0].weight
        if not self.vision_tower.learns:
            return weight.new_zeros(1, self.connector.input_size)
        size = self.vision_tower.model.config.image_size
        states = self.vision_tower(weight.new_zeros(1, 3, size, size))
        return join_features(states, self.layer_table, self.dense_connector_type)

    def image_features(self, pixels: Tensor, num_images: int) -> Tensor:
        """Features [num_images, tokens, h] of a micro-batch, as ``joined_features`` and the connector make them.

        The connector runs on all of them on every rank: its gradients are whole everywhere and need no reduction. Those
        of a tower that learns do (see ``VisionTower.set_learning``).
        """
        return self.connector(self.joined_features(pixels, num_images))

    def joined_features(self, pixels: Tensor, num_images: int) -> Tensor:
        """What enters the connector, [num_images, tokens, channels], of tiles that the ranks of the same rows share.

        num_images counts tiles; pixels [k, 3, H, W] is this rank's share of them (see config.image_share). The tower's
        features are gathered.
        """
        group = image_group(self.pg_collection)
        # The first rank's is the widest; the others fill up to it.
        share = len(image_share(num_images, 0, group.size()))
        weight = self.connector.mlp[0].weight
        padded = pixels.to(weight.dtype)
        if group.size() > 1 and padded.shape[0] < share:
            missing = padded.new_zeros(share - padded.shape[0], *padded.shape[1:])
            padded = torch.cat([padded, missing])
        joined = join_features(self.vision_tower(padded), self.layer_table, self.dense_connector_type)
        joined = gather_shares(joined, self.pg_collection)[:num_images]
        assert joined.shape[0] == num_images, f"{joined.shape[0]} images encoded, {num_images} expected"
        return joined

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Checkpoint entries of this rank, without a tower that was never trained or a model frozen below adapters."""
        state = self.language_model.sharded_state_dict(f"{prefix}language_model.", sharded_offsets, metadata)
        state = {name: value for name, value in state.items() if not name.endswith(_IDLE_STATE)}
        if self.lora is not None:
            state = {name: entry for name, entry in state.items() if name.endswith(_EXTRA_STATE)}
            state.update(self.lora.sharded_state_dict(f"{prefix}lora.", sharded_offsets, metadata))
        if self.connector is not None and not self.connector_is_given:
            state.update(
                sharded_state_dict_default(
                    self.connector,
                    f"{prefix}connector.",
                    sharded_offsets,
                    metadata,
                    tp_group=self.pg_collection.tp,
                )
            )
        replicated = {}
        if self.image_newline is not None and not self.newline_is_given:
            replicated[NEWLINE] = self.image_newline
        if self.vision_tower is not None and self.tower_is_stored and not self.tower_is_given:
            replicated |= {TOWER + name: value for name, value in self.vision_tower.read_state().items()}
        if replicated:
            state.update(
                make_sharded_tensors_for_checkpoint(
                    replicated,
                    prefix,
                    sharded_offsets=sharded_offsets,
                    tp_group=self.pg_collection.tp,
                    dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
                )
            )
        return state

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> dict:
        """Parameters without the frozen tower (the engine's non-distributed format)."""
        state = self.state_dict(prefix=prefix, keep_vars=keep_vars)
        return {name: value for name, value in state.items() if not name.startswith(f"{prefix}vision_tower.")}

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As torch; what checkpoints leave out, a connector that was given and the norm's idle state may be missing."""
        own, state_dict = self._own_tower(state_dict)
        if self.lora is not None:
            base = self.language_model.state_dict(prefix="language_model.")
            own.update({name: value for name, value in base.items() if not name.endswith(_EXTRA_STATE)})
        if self.connector_is_given:
            own.update(self.connector.state_dict(prefix="connector."))
            self.connector_is_given = False
        if self.image_newline is not None and self.newline_is_given:
            own[NEWLINE] = self.image_newline.detach()
        self.newline_is_given = False
        for name, norm in self.language_model.named_modules(prefix="language_model"):
            state = f"{name}._extra_state"
            if state.endswith(_IDLE_STATE) and type(norm).get_extra_state is not torch.nn.Module.get_extra_state:
                own[state] = None
        state_dict = {**state_dict, **own}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _own_tower(self, state_dict: dict) -> tuple[dict, dict]:
        """(what of the tower stays as it is, ``state_dict`` with the tower's tensors under their names here)."""
        if self.vision_tower is None:
            return {}, state_dict
        own = self.vision_tower.state_dict(prefix=TOWER)
        if self.tower_is_stored and not self.tower_is_given:
            stored = {f"{TOWER}model.{name}" for name in self.vision_tower.read_state()}
            own = {name: value for name, value in own.items() if name not in stored}
        self.tower_is_given = False
        return own, {
            f"{TOWER}model.{name.removeprefix(TOWER).removeprefix('model.')}" if name.startswith(TOWER) else name: value
            for name, value in state_dict.items()
        }
