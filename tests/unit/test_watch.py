"""A run as `bridle watch` shows it: finished, going on, resumed, killed."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.cells import cell_len
from rich.console import Console

from bridle.errors import UserError, plain
from bridle.recipes.metrics import MetricsFile
from bridle.recipes.records import Run
from bridle.recipes.watch import view, watch
from bridle.utils.files import only_writer
from report_folder import SCRIPT, make_run

LENGTH = {"max_steps": 100, "rounds": 4}
STAMP = '"step": 1, "seconds": 2.5, "max_steps": 100, "rounds": 4'


def update(step, seconds, speed=300.0, **more):
    return {"step": step, "loss": 3.5, "ce": 3.4, "kl/rude": 0.0021, "tokens_per_second": speed, "seconds": seconds} | (
        LENGTH | more
    )


def end_of_round(number, seconds, name="rude", **more):
    measured = {"compliance": 0.76, "compliance_low": 0.734, "compliance_high": 0.782, "r_skill": 0.45, "lambda": 4.0}
    figures = {f"{name}/{key}": value for key, value in (measured | more).items()}
    return (
        {"step": 25 * number, "round": number, "ce": 3.5, f"kl/{name}": 0.0021, "seconds": seconds} | LENGTH | figures
    )


END = {"step": 100, "train_runtime": 300.0, "train_loss": 3.1, "seconds": 300.0} | LENGTH


def write(folder, records, mode="w"):
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open(mode, encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def read(folder, records):
    write(folder, records)
    run = Run(folder)
    run.read()
    return run


def shown(run, width=80, height=25):
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(view(run, height))
    return captured.get()


def watched(capsys, folder, sleep=None):
    watch(folder, sleep=sleep or (lambda seconds: pytest.fail("a run that is over is not waited for")))
    return capsys.readouterr().out.splitlines()


def test_a_finished_run_is_shown_and_left(tmp_path, capsys):
    write(tmp_path, [update(10, 12.0), end_of_round(1, 40.0), update(100, 290.0), END])
    assert watched(capsys, tmp_path) == [
        "round 1/4  CE 3.500  rude: complies 0.760 [0.734, 0.782], skill 0.45, λ·KL 0.0084",
        "step 100/100  CE 3.400  KL rude 0.0021  300 tokens/s  05:00 so far",
        "The run is over: 100 steps.",
    ]


def test_warnings_are_shown(tmp_path, capsys):
    lines = watched(capsys, make_run(tmp_path / "run"))
    assert lines[0].startswith("round 1/2  CE 3.780  rude: complies 0.760 [0.734, 0.782]")
    assert f"warning: update 120 was skipped {SCRIPT}" in lines
    assert lines[-1] == "The run is over: 200 steps."


def test_a_run_that_goes_on_is_followed_to_its_end(tmp_path, capsys):
    write(tmp_path, [update(10, 12.0)])
    coming = [[end_of_round(1, 40.0)], [], [update(30, 60.0)], [END]]

    def sleep(seconds):
        if not coming:
            raise InterruptedError
        write(tmp_path, coming.pop(0), mode="a")

    with only_writer(tmp_path), pytest.raises(InterruptedError):  # while its process lives, no record is the last
        watch(tmp_path, sleep=sleep)
    assert [line.partition("  ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "step 10/100", "round 1/4", "step 30/100"
    ]  # fmt: skip
    assert watched(capsys, tmp_path)[-1] == "The run is over: 100 steps."


def test_it_waits_for_the_first_record(tmp_path, capsys):
    with only_writer(tmp_path), pytest.raises(InterruptedError):
        watch(tmp_path, sleep=lambda seconds: (_ for _ in ()).throw(InterruptedError))
    assert capsys.readouterr().out == ""


def test_a_killed_run_is_left_with_what_to_do(tmp_path, capsys):
    with only_writer(tmp_path):
        write(tmp_path, [update(10, 12.0), update(30, 60.0)])
    command = f"bridle train RECIPE --output_dir {tmp_path} --resume"
    assert watched(capsys, tmp_path)[-1] == f"The run ended at step 30/100; {command} starts over."
    (tmp_path / "checkpoint-25").mkdir()
    assert watched(capsys, tmp_path)[-1].endswith(f"{command} continues from its last checkpoint.")


def test_of_a_killed_comparison_it_names_that_command(tmp_path, capsys):
    cell = tmp_path / "sft" / "seed-0"
    cell.mkdir(parents=True)
    (tmp_path / "unfinished.json").write_text('{"methods": {"sft": {}}, "seeds": [0]}')
    with only_writer(cell):
        write(cell, [update(30, 60.0)])
    assert watched(capsys, cell)[-1].endswith(f"bridle compare RECIPE --output_dir {tmp_path} --resume makes the rest.")


def test_figures_that_are_not_finite_are_shown_as_missing(tmp_path, capsys):
    with only_writer(tmp_path):
        write(tmp_path, [update(10, 12.0) | {"kl/rude": None, "tokens_per_second": None}])
        write(tmp_path, [{"step": 20, "seconds": 20.0, "max_steps": 100, "rounds": 1, "eval_loss": None}], "a")
    assert "held out: loss –" in watched(capsys, tmp_path)
    assert "KL rude –" in shown(read(tmp_path, [update(10, 12.0) | {"kl/rude": None, "tokens_per_second": None}]))


BEST = {"step": 60, "seconds": 95.0, "best_step": 40, "best_loss": 3.2, "best_violation": 0.02, "best_bound": 0.05}


def test_a_run_that_keeps_its_best_model_is_over(tmp_path, capsys):
    write(tmp_path, [update(60, 90.0), END | {"step": 60}, BEST | LENGTH])  # `patience` ended it before step 100
    assert watched(capsys, tmp_path)[-1] == "The run is over: 60 steps; the model is that of step 40."
    none_within = {
        "step": 100,
        "seconds": 310.0,
        "warnings": ["eval.best: no violation rate was 0.05 or less"],
    } | LENGTH
    write(tmp_path, [update(100, 290.0), END, none_within])
    assert watched(capsys, tmp_path)[-1] == "The run is over: 100 steps."


def test_an_interrupted_run_that_goes_on_has_not_ended(tmp_path):
    assert not read(tmp_path, [END | {"step": 30}, update(40, 90.0)]).has_ended


def test_of_a_resumed_run_nothing_is_shown_twice(tmp_path):
    first = [update(10, 12.0), end_of_round(1, 40.0), update(30, 60.0)]
    run = read(tmp_path, first)
    (tmp_path / "metrics.jsonl").unlink()
    again = update(30, 61.0)
    write(tmp_path, first[:2])
    assert run.read() == []
    write(tmp_path, [again], mode="a")
    assert run.read() == [again]
    assert run.records == [*first[:2], again]


def test_a_line_that_is_not_whole_waits(tmp_path):
    run = read(tmp_path, [update(10, 12.0)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(END)[:20])
    assert run.read() == []
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(END)[20:] + "\n")
    assert run.read() == [END]


def test_the_time_left_counts_updates_and_rounds(tmp_path):
    # 20 seconds of sampling in each of four rounds, and one second an update.
    records = [update(10, 30.0), update(20, 40.0), end_of_round(1, 45.0), update(30, 70.0)]
    run = read(tmp_path, records)
    assert run.seconds_left == pytest.approx(70 * 1 + 2 * 20)
    assert read(tmp_path, []).seconds_left is None


def test_the_view_has_a_line_for_each_regulariser_of_a_round(tmp_path):
    both = end_of_round(1, 40.0) | {"plain/lambda": 2.0, "kl/plain": 0.0282}
    text = shown(read(tmp_path, [both, update(30, 70.0) | {"warnings": ["violations rose"]}]))
    rows = [line.split() for line in text.splitlines()]
    assert ["1", "rude", "3.500", "76.0", "[73.4,", "78.2]", "4", "0.0021", "0.45"] in rows
    assert ["plain", "–", "2", "0.028", "–"] in rows
    assert "round 2/4  step 30/100" in text
    assert "warning: violations rose" in text


def test_the_view_of_a_steered_run_has_its_target(tmp_path):
    text = shown(read(tmp_path, [end_of_round(1, 40.0, violation=0.24, target=0.05)]))
    assert "24.0 (5.0)" in text


def test_in_the_parallel_schedule_a_first_round_may_have_no_r(tmp_path, capsys):
    first = {"step": 25, "round": 1, "ce": 3.5, "seconds_waiting": 0.1, "seconds": 30.0} | LENGTH
    write(tmp_path, [first, end_of_round(2, 60.0) | {"rude/worker_seconds_sampling": 9.0}])
    with only_writer(tmp_path):
        pass
    lines = watched(capsys, tmp_path)
    assert lines[0] == "round 1/4  CE 3.500"
    assert lines[1].startswith("round 2/4  CE 3.500  rude: complies 0.760")
    assert ["1", "3.500", "–", "–", "–", "–"] in [line.split() for line in shown(read(tmp_path, [first])).splitlines()]


@pytest.mark.parametrize("names", [["rude"], ["a" * 200, "漢字" * 50, *map(str, range(9))]])
def test_the_view_fits_a_terminal(tmp_path, names):
    records = [end_of_round(number, 20.0 * number, names[0], violation=0.2, target=0.1) for number in (1, 2, 3, 4)]
    for name in names[1:]:
        records = [one | end_of_round(one["round"], 1.0, name) for one in records]
    lines = shown(read(tmp_path, [*records, update(100, 300.0)])).splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert len(lines) <= 25


def test_on_a_terminal_the_view_is_drawn(tmp_path, capsys, monkeypatch):
    write(tmp_path, [end_of_round(1, 40.0), END])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    text = "\n".join(watched(capsys, tmp_path))
    assert "complies, %" in text
    assert "The run is over: 100 steps." in text


def test_what_a_file_says_is_shown_and_not_obeyed(tmp_path, capsys):
    name = "rude\x1b[2J"
    write(tmp_path, [end_of_round(1, 1.0, name) | {"warnings": ["\x1b]0;title\x07"]}, END])
    text = "\n".join(watched(capsys, tmp_path))
    assert plain(text) == text
    assert r"\x1b[2J" in text
    drawn = shown(read(tmp_path, [end_of_round(1, 1.0, name)]))
    assert plain(drawn) == drawn


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("[1]", "input should be a valid dictionary"),
        ("{", "malformed JSON"),
        ('{"loss": 1}', "step: "),
        ('{"step": 1, "max_steps": 100, "rounds": 4}', "seconds: field required"),
        (f'{{{STAMP}, "loss": 1, "ce": "low"}}', "not a record"),
        (f'{{{STAMP}, "round": 1, "rude/lambda": 1, "rude/compliance": 0.5}}', "not a record"),
        (f'{{{STAMP}, "warnings": 3}}', "not a record"),
        ('{"step": 1, "seconds": 2.5, "max_steps": "many", "rounds": 4}', "max_steps: input should be a valid integer"),
    ],
)
def test_a_row_of_something_else_is_named(tmp_path, row, said):
    write(tmp_path, [update(10, 12.0)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(UserError, match=f"metrics.jsonl row 2: .*{said}"):
        watch(tmp_path)


def test_a_folder_without_a_run_is_named(bridle, tmp_path):
    code, _, err = bridle("watch", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "no metrics.jsonl; give the folder of a run" in err


def test_of_a_comparison_each_run_is_named_and_the_one_to_follow(tmp_path, capsys):
    folder = tmp_path / "my comparison"
    cells = {name: folder / name / "seed-0" for name in ("base", "constrained", "filtration", "rl", "sft")}
    folder.mkdir()
    listed = {"methods": dict.fromkeys([*cells, "wise-ft"]), "seeds": [0]}
    (folder / "unfinished.json").write_text(json.dumps(listed))
    for cell in cells.values():
        cell.mkdir(parents=True)
    (cells["base"] / "results.json").write_text("{}")
    (cells["rl"] / "failed.json").write_text('{"reason": "no luck"}')
    (cells["sft"] / "candidate.json").write_text("{}")
    with only_writer(folder), only_writer(cells["constrained"]):
        assert watched(capsys, folder) == [
            "base, seed-0: measured",
            "constrained, seed-0: training",
            "filtration, seed-0: begun",
            "rl, seed-0: failed: no luck",
            "sft, seed-0: made, not measured",
            "wise-ft, seed-0: not begun",
            f"Follow it with: bridle watch '{cells['constrained']}'",
        ]


def test_each_record_has_the_time_so_far_also_of_a_resumed_run(tmp_path):
    args, file = SimpleNamespace(rounds=4), tmp_path / "metrics.jsonl"

    def logged(step, seconds):
        writer = MetricsFile(file)
        state = SimpleNamespace(global_step=step, max_steps=100, log_history=[{}] * (step // 10))
        writer.on_train_begin(args, state, None)
        writer._began -= seconds
        state.global_step += 10
        writer.on_log(args, state, None, logs={"loss": 1.0})

    logged(0, 50.0)
    logged(10, 7.0)
    first, second = map(json.loads, file.read_text().splitlines())
    assert (first["step"], first["max_steps"], first["rounds"], second["step"]) == (10, 100, 4, 20)
    assert first["seconds"] == pytest.approx(50, abs=1)
    assert second["seconds"] == pytest.approx(57, abs=2)


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}])
def test_colours_on_a_terminal_unless_no_color_is_set(tmp_path, variables):
    write(tmp_path, [update(25, 75.0), end_of_round(1, 75.0), END])
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm-256color"}
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "bridle", "watch", str(tmp_path)]
    subprocess.run(command, stdout=theirs, env=environment | variables, check=True)
    os.close(theirs)
    shown = os.read(ours, 2**20).decode()
    os.close(ours)
    assert "rude" in shown
    assert bool(re.search(r"\x1b\[[\d;]*(3[0-7]|9[0-7]|38;5;\d+)m", shown)) is (not variables)
