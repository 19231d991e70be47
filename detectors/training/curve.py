"""The learning curve as table and picture."""

import csv
from pathlib import Path
from typing import Any


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """One row a validation."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def learning_curve(
    history: list[dict[str, Any]], path: Path, measure: str = "AUC", lowest: float = 0.5
) -> None:
    """Writes a PNG over epochs: losses on the left axis, the validation `measure` (a row's `val_<measure>` in
    small letters), `lowest` to 1, on the right one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot()
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["train_loss"] for row in history], label="training loss (all terms)")
    left.plot(epochs, [row["val_loss"] for row in history], label="validation loss")
    left.set(xlabel="epoch", ylabel="loss")
    right = left.twinx()
    right.plot(
        epochs, [row[f"val_{measure.lower()}"] for row in history], "k.-", label=f"validation {measure}"
    )
    right.set(ylabel=measure, ylim=(lowest, 1))
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=120)
