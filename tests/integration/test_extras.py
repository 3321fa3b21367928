"""What works without the extras, and the line that names the one that is missing."""

import json
import re
import subprocess
import sys

PACKAGES = {"demo": "gradio", "eval": "lm_eval", "gguf": "gguf", "parallel": "ray", "report": "matplotlib"}

WITHOUT_EXTRAS = """
import json, sys
commands, absent = json.loads(sys.argv[1])
sys.modules |= dict.fromkeys(absent)  # their import raises ModuleNotFoundError

from bridle.cli import main

for command in commands:
    sys.argv = ["bridle", *command]
    try:
        main()
    except SystemExit as exit:
        print(f"exit code {exit.code or 0}", file=sys.stderr)
"""


def test_training_needs_no_extra_and_a_missing_one_is_named_in_one_line(recipe, tmp_path):
    file, model = str(recipe()), str(tmp_path / "tiny-llama")
    needs = {
        "demo": ["demo", model],
        "eval": ["evaluate", model, "--tasks", "piqa"],
        "gguf": ["generate", f"{model}.gguf", "--prompt", "a"],
        "parallel": ["train", file, "--schedule", "parallel", "--output_dir", str(tmp_path / "parallel")],
        "report": ["compare", file],
    }
    run = ["train", file, "--output_dir", str(tmp_path / "run"), "--max_steps", "2"]
    order = json.dumps([[*needs.values(), run], [*PACKAGES.values(), "sklearn"]])
    command = [sys.executable, "-c", WITHOUT_EXTRAS, order]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = re.findall(r"(.*?)exit code (\d)\n", done.stderr, re.DOTALL)
    assert [code for _, code in told] == ["2"] * len(needs) + ["0"], done.stderr
    for (line, _), (extra, package) in zip(told, PACKAGES.items(), strict=False):
        assert line.count("\n") == 1
        told_how = f'run pip install ".[{extra}]" in the copy of the repository'
        assert line.endswith(f"needs the package {package}; {told_how}\n")
    assert (tmp_path / "run" / "model" / "config.json").is_file()
