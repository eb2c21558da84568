"""
Do the tests find the faults that code like this has had? Each is made in a copy, where a named test
must then fail. A fault's thread is where others had it.

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
    thread: str     # on GitHub, or "-"
    file: str
    right: str      # stands in the file once
    wrong: str
    test: str       # in tests/


FAULTS = [
    # lora.py
    Fault("α/r is forgotten", "rasbt/LLMs-from-scratch #821",
          "lora.py", "return self.alpha / self.rank", "return self.alpha",
          "test_lora.py::test_forward_and_gradients_are_the_closed_forms"),
    Fault("A starts at zero and B random", "-",
          "lora.py", "nn.init.kaiming_uniform_(self.A,",
          "nn.init.zeros_(self.A), nn.init.kaiming_uniform_(self.B,",
          "test_lora.py::"
          "test_the_start_is_the_base_to_the_bit_and_the_first_step_moves_one_tensor"),
    Fault("LayerNorms are trained too", "pytorch/torchtitan #3438",
          "lora.py", "model.requires_grad_(False)",
          "[p.requires_grad_('ln_' in name) for name, p in model.named_parameters()]",
          "test_lora.py::test_training_moves_the_adapter_and_nothing_else"),
    Fault("merging twice adds ΔW twice", "huggingface/peft #1355",
          "lora.py", "if self.kept is None:", "if True:",
          "test_lora.py::test_merge_and_unmerge"),
    Fault("ΔW is rounded to bfloat16 before it is added", "huggingface/peft #2502",
          "lora.py", "W.to(self.A.dtype) + self.delta_weight()",
          "W + self.delta_weight().to(W.dtype)",
          "test_lora.py::test_merge_and_unmerge"),
    Fault("one dropout mask for all rows", "-",
          "lora.py", "self.dropout(x)", "x * self.dropout(torch.ones_like(x[:1]))",
          "test_lora.py::test_dropout_is_drawn_for_every_element_and_for_the_adapter_alone"),
    Fault("an adapter is loaded on top of a merged one", "-",
          "lora.py", "m.unmerge()\n        model.set_submodule", "model.set_submodule",
          "test_lora.py::test_switching_tasks_in_place"),
    Fault("what does not fit is passed over when an adapter is loaded", "huggingface/peft #2699",
          "lora.py", 'raise ValueError(f"the adapter is not whole',
          'continue; print(f"the adapter is not whole',
          "test_lora.py::test_load_is_all_or_nothing"),
    Fault("a state saved while merged has another base", "microsoft/LoRA #190",
          "lora.py", 'return m.about["base"]', 'if m.kept is None: return m.about["base"]',
          "test_lora.py::test_fingerprint"),
    # multilora.py
    Fault("blocks are interleaved", "-",
          "multilora.py", "repeat_interleave(self.repeat, dim=-1)", "tile(self.repeat)",
          "test_multilora.py::test_forward_and_gradients_are_those_of_n_modules"),
    Fault("B and s start at zero: nothing ever moves", "-",
          "multilora.py", "nn.init.kaiming_uniform_(Bi, a=math.sqrt(5))", "nn.init.zeros_(Bi)",
          "test_multilora.py::test_at_the_first_step_only_s_moves_and_then_everything"),
    # autolora.py
    Fault("/ 2 * ε for / (2ε)", "khanrc/pt.darts #43",
          "autolora.py", ") / width", ") / 2 * eps",
          "test_autolora.py::test_finite_differences_are_close_to_exact"),
    Fault("the threshold is on β", "-",
          "autolora.py", "above_threshold(selection(m.beta.detach(), m.gate))",
          "above_threshold(m.beta.detach() / m.beta.detach().sum())",
          "test_autolora.py::test_the_threshold_is_on_the_selection_of_the_forward_pass"),
    Fault("A and B learn from the rows of β", "-",
          "autolora.py", "[*g, *", "[*v, *",
          "test_autolora.py::"
          "test_no_validation_gradient_reaches_a_and_b_and_no_training_gradient_beta"),
    Fault("the look-ahead stays", "leopard-ai/betty #13",
          "autolora.py", "w.data = w0\n", "pass\n",
          "test_autolora.py::test_the_look_ahead_leaves_no_trace"),
    # and what is around them
    Fault("padding is in the loss", "axolotl-ai-cloud/axolotl #2227",
          "support/data.py", "np.full((len(rows), T), -100)", "np.zeros((len(rows), T), np.int64)",
          "test_data.py::test_collate_counts_the_completion_and_pads_to_the_longest_row"),
    Fault("the prompt is in the loss", "karpathy/nanochat #582",
          "support/data.py", "targets[b, given - 1:len(ids) - 1] = ids[given:]",
          "targets[b, :len(ids) - 1] = ids[1:]",
          "test_data.py::test_collate_counts_the_completion_and_pads_to_the_longest_row"),
    Fault("tokens see the next one", "facebookresearch/xformers #103",
          "model.py", "is_causal=", "is_causal=False and ",
          "test_model.py::test_no_token_sees_the_next"),
    Fault("φ is divided by the larger of i and j", "-",
          "analyze.py", "torch.minimum(i[:, None]", "torch.maximum(i[:, None]",
          "test_analyze.py::test_subspace_similarity_is_the_formula"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.what} ({f.thread})")
def test_a_fault_is_found(fault, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
    text = (copy / fault.file).read_text()
    assert text.count(fault.right) == 1, f"{fault.file} has changed: the fault cannot be made"
    (copy / fault.file).write_text(text.replace(fault.right, fault.wrong))
    argv = [sys.executable, "-m", "pytest", "-q", f"tests/{fault.test}"]
    got = subprocess.run(argv, cwd=copy, capture_output=True, text=True)
    assert got.returncode == 1 and " failed" in got.stdout, got.stdout     # tests ran, and failed
