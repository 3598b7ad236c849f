"""Load a model and its tokenizer: a bundled name, a folder, a GGUF file (converted once) or a hub id."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import model_info, try_to_load_from_cache
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvfold.models.bundled import BUNDLED, Bundled, Card, fetch, folder_of, make_once, sha256_of, write_card
from kvfold.models.gguf import convert, header, silent
from kvfold.models.sizes import check_sizes

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

HUB_KWARGS = {
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
}
"""Which of the arguments for `from_pretrained` the tokenizer takes, too."""


def load(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    **from_pretrained_kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in eval mode on `device`, and its tokenizer, which pads on the left and has a pad token.

    `name` is a bundled model, a folder, a .gguf file, or a hub id; a folder that is named like a bundled
    model is written `./name`. Bundled models and GGUF files are converted to float32 safetensors on first
    use, in the folder that `bundled.store` names. `dtype=None` is float32 on the CPU and the checkpoint's own
    elsewhere (a converted GGUF's own is float32). `progress` shows on stderr what is going on.

    Raises ValueError for a `dtype`, `device`, `name` or file that can't be used (before anything is fetched),
    OSError for a hub id or a folder that can't be loaded, and FetchError if a wheel can't be fetched.
    """
    wanted = checked_device(device)
    if "device_map" in from_pretrained_kwargs and wanted.type != "cpu":
        raise ValueError(f"device={str(device)!r} must be left out where device_map is given")
    kind = checked_dtype(dtype, wanted)
    if "gguf_file" in from_pretrained_kwargs:
        raise ValueError("gguf_file must be left out: give the path of the .gguf file as `name`")
    place = find(name)
    if isinstance(place, Bundled):
        place = convert_bundled(place, progress)
    elif isinstance(place, Path) and place.is_file():
        place = convert_gguf(place, progress)

    hub = {key: from_pretrained_kwargs[key] for key in HUB_KWARGS & from_pretrained_kwargs.keys()}
    if isinstance(place, str):
        check_hub(place, **hub)
    try:
        with nullcontext() if progress else silent():
            if isinstance(place, Path):
                check_sizes(name, AutoConfig.from_pretrained(place, **hub))
            tokenizer = read_tokenizer(place, hub)
            model = AutoModelForCausalLM.from_pretrained(place, dtype=kind, **from_pretrained_kwargs)
    except OSError as error:
        if isinstance(place, Path):
            raise
        raise OSError(f"{unknown(name)}; as a hub id it fails: {error}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers and safetensors meet in a folder
        raise OSError(f"name={os.fspath(name)!r} can't be loaded: {type(error).__name__}: {error}") from error
    tokenizer.padding_side = "left"  # the files don't keep it; new tokens follow the prompt in every row
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if "device_map" not in from_pretrained_kwargs:
        model = model.to(wanted)
    return model.eval(), tokenizer


def read_tokenizer(place: Path | str, hub: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a hub id. Raises OSError for one that transformers can't make."""
    try:
        return AutoTokenizer.from_pretrained(place, **hub)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise OSError(f"name={str(place)!r} has no tokenizer that transformers can read: {error}") from error


def check_hub(name: str, *, token: Any = None, local_files_only: bool = False, **_: Any) -> None:
    """Ask the hub once whether it knows a name: what follows asks many times, and waits between them.

    Raises OSError where it does not, or can't be asked; not for a name whose files have been fetched before.
    """
    if local_files_only or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        model_info(name, token=token, timeout=10)
    except Exception as error:  # of whichever client the hub's library has
        raise OSError(f"{unknown(name)}; as a hub id it fails: {str(error).strip().splitlines()[0]}") from error


def checked_device(device: str | torch.device) -> torch.device:
    """`device` as torch has it. Raises ValueError if this machine has no such device."""
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted, dtype=torch.float32)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        why = str(error).strip().split("\n")[0].split(". ")[0]  # torch goes on with all that it was built with
        raise ValueError(f"device={device!r} must be a device that torch has here: {why}") from error
    if wanted.type == "meta":
        raise ValueError(f"device={device!r} must be a device that holds numbers")
    return wanted


def checked_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | str:
    """What `from_pretrained` takes as dtype. Raises ValueError unless it is "auto" or a known float type."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    wanted = DTYPES.get(dtype.removeprefix("torch."), dtype) if isinstance(dtype, str) else dtype
    if wanted == "auto" or wanted in DTYPES.values():
        return wanted
    raise ValueError(f"dtype={dtype!r} must be 'auto' or one of {', '.join(DTYPES)}")


def unknown(name: str | os.PathLike[str]) -> str:
    """The message for a name that leads nowhere."""
    near = get_close_matches(os.fspath(name), BUNDLED, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    kinds = f"a bundled model ({', '.join(BUNDLED)}), a folder, a .gguf file or a hub id"
    return f"name={os.fspath(name)!r} must be {kinds}{hint}"


def find(name: str | os.PathLike[str]) -> Bundled | Path | str:
    """What `name` means: a bundled model, a folder with a config, a GGUF file or (as it is) a hub id.

    Raises ValueError if it can be none of them.
    """
    text = os.fspath(name)
    if isinstance(name, str) and name in BUNDLED:
        return BUNDLED[name]
    path = Path(text).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if (path / "config.json").is_file():
            return path
        if len(files) == 1:
            return files[0]
        raise ValueError(f"name={text!r}: the folder must hold a config.json or one .gguf file, not {len(files)}")
    if path.is_file():
        header(path)  # raises if it is another kind of file
        return path
    hub_id = isinstance(name, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text)
    if hub_id and path.suffix != ".gguf":
        return text
    raise ValueError(f"{unknown(name)}; there is no such file or folder")


def convert_bundled(model: Bundled, progress: bool) -> Path:
    """The folder of a bundled model, fetched and converted if it is not there yet."""
    card = Card(model.name, model.title, model.licence, model.context_length, model.source, model.sha256)

    def make(folder: Path) -> None:
        with steps(model.name, progress) as say:
            path = fetch(model, folder, say)
            convert(path, folder, say)
            path.unlink()
            write_card(card, folder)

    return make_once(folder_of(model).name, make)


def convert_gguf(path: Path, progress: bool) -> Path:
    """The folder of a GGUF file's conversion, keyed by its SHA-256, so that a moved file is known again."""
    metadata = header(path)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError(f"{path} names no architecture (general.architecture={architecture!r})")
    length = metadata.get(f"{architecture}.context_length", 0)
    sha256 = sha256_of(path)
    card = Card(
        name=str(path.resolve()),
        title=str(metadata.get("general.name", path.stem)),
        licence=str(metadata.get("general.license", "unknown")),
        context_length=length if isinstance(length, int) else 0,
        source=str(path.resolve()),
        sha256=sha256,
    )

    def make(folder: Path) -> None:
        with steps(path.name, progress) as say:
            convert(path, folder, say)
            write_card(card, folder)

    return make_once(f"gguf-{sha256[:12]}", make)


@contextmanager
def steps(name: str, progress: bool) -> Iterator[Callable[[str], None]]:
    """A function that shows on stderr what is being done: a spinner on a terminal, else a line each."""
    console = Console(file=sys.stderr, quiet=not progress, highlight=False, markup=False)
    if not console.is_terminal:
        yield lambda text: console.print(f"{name}: {text}", soft_wrap=True)
        return
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    # Its redirections would meet those of `silent`.
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task(name, total=None)
        yield lambda text: bar.update(task, description=f"{name}: {text}")
