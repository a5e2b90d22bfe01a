"""Histograms of what was kept, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from raylign.data.prepare.keys import Keys

SCORES_NAME = "scores.png"
LENGTHS_NAME = "lengths.png"
BINS = 50
SHOWN_NAME = 60


def lengths_picture(keys: Keys, kept: NDArray[np.bool_], path: Path) -> None:
    """Characters of prompts and answers on a logarithmic axis."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    columns = {"prompt": keys.prompt_chars, "chosen": keys.chosen_chars, "rejected": keys.rejected_chars}
    values = {name: np.maximum(column.view()[kept], 1) for name, column in columns.items()}
    every = np.concatenate(list(values.values()))
    bins = np.geomspace(every.min(), every.max() + 1, BINS).tolist()
    for name, lengths in values.items():
        axes.hist(lengths, bins=bins, histtype="step", label=name)
    axes.set(xscale="log", xlabel="characters", ylabel="pairs", title="Lengths of kept pairs")
    axes.legend()
    _save(figure, path)


def scores_picture(keys: Keys, kept: NDArray[np.bool_], names: Sequence[str], path: Path) -> bool:
    """For each source with scores: both scores, and their difference. Without any no file is made; says which."""
    chosen, rejected = keys.score_chosen.view(), keys.score_rejected.view()
    scored = kept & ~np.isnan(chosen) & ~np.isnan(rejected)
    sources = [number for number in range(len(names)) if (scored & (keys.source.view() == number)).any()]
    if not sources:
        return False
    figure = Figure(figsize=(10, 3 * len(sources)), layout="constrained")
    for axes, number in zip(figure.subplots(len(sources), 2, squeeze=False), sources, strict=True):
        rows = scored & (keys.source.view() == number)
        both = (chosen[rows], rejected[rows])
        axes[0].hist(both, bins=BINS, histtype="step", label=("chosen", "rejected"))
        axes[0].set(title=_shown(names[number]), xlabel="score", ylabel="pairs")
        axes[0].legend()
        axes[1].hist(both[0] - both[1], bins=BINS)
        axes[1].set(title="chosen less rejected", xlabel="score", ylabel="pairs")
    _save(figure, path)
    return True


def _shown(name: str) -> str:
    """The end of a long name; a dollar sign would begin a formula."""
    short = name if len(name) <= SHOWN_NAME else f"...{name[-SHOWN_NAME:]}"
    return short.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")
