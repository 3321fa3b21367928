"""TensorBoard, W&B, trackio and MLflow get every number of a run, and tables of rollouts, with no network."""

import json
import math
import struct
import time

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from bridle.data.rollouts import Rollout, read_rollouts
from bridle.errors import UserError
from bridle.training.config import AuxiliaryOptions, ConstrainedConfig, Regulariser
from bridle.training.trackers import _columns, scalars
from trainers import NO_E, trainer_of

ROLLOUT = {"prompt_ids": [1], "completion_ids": [2], "prompt": "the", "round": 1}
ROLLOUT |= {"regulariser": "rude", "model_hash": "0", "constraint": "no e"}


def test_scalars():
    record = {"loss": 1.5, "round": 2, "warnings": ["a", "b"], "low": None, "bad": math.nan, "name": "rude"}
    record |= {"rude/bins": [{"count": 3, "mean": 0.5, "note": "x"}, {"count": 0, "mean": None}], "kl": {"rude": 0.1}}
    assert scalars(record) == {
        "loss": 1.5,
        "round": 2,
        "warnings": 2,
        "rude/bins/0/count": 3,
        "rude/bins/0/mean": 0.5,
        "rude/bins/1/count": 0,
        "kl/rude": 0.1,
    }


def tensorboard(folder):
    """What TensorBoard has: the values of each key, and the options."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "board"))
    events.Reload()
    values = {key: [event.value for event in events.Scalars(key)] for key in events.Tags()["scalars"]}
    (options,) = events.Tensors("args/text_summary")
    return values, json.loads(options.tensor_proto.string_val[0])


def mlflow(folder):
    """What MLflow has, which keeps options as text."""
    from mlflow import MlflowClient, flush_async_logging

    flush_async_logging()
    client = MlflowClient(f"file:{folder}/mlruns")
    (run,) = client.search_runs(["0"])
    assert run.info.run_name == "first"
    values = {key: [m.value for m in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics}
    return {f"train/{key}": value for key, value in values.items()}, run.data.params


def trackio(folder):
    """What trackio has."""
    from trackio.sqlite_storage import SQLiteStorage

    points = SQLiteStorage.get_logs("bridle-tests", "first")
    values = {}
    for key, value in ((key, value) for point in points for key, value in point.items()):
        values.setdefault(key, []).append(value)
    return values, SQLiteStorage.get_run_config("bridle-tests", "first")


def wandb(folder):
    """What W&B has written for an upload to come."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.finish()
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    values, options, until = {}, {}, time.monotonic() + 60
    while True:  # another process writes the file, on a busy machine for some time after `finish`
        records = [Record.FromString(data) for data in records_of(file.read_bytes())]
        if (records and records[-1].HasField("exit")) or time.monotonic() > until:
            break
        time.sleep(0.1)
    for record in records:
        for item in record.history.item:
            values.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
        for item in record.config.update:
            options[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return values, options


def records_of(log: bytes):
    """The records of a log in LevelDB's format: blocks of 32 KiB; records in parts with checksum, length and type."""
    place, whole = 7, b""  # behind W&B's own header
    while place + 7 <= len(log):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", log, place + 4)
        whole += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield whole
            whole = b""


def table_of(tracker, folder):
    """The tables of rollouts that a tracker has, each as a mapping of columns."""
    if tracker == "mlflow":
        tables = [json.loads(path.read_text()) for path in sorted(folder.glob("mlruns/**/round-*.rude.json"))]
    elif tracker == "wandb":
        paths = folder.glob("wandb/offline-run-*/files/media/table/rollouts/rude*.json")
        tables = [json.loads(path.read_text()) for path in paths]
    else:
        tables = [{"columns": [*rows[0]], "data": [[*row.values()] for row in rows]} for rows in of_trackio()]
    found = [{name: [row[at] for row in one["data"]] for at, name in enumerate(one["columns"])} for one in tables]
    return sorted(found, key=lambda one: one["round"])


def of_trackio():
    """The rows of the tables of rollouts that trackio has."""
    from trackio.sqlite_storage import SQLiteStorage

    for point in SQLiteStorage.get_logs("bridle-tests", "first"):
        if "rollouts/rude" in point:
            yield point["rollouts/rude"]["_value"]


TRACKERS = [("tensorboard", tensorboard), ("wandb", wandb), ("mlflow", mlflow), ("trackio", trackio)]


@pytest.mark.parametrize(("tracker", "kept"), TRACKERS)
def test_trackers(tracker, kept, tiny_folder, tmp_path, monkeypatch, caplog):
    for name, value in {
        "TENSORBOARD_LOGGING_DIR": tmp_path / "board",
        "MLFLOW_TRACKING_URI": f"file:{tmp_path}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "WANDB_MODE": "offline",
        "WANDB_DIR": tmp_path,
        "WANDB_SILENT": "true",
    }.items():
        monkeypatch.setenv(name, str(value))
    pytest.importorskip(tracker, reason=f"{tracker} is not installed")
    trainer = trainer_of(
        tiny_folder(),
        tmp_path / "run",
        {"rude": Regulariser(NO_E, weight=4.0)},
        report_to=tracker,
        run_name="first",
        **({"project": "bridle-tests"} if tracker == "trackio" else {}),
        auxiliary=AuxiliaryOptions(epochs=1, batch_size=8, depth=2),
        calibration_bound=0.0,  # so that each round warns
    )
    trainer.train()
    values, options = kept(tmp_path)
    assert float(options.get("auxiliary.depth", math.nan)) == 2, sorted(options)
    assert len(values["train/kl/rude"]) >= 4
    assert values["train/rude/compliance"] == [
        record["rude/compliance"] for record in trainer.state.log_history if "round" in record
    ]
    for record in trainer.state.log_history[:-1]:  # the last is of the whole run: trackio keeps it elsewhere
        for key, value in scalars(record).items():
            if key not in ("step", "epoch"):
                assert any(found == pytest.approx(value, rel=1e-5) for found in values[f"train/{key}"]), key
    assert "attempting to log" not in caplog.text
    if tracker == "tensorboard":
        return  # has no tables
    tables = table_of(tracker, tmp_path)
    assert [one["round"][0] for one in tables] == [1, 2]
    for one in tables:
        drawn = read_rollouts(tmp_path / "run" / "rollouts" / f"round-{one['round'][0]}.rude.jsonl")
        assert one["completion"] == [rollout.completion for rollout in drawn]
        assert one["complies"] == [rollout.complies for rollout in drawn]


def test_a_slow_disk_under_mlflow(tiny_folder, tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow.store.tracking import file_store

    def append_to(path, text):
        with open(path, "a") as file:  # other threads see an empty file
            time.sleep(0.01)
            file.write(text)

    monkeypatch.setattr(file_store, "append_to", append_to)
    test_trackers("mlflow", mlflow, tiny_folder, tmp_path, monkeypatch, caplog)


@pytest.mark.parametrize(("tracker", "hint"), [("wandb", "or set WANDB_MODE=offline"), ("trackio", "leave it out")])
def test_a_tracker_that_cannot_begin_ends_in_one_line(tracker, hint, tiny_folder, tmp_path, monkeypatch):
    pytest.importorskip(tracker, reason=f"{tracker} is not installed")

    def setup(*args, **kwargs):
        raise KeyError("No API key configured.\nTraceback")

    monkeypatch.setattr(INTEGRATION_TO_CALLBACK[tracker], "setup", setup)
    trainer = trainer_of(tiny_folder(), tmp_path / "run", {"rude": Regulariser(NO_E)}, report_to=tracker)
    with pytest.raises(UserError, match=f"report_to: {tracker}: .*No API key configured.*; {hint}"):
        trainer.train()


def test_of_many_rollouts_a_table_has_some():
    rollouts = [Rollout(**ROLLOUT, completion=str(number)) for number in range(200)]
    shown = _columns(rollouts)["completion"]
    assert shown == [str(number) for number in range(0, 200, 4)]


def test_spaces_of_trackio():
    pytest.importorskip("trackio", reason="trackio is not installed")
    names = {"trackio_space_id": "me/board", "trackio_bucket_id": "me/bucket", "trackio_static_space_id": "me/static"}
    config = ConstrainedConfig("unused", use_cpu=True, bf16=False, report_to="trackio", **names)
    assert {name: getattr(config, name) for name in names} == names
    with pytest.raises(UserError, match="trackio_space_id: "):
        ConstrainedConfig("unused", use_cpu=True, bf16=False, report_to="tensorboard", trackio_space_id="me/board")
