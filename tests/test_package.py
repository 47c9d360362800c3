"""The built wheel works outside the checkout and contains the configuration files."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile

from .conftest import REPOSITORY


def test_wheel_contains_the_config_files_and_runs(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(REPOSITORY)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name.removeprefix("rose_exp/") for name in archive.namelist() if name.startswith("rose_exp/conf/")}
        archive.extractall(tmp_path / "site")
    assert packed == {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "conf").rglob("*.yaml")}

    away = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    where = "import rose_exp, rose_exp.cli.command as c; print(rose_exp.__file__, c.config_folder())"
    imported = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=away, capture_output=True, text=True, check=True)
    assert imported.stdout.split() == [str(tmp_path / "site/rose_exp/__init__.py"), str(tmp_path / "site/rose_exp/conf")]
    run = [sys.executable, "-m", "rose_exp", "--cfg", "job", "method=wanda"]
    shown = subprocess.run(run, cwd=tmp_path, env=away, capture_output=True, text=True, check=True)
    assert "name: wanda" in shown.stdout
