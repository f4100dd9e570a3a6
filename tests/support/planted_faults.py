"""Plant faults in a copy of the package and see which test notices each.

    python -m tests.support.planted_faults [NAME ...]

Each fault changes one line of l2t_jax so that results are silently wrong, and
names the cheapest test of `make test` that notices it. Run this before tests
are deleted or merged: a fault that goes unnoticed afterwards is a property that
is no longer tested. Exits with 1 if a fault goes unnoticed.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from tests.support import small_runs


class Fault(NamedTuple):
  """One line of the package, broken."""

  name: str
  file: str  # In l2t_jax.
  old: str  # Part of a line; the file has it once.
  new: str
  test: str  # In tests; the node that must fail.


_BILEVEL = "method/test_bilevel.py::"
_OPTIMIZERS = "method/test_optimizers.py::"
_TRAINING = "method/test_training.py::"
_TRANSFER = "method/test_transfer.py::"
_OBJECTIVES = "method/test_objectives.py::"
_TUNING = "commands/test_tuning.py::"
_LOOP_PROBLEMS = "method/test_inner_loop_problems.py::"
_LOOPS = "method/test_inner_loops.py::"
_MIXING = "method/test_mixing.py::"
_PROPERTIES = "method/test_properties.py::"
_MODELS = "models/test_models.py::"
_NETWORKS = "models/test_networks.py::"
_BATCHES = "data/test_batches.py::"
_AUGMENTATION = "data/test_augmentation.py::"
_UNLABELED = "data/test_unlabeled.py::"
_EXPERIMENTS = "run/test_experiments.py::"
_METHODS = "run/test_methods.py::"
_RUN = "run/test_train.py::"
_SCALES = "run/test_feature_scales.py::"
_FAULTS = "run/test_faults.py::"
_TABLES = "results/test_tables.py::"
_MAP = "results/test_transfer_map.py::"
_LOWERING = "runtime/test_cpu_lowering.py::"
_DISTRIBUTED = "runtime/test_distributed.py::"
_BY_HAND = f"{_TRAINING}test_look_ahead_by_hand[auxiliary-0]"
_CUT_OFF = f"{_FAULTS}test_a_run_that_is_cut_off_ends_bit_equal[False]"
_PARITY = (
  "test_parity.py::test_iterations_equal_the_authors[step_T1-linearized]"
)

# fmt: off
FAULTS = (
  # The method.
  Fault("rolled_loop_takes_one_step_more", "method/bilevel.py",
        "take(state, meta_params, batches, steps[num_outside:])",
        "take(state, meta_params, batches, steps[num_outside - 1 :])",
        f"{_BILEVEL}test_rolled_equals_unrolled[reverse]"),
  Fault("every_inner_step_has_the_first_batch", "method/bilevel.py",
        "lambda leaf: leaf[k]", "lambda leaf: leaf[0]",
        f"{_BILEVEL}test_one_batch_per_step[False]"),
  Fault("batch_of_an_inner_step_is_differentiated", "method/bilevel.py",
        "jax.lax.stop_gradient((state.model_state, batch))",
        "state.model_state, batch",
        f"{_BILEVEL}test_batch_and_model_state_are_constants[reverse]"),
  Fault("early_steps_are_differentiated", "method/bilevel.py",
        "constants = jax.lax.stop_gradient((state, meta_params))",
        "constants = (state, meta_params)",
        f"{_LOOPS}test_truncation_comes_closer_with_more_steps"),
  Fault("segments_begin_with_the_last_steps", "method/bilevel.py",
        "first, others = steps[:remainder], steps[remainder:]",
        "first, others = steps[-remainder:], steps[:-remainder]",
        f"{_LOOPS}test_losses_and_batches_of_cut_loops"),
  Fault("updates_that_are_signs_pass", "method/bilevel.py",
        "if any(map(np.any, updates)) and", "if False and",
        f"{_LOOP_PROBLEMS}test_updates_that_are_signs[lion]"),
  Fault("state_of_another_optimizer_passes", "method/bilevel.py",
        "if len(set(structures)) > 1 or not operator.eq(*shapes):", "if False:",
        f"{_LOOP_PROBLEMS}test_states_and_losses_that_do_not_fit[opt_state]"),
  Fault("unsolved_system_passes_for_solved", "method/implicit.py",
        "jnp.where(is_solved, -x, jnp.nan)", "-x",
        f"{_LOOPS}test_an_unsolved_system_gives_nan"),
  Fault("series_lacks_its_scale", "method/implicit.py",
        "lambda a, b: a - scale * b", "lambda a, b: a - b",
        f"{_LOOPS}test_implicit_derivative_in_closed_form[neumann]"),
  Fault("hessian_product_has_the_wrong_sign", "method/bilevel.py",
        "jax.tree.map(as_array, cotangents[0])",
        "jax.tree.map(lambda x: -as_array(x), cotangents[0])",
        _BILEVEL +
        "test_hypergradient_equals_central_differences[linearized-1]"),
  Fault("what_a_loss_closes_over_is_constant", "method/bilevel.py",
        "x if primal.perturbed and",
        "x if False and",
        _BILEVEL +
        "test_a_loss_may_close_over_traced_values[linearized-options0]"),
  Fault("summary_is_not_of_the_target_that_was_kept", "run/train.py",
        "best = {name: json.loads(metadata[name]) for name in loop.BEST}",
        "json.loads(metadata[loop.BEST[0]])",
        f"{_RUN}test_a_summary_is_that_of_the_target_that_was_kept"),
  Fault("momentum_is_forgotten_between_steps", "method/bilevel.py",
        "InnerState(params, opt_state, jax.lax.stop_gradient",
        "InnerState(params, state.opt_state, jax.lax.stop_gradient",
        _TRAINING +
        "test_an_iteration_has_its_own_rate_and_keeps_the_momentum"),
  Fault("batch_statistics_never_move", "method/bilevel.py",
        "jax.lax.stop_gradient(model_state))", "state.model_state)",
        f"{_TRAINING}test_batch_statistics_move_once_per_iteration"),
  Fault("look_ahead_takes_T_plus_1_steps", "method/training.py",
        "num_steps=recipe.num_inner_steps,",
        "num_steps=recipe.num_inner_steps + 1,",
        _BY_HAND),
  Fault("outer_loss_reads_the_batch", "method/training.py",
        "if data.outer is not None:", "if False:",
        f"{_TRAINING}test_look_ahead_by_hand[total-5]"),
  Fault("look_ahead_starts_before_the_real_update", "method/training.py",
        "recipe, optimizer, inner, state.meta_params, data\n",
        "recipe, optimizer, state.inner, state.meta_params, data\n",
        _BY_HAND),
  Fault("source_runs_in_train_mode", "method/training.py",
        "sources[name].model_state, images, train=False",
        "sources[name].model_state, images, train=True",
        _BY_HAND),
  Fault("target_is_evaluated_in_train_mode", "method/training.py",
        "variables.model_state, batch.images, train=False",
        "variables.model_state, batch.images, train=True",
        f"{_TRAINING}test_evaluation_ignores_padding"),
  Fault("padding_counts_in_the_accuracy", "method/training.py",
        "jnp.sum(batch.mask * accuracies)", "jnp.sum(accuracies)",
        f"{_TRAINING}test_evaluation_ignores_padding"),
  Fault("learning_rate_is_read_one_step_late", "method/training.py",
        "recipe.learning_rate_fn(state.step)",
        "recipe.learning_rate_fn(state.step + 1)",
        _TRAINING +
        "test_an_iteration_has_its_own_rate_and_keeps_the_momentum"),
  Fault("average_never_moves", "method/training.py",
        "moved = old + ((1 - decay) * (new - old)).astype(old.dtype)",
        "moved = old",
        f"{_TRAINING}test_the_average_is_evaluated"),
  Fault("target_itself_is_evaluated", "method/training.py",
        "if state.average is not None:", "if False:",
        f"{_TRAINING}test_the_average_is_evaluated"),
  Fault("source_sees_unmixed_images", "method/training.py",
        "data = _with_sources(problem, sources, _mixed(batch))",
        "data = _mixed(batch)._replace(source=_with_sources(problem, sources,"
        " objectives.TransferBatch(*batch[:3])).source)",
        f"{_MIXING}test_source_and_target_see_the_mixed_images"),
  Fault("mixed_labels_change_places", "method/training.py",
        "MixedLabels(first, second, shares)",
        "MixedLabels(second, first, shares)",
        f"{_MIXING}test_source_and_target_see_the_mixed_images"),
  Fault("covered_pixels_keep_their_label", "method/mixing.py",
        "return mixed, mixing.share * (1 - area)",
        "return mixed, mixing.share",
        f"{_MIXING}test_images_are_mixed_with_the_one_before"),
  Fault("boxes_leave_the_image", "method/mixing.py",
        "np.minimum(center + half, shape)", "center + half",
        f"{_MIXING}test_what_is_drawn[0.0-1.0]"),
  Fault("bad_meta_update_takes_place", "method/training.py",
        "_choose(is_good & is_finite, updated, meta)",
        "_choose(is_good, updated, meta)",
        f"{_FAULTS}test_a_bad_meta_update_never_takes_place[False-nan]"),
  Fault("look_ahead_also_sees_labels", "method/objectives.py",
        "make_loss(with_target=False, without=added),",
        "make_loss(with_target=True, without=added),",
        f"{_OBJECTIVES}test_kd_reads_the_targets_own_logits"),
  Fault("batch_statistics_are_those_of_unlabeled_images",
        "method/objectives.py",
        "*more, _ = forward(params, model_state, batch.unlabeled)",
        "*more, new_state = forward(params, model_state, batch.unlabeled)",
        f"{_TRAINING}test_unlabeled_images_join_the_matching_alone"),
  Fault("lwf_head_reads_a_sum_over_positions", "method/transfer.py",
        "jnp.mean(at_least_float32(features), axis=(1, 2))",
        "jnp.sum(at_least_float32(features), axis=(1, 2))",
        f"{_OBJECTIVES}test_lwf_has_a_head_for_each_source"),
  Fault("aft_weighs_channels_with_their_logits", "method/objectives.py",
        'jax.nn.sigmoid(params["aft"][tap])', 'params["aft"][tap]',
        f"{_OBJECTIVES}test_aft_compares_how_images_relate"),
  Fault("afd_sums_to_1_over_the_images", "method/attention_distillation.py",
        "jnp.stack(scores) / np.sqrt(query.shape[-1]), axis=0",
        "jnp.stack(scores) / np.sqrt(query.shape[-1]), axis=1",
        f"{_OBJECTIVES}test_afd_by_hand"),
  Fault("look_ahead_minimises_what_a_combination_adds",
        "method/objectives.py",
        "make_loss(with_target=False, without=added),",
        "make_loss(with_target=False),",
        f"{_TRAINING}test_a_combination_adds_to_the_real_update_alone"),
  Fault("joint_weights_climb_the_loss", "method/training.py",
        "(meta_grads,) = pullback(*weight_grads)",
        "meta_grads = jax.tree.map(jnp.negative, pullback(*weight_grads)[0])",
        _TRAINING +
        "test_without_a_look_ahead_the_weights_descend_the_real_loss"),
  Fault("distance_of_a_pair_is_a_mean_over_channels", "method/objectives.py",
        "jnp.sum(weights.channel[name] * distance, axis=-1)",
        "jnp.mean(weights.channel[name] * distance, axis=-1)",
        f"{_RUN}test_a_target_becomes_a_source"),
  Fault("channel_weights_are_a_softmax_over_the_batch", "method/transfer.py",
        "jax.nn.softmax(logits, axis=-1)", "jax.nn.softmax(logits, axis=0)",
        f"{_TRANSFER}test_weights_start_uniform_and_near_one"),
  Fault("matching_loss_is_a_sum_over_the_batch", "method/transfer.py",
        "jnp.mean(pair_weight * jnp.sum(channel",
        "jnp.sum(pair_weight * jnp.sum(channel",
        f"{_TRANSFER}test_a_map_is_repeated_for_every_image"),
  Fault("distance_is_a_sum_over_positions", "method/transfer.py",
        "jnp.mean(jnp.square(wanted - regressed)",
        "jnp.sum(jnp.square(wanted - regressed)",
        f"{_TRANSFER}test_distances_and_loss_equal_loops"),
  Fault("source_maps_are_antialiased", "method/transfer.py",
        "antialias=False", "antialias=True",
        f"{_TRANSFER}test_resize_has_half_pixel_centres_and_no_antialiasing"),
  Fault("source_maps_are_not_constants", "method/transfer.py",
        "jax.lax.stop_gradient(SourceMaps(maps, pooled, energies))",
        "SourceMaps(maps, pooled, energies)",
        f"{_TRANSFER}test_source_maps_are_constants"),
  Fault("pair_weights_have_no_upper_bound", "method/transfer.py",
        "jax.lax.clamp(0.0, x, 6.0)", "jnp.maximum(x, 0.0)",
        f"{_TRANSFER}test_weights_by_hand"),
  Fault("pair_weights_start_at_0", "method/transfer.py",
        "jnp.ones((1,))", "jnp.zeros((1,))",
        f"{_TRANSFER}test_where_pair_weights_start_and_end[relu6-1-6]"),
  Fault("distillation_shrinks_with_the_temperature", "method/loss_functions.py",
        "temperature**2 * (soften", "temperature * (soften",
        f"{_OBJECTIVES}test_distillation_loss[4.0]"),
  Fault("source_outputs_are_not_softened", "method/loss_functions.py",
        "softmax(source_logits / temperature)", "softmax(source_logits)",
        f"{_OBJECTIVES}test_softened_cross_entropy[2.0]"),
  Fault("attention_is_summed_over_positions", "method/loss_functions.py",
        "jnp.mean(jnp.square(source - target))",
        "jnp.mean(jnp.sum(jnp.square(source - target), axis=-1))",
        f"{_OBJECTIVES}test_attention"),
  Fault("cross_entropy_is_a_sum_over_the_batch", "method/loss_functions.py",
        "return jnp.mean(losses)\n", "return jnp.sum(losses)\n",
        f"{_OBJECTIVES}test_cross_entropy_and_accuracy"),
  Fault("distillation_reads_the_last_source", "method/objectives.py",
        "for logits in source.logits.values()",
        "for logits in list(source.logits.values())[-1:]",
        f"{_OBJECTIVES}test_kd_reads_the_targets_own_logits"),
  Fault("nearest_pairs_the_shallowest_tap", "method/pair_sets.py",
        "reversed(list(source_taps))", "list(source_taps)",
        f"{_TRANSFER}test_pair_sets"),
  Fault("momentum_is_nesterovs", "method/optimizers.py",
        "momentum=momentum)", "momentum=momentum, nesterov=True)",
        f"{_TRAINING}test_sgd_is_pytorchs"),
  Fault("learning_rate_ends_one_epoch_early", "method/optimizers.py",
        "by_epoch = SCHEDULES[name](learning_rate, epochs)",
        "by_epoch = SCHEDULES[name](learning_rate, epochs - 1)",
        f"{_TRAINING}test_learning_rate_is_constant_within_an_epoch"),
  Fault("vectors_decay_like_kernels", "method/optimizers.py",
        'leaf.ndim > 1 and name not in ("bias", "scale")', "True",
        f"{_OPTIMIZERS}test_optimizers_are_those_of_pytorch"),
  Fault("adamw_has_no_derivative_at_0", "method/optimizers.py",
        "eps_root=_EPS_ROOT", "eps_root=0.0",
        f"{_OPTIMIZERS}test_adamw_differs_from_optax_only_at_0"),
  Fault("the_schedule_begins_with_the_warm_up", "method/optimizers.py",
        "after(jnp.maximum(left, 0) //", "after(step //",
        f"{_OPTIMIZERS}test_warm_up_comes_before_the_schedule"),
  # Networks.
  Fault("relu_before_the_shortcut", "models/resnet.py",
        ' = norm(name="bn2")(y)', ' = nn.relu(norm(name="bn2")(y))',
        _PARITY),
  Fault("running_mean_is_ignored_in_evaluation", "models/layers.py",
        "(x - mean.value) * (scale", "x * (scale",
        _PARITY),
  Fault("running_variance_is_biased", "models/layers.py",
        "batch_var * count / max(count - 1, 1)", "batch_var",
        f"{_MODELS}test_batch_norm_is_that_of_flax_in_every_derivative"),
  Fault("last_of_equal_maxima_gets_the_gradient", "models/layers.py",
        "(a >= b)", "(a > b)",
        f"{_MODELS}test_max_pool_gives_the_gradient_to_the_first_of_equals"),
  Fault("resnet_classifier_starts_too_large", "models/layers.py",
        "variance_scaling(1 / 3", "variance_scaling(1.0",
        f"{_MODELS}test_initialisation_is_the_authors"),
  Fault("vgg_taps_are_one_layer_early", "models/vgg.py",
        "{convs_before(i)}", "{max(convs_before(i) - 1, 1)}",
        f"{_MODELS}test_taps_of_the_paper"),
  Fault("layers_inside_blocks_are_proposed", "models/blocks.py",
        "return len(new) > int(is_first)", "return len(inner_sizes) > 1",
        "models/test_blocks.py::test_proposals"),
  Fault("stem_is_a_block", "models/blocks.py",
        "for n in blocks[start:] if", "for n in blocks if",
        "models/test_blocks.py::test_proposals"),
  Fault("scanned_layers_backwards", "models/scans.py",
        '-1 if params["reverse"] else 1', "1",
        f"{_NETWORKS}test_loops_may_be_nested_reversed_and_repeated"),
  Fault("first_axis_is_not_checked", "models/tapping.py",
        " or x.shape[0] != batch_size", "",
        f"{_NETWORKS}test_nested_features_and_outputs_that_are_tuples"),
  Fault("mean_counts_as_deviation", "run/feature_scales.py",
        "max(mean_square - mean**2, 0.0)", "mean_square",
        f"{_SCALES}test_a_scale_is_the_standard_deviation_over_training_images"),
  Fault("what_hardly_varies_is_blown_up", "run/feature_scales.py",
        "_FLOOR * np.sqrt", "0.0 * np.sqrt",
        f"{_SCALES}test_what_hardly_varies_is_not_blown_up[50.0-0.05]"),
  Fault("scales_are_measured_again", "run/train.py",
        'runs[0].progress.feature_scales', "None",
        f"{_SCALES}test_a_run_goes_on_with_the_scale_that_it_began_with"),
  Fault("features_are_not_divided", "run/sources.py",
        "features[tap] / scale", "features[tap]",
        f"{_SCALES}test_magnitudes_of_the_source_change_nothing"),
  Fault("resume_with_another_program", "run/setup.py",
        'getattr(source.network, "digest", ""),\n      )', "'',\n      )",
        "run/test_programs.py::"
        "test_a_run_goes_on_with_the_program_that_it_began_with"),
  Fault("resume_with_another_normalisation", "run/setup.py",
        "        source.image_format,\n        source.class",
        "        source.class",
        f"{_FAULTS}test_a_run_goes_on_with_what_it_began_with"),
  Fault("class_token_stays_in_the_map", "models/tapping.py",
        "x[:, grid.num_prefix :]", "x[:, : grid.height * grid.width]",
        "models/test_networks.py::test_tokens_become_maps[True]"),
  Fault("register_tokens_count_as_positions", "models/tapping.py",
        "in sorted(maps, key", "in sorted((), key",
        "models/test_networks.py::test_tokens_lie_on_the_map_of_patches[5-8]"),
  Fault("raw_weights_are_taken_for_averaged_ones", "models/checkpoints.py",
        '  "model_ema",', '  "another",',
        "models/test_checkpoints.py::"
        "test_averaged_weights_beside_raw_ones[model-model_ema]"),
  Fault("height_and_width_of_torch_kernels_are_swapped",
        "models/torch_weights.py",
        "transpose(2, 3, 1, 0)", "transpose(3, 2, 1, 0)",
        "models/test_pretrained.py::"
        "test_safetensors_round_trip_needs_no_torch"),
  Fault("dropout_is_off_in_training", "models/pure_functions.py",
        "name: train == when_training", "name: train",
        "models/test_networks.py::test_networks_are_told_in_their_own_words"),
  Fault("groups_share_their_dropout", "models/networks.py",
        "state = pure.fold_in(model_state, index)", "state = model_state",
        "models/test_networks.py::test_each_group_has_its_own_dropout[linen]"),
  Fault("only_the_first_group_is_remembered", "models/networks.py",
        "jnp.mean(values, axis=0)", "values[0]",
        "models/test_networks.py::"
        "test_groups_are_normalised_separately[linen]"),
  # Images.
  Fault("processes_draw_for_themselves", "data/augmentation.py",
        "ops[:, rows], strengths[:, rows]",
        "ops[:, : len(images)], strengths[:, : len(images)]",
        f"{_AUGMENTATION}test_processes_share_the_draws[in memory]"),
  Fault("every_batch_is_mixed_alike", "data/datasets.py",
        "np.random.default_rng((self._seed, epoch, step, MIXING))",
        "np.random.default_rng((epoch, step, MIXING))",
        f"{_AUGMENTATION}test_augmented_batches[streamed]"),
  Fault("erased_pixels_are_black", "data/augmentation.py",
        "images = jnp.where(erased[..., None], 0, images)",
        "images = jnp.where(erased[..., None], -1, images)",
        f"{_AUGMENTATION}test_erased_pixels_have_the_mean_color[in memory]"),
  Fault("histogram_counts_all_channels", "data/rand_augment.py",
        "below = jnp.cumsum(counts, axis=1) - counts",
        "below = jnp.cumsum(counts, axis=1)",
        f"{_AUGMENTATION}test_operations_are_those_of_pillow[RGB]"),
  Fault("pictures_lie_on_their_side", "data/image_files.py",
        "ImageOps.exif_transpose(image, in_place=True)", "pass",
        "data/test_pictures.py::"
        "test_pictures_are_read_as_viewers_show_them[jpeg-6]"),
  Fault("colour_of_16_bits_loses_its_lower_bytes", "data/image_files.py",
        "<< 8 | np.asarray(lower)", "<< 8",
        "data/test_pictures.py::test_sixteen_bits_of_a_png[3]"),
  Fault("test_images_say_what_white_is", "data/inspection.py",
        'max(maxima["train"], default=0)', "max(map(max, maxima.values()))",
        "data/test_pictures.py::"
        "test_the_brightest_training_value_says_what_white_is[10-True]"),
  Fault("white_is_0_and_stays_so", "data/image_files.py",
        "if tags.get(_PHOTOMETRIC) == 0:", "if False:",
        "data/test_second_reader.py::"
        "test_all_pixels_are_those_of_the_second_reader"),
  Fault("rows_of_a_sideways_tiff_are_mixed_up", "data/image_files.py",
        'else file.open("rb")', "else contextlib.nullcontext(file)",
        "data/test_second_reader.py::"
        "test_all_pixels_are_those_of_the_second_reader"),
  Fault("arrays_of_16_bits_are_dark", "data/augmentation.py",
        "return 2**bit_depth - 1", "return 2**16 - 1",
        "data/test_channels.py::test_the_training_images_say_what_white_is"),
  Fault("a_source_sees_the_first_bands", "run/sources.py",
        "images[..., np.array(self.bands)]", "images[..., : len(self.bands)]",
        "run/test_bands.py::"
        "test_a_source_sees_its_bands_in_its_own_normalisation"),
  Fault("parts_become_classes", "data/from_folders.py",
        "len(first) > 1 and all(", "False and all(",
        "data/test_pictures.py::test_other_layouts_are_not_taken_for_classes"),
  Fault("bright_values_wrap_around", "data/pillow.py",
        "np.minimum(pixels >> (depth - 8), 255)", "(pixels >> (depth - 8))",
        "data/test_pictures.py::"
        "test_the_brightest_training_value_says_what_white_is[10-True]"),
  Fault("bad_images_shift_the_labels", "data/inspection.py",
        "indices=subset.indices[good]", "indices=subset.indices[: len(good)]",
        "data/test_pictures.py::"
        "test_all_bad_images_are_named_before_training[False]"),
  Fault("equal_samples_count_as_equal_images", "data/look.py",
        "groups[pillow.digest(image)].append", "groups[b''].append",
        "data/test_look.py::test_equal_pixels_whatever_their_names_and_formats"),
  Fault("validation_tables_are_read_as_training", "data/from_huggingface.py",
        "second(index - num_first)", "first(index - num_first)",
        "data/test_huggingface.py::test_official_splits[True-save_to_disk]"),
  Fault("identifiers_wrap_around", "data/from_arrays.py",
        "labels.max() >= num_train", "False",
        "data/test_sources.py::test_identifiers_are_no_labels[4294967297]"),
  Fault("distilled_classes_keep_the_teachers_order", "run/sources.py",
        "if self.class_order:", "if False:",
        "run/test_methods.py::test_distillation_compares_classes_by_name"),
  Fault("other_weights_in_the_same_place_go_unnoticed", "run/train.py",
        "and digest != before.get(field, digest)", "and False",
        "run/test_train.py::test_a_run_and_its_files_may_move"),
  Fault("more_epochs_of_any_schedule", "run/train.py",
        'return schedules == {"constant"} and', "return",
        "run/test_train.py::test_more_epochs_of_another_schedule_are_refused"),
  Fault("a_run_starts_without_the_meta_networks", "run/train.py",
        "meta_params=learned.meta_params,", "meta_params=state.meta_params,",
        "run/test_train.py::"
        "test_a_run_starts_from_what_another_has_learned"),
  Fault("official_validation_images_train", "data/splits.py",
        "labels[:num_drawn]", "labels",
        "data/test_splits.py::test_official_sets_are_used_as_they_are"),
  Fault("test_images_also_train", "data/splits.py",
        "np.split(members, np.cumsum(sizes))", "np.split(members, sizes)",
        _PROPERTIES +
        "test_splits_are_disjoint_stratified_and_cover_everything"),
  Fault("images_left_over_include_labelled_ones", "data/loading.py",
        "np.setdiff1d(whole_split.train, split.train)", "whole_split.train",
        f"{_UNLABELED}test_no_image_has_two_roles[in memory]"),
  Fault("images_in_both_lists_train", "data/archives.py",
        '("train", "TrainImages.txt"), ("test", "TestImages.txt")',
        '("test", "TestImages.txt"), ("train", "TrainImages.txt")',
        "data/test_archives.py::test_an_image_in_both_lists_is_in_test_alone"),
  Fault("official_validation_images_come_first", "data/from_folders.py",
        'files["train"] + val', 'val + files["train"]',
        "data/test_sources.py::test_folder_with_its_own_val_and_test"),
  Fault("rows_and_columns_of_crops_are_swapped", "data/augmentation.py",
        "offsets[:, :1] + jnp.arange(height)",
        "offsets[:, 1:] + jnp.arange(height)",
        f"{_BATCHES}test_crop_and_flip_match_numpy"),
  Fault("crops_never_reach_the_last_offset", "data/augmentation.py",
        "0, 2 * padding + 1", "0, 2 * padding",
        f"{_BATCHES}test_draws_reach_every_offset_and_both_flips"),
  Fault("pixels_are_divided_by_256", "data/augmentation.py",
        "images.astype(jnp.float32) / white",
        "images.astype(jnp.float32) / (white + 1)",
        f"{_BATCHES}test_normalise_matches_numpy"),
  Fault("crop_also_flips", "data/augmentation.py",
        "flips[rows] & policy.flips", "flips[rows]",
        f"{_BATCHES}test_crop_does_not_flip"),
  Fault("processes_crop_alike", "data/augmentation.py",
        "offsets[rows], flips[rows]",
        "offsets[: len(images)], flips[: len(images)]",
        f"{_UNLABELED}test_processes_together_equal_one[in memory]"),
  Fault("last_partial_batch_is_not_evaluated", "data/datasets.py",
        "-(-num_images // self.batch_size)", "num_images // self.batch_size",
        f"{_PROPERTIES}test_evaluation_counts_every_image_once"),
  Fault("processes_share_rows", "data/datasets.py",
        "first + self.rows.start, first + self.rows.stop",
        "first, first + self.rows.stop - self.rows.start",
        f"{_PROPERTIES}test_processes_share_the_slots_of_a_step"),
  Fault("epochs_have_one_order", "data/datasets.py",
        "_permutation((seed, epoch)", "_permutation((seed, 0)",
        f"{_BATCHES}test_epochs_and_seeds_have_their_own_order"),
  Fault("streamed_crops_repeat_every_epoch", "data/streaming.py",
        "(self.seed, epoch, 1 + slot)", "(self.seed, 0, 1 + slot)",
        _UNLABELED +
        "test_each_role_step_epoch_and_seed_has_its_own_crops[streaming]"),
  Fault("stream_of_another_seed_goes_on", "data/streaming.py",
        "dataset._parked = None", "pass",
        f"{_UNLABELED}test_with_seed_equals_another_load[streaming]"),
  Fault("source_sees_the_targets_normalisation", "data/image_formats.py",
        "(images - constant(new.mean)) / constant(new.std)",
        "(images - constant(old.mean)) / constant(old.std)",
        "data/test_image_formats.py::test_grey_becomes_three_equal_channels"),
  # The machine.
  Fault("checksum_ignores_progress", "runtime/checkpoint.py",
        "json.dumps([words, progress]", "json.dumps([words]",
        "runtime/test_checkpoint.py::"
        "test_a_damaged_checkpoint_is_noticed[_change_progress-checksum]"),
  Fault("saved_states_stay_alive", "runtime/checkpoint.py",
        'leaf.__dict__.pop("addressable_shards", None)', "pass",
        "runtime/test_checkpoint.py::"
        "test_a_saved_state_is_freed_without_the_garbage_collector"),
  Fault("one_process_decides_for_all", "runtime/distributed.py",
        "np.all(multihost_utils.process_allgather",
        "np.any(multihost_utils.process_allgather",
        f"{_DISTRIBUTED}test_what_is_true_for_all_is_true_for_each"),
  Fault("parameters_are_not_split", "runtime/sharding.py",
        "or not any(divisible)", "or any(divisible)",
        f"{_DISTRIBUTED}test_a_network_that_does_not_fit_is_split"),
  Fault("mean_counts_iterations_without_the_metric", "runtime/metrics.py",
        "get(name, 0) + len(values)", "get(name, 0) + len(iterations)",
        "runtime/test_metrics.py::"
        "test_averages_do_not_depend_on_where_they_were_cut"),
  Fault("flops_of_a_loop_are_those_of_one_step", "runtime/compilation.py",
        ' or " while(" in compiled.as_text()', "",
        "runtime/test_compilation.py::test_flops_of_a_loop_are_unknown"),
  Fault("kernel_is_not_mirrored_for_the_input", "runtime/cpu_lowering.py",
        "jax.lax.rev(rhs, (0, 1))", "rhs",
        f"{_LOWERING}test_two_orders_of_derivatives[2-6-3-options2]"),
  Fault("parts_of_a_deep_sum_are_not_added", "runtime/cpu_lowering.py",
        "jnp.sum(sums, axis=axes[0])", "jnp.max(sums, axis=axes[0])",
        f"{_LOWERING}test_sums_over_positions_are_products[shape0-axes0]"),
  Fault("resumed_run_records_an_iteration_twice", "runtime/logs.py",
        "_step_of(line) <= from_step", "_step_of(line) <= from_step + 1",
        "runtime/test_logs.py::test_lines_that_are_no_records_are_dropped"),
  Fault("damaged_records_are_passed_over", "runtime/run_folder.py",
        "number == len(lines)", "number > 0",
        f"{_MAP}test_a_damaged_line_is_named"),
  # A run.
  Fault("test_set_validates", "run/loop.py",
        'validation = self._trainer.evaluate("val")',
        'validation = self._trainer.evaluate("test")',
        f"{_EXPERIMENTS}test_accuracies_are_those_of_the_saved_target"),
  Fault("validation_accuracy_is_reported_as_test", "run/loop.py",
        '"test_accuracy"] = test', '"test_accuracy"] = validation',
        f"{_EXPERIMENTS}test_accuracies_are_those_of_the_saved_target"),
  Fault("best_epoch_is_chosen_by_test_accuracy", "run/loop.py",
        "validation, strict=True):",
        'self._trainer.evaluate("test"), strict=True):',
        f"{_FAULTS}test_the_best_so_far_is_remembered"),
  Fault("last_epoch_counts_as_the_best", "run/loop.py",
        'result["accuracy"] > seed.progress.val_accuracy', "True",
        f"{_FAULTS}test_the_best_so_far_is_remembered"),
  Fault("learning_rate_of_the_next_epoch_is_recorded", "run/loop.py",
        "learning_rate_fn((epoch - 1) *", "learning_rate_fn(epoch *",
        f"{_RUN}test_a_run_leaves_what_it_promises"),
  Fault("momentum_is_not_restored", "run/loop.py",
        "return state\n",
        "return state._replace("
        "inner=state.inner._replace(opt_state=like.inner.opt_state))\n",
        _CUT_OFF),
  Fault("seeds_that_train_together_save_one_state", "run/trainer.py",
        "leaf[index]", "leaf[0]",
        f"{_METHODS}test_shapes_are_those_of_the_first_state[lwf_at-False]"),
  Fault("weight_decay_of_the_config_is_dropped", "run/setup.py",
        "weight_decay=inner.weight_decay", "weight_decay=0.0",
        f"{_EXPERIMENTS}test_settings_become_a_recipe"),
  Fault("T_of_the_config_is_ignored", "run/setup.py",
        "bilevel.num_inner_steps", "1",
        f"{_EXPERIMENTS}test_settings_become_a_recipe"),
  Fault("beta_of_the_config_is_ignored", "run/setup.py",
        "settings.transfer.beta", "0.5",
        f"{_RUN}test_a_target_becomes_a_source"),
  Fault("seeds_start_from_one_initialisation", "run/setup.py",
        "jax.random.key(seed)", "jax.random.key(0)",
        f"{_METHODS}test_fine_tuning_starts_from_the_source"),
  Fault("mean_of_a_source_is_ignored", "run/sources.py",
        "tuple(source.mean) or selected.mean", "selected.mean",
        f"{_METHODS}test_two_sources_with_formats_of_their_own"),
  Fault("predictor_runs_in_train_mode", "run/predictor.py",
        "images, train=False", "images, train=True",
        f"{_EXPERIMENTS}test_accuracies_are_those_of_the_saved_target"),
  # Results.
  Fault("std_is_that_of_a_population", "results/run_reader.py",
        "statistics.stdev(self.values)", "statistics.pstdev(self.values)",
        f"{_TABLES}test_csv_by_hand"),
  Fault("papers_numbers_stand_beside_another_setting", "results/tables.py",
        "if departures[column]", "if cell.departures",
        f"{_TABLES}test_the_papers_numbers_are_left_out_of_another_setting"),
  Fault("shares_of_sources_overlap", "results/transfer_map.py",
        'startswith(f"{name}/")', "startswith(name)",
        f"{_MAP}test_shares_of_several_sources"),
  Fault("number_of_the_paper_is_mistyped", "results/paper.py",
        "76.4, 78.3", "76.4, 78.8",
        "results/test_paper.py::test_the_paper_is_quoted_as_in_the_readme"),
  Fault("trials_evaluate_test_images", "run/tuning.py",
        "config.evaluate_test = False", "config.evaluate_test = True",
        f"{_TUNING}test_each_cell_is_tuned_by_itself"),
  Fault("the_worst_trial_is_chosen", "run/tuning.py",
        "best = max(outcomes, key=lambda", "best = min(outcomes, key=lambda",
        f"{_TUNING}test_each_cell_is_tuned_by_itself"),
  Fault("trials_share_seeds_with_the_table", "run/tuning.py",
        "_SEED_DISTANCE = 10_000", "_SEED_DISTANCE = 0",
        f"{_TUNING}test_each_cell_is_tuned_by_itself"),
  Fault("a_trial_that_failed_counts", "run/tuning.py",
        '-math.inf if failures else', '1.0 if failures else',
        f"{_TUNING}test_trials_that_fail_are_not_chosen"),
  Fault("a_search_goes_on_where_no_pair_helps", "run/tuning.py",
        "tried[winner].score <= best.score", "False",
        f"{_TUNING}test_fixed_pairs_are_searched"),
  Fault("differences_are_not_paired", "results/statistics.py",
        "values[s] - reference[s] for s in seeds",
        "a - b for a, b in zip(values.values(), reference.values())",
        "results/test_statistics.py::test_a_difference_by_hand"),
  Fault("an_interval_of_n_degrees_of_freedom", "results/statistics.py",
        "stdtrit(count - 1,", "stdtrit(count,",
        "results/test_statistics.py::test_a_difference_by_hand"),
  Fault("negative_transfer_by_noise", "results/run_warnings.py",
        "compared.mean if compared.high is None else compared.high",
        "compared.mean",
        "results/test_report.py"
        "::test_negative_transfer_is_more_than_the_noise_of_seeds"),
  Fault("a_zero_that_the_check_calls_wrong", "method/hypergradient_check.py",
        "distance - self.rounding, 0", "distance, 0",
        "method/test_inner_loops.py"
        "::test_the_check_knows_a_derivative_of_zero"),
  Fault("an_implicit_loss_closes_over_constants", "method/implicit.py",
        "return along_closed_over, None, along_meta",
        "return None, None, along_meta",
        "method/test_inner_loops.py"
        "::test_implicit_derivative_of_a_loop_and_a_loss_that_close_over"),
  Fault("a_probe_that_averages_in_bfloat16", "run/sources.py",
        "transfer.mean_over_positions(last)", "jnp.mean(last, axis=(1, 2))",
        "run/test_methods.py::test_a_probe_averages_features_in_float32"),
  Fault("a_linear_probe_trains_its_source", "run/sources.py",
        'frozen = trains == "classifier"', 'frozen = trains == "nothing"',
        "run/test_methods.py::test_the_source_itself_can_be_trained"),
)
# fmt: on


def main(names: list[str]) -> int:
  """Plant faults, all or those named; return the exit code."""
  unknown = set(names) - {fault.name for fault in FAULTS}
  if unknown:
    sys.exit(f"error: there is no fault {', '.join(sorted(unknown))}")
  chosen = [fault for fault in FAULTS if not names or fault.name in names]
  with tempfile.TemporaryDirectory(prefix="l2t_jax_faults_") as folder:
    root, cache = pathlib.Path(folder, "tree"), pathlib.Path(folder, "cache")
    _copy_tracked_files(root)
    broken = {fault.name: _break(root, fault) for fault in chosen}
    failed, seconds = _run({fault.test for fault in chosen}, root, cache)
    if failed:
      sys.exit(f"error: without a fault, {failed} fails")
    print(f"{'without a fault all pass':46} {seconds:4.0f} s", flush=True)
    num_unnoticed = 0
    for fault in chosen:
      file = root / "l2t_jax" / fault.file
      original = file.read_text()
      file.write_text(broken[fault.name])
      failed, seconds = _run({fault.test}, root, cache)
      file.write_text(original)
      num_unnoticed += not failed
      told = failed or "NOT NOTICED"
      print(f"{fault.name:46} {seconds:4.0f} s  {told}", flush=True)
  print(f"{num_unnoticed} of {len(chosen)} faults were not noticed")
  return int(num_unnoticed > 0)


def _copy_tracked_files(root):
  listed = subprocess.run(
    ["git", "ls-files", "-z"],
    cwd=small_runs.ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  for name in listed.stdout.split("\0")[:-1]:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(small_runs.ROOT / name, root / name)


def _break(root, fault):
  """Return the content of the fault's file with the fault in it."""
  content = (root / "l2t_jax" / fault.file).read_text()
  if content.count(fault.old) != 1:
    sys.exit(
      f"error: fault {fault.name} no longer applies: l2t_jax/{fault.file} has"
      f" {fault.old!r} {content.count(fault.old)} times; bring it up to date"
    )
  return content.replace(fault.old, fault.new)


def _run(tests, root, cache):
  """Run some tests; return (the first that fails or "", seconds)."""
  start = time.perf_counter()
  result = subprocess.run(
    [sys.executable, "-m", "pytest", "-x", "-n0", "-p", "no:cacheprovider"]
    + [f"tests/{test}" for test in sorted(tests)],
    cwd=root,
    env=os.environ
    | {
      "PYTHONPATH": str(root),
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      # Small programs, too, as in conftest.py.
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    },
    capture_output=True,
    text=True,
    timeout=small_runs.PATIENCE * len(tests),
  )
  seconds = time.perf_counter() - start
  failed = re.search(
    r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", result.stdout, re.M
  )
  if result.returncode not in (0, 1) or bool(failed) != bool(result.returncode):
    sys.exit(f"error: pytest cannot run {tests}:\n{result.stdout[-5000:]}")
  return failed[1] if failed else "", seconds


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
