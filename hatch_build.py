"""Compiles cpp/ into the package when a wheel, or an editable install, is made: `kvfold.ops._cpu`.

Without a C++20 compiler kvfold installs all the same, and its operations run in plain torch. KVFOLD_COMPILE=require
makes that an error, KVFOLD_COMPILE=off does not try. What an editable install compiled is used while it is newest.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

WAYS = ("", "require", "off")


class CompiledKernels(BuildHookInterface[Any]):
    """hatchling's hook: it comes before files are gathered."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say that the wheel is for one platform. Raises RuntimeError where it must, and can't."""
        wanted = os.environ.get("KVFOLD_COMPILE", "")
        if wanted not in WAYS:
            raise ValueError(f"KVFOLD_COMPILE={wanted!r} must be one of {WAYS}")
        root = Path(self.root)
        target = root / "src/kvfold/ops" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
        if wanted == "off":
            target.unlink(missing_ok=True)
            return
        sources = [root / "CMakeLists.txt", *(root / "cpp").iterdir()]
        if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime for source in sources):
            try:
                target.unlink(missing_ok=True)
                compile_into(root, target)
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stdout", None) or str(error)
                if wanted == "require":
                    raise RuntimeError(f"the CPU kernels can't be compiled:\n{said}") from None
                self.app.display_warning(
                    f"kvfold is installed without its CPU kernels, which can't be compiled:\n{said}"
                )
                return
        build_data["pure_python"], build_data["infer_tag"] = False, True
        build_data["artifacts"].append(f"/src/kvfold/ops/{target.name}")  # git does not know it


def compile_into(root: Path, target: Path) -> None:
    """Run CMake in a folder of its own; what it made takes its place when it is whole."""
    with tempfile.TemporaryDirectory(prefix="kvfold-cmake-") as folder:
        configure = ["cmake", "-S", str(root), "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        for command in ([*configure, f"-DPython_EXECUTABLE={sys.executable}"], ["cmake", "--build", folder]):
            subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        part = target.with_name(f".{target.name}.{os.getpid()}")
        part.write_bytes((Path(folder) / target.name).read_bytes())
        part.replace(target)


def get_build_hook() -> type[CompiledKernels]:
    """What hatchling asks for."""
    return CompiledKernels
