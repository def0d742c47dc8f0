"""What `ask` leaves out when it opens the bundled model: nothing of the answer, and nothing for good."""

import json
import subprocess
import sys

import pytest

LEFT_OUT = ("sympy", "torch._dynamo.exc", "torch.distributed.tensor", "transformers.models.llama", "pyarrow.lib")
ANSWER = """
import json, os, sys
from budgetvlm.vlm.lean_imports import lean_imports
with lean_imports():
    from budgetvlm.vlm import load_vlm
    import budgetvlm.table
    vlm = load_vlm("reference")
from budgetvlm.tasks import load_task
sample = next(iter(load_task("signs").samples("test", 1)))
image = sample.load_image()
texts = [vlm.generate(image, sample.question, setting, max_new_tokens=6).text for setting in vlm.knob_space.settings]
weights = sum(float(p.detach().double().abs().sum()) for p in vlm.model.parameters())
buffers = sum(float(b.double().abs().sum()) for b in vlm.model.buffers())
loaded = [name for name in %r if name in sys.modules]
"""
LATER = """
import torch
from transformers import AutoConfig, LlamaConfig
from scipy.optimize import linear_sum_assignment
from budgetvlm.table import ProfileTable
table = ProfileTable.from_arrays(vlm.knob_space, ("a",), [[0.5] * 27], [[9.0] * 27])
table.save(os.environ["TABLE"])
assert ProfileTable.load(os.environ["TABLE"]).sample_ids == ("a",)
assert torch.distributed.is_available() and torch.nn.init.normal_(torch.zeros(9)).abs().sum() > 0
assert linear_sum_assignment([[1.0, 2.0], [2.0, 1.0]])[1].tolist() == [0, 1]
assert LlamaConfig().model_type == "llama" and AutoConfig.for_model("llama").model_type == "llama"
"""
TELL = "print(json.dumps([texts, weights, buffers, loaded]))"


def run(code: str, monkeypatch: pytest.MonkeyPatch, full: str) -> list:
    monkeypatch.setenv("BUDGETVLM_FULL_IMPORTS", full)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_answers_are_those_of_full_imports_and_all_is_there_when_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("TABLE", str(tmp_path / "t.parquet"))
    *lean, loaded = run(ANSWER % (LEFT_OUT,) + TELL + LATER + TELL, monkeypatch, full="0")
    *full, _ = run(ANSWER % (LEFT_OUT,) + TELL, monkeypatch, full="1")
    assert lean == full
    assert loaded == []
