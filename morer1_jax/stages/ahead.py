"""Compiles the programs of a run's stages ahead, in threads, before a stage begins.

JAX keeps what `jitted.lower(*shapes).compile()` compiles with `jitted` itself, so that a later call
with such arguments neither traces nor compiles. Hence a stage takes the very functions that were
compiled for it, from `Run.prepared` or the run's samplers; shapes, dtypes and shardings are those
of the call. Another function of the same program would find it in the cache of `run.cache` only,
into which of several processes the first alone writes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import jax

from morer1_jax.batch import PromptBatch
from morer1_jax.data.shapes import Shape
from morer1_jax.errors import one_line
from morer1_jax.hosts.stop import check_stop
from morer1_jax.learn.trainable import join
from morer1_jax.model.vlm import split_tower
from morer1_jax.progress import progress
from morer1_jax.run.batch_sampler import BatchSampler
from morer1_jax.run.mesh import like_on
from morer1_jax.run.placed import Placed
from morer1_jax.run.setup import Run
from morer1_jax.stages import largest
from morer1_jax.task.fact import Fact

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile.

    Attributes:
        name: says its shapes, too: what has the same name is the same.
        compile: compiles it for good.
    """

    name: str
    compile: Callable[[], object]

    @classmethod
    def of(cls, name: str, jitted: Any, *like: Any) -> Program:
        """Returns the program of a jitted function for arguments, or shapes with shardings."""
        return cls(name, lambda: jitted.lower(*like).compile())


def in_threads(calls: Sequence[Callable[[], T]], threads: int) -> Iterator[tuple[int, T]]:
    """Yields each call's place and result as soon as it has one; calls begin in their order.

    Several processes that compile the same programs in one order do not wait for each other in a
    circle, though a compiler may exchange what it measured: the first program that is not done
    everywhere has been begun everywhere, since threads that had those before it are free.

    Raises:
        Exception: what a call raises. Calls that have not begun are dropped, the others waited for.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="compile")
    try:
        places = {pool.submit(call): place for place, call in enumerate(calls)}
        for future in as_completed(places):
            yield places[future], future.result()
    finally:
        # Those that have begun cannot be left: the process would wait for them at its end, when it
        # no longer belongs to the run's others.
        pool.shutdown(wait=True, cancel_futures=True)


def compile_programs(programs: Iterable[Program], threads: int) -> None:
    """Compiles programs, each name once, and says of each how long it took.

    Raises:
        RuntimeError: a program does not compile; the message names it.
        Stopped: the run was told to stop.
    """
    named = list({program.name: program for program in programs}.values())

    def seconds_of(program: Program) -> float:
        before = time.perf_counter()
        try:
            program.compile()
        except Exception as error:
            message = f"compiling {program.name}: {one_line(error)}"
            raise RuntimeError(message) from error
        return time.perf_counter() - before

    calls = [lambda program=program: seconds_of(program) for program in named]
    with progress(desc="compile ahead", total=len(named), unit="program") as bar:
        for place, seconds in in_threads(calls, threads):
            bar.write(f"compiled {named[place].name}: {seconds:.1f} s")
            bar.update()
            # As often in every process, whatever the order in which programs are ready.
            check_stop()


def answers(run: Run, name: str, sampler: BatchSampler, facts: Sequence[Fact]) -> Iterator[Program]:
    """Yields the programs with which a sampler answers facts, the parameters' moves among them.

    Args:
        name: of the sampler, for which it always is the same.
    """
    placed, policy = run.trainee.placed, run.trainee.policy
    yield from moves(placed)
    for shape in sampler.shapes(facts):
        prompts = prompts_like(run, sampler.batch, shape)
        yield from images(placed, prompts)
        given = placed.sampling.given, encoded(placed, prompts), policy.grammar, policy.allowed
        yield Program.of(f"{name}, {_rows(sampler.batch, shape)}", sampler.program, *given)


def moves(placed: Placed) -> Iterator[Program]:
    """Yields, as one, the programs that move parameters to the sampler's layout, if there are."""
    moved = [(placed.sampling.move(number), like) for number, like in placed.sampling.moved.items()]
    if moved:
        yield Program(
            "moves to the sampler",
            lambda: [move.lower(like).compile() for move, like in moved],
        )


def images(placed: Placed, prompts: PromptBatch) -> Iterator[Program]:
    """Yields the vision tower's program for a batch of prompts, if `Placed.encode` runs it."""
    if encoded(placed, prompts).vision is not prompts.vision:
        tower, index = split_tower(_whole(placed))[0], prompts.vision_index
        rows, slots = prompts.vision.patches.shape[:2]
        name = f"images, {rows} × {slots} windows for {len(index)} rows of {index.shape[1]}"
        yield Program.of(name, placed.tower, tower, prompts.vision, index)


def encoded(placed: Placed, prompts: PromptBatch) -> PromptBatch:
    """Returns what `Placed.encode` makes of prompts, as shapes with shardings."""
    like = jax.eval_shape(placed.encode, _whole(placed), prompts)
    if type(like.vision) is type(prompts.vision):
        return prompts
    return like_on(like, placed.rows)


def prompts_like(run: Run, rows: int, shape: Shape) -> PromptBatch:
    """Returns a batch of prompts of the run, as shapes with shardings."""
    placed = run.trainee.placed
    batch = largest.prompts(run.settings.data, placed.model, rows, shape=shape)
    return like_on(batch, placed.rows)


def _whole(placed: Placed) -> Any:
    return join(placed.like, placed.like_frozen)


def _rows(rows: int, shape: Shape) -> str:
    return f"{rows} rows of {shape.length} with {shape.slots} windows for {shape.sharing}"
