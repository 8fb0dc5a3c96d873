"""The benchmarks measure what they say; `test_compiled.py` asks the compilers."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import optax
import pytest

from docs.tables import speed

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
common, step, text = map(import_module, ("common", "step", "compiled_text"))
pytestmark = pytest.mark.usefixtures("standard_promotion")
PROGRAM = """
%sum (q: f32[8,128]) -> f32[8,128] {
  %q = f32[8,128]{1,0} parameter(0)
  ROOT %t = f32[8,128]{1,0} all-reduce(%q)
ENTRY %main (a: f32[8,128], b: s8[9,1]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %b = s8[9,1]{1,0:T(8,128)} parameter(1)
  %v = f32[8,128]{1,0:S(1)} fusion(%a, %a, %b), calls=%f
  ROOT %r = f32[8,128]{1,0} call(%a), to_apply=%sum"""


def test_bytes_kernels_and_collectives_of_a_program() -> None:
    assert text.moved(PROGRAM) == (3 * 4096 + 2048, 2, {"all-reduce": 4096})
    with pytest.raises(ValueError, match=r"^while: its bytes are not in the text"):
        text.moved(PROGRAM.replace("call(", "while("))


def test_every_kernel_of_every_step_is_run() -> None:
    gradients = step.gradients_of([common.trees("float32", side=200)["one"]()] * 2, 1)
    carry, of = (gradients, optax.adam(1e-3).init(gradients)), optax.adam(1e-3)
    arm = step.Steps(common.step_of(of), carry, [gradients], loop=True)
    few, many, more = (len(step.kernels(arm.run, n)) for n in (4, 8, 12))
    assert many - few == more - many >= 4 * 2  # at least a kernel a leaf and step
    inside, before = arm.program.as_text().split("\nENTRY")
    assert "200,200]{1,0} fusion(" in inside
    assert "200,200]{1,0} fusion(" not in before


def test_a_record_has_tables_and_a_figure(tmp_path: Path, capsys: Any) -> None:
    given = [f"--out={tmp_path}", "--size=tiny", "--rounds=2", "--window=1e-6"]
    step.main([*given, "--only=cubic, float32", "--trees", "one", "small"])
    *_, host = speed.tables(tmp_path)
    assert "| 100 | optax.adamw | 401 | " in host
    speed.draw(tmp_path)
    assert (tmp_path / "times.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="2"):
        step.main(["--only=lion"])
    assert "--only 'lion' is in no name; names are" in capsys.readouterr().err
