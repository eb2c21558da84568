"""
Do the tests find the faults that code like this has had? Each is made in a copy, where a named test must then fail:

    python -m pytest tests/mutations.py
"""
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

FAULTS = {
    "α/r is forgotten":
        ("lora.py", "return self.B * self.scale(), self.A", "return self.B, self.A",
         "test_lora.py::test_forward_and_gradients_are_the_closed_forms"),
    "A starts at zero and B random":
        ("lora.py", "nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))\n        nn.init.zeros_(self.B)",
         "nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))\n        nn.init.zeros_(self.A)",
         "test_lora.py::test_at_the_first_step_only_b_has_a_gradient"),
    "LayerNorms are trained too":
        ("lora.py", "    model.requires_grad_(False)", "    [p.requires_grad_('ln' in n) for n, p in model.named_parameters()]",
         "test_lora.py::test_training_moves_the_adapter_and_nothing_else"),
    "merging twice adds ΔW twice":
        ("lora.py", "        if self.kept is None:", "        if True:", "test_lora.py::test_merge_and_unmerge"),
    "one dropout mask for all rows":
        ("lora.py", "self.dropout(flat)", "flat * self.dropout(torch.ones_like(flat[:1]))",
         "test_lora.py::test_dropout_is_drawn_for_every_element_of_the_adapter_path_only"),
    "an adapter is loaded on top of a merged one":
        ("lora.py", "        m.unmerge()\n        model.set_submodule", "        model.set_submodule",
         "test_lora.py::test_switching_tasks_in_place"),
    "a checkpoint written while merged knows another base":
        ("lora.py", "        if m.kept is not None:\n            weights", "        if False:\n            weights",
         "test_lora.py::test_fingerprint"),
    "blocks are interleaved":
        ("multilora.py", "repeat_interleave(self.rank // self.n_blocks, dim=-1)", "repeat(self.rank // self.n_blocks)",
         "test_multilora.py::test_forward_and_gradients_are_those_of_n_modules"),
    "B and s both start at zero, so nothing ever moves":
        ("multilora.py", "nn.init.kaiming_uniform_(Bi, a=5 ** 0.5)", "nn.init.zeros_(Bi)", "test_multilora.py::test_the_start"),
    "/ 2 * ε for / (2ε)":
        ("autolora.py", "second = [(a - b) / width", "second = [(a - b) / 2 * eps",
         "test_autolora.py::test_finite_differences_are_close_to_exact_and_first_order_is_not"),
    "the threshold is applied to β":
        ("autolora.py", "        a = self.selection()\n", "        a = self.beta / self.beta.sum()\n",
         "test_autolora.py::test_the_rank_is_read_off_the_selection_of_the_forward_pass"),
    "A and B learn from the rows of β":
        ("autolora.py", "return loss, g, [a - eta", "return loss, v, [a - eta",
         "test_autolora.py::test_no_validation_gradient_reaches_a_and_b_and_no_training_gradient_beta"),
    "the look-ahead stays":
        ("autolora.py", "            w.data = w0\n\n", "            pass\n\n", "test_autolora.py::test_the_look_ahead_leaves_no_trace"),
    "padding is in the loss":
        ("data.py", "np.full((len(rows), T), -100, np.int64)", "np.zeros((len(rows), T), np.int64)",
         "test_data.py::test_collate_counts_the_completion_and_pads_to_the_longest_row"),
    "the prompt is in the loss":
        ("data.py", "targets[b, given - 1:len(ids) - 1] = ids[given:]", "targets[b, :len(ids) - 1] = ids[1:]",
         "test_data.py::test_collate_counts_the_completion_and_pads_to_the_longest_row"),
    "tokens see the next one":
        ("model.py", "is_causal=", "is_causal=False and ", "test_model.py::test_no_token_sees_the_next"),
    "φ is divided by the larger of i and j":
        ("analyze.py", "torch.minimum(i[:, None]", "torch.maximum(i[:, None]", "test_analyze.py::test_subspace_similarity_is_the_formula"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, tmp_path):
    name, right, wrong, test = FAULTS[fault]
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
    text = (copy / name).read_text()
    assert text.count(right) == 1, f"{name} has changed: the fault cannot be made"
    (copy / name).write_text(text.replace(right, wrong))
    got = subprocess.run([sys.executable, "-m", "pytest", "-q", f"tests/{test}"], cwd=copy, capture_output=True, text=True)
    assert got.returncode == 1 and " failed" in got.stdout, got.stdout      # 1: tests ran and failed
