"""Peak memory of an optimizer: parameters, gradients, state and a few donated steps.

Each optimizer has a process of its own. On a GPU its allocator says what the peak was;
on a CPU the operating system does, and what the process held before its first array
(the libraries, the compiled step) is subtracted. Results are added to results.jsonl.

    python benchmarks/memory.py --only adam3
"""

import argparse
import functools
import json
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
import common

STEPS = 3


def measured(name: str, parameters: int, dtype: str) -> dict[str, Any]:
    """Returns the peak of this process, in which nothing else has happened."""
    sizes = common.Sizes(parameters)
    tree = common.tree_of("one", sizes, dtype)
    optimizer = common.optimizers()[name]()
    step = common.donated_step(optimizer)
    step.lower(tree, jax.eval_shape(optimizer.init, tree), tree).compile()
    device = jax.devices()[0]
    before = resident() if device.platform == "cpu" else 0
    params, gradients = (
        jax.tree.map(lambda x, fill=fill: jnp.full(x.shape, fill, x.dtype), tree)
        for fill in (1.0, 0.01)
    )
    state = optimizer.init(params)
    for _ in range(STEPS):
        params, state = step(params, state, gradients)
    jax.block_until_ready((params, state))
    statistics = device.memory_stats()
    if device.platform == "cpu":
        peak = peak_resident() - before
    else:
        peak = statistics["peak_bytes_in_use"]
    count = common.elements(tree)
    return {
        "leaves": len(tree),
        "parameters": count,
        "arrays_bytes": common.nbytes((params, state, gradients)) / count,
        "peak_bytes": peak / count,
        "before": before,
    }


def resident() -> int:
    """Returns the bytes that this process holds now; at its peak, where unknown."""
    status = process_status()
    return status["VmRSS"] if status else peak_resident()


def peak_resident() -> int:
    """Returns the most bytes that this process has held."""
    status = process_status()
    if status:  # ru_maxrss is here that of the parent, if it was larger
        return status["VmHWM"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def process_status() -> dict[str, int]:
    """Returns what Linux says of this process's memory, in bytes; elsewhere nothing."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = (line.split() for line in lines)
    return {x[0][:-1]: int(x[1]) * 1024 for x in fields if x[2:] == ["kB"]}


def child(*arguments: str) -> Any:
    """Returns what a fresh process prints: facts, or a measurement.

    Raises:
        RuntimeError: It failed; the message is its last line.
    """
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise RuntimeError(f"{' '.join(arguments)}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    """Measures, and returns the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = common.Parser("memory.py", description=__doc__, formatter_class=raw)
    common.add_common(parser)
    options = parser.parse_args(argv)
    common.settle(parser, options)
    console = Console(highlight=False)
    say = functools.partial(console.print, markup=False, soft_wrap=True)
    parameters = options.sizes.parameters
    failed = False
    try:
        # Of a process that ends, for this one must not take the accelerator's memory.
        record = common.Record(options.out, child("facts"))
        cells = [
            (name, dtype)
            for dtype in options.dtypes or common.DTYPES[:1]
            for name in common.chosen(options, common.optimizers())
        ]
        with common.bar(console) as progress:
            task = progress.add_task("")
            for name, dtype in progress.track(cells, task_id=task):
                progress.update(task, description=f"{name}, {dtype}")
                try:
                    result = child(name, str(parameters), dtype)
                except RuntimeError as error:  # out of memory, say; others may fit
                    say(f"not measured: {error}")
                    failed = True
                    continue
                cell = {"tree": "one", "dtype": dtype, "arm": name}
                record.append({"measure": "memory", **cell, **result})
                say(f"{name}, {dtype}: peak {result['peak_bytes']:.1f} B a parameter")
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        say(f"Interrupted. What was measured is in {options.out / 'results.jsonl'}")
        return 130
    say(f"Record: {record.path}")
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--child", "facts"]:
        print(json.dumps(common.facts()))
    elif sys.argv[1:2] == ["--child"]:
        print(json.dumps(measured(sys.argv[2], int(sys.argv[3]), sys.argv[4])))
    else:
        sys.exit(main())
