"""A character-level transformer, trained by AdaM3 and by AdamW under equal conditions.

Flax NNX, a warm-up and cosine schedule of Optax, a jitted and donated step. Both
optimizers start from the same parameters and see the same batches; only the rule
differs. Without --text the text is the English that ships with every CPython, the
topics of `help()`, so nothing is downloaded.

    python char_lm.py --steps 300 --form cubic --out out

The form defaults to "standardized", the only one free of the gradients' scale. In a
language model |g| is about 1e-4, and its cube is nothing next to it: the "cubic" form
equals Adam to float32 rounding, and would show Adam twice. The progress lines, the
table's last column and the verdict below it measure that.

This is a demonstration, not a benchmark: one model, one learning rate, one seed. It
makes no claim that AdaM3 wins. Ctrl-C stops the training and reports what there is; a
second one ends at once.
"""

import argparse
import collections
import contextlib
import functools
import io
import re
import signal
import sys
import threading
import time
from argparse import RawDescriptionHelpFormatter as AsWritten
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from adam3_optax import ThirdMomentReport, adam3w, third_moment_report

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 2, 96, 4, 64, 16
FORMS = ("cubic", "stabilized", "standardized")
STATES: dict[str, dict[str, str]] = {  # how m, v and s rest: 12, 8, 6 or 3 bytes in all
    "float32": {},
    "mixed": {"m_dtype": "bfloat16", "s_dtype": "bfloat16"},
    "bfloat16": dict.fromkeys(("m_dtype", "v_dtype", "s_dtype"), "bfloat16"),
    "int8": dict.fromkeys(("m_dtype", "v_dtype", "s_dtype"), "int8"),
}
B1, B2, B3, LAM, TAU = 0.9, 0.999, 0.999, 0.01, 1.0
SHORTEST = 10 * (CONTEXT + 1)  # its last tenth, held out, is one window to validate on
SAMPLE, TEMPERATURE = 400, 0.8
LAG = 16  # a loss is read so many steps late: it is ready by then, and nobody waits
BAR = (
    TextColumn("{task.description:6}"),
    BarColumn(None),
    MofNCompleteColumn(),
    TextColumn("{task.fields[latest]}"),
)


class Corpus(NamedTuple):
    """A text, its characters as indices into its alphabet."""

    alphabet: list[str]
    training: np.ndarray
    held_out: np.ndarray  # windows, evenly spread over the last tenth


@dataclass
class Run:
    """The training with one optimizer, as far as it went."""

    optimizer: str
    form: str
    losses: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)  # by the steps done
    seconds: float = 0.0
    state_bytes: int = 0
    report: ThirdMomentReport | None = None
    params: Any = None

    @property
    def validation_loss(self) -> float:
        """That of the last step."""
        return self.validation[len(self.losses)]


# --- The model ----------------------------------------------------------------------


class Block(nnx.Module):
    """Causal attention, then a feed-forward layer, each behind a norm."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm_1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns features (batch, CONTEXT, WIDTH), as it takes."""
        x = x + self.attend(self.norm_1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class Transformer(nnx.Module):
    """Predicts after each character the next; reads and writes with one embedding."""

    def __init__(self, characters: int, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(characters, WIDTH, rngs=rngs)
        self.position = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List(Block(rngs) for _ in range(LAYERS))
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits (batch, CONTEXT, characters) for tokens (batch, CONTEXT)."""
        x = self.embed(tokens) + self.position(jnp.arange(CONTEXT))
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def loss_of(params: Any, graph: Any, windows: jax.Array) -> jax.Array:
    """Returns the cross-entropy, in nats a character."""
    logits = nnx.merge(graph, params)(windows[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return losses.mean()


@functools.partial(jax.jit, static_argnums=1)
def evaluate(params: Any, graph: Any, windows: jax.Array) -> jax.Array:
    """Returns the mean loss over windows, a few at a time to bound the memory."""
    loss = functools.partial(loss_of, params, graph)
    return jax.lax.map(lambda w: loss(w[None]), windows, batch_size=BATCH).mean()


@functools.partial(jax.jit, static_argnums=1)
def generate(params: Any, graph: Any, prompt: Any, key: jax.Array) -> jax.Array:
    """Returns characters drawn one by one, each from the CONTEXT before it."""
    model = nnx.merge(graph, params)

    def draw(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model(window[None])[0, -1]
        token = jax.random.categorical(key, logits / TEMPERATURE)
        return jnp.append(window[1:], token), token

    return jax.lax.scan(draw, prompt, jax.random.split(key, SAMPLE))[1]


# --- The training -------------------------------------------------------------------


def windows_at(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Returns from each start CONTEXT characters and the one after them."""
    return tokens[starts[:, None] + np.arange(CONTEXT + 1)]


def train(
    run: Run,
    optimizer: optax.GradientTransformation,
    model: tuple[Any, Any],
    corpus: Corpus,
    options: argparse.Namespace,
    interrupted: threading.Event,
    measure: Callable[[Any], ThirdMomentReport] | None,
) -> None:
    """Takes the steps and fills in the run; measures its third moment at each pause."""
    graph, params = model
    params = jax.tree.map(jnp.copy, params)  # the other optimizer starts from them, too
    state = optimizer.init(params)
    run.state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))

    # Donated buffers are handed to the results in order of appearance: parameters to
    # parameters, moments to moments. Gradients put before them would cost a copy.
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, windows: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(params, graph, windows)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    rng = np.random.default_rng(options.seed)
    unread: collections.deque[jax.Array] = collections.deque()
    began = time.perf_counter()
    with Progress(*BAR, expand=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task(run.optimizer, total=options.steps, latest="compiling")
        for done in range(1, options.steps + 1):
            starts = rng.integers(len(corpus.training) - CONTEXT, size=BATCH)
            windows = windows_at(corpus.training, starts)
            params, state, loss = step(params, state, windows)
            unread.append(loss)
            last = done == options.steps or interrupted.is_set()
            pause = last or done == 1 or done % max(10, options.steps // 15) == 0
            while len(unread) > (0 if pause else LAG):
                run.losses.append(float(unread.popleft()))
            if pause:
                run.validation[done] = float(evaluate(params, graph, corpus.held_out))
                run.report = measure(state) if measure else None
            if done == 1:
                began = time.perf_counter()  # leaves the compilation out
            run.seconds = time.perf_counter() - began
            rate = (done - 1) / max(run.seconds, 1e-9)
            latest = f"loss {run.losses[-1]:.3f}  {rate:.0f} steps/s{ratio_of(run)}"
            bar.update(task, completed=done, latest=latest)
            if pause and bar.disable:  # lines where there is no terminal for a bar
                line = f"{run.optimizer:6}  step {done:>5}  {latest}"
                print(f"{line}  validation {run.validation[done]:.3f}", flush=True)
            if last:
                break
    run.params = params


def ratio_of(run: Run) -> str:
    """Returns the last median of |b_t|/|m̂|, and nothing without a third moment."""
    if run.report is None:
        return ""
    return f"  |b|/|m̂| {float(run.report.rows.ratio[0]):.1e}"


@contextlib.contextmanager
def first_interrupt_noted() -> Iterator[threading.Event]:
    """Yields what the first Ctrl-C sets, and does no more: no step is cut in half."""
    noted = threading.Event()

    def note(*_: object) -> None:
        noted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


# --- The report ---------------------------------------------------------------------


def table_of(runs: list[Run]) -> Table:
    """Returns the numbers."""
    table = Table("optimizer", "form", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.show_edge = False
    ratio = "median\n|b|/|m̂|"
    for heading in ("steps", "train\nloss", "valid.\nloss", "seconds", "state", ratio):
        table.add_column(heading, justify="right")
    for run in runs:
        table.add_row(
            run.optimizer,
            run.form,
            f"{len(run.losses):,}",
            f"{np.mean(run.losses[-50:]):.4f}",
            f"{run.validation_loss:.4f}",
            f"{run.seconds:.1f}",
            decimal(run.state_bytes),
            ratio_of(run).rpartition(" ")[2] or "-",
        )
    return table


def headline(runs: list[Run]) -> str:
    """Returns the result in words."""
    ours, theirs = runs[0], runs[-1]
    losses = [f"{run.validation_loss:.3f}" for run in runs]
    if len(runs) == 1 or len(theirs.losses) < len(ours.losses):
        ends = (f"{run.optimizer} step {len(run.losses):,}" for run in runs)
        return f"Interrupted: {', '.join(ends)}; validation loss {', '.join(losses)}"
    gap = float(losses[0]) - float(losses[1])  # as the reader would subtract
    where = f"{abs(gap):.3f} {'above' if gap > 0 else 'below'}" if gap else "level with"
    names = f"One seed: {ours.optimizer} ends {where} {theirs.optimizer}"
    return f"{names}: validation loss {losses[0]} against {losses[1]}"


def smooth(losses: list[float], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and the mean of so many losses about each."""
    means = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    return np.arange(len(means)) + (width + 1) / 2, means


def draw(runs: list[Run], path: Path) -> None:
    """Writes the figure: the losses and, where there are two, their difference."""
    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    heights = (5, 2)[: len(runs)]
    panels = figure.subplots(len(runs), sharex=True, height_ratios=heights)
    upper, lower = panels if len(runs) == 2 else (panels, panels)
    # One width for all, or runs of different lengths would look different.
    width = min(25, 1 + min(len(run.losses) for run in runs) // 20)
    # One curve may hide the other: the second is dashed, and its dots sit in rings.
    styles = ({"ls": "-", "ms": 9, "mfc": "none"}, {"ls": "--", "ms": 4})
    for run, colour, style in zip(runs, ("C3", "C0"), styles, strict=False):
        label = f"{run.optimizer} {run.form}".strip(" -")
        upper.plot(*smooth(run.losses, width), style.pop("ls"), c=colour, label=label)
        points = zip(*run.validation.items(), strict=True)
        upper.plot(*points, "o", c=colour, label="validation", **style)
    if len(runs) == 2:
        a, b = runs
        gaps = [x - y for x, y in zip(a.losses, b.losses, strict=False)]
        steps = [step for step in a.validation if step in b.validation]
        lower.axhline(0, c="0.8")
        lower.plot(*smooth(gaps, width), c="0.5")
        lower.plot(steps, [a.validation[i] - b.validation[i] for i in steps], "k.")
        lower.set_ylabel(f"{a.optimizer}\nminus {b.optimizer}")
    for panel in (upper, lower):
        panel.spines[["top", "right"]].set_visible(False)
    upper.set_title(headline(runs), loc="left", weight="bold", size="medium")
    upper.set_ylabel("loss, nats a character")
    upper.legend(frameon=False, ncols=2)
    lower.set_xlabel("step (lines: training, smoothed)")
    figure.align_ylabels()
    figure.savefig(path)


# --- The command line ---------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Ends with status 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """Returns a parser of a number within bounds."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        wanted = f"a {'whole ' * (kind is int)}number from {low:g} to {high:g}"
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")

    return parse


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Corpus]:
    """Returns options and text, all checked: no mistake surfaces after the training."""
    parser = Parser("char_lm.py", description=__doc__, formatter_class=AsWritten)
    add = parser.add_argument
    add("--text", type=Path, help="a UTF-8 file; default: Python's help topics")
    add("--steps", type=number(int, 1, 1e9), default=1500, help="default: %(default)s")
    add("--seed", type=number(int, 0, 1e9), default=0, help="default: %(default)s")
    add("--form", choices=FORMS, default=FORMS[-1], help="default: %(default)s")
    add("--state", choices=STATES, default="float32", help="default: %(default)s")
    add(
        "--lr", type=number(float, 1e-9, 1e3), default=4e-3, help="default: %(default)s"
    )
    add("--out", type=Path, default=Path("out"), help="a folder; default: %(default)s")
    options = parser.parse_args(argv)
    options.figure = options.out / "char_lm.png"
    options.sample = options.out / "char_lm.txt"
    try:
        corpus = load(options.text)
        options.out.mkdir(parents=True, exist_ok=True)
        for path in (options.figure, options.sample):
            path.open("ab").close()  # fails here rather than after the training
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        parser.error(f"{options.text}: {error}")
    return options, corpus


def load(path: Path | None) -> Corpus:
    """Returns a file, or the topics of Python's help; the last tenth is held out."""
    if path is None:  # without its rulers
        text = re.sub(r"([=*])\1{3,}", r"\1\1\1", "\n".join(topics.values()))
    else:
        text = path.read_text("utf-8-sig")
    if "\0" in text:
        raise ValueError("not a text, for it contains a NUL")
    if len(text) < SHORTEST:
        raise ValueError(f"{len(text)} characters, but {SHORTEST} are needed")
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    alphabet, tokens = np.unique(codes, return_inverse=True)
    if len(alphabet) < 2:
        raise ValueError("one character over and over: there is nothing to learn")
    training, rest = np.split(tokens.astype(np.int32), [-(len(tokens) // 10)])
    count = min(512, len(rest) // CONTEXT)
    starts = np.linspace(0, len(rest) - CONTEXT - 1, count, dtype=int)
    return Corpus([chr(c) for c in alphabet], training, windows_at(rest, starts))


def main(argv: list[str] | None = None) -> int:
    """Trains, reports and returns the exit status."""
    options, corpus = parse(argv)
    warm_up = min(100, options.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, options.lr, warm_up, options.steps, end_value=options.lr / 10
    )
    resting: dict[str, Any] = STATES[options.state]
    rule: dict[str, Any] = {"b1": B1, "b2": B2, "b3": B3, "lam": LAM, "tau": TAU}
    rule["third_moment"] = options.form
    report = functools.partial(third_moment_report, **rule)
    arms = (
        ("AdaM3W", options.form, adam3w(rate, **rule, **resting), report),
        ("AdamW", "-", optax.adamw(rate, B1, B2), None),
    )
    runs: list[Run] = []
    with first_interrupt_noted() as interrupted:
        model = nnx.split(Transformer(len(corpus.alphabet), nnx.Rngs(options.seed)))
        for name, form, optimizer, measure in arms:
            if not (runs and interrupted.is_set()):
                runs.append(Run(name, form))
                arguments = (model, corpus, options, interrupted, measure)
                train(runs[-1], optimizer, *arguments)
        console = Console()
        console.print("", table_of(runs), f"{headline(runs)}.", sep="\n")
        if runs[0].report:
            console.print(runs[0].report.verdict())
        draw(runs, options.figure)
        key = jax.random.key(options.seed)
        tokens = generate(runs[0].params, model[0], corpus.held_out[0, :-1], key)
        sample = "".join(corpus.alphabet[token] for token in tokens.tolist())
        options.sample.write_text(sample + "\n", encoding="utf-8")
        console.print(Panel(Text(sample), title=f"{runs[0].optimizer}'s model writes"))
        print(f"Loss curves: {options.figure}\nSample: {options.sample}")
    return 130 if interrupted.is_set() else 0


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample may be in any script
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
