"""Evaluation of a model while it trains."""

from __future__ import annotations

from data_tools.tokenizer import load_tokenizer
from lasptrain.eval import report
from lasptrain.eval.inference import Reader
from lasptrain.eval.runner import EvalConfig, EvalRunner, Record
from lasptrain.models.language_model import LanguageModel
from lasptrain.parallel.mesh import Mesh
from lasptrain.recipe.schema import Recipe


def evaluate_in_training(model: LanguageModel, recipe: Recipe, mesh: Mesh) -> list[Record]:
    """Run the recipe's `eval.tasks`; cells of a report on rank 0 of each sp group. The model is whole on every rank."""
    lengths = recipe.eval.lengths or (recipe.data.window,)
    asked = EvalConfig(recipe.eval.tasks, lengths, samples=recipe.eval.samples)
    questions = EvalRunner(asked, load_tokenizer(recipe.data.tokenizer))
    records = questions.answers(Reader(model, mesh), set(), mesh.rank("sp") == 0, lambda _: None)
    return report.cells(record for record in records if "tokens" in record)
