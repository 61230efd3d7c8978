"""metrics.jsonl and the TensorBoard log."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hippos.train.metrics import MetricsLog, read_metrics


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, after_step=0, use_tensorboard=False)
    log.write(1, {"loss": 0.1 + 0.2})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.1 + 0.2}], "a row is there as soon as it is written"
    log.write(2, {"loss": 2.0})
    log.sync()
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert read_metrics(tmp_path / "nowhere") == []


def test_resumed_log_drops_rows_that_will_be_measured_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, after_step=0, use_tensorboard=False)
    for step in range(1, 6):
        log.write(step, {"loss": float(step)})
    MetricsLog(tmp_path, after_step=3, use_tensorboard=False).write(4, {"loss": 40.0})
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0, 2.0, 3.0, 40.0]


def test_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    for after, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = MetricsLog(tmp_path, after_step=after, use_tensorboard=True)
        for step in steps:
            log.write(step, {"loss": float(10 * after + step), "validation_nll": 1.0})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 23), (4, 24)]
    assert "validation/nll" in events.Tags()["scalars"]
