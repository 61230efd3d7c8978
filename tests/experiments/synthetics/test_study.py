from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from hippos.data.synthetic import IGNORED, AssociativeRecall
from hippos.errors import ConfigError
from hippos.experiments.synthetics import (
    ModelSize,
    Study,
    TableTask,
    Training,
    make_study,
    read_results,
    run_study,
    running,
    to_markdown,
    write_figures,
    write_pages,
)
from hippos.experiments.synthetics import study as study_module
from hippos.experiments.synthetics.training import CellTraining, batch_order

TASK = TableTask(
    "associative_recall_10",
    "associative recall",
    AssociativeRecall(vocab_size=10, input_seqlen=6),
    Training(epochs=2, warmup_epochs=1, batch=8, lr=1e-3, tests=4),
    n_train=20,
    n_test=10,
    lengths=(6, 12),
    watched_lengths=(12,),
)
STUDY = Study(("h3", "attention"), (TASK,), (0, 1), ModelSize(d_model=8, d_state=4))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("table")
    reports = []
    results = run_study(STUDY, out, device="cpu", jobs=1, progress=lambda *what: reports.append(what))
    return out, results, reports


def test_every_pass_reads_every_example_once():
    order = batch_order(20, 8, 3, seed=1)
    assert order.shape == (9, 8)
    for a_pass in order.reshape(3, -1):
        assert sorted(a_pass[:20]) == list(range(20))
        assert (a_pass[20:] == -1).all()
    assert (order[:3] != order[3:6]).any()


def test_results_hold_everything(finished):
    _, results, _ = finished
    assert set(results) == {"associative_recall_10-h3", "associative_recall_10-attention"}
    h3 = results["associative_recall_10-h3"]
    assert [row["epoch"] for row in h3["curve"]] == [0.667, 1.0, 1.333, 2.0]
    assert [seed["seed"] for seed in h3["seeds"]] == [0, 1]
    for number, seed in enumerate(h3["seeds"]):
        curve = [row["accuracy"][number] for row in h3["curve"]]
        assert (seed["best_accuracy"], seed["final_accuracy"]) == (max(curve), curve[-1])
        assert set(seed["by_length"]) == {"6", "12"}
        assert seed["best_by_length"] == {"12": max(row["by_length"]["12"][number] for row in h3["curve"])}
        assert seed["by_length"]["12"] == pytest.approx(h3["curve"][-1]["by_length"]["12"][number], abs=1e-6)
    assert h3["settings"]["task"]["training"]["lr"] == 1e-3
    assert h3["machine"]["gpu"] is None
    assert [layer["layer"] for layer in h3["recall"]] == [0, 1]
    # Learned positions end at the trained length.
    (attention, _) = results["associative_recall_10-attention"]["seeds"]
    assert set(attention["by_length"]) == {"6"}
    assert attention["best_by_length"] == {}


def test_progress_tells_steps_and_ends(finished):
    _, _, reports = finished
    assert reports[-1] == ("associative_recall_10-attention", -1)
    assert max(steps for name, steps in reports if name.endswith("h3")) == TASK.n_steps == 6


def test_finished_cells_are_not_computed_again(finished):
    out, results, _ = finished
    files = sorted((out / "cells").iterdir())
    before = [path.stat().st_mtime_ns for path in files]
    assert run_study(STUDY, out, device="cpu", jobs=1) == results
    assert [path.stat().st_mtime_ns for path in files] == before


def test_a_missing_cell_is_computed_and_the_same_again(finished, tmp_path):
    out, results, _ = finished
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "associative_recall_10-h3.json").write_bytes(
        (out / "cells" / "associative_recall_10-h3.json").read_bytes()
    )
    again = run_study(STUDY, tmp_path, device="cpu", jobs=1)
    for key in ("curve", "seeds"):
        assert again["associative_recall_10-attention"][key] == results["associative_recall_10-attention"][key]


@pytest.mark.parametrize("mixer", ["h3_frozen_shift", "attention"])
def test_a_stopped_cell_goes_on_from_where_it_was_saved(tmp_path, monkeypatch, mixer):
    monkeypatch.setattr(running, "_SAVE_EVERY_S", 0.0)
    study = replace(STUDY, mixers=(mixer,))
    wanted = run_study(study, tmp_path / "whole", device="cpu", jobs=1)

    def stop(name: str, steps: int) -> None:
        if steps == 3 or steps == TASK.n_steps:
            raise KeyboardInterrupt

    steps_taken = []
    step = CellTraining._step
    monkeypatch.setattr(CellTraining, "_step", lambda self: (steps_taken.append(1), step(self)))
    for _ in range(2):  # once in the middle, once behind the last step
        with pytest.raises(KeyboardInterrupt):
            run_study(study, tmp_path / "stopped", device="cpu", jobs=1, progress=stop)
    found = run_study(study, tmp_path / "stopped", device="cpu", jobs=1)
    assert len(steps_taken) < 2 * TASK.n_steps
    for name, result in wanted.items():
        for part in ("seeds", "curve", "recall"):
            assert found[name][part] == result[part]
    assert not (tmp_path / "stopped" / "unfinished").exists()


class Clock:
    """Time that goes on by a second whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (running, study_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_table_in_runs_of_limited_time(finished, tmp_path, clock):
    _, wanted, _ = finished
    runs = []
    while not runs or len(runs[-1]) < len(STUDY.cells):
        started = clock.now
        runs.append(run_study(STUDY, tmp_path, device="cpu", jobs=1, time_limit=5.0))
        assert clock.now - started <= 7.0
        assert len(runs) < 20
    assert len(runs) > 2
    assert runs[0] == {}
    for name, result in wanted.items():
        assert runs[-1][name]["curve"] == result["curve"]
        assert runs[-1][name]["seeds"] == result["seeds"]
    assert not (tmp_path / "unfinished").exists()


def test_what_another_device_left_unfinished_is_not_gone_on_with(finished, tmp_path, clock):
    _, wanted, _ = finished
    study = replace(STUDY, mixers=("attention",))
    assert run_study(study, tmp_path, device="cpu", jobs=1, time_limit=5.0) == {}
    (file,) = (tmp_path / "unfinished").iterdir()
    state = torch.load(file)
    assert 0 < int(state["clock"]) < TASK.n_steps
    torch.save({**state, "device": "cuda", "clock": state["clock"] * 0}, file)
    results = run_study(study, tmp_path, device="cpu", jobs=1)
    assert results["associative_recall_10-attention"]["curve"] == wanted["associative_recall_10-attention"]["curve"]


def test_a_time_limit_is_above_0(tmp_path):
    with pytest.raises(ConfigError, match="time limit must be above 0 s, got -1"):
        run_study(STUDY, tmp_path, device="cpu", time_limit=-1.0)


def test_what_other_settings_left_unfinished_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "_SAVE_EVERY_S", 0.0)

    def stop(name: str, steps: int) -> None:
        if steps == TASK.n_steps:
            raise KeyboardInterrupt

    study = replace(STUDY, mixers=("attention",))
    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path, device="cpu", jobs=1, progress=stop)
    other = replace(study, seeds=(2, 3))
    results = run_study(other, tmp_path, device="cpu", jobs=1)
    assert [seed["seed"] for seed in results["associative_recall_10-attention"]["seeds"]] == [2, 3]
    damaged = tmp_path / "damaged"
    (damaged / "unfinished").mkdir(parents=True)
    (damaged / "unfinished" / "associative_recall_10-attention.pt").write_bytes(b"no checkpoint")
    assert run_study(study, damaged, device="cpu", jobs=1)


def test_results_of_other_settings_are_refused(finished):
    out, _, _ = finished
    longer = replace(STUDY, tasks=(replace(TASK, training=replace(TASK.training, lr=2e-3)),))
    with pytest.raises(ConfigError, match=r"other settings: .* has task.training.lr = 0.001, now 0.002"):
        run_study(longer, out, device="cpu")
    with pytest.raises(ConfigError, match=r"seeds = \[0, 1\], now \[0\]"):
        run_study(replace(STUDY, mixers=("gss",), seeds=(0,)), out, device="cpu")


def test_a_damaged_result_is_named(tmp_path):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "induction_head-h3.json").write_text('{"format": 1, "seeds": ')
    with pytest.raises(ConfigError, match=r"induction_head-h3.json is no result of this version"):
        read_results(tmp_path)


def test_pages_and_figures(finished, tmp_path):
    _, results, _ = finished
    pages = write_pages(results, tmp_path)
    assert [path.name for path in pages] == ["results.json", "results.md"]
    cells = json.loads(pages[0].read_text())["cells"]
    assert [(cell["mixer"], cell["n_seeds"]) for cell in cells] == [("h3", 2), ("attention", 2)]
    accuracy = cells[0]["accuracy"]
    assert f"| H3 | {accuracy:.1f} |" in to_markdown(results)
    assert "Fewer epochs" not in to_markdown(results)
    first = next(iter(results.values()))
    assert "Fewer epochs" in to_markdown({**results, f"{first['task']}-{first['mixer']}": {**first, "epochs": 1.0}})
    figures = write_figures(results, tmp_path)
    assert [path.name for path in figures] == ["accuracy.png", "recall-h3.png"]
    assert all(path.stat().st_size > 5000 for path in figures)


def test_a_run_ends_when_every_seed_is_without_mistakes(monkeypatch):
    task = replace(TASK, training=replace(TASK.training, epochs=20, tests=20, solved_tests=3))
    training = CellTraining("attention", task, (0, 1), STUDY.size, torch.device("cpu"))
    answers = iter([[1.0, 0.5], [1.0, 1.0], [1.0, 0.9], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    monkeypatch.setattr(training._tests, "measure", lambda: torch.tensor([next(answers)]))
    monkeypatch.setattr(training._tests, "at_lengths", dict)
    list(training.advance())
    assert training.result()["epochs"] == 6


def test_the_last_batch_counts_what_it_holds():
    """20 examples in batches of 8: a step on the last 4 equals a plain step on them."""
    size = replace(STUDY.size, embedding_dropout=0.0, attention_dropout=0.0)
    training = CellTraining("attention", TASK, (0,), size, torch.device("cpu"))
    model = training.stack.one(0).train()
    training._clock.fill_(2)
    rows = training._order[2, 0]
    ids, targets = (part[rows[rows >= 0]] for part in training._train)
    assert len(ids) == 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    torch.nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), targets.flatten()).backward()
    optimizer.param_groups[0]["lr"] = float(training._rates[2, 0])
    optimizer.step()
    training._step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(training.stack.parameters[name][0], parameter, rtol=1e-4, atol=2e-6)


def test_a_loss_on_the_answers_counts_nothing_else():
    task = replace(TASK, training=replace(TASK.training, answers_only=True))
    training = CellTraining("attention", task, (0,), STUDY.size, torch.device("cpu"))
    targets = training._train[1]
    assert (targets[:, :-1] == IGNORED).all()
    assert torch.equal(
        targets[:, -1], CellTraining("attention", TASK, (0,), STUDY.size, torch.device("cpu"))._train[1][:, -1]
    )
    list(training.advance())
    assert make_study(answers_only=True).tasks[0].training.answers_only
    assert make_study(answers_only=True, epochs=40).tasks[0].training.warmup_epochs == 2


@pytest.mark.slow
def test_processes_give_the_same_numbers(finished, tmp_path):
    _, results, _ = finished
    study = replace(STUDY, mixers=("attention", "h3"))
    again = run_study(study, tmp_path, device="cpu", jobs=2)
    for name, result in results.items():
        assert again[name]["seeds"] == result["seeds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixers": ["hyper3"]}, "no mixer 'hyper3'; the nearest is 'h3'"),
        ({"tasks": ["induction"]}, "no task 'induction'; the nearest is 'induction_head'"),
        ({"tasks": ["selective_copying"], "quick": True}, "no task 'selective_copying'"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"mixers": ["h3", "h3"]}, "mixers must be one or more, each once, got h3, h3"),
    ],
)
def test_tables_that_cannot_be(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_study(**arguments)


def test_devices_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="device must be cuda or cpu, got 'tpu'"):
        run_study(STUDY, tmp_path, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="PyTorch finds none"):
            run_study(STUDY, tmp_path, device="cuda")


def test_a_table_tests_after_every_pass_unless_told_otherwise():
    task = replace(TASK, training=Training(epochs=5, warmup_epochs=0, batch=8))
    training = CellTraining("attention", task, (0,), STUDY.size, torch.device("cpu"))
    assert training._test_steps() == [3, 6, 9, 12, 15]


def test_the_published_table_is_the_default():
    study = make_study()
    assert study.mixers == ("h3", "s4d", "gss", "attention")
    assert [task.name for task in study.tasks] == ["induction_head", "associative_recall_10", "associative_recall_20"]
    assert study.seeds == (0, 1, 2)
    shorter = make_study(epochs=10).tasks[0].training
    assert (shorter.epochs, shorter.warmup_epochs) == (10, 1)
