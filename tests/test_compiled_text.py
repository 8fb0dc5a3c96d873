"""How the text of a compiled program is read."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
compiled: Any = import_module("compiled")
compiled_devices: Any = import_module("compiled_devices")
compiled_text: Any = import_module("compiled_text")

PROGRAM = """
HloModule jit_step, entry_computation_layout={(f32[8,128]{1,0})->f32[8,128]{1,0}}

%inner (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %n = f32[8,128]{1,0} negate(%p)
}

%sum (q: f32[8,128]) -> f32[8,128] {
  %q = f32[8,128]{1,0} parameter(0)
  ROOT %t = f32[8,128]{1,0} all-reduce(%q)
}

%never (z: f32[8,128]) -> f32[8,128] {
  %z = f32[8,128]{1,0} parameter(0)
  ROOT %w = f32[8,128]{1,0} all-gather(%z)
}

ENTRY %main (a: f32[8,128], b: s8[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %b = s8[8,128]{1,0} parameter(1)
  BODY
  ROOT %r = f32[8,128]{1,0} call(%a), to_apply=%inner
}
"""
CALL = 2 * 4096  # bytes of `inner`: read and written


@pytest.mark.parametrize(
    ("body", "hbm", "kernels"),
    [
        ("%x = bf16[8,128]{1,0} fusion(%a, %b), kind=kLoop, calls=%f", 7 * 1024, 1),
        # An operand that is used twice is read once.
        ("%x = bf16[8,128]{1,0} fusion(%b, %b), kind=kLoop, calls=%f", 3 * 1024, 1),
        ("%x = (s8[8,128]{1,0}, u8[8,128]{1,0}) fusion(%b), calls=%f", 3 * 1024, 1),
        ("%x = f8e4m3fn[8,128]{1,0} fusion(%b), calls=%f", 2 * 1024, 1),
        # In a TPU's vector memory; in whole tiles; a column that lies as a row.
        ("%x = f32[8,128]{1,0:T(8,128)S(1)} fusion(%a), calls=%f", 4 * 1024, 1),
        ("%x = f32[9,1]{1,0:T(8,128)} fusion(%b), calls=%f", 1024 + 4 * 16 * 128, 1),
        ("%x = f32[9,1]{0,1:T(1,128)} fusion(%b), calls=%f", 1024 + 4 * 128, 1),
        ("%x = bf16[5]{0:T(1024)(128)(2,1)} fusion(%b), calls=%f", 1024 + 2 * 1024, 1),
        # Copies that start and end: the bytes of both sides, if both are in HBM.
        (
            "%x = (s8[8,128]{1,0:S(1)}, s8[8,128]{1,0}, u32[]{:S(2)}) copy-start(%b)\n"
            "  %y = s8[8,128]{1,0:S(1)} copy-done(%x)",
            1024,
            0,
        ),
        (
            "%x = (s8[8,128]{1,0}, s8[8,128]{1,0}, u32[]{:S(2)}) copy-start(%b)",
            2048,
            0,
        ),
        (
            "%x = ((f32[8,128]{1,0}), f32[2,128]{1,0:S(1)}, s32[]) slice-start(%a), "
            "slice={[0:2], [0:128]}",
            1024,
            0,
        ),
        ('%x = s8[8,128] custom-call(%b), custom_call_target="ConcatBitcast"', 0, 0),
        ("%x = f32[] constant(1)\n  %y = f32[] add(%x, %x)", 8, 0),
        ("%x = f32[] bitcast(%a)", 0, 0),
    ],
)
def test_bytes_of_operations(body: str, hbm: int, kernels: int) -> None:
    moved = compiled_text.moved(PROGRAM.replace("BODY", body))
    assert moved == (CALL + hbm, 1 + kernels, {})


@pytest.mark.parametrize(
    ("sync", "start"),
    [
        (
            "f32[16,128] all-gather(%a)",
            "(f32[8,128], f32[16,128]) all-gather-start(%a)",
        ),
        ("f32[8,128] all-reduce(%a)", "f32[8,128] all-reduce-start(%a)"),
        (
            "s8[8,128] collective-permute(%b)",
            "(s8[8,128], s8[8,128], u32[], u32[]) collective-permute-start(%b)",
        ),
    ],
)
def test_a_collective_moves_the_same_if_it_is_waited_for(sync: str, start: str) -> None:
    one, other = (
        compiled_text.moved(PROGRAM.replace("BODY", f"%x = {body}"))
        for body in (sync, start)
    )
    assert one == other


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("%x = f32[8,128] while(%a), condition=%c, body=%d", "^while: its bytes are"),
        ("%x = f8e5m2[8,128] fusion(%a), calls=%f", "^f8e5m2: its size is not known"),
    ],
)
def test_what_is_unknown_is_refused(body: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compiled_text.moved(PROGRAM.replace("BODY", body))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("%x = f32[8,1]{1,0} all-reduce(%a)", {"all-reduce": 32}),
        ("%x = (f32[8], f32[4]) all-reduce(%a, %b)", {"all-reduce": 48}),
        ("%x = f32[8,1]{1,0:S(1)} all-reduce-start(%a)", {"all-reduce": 32}),
        (
            "%x = (f32[8,128], f32[16,128]) all-gather-start(%a)",
            {"all-gather": 16 * 128 * 4},
        ),
        ("%x = f32[16,128] all-gather(%a)", {"all-gather": 16 * 128 * 4}),
        (
            "%x = (s8[8,128], s8[8,128], u32[], u32[]) collective-permute-start(%b)",
            {"collective-permute": 1024},
        ),
        # One in a part of the program that is called twice, one that is never called.
        (
            "%x = f32[8,128]{1,0} call(%a), to_apply=%sum\n"
            "  %y = f32[8,128]{1,0} call(%a), to_apply=%sum",
            {"all-reduce": 2 * 4096},
        ),
    ],
)
def test_bytes_of_collectives(body: str, expected: dict[str, int]) -> None:
    assert compiled_text.moved(PROGRAM.replace("BODY", body)).collectives == expected


def test_without_compilers_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(compiled_devices, "present", lambda: ())
    assert compiled.main(["--out", str(tmp_path / "record")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Nothing is counted: neither libtpu nor")
    assert printed.count("\n") == 1
    assert not (tmp_path / "record").exists()
