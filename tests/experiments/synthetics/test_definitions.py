"""The table's rows learn what the published layers learn: loss curves against models written from the equations.

The equations themselves are checked against golden tensors of the public code first.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hippos.experiments.synthetics import TASKS, ModelSize, Training
from hippos.experiments.synthetics.training import CellTraining
from tests.experiments.synthetics.plain_models import MIXERS, PlainLM, gss, s4d
from tests.layers.test_gss import NAMES as GSS_NAMES
from tests.layers.test_s4d import SAFARI_NAMES

N_STEPS, N_TRAIN = 30, 320
# Rounding in float32 makes 5e-7 of a nat.
TOLERANCE = 1e-5
NO_DROPOUT = ModelSize(embedding_dropout=0.0, attention_dropout=0.0)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def test_plain_s4d_is_the_golden_layer(golden):
    tensors, _ = golden("safari_s4d_layer")
    p = {ours: tensors[f"default_nssm1/param/{name}"].double() for ours, name in SAFARI_NAMES.items()}
    p = {name: value if name.startswith("out_proj") else value.squeeze(0) for name, value in p.items()}
    p["diag.A_real"], p["diag.A_imag"] = p["diag.A_real"].unsqueeze(0), p["diag.A_imag"].unsqueeze(0)
    p["diag.log_dt"] = tensors["default_nssm1/param/kernel.kernel.log_dt"].double()
    u, y = (tensors[f"default_nssm1/{name}"] for name in ("u", "y"))
    assert relative_error(s4d(p, u.double()), y) < 3e-6
    assert relative_error(s4d(p, u.double(), is_bilinear=True), y) > 1e-3


def test_plain_gss_is_the_golden_layer(golden):
    tensors, _ = golden("gss_lucidrains")
    p = {ours: tensors[f"gss_d16/param/{name}"].double() for ours, name in GSS_NAMES.items()}
    parts = [tensors[f"gss_d16/param/dss.C_{part}"].double() for part in ("real", "imag")]
    x = tensors["gss_d16/x"].double()
    weight, bias = (tensors[f"gss_d16/param/norm.{kind}"].double() for kind in ("weight", "bias"))
    u = F.layer_norm(x, (16,), weight, bias)
    assert relative_error(gss({**p, "diag.C": torch.stack(parts, dim=-1)}, u) + x, tensors["gss_d16/f64/y"]) < 1e-10


def losses(mixer: str, plain_mixer=None) -> tuple[list[float], list[float]]:
    """Loss at every step, of the table's training and of the plain model's, from the same weights and batches."""
    training = Training(epochs=3, warmup_epochs=1, lr=2e-3, solved_tests=0)
    task = replace(TASKS["associative_recall_10"], training=training, n_train=N_TRAIN, n_test=10)
    cell = CellTraining(mixer, task, (0,), NO_DROPOUT, torch.device("cpu"))
    start = {name: parameter[0] for name, parameter in cell.stack.parameters.items() if name != "lm_head.weight"}
    plain = PlainLM(start, plain_mixer or MIXERS[mixer], cell.stack.dynamics(), training.weight_decay)
    ours, theirs = [], []
    for step in range(N_STEPS):
        rows = cell._order[step, 0]
        ids, targets = cell._train[0][rows], cell._train[1][rows]
        with torch.no_grad():
            ours.append(float(cell.stack.losses(ids[None], targets[None], torch.full((32,), 1 / 32))[0]))
        theirs.append(plain.step(ids, targets, *cell._rates[step].tolist()))
        cell._step()
    return ours, theirs


@pytest.mark.parametrize("mixer", MIXERS)
def test_training_follows_the_definition(mixer):
    ours, theirs = losses(mixer)
    assert max(abs(one - other) for one, other in zip(ours, theirs, strict=True)) < TOLERANCE
    assert ours[-1] < ours[0] - 0.1


def test_another_discretisation_would_be_seen():
    ours, theirs = losses("s4d", lambda p, u: s4d(p, u, is_bilinear=True))
    assert max(abs(one - other) for one, other in zip(ours, theirs, strict=True)) > 5 * TOLERANCE
