"""
Do the tests find the faults that code like this has had? Each fault is planted in a copy of the
project, and one test must then fail. `thread` is a GitHub thread in which others report the fault.

    python -m pytest tests/mutations.py
"""
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

from conftest import ROOT


class Fault(NamedTuple):
    what: str
    thread: str
    file: str
    right: str      # occurs once in the file
    wrong: str      # replaces it
    test: str


FAULTS = [
    Fault("α is not divided by r", "rasbt/LLMs-from-scratch #821",
          "lora.py", "return self.alpha / self.rank", "return self.alpha",
          "test_lora.py::test_forward_and_gradients_match_the_closed_forms"),
    Fault("A is initialised with zeros and B randomly", "-",
          "lora.py", "nn.init.kaiming_uniform_(self.A,",
          "nn.init.zeros_(self.A); nn.init.kaiming_uniform_(self.B,",
          "test_lora.py::test_training_starts_at_the_base_model_and_first_changes_one_tensor"),
    Fault("a layer does not freeze its base", "-",
          "lora.py", "self.base = base.requires_grad_(False)", "self.base = base",
          "test_lora.py::test_a_layer_without_inject_trains_only_its_own_tensors"),
    Fault("the LayerNorms are trained too", "pytorch/torchtitan #3438",
          "lora.py", "    model.requires_grad_(False)\n",
          "    [p.requires_grad_('ln_' in name) for name, p in model.named_parameters()]\n",
          "test_lora.py::test_training_changes_only_the_adapter"),
    Fault("the state dict of a merged model contains W + ΔW", "-",
          "lora.py", "self.W_merged = self.weight",
          "self.base.weight.data = self.W_merged = self.weight",
          "test_lora.py::test_the_state_dict_of_a_merged_model_contains_the_base_weights"),
    Fault("a strict load leaves a model merged with the old weights", "-",
          "lora.py", "self.register_load_state_dict_post_hook(LoRALinear.unmerge)", "pass",
          "test_lora.py::test_the_state_dict_of_a_merged_model_contains_the_base_weights"),
    Fault("a partly merged model trains without a warning", "-",
          "lora.py", "if self.training and torch.is_grad_enabled():", "if False:",
          "test_lora.py::test_a_merged_layer_does_not_train"),
    Fault("a weight that a hook computes again is merged", "-",
          "lora.py", 'if not {"weight", "bias"} <= base._parameters.keys():', "if False:",
          "test_lora.py::test_a_linear_whose_weight_is_computed_is_refused"),
    Fault("the weight that other modules read lacks ΔW", "-",
          "lora.py", "return (W.to(self.A.dtype) + self.delta_weight()).to(W.dtype)", "return W",
          "test_lora.py::test_a_model_that_reads_the_weight_of_a_layer_gets_the_adapted_one"),
    Fault("ΔW is rounded to bfloat16 before it is added", "huggingface/peft #2502",
          "lora.py", "W.to(self.A.dtype) + self.delta_weight()",
          "W + self.delta_weight().to(W.dtype)",
          "test_lora.py::test_merge_and_unmerge"),
    Fault("all rows have the same dropout mask", "-",
          "lora.py", "self.dropout(x)", "x * self.dropout(torch.ones_like(x[:1]))",
          "test_lora.py::test_dropout_acts_on_each_element_and_only_on_the_adapter"),
    Fault("an adapter that is loaded while the old one is disabled is discarded", "-",
          "lora.py", "        if not adapters(model):\n", "        if True:\n",
          "test_adapter_state.py::test_an_adapter_that_is_loaded_while_disabled_stays"),
    Fault("tensors that do not fit are ignored when an adapter is loaded", "huggingface/peft #2699",
          "support/adapter_state.py", "if shapes != saved:", "if False:",
          "test_adapter_state.py::test_a_failed_load_changes_nothing"),
    Fault("a failed load removes the adapters that were there", "-",
          "support/adapter_state.py", "with lora.disabled(inner):",
          "lora.remove(inner)\n    if True:",
          "test_adapter_state.py::test_a_failed_load_changes_nothing"),
    Fault("loading replaces the Parameters that an optimizer has", "-",
          "support/adapter_state.py", "keep_parameters(old[name], new[name])", "pass",
          "test_adapter_state.py::test_loading_other_settings_keeps_the_parameters_that_fit"),
    Fault("the saved scale is ignored when an adapter is loaded", "-",
          "support/adapter_state.py", "if scale.shape != here.shape or not", "if False and not",
          "test_adapter_state.py::test_a_loaded_layer_has_the_saved_scale"),
    Fault("the names in a compiled or parallel model differ", "-",
          "support/adapter_state.py", "while hasattr(", "while False and hasattr(",
          "test_adapter_state.py::test_a_wrapped_model_has_the_same_state"),
    Fault("only A, B, s and β of a user's layer are saved", "-",
          "support/adapter_state.py", "m.state_dict(keep_vars=True)",
          "dict(m.named_parameters(recurse=False))",
          "test_adapter_state.py::test_a_subclass_keeps_its_other_parameters_and_buffers"),
    Fault("the fingerprint of the base includes the adapters", "microsoft/LoRA #190",
          "support/adapter_state.py", "with lora.disabled(model):", "if True:",
          "test_adapter_state.py::test_a_fingerprint_identifies_the_base_model"),
    Fault("adapters are combined without their scales", "-",
          "support/adapter_state.py", 'w * state["scale"][name] * ', "w * ",
          "test_adapter_state.py::test_the_combination_is_the_weighted_sum_of_the_updates"),
    Fault("a combination is saved with another scale than its tensors have", "-",
          "support/adapter_state.py", "torch.tensor(1 / len(A), ", "torch.tensor(1.0, ",
          "test_adapter_state.py::test_the_combination_is_the_weighted_sum_of_the_updates"),
    Fault("MultiLoRA has no dropout", "-",
          "multilora.py", "super().__init__(base, rank, dropout=dropout)",
          "super().__init__(base, rank)",
          "test_lora.py::test_every_method_has_dropout"),
    Fault("the factors are repeated in the order of interleaved blocks", "-",
          "multilora.py", "repeat_interleave(self.block_rank, dim=-1)", "tile(self.block_rank)",
          "test_multilora.py::test_forward_and_gradients_match_n_modules"),
    Fault("B and s start at zero, so that nothing is ever trained", "-",
          "multilora.py", "nn.init.kaiming_uniform_(Bi, a=math.sqrt(5))", "nn.init.zeros_(Bi)",
          "test_multilora.py::test_the_first_step_changes_only_s_and_the_second_everything"),
    Fault("the search has no dropout", "-",
          "autolora.py", "super().__init__(base, rank, alpha, dropout)",
          "super().__init__(base, rank, alpha)",
          "test_autolora.py::test_every_pass_has_the_same_dropout_masks"),
    Fault("the softmax is taken over the matrices", "-",
          "autolora.py", "beta.softmax(-1)", "beta.softmax(0)",
          "test_autolora.py::test_stacked_selections_are_those_of_each_matrix"),
    Fault("the threshold keeps candidates that are clearly below 1/k", "-",
          "autolora.py", "(1 - 1e-6)", "(1 - 1e-2)",
          "test_autolora.py::test_the_threshold_tolerates_only_rounding"),
    Fault("ε comes from another gradient", "-",
          "autolora.py", "get_total_norm(v)", "get_total_norm(g_beta)",
          "test_autolora.py::test_each_pass_is_at_its_own_point"),
    Fault("/ 2 * ε in place of / (2ε)", "khanrc/pt.darts #43",
          "autolora.py", ") / width", ") / 2 * eps",
          "test_autolora.py::test_the_finite_differences_approximate_the_exact_second_term"),
    Fault("the second term is computed at ω' in place of ω", "-",
          "autolora.py", "        second = mixed_product(",
          "        with moved(omega, -eta, g): second = mixed_product(",
          "test_autolora.py::test_exact_is_the_derivative_through_the_step"),
    Fault("the threshold is applied to β", "-",
          "autolora.py", "above_threshold(selection(m.beta.detach(), m.gate))",
          "above_threshold(m.beta.detach() / m.beta.detach().sum())",
          "test_autolora.py::test_the_threshold_applies_to_the_selection_of_the_forward_pass"),
    Fault("A and B learn from the validation rows", "-",
          "autolora.py", "[*g, *", "[*v, *",
          "test_autolora.py::"
          "test_omega_learns_only_from_training_rows_and_beta_from_validation_rows"),
    Fault("the look-ahead is not undone", "leopard-ai/betty #13",
          "autolora.py", "w.data = w0\n", "pass\n",
          "test_autolora.py::test_the_look_ahead_leaves_the_tensors_unchanged"),
    Fault("padding counts in the loss", "axolotl-ai-cloud/axolotl #2227",
          "support/data.py", "np.full((len(rows), T), -100)", "np.zeros((len(rows), T), np.int64)",
          "test_data.py::test_collate_counts_the_completion_and_pads_to_the_longest_row"),
    Fault("the prompt counts in the loss", "karpathy/nanochat #582",
          "support/data.py", "targets[b, prompt_len - 1:len(ids) - 1] = ids[prompt_len:]",
          "targets[b, :len(ids) - 1] = ids[1:]",
          "test_data.py::test_collate_counts_the_completion_and_pads_to_the_longest_row"),
    Fault("tokens see the next one", "facebookresearch/xformers #103",
          "model.py", "is_causal=", "is_causal=False and ",
          "test_model.py::test_no_token_sees_the_next"),
    Fault("φ is divided by the larger of i and j", "-",
          "analyze.py", "torch.minimum(i[:, None]", "torch.maximum(i[:, None]",
          "test_analyze.py::test_subspace_similarity_is_the_formula"),
    Fault("singular values that are rounding errors count", "-",
          "analyze.py", "rank = int((S > tolerance).sum())", "rank = len(S)",
          "test_analyze.py::"
          "test_equal_deltas_have_equal_records_and_nulls_however_they_are_factored"),
    Fault("only neighbouring blocks are compared", "-",
          "analyze.py", "itertools.combinations(blocks, 2)", "zip(blocks, blocks[1:])",
          "test_analyze.py::test_more_than_two_blocks_are_compared_pairwise"),
    Fault("φ(i, j) is drawn as φ(j, i)", "-",
          "support/report.py", "phi.T.cpu()", "phi.cpu()",
          "test_analyze.py::test_maps_have_the_directions_of_the_first_checkpoint_to_the_right"),
    Fault("transposed factors are analysed", "-",
          "support/interop.py", "if len(A) > A.size(1) == len(B):", "if False:",
          "test_interop.py::test_transposed_factors_are_refused"),
    Fault("two runs write one checkpoint", "-",
          "support/checkpoint.py", "fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
          "test_checkpoint.py"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.what} ({f.thread})")
def test_a_fault_is_found(fault, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
    text = (copy / fault.file).read_text()
    assert text.count(fault.right) == 1, f"{fault.file} has changed: update this fault"
    (copy / fault.file).write_text(text.replace(fault.right, fault.wrong))
    argv = [sys.executable, "-m", "pytest", "-q", f"tests/{fault.test}"]
    run = subprocess.run(argv, cwd=copy, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout              # 1: the test ran and failed
    assert " failed" in run.stdout
