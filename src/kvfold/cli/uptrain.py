"""`kvfold uptrain`: weights whose keys and values a joint latent holds without loss (EliteKV)."""

from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli import common


def uptrain_command(
    out: Annotated[Path, typer.Option("--out", help="The folder to make: weights, tokenizer, calibration.")],
    model: common.Model = "smollm2-135m-instruct",
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Of `kvfold calibrate elitekv`; else the one that is found.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Numbers of a token's latent.")] = None,
    texts: Annotated[Path | None, typer.Option("--texts", help="Running text, a file or folder.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=0, help="Of training; 0 converts and trains nothing.")] = 100,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Texts of a step.")] = 1,
    length: Annotated[int | None, typer.Option("--length", min=64, help="Tokens of a text.")] = None,
    rate: Annotated[float, typer.Option("--rate", help="AdamW's, at its highest.")] = 1e-4,
    seed: Annotated[int, typer.Option("--seed", help="Of the texts' order.")] = 0,
    dtype: common.Dtype = None,
    device: common.Device = "cpu",
    json: common.Json = False,
) -> None:
    """Convert a model for elitekv and train it on running text; a folder that it made is trained further.

    The folder is made whole or not at all, when all steps are done. kvfold.Cache(model, "elitekv") finds the
    calibration beside the weights.
    """
    from dataclasses import replace

    from kvfold import artefacts
    from kvfold.calibration import Run
    from kvfold.calibration.uptrain import uptrain
    from kvfold.evaluation.tasks.base import Setting
    from kvfold.evaluation.tasks.texts import documents
    from kvfold.files import check_new, write_folder
    from kvfold.methods.elitekv import BESIDE, EliteKV
    from kvfold.models.load import load

    check_new(out, "out")
    found = documents(Setting(tokenizer=None, texts=texts))
    lm, tokenizer = load(model, dtype=dtype, device=device)
    chosen = EliteKV(rank, None if calibration is None else str(calibration)).bind(lm)
    artefact = artefacts.read("elitekv", str(chosen.calibration))
    run = Run(lm, tokenizer, found, seed, steps, length, tick=lambda line: print(line, file=common.stderr.file))
    made = uptrain(run, artefact, chosen.own_frame, batch=batch, rate=rate)
    named = replace(made.artefact, model={**made.artefact.model, "name": out.name})

    def fill(folder: Path) -> None:
        lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        artefacts.save(named, folder / BESIDE)

    write_folder(out, fill, "out")
    if json:
        common.print_json({"path": str(out), "loss": made.losses, "provenance": named.provenance})
    else:
        said = ", ".join(f"{name} {value:.4f}" for name, value in made.losses.items())
        print(f"{out}: loss on text that was held back: {said}")
