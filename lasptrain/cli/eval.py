"""`lasptrain eval` and `lasptrain generate`. torch is imported late."""

import re
from pathlib import Path
from typing import Annotated

import typer

from lasptrain.console.figures import figure_class
from lasptrain.console.stdio import argument, escape_controls
from lasptrain.console.tables import show
from lasptrain.errors import RecipeError

LONGEST = 1 << 30  # tokens of a text
LARGEST_TEXT = 1 << 30  # bytes
USUAL_SAMPLES = 5
DEFAULT = ("passkey", "niah_multikey_2", "vt", "copy", "ppl_by_position", "ppl_vs_context")

Run = Annotated[Path, typer.Argument(metavar="RUN|DIR", help="A run, an export, or a folder of others.")]
Nproc = Annotated[int | None, typer.Option(min=1, help="Ranks that read each text together; one per GPU, or 1.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("eval")(evaluate)
    app.command()(generate)


def evaluate(
    run: Run,
    tasks: Annotated[str | None, typer.Option(metavar="A,B,…", help="Tasks, or all; a wrong one lists them.")] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="4k..4m", help="Tokens: 4k,64k or a range by factors of 4.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--n", min=1, help="Samples of each task and length, rows of a file.", show_default="5, all rows"),
    ] = None,
    depths: Annotated[int, typer.Option(min=1, help="Places of a single needle, from 0 to 100 %.")] = 10,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    control: Annotated[bool, typer.Option("--control", help="Also without what answers the question.")] = False,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Text for haystacks, instead of noise.")] = None,
    files: Annotated[
        list[Path] | None, typer.Option("--file", metavar="FILE", help="RULER rows, SQuAD, or JSONL of prompts.")
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option("--ruler-predictions", metavar="DIR", help="Also TASK.jsonl, for RULER's evaluate.py."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="RUN/eval/step-N if not given.")] = None,
    segment: Annotated[int, typer.Option(min=1, help="Tokens that each rank has in work at a time.")] = 32768,
    plot: Annotated[bool, typer.Option("--plot", help="Draw heatmap.png and curves.png (extra plot).")] = False,
    nproc: Nproc = None,
) -> None:
    """Ask a trained model long-context tasks; the same command again continues where it stopped."""
    from lasptrain.eval import load, main
    from lasptrain.eval.runner import PERPLEXITY, EvalConfig
    from lasptrain.eval.tasks import TASKS
    from lasptrain.eval.tasks.files import open_files

    if plot:
        figure_class()  # a missing matplotlib is told before the questions, not after them
    chosen = DEFAULT if tasks is None else tuple(part.strip() for part in tasks.split(",") if part.strip())
    if tasks == "all":
        chosen = (*TASKS, *PERPLEXITY)
    if files and tasks is None:
        chosen = ()
        if lengths is not None:
            raise RecipeError("--lengths: the rows of files have lengths of their own; expected it with --tasks")
    asked = EvalConfig(
        tasks=chosen,
        lengths=_usual_lengths(load.window(run)) if lengths is None else parse_lengths(lengths),
        samples=samples or USUAL_SAMPLES,
        depths=depths,
        seed=seed,
        control=control,
        text=() if text is None else tuple(_sentences(text)),
        files=open_files(files, load.tokenizer(run)) if files else (),
        rows=samples,
    )
    if not asked.tasks and not asked.files:
        raise RecipeError("--tasks: found none; expected at least one")
    found = main.evaluate(run, asked, out, segment, nproc, predictions)
    if not any(asked.covers(cell["task"], cell["length"]) for cell in found["cells"]):
        raise RecipeError("; ".join(found["notes"]) or "found nothing to ask; expected a task")
    show(*main.shown(found, plot))


def generate(
    run: Run,
    prompts: Annotated[list[str], typer.Option("--prompt", help="Text to continue; several make a batch.")],
    tokens: Annotated[int, typer.Option(min=1, max=LONGEST, help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Only from the likeliest that reach this.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1)] = 0,
) -> None:
    """Continue a text."""
    from lasptrain.eval import main

    prompts = [argument("--prompt", prompt) for prompt in prompts]
    for prompt, continued in zip(prompts, main.generate(run, prompts, tokens, temperature, top_p, seed), strict=True):
        typer.echo(escape_controls(prompt) + typer.style(escape_controls(continued), bold=True))


def _usual_lengths(window: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys((max(window // 4, 512), window)))


def parse_lengths(text: str) -> tuple[int, ...]:
    """Parse `4k,64k` or `4k..4m`, a range by factors of 4 with its end, into numbers of tokens. K is 1,024."""
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        length, end = _tokens(first), _tokens(last if dots else first)
        if end < length:
            raise RecipeError(f"--lengths: found {part!r}; expected the shorter one first, such as 4k..4m")
        while length < end:
            found.append(length)
            length *= 4
        found.append(end)
    return tuple(dict.fromkeys(found))


def _tokens(text: str) -> int:
    match = re.fullmatch(r"(\d+)([km]?)", text.strip().lower())
    if match is None or int(match[1]) == 0:
        raise RecipeError(f"--lengths: found {text!r}; expected numbers such as 4096, 4k or 1m, or a range 4k..4m")
    length = int(match[1]) << {"": 0, "k": 10, "m": 20}[match[2]]
    if length > LONGEST:
        raise RecipeError(f"--lengths: found {text!r}; expected at most {LONGEST >> 20}m")
    return length


def _sentences(file: Path) -> list[str]:
    from lasptrain.errors import DataError
    from lasptrain.files import read

    try:
        content = read(file, LARGEST_TEXT).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"--text: {file}: {reason}; expected a text file") from None
    sentences = [sentence for sentence in re.split(r"(?<=[.!?])\s+", content) if sentence.strip()]
    if not sentences:
        raise DataError(f"--text: {file}: found no sentence; expected text")
    return sentences
