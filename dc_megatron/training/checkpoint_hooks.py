"""Around the engine's saving and loading: what counts as a checkpoint, and what is written beside it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.training import checkpointing, get_args, get_tensorboard_writer, print_rank_0
from megatron.training.async_utils import maybe_finalize_async_save
from torch.distributed.checkpoint.api import CheckpointException

from dc_megatron.errors import UserError
from dc_megatron.training.model_provider import trained_connector
from dc_megatron.training.parameter_groups import fill_moments
from dc_megatron.training.resume import what_learns
from dc_megatron.training.saving import Saving
from dc_megatron.training.session import Session
from dc_megatron.training.unwrapped import unwrapped
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.durable_files import Digest
from dc_megatron.weights.frozen_base import hash_base
from dc_megatron.weights.projector_files import write_projector
from dc_megatron.weights.staged_iteration import StagedIteration


def save_hook(original: Callable, session: Session) -> Callable:
    """``save_checkpoint`` beside the iteration's place, and the rename that puts it there when all of it is on disk.

    With --async-save the engine only hands the tensors over, and ``schedule_hook`` sees to it that the rest follows
    when all ranks have written.
    """

    def save_checkpoint(iteration, model, *args, **kwargs):
        start, engine, rank = session.checked.start, get_args(), torch.distributed.get_rank()
        folder = engine.save
        own = os.path.realpath(start.folder) == os.path.realpath(folder)
        if start.resumes and start.iteration == iteration and own:
            # A finished run that was started again has trained nothing; its checkpoint is complete already.
            return None
        session.stall.alive()
        if engine.async_save:
            # One save at a time: a new one clears away what others have left.
            maybe_finalize_async_save(blocking=True)
        staged = _begin(folder, iteration, rank)
        chunks = unwrapped(model)
        session.saving = Saving(staged, _position(session), chunks[0].tower_is_stored)
        engine.save = staged.root
        fill_moments(session.optimizer)
        try:
            with _failures_told(staged):
                result = original(iteration, model, *args, **kwargs)
        finally:
            engine.save = folder
        session.saving.projector = _connector_now(chunks, engine.async_save)
        _hash_base(session)
        if not engine.async_save:
            _complete(session, session.saving, staged.digests_of_rank(rank))
        if session.pictures is not None:
            session.pictures.write(model[0], iteration, get_tensorboard_writer())
        session.stall.alive()
        session.clock.lap()
        return result

    return save_checkpoint


def schedule_hook(original: Callable, session: Session) -> Callable:
    """``schedule_async_save`` of a request that hashes what it wrote, and completes the checkpoint in the end.

    The engine calls a request's last functions on all ranks, between two steps, when all of them have written.
    """

    def schedule_async_save(request):
        saving, rank = session.saving, torch.distributed.get_rank()
        if request.async_fn is not None:
            request = request._replace(async_fn=partial(saving.staged.write_and_hash, rank, request.async_fn))
        request.add_finalize_fn(lambda: _complete(session, saving, saving.staged.take_digests(rank)))
        original(request._replace(finalize_fns=[_told(saving, step) for step in request.finalize_fns]))

    return schedule_async_save


def _told(saving: Saving, step: Callable[[], None]) -> Callable[[], None]:
    def finalize() -> None:
        with _failures_told(saving.staged):
            step()

    return finalize


@contextlib.contextmanager
def _failures_told(staged: StagedIteration) -> Iterator[None]:
    """UserError where a file cannot be written. All ranks hear of the engine's failures, the first one of the cause."""
    try:
        yield
    except (CheckpointException, OSError) as error:
        causes = [failure[0] for failure in error.failures.values()] if isinstance(error, CheckpointException) else []
        text = str(causes[0] if causes else error).strip().splitlines() or [type(error).__name__]
        folder = staged.folder
        newest, _ = checkpoint_folder.newest_complete(folder)
        raise UserError(
            f"--output_dir {folder}: the checkpoint of iteration {staged.iteration} cannot be written"
            f" ({text[0]}); {shutil.disk_usage(folder).free / 1e9:.1f} GB are free there. Started again, the run goes"
            f" on from {f'iteration {newest}' if newest is not None else 'its beginning'}"
        ) from error


def _begin(folder: str, iteration: int, rank: int) -> StagedIteration:
    """An empty place for the iteration, the same for all ranks, which meet here."""
    mark = [secrets.token_hex(4) if rank == 0 else None]
    if rank == 0:
        staged = StagedIteration(folder, iteration, mark[0])
        with _failures_told(staged):
            staged.begin()
    torch.distributed.broadcast_object_list(mark, src=0)
    return StagedIteration(folder, iteration, mark[0])


def _connector_now(chunks: list, training_goes_on: bool) -> dict[str, torch.Tensor] | None:
    """The connector's tensors as they are saved, where training goes on copies of them."""
    tensors = trained_connector(chunks)
    if tensors is None or not training_goes_on:
        return tensors
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _complete(session: Session, saving: Saving, own: dict[str, Digest]) -> None:
    """Manifest and rename, and whoever wants to hear of it. All ranks together, when all of them have written.

    ``own``: the digests of what this rank has written.
    """
    staged = saving.staged
    digests: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, own)
    if torch.distributed.get_rank() == 0:
        with _failures_told(staged):
            _write_side_files(session, saving)
            staged.publish(saving.position, {name: found[name] for found in digests for name in found})
        print(f"checkpoint of iteration {staged.iteration} is complete: {staged.place}", flush=True)
    if session.saved_elsewhere is not None:
        session.saved_elsewhere(staged.folder, staged.place)
        session.saved_elsewhere = None
    session.stall.alive()


def _hash_base(session: Session) -> None:
    """Hash the model below adapters, once a run: all ranks together."""
    settings = session.checked.settings
    if session.checked.lora is None or session.base_files is not None:
        return
    found: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, hash_base(settings.model_name_or_path))
    session.base_files = {name: own[name] for own in found for name in own}
    for own in found:
        for name, digest in own.items():
            if session.base_files[name] != digest:
                raise UserError(f"--model_name_or_path {settings.model_name_or_path}: {name} differs between nodes")


def _write_side_files(session: Session, saving: Saving) -> None:
    checked, settings, folder = session.checked, session.checked.settings, saving.staged.folder
    if session.tower_hash is None:
        session.tower_hash = checkpoint_folder.hash_folder_weights(settings.vision_tower)
    if saving.projector is not None:
        write_projector(
            folder,
            saving.projector,
            checked.connector,
            checked.vision,
            tower_hash=session.tower_hash,
            tower_trained=saving.tower_trained,
        )
    description = checkpoint_folder.CheckpointDescription(
        vision_tower=settings.vision_tower,
        vision_tower_hash=session.tower_hash,
        mm_dense_connector_type=settings.mm_dense_connector_type,
        mm_projector_type=settings.mm_projector_type,
        mm_vision_select_layer=settings.mm_vision_select_layer,
        version=settings.version,
        image_aspect_ratio=settings.image_aspect_ratio,
        model_max_length=settings.model_max_length,
        image_grid_pinpoints=[list(size) for size in checked.tiling.pinpoints] or None,
        mm_patch_merge_type=checked.tiling.merge,
        **_adapters_described(session),
    )
    checkpoint_folder.write_side_files(folder, settings.model_name_or_path, description)


def _adapters_described(session: Session) -> dict:
    lora = session.checked.lora
    if lora is None:
        return {}
    return {
        "lora_r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "language_model": session.checked.settings.model_name_or_path,
        "language_model_files": session.base_files,
    }


def _position(session: Session) -> dict:
    """What the manifest says about an iteration besides its files."""
    engine = get_args()
    return {
        "plan_hash": session.plan_hash,
        "consumed_samples": engine.consumed_train_samples,
        "consumed_tokens": dict(session.consumed_tokens),
        "global_batch_size": engine.global_batch_size,
        "learning": what_learns(session.checked.settings),
    }


def load_hook(original: Callable, session: Session) -> Callable:
    """The engine's choice of a tree, made by what the manifests said.

    The engine believes its tracker instead, even under --ckpt-step: one that is truncated ends the run with status 0,
    and one that says ``release`` hides every iteration.
    """

    def _load_base_checkpoint(load_dir, args, rank0=False, sharded_state_dict=None, checkpointing_context=None, **more):
        start = session.checked.start
        if not start.loads or load_dir != start.folder:
            return original(load_dir, args, rank0, sharded_state_dict, checkpointing_context, **more)
        release = start.iteration is None
        iteration = start.iteration or 0
        checkpointing.set_loaded_iteration(iteration)
        if not rank0:
            print_rank_0(f" loading {checkpoint_folder.tree_folder(load_dir, start.iteration)}")
        more.pop("gpt_compat_layer_maps", None)
        return checkpointing._load_global_dist_base_checkpoint(
            load_dir, args, rank0, sharded_state_dict, iteration, release, checkpointing_context, **more
        )

    return _load_base_checkpoint


def artifact_hook(original: Callable, session: Session) -> Callable:
    """Weights & Biases hears of a checkpoint when it is in its place, and of that place."""

    def on_save_checkpoint_success(checkpoint_path, tracker_filename, save_dir, iteration):
        def tell(folder: str, place: str) -> None:
            original(place, os.path.join(folder, checkpoint_folder.TRACKER), folder, iteration)

        session.saved_elsewhere = tell

    return on_save_checkpoint_success
