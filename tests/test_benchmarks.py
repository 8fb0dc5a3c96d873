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
}
ENTRY %main (a: f32[8,128], b: s8[9,1]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %b = s8[9,1]{1,0:T(8,128)} parameter(1)
  %v = f32[8,128]{1,0:S(1)} fusion(%a, %a, %b), calls=%f
  ROOT %r = f32[8,128]{1,0} call(%a), to_apply=%sum
}"""


def test_bytes_kernels_and_collectives_of_a_program() -> None:
    whole, in_tiles = 4 * 8 * 128, 16 * 128  # what is in S(1) does not count
    assert text.moved(PROGRAM) == (3 * whole + in_tiles, 2, {"all-reduce": whole})
    with pytest.raises(ValueError, match=r"^while: its bytes are not in the text"):
        text.moved(PROGRAM.replace("call(", "while("))


def test_every_kernel_of_every_step_is_run() -> None:
    shapes: Any = [common.trees("float32", side=200)["one"]()] * 2
    arm = step.Steps(optax.adam(1e-3), shapes, [step.gradients_of(shapes, 1)])
    few, many, more = (len(step.kernels(arm.run, n)) for n in (4, 8, 12))
    assert many - few == more - many >= 4 * 2  # at least a kernel a leaf and step
    assert int(arm.carry[1][0].count) == 4 + 8 + 12
    program = arm.program.as_text()
    assert "200,200]{1,0} fusion(" in program
    assert "200,200]{1,0} fusion(" not in program[program.index("ENTRY") :]


def test_a_record_has_tables_and_a_figure(tmp_path: Path, capsys: Any) -> None:
    given = [f"--out={tmp_path}", "--size=tiny", "--rounds=2", "--window=1e-6"]
    step.main([*given, "--only=cubic, float32", "--trees", "one", "small"])
    others, many, host = speed.tables(tmp_path)
    assert "| adam3w cubic, float32 | " in others
    assert "100 leaves, 0.1 M" in many
    assert "| 100 | optax.adamw | 401 | " in host
    speed.draw(tmp_path)
    assert (tmp_path / "times.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="2"):
        step.main([*given, "--only=lion"])
    assert "--only 'lion' is in no name; names are" in capsys.readouterr().err
