"""`kvfold calibrate`: measure what a method needs to know of a model."""

from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli import common


def calibrate_command(
    method: Annotated[
        str,
        typer.Argument(
            help="a2ats, attention-gate, compresskv, duoattention, elitekv, epicache, headkv, kvquant, less, "
            "nosa, razorattention, turboquant; memory: what --memory chooses formats by."
        ),
    ],
    model: common.Model = "smollm2-135m-instruct",
    out: Annotated[Path | None, typer.Option("--out", help="The file; else where kvfold looks for it.")] = None,
    texts: Annotated[Path | None, typer.Option("--texts", help="Running text, a file or folder.")] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Prompts, or steps of training.")] = None,
    length: Annotated[int | None, typer.Option("--length", min=64, help="Tokens of the longest prompt.")] = None,
    pairs: Annotated[int | None, typer.Option("--pairs", min=1, help="elitekv: rotary pairs a head keeps.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="elitekv: numbers of a token's latent.")] = None,
    codes: Annotated[int | None, typer.Option("--codes", min=1, help="a2ats: vectors of a head's codebook.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of prompts and random text.")] = 0,
    dtype: common.Dtype = None,
    device: common.Device = "cpu",
    json: common.Json = False,
) -> None:
    """Measure head roles, scores, errors, levels or bases of a model, and keep them where kvfold.Cache finds them."""
    from dataclasses import asdict, replace

    from kvfold.artefacts import TABLES, TENSORS, save
    from kvfold.calibration import CALIBRATIONS, TRAINED, Run, calibrate
    from kvfold.evaluation.tasks.base import Setting
    from kvfold.evaluation.tasks.texts import documents
    from kvfold.methods import get_method
    from kvfold.models.load import load

    if method not in CALIBRATIONS:
        get_method(method)  # raises for a name that no method has
        raise ValueError(f"method={method!r} needs no calibration; those that do: {', '.join(CALIBRATIONS)}")
    for owner, name, value in (("elitekv", "pairs", pairs), ("elitekv", "rank", rank), ("a2ats", "codes", codes)):
        if value is not None and method != owner:
            raise ValueError(f"{name}={value} is an option of {owner} alone, not of {method}")
    suffix = TENSORS if method in TRAINED else TABLES
    if out is not None and out.suffix != suffix:
        raise ValueError(f"out={str(out)!r} must end in {suffix}")
    found = documents(Setting(tokenizer=None, texts=texts))
    lm, tokenizer = load(model, dtype=dtype, device=device)
    with common.stderr.status("") as status:
        made = calibrate(
            method,
            Run(
                lm,
                tokenizer,
                found,
                seed,
                samples,
                length,
                pairs,
                rank,
                codes,
                tick=lambda what: status.update(f"{method}: {what}"),
            ),
            name=Path(model).name,
        )
    path = save(made, out)
    if json:
        shown = {name: list(x.shape) for name, x in made.data.items()} if method in TRAINED else made.data
        common.print_json({"path": str(path), **asdict(replace(made, data=shown))})
    else:
        about = made.model
        line = f"{path}: {about['layers']} layers, {about['kv_heads']} KV heads of {about['name']}"
        print(line)
