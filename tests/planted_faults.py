"""Are the tests any good? Plant known faults in a copy of the package, one at a time: each must turn its test red.

Run by `make faults`, not by pytest; two to four minutes on two CPU cores.
"""
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ["hybridvae", "tests", "weights", "pyproject.toml"]
WORKERS = 2


class Fault(NamedTuple):
    name: str
    module: str  # file in hybridvae/
    old: str  # must occur exactly once
    new: str
    test: str  # must fail, and pass without the fault


KILLED = "test_training.py::test_a_killed_run_continues_bit_for_bit"
FAULTS = [
    # diffusion
    Fault("c1 and c2 swapped", "diffusion.py", "mean = c1 * x0 + c2 * x_t", "mean = c2 * x0 + c1 * x_t",
          "test_diffusion.py::test_the_posterior_is_the_conditional_of_the_joint_gaussian"),
    Fault("posterior of form 2 shifted by all of x̂", "diffusion.py", "mean + (1 - c2) * shift", "mean + shift",
          "test_diffusion.py::test_the_posterior_is_the_conditional_of_the_joint_gaussian"),
    Fault("forward process of form 2 without x̂", "diffusion.py", "        return y if shift is None else y + shift",
          "        return y",
          "test_diffusion.py::test_q_sample_jumps_where_the_chain_walks"),
    Fault("network of form 2 sees y instead of y + x̂", "diffusion.py", "x_t = y if shift is None else y + shift",
          "x_t = y",
          "test_diffusion.py::test_form_2_is_form_1_of_the_network_that_sees_the_shifted_image"),
    Fault("x̂ added to the returned image", "diffusion.py", "previous = (x0, t)\n        return y",
          "previous = (x0, t)\n        return y if shift is None else y + shift",
          "test_diffusion.py::test_a_perfect_network_returns_the_image_and_not_the_image_plus_the_shift"),
    Fault("ᾱ off by one in the samplers", "diffusion.py", "float(self.alphas_cumprod[t]) if t >= 0",
          "float(self.alphas_cumprod[t - 1]) if t >= 1",
          "test_diffusion.py::test_ddim_is_that_of_diffusers"),
    Fault("noise left before the first step", "diffusion.py", "if t >= 0 else 1.0",
          "if t >= 0 else float(self.alphas_cumprod[0])",
          "test_diffusion.py::test_all_thousand_ancestral_steps_are_those_of_diffusers"),
    Fault("last ancestral step adds noise", "diffusion.py", "return mean  # the last", "pass  # the last",
          "test_diffusion.py::test_all_thousand_ancestral_steps_are_those_of_diffusers"),
    Fault("σ of DDIM without its first factor", "diffusion.py", "np.sqrt((1 - then) / (1 - now) * (1 - now / then))",
          "np.sqrt(1 - now / then)",
          "test_diffusion.py::test_ddim_is_that_of_diffusers"),
    Fault("DPM-Solver++ of first order", "diffusion.py", "x0 = x0 + (x0 - before) / (2 * r)", "x0 = x0",
          "test_diffusion.py::test_dpm_solver_and_ddim_as_its_first_order_are_those_of_diffusers"),
    Fault("sign of v", "diffusion.py", "a * eps - s * x0}", "s * x0 - a * eps}",
          "test_diffusion.py::test_the_target_is_turned_back_into_the_image"),
    Fault("min-SNR weight without its cap", "diffusion.py", "np.minimum(snr, gamma)", "snr",
          "test_diffusion.py::test_the_loss_is_the_weighted_error_of_the_image_in_every_prediction"),
    Fault("weight of v's error for that of ε's", "diffusion.py", '"v": snr + 1, "x0"', '"v": snr, "x0"',
          "test_diffusion.py::test_the_loss_is_the_weighted_error_of_the_image_in_every_prediction"),
    # VAE
    Fault("KL without the -1", "vae.py", "return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)",
          "return 0.5 * (mu.square() + logvar.exp() - logvar)",
          "test_vae.py::test_the_kl_is_that_of_torch_distributions"),
    Fault("KL with the wrong sign of logvar", "vae.py", "return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)",
          "return 0.5 * (mu.square() + logvar.exp() - 1 + logvar)",
          "test_vae.py::test_the_kl_is_that_of_torch_distributions"),
    Fault("logvar taken for log σ", "vae.py", "mu + (0.5 * logvar).exp() * eps", "mu + logvar.exp() * eps",
          "test_vae.py::test_reparameterized_codes_have_the_mean_and_deviation_of_the_posterior"),
    # learned priors
    Fault("KL of a learned prior in closed form", "vae.py", "exact = isinstance(prior, StandardNormal)", "exact = True",
          "test_vae.py::test_a_learned_priors_kl_is_the_difference_of_log_densities_at_the_code_that_is_decoded"),
    Fault("KL estimated without q", "priors.py", "return log_q - prior.log_prob(z)", "return -prior.log_prob(z)",
          "test_priors.py::test_the_mean_over_many_draws_is_the_closed_form_and_so_are_its_gradients"),
    Fault("log-determinant forgotten", "priors.py", "return log_det - 0.5 * (u.square()", "return -0.5 * (u.square()",
          "test_priors.py::test_the_density_of_a_flow_integrates_to_one_and_its_samples_follow_it"),
    Fault("the last parameters of a fit kept, not the best", "priors.py",
          'if not report["problem"] and value < lowest:', 'if not report["problem"]:',
          "test_priors.py::test_the_best_parameters_are_kept_where_a_fit_learns_its_codes_by_heart"),
    Fault("a diverged flow goes on", "vae.py", 'p.get("heldout_log_det", 0) > 10', 'p.get("heldout_log_det", 0) > 1e9',
          "test_vae.py::test_a_flow_that_diverges_ends_the_training_and_says_so"),
    Fault("a fitted prior outlives its weights", "vae.py", "_Fit(name, weights_hash(self), own", '_Fit(name, "", own',
          "test_priors.py::test_a_prior_fitted_by_name_knows_the_codes_better_than_the_vaes_own_and_follows_the_seed"),
    # distillation
    Fault("the first prediction for the weighted mean", "distillation.py",
          "return w * predict(y_m, middle) + (1 - w) * x1", "return x1",
          "test_distillation.py::test_a_trained_linear_student_does_in_one_step_what_its_linear_teacher_does_in_two"),
    Fault("weights of the two predictions exchanged", "distillation.py", "w * predict(y_m, middle) + (1 - w) * x1",
          "(1 - w) * predict(y_m, middle) + w * x1",
          "test_distillation.py::test_one_step_with_the_target_ends_where_two_steps_of_the_teacher_end"),
    Fault("the teacher of form 2 sees y", "distillation.py", "unet(y if shift is None else y + shift, t", "unet(y, t",
          "test_distillation.py::test_both_forms_have_the_same_loss_where_their_weights_are_converted"),
    Fault("a student that is its own teacher all along", "distillation.py",
          "copy.deepcopy(self.unet).requires_grad_(False).eval()", "self.unet",
          "test_distillation.py::test_the_teacher_does_not_learn_and_the_student_and_nothing_else_does"),
    Fault("a continued run is taught by what it has become", "training.py", "    model.keep_start()\n", "",
          "test_distillation.py::test_a_stopped_distillation_goes_on_with_the_teacher_that_it_began_with"),
    Fault("the truncated weight without its bound", "diffusion.py", '"truncated_snr": np.maximum(snr, 1)',
          '"truncated_snr": snr', "test_distillation.py::test_the_loss_is_the_truncated_error_of_the_image"),
    Fault("a student of ε", "distillation.py", 'noise = {"prediction": "v"} if prediction == "eps" else {}',
          'noise = {"prediction": "eps"} if prediction == "eps" else {}',
          "test_distillation.py::test_a_teacher_of_the_noise_gets_a_student_of_v"),
    Fault("a student takes twenty steps", "generators.py", "own or 20 if steps is None else steps",
          "20 if steps is None else steps",
          "test_distillation.py::test_a_student_starts_as_its_teacher_and_its_weights_are_a_model_of_their_own"),
    Fault("any teacher goes on in a folder", "custom.py", '{"teacher": weights_hash(model)} if', '{} if',
          "test_distillation.py::test_another_teacher_does_not_go_on_in_the_same_folder"),
    # latent diffusion and profiles
    Fault("codes clipped as if they were pixels", "latent.py", "generator=generator, clip=False)",
          "generator=generator, clip=True)",
          "test_latent.py::test_normal_codes_are_drawn_with_the_mean_and_deviation_that_were_measured"),
    Fault("codes not given their size back", "latent.py", "(code * self.deviation + self.mean)", "(code + self.mean)",
          "test_latent.py::test_normal_codes_are_drawn_with_the_mean_and_deviation_that_were_measured"),
    Fault("places measured one by one", "latent.py", "rows.std(dim=1).clamp(min=1e-4)",
          "rows[:, :len(codes)].std(dim=1).clamp(min=1e-4)",
          "test_latent.py::test_vectors_are_measured_by_dimension_and_places_by_channel"),
    Fault("diffusion of mean codes", "latent.py",
          "            z = reparameterize(mu, logvar, draws.randn(*mu.shape))\n        loss = ",
          "            z = mu\n        loss = ", "test_latent.py::test_codes_are_drawn_in_training"),
    Fault("a short refinement begins at pure noise", "latent.py",
          "noise if start == 1 else diffusion.q_sample(x_hat, first, noise)", "noise",
          "test_latent.py::test_a_refinement_runs_the_last_share_of_the_process_from_x_hat_with_noise"),
    Fault("steps of a diffusion that is not run", "latent.py", "of_codes = steps if prior is None else 0",
          "of_codes = steps", "test_latent.py::test_nfe_is_the_number_of_evaluations_of_both_networks"),
    Fault("a goal on FD alone", "latent.py", 'near.get("high-frequency power"), *near.values()]', 'near["FD"]]',
          "test_latent.py::test_a_model_without_texture_never_reaches_the_goal"),
    Fault("near in the mean is near", "latent.py", "result.low <= 0 < result.high else result.high <= 0",
          "False else result.difference <= 0",
          "test_latent.py::test_what_the_seeds_do_not_decide_stays_open"),
    Fault("a gain in time over twenty steps where ten suffice", "latent.py",
          'options[1] |= {} if steps is None else {"steps": steps}', "pass",
          "test_latent.py::test_fewer_steps_of_the_pixel_model_take_less_time"),
    # components of the code
    Fault("codes projected through the origin", "pca_guidance.py",
          "self.mean + (z.to(self.mean.dtype) - self.mean) @ kept.T @ kept", "z.to(self.mean.dtype) @ kept.T @ kept",
          "test_pca_guidance.py::test_a_projection_is_the_nearest_code_of_k_components"),
    Fault("components by rising variance", "pca_guidance.py", "rows = vectors.T.flip(0)", "rows = vectors.T",
          "test_pca_guidance.py::test_mean_components_and_variances_are_those_of_scikit_learn"),
    Fault("components of a model never measured", "pca_guidance.py",
          "self.pca.measure(mean_codes(self.vae, data))", "pass",
          "test_pca_guidance.py::test_components_are_those_of_mean_codes_of_the_training_images"),
    Fault("the projected code at steps of low SNR", "pca_guidance.py", "return t < int(", "return t >= int(",
          "test_pca_guidance.py::test_only_steps_of_high_snr_get_the_projected_code"),
    Fault("one call's number of components stays", "pca_guidance.py", "other = copy.copy(self)", "other = self",
          "test_pca_guidance.py::test_a_number_given_to_one_call_leaves_the_model_as_it_is"),
    Fault("memory that is given back is not subtracted", "profiling.py", "        held += change\n",
          "        held += max(change, 0)\n",
          "test_profiling.py::test_memory_that_is_held_together_adds_up_and_memory_in_turn_does_not"),
    Fault("operators sorted with the operators they call", "profiling.py", "else e.self_cpu_time_total) / 1000",
          "else e.cpu_time_total) / 1000",
          "test_profiling.py::test_operators_are_sorted_by_their_own_time_which_is_at_most_that_of_the_call"),
    Fault("a profiled model is trained by it", "profiling.py",
          "model, device, profiles = copy.deepcopy(model), model.device, {}",
          "model, device, profiles = model, model.device, {}",
          "test_profiling.py::test_profiling_a_model_leaves_it_and_the_generators_as_they_were"),
    Fault("a step for measuring keeps its gradients", "training.py",
          "    optimizer.step()\n    optimizer.zero_grad()\n", "    optimizer.step()\n",
          "test_training.py::test_a_step_for_measuring_trains_what_is_trained_next_to_nothing"
          "_and_sets_the_gradients_free"),
    # adaptive conditioning
    Fault("level of the noise not an input", "adaptive.py", "strength[:, None] * self.level_input",
          "0 * strength[:, None]",
          "test_adaptive.py::test_x_hat_fades_into_noise_as_the_strength_grows_and_the_level_is_an_input"),
    Fault("control that is given the level", "adaptive.py", "strength[:, None] * self.level_input", "strength[:, None]",
          "test_adaptive.py::test_the_control_meets_the_same_noise_and_is_not_given_its_level"),
    Fault("texture in half precision", "metrics.py",
          "    with torch.autocast(images.device.type, enabled=False):\n        x = torch.einsum(",
          "    if True:\n        x = torch.einsum(",
          "test_metrics.py::test_what_is_measured_of_images_is_the_same_within_autocast"),
    Fault("power in half precision", "metrics.py",
          "    with torch.autocast(images.device.type, enabled=False):  # in full precision whatever surrounds it\n",
          "    if True:\n",
          "test_metrics.py::test_what_is_measured_of_images_is_the_same_within_autocast"),
    Fault("coarse image not scaled as noise is added", "adaptive.py", "(1 - s.square()).sqrt() * x_hat + s * noise",
          "x_hat + s * noise",
          "test_adaptive.py::test_x_hat_fades_into_noise_as_the_strength_grows_and_the_level_is_an_input"),
    Fault("diffusion loss reaches the head", "adaptive.py", "(value.detach() for value in self.head(z))",
          "self.head(z)",
          "test_adaptive.py::test_gradients_reach_every_trained_part_and_the_heads_loss_nothing_but_the_head"),
    Fault("all steps from the start in the middle", "adaptive.py", "diffusion.q_sample(x_hat, t, noise)", "noise",
          "test_adaptive.py::test_each_image_takes_its_own_steps_from_its_own_start"),
    Fault("control that is not shuffled", "adaptive.py", "        if self.shuffled:  #", "        if False:  #",
          "test_adaptive.py::test_numbers_follow_the_rank_on_a_line_and_the_control_has_the_same_ones_on_other_images"),
    Fault("a strategy tested on the seed on which it was chosen", "adaptive.py", "if not chosen or seed != CHOSEN_ON",
          "if True", "test_adaptive.py::test_what_uses_the_quarter_loses_the_seed_on_which_it_was_chosen"),
    Fault("ranks among draws of another prior", "adaptive.py", "codes = prior.sample(n, torch",
          "codes = vae.prior.sample(n, torch",
          "test_adaptive.py::test_options_become_an_adaptation_and_the_prior_is_fitted_beside"),
    Fault("strategies that do not share their noise", "adaptive.py",
          "noise, own = normal() if noise is None else noise, normal()",
          "noise, own = normal() if noise is None else noise, "
          "torch.zeros_like(x_hat) if adaptation is None else normal()",
          "test_adaptive.py::test_strategies_share_codes_and_noise"),
    # joint training
    Fault("timestep's weight left out of the gradient", "joint.py",
          "weight[:, None, None, None] * grad_x, weight[:, None] * grad_z", "grad_x, grad_z",
          "test_joint.py::test_the_weight_of_timesteps_in_the_vaes_gradient_is_not_the_unets"),
    Fault("λ scales nothing", "joint.py", "return strength * grad_x, strength * grad_z", "return grad_x, grad_z",
          "test_joint.py::test_the_vae_gets_the_elbo_and_lambda_times_the_diffusion_loss"
          "_and_the_unet_the_latter_alone"),
    Fault("a gradient passes where none should", "joint.py", 'if self.gradient_to == "none":', "if False:",
          "test_joint.py::test_without_the_gradient_both_parts_are_trained_as_in_two_stages"),
    Fault("annealing counts steps", "joint.py", "self.images_seen += n *", "self.images_seen += 1 *",
          "test_joint.py::test_annealing_counts_images_and_reaches_its_value"),
    Fault("bound without the number of steps", "diffusion.py", "len(alphas_cumprod) / 2 * gain", "gain / 2",
          "test_joint.py::test_the_bound_weighs_an_error_by_the_kl_of_the_posteriors_times_the_number_of_steps"),
    Fault("one bad point is a collapse", "joint.py", "history[POINTS // 5:][-2:]", "history[POINTS // 5:][-1:] * 2",
          "test_joint.py::test_a_collapse_is_two_bad_points_in_a_row_after_the_first_fifth"),
    Fault("a collapse goes on", "training.py", "            stopped = model.stop_reason(run.history)\n", "",
          "test_joint.py::test_training_stops_where_the_code_collapses_says_why_and_does_not_go_on"),
    # U-Net and DiffuseVAE
    Fault("latent code ignored", "unet.py", "embedding + self.z_mlp(z)", "embedding + 0 * self.z_mlp(z)",
          "test_diffusevae.py::test_the_code_guides_where_it_is_asked_to_and_nowhere_else"),
    Fault("condition not concatenated", "unet.py", "torch.cat([x, cond], dim=1)", "torch.cat([x, x], dim=1)",
          "test_diffusevae.py::test_another_coarse_image_gives_another_refinement"),
    Fault("attention one level off", "unet.py", "[size in attention for size in sizes]",
          "[2 * size in attention for size in sizes]",
          "test_unet.py::test_attention_is_at_the_named_resolutions_and_nowhere_else"),
    Fault("forms converted with the wrong sign", "diffusevae.py", "(-1 if model.form == 1 else 1)",
          "(1 if model.form == 1 else -1)",
          "test_diffusevae.py::test_converted_weights_give_the_same_samples_in_the_other_form"),
    Fault("x̂ decoded from the mean", "diffusevae.py", "draws.randn(*mu.shape))", "0 * draws.randn(*mu.shape))",
          "test_diffusevae.py::test_the_condition_is_drawn_and_not_the_mean"),
    Fault("VAE trained", "diffusevae.py", ".requires_grad_(False).eval()", ".eval()",
          "test_diffusevae.py::test_the_vae_is_in_the_checkpoint_but_in_neither_average_nor_optimiser"),
    Fault("VAE in training mode", "diffusevae.py", "        self.vae.eval()\n", "",
          "test_diffusevae.py::test_the_vae_stays_frozen_and_in_evaluation_mode"),
    Fault("conditions never dropped", "diffusevae.py", "if self.cond_dropout:\n", "if False:\n",
          "test_diffusevae.py::test_the_named_share_of_images_is_trained_on_without_condition_code_and_shift"),
    Fault("code kept where the condition is dropped", "diffusevae.py", "kept[:, None] * z\n", "z\n",
          "test_diffusevae.py::test_the_named_share_of_images_is_trained_on_without_condition_code_and_shift"),
    Fault("unconditional prediction of form 2 with the shift", "diffusevae.py",
          "unconditional(x_t - x_hat if model.form == 2 else x_t, t)", "unconditional(x_t, t)",
          "test_diffusevae.py::test_guidance_of_weight_zero_is_the_model_without_any_condition"),
    Fault("guidance adds the whole prediction", "diffusevae.py", "weight * (conditional(x_t, t) - alone)",
          "weight * conditional(x_t, t)",
          "test_diffusevae.py::test_a_guided_prediction_moves_on_a_line_with_the_weight"),
    Fault("given prior ignored", "diffusevae.py", "(prior or self.vae.prior).sample(", "self.vae.prior.sample(",
          "test_diffusevae.py::test_a_prior_that_is_given_replaces_the_models_own"),
    Fault("robustness draws all noise from one generator", "diffusevae.py", "_with_noise(z, level, other)",
          "_with_noise(z, level, draws)", "test_diffusevae.py::test_robustness_starts_both_rows_at_the_same_distance"),
    # priors
    Fault("mixture without the covariances' determinant", "priors.py", "self.weights.log() - log_det",
          "self.weights.log()", "test_priors.py::test_log_densities_are_those_of_torch_distributions"),
    Fault("mixture drawn from its precision", "priors.py", "@ noise)[:, :, 0]", ".mT @ noise)[:, :, 0]",
          "test_priors.py::test_samples_have_the_mean_and_covariance_of_the_distribution"),
    Fault("components drawn evenly", "priors.py", "which, noise = choose(self.weights, n",
          "which, noise = choose(torch.ones_like(self.weights), n",
          "test_priors.py::test_components_are_drawn_as_often_as_their_weights_say"),
    Fault("codes without their deviation", "vae.py",
          "codes.append(reparameterize(mu, logvar, draws.randn(*mu.shape)).cpu())", "codes.append(mu.cpu())",
          "test_priors.py::test_codes_are_draws_from_the_posterior_of_the_first_images"),
    Fault("a spatial code made by a linear layer", "vae.py", "if shape.z_channels:\n            layers = [",
          "if False:\n            layers = [",
          "test_vae.py::test_one_place_of_a_code_moves_the_pixels_around_it_and_no_others"),
    # bench
    Fault("every round begins with the same call", "bench.py", "names[first:] + names[:first]", "names",
          "test_bench.py::test_calls_take_turns_and_each_round_begins_with_another"),
    Fault("a compared training step does not clip", "training.py",
          "torch.nn.utils.clip_grad_norm_(parameters, clip)", "torch.zeros(())",
          "test_bench.py::test_a_training_call_is_the_step_of_the_diffusion_loss_with_clipping"),
    Fault("times are per batch", "bench.py", "(s / batch for s in timings[key].quartiles())",
          "timings[key].quartiles()", "test_bench.py::test_times_are_per_image_and_shared_by_the_same_computation"),
    # runs and campaign
    Fault("guided evaluations counted once", "core.py", "steps * (1 + (guidance_weight not in (0, 1)))", "steps",
          "test_runs.py::test_nfe_counts_the_networks_evaluations"),
    Fault("options of an evaluation forgotten in its identity", "entries.py", "for k in OPTIONS if k in evaluation",
          "for k in OPTIONS[:3] if k in evaluation", "test_runs.py::test_missing_names_what_a_record_lacks"),
    Fault("what is measured is not kept", "runs.py", "self.evaluations.append(evaluation)\n        self.save()",
          "self.evaluations.append(evaluation)",
          "test_runs.py::test_a_run_stopped_at_every_moment_in_turn_ends_as_if_it_had_not_been"),
    Fault("measurements of other weights taken over", "runs.py",
          "if known and {key: known[key] for key in self.keys} == self.keys:", "if known:",
          "test_runs.py::test_measurements_of_other_weights_are_not_taken_over"),
    Fault("a shipped network of another config measures", "runs.py",
          "return network if config(network) == config(build_model(source.model)) else None", "return network",
          "test_runs.py::test_a_feature_network_of_another_config_or_name_is_trained"),
    Fault("other weights in the hybrid than in its record", "runs.py",
          "getattr(model, attribute).load_state_dict(part.state_dict())", "pass",
          "test_runs.py::test_weights_are_beside_the_record_and_hold_the_network_it_depends_on"),
    Fault("a record measured in half precision", "runs.py", "with eager():  # in full precision",
          "with eager(), autocast(device):",
          "test_runs.py::test_a_record_is_measured_in_full_precision_and_nothing_of_it_is_compiled"),
    Fault("kept images of an evaluation are drawn again", "runs.py", "if file and file.exists():", "if False:",
          "test_runs.py::test_an_evaluation_that_was_killed_goes_on_with_the_images_it_has"),
    Fault("other weights measured than are kept in half precision", "runs.py", "v.half().to(v.dtype) if", "v if",
          "test_runs.py::test_weights_in_half_precision_are_what_is_kept_and_measured"),
    Fault("no checkpoint between the tenths of a slow run", "training.py", "run.saved > CHECKPOINT_SECONDS",
          "run.saved > 1e9", "test_training.py::test_a_slow_run_leaves_a_checkpoint_every_few_minutes"),
    Fault("whitening without its scale", "features.py", "(directions / (variance + 5e-4).sqrt()).T", "directions.T",
          "test_features.py::test_whitened_patches_are_uncorrelated_and_equally_strong"),
    Fault("the mixture's covariances not about their means", "priors.py",
          "(share[:, None] * (x - mean)).T @ (x - mean)", "(share[:, None] * x).T @ x",
          "test_priors.py::test_the_fit_is_scikit_learns"),
    Fault("exported weights without their prior", "cli.py", "getattr(model, \"vae\", model).use_prior(fitted)", "pass",
          "test_cli.py::test_exported_weights_hold_their_prior_and_need_no_images"),
    Fault("the U-Net's middle does not attend", "unet.py", "middle or attends[-1]", "attends[-1]",
          "test_unet.py::test_the_middle_attends_where_it_is_asked_to"),
    Fault("a failing entry ends the campaign", "campaign.py", "flush=True)\n            continue",
          "flush=True)\n            break",
          "test_campaign.py::test_entries_that_fail_do_not_hold_up_the_others_and_are_reported"),
    Fault("late rows with the others", "experiments.py", "else 2 if row.late else", "else",
          "test_experiments.py::test_at_cpu_size_the_main_entries_come_first_then_the_other_seeds_then_form_2"),
    Fault("a part of the preset replaced, not changed", "experiments.py", "return before | value if part else value",
          "return value", "test_experiments.py::test_a_row_takes_from_its_parent_what_it_leaves_open"),
    Fault("40.0 another number than 40", "experiments.py", 'part["kimg"] = int(part["kimg"])', "pass",
          "test_experiments.py::test_a_whole_number_of_thousand_images_may_be_written_as_a_float"),
    Fault("a study of fewer images counts", "entries.py",
          "            elif studied_with(record, name) != self.studied(name):", "            elif False:",
          "test_runs.py::test_a_study_with_another_number_of_images_or_steps_is_missing_and_done_again"),
    Fault("unknown options skipped in silence", "entries.py", "        if option not in OPTIONS:", "        if False:",
          "test_runs.py::test_an_evaluation_with_an_option_that_no_model_knows_is_refused"),
    Fault("a record of another config called not trained", "campaign.py", 'return "not trained" if record is None else',
          'return "not trained" if True else', "test_campaign.py::test_every_state_of_an_entry_has_its_words"),
    Fault("the dry run changes more than it says", "campaign.py", "if isinstance(value, (list, tuple)) else value",
          "if isinstance(value, (list, tuple)) else 2 if value == 4 else value",
          "test_campaign.py::test_a_dry_run_changes_the_sizes_in_its_list_and_nothing_else"),
    # draws, precision, content
    Fault("images of a batch share a generator", "core.py", 'return Draws(seed, "image", range(start, stop))',
          'return Draws(seed, "image", (start,))',
          "test_draws.py::test_an_image_is_the_same_whatever_is_drawn_with_it"),
    Fault("every batch begins at the first image", "runs.py", "source = image_draws(seed, start, start + batch)",
          "source = image_draws(seed, 0, batch)",
          "test_draws.py::test_an_evaluation_looks_at_the_same_images_in_any_batch"),
    Fault("groups share the first images' noise", "adaptive.py", "generator.part(rows.tolist())",
          "generator.part(range(len(rows)))",
          "test_draws.py::test_an_image_is_the_same_whatever_is_drawn_with_it"),
    Fault("the environment overrules the config", "training.py", 'if precision == "auto" else precision\n    return',
          'if True else precision\n    return',
          "test_precision.py::test_the_config_decides_then_the_environment_then_the_hardware"),
    Fault("Accelerate's environment is heard", "training.py", "hidden = {k: os.environ.pop(k)",
          "hidden = {k: os.environ[k]", "test_precision.py::test_accelerates_environment_changes_nothing"),
    Fault("other images are not noticed", "training.py",
          "if any(stored.get(key, value) != value for key, value in images.items()):", "if False:",
          "test_precision.py::test_training_does_not_go_on_with_other_images"),
    Fault("finished entries of other images are taken", "training.py",
          "if any(stored.get(key, value) != value for key, value in images.items()):", "if False:",
          "test_precision.py::test_an_entry_trained_on_other_images_is_not_taken_for_this_one"),
    Fault("a finished training is written again", "custom.py", 'if "weights_hash" in known and', "if False and",
          "test_precision.py::test_a_finished_training_stays_as_it_is"),
    Fault("damaged weights are opened", "core.py", "        if damaged:\n", "        if False:\n",
          "test_precision.py::test_damaged_weights_get_a_sentence_and_no_file"),
    Fault("black images of numbers that are none", "core.py", "if not torch.isfinite(x).all():", "if False:",
          "test_precision.py::test_images_that_are_not_finite_are_refused_wherever_they_come_from"),
    Fault("compiled without a compiler", "training.py", "return wanted and compiler_works(device.type)",
          "return wanted",
          "test_precision.py::test_long_work_is_compiled_short_work_is_not_and_a_switch_decides_otherwise"),
    # training
    Fault("averaged weights not saved", "training.py", "with average.applied():\n            save_model",
          "with contextlib.nullcontext():\n            save_model",
          "test_training.py::test_the_saved_model_has_the_averaged_weights"),
    Fault("average not restored", "training.py",
          '(average.source[name].data if kind == "weight" else average.values[name]).copy_(value)',
          "average.source[name].data.copy_(value) if kind == 'weight' else None", KILLED),
    Fault("moments restored in another memory layout", "training.py",
          "torch.empty_like(layout, device=p.device).copy_(value)", "value.to(p.device)", KILLED),
    Fault("dropout not seeded anew", "training.py",
          'torch.manual_seed(derive_seed("global", self.seed, step, self.accelerator.process_index))', "pass", KILLED),
    Fault("learning rate without its schedule", "training.py", '["lr"] = self.config.lr_at(step)',
          '["lr"] = self.config.lr',
          "test_training.py::test_the_learning_rate_warms_up_and_decays_and_is_what_the_optimiser_uses"),
    Fault("bad losses let through", "training.py", "if not all(map(math.isfinite, losses.values())):", "if False:",
          "test_training.py::test_a_loss_that_is_not_finite_names_step_terms_and_the_last_good_checkpoint"),
    Fault("every process draws for the first slices", "training.py",
          "reshape(world, -1)[self.accelerator.process_index]", "reshape(world, -1)[0]",
          "test_training.py::test_two_processes_end_with_the_weights_of_one"),
    Fault("images measured again when a run goes on", "training.py", "    else:\n        model.prepare(data)",
          "    model.prepare(data)",
          "test_runs.py::test_what_was_measured_before_training_is_in_the_checkpoint_and_is_not_measured_again"),
    Fault("what was measured before training not restored", "training.py", "            buffers[name].copy_(value)",
          "            pass",
          "test_runs.py::test_what_was_measured_before_training_is_in_the_checkpoint_and_is_not_measured_again"),
    # draws, pixels, files, data
    Fault("noise the same in every slice", "core.py", "derive_seed(seed, step, s))", "derive_seed(seed, step))",
          "test_core.py::test_draws_depend_on_seed_step_and_slice_and_on_nothing_else"),
    Fault("pixels truncated", "core.py", ".mul(127.5).round()", ".mul(127.5)",
          "test_core.py::test_pixels_are_rounded_to_the_nearest_byte_and_clipped"),
    Fault("half-written files left", "core.py", "            shutil.rmtree(tmp, ignore_errors=True)",
          "            pass",
          "test_core.py::test_an_interrupted_write_leaves_the_old_file_and_nothing_else"),
    Fault("data in the same order in every epoch", "data.py", 'derive_seed("order", self.seed, epoch)',
          'derive_seed("order", self.seed)',
          "test_data.py::test_each_epoch_is_a_new_permutation"),
    Fault("flips upside down", "data.py", "x.flip(-1)", "x.flip(-2)",
          "test_data.py::test_flipped_images_are_exact_mirror_images_and_half_of_all"),
    # likelihood
    Fault("bins closed at the ends of the range", "vae.py",
          "torch.where(level >= 255, math.inf, ((level + 0.5) / 127.5 - 1 - mean) / sigma)",
          "((level + 0.5) / 127.5 - 1 - mean) / sigma",
          "test_vae.py::test_the_masses_of_all_levels_sum_to_one_and_are_differences_of_the_distribution_function"),
    Fault("the bound's weights for uniform timesteps", "diffusion.py", "1 / (k * share[t])",
          "len(share) / k * np.ones(t.shape)",
          "test_diffusion.py::test_the_weighted_sum_over_a_few_timesteps_is_on_average_the_sum_over_all"),
    Fault("the KL between variances left out of the bound", "diffusion.py",
          "0.5 * size * float((ratio - 1 - np.log(ratio)).sum())", "0.0",
          "test_diffusion.py::test_for_normal_pixels_the_large_variance_gives_the_entropy_between_first_and_last_step"),
    Fault("the hybrid's bound in form 2 without its shift", "diffusevae.py", "x, draws, timesteps, self.shift(x_hat))",
          "x, draws, timesteps)",
          "test_diffusevae.py::test_converted_weights_give_the_same_bound_in_the_other_form"),
    # metrics
    Fault("texture distance without the reference's units", "metrics.py",
          "    return x.double() / deviation, reference.double() / deviation",
          "    return x.double(), reference.double()",
          "test_metrics.py::test_the_texture_distance_has_the_units_of_the_reference"),
    Fault("texture of the finest level alone", "metrics.py", "        x = (a + b + c + d) / 4  # the mean",
          "        x = x  # the mean", "test_metrics.py::test_the_wavelet_energies_are_those_of_haar_filters"),
    Fault("FD alone: a generator without texture passes", "metrics.py",
          '"texture distance": (texture_distance, "texture")}', '"texture distance": (frechet_distance, "features")}',
          "test_metrics.py::test_a_comparison_says_what_was_compared_with_what"),
    Fault("bootstrap without replacement", "metrics.py",
          "part = x[torch.randint(len(x), (len(x),), generator=generator)]",
          "part = x[torch.randperm(len(x), generator=generator)]",
          "test_metrics.py::test_the_bootstraps_distances_are_frechet_distances"),
    Fault("pairs by place and not by seed", "metrics.py", "seeds = sorted(a.keys() & b.keys())", "seeds = sorted(a)",
          "test_metrics.py::test_only_common_seeds_are_compared_and_fewer_than_three_claim_nothing"),
    Fault("a family without its correction", "metrics.py", 'method="holm")[1]', 'method="holm")[1] / len(results)',
          "test_metrics.py::test_a_family_is_corrected_by_holm"),
    Fault("equality claimed from one side alone", "metrics.py", "float(max(-inner.low, inner.high))",
          "float(inner.high)", "test_metrics.py::test_a_paired_difference_is_students"),
    Fault("a path length of its longest paths", "metrics.py", "squares[cut:len(squares) - cut]", "squares[cut:]",
          "test_metrics.py::test_the_path_length_of_a_linear_generator_is_known"),
    Fault("floor of another n", "records.py", "floors.get(str(n), {})", "next(iter(floors.values()), {})",
          "test_runs.py::test_the_floor_is_that_of_the_same_n"),
    Fault("evaluations without today's metrics count", "runs.py", "if not outdated({\"evaluations\": [e]})]",
          "if True]", "test_runs.py::test_evaluations_without_todays_metrics_are_made_again"),
    Fault("Fréchet distance between the same set", "metrics.py", "metric.update(features.double(), real=False)",
          "metric.update(reference.double(), real=False)",
          "test_metrics.py::test_the_distance_is_that_of_torch_fidelity_on_the_same_features"),
    # quantisation
    Fault("one scale for all channels", "core.py",
          "scale = weight.flatten(1).abs().amax(dim=1).clamp(min=1e-12)",
          "scale = weight.abs().max().expand(len(weight)).clamp(min=1e-12)",
          "test_quantization.py::test_each_channel_uses_all_of_its_bytes"),
    Fault("bytes cut off without rounding", "quantization.py", "(zero + 0.5)", "zero",
          "test_quantization.py::test_bytes_cover_a_range_and_hold_zero_exactly"),
    Fault("ranges of the last timestep only", "quantization.py",
          "int8_state(layer, *byte_range(min(low), max(high)))",
          "int8_state(layer, *byte_range(low[-1], high[-1]))",
          "test_quantization.py::test_the_variants_differ_only_in_their_ranges"),
    Fault("int8 layers fall back to float", "quantization.py", "if self.packed is not None and x.device",
          "if False and x.device",
          "test_quantization.py::test_every_quantised_layer_runs_in_a_kernel_for_int8"),
    Fault("a copy shares the weights of its original", "quantization.py",
          "        self.number = next(_NUMBERS)  # a copy is a layer of its own\n",
          "        self.number = next(_NUMBERS) - 1\n",
          "test_quantization.py::test_a_copy_of_a_layer_is_a_layer_of_its_own"),
    Fault("halves of a byte swapped", "core.py", "packed[name] = levels[:, ::2] + 16 * levels[:, 1::2]",
          "packed[name] = 16 * levels[:, ::2] + levels[:, 1::2]",
          "test_core.py::test_int4_stores_two_weights_a_byte_with_a_scale_for_each_group"),
    Fault("every process draws all batches", "runs.py", "range(0, n, batch)[processes.rank::processes.size]",
          "range(0, n, batch)", "test_runs.py::test_two_processes_train_measure_and_record_as_one"),
    Fault("what another process has in hand is given up", "campaign.py", "                busy.append(entry)\n", "",
          "test_campaign.py::test_what_another_process_has_in_hand_is_taken_up_when_it_is_free"),
    Fault("the size of a network is not compared with its file", "core.py", "if numbers > 2 * stored + 100_000:",
          "if False:",
          "test_fuzz.py::test_a_config_of_another_size_than_its_file_is_refused_before_memory_is_asked_for"),
    Fault("difficult scenes are as rich in contrast as easy ones", "data.py", "(1 - 0.6 * f[\"difficulty\"]",
          "(1 - 0.0 * f[\"difficulty\"]",
          "test_data.py::test_hard_scenes_have_a_smaller_object_less_contrast_and_more_grain"),
    # what a user may do by mistake
    Fault("a folder that two processes have at once", "core.py", "        lock.acquire()\n", "",
          "test_core.py::test_a_folder_in_use_is_refused_until_its_process_ends_however_it_ends"),
    Fault("sizes of a config that are not looked at", "core.py", "elif key in SIZES and value is not None and not (",
          "elif False and not (",
          "test_core.py::test_a_config_edited_by_hand_gets_one_sentence"),
    Fault("numbers that are not finite go through", "cli.py",
          "isinstance(value, float) and not math.isfinite(value)", "False",
          "test_cli.py::test_numbers_that_cannot_be_are_refused_before_any_work"),
    Fault("a class score of few images", "metrics.py", "return min(SCORE_PARTS, n // SCORE_PART)",
          "return min(SCORE_PARTS, max(1, n // SCORE_PART))",
          "test_metrics.py::test_a_class_score_belongs_to_its_parts_and_few_images_have_none"),
    Fault("codes of any size are fitted", "priors.py",
          "not torch.isfinite(codes).all() or codes.abs().max() > LARGEST_CODE", "not torch.isfinite(codes).all()",
          "test_priors.py::test_codes_that_cannot_be_fitted_get_one_sentence_for_every_prior"),
    Fault("a code that says nothing is passed over", "generators.py", "if said < LEAST_INFORMATION:", "if False:",
          "test_cli.py::test_a_code_that_says_nothing_is_named_where_it_is_trained_given_and_followed"),
    Fault("a refiner that ignores x̂ is passed over", "generators.py", "if effect < LEAST_EFFECT:", "if False:",
          "test_cli.py::test_a_refiner_that_ignores_what_it_is_given_is_named"),
]


def copy(folder):
    "The package and its tests, in a folder of their own."
    for name in COPIED:
        source, target = ROOT / name, Path(folder) / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, target)
    return Path(folder)


def run(folder, tests):
    "pytest's exit status, and the end of what it said. The folder comes before any installed package on the path."
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "--tb=line", "-p", "no:cacheprovider"]
    command += [f"tests/{test}" for test in tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, (done.stdout + done.stderr)[-2000:]


def plant(fault):
    "What became of the fault: 'caught', or what is wrong with the test or the fault."
    with tempfile.TemporaryDirectory() as folder:
        path = copy(folder) / "hybridvae" / fault.module
        text = path.read_text()
        if text.count(fault.old) != 1:
            return f"the old text occurs {text.count(fault.old)} times in {fault.module}"
        path.write_text(text.replace(fault.old, fault.new))
        status, output = run(folder, [fault.test])
    if status == 1:
        return "caught"
    return "SURVIVED" if status == 0 else f"pytest ended with status {status}: {output}"


def main():
    begun = time.monotonic()
    chosen = [f for f in FAULTS if not sys.argv[1:] or any(word in f.name for word in sys.argv[1:])]
    if not chosen:
        sys.exit(f"No fault has one of these in its name: {', '.join(sys.argv[1:])}. Give words of names in FAULTS.")
    with tempfile.TemporaryDirectory() as folder:
        status, output = run(copy(folder), sorted({f.test for f in chosen}))
    if status:
        sys.exit(f"The tests are not green to begin with (pytest ended with status {status}):\n{output}")
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        results = list(pool.map(plant, chosen))
    for fault, result in zip(chosen, results):
        print(f"{result:10}  {fault.name:48}  {fault.test}")
    caught = results.count("caught")
    print(f"{caught} of {len(chosen)} planted faults were caught, in {time.monotonic() - begun:.0f} seconds.")
    sys.exit(caught < len(chosen))


if __name__ == "__main__":
    main()
