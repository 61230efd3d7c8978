from __future__ import annotations

import platform

import torch

from hippos.bench.harness import Machine, describe_machine
from hippos.bench.harness import machine as machine_module


def test_this_machine():
    machine = describe_machine(torch.device("cpu"))
    assert machine.cpu
    assert machine.n_cores >= 1
    assert machine.n_threads == torch.get_num_threads()
    assert machine.versions["torch"] == torch.__version__
    assert machine.versions["python"] == platform.python_version()
    assert machine.gpu is None


def test_slug_names_the_gpu_or_the_processor():
    machine = Machine("AMD EPYC(tm) 9", 4, 2, None, None, "Linux x86_64", {}, None)
    assert machine.slug == "amd-epyc-tm-9-2c"
    gpu = Machine("AMD EPYC", 4, 2, None, "NVIDIA H100 80GB HBM3", "Linux x86_64", {}, None)
    assert gpu.slug == "nvidia-h100-80gb-hbm3"


def test_no_git_means_no_commit(monkeypatch):
    monkeypatch.setattr(machine_module, "_output_of", lambda command: "")
    assert describe_machine(torch.device("cpu")).commit is None


def test_an_untracked_copy_in_somebodys_repository_has_no_commit(monkeypatch):
    monkeypatch.setattr(machine_module, "_output_of", lambda command: "abc123" if "rev-parse" in command else "")
    assert describe_machine(torch.device("cpu")).commit is None


def test_a_changed_package_is_marked(monkeypatch):
    answers = {"rev-parse": "abc123", "ls-files": "version.py", "status": " M errors.py"}
    monkeypatch.setattr(
        machine_module, "_output_of", lambda command: next(answers[word] for word in command if word in answers)
    )
    assert describe_machine(torch.device("cpu")).commit == "abc123-dirty"
