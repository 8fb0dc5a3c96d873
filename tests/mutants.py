"""Changes the package in small ways, and asks whether a test notices each.

    python -m tests.mutants --only _rule --jobs 2

Each mutant is one edit of one file. It is made in a copy, and the tests run on that.
A mutant is killed if one of them fails, and survives if all pass. The status is 1 if
fewer than 95% are killed. Those that change no behaviour have a reason beside them, and
do not count.
"""

import argparse
import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = "adam3_optax", "tests", "docs", "examples", "pyproject.toml"
LEAST = 0.95  # of those that count

# The likeliest killers of a file's mutants come first, and are often enough.
FIRST = {
    "_rule": ["rule"],
    "_storage": ["storage"],
    "_rounding": ["rounding"],
    "_transform": ["transform"],
    "_boxes": ["boxes"],
    "_checks": ["transform", "mask"],
    "_optimizers": ["optimizers", "mask"],
    "_halves": ["bfloat16"],
    "_bfloat16": ["bfloat16"],
    "_masters": ["bfloat16"],
    "_lost_updates": ["lost_updates"],
}
# Words in the names of long tests, which kill little that others do not.
SLOW = [
    *("permuted", "split", "reshaped", "negated", "drift", "blow_up", "slow_averages"),
    *("comes_to_rest", "pure_decay", "uniform", "nnx", "debugging_flags"),
]
SECOND = [
    *("modes", "not_finite", "storage", "hyperparameters", "rounding", "transform"),
    *("rule", "optimizers", "compilations"),
]
THIRD = [
    *("boxes", "mask", "without_third_moment", "conversion", "diagnostics", "export"),
    *("low_precision", "sharding"),
]


class Mutant(NamedTuple):
    """An edit of a file of the package: of text that occurs once in it.

    Attributes:
        file: Its name, without the suffix.
        old: The text.
        new: What comes in its place.
        equivalent: Why this changes no behaviour; empty if it does.
    """

    file: str
    old: str
    new: str
    equivalent: str = ""

    def name(self) -> str:
        """Returns one line that tells it from the others."""
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {old} -> {new or 'nothing'}"

    def applied(self, text: str) -> str:
        """Returns the text of the file, edited."""
        if self.old == self.new or text.count(self.old) != 1:
            raise ValueError(
                f"{self.name()}\nThe old text must occur once in the file, and differ "
                f"from the new. It occurs {text.count(self.old)} times."
            )
        return text.replace(self.old, self.new)


# Each is an edit that a reviewer might make by mistake.
MUTANTS = [
    # _rule: the scalars.
    Mutant("_rule", "x.astype(dtype)\n\n", "x\n\n"),
    Mutant("_rule", "cast(1.0 - b)", "cast(1.0 - jnp.asarray(b, dtype))"),
    Mutant(
        "_rule",
        "1.0 / _one_minus_power(a, t.astype(dtype))",
        "1.0 / (1.0 - (1.0 - a) ** t.astype(dtype))",
    ),
    Mutant("_rule", "(a, t.astype(dtype))", "(a, t.astype(dtype) + 1)"),
    Mutant("_rule", "return jnp.where(t == 1.0, a, later)", "return later"),
    Mutant("_rule", "-jnp.where(a < 1.0, a, 0.0)", "-a"),
    Mutant(
        "_rule",
        "jnp.where(a < 1.0, -jnp.expm1(t * log_b), 1.0)",
        "-jnp.expm1(t * log_b)",
    ),
    # _rule: the moments.
    Mutant("_rule", "k.a.m * g + k.b.m * m", "g + k.b.m * m"),
    Mutant("_rule", "k.a.m * g + k.b.m * m", "k.a.m * g - k.b.m * m"),
    Mutant(
        "_rule", "float(jnp.finfo(g.dtype).max) / 4", "float(jnp.finfo(g.dtype).max)"
    ),
    Mutant("_rule", "average = k.a.v * g**2", "average = k.a.m * g**2"),
    Mutant("_rule", "k.a.v * limit + k.b.v * v", "limit"),
    Mutant(
        "_rule", "return jnp.where(jnp.isinf(g), average, clipped)", "return average"
    ),
    Mutant(
        "_rule", "return jnp.where(jnp.isinf(g), average, clipped)", "return clipped"
    ),
    Mutant("_rule", "return k.a.s * form", "return form"),
    Mutant("_rule", "k.b.s * s", "k.b.v * s"),
    Mutant("_rule", "form.deviation(g, m, k), k)", "g, k)"),
    Mutant("_rule", "return g - m\n", "return g - m * k.c.m\n"),
    Mutant("_rule", "return g - m * k.c.m", "return g - m"),
    Mutant("_rule", "_within(d, 1 / 3) ** 3", "d**3"),
    Mutant("_rule", "** root / 2", "** root"),
    Mutant("_rule", "jnp.abs(d) + k.eps", "jnp.abs(d)"),
    Mutant(
        "_rule",
        "jnp.where(d == 0, 1.0, _within(jnp.abs(d) + k.eps, 2 / 3))",
        "_within(jnp.abs(d) + k.eps, 2 / 3)",
    ),
    Mutant("_rule", "_within(jnp.abs(d) + k.eps, 2 / 3)", "jnp.abs(d) + k.eps"),
    Mutant("_rule", "jnp.sign(d) * (a * jnp.sqrt(a))", "a * jnp.sqrt(a)"),
    # _rule: the direction.
    Mutant("_rule", "(m * k.c.m + b)", "(m + b)"),
    Mutant("_rule", "(m * k.c.m + b)", "(m * k.c.m - b)"),
    Mutant("_rule", "(jnp.sqrt(v * k.c.v + k.eps_root)", "(jnp.sqrt(v + k.eps_root)"),
    Mutant("_rule", "v * k.c.v + k.eps_root", "v * k.c.m + k.eps_root"),
    Mutant("_rule", "k.eps_root) + k.eps)", "k.eps_root + k.eps))"),
    Mutant("_rule", "(v * k.c.v + k.eps_root) +", "(v * k.c.v) + k.eps_root +"),
    Mutant("_rule", "2.0**24", "2.0**23"),
    Mutant("_rule", "v_hat > 2.0**24", "v_hat >= 2.0**24"),
    Mutant("_rule", "jnp.sqrt(jnp.where(seen, v_hat, 1.0))", "jnp.sqrt(v_hat)"),
    Mutant("_rule", "s * k.c.s * r", "s * r"),
    Mutant(
        "_rule", "x * r * r if power == 3.0", "s * k.c.s / sigma**3 if power == 3.0"
    ),
    Mutant("_rule", "x * r ** (power - 1.0)", "x * r**power"),
    Mutant("_rule", "k.lam * jnp.clip(s, -k.tau, k.tau)", "k.lam * s"),
    Mutant("_rule", "jnp.clip(s, -k.tau, k.tau)", "jnp.minimum(s, k.tau)"),
    Mutant("_rule", "jnp.where(seen, sigma * clipped, 0.0)", "sigma * clipped"),
    Mutant("_rule", "seen, sigma * clipped, 0.0", "seen, clipped, 0.0"),
    Mutant("_rule", "1.5, bounded=False", "1.5, bounded=True"),
    Mutant("_rule", "_clipped, 1.5,", "_clipped, 3.0,"),
    # _storage: the formats.
    Mutant("_storage", "struct is self.struct and dtypes", "dtypes"),
    Mutant("_storage", "wide if wide in self.dtypes else self.dtypes[0]", "wide"),
    Mutant(
        "_storage",
        "jnp.asarray(stored[0]).astype(computed_in(*stored))",
        "jnp.asarray(stored[0])",
    ),
    Mutant(
        "_storage",
        "narrowed(x, jnp.result_type(*old))",
        "x.astype(jnp.result_type(*old))",
    ),
    Mutant(
        "_storage",
        "_rounding.to_bfloat16(narrowed(x, jnp.float32), bits)",
        "narrowed(x, jnp.bfloat16)",
    ),
    Mutant(
        "_storage",
        "to_bfloat16(narrowed(x, jnp.float32)",
        "to_bfloat16(x.astype(jnp.float32)",
    ),
    Mutant("_storage", "    None: Wide", "    None: Float32"),
    Mutant("_storage", "s is not None:", "False:"),
    # _storage: 8-bit rows.
    Mutant("_storage", '"v": 2', '"v": 1'),
    Mutant(
        "_storage", 'jnp.uint8 if self.moment == "v" else jnp.int8\n\n', "jnp.int8\n\n"
    ),
    Mutant(
        "_storage", "super().fits(field) and other not in dtypes", "super().fits(field)"
    ),
    Mutant(
        "_storage",
        "jnp.float32 if _is_small(param) else self.code_dtype",
        "self.code_dtype",
    ),
    Mutant("_storage", "None if small else -1", "-1"),
    Mutant("_storage", "_boxes.is_box(item) and not small", "_boxes.is_box(item)"),
    Mutant("_storage", "is_kept and not _boxes", "is_kept and _boxes"),
    Mutant(
        "_storage",
        "(codes.astype(jnp.float32) * scale) ** self.power",
        "codes.astype(jnp.float32) * scale",
    ),
    Mutant("_storage", "x = narrowed(x, jnp.float32)", "x = x.astype(jnp.float32)"),
    Mutant("_storage", "return x, old[1]", "return x, old[1] + 1"),
    Mutant(
        "_storage",
        "lax.stop_gradient((x, narrowed(again(), jnp.float32)))",
        "(x, narrowed(again(), jnp.float32))",
    ),
    Mutant("_storage", "narrowed(again(), jnp.float32)", "x"),
    Mutant("_storage", "default=apart_from_others", "default=lambda x: x"),
    Mutant("_storage", "cpu=lambda x: x", "cpu=lax.optimization_barrier"),
    Mutant(
        "_storage",
        "jnp.iinfo(self.code_dtype).max)",
        "jnp.iinfo(self.code_dtype).max - 1)",
    ),
    Mutant("_storage", "self.power) / largest", "self.power) / (largest - 1)"),
    Mutant("_storage", "jnp.where(scale > 0, scale, 1.0)", "scale"),
    Mutant(
        "_storage",
        "jnp.minimum(_rounding.to_integer(root, self.power, bits), largest)",
        "_rounding.to_integer(root, self.power, bits)",
        "a root exceeds the largest code by rounding alone, which to_integer takes for "
        "the code, or if its scale is no normal number, which a CPU takes for 0",
    ),
    Mutant(
        "_storage", "to_integer(root, self.power, bits)", "to_integer(root, 1, bits)"
    ),
    Mutant("_storage", "jnp.where(x > 0, jnp.max", "jnp.where(x >= 0, jnp.max"),
    Mutant(
        "_storage", "codes = jnp.where(x > 0, jnp.maximum(codes, 1.0), codes)", "pass"
    ),
    Mutant("_storage", "codes = jnp.where(x < 0, -codes, codes)", "pass"),
    Mutant(
        "_storage",
        "jnp.where(x < 0",
        "jnp.where(x <= 0",
        "where x is 0 its code is 0, and so is -0",
    ),
    Mutant("_storage", "lax.optimization_barrier((new, later))", "new, later"),
    Mutant("_storage", "jnp.where(scale < 0, old[0], codes)", "codes"),
    Mutant("_storage", "jnp.where(scale < 0, old[0], codes)", "old[0]"),
    Mutant("_storage", "jnp.where(scale < 0, 0, x)", "jnp.where(scale > 0, 0, x)"),
    Mutant("_storage", "jax.typeof(x) == jax.typeof(scale)", "x.shape == scale.shape"),
    Mutant("_storage", "axis, keepdims=True, initial=0)", "axis, keepdims=True)"),
    Mutant("_storage", "range(2):\n        error", "range(1):\n        error"),
    Mutant("_storage", "error * (2 / 9)", "error * (1 / 9)"),
    Mutant("_storage", "(param) < 2", "(param) < 1"),
    Mutant("_storage", "[-1] < 16", "[-1] < 17"),
    Mutant(
        "_storage", "not jnp.issubdtype(jnp.result_type(param), jnp.floating) or ", ""
    ),
    # _storage: types.
    Mutant("_storage", "np.float64 if wide else np.float32", "np.float32"),
    Mutant("_storage", "jnp.finfo(dtype).max) / 4", "jnp.finfo(dtype).max)"),
    Mutant(
        "_storage", "jnp.where(jnp.isfinite(x), jnp.clip(x, -bound, bound), x)", "x"
    ),
    Mutant(
        "_storage",
        "jnp.where(jnp.isfinite(x), jnp.clip(x, -bound, bound), x)",
        "jnp.clip(x, -bound, bound)",
    ),
    Mutant("_storage", "bits < jnp", "bits <= jnp"),
    Mutant("_rounding", "tangents[0]", "tangents[1]"),
    Mutant(
        "_storage",
        "return jnp.zeros(())",
        "return jnp.ones(())",
        "without a form no rule reads s, and nothing else loads it",
    ),
    # bfloat16 parameters.
    Mutant("_halves", "size.astype(jnp.int32) + _lower(rest), 0)", "size, 0)"),
    Mutant("_halves", "_lower(rest), 0)", "_lower(rest), -1)"),
    Mutant(
        "_halves",
        "jnp.where(size < INFINITY, whole.astype(jnp.uint32), size)",
        "whole.astype(jnp.uint32)",
    ),
    Mutant("_halves", "straight_through(param.astype(jnp.float32), ", "("),
    Mutant("_halves", "straight_through(master - param.astype(jnp.float32), u)", "u"),
    Mutant("_bfloat16", "if made_with != remainder:", "if False:"),
    Mutant("_halves", "8 if rest.dtype == jnp.int8 else 0", "0"),
    Mutant("_halves", "(pattern + (bits >> 24)) >> 8 << 8", "pattern >> 8 << 8"),
    Mutant("_halves", "bits >> 24", "bits >> 25"),
    Mutant("_halves", "jnp.where(size < INFINITY, carried, pattern)", "carried"),
    Mutant("_halves", "jnp.where(size > INFINITY, _NAN, pattern)", "pattern"),
    Mutant("_halves", "size > INFINITY", "size >= INFINITY"),
    Mutant("_halves", " - _number(old))", ")"),
    Mutant("_bfloat16", 'not in ("int16", "int8", None)', "in ()"),
    Mutant("_bfloat16", "lambda x: _wide(x) if is_narrow(x) else x", "lambda x: x"),
    Mutant("_bfloat16", "gradients[i] = jax.tree.map(_wide, gradients[i])", "pass"),
    Mutant("_bfloat16", "leaf_key(i, purpose=1)", "leaf_key(0, purpose=1)"),
    Mutant("_bfloat16", "optax.safe_increment(state.count)", "state.count"),
    Mutant("_bfloat16", "check_fits(path, param, rest)", "pass"),
    Mutant(
        "_bfloat16", "check_state(state, BFloat16ParametersState, _FROM_INNER)", "pass"
    ),
    Mutant("_bfloat16", "jax.tree.map_with_path(_check_parameter, params)", "pass"),
    Mutant("_bfloat16", "if jax.tree.leaves(us[i]):", "if True:"),
    Mutant("_bfloat16", "is_leaf=_boxes.is_box)", "is_leaf=None)"),
    Mutant("_halves", "jnp.where(upper == old, 0.0, ", "("),
    Mutant("_masters", "if chosen[i]:", "if True:"),
    Mutant("_masters", " or jnp.result_type(master) != jnp.float32", ""),
    Mutant("_masters", "not _owns(rest) or ", ""),
    Mutant("_masters", "if not _owns(rest):", "if False:"),
    Mutant("_masters", "one.count + 1", "one.count"),
    Mutant("_masters", "check_not_stacked(one)", "pass"),
    Mutant("_masters", "_check_shape(path, master, rest)", "pass"),
    Mutant("_masters", "elif rest is not None:", "elif False:"),
    Mutant("_masters", "check_fits(paths[i][0], param, rest)", "pass"),
    Mutant("_lost_updates", "(u != 0) & ", ""),
    Mutant("_lost_updates", " & jnp.isfinite(old)", ""),
    Mutant(
        "_lost_updates",
        "lax.reduce_precision(old + u, kind.nexp, kind.nmant)",
        "old + u",
    ),
    Mutant("_lost_updates", "float(x.lost) >= 0.01", "float(x.lost) > 1"),
    Mutant("_lost_updates", "check_countable(name, param)", "pass"),
    # _rounding.
    Mutant("_rounding", "SeedSequence((leaf, purpose))", "SeedSequence((0, purpose))"),
    Mutant("_rounding", "(leaf, purpose))", "(leaf, 0))"),
    Mutant("_rounding", "_mix(count)", "jnp.uint32(1)"),
    Mutant("_rounding", "_mix(count)", "count"),
    Mutant("_rounding", "bits * np.uint32(0x9E3779B1)", "bits"),
    Mutant("_rounding", "bits * np.uint32(0x85EBCA77)", "bits"),
    Mutant("_rounding", "count % 2, keep", "0, keep"),
    Mutant("_rounding", "shape[axis + 1 :]", "shape[axis:]"),
    Mutant("_rounding", ", out_sharding=where", ""),
    Mutant("_rounding", "seed * own", "seed"),
    Mutant("_rounding", "% 2**32)", ")"),
    Mutant("_rounding", "product *= jnp.asarray(size).astype(jnp.uint32)", "pass"),
    Mutant("_rounding", "x >> 15", "x >> 16"),
    Mutant("_rounding", "jnp.where(size < _LARGEST, bits >> 16, 0)", "(bits >> 16)"),
    Mutant("_rounding", "bits >> 16, 0", "bits >> 17, 0"),
    Mutant(
        "_rounding",
        "size < _LARGEST",
        "size <= _LARGEST",
        "the lower half of the largest is 0, so that no random half carries",
    ),
    Mutant(
        "_rounding",
        "return jnp.where(size > INFINITY, _NAN, rounded)",
        "return rounded",
    ),
    Mutant("_rounding", "size > INFINITY", "size >= INFINITY"),
    Mutant("_rounding", "1e-6 * root", "1e-5 * root"),
    Mutant("_rounding", "jnp.floor(root + ulps)", "jnp.floor(root)"),
    Mutant("_rounding", "jnp.where(root - k < ulps, 0.0, root - k)", "root - k"),
    Mutant("_rounding", "f * (2 * k + f), 2 * k + 1", "f, jnp.ones_like(f)"),
    Mutant("_rounding", "3 * k * (k + f) + f**2", "3 * k * (k + f)"),
    Mutant("_rounding", "rise * 2.0**24", "rise * 2.0**23"),
    Mutant("_rounding", "draw * span < rise", "draw * span <= rise"),
    # _transform.
    Mutant("_transform", "optax.safe_increment(state.count)", "state.count + 1"),
    Mutant(
        "_transform",
        "lam_at(state.count), tau_at(state.count)",
        "lam_at(count), tau_at(count)",
    ),
    Mutant(
        "_transform",
        "_rule.coefficients, h, count",
        "_rule.coefficients, h, state.count",
    ),
    Mutant("_transform", "not jax.tree.leaves(item):", "item is None:"),
    Mutant("_transform", "_check_gradient(path, g, old)", "pass"),
    Mutant("_transform", "jax.tree.leaves((g, old))", "jax.tree.leaves(g)"),
    Mutant("_transform", "jax.tree.leaves((g, old))", "jax.tree.leaves(old)"),
    Mutant("_transform", "leaf_key(index)", "leaf_key(0)"),
    Mutant("_transform", "is_leaf=_boxes.is_place", "is_leaf=_boxes.is_box"),
    Mutant("_transform", "is_leaf=_boxes.is_place", "is_leaf=lambda x: x is None"),
    Mutant("_transform", "jnp.zeros((), jnp.int32)", "jnp.zeros(())"),
    Mutant("_transform", "@functools.partial(jax.jit, static_argnums=(0, 1))", ""),
    Mutant("_transform", "f.load(stored).astype(dtype)", "f.load(stored)"),
    Mutant("_transform", "_rounding.straight_through(x, load(f, kept))", "x"),
    Mutant(
        "_transform", "_rounding.straight_through(x, load(f, kept))", "load(f, kept)"
    ),
    Mutant("_transform", "g_t = g.astype(dtype)", "g_t = g"),
    Mutant(
        "_transform",
        "f.in_turn(kept, mine, getattr(old, then) if then else ())",
        "kept, getattr(old, then) if then else ()",
    ),
    Mutant("_transform", "old, bits.v", "old, bits.m"),
    Mutant("_transform", "old, bits.s", "old, bits.v"),
    Mutant("_transform", "form.term(v_t, s_t, k)", "form.term(v_t, x, k)"),
    Mutant("_transform", "u_t.astype(g.dtype)", "u_t"),
    Mutant("_checks", "jnp.ndim(state.count):", "False:"),
    Mutant("_transform", "jax.tree.map_with_path(_check_parameter, params)", "pass"),
    Mutant("_transform", "not jnp.issubdtype(g.dtype, jnp.floating)", "False"),
    Mutant("_transform", "if shape != g.shape", "if len(shape or ()) != g.ndim"),
    Mutant("_transform", "not f.fits(field)", "False"),
    # _boxes.
    Mutant("_boxes", "(x)) < 2", "(x)) == 1"),
    Mutant("_boxes", "return not known or any(", "return not known or not any("),
    Mutant("_boxes", "return True", "return False"),
    Mutant("_boxes", "x[last:] and x[last] is not None", "bool(x[last:])"),
    Mutant("_boxes", "return not known or any(", "return any("),
    Mutant("_boxes", '"optimizer_sharding", ', ""),
    Mutant("_boxes", 'getattr(x, "spec", x)', "x"),
    # _optimizers.
    Mutant("_optimizers", "return u + jnp", "return u - jnp"),
    Mutant("_optimizers", "state.count if is_schedule else 0", "0"),
    Mutant(
        "_optimizers", "count=optax.safe_increment(state.count)", "count=state.count"
    ),
    Mutant(
        "_optimizers",
        "full_mask(mask(params) if callable(mask) else mask, params)",
        "mask(params) if callable(mask) else mask",
    ),
    Mutant("_checks", "jax.tree.map_with_path(check_boolean, mask)", "pass"),
    Mutant("_checks", "not isinstance(state, kind)", "False"),
    Mutant(
        "_optimizers",
        "-jnp.asarray(rate_at(0), u.dtype)",
        "jnp.asarray(rate_at(0), u.dtype)",
    ),
    Mutant(
        "_optimizers",
        "jnp.asarray(g).astype(computed_in(g)) if real",
        "jnp.asarray(g) if real",
    ),
    Mutant("_optimizers", "u.astype(jnp.result_type(g))", "u"),
]


class Result(NamedTuple):
    killed: bool
    by: str
    seconds: float


class Runner:
    """Runs tests in copies of the project, one copy for each job."""

    def __init__(self, folder: Path, jobs: int, quick: bool) -> None:
        self.quick = quick
        self.running: set[subprocess.Popen[str]] = set()
        self.stopped = False
        self.seconds: dict[str, float] = {}  # of the tests of each name, unmutated
        self.copies: queue.Queue[Path] = queue.Queue()
        for i in range(jobs):
            copy = folder / str(i)
            copy.mkdir()
            for name in COPIED:
                if (ROOT / name).is_dir():
                    skipped = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / name, copy / name, ignore=skipped)
                else:
                    shutil.copy(ROOT / name, copy / name)
            self.copies.put(copy)

    @contextlib.contextmanager
    def copy(self) -> Iterator[Path]:
        """Lends a copy that no other job uses."""
        copy = self.copies.get()
        try:
            yield copy
        finally:
            self.copies.put(copy)

    def clean(self, name: str) -> None:
        """Runs tests on the package as it is: they must pass, and set the limit."""
        with self.copy() as copy:
            result = self.run(copy, [name])
        if result.killed and not self.stopped:
            raise SystemExit(f"without a mutant, a test fails: {result.by}")
        self.seconds[name] = result.seconds

    def judge(self, mutant: Mutant) -> Result:
        """Runs the tests on a mutant, until one fails."""
        with self.copy() as copy:
            file = copy / "adam3_optax" / f"{mutant.file}.py"
            original = file.read_text()
            file.write_text(mutant.applied(original))
            try:
                seconds = 0.0
                for tests, words in stages(mutant.file)[: 1 if self.quick else None]:
                    result = self.run(copy, tests, words)
                    seconds += result.seconds
                    if result.killed:
                        break
                return result._replace(seconds=seconds)
            finally:
                file.write_text(original)

    def run(self, copy: Path, tests: Sequence[str], words: str = "") -> Result:
        """Runs the tests whose names fit the words, in a copy, until one fails."""
        files = [f"tests/test_{name}.py" for name in tests]
        options = "-x -q -p no:cacheprovider --tb=no --hypothesis-profile=mutants"
        # Far above what they take, so that only a mutant that hangs meets it.
        limit = 120 + 5 * sum(self.seconds.get(name, 700.0) for name in tests)
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options.split(), "-k", words, *files],
            cwd=copy,
            # Bytecode is told from newer text by whole seconds: it could be stale.
            env=os.environ
            | {"PYTHONDONTWRITEBYTECODE": "1"}
            # What a mutant leaves as it was is compiled once for all.
            | {"JAX_COMPILATION_CACHE_DIR": str(copy.parent / "cache")}
            | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            | {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.running.add(process)
        try:
            if self.stopped:
                return Result(True, "stopped", 0.0)
            output, _ = process.communicate(timeout=limit)
            found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
            by = found[1] if found else output[-300:].strip()
            if process.returncode in (4, 5) and not self.stopped:
                raise RuntimeError(f"pytest cannot run: {output}")
        except subprocess.TimeoutExpired:
            by = "a time limit"
        finally:
            self.running.discard(process)
            kill(process)
        seconds = time.monotonic() - start
        return Result(process.returncode != 0, by, seconds)

    def stop(self) -> None:
        """Ends all that runs."""
        self.stopped = True
        for process in list(self.running):
            kill(process)


def kill(process: "subprocess.Popen[Any]") -> None:
    """Ends a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stages(file: str) -> list[tuple[list[str], str]]:
    """Returns which tests run one after the other, until one fails."""
    slow = " or ".join(SLOW)
    first = FIRST[file]
    second, third = ([x for x in y if x not in first] for y in (SECOND, THIRD))
    quick = [(x, f"not ({slow})") for x in (first, second, third)]
    return [*quick, (SECOND + THIRD, slow)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", default="", help="an expression that their names match"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument(
        "--equivalent", action="store_true", help="run those that change no behaviour"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="run the likeliest killers alone",
    )
    parser.add_argument(
        "--trusted", action="store_true", help="do not run the tests without a mutant"
    )
    args = parser.parse_args()
    for mutant in MUTANTS:
        mutant.applied((ROOT / "adam3_optax" / f"{mutant.file}.py").read_text())
    named = [x for x in MUTANTS if re.search(args.only, x.name())]
    chosen = [x for x in named if bool(x.equivalent) == args.equivalent]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start, survivors = time.monotonic(), []
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(args.jobs) as pool,
    ):
        runner = Runner(Path(folder), args.jobs, args.quick)
        try:
            if not args.trusted:
                list(pool.map(runner.clean, SECOND + THIRD))
                for name, seconds in runner.seconds.items():
                    print(f"passes    {seconds:4.0f} s  without a mutant: {name}")
            jobs = {pool.submit(runner.judge, x): x for x in chosen}
            for job in as_completed(jobs):
                mutant, result = jobs[job], job.result()
                verdict = "killed  " if result.killed else "SURVIVED"
                by = f"\n           by {result.by}" if result.killed else ""
                print(
                    f"{verdict}  {result.seconds:4.0f} s  {mutant.name()}{by}",
                    flush=True,
                )
                if not result.killed:
                    survivors.append(mutant)
        except BaseException as error:
            runner.stop()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                print("stopped")
                return 130
            raise
    return report(chosen, survivors, named, time.monotonic() - start)


def report(
    chosen: Sequence[Mutant],
    survivors: Sequence[Mutant],
    named: Sequence[Mutant],
    seconds: float,
) -> int:
    """Prints the sum, and returns the exit status."""
    killed = len(chosen) - len(survivors)
    print(f"\n{killed} of {len(chosen)} mutants killed in {seconds / 60:.0f} minutes.")
    for mutant in survivors:
        print(f"  survived: {mutant.name()}")
    for mutant in named:
        if mutant.equivalent:
            print(f"  equivalent: {mutant.name()}\n    for {mutant.equivalent}")
    return int(killed < LEAST * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
