"""The wrapped functions of the engine as they are installed, and the limit on replaced images."""

from __future__ import annotations

import pytest

WORKER = "tests.multirank.hooks_worker"


@pytest.fixture(scope="module")
def hooks(workers) -> dict[str, dict]:
    (rows,) = workers.run(f"{WORKER}:table", 1)
    return {row["target"].split(":")[1]: row for row in rows}


def test_exactly_nine_functions_are_wrapped_each_with_a_reason(hooks):
    assert sorted(row["target"] for row in hooks.values()) == [
        "megatron.training.checkpointing:_load_base_checkpoint",
        "megatron.training.checkpointing:generate_state_dict",
        "megatron.training.checkpointing:schedule_async_save",
        "megatron.training.training:evaluate",
        "megatron.training.training:get_megatron_optimizer",
        "megatron.training.training:save_checkpoint",
        "megatron.training.training:train_step",
        "megatron.training.training:training_log",
        "megatron.training.wandb_utils:on_save_checkpoint_success",
    ]
    assert all(row["condition"] == "always" and len(row["why"].split()) > 3 for row in hooks.values())


def test_training_log_takes_and_gets_what_the_hook_reads(hooks):
    row = hooks["training_log"]
    expected = ["loss_dict", "total_loss_dict", "learning_rate", "iteration"]
    assert row["wrapped"] == [*expected, "args", "kwargs"]
    # The hook counts grad_norm as the fourth of what follows the iteration.
    expected += ["loss_scale", "report_memory_flag", "skipped_iter", "grad_norm"]
    assert row["parameters"][:8] == expected
    (positional,) = row["positional"]
    assert positional[:8] == expected
    # An argument that the hook names must not come by keyword as well.
    assert not set(row["keywords"][0]) & set(row["wrapped"])


def test_train_step_takes_and_gets_what_the_hook_reads(hooks):
    row = hooks["train_step"]
    expected = ["forward_step_func", "data_iterator", "model"]
    assert row["parameters"][:3] == expected
    assert row["wrapped"] == [*expected, "args", "kwargs"]
    (positional,) = row["positional"]
    assert positional[0::2][:2] == ["forward_step_func", "model"]
    assert not set(row["keywords"][0]) & set(expected)


def test_the_optimizer_takes_and_gets_what_the_hook_reads(hooks):
    row = hooks["get_megatron_optimizer"]
    assert row["parameters"][:3] == ["config", "model_chunks", "config_overrides"]
    assert row["wrapped"] == ["config", "model_chunks", "config_overrides", "more"]
    (positional,), (keywords,) = row["positional"], row["keywords"]
    assert positional == ["config", "model"]
    assert "config_overrides" in keywords


def test_evaluate_takes_and_gets_what_the_hook_reads(hooks):
    row = hooks["evaluate"]
    assert row["parameters"][:3] == row["wrapped"][:3] == ["forward_step_func", "data_iterator", "model"]
    (positional,) = row["positional"]
    assert positional[:3] == ["forward_step_func", "iterator", "model"]
    assert not set(row["keywords"][0]) & set(row["wrapped"])


def test_save_checkpoint_takes_and_gets_what_the_hook_reads(hooks):
    row = hooks["save_checkpoint"]
    assert row["parameters"][:2] == ["iteration", "model"]
    assert row["wrapped"] == ["iteration", "model", "args", "kwargs"]
    assert row["positional"], "the engine does not call save_checkpoint in this module any more"
    for positional, keywords in zip(row["positional"], row["keywords"], strict=True):
        assert positional[0] in ("iteration", "args.iteration")
        assert positional[1] == "model"
        assert not set(keywords) & {"iteration", "model"}


def test_the_engine_loads_through_the_hook_with_the_arguments_that_it_hands_on(hooks, workers):
    row = hooks["_load_base_checkpoint"]
    first = ["load_dir", "args", "rank0", "sharded_state_dict", "checkpointing_context"]
    assert row["parameters"][:5] == row["wrapped"][:5] == first
    assert row["positional"]
    assert all(positional[:2] == ["load_dir", "args"] for positional in row["positional"])
    (inner,) = workers.run(f"{WORKER}:parameters_of_the_inner_load", 1)
    assert inner[:4] == ["load_dir", "args", "rank0", "sharded_state_dict"]
    assert inner[4:] == ["iteration", "release", "checkpointing_context", "dp_cp_group", "expt_dp_group"]
    # What is handed on by name is known there, but for the one that torch_dist trees have no use for.
    assert set(row["parameters"][5:]) - {"gpt_compat_layer_maps"} <= set(inner)


@pytest.mark.parametrize("iteration", [7, None])
def test_what_is_loaded_does_not_depend_on_a_tracker(workers, iteration, tmp_path):
    (asked,) = workers.run(f"{WORKER}:asked_to_load", 1, str(tmp_path), iteration)
    assert asked == (str(tmp_path), iteration or 0, iteration is None, iteration or 0)


def test_other_folders_are_left_to_the_engine(workers, tmp_path):
    (asked,) = workers.run(f"{WORKER}:asked_to_load", 1, str(tmp_path), 7, str(tmp_path / "other"))
    assert asked == "left to the engine"


def test_others_hear_of_a_checkpoint_when_it_is_in_its_place(hooks, workers):
    assert hooks["on_save_checkpoint_success"]["parameters"] == hooks["on_save_checkpoint_success"]["wrapped"]
    (told,) = workers.run(f"{WORKER}:told_of_a_save", 1)
    assert told == ("run/iter_0000004", "run/latest_checkpointed_iteration.txt", "run", 4)


@pytest.mark.parametrize(
    ("flags", "peaks", "expected"),
    [
        ("", [1e-3, 1e-3], {"lr": 5e-4}),
        ("--mm_projector_lr 1e-2", [1e-3, 1e-2], {"lr": 5e-4, "lr_connector": 5e-3}),
        # Stage 1: the connector alone, at a rate of its own.
        ("--trainable connector --mm_projector_lr 1e-2", [1e-2], {"lr": 5e-3, "lr_connector": 5e-3}),
        # A stage that has nothing which learns knows no rates, and the same names.
        ("--mm_projector_lr 1e-2", [], {"lr": 0.0, "lr_connector": 0.0}),
    ],
)
def test_metrics_name_the_rate_of_every_part(workers, flags, peaks, expected):
    groups = [{"max_lr": peak, "lr": peak / 2} for peak in peaks]
    (found,) = workers.run(f"{WORKER}:part_rates", 1, ["--learning_rate", "1e-3", *flags.split()], groups)
    assert found == expected


def test_install_puts_a_wrapper_around_each_original(workers):
    (report,) = workers.run(f"{WORKER}:installed_and_removed", 1)
    assert report == dict.fromkeys(report, True)


@pytest.mark.parametrize(
    ("rate", "epoch", "steps", "stops_at"),
    [
        (0.0, 100, [(8, 0), (8, 1)], 1),
        (0.01, 1000, [(8, 4), (8, 4), (8, 2)], 3),  # ten of a thousand are allowed, early or late
        (0.01, 1000, [(8, 4), (8, 4), (8, 3)], 2),
        (0.1, 10, [(100, 10), (100, 10)], 2),  # beyond an epoch the share of what was seen counts
        (0.1, 10, [(100, 10), (100, 11)], 1),
        (1.0, 4, [(4, 4), (4, 4)], 2),
        (0.001, 0, [(0, 0)], 1),
    ],
)
def test_a_run_stops_where_too_many_images_were_replaced(workers, rate, epoch, steps, stops_at):
    ((passed, message),) = workers.run(f"{WORKER}:bad_images", 1, rate, epoch, steps)
    assert passed == stops_at
    if stops_at < len(steps):
        images, bad = (sum(column) for column in zip(*steps[: stops_at + 1], strict=True))
        assert f"--max-bad-sample-rate {rate}: {bad} of {images} images" in message
