"""A cell on a GPU: captured steps and tests, and going on from where the time was up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hippos.data.synthetic import AssociativeRecall
from hippos.experiments.synthetics import ModelSize, Study, TableTask, Training, run_study, running
from hippos.experiments.synthetics.training import CellTraining

pytestmark = pytest.mark.gpu

TASK = TableTask(
    "associative_recall_10",
    "associative recall",
    AssociativeRecall(vocab_size=10, input_seqlen=6),
    Training(epochs=6, warmup_epochs=1, batch=8, lr=1e-3),
    n_train=60,
    n_test=40,
    lengths=(6, 12),
    watched_lengths=(12,),
)
STUDY = Study(("h3", "s4d", "gss", "attention"), (TASK,), (0, 1), ModelSize(d_model=16, d_state=8))
PARTS = ("curve", "seeds", "recall")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run_study(STUDY, tmp_path_factory.mktemp("whole"), device="cuda")


def test_cells_side_by_side_give_what_each_gives_alone(whole, tmp_path):
    for mixer in ("h3", "attention"):
        alone = run_study(replace(STUDY, mixers=(mixer,)), tmp_path / mixer, device="cuda")
        for name, result in alone.items():
            assert all(result[part] == whole[name][part] for part in PARTS)


def test_a_table_goes_on_from_where_the_time_was_up(whole, tmp_path, monkeypatch):
    class ThreeTurns(running._Keeper):
        """Has time for three turns."""

        turns = 0

        def go_on(self) -> bool:
            self.turns += 1
            self._deadline = 0.0 if self.turns == 3 else running.NEVER
            return super().go_on()

    monkeypatch.setattr(running, "_Keeper", ThreeTurns)
    results, n_runs = {}, 0
    while len(results) < len(STUDY.cells):
        results = run_study(STUDY, tmp_path, device="cuda")
        n_runs += 1
        assert n_runs < 10
    assert n_runs > 2
    for name, result in whole.items():
        assert all(results[name][part] == result[part] for part in PARTS), name


@pytest.mark.parametrize("mixer", ["h3", "attention_rotary"])
def test_a_captured_test_measures_the_models_as_they_are(mixer):
    cell = CellTraining(mixer, TASK, (0, 1), STUDY.size, torch.device("cuda"))
    runner = cell._make_runner()
    found = []
    for n_steps in (0, 20):
        runner.take(n_steps)
        runner.start_test()
        torch.cuda.synchronize()
        found.append(runner.finished_test().clone())
        assert torch.equal(found[-1], cell._tests.measure().cpu())
    assert not torch.equal(*found)
